"""GPHT (#18): one causal decoder for any horizon, pretrained on many series; coarse stages first, each on what is left over.

Liu et al., "Generative Pretrained Hierarchical Transformer for Time Series Forecasting", arXiv:2402.16516, look-back 336, heads
tuned, MSE / MAE: ETTh1 at 96, 192, 336, 720 .363 / .382, .405 / .408, .430 / .423, .414 / .435; at 96 Electricity .128 / .219,
Traffic .346 / .234, Exchange .087 / .207. Not tuned, the target set left out: Exchange .098, Traffic .411, Weather .202.

Every channel is a row x [T] of n tokens of P steps, in the window's scale. Stage s, of pooling rate k (8, 4, 2, 1):

    tokens     max over k steps each, P / k numbers a token, W x without bias + sinusoidal positions      [n, P / k] -> [n, D]
    layers     x = LN(x + causal attention), x = LN(x + W_2 GELU(W_1 x)); a last LN gives h
    o          W h + b: block j is what stage s says of token j + 1                                        [n, D] -> [n, P]
    rest       x - shift o, where shift moves a token to the right and zero comes first                    for stage s + 1
    forecast   sum over stages of o; the squared error of all n blocks, in the scale of the series

The forecast of more than P steps is rolled out (`core.next_patch`). `fit` pretrains on any frame: rows are drawn evenly over
windows, so large series dominate as in the paper. `tune_heads(df)` trains W and b of the stages alone on another frame, and
`zero_shot(df)` nothing.

A window's scale is made of all its tokens, so tokens do not see later ones only inside of the network. We depart in the schedule:
the rate falls linearly, the paper's is halved each epoch. Quantiles are ours: a head on the last token's states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.next_patch import NextPatchForecaster, NextPatchHead, NextPatchSettings
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.core.windows import Shape
from manyheads.forecast.transformers.chronos2_model import eager_attention_forward
from manyheads.inputs import check_integer, check_number
from manyheads.learning import Head, MultiHead
from manyheads.progress import Bar

__all__ = ["GPHT", "GPHTConfig", "GPHTTrunk", "eager_attention_forward", "shifted"]


class GPHTConfig(PretrainedConfig):
    """The sizes of the network: a stage for each of `pools`, of `stage_layers` layers each. The defaults are the paper's."""

    model_type = "gpht"

    def __init__(
        self,
        hidden_size: int = 512,
        num_attention_heads: int = 8,
        intermediate_size: int = 2048,
        stage_layers: int = 3,
        pools: tuple[int, ...] = (8, 4, 2, 1),
        patch: int = 48,
        context_length: int = 336,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.num_attention_heads, self.intermediate_size = (
            hidden_size,
            num_attention_heads,
            intermediate_size,
        )
        self.stage_layers, self.pools, self.patch = stage_layers, list(pools), patch
        self.context_length, self.dropout = context_length, dropout
        super().__init__(**kwargs)


class CausalAttention(nn.Module):
    """Heads that read their own token and earlier ones, with biases."""

    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.n_heads = config, config.num_attention_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Float[Tensor, "N n D"]) -> Float[Tensor, "N n D"]:
        """What the heads write."""
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        dropout = self.config.dropout if self.training else 0.0
        kind = self.config._attn_implementation
        if kind in ("sdpa", "eager"):
            z = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)
        else:  # somebody watches
            n = x.shape[1]
            later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
            mask = torch.zeros(n, n, device=x.device, dtype=x.dtype).masked_fill(later, torch.finfo(x.dtype).min)
            attend, scaling = ALL_ATTENTION_FUNCTIONS[kind], q.shape[-1] ** -0.5
            z, _ = attend(self, q, k, v, mask.expand(len(x), 1, n, n), scaling=scaling, dropout=dropout)
        out: Tensor = self.o(z.flatten(-2))
        return out


class GPHTLayer(nn.Module):
    """Attention and a feed-forward layer, each added and normalised."""

    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = CausalAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.intermediate_size), nn.GELU(), nn.Linear(config.intermediate_size, width)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.p = config.dropout

    def forward(self, x: Float[Tensor, "N n D"]) -> Float[Tensor, "N n D"]:
        """The stream after both."""
        x = self.norms[0](x + F.dropout(self.attention(x), self.p, self.training))
        out: Tensor = self.norms[1](x + F.dropout(self.mlp(x), self.p, self.training))
        return out


class GPHTTrunk(PreTrainedModel):
    """The stages. `width` is what the heads read of a token: what the stages say of the next one, then their states."""

    config_class = GPHTConfig
    main_input_name = "past_values"
    _supports_sdpa = True

    def __init__(self, config: GPHTConfig) -> None:
        super().__init__(config)
        stages, width = len(config.pools), config.hidden_size
        self.width = config.patch + stages * width
        self.embed = nn.ModuleList([nn.Linear(config.patch // k, width, bias=False) for k in config.pools])
        # One list of all layers, so that they are numbered through: stage s has the layers from s * stage_layers on.
        self.layers = nn.ModuleList([GPHTLayer(config) for _ in range(stages * config.stage_layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in config.pools])
        self.heads = nn.ModuleList([nn.Linear(width, config.patch) for _ in config.pools])

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: PyTorch's own weights stay."""

    def get_input_embeddings(self) -> nn.Module:
        """The first stage's map of tokens."""
        first: nn.Module = self.embed[0]
        return first

    def stages(
        self, values: Float[Tensor, "N T"]
    ) -> Iterator[tuple[Float[Tensor, "N T"], Float[Tensor, "N n D"], Float[Tensor, "N T"]]]:
        """What each stage is given, its states, and what it says of the next tokens."""
        config, rest = self.config, values
        for s, k in enumerate(config.pools):
            pooled = F.max_pool1d(rest[:, None], k)[:, 0].unflatten(-1, (-1, config.patch // k))
            x = self.embed[s](pooled)
            x = F.dropout(x + _positions(*x.shape[1:]).to(x), config.dropout, self.training)
            for layer in self.layers[s * config.stage_layers : (s + 1) * config.stage_layers]:
                x = layer(x)
            states = self.norms[s](x)
            said = self.heads[s](states).flatten(1)
            yield rest, states, said
            rest = rest - shifted(said, config.patch)

    def forward(self, past_values: Float[Tensor, "B T C"]) -> BaseModelOutput:
        """[B, C, n, P + S D] as `last_hidden_state`: the forecast of the patch after each token, and the states of the stages."""
        x = past_values.transpose(1, 2)
        _, states, said = zip(*self.stages(x.flatten(0, 1)), strict=True)
        patches = torch.stack(said).sum(0).unflatten(-1, (-1, self.config.patch))
        return BaseModelOutput(last_hidden_state=torch.cat([patches, *states], -1).unflatten(0, x.shape[:2]))


def shifted(blocks: Float[Tensor, "N T"], patch: int) -> Float[Tensor, "N T"]:
    """A token to the right; the first one is zero."""
    return F.pad(blocks[:, :-patch], (patch, 0))


def _positions(tokens: int, width: int) -> Float[Tensor, "n D"]:
    """Sines and cosines of rising wavelengths, in turn."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    angle = torch.arange(tokens)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class SaidHead(NextPatchHead):
    """The forecast that the stages have made already: the first P numbers of a token's state. It has nothing to learn."""

    Settings = NextPatchSettings

    def __init__(self, settings: NextPatchSettings) -> None:
        Head.__init__(self, settings)

    def forward(self, states: Float[Tensor, "B C n W"]) -> Float[Tensor, "B V n P"]:
        """The patches, in the window's scale."""
        return states[:, : self.settings.targets, :, : self.settings.patch]


@forecasts("gpht")
@dataclass(kw_only=True, eq=False)
class GPHT(NextPatchForecaster):
    """`pools` k of the stages, each a divisor of `patch`; `layers` of a stage, `width` D, `n_heads`, `hidden` of the MLP.

    The defaults are a small network for one processor; the paper's has patch 48, width 512, 8 heads, hidden 2048, 3 layers.
    """

    PAPER: ClassVar[str] = "2402.16516"

    context: int = 168
    pools: tuple[int, ...] = (8, 4, 2, 1)
    width: int = 64
    n_heads: int = 4
    hidden: int = 128
    layers: int = 1
    dropout: float = 0.1
    rate: float = 1e-3
    decay: float = 1.0

    start_: dict[str, Tensor] | None = field(default=None, init=False, repr=False)  # weights to go on from
    tunes_: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "n_heads", "hidden", "layers"):
            check_integer(getattr(self, name), name, 1)
        check_number(self.dropout, "dropout", 0.0, 1.0)
        if self.width % self.n_heads or self.width % 2:
            raise InputError(f"width is {self.width}; it has to be even and a multiple of {self.n_heads} heads.")
        if not self.pools or any(k < 1 or self.patch % k for k in self.pools):
            raise InputError(f"pools are {list(self.pools)}; each has to divide the patch of {self.patch} steps.")

    def trunk(self, shape: Shape) -> nn.Module:
        """The stages."""
        sizes = (self.width, self.n_heads, self.hidden, self.layers, tuple(self.pools), self.patch)
        return GPHTTrunk(GPHTConfig(*sizes, context_length=shape.context, dropout=self.dropout))

    def next_head(self, width: int, shape: Shape) -> Head:
        """What the stages say."""
        return SaidHead(NextPatchSettings(width, self.patch, shape.targets, self.seed))

    def built(self, shape: Shape) -> MultiHead:
        """New weights, or those to go on from; no weight depends on how many targets there are."""
        heads = super().built(shape)
        if self.start_ is not None:
            heads.load_state_dict(self.start_)
            heads.backbone.requires_grad_(False)
            heads.backbone.heads.requires_grad_(True)
        return heads

    def tune_heads(
        self,
        df: pd.DataFrame,
        *,
        rate: float = 1e-4,
        epochs: int | None = None,
        steps: int | None = None,
        **how: Any,
    ) -> GPHT:
        """One whose stages' heads (and quantile head) go on to learn on another frame, with nothing else changed.

        This one stays as it is. `how` is what `fit` takes.
        """
        other = self.fresh(rate=rate, epochs=epochs or self.epochs, steps=steps)
        return self._onto(other, df, tunes=True, how=how)

    def zero_shot(self, df: pd.DataFrame, **how: Any) -> GPHT:
        """One with the same weights that forecasts another frame."""
        return self._onto(self.fresh(), df, tunes=False, how=how)

    def _onto(self, other: Any, df: pd.DataFrame, *, tunes: bool, how: dict[str, Any]) -> GPHT:
        heads, _ = self._learned
        other.start_, other.tunes_ = {name: value.clone() for name, value in heads.state_dict().items()}, tunes
        found: GPHT = other.fit(df, **how)
        return found

    def _fit(self, panel: Panel, *, validation: int | None, folder: Path | None, bar: Bar) -> None:
        if self.start_ is None or self.tunes_:
            super()._fit(panel, validation=validation, folder=folder, bar=bar)
        else:
            self.scales_, panel = {}, self._laid_out(panel)
            windows = self._windows(panel)
            self.heads_, self.shape_ = self.built(windows.shape).eval(), windows.shape
            self.scales_ = {one.name: (m, s) for one, m, s in zip(panel.series, windows.mean, windows.std, strict=True)}
        self._learned[0].requires_grad_(True)
