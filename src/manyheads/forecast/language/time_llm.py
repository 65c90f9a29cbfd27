"""Time-LLM (#90): patches of a series are rewritten as mixtures of words, and a frozen language model reads them after a prompt.

Jin et al., "Time-LLM: Time Series Forecasting by Reprogramming Large Language Models", arXiv:2310.01728, mean of four horizons,
MSE / MAE: ETTh1 .408 / .423, Weather .225 / .257, ECL .158 / .252, Traffic .388 / .264. arXiv:2406.16964 finds that it does not
get worse without the language model.

    patches      [x, x_T repeated S times] in windows of P steps, S apart; a circular convolution of kernel 3 over them, no bias
                 [T] -> [n, P] -> [n, Dp]
    prototypes   E' = W E + b of the table E [V, Dl] of token vectors; W [M, V], M = 1000
    heads        Q = patches Wq, K = E' Wk, V = E' Wv, A of them, Dk wide; softmax(Q K^T / sqrt(Dk)) V Wo         [n, Dl]
    prompt       description, task, min, max, median, trend and the 5 strongest lags of the window, as text       [m, Dl]
    states       the frozen model's states of [prompt; patches]; of the last n the first d_ff numbers             [n, d_ff]
    forecast     W [n d_ff] + b, all steps at once; squared error in the scale of the series

Trained are W and b, the convolution, Wq, Wk, Wv, Wo and the last layer:

    M V + M + 3 P Dp + (Dp + 1) A Dk + 2 (Dl + 1) A Dk + (A Dk + 1) Dl + (n d_ff + 1) H numbers

We depart: the description is the user's (the released code describes ETT whatever is read), padded prompts are masked, each
strong lag is named once (the autocorrelation of a window says k and T - k, and 0 first of all), and the rate falls linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.network import POINT
from manyheads.forecast.core.windows import Shape
from manyheads.forecast.language.frozen import FrozenLanguage, LanguageForecaster, LanguageTrunk
from manyheads.inputs import check_integer, check_number, check_text

LAGS = 5


class Reprogramming(nn.Module):
    """Patches as mixtures of prototypes of words, by attention."""

    def __init__(self, settings: TimeLLM, vocabulary: int, width: int) -> None:
        super().__init__()
        inner = settings.n_heads * settings.head_dim
        self.n_heads, self.dropout = settings.n_heads, settings.dropout
        self.prototypes = nn.Linear(vocabulary, settings.prototypes)
        self.query = nn.Linear(settings.patch_width, inner)
        self.key, self.value = nn.Linear(width, inner), nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, patches: Float[Tensor, "N n Dp"], table: Float[Tensor, "V D"]) -> Float[Tensor, "N n D"]:
        """What the patches are in the language model's vectors."""
        words = self.prototypes(table.mT).mT  # [M, D]
        q = self.query(patches).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = (part(words).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)[None] for part in (self.key, self.value))
        k, v = (part.expand(len(q), -1, -1, -1) for part in (k, v))
        z = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return out


class TimeLLMTrunk(LanguageTrunk):
    """From windows to the states of their patches. `width` is n d_ff, of all patches of a channel."""

    def __init__(self, language: FrozenLanguage, settings: TimeLLM, shape: Shape) -> None:
        super().__init__(language, settings.body)
        s, (vocabulary, width) = settings, language.embeddings.shape
        self.patch, self.every, self.kept = s.patch, s.patch_stride, s.kept
        self.tokens = (shape.context + s.patch_stride - s.patch) // s.patch_stride + 1
        self.width = self.tokens * s.kept
        self.embed = nn.Conv1d(s.patch, s.patch_width, 3, padding=1, padding_mode="circular", bias=False)
        self.reprogram = Reprogramming(s, vocabulary, width)
        self.description, self.horizon, self.prompts = s.description, shape.horizon, s.prompts and s.reads_series

    def forward(self, past_values: Float[Tensor, "B T C"]) -> Float[Tensor, "B C n F"]:
        """The states of each channel's patches."""
        x = past_values.transpose(1, 2)
        rows = x.flatten(0, 1)
        patches = F.pad(rows[:, None], (0, self.every), mode="replicate")[:, 0].unfold(-1, self.patch, self.every)
        vectors = self.reprogram(self.embed(patches.mT).mT, self.language.embeddings)
        states = self.read(vectors, [self.prompt(row) for row in rows] if self.prompts else [])
        return states[:, -self.tokens :, : self.kept].unflatten(0, x.shape[:2])

    def read(self, vectors: Float[Tensor, "N n D"], prompts: list[str], padding: int = 0) -> Float[Tensor, "N m D"]:
        """The body's states of prompts and patches; shorter prompts have padding before them, all have `padding` more."""
        if not prompts:
            return self.body(vectors)
        ids = [self.language.ids(text) for text in prompts]
        longest = max(map(len, ids)) + padding
        words = torch.stack([F.pad(one, (longest - len(one), 0)) for one in ids]).to(vectors.device)
        there = torch.stack([torch.arange(longest) >= longest - len(one) for one in ids]).to(vectors.device)
        mask = F.pad(there, (0, vectors.shape[1]), value=True).long()
        self._check_length(mask)
        return self.body(torch.cat([self.language.embeddings[words], vectors], 1), mask)

    def _check_length(self, mask: Int[Tensor, "N m"]) -> None:
        most = getattr(self.language.model.config, "max_position_embeddings", None)
        if most is not None and mask.shape[1] > most:
            raise UnsupportedError(
                f"prompt and patches are {mask.shape[1]} tokens, and the language model reads {most}; shorten the description or "
                "the context."
            )

    def prompt(self, window: Float[Tensor, "T"]) -> str:
        """The text before the patches of a channel."""
        low, middle, high = (f"{float(value):.3f}" for value in (window.min(), window.median(), window.max()))
        trend = "upward" if window[-1] > window[0] else "downward"
        lags = ", ".join(map(str, strongest_lags(window)))
        about = f"Dataset description: {self.description} " if self.description else ""
        return (
            f"{about}Task description: forecast the next {self.horizon} steps given the previous {len(window)} steps. Input "
            f"statistics: min {low}, max {high}, median {middle}, the trend is {trend}, the top lags are {lags}."
        )


def strongest_lags(window: Float[Tensor, "T"], most: int = LAGS) -> list[int]:
    """The lags from 1 to T / 2 of the highest circular autocorrelation, the strongest first."""
    spectrum = torch.fft.rfft(window - window.mean())
    found = torch.fft.irfft(spectrum * spectrum.conj(), n=len(window))[1 : len(window) // 2 + 1]
    return [int(lag) + 1 for lag in found.topk(min(most, len(found))).indices]


@forecasts("time-llm")
@dataclass(kw_only=True, eq=False)
class TimeLLM(LanguageForecaster):
    """`patch` P steps, `patch_stride` S apart, `patch_width` Dp; `n_heads` A of `head_dim` Dk; `prototypes` M; `kept` d_ff.

    `description` says what the series are, in a sentence. `prompts`: whether there is a prompt at all; a body that is no language
    model has none.
    """

    PAPER: ClassVar[str] = "2310.01728"
    LOSS: ClassVar[str] = "mse"

    context: int = 96
    objective: str = POINT
    patch: int = 16
    patch_stride: int = 8
    patch_width: int = 16
    n_heads: int = 8
    head_dim: int = 32
    prototypes: int = 1000
    kept: int = 32
    dropout: float = 0.1
    description: str = ""
    prompts: bool = True
    rate: float = 1e-3
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "patch_stride", "patch_width", "n_heads", "head_dim", "prototypes", "kept"):
            check_integer(getattr(self, name), name, 1)
        check_number(self.dropout, "dropout", 0.0, 1.0)
        check_text(self.description, "description")
        if self.patch > self.context:
            raise InputError(f"a patch of {self.patch} steps does not fit into a context of {self.context}.")

    def trunk(self, shape: Shape) -> nn.Module:
        """Patches, reprogramming and body."""
        width = self.language.width
        if self.kept > width:
            raise InputError(f"kept is {self.kept}, and the language model's states have {width} numbers.")
        return TimeLLMTrunk(self.language, self, shape)
