"""`NextPatchForecaster`: a causal trunk over patches of the past that says the next patch at each of them, and is rolled out.

The context of n patches of P steps is n tokens. The trunk gives states [B, C, n, D]; token j, which may see patches 0 to j, says
patch j + 1 (of the window scaled by its context), so that one window teaches n steps of a roll-out. To forecast, the last token's
patch is taken for true, the window moves on by P steps and is scaled anew.

Quantiles come from a second head on the last token whose gradient stops at the trunk. They are those of one patch ahead: rolled
out they do not know of the earlier patches' error, and later ones are too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.forecast.core.heads import TARGET, QuantileHorizonHead, QuantileHorizonSettings
from manyheads.forecast.core.network import POINT, QUANTILES, NetworkForecaster
from manyheads.forecast.core.windows import Shape
from manyheads.inputs import check_integer
from manyheads.learning import Attached, Head, LinearHead, MultiHead

NEXT_TARGET = ("past_values", "past_observed_mask", *TARGET)


@dataclass(frozen=True)
class NextPatchSettings:
    """`width` of a token's state, steps of a patch, targets, the seed of the weights."""

    width: int
    patch: int
    targets: int
    seed: int = 0


class NextPatchHead(Head):
    """W h + b: the patch after each token. The loss is the mean squared error of all of them, in the scale of the series."""

    Settings = NextPatchSettings

    def __init__(self, settings: NextPatchSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, settings.patch, settings.seed)

    def forward(self, states: Float[Tensor, "B C n D"]) -> Float[Tensor, "B V n P"]:
        """The patches, in the window's scale."""
        out: Tensor = self.linear(states[:, : self.settings.targets])
        return out

    def loss(self, output: Float[Tensor, "B V n P"], target: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        """Mean squared error of what was observed."""
        wanted, counted = next_patches(target, *output.shape[1:])
        off = (output - wanted) * target[-1][:, :, None, None]
        return (off.square() * counted).sum() / counted.sum().clamp_min(1)

    def metrics(self, output: Float[Tensor, "B V n P"], target: tuple[Tensor, ...]) -> dict[str, float]:
        """The mean squared error of the last patch alone, which is the forecast."""
        wanted, counted = next_patches(target, *output.shape[1:])
        off = (output - wanted)[:, :, -1] * target[-1][:, :, None]
        return {"mse": float((off.square() * counted[:, :, -1]).sum() / counted[:, :, -1].sum().clamp_min(1))}


def next_patches(
    target: tuple[Tensor, ...], targets: int, tokens: int, patch: int
) -> tuple[Float[Tensor, "B V n P"], Float[Tensor, "B V n P"]]:
    """The patch that follows each token, and which of its steps were observed; of entries named by `NEXT_TARGET`."""
    past, seen, future, counted, _ = target
    both = [
        torch.cat([before[..., :targets].transpose(1, 2), after], -1)[..., patch:].unflatten(-1, (tokens, patch))
        for before, after in ((past, future), (seen, counted))
    ]
    return both[0], both[1]


class LastToken(QuantileHorizonHead):
    """Quantiles of the patch after the last token."""

    def forward(self, states: Float[Tensor, "B C n D"]) -> Float[Tensor, "B V P Q"]:
        """In the window's scale."""
        return super().forward(states[:, :, -1])


@dataclass(kw_only=True, eq=False)
class NextPatchForecaster(NetworkForecaster):
    """`patch` P steps a token; the context is a whole number of them. Methods fill in `trunk`, whose `width` is a token's D."""

    LOSS: ClassVar[str] = "mse"

    context: int = 96
    patch: int = 24
    objective: str = POINT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.patch, "patch", 1)
        if self.context % self.patch:
            raise InputError(f"a context of {self.context} is no whole number of patches of {self.patch}.")
        if self.objective != POINT:
            raise InputError("patches are learned by their squared error; give objective='point'.")

    @property
    def ahead(self) -> int:
        """One patch."""
        return self.patch

    def attached(self, trunk: nn.Module, shape: Shape) -> dict[str, Attached]:
        """The next patch after every token, and quantiles after the last."""
        width: int = trunk.width  # type: ignore[assignment]
        heads = {POINT: Attached(self.next_head(width, shape), NEXT_TARGET, pool="tokens")}
        if self.levels:
            ahead = QuantileHorizonSettings(
                width, shape.horizon, shape.targets, tuple(self.levels), self.WINDOWED, self.seed + 1
            )
            heads[QUANTILES] = Attached(LastToken(ahead), TARGET, pool="tokens", gradient="stops")
        return heads

    def next_head(self, width: int, shape: Shape) -> Head:
        """The head that says the next patch; a method may have one of its own with the same target."""
        return NextPatchHead(NextPatchSettings(width, self.patch, shape.targets, self.seed))

    def _outputs(self, heads: MultiHead, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super()._outputs(heads, batch)
        return found | {POINT: found[POINT][:, :, -1]}
