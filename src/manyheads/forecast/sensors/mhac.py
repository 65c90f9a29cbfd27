"""MHAC (#85): a convolution over time for each variable, then attention across variables.

"A Daily Tourism Demand Prediction Framework Based on Multi-head Attention CNN: The Case of The Foreign Entrant in South Korea",
arXiv:2112.00328. The paper's sizes could not be verified; those here are our reading. For C variables (targets, past-only
covariates, covariates known ahead), each a window of T steps, and of H more where one is known ahead:

    x_c    W flatten(ReLU conv_3(ReLU conv_3([value, observed])))     [2, T (+ H)] -> [D], shared over variables
    x      x + softmax(q k^T / sqrt(Dh)) v W_O                        over the C variables, in each of `layers`   [B, C, D]
    s_v    ReLU(W flatten(LN x))_v                                    [C D] -> [V, D], which the heads read

What attention makes is equivariant: permuted variables give permuted x; which variable is which is known to the last map alone.
The trunk is a Transformers model, so `mh.open_model(forecaster.backbone)` reads its heads; a position is a variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.windows import Scaling, Shape
from manyheads.forecast.transformers.chronos2_model import eager_attention_forward
from manyheads.inputs import check_integer


class MhacConfig(PretrainedConfig):
    """Sizes: a window's steps T, `ahead` H of `known` covariates (0 without any), V `targets` of C channels."""

    model_type = "mhac"

    def __init__(
        self,
        hidden_size: int = 32,
        num_attention_heads: int = 4,
        num_hidden_layers: int = 1,
        filters: int = 16,
        context_length: int = 28,
        ahead: int = 0,
        known: int = 0,
        targets: int = 1,
        num_input_channels: int = 1,
        mixes: bool = True,
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.filters, self.context_length, self.ahead, self.known = filters, context_length, ahead, known
        self.targets, self.num_input_channels, self.mixes = targets, num_input_channels, mixes
        super().__init__(**kwargs)


class VariableAttention(nn.Module):
    """Attention across variables, every one of which sees all."""

    is_causal = False

    def __init__(self, config: MhacConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.n_heads = config, config.num_attention_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """What the heads write."""
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        kind = self.config._attn_implementation
        attend = eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        z, _ = attend(self, q, k, v, None, scaling=q.shape[-1] ** -0.5, dropout=0.0)
        out: Tensor = self.o(z.flatten(-2))
        return out


class VariableLayer(nn.Module):
    """x + attention."""

    def __init__(self, config: MhacConfig) -> None:
        super().__init__()
        self.attention = VariableAttention(config)

    def forward(self, x: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """The stream after it."""
        out: Tensor = x + self.attention(x)
        return out


class MhacTrunk(PreTrainedModel):
    """From a scaled window to the states of the targets."""

    config_class = MhacConfig
    main_input_name = "past_values"
    _supports_sdpa = True

    def __init__(self, config: MhacConfig) -> None:
        super().__init__(config)
        width, steps = config.hidden_size, config.context_length + config.ahead
        self.width = width
        self.conv1 = nn.Conv1d(2, config.filters, 3, padding=1)
        self.conv2 = nn.Conv1d(config.filters, config.filters, 3, padding=1)
        self.embed = nn.Linear(config.filters * steps, width)
        self.layers = nn.ModuleList(
            [VariableLayer(config) for _ in range(config.num_hidden_layers if config.mixes else 0)]
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(config.num_input_channels * width, config.targets * width)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: PyTorch's own weights stay."""

    def get_input_embeddings(self) -> nn.Module:
        """The map to a variable's vector."""
        return self.embed

    def variables(
        self,
        past_values: Float[Tensor, "B T C"],
        past_observed_mask: Float[Tensor, "B T C"] | None = None,
        future_covariates: Float[Tensor, "B H K"] | None = None,
        future_covariates_mask: Float[Tensor, "B H K"] | None = None,
    ) -> Float[Tensor, "B C D"]:
        """What attention makes of the variables."""
        x = self.embedded(past_values, past_observed_mask, future_covariates, future_covariates_mask)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out

    def forward(
        self,
        past_values: Float[Tensor, "B T C"],
        past_observed_mask: Float[Tensor, "B T C"] | None = None,
        future_covariates: Float[Tensor, "B H K"] | None = None,
        future_covariates_mask: Float[Tensor, "B H K"] | None = None,
    ) -> BaseModelOutput:
        """States [B, V, D] of the targets, as `last_hidden_state`."""
        x = self.variables(past_values, past_observed_mask, future_covariates, future_covariates_mask)
        states = self.out(x.flatten(1)).relu().unflatten(-1, (self.config.targets, -1))
        return BaseModelOutput(last_hidden_state=states)

    def embedded(
        self,
        values: Float[Tensor, "B T C"],
        seen: Float[Tensor, "B T C"] | None = None,
        ahead: Float[Tensor, "B H K"] | None = None,
        known: Float[Tensor, "B H K"] | None = None,
    ) -> Float[Tensor, "B C D"]:
        """The variables before attention."""
        seen = torch.ones_like(values) if seen is None else seen
        if self.config.ahead:
            others = values.shape[-1] - self.config.known
            ahead = values.new_zeros(len(values), self.config.ahead, self.config.known) if ahead is None else ahead
            known = torch.zeros_like(ahead) if known is None else known
            values = torch.cat([values, F.pad(ahead, (others, 0))], 1)
            seen = torch.cat([seen, F.pad(known, (others, 0))], 1)
        x = torch.stack([values, seen], 1).permute(0, 3, 1, 2).flatten(0, 1)  # [B C, 2, T (+ H)]
        x = self.conv2(self.conv1(x).relu()).relu()
        out: Tensor = self.embed(x.flatten(1)).unflatten(0, (len(values), -1))
        return out


@forecasts("mhac")
@dataclass(kw_only=True, eq=False)
class Mhac(NetworkForecaster):
    """`width` D, heads, layers of attention, `filters` of the convolutions; `mixes`: whether there is attention at all.

    Covariates are read, past-only ones and those known ahead. Trained to its squared error where `objective` is "point".
    """

    PAPER: ClassVar[str] = "2112.00328"
    COVARIATES: ClassVar[bool] = True
    SCALING: ClassVar[Scaling] = "series"  # a covariate's size says something of the target's

    context: int = 28
    width: int = 32
    n_heads: int = 4
    layers: int = 1
    filters: int = 16
    mixes: bool = True
    epochs: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "n_heads", "layers", "filters"):
            check_integer(getattr(self, name), name, 1)
        if self.width % self.n_heads:
            raise InputError(f"width {self.width} is no multiple of {self.n_heads} heads.")

    def trunk(self, shape: Shape) -> nn.Module:
        """The network up to the states."""
        return MhacTrunk(
            MhacConfig(
                hidden_size=self.width,
                num_attention_heads=self.n_heads,
                num_hidden_layers=self.layers,
                filters=self.filters,
                context_length=shape.context,
                ahead=shape.horizon if shape.known else 0,
                known=shape.known,
                targets=shape.targets,
                num_input_channels=shape.channels,
                mixes=self.mixes,
            )
        )
