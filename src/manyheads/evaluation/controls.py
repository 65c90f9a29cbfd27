"""Controls: is a found effect larger than what random choices give? The one place where p and q are computed.

Against effects r_1 .. r_R of random draws, an observed effect e has, one-sided,

    p = (1 + #{i: r_i >= e - TIE}) / (1 + R)                                at least 1 / (1 + R)

The observed one counts as a draw of its own, so p is never 0. Effects closer than TIE are the same effect with other rounding;
they count as equal, and a tie counts against the claim. Counts are whole numbers, to which TIE does nothing.

For a family of m claims, q (Benjamini and Hochberg, 1995) is the share of false claims to be expected among this one and all
with smaller p:

    q_(k) = min over j >= k of  m p_(j) / j,        p_(1) <= ... <= p_(m)

The usual control of heads is random sets with as many heads in each layer (`matched_sets`); shuffled coefficients or random
directions use the same p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

from manyheads.errors import InputError
from manyheads.heads import HeadSet, mean_stderr

TIE = 1e-5  # effects closer than this are rounding, and count as equal


def p_value(observed: float, null: Sequence[float] | Real[np.ndarray, "R"]) -> float:
    """How rarely `null` is as large as `observed` (formula above); draws that are NaN do not count.

    One-sided, upwards: give both with the other sign where small values are what is claimed. 1 without draws, NaN where
    `observed` is NaN.
    """
    drawn = np.asarray(null, dtype=np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(observed):
        return float("nan")
    return float((1 + (drawn >= observed - TIE).sum()) / (1 + len(drawn)))


def q_values(p: Sequence[float] | Float[np.ndarray, "M"]) -> Float[np.ndarray, "M"]:
    """Q of each claim of one family, in the order of `p` (formula above). A NaN is no claim: it does not count and stays NaN.

    `InputError` for a p outside [0, 1].
    """
    p = np.asarray(p, dtype=np.float64)
    claims = np.flatnonzero(~np.isnan(p))
    if p.ndim != 1 or ((p[claims] < 0) | (p[claims] > 1)).any():
        raise InputError(
            "q-values are of a list of p-values, each in [0, 1]; give one number a claim, NaN where there is none."
        )
    falling = claims[np.argsort(-p[claims], kind="stable")]
    m = len(claims)
    q = np.full(len(p), np.nan)
    q[falling] = np.minimum.accumulate(p[falling] * (m / np.arange(m, 0, -1)))
    return q


@dataclass(frozen=True)
class Control:
    """The effect of a found set beside those of random ones.

    `effect` is the mean over examples, in the metric's unit, with its standard error over examples (NaN for a single one);
    `random` has the mean effect of each random draw.
    """

    effect: float
    stderr: float
    random: tuple[float, ...]

    @classmethod
    def of(cls, effects: Float[np.ndarray, "S N"]) -> Control:
        """From the effect on each of N examples, of the found set (first) and of R random ones."""
        mean, stderr = mean_stderr(np.asarray(effects, dtype=np.float64).T)
        return cls(float(mean[0]), float(stderr[0]), tuple(map(float, mean[1:])))

    @property
    def mean(self) -> float:
        """Mean effect of the random draws; NaN if there are none."""
        return float(np.mean(self.random)) if self.random else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation of the random draws' effects; NaN for fewer than two."""
        return float(np.std(self.random, ddof=1)) if len(self.random) > 1 else float("nan")

    @property
    def p_value(self) -> float:
        """How rarely a random draw does as much (formula above)."""
        return p_value(self.effect, self.random)

    @property
    def least_p(self) -> float:
        """The smallest p that so many draws can show."""
        return 1 / (1 + len(self.random))


def matched_sets(
    heads: HeadSet, n: int, seed: int = 0, *, shape: tuple[int, int] | None = None, overlapping: bool = True
) -> list[HeadSet]:
    """Up to `n` different random sets with as many heads in each layer as `heads`, never `heads` itself.

    Disjoint sets first, as far as the layers have them, then, if `overlapping`, sets that share heads with the found one, which
    are harder to beat. Fewer than `n` where the layers allow fewer. `shape` is `(n_layers, n_heads)`, if `heads` does not know
    it.
    """
    drawn = heads.matched_random(10 * n, seed, shape=shape)
    if overlapping:
        drawn += heads.matched_random(10 * n, seed + 1, shape=shape, disjoint=False)
    return _different(drawn, heads, n)


def random_sets(heads: HeadSet, n: int, seed: int = 0, *, shape: tuple[int, int] | None = None) -> list[HeadSet]:
    """Up to `n` different random sets of as many heads from any layer, none of `heads`: the control that layers do not match."""
    shape = shape or heads.shape
    if shape is None:
        raise InputError("this HeadSet does not know its model; pass shape=(n_layers, n_heads).")
    others = list(HeadSet(((layer, i) for layer in range(shape[0]) for i in range(shape[1])), shape) - heads)
    rng = np.random.default_rng(seed)
    drawn = [HeadSet((others[i] for i in rng.permutation(len(others))[: len(heads)]), shape) for _ in range(10 * n)]
    return _different(drawn, heads, n)


def _different(drawn: Sequence[HeadSet], found: HeadSet, n: int) -> list[HeadSet]:
    return [heads for heads in dict.fromkeys(drawn) if heads != found][:n]
