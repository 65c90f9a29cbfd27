"""SetConv: observations at any places to a grid, and back (after convolutional conditional neural processes, arXiv:1910.13556).

For a cell g at (phi_g, lam_g) and observations y_n at (phi_n, lam_n), with a length l that is learned, in degrees / 360,

    w_gn      exp(-0.5 dphi^2 / l^2) exp(-0.5 dlam^2 / l^2)        dlam: the short way around the globe; both in degrees / 360
    den_g     sum_n w_gn                                           no unit
    field_g   sum_n w_gn y_n / max(den_g, 1e-6)                    the unit of y

A missing value (NaN) is no observation. The order of observations does not matter. Without any, field and den are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError

LEAST = 1e-6


@dataclass(frozen=True)
class Observations:
    """What one instrument saw: values [T, N, C] at places [T, N] in degrees. Where there are fewer than N, values are NaN."""

    values: Float[Tensor, "T N C"]
    latitude: Float[Tensor, "T N"]
    longitude: Float[Tensor, "T N"]

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape[:2])
        if self.values.ndim != 3 or tuple(self.latitude.shape) != shape or tuple(self.longitude.shape) != shape:
            raise InputError(
                f"values have shape {list(self.values.shape)}, latitudes {list(self.latitude.shape)} and longitudes "
                f"{list(self.longitude.shape)}; give [times, observations, channels] and [times, observations] of places."
            )
        if not bool(self.latitude.isfinite().all() and self.longitude.isfinite().all()):
            raise InputError(
                "a place is NaN or infinity; where nothing was observed give any place, and NaN as its value."
            )

    def at(self, times: Int[Tensor, "B"]) -> Observations:
        """Those of some times."""
        return Observations(self.values[times], self.latitude[times], self.longitude[times])


class SetConv(nn.Module):
    """The formula above, for a grid. `length` is where l begins, in degrees / 360; the paper's is .001."""

    rows: Tensor
    columns: Tensor

    def __init__(self, latitude: Float[Tensor, "I"], longitude: Float[Tensor, "J"], length: float = 0.001) -> None:
        super().__init__()
        self.log_length = nn.Parameter(torch.tensor(float(length)).log())
        self.register_buffer("rows", latitude.float(), persistent=False)
        self.register_buffer("columns", longitude.float(), persistent=False)

    def forward(self, seen: Observations) -> tuple[Float[Tensor, "B C I J"], Float[Tensor, "B C I J"]]:
        """Field and den on the grid, for each channel by itself."""
        there = ~seen.values.isnan()
        rows, columns = self._kernels(seen.latitude, seen.longitude)
        found, den = (
            torch.einsum("bin,bjn,bnc->bcij", rows, columns, x) for x in (seen.values.nan_to_num(), there.to(rows))
        )
        return found / den.clamp_min(LEAST), den

    def read(
        self, field: Float[Tensor, "B C I J"], latitude: Float[Tensor, "B N"], longitude: Float[Tensor, "B N"]
    ) -> Float[Tensor, "B N C"]:
        """A field at places: the same with cells for observations."""
        rows, columns = self._kernels(latitude, longitude)
        den = torch.einsum("bin,bjn->bn", rows, columns)
        return torch.einsum("bin,bjn,bcij->bnc", rows, columns, field) / den.clamp_min(LEAST)[..., None]

    def _kernels(
        self, latitude: Float[Tensor, "B N"], longitude: Float[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B I N"], Float[Tensor, "B J N"]]:
        north = (self.rows[:, None] - latitude[:, None]) / 360
        east = (self.columns[:, None] - longitude[:, None]) / 360
        east = (east + 0.5) % 1 - 0.5
        return (-0.5 * (north / self.log_length.exp()) ** 2).exp(), (-0.5 * (east / self.log_length.exp()) ** 2).exp()
