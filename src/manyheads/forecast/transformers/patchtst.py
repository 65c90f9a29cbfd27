"""PatchTST as a trunk: the Transformers library's own model, on which forecast heads stand.

Nie et al., "A Time Series is Worth 64 Words: Long-term Forecasting with Transformers", arXiv:2211.14730. Patches of a channel are
its tokens; channels share all weights and do not see each other. It is none of the catalogue's systems, but the one that most of
them compare with, and its attention heads are opened, read and edited as any model's: `mh.open_model(forecaster.backbone)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.windows import Shape
from manyheads.inputs import check_integer


@forecasts("patchtst")
@dataclass(kw_only=True, eq=False)
class PatchTST(NetworkForecaster):
    """`patch` steps a token, a token every `patch_stride` steps; width, heads, layers and dropout of the encoder."""

    PAPER: ClassVar[str] = "2211.14730"

    context: int = 336
    patch: int = 16
    patch_stride: int = 8
    width: int = 64
    n_heads: int = 4
    layers: int = 3
    dropout: float = 0.1
    rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "patch_stride", "width", "n_heads", "layers"):
            check_integer(getattr(self, name), name, 1)
        if self.patch > self.context:
            raise InputError(f"a patch of {self.patch} steps does not fit into a context of {self.context}.")
        if self.width % self.n_heads:
            raise InputError(f"width {self.width} is no multiple of {self.n_heads} heads.")

    def trunk(self, shape: Shape) -> nn.Module:
        """The encoder; a head reads all its tokens at once."""
        from transformers import PatchTSTConfig, PatchTSTModel

        config = PatchTSTConfig(
            num_input_channels=shape.channels,
            context_length=shape.context,
            patch_length=self.patch,
            patch_stride=self.patch_stride,
            d_model=self.width,
            num_attention_heads=self.n_heads,
            num_hidden_layers=self.layers,
            ffn_dim=2 * self.width,
            attention_dropout=self.dropout,
            ff_dropout=self.dropout,
            positional_dropout=0.0,
            head_dropout=0.0,
            scaling=None,  # windows are scaled already
            prediction_length=shape.horizon,
        )
        module = PatchTSTModel(config)
        tokens = (shape.context - self.patch) // self.patch_stride + 1
        module.width = tokens * self.width  # type: ignore[assignment]
        return module
