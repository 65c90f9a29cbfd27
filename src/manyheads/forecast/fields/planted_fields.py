"""Fields whose motion is known, for the experiments of this folder."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from manyheads.forecast.fields.grid import latitude_weights


def smooth_noise(
    rng: np.random.Generator, n: int, size: tuple[int, int], cells: float = 2.0
) -> Float[np.ndarray, "n I J"]:
    """Noise of variance 1 that neighbours share: white noise under a Gaussian of so many cells, which wraps."""
    rows, columns = (np.fft.fftfreq(side) for side in size)
    filtered = np.exp(-2 * (np.pi * cells) ** 2 * (rows[:, None] ** 2 + columns**2))
    found: np.ndarray = np.fft.ifft2(np.fft.fft2(rng.standard_normal((n, *size))) * filtered).real
    return found / np.sqrt((filtered**2).mean())


def moved_fields(
    seed: int, length: int, *, size: tuple[int, int] = (12, 48), shift: int = 16, keep: float = 0.9, cells: float = 2.0
) -> Float[np.ndarray, "T 1 I J"]:
    """y(t + 1) = keep times y(t), moved east by `shift` cells, and smooth noise; the variance is 1."""
    rng, y = np.random.default_rng(seed), []
    noise = smooth_noise(rng, length + 50, size, cells)
    now = noise[0]
    for one in noise[1:]:
        now = keep * np.roll(now, shift, -1) + np.sqrt(1 - keep**2) * one
        y.append(now)
    return np.stack(y)[-length:, None].astype(np.float32)


def ridge_error(values: Float[np.ndarray, "T 1 I J"], trained: int) -> float:
    """The MSE after `trained` fields of the best of five ridge regressions from all cells to all cells of the next field.

    The strength is chosen by the last fifth of the training fields; errors are weighted by the cosine of latitude.
    """
    x = torch.from_numpy(values).flatten(1).double()
    rows = values.shape[2]
    weights = latitude_weights(90 - 180 / rows * (np.arange(rows) + 0.5)).expand(rows, values.shape[3]).flatten()

    def error(strength: float, first: int, last: int) -> float:
        a, b = x[: first - 1], x[1:first]
        found = torch.linalg.solve(a.T @ a + strength * torch.eye(a.shape[1], dtype=a.dtype), a.T @ b)
        return float((weights * (x[first - 1 : last - 1] @ found - x[first:last]).square()).mean())

    strengths = (1.0, 10.0, 100.0, 1000.0, 10000.0)
    best = min(strengths, key=lambda strength: error(strength, trained * 4 // 5, trained))
    return error(best, trained, len(x))
