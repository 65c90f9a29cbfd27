"""The network of TSPulse (#86): a mixer over patches of a window, of its spectrum, and registers; and the heads on it.

With x [T] a window of one channel in the scale of its seen points, and a learned token [P] in place of what is hidden,

    spectrum     F = rfft(x) without the Nyquist bin; s = (max |Re F|, max |Im F|); [Re F / s_1, Im F / s_2]          [T]
    tokens       W_t of the patches of x, W_f of the patches of the spectrum, R registers; LayerNorm         [2 T / P + R, D]
    a block      h + gate(MLP over tokens of LN h), then h + gate(MLP over features of LN h), gate(y) = y softmax(W y + b)
    time         V h of the time tokens                                                                               [T]
    spectrum     U h of the spectrum's tokens; times s, and inverted, it is a window again                            [T]
    signature    logits of the registers, beside softmax(log(1 + |F|)) without the constant bin                   [T / 2 - 1]

s is that of the window with 0 in place of what is hidden, so that it needs no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.forecast.core.windows import EPSILON
from manyheads.learning import Head, LinearHead


def spectrum(x: Float[Tensor, "B C T"], size: Float[Tensor, "B C 2"] | None = None) -> Float[Tensor, "B C T"]:
    """Real, then imaginary parts of all bins but the Nyquist one, each over its size."""
    bins = torch.fft.rfft(x)[..., :-1]
    parts = torch.stack([bins.real, bins.imag], -2)
    return (parts if size is None else parts / size[..., None]).flatten(-2)


def spectrum_size(x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C 2"]:
    """The largest absolute real and imaginary part; 1 where all are 0."""
    size = spectrum(x).unflatten(-1, (2, -1)).abs().amax(-1)
    return torch.where(size > EPSILON, size, 1.0)


def inverse_spectrum(values: Float[Tensor, "B C T"], size: Float[Tensor, "B C 2"]) -> Float[Tensor, "B C T"]:
    """The window of a spectrum; its Nyquist bin is 0."""
    real, imag = (values.unflatten(-1, (2, -1)) * size[..., None]).unbind(-2)
    return torch.fft.irfft(F.pad(torch.complex(real, imag), (0, 1)), n=values.shape[-1])


def seen_as(batch: Mapping[str, Tensor], hidden: Bool[Tensor, "B T C"]) -> dict[str, Tensor]:
    """A batch of windows as the trunk sees it when some points are hidden, and what its heads are compared with.

    Every number the trunk is given comes from points that are there and not hidden; their `shift` and `unit` [B, C] too.
    """
    x, there = batch["window"], batch["past_observed_mask"] > 0
    seen = (there & ~hidden).to(x.dtype)
    n = seen.sum(1).clamp_min(1)
    shift = (x * seen).sum(1) / n
    unit = (((x - shift[:, None]) * seen).square().sum(1) / n + EPSILON).sqrt()
    scaled = (x - shift[:, None]) / unit[:, None]
    whole = (scaled * there).transpose(1, 2)
    values = scaled * seen
    size = spectrum_size(values.transpose(1, 2))
    return {
        **batch,
        "past_values": values,
        "hidden": seen == 0,
        "size": size,
        "shift": shift,
        "unit": unit,
        "whole": whole,
        "asked": (there & hidden).transpose(1, 2).to(x.dtype),
        "complete": there.all(1).to(x.dtype),
        "future": (batch["target"] - shift[..., None]) / unit[..., None],
    }


class SoftmaxGate(nn.Module):
    """y softmax(W y + b), over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, y: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """[..., D] -> [..., D]; smaller than y, which is the paper's."""
        return y * self.linear(y).softmax(-1)


class GatedMLP(nn.Module):
    """LayerNorm over features, two layers along one dimension, and a gate."""

    def __init__(self, width: int, along: int, tokens: bool, dropout: float) -> None:
        super().__init__()
        self.norm, self.tokens = nn.LayerNorm(width), tokens
        self.mlp = nn.Sequential(
            nn.Linear(along, 2 * along), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * along, along), SoftmaxGate(along)
        )

    def forward(self, h: Float[Tensor, "B C N D"]) -> Float[Tensor, "B C N D"]:
        """What is added to the stream."""
        y = self.norm(h)
        out: Tensor = self.mlp(y.transpose(-1, -2)).transpose(-1, -2) if self.tokens else self.mlp(y)
        return out


class MixerBlock(nn.Module):
    """Tokens are mixed, then features."""

    def __init__(self, n_tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.over_tokens = GatedMLP(width, n_tokens, True, dropout)
        self.over_features = GatedMLP(width, width, False, dropout)

    def forward(self, h: Float[Tensor, "B C N D"]) -> Float[Tensor, "B C N D"]:
        """The stream after both."""
        h = h + self.over_tokens(h)
        return h + self.over_features(h)


class TSPulseTrunk(nn.Module):
    """All tokens after the decoder. `time_view`, `spectrum_view` and `registers` are layers by name: what heads read."""

    def __init__(
        self,
        context: int,
        patch: int,
        width: int,
        registers: int,
        blocks: tuple[int, int],
        dropout: float,
        dual: bool,
    ) -> None:
        super().__init__()
        n, views = context // patch, 2 if dual else 1
        self.patch, self.n, self.dual, self.width = patch, n, dual, registers * width
        self.mask_token = nn.Parameter(torch.zeros(patch))
        self.embeddings = nn.ModuleList([nn.Linear(patch, width) for _ in range(views)])
        self.register_tokens = nn.Parameter(torch.randn(registers, width))
        self.norm = nn.LayerNorm(width)
        n_tokens = views * n + registers
        self.encoder, self.decoder = (
            nn.Sequential(*[MixerBlock(n_tokens, width, dropout) for _ in range(count)]) for count in blocks
        )
        self.time_view, self.spectrum_view, self.registers = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(
        self, past_values: Float[Tensor, "B T C"], hidden: Bool[Tensor, "B T C"], size: Float[Tensor, "B C 2"]
    ) -> Float[Tensor, "B C N D"]:
        """States of the tokens of each channel."""
        token = self.mask_token.repeat(self.n)
        x = torch.where(hidden.transpose(1, 2), token, past_values.transpose(1, 2))
        views = [x, spectrum(x, size)] if self.dual else [x]
        tokens = [
            embed(view.unflatten(-1, (self.n, self.patch))) for embed, view in zip(self.embeddings, views, strict=True)
        ]
        registers = self.register_tokens.expand(*x.shape[:2], -1, -1)
        h = self.decoder(self.encoder(self.norm(torch.cat([*tokens, registers], 2))))
        self.time_view(h[:, :, : self.n])
        if self.dual:
            self.spectrum_view(h[:, :, self.n : 2 * self.n])
        self.registers(h[:, :, len(views) * self.n :])
        out: Tensor = h
        return out


@dataclass(frozen=True)
class ViewSettings:
    """`width` of a state, numbers said by it, the seed of the weights."""

    width: int
    outputs: int
    seed: int = 0


class WindowHead(Head):
    """The window from its time tokens; the squared error of the hidden points alone."""

    Settings = ViewSettings

    def __init__(self, settings: ViewSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, settings.outputs, settings.seed)
        with torch.no_grad():
            self.linear.weight.zero_()  # a spectrum that is drawn at random is a window many times too large

    def forward(self, states: Float[Tensor, "B C n D"]) -> Float[Tensor, "B C T"]:
        """[B, C, T] of T / P tokens."""
        out: Tensor = self.linear(states).flatten(2)
        return out

    def loss(self, output: Float[Tensor, "B C T"], target: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        """Mean squared error of what was hidden, in the unit of the seen points."""
        whole, asked, *_ = target
        return _mean((output - whole).square(), asked)


class SpectrumHead(WindowHead):
    """The spectrum from its tokens: its squared error, and that of the hidden points of the window it is inverted to."""

    def loss(self, output: Float[Tensor, "B C T"], target: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        """The sum of both, each in its own unit."""
        whole, _, size, complete = target
        off = (output - spectrum(whole, size)).square().mean(-1)
        return _mean(off, complete) + super().loss(inverse_spectrum(output, size), target)


class SignatureHead(Head):
    """The shape of the spectrum from the registers, by cross-entropy in nats."""

    Settings = ViewSettings

    def __init__(self, settings: ViewSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, settings.outputs, settings.seed)

    def forward(self, states: Float[Tensor, "B C R D"]) -> Float[Tensor, "B C K"]:
        """Logits of the bins."""
        out: Tensor = self.linear(states.flatten(2))
        return out

    def loss(self, output: Float[Tensor, "B C K"], target: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        """Mean over windows of the cross-entropy over bins."""
        whole, complete = target
        share = torch.fft.rfft(whole)[..., 1:-1].abs().log1p().softmax(-1)
        return _mean(-(share * output.log_softmax(-1)).sum(-1), complete)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum() / counted.sum().clamp_min(1)
