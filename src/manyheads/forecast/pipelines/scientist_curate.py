"""The curator of TimeSeriesScientist (#49): statistics of a series, and repairs from a closed list, each reported.

    season     the lag s whose autocorrelation r_s is a peak above .3 in the detrended series, the frequency's first of all
    strength   F = max(0, 1 - var(R) / var(R + X)), X the season or the trend, R what is left      (Wang et al., 2006)
    outlier    x beyond Q1 - 3 IQR, Q3 + 3 IQR of a rolling window (IQR at least the whole series'), x without rolling median
               and season

    between    a gap shorter than a season is interpolated
    season     a longer gap, and one at the end, holds the values a season before
    clipped    an outlier becomes the bound that it crossed; a run of more than three is a change of level and stays

Everything is computed from the steps that are given: call it with what was known at a cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

REPAIRS = ("between", "season", "clipped")
FENCE = 3.0  # interquartile ranges beyond the quartiles
LONGEST_RUN = 3  # of outliers; more are a change of level
PEAK = 0.3  # least autocorrelation of a season
_LONGEST_SEASON = 400


@dataclass(frozen=True)
class SeriesStatistics:
    """What the plan is made from. `missing` is a share, strengths lie in [0, 1], `persistence` is the lag-1 autocorrelation."""

    n: int
    missing: float
    season: int
    season_strength: float
    trend_strength: float
    persistence: float


@dataclass(frozen=True)
class SeriesRepair:
    """What was changed: one of `REPAIRS`, at which steps from the first on."""

    kind: str
    steps: tuple[int, ...]


def curated(
    y: Float[np.ndarray, "L"], season: int = 1
) -> tuple[Float[np.ndarray, "L"], tuple[SeriesRepair, ...], SeriesStatistics]:
    """The series repaired, what was repaired, and its statistics. `season` is the frequency's.

    Steps before the first observed one stay missing.
    """
    seen = np.isfinite(y)
    if not seen.any():
        return y, (), SeriesStatistics(0, 1.0, 1, 0.0, 0.0, 0.0)
    start = int(seen.argmax())
    known = y[start:]
    held = pd.Series(known).interpolate().to_numpy()
    found = season_in(held, season)
    bounded, clipped = _clipped(_filled(known, found)[0], found, np.isfinite(known))
    repaired, gaps = _filled(np.where(clipped, bounded, known), found)  # so that no gap holds an outlier
    out = np.concatenate([y[:start], repaired])
    marks = {**gaps, "clipped": clipped}
    repairs = tuple(
        SeriesRepair(kind, tuple(int(i) + start for i in np.flatnonzero(marks[kind])))
        for kind in REPAIRS
        if marks[kind].any()
    )
    return out, repairs, _statistics(repaired, found, 1 - float(np.isfinite(known).mean()))


def season_in(y: Float[np.ndarray, "L"], given: int = 1) -> int:
    """Steps in a season of a series without gaps; 1 where there is none."""
    n = len(y)
    most = min(n // 3, _LONGEST_SEASON)
    if most < 2 or y.std() <= 1e-9 * abs(y.mean()):
        return 1
    r = _autocorrelation(_detrended(y), most + 1)
    peaks = [s for s in range(2, most + 1) if r[s] > PEAK and r[s] >= r[s - 1] and r[s] >= r[s + 1]]
    if given in peaks:
        return given
    highest = max((r[s] for s in peaks), default=0.0)
    return next((s for s in peaks if r[s] >= 0.9 * highest), 1)  # two seasons are as like as one


def _detrended(y: Float[np.ndarray, "L"]) -> Float[np.ndarray, "L"]:
    t, z = np.linspace(-1, 1, len(y)), _within((y - y.mean()) / (y.std() or 1.0))
    return _within(z - np.polyval(np.polyfit(t, z, min(2, len(y) - 1)), t))


def _within(z: Float[np.ndarray, "L"]) -> Float[np.ndarray, "L"]:
    """Without values far beyond the quartiles: one of them would drown a season."""
    low, high = np.quantile(z, [0.25, 0.75])
    fence = FENCE * (high - low)
    return np.clip(z, low - fence, high + fence) if fence > 1e-9 else z


def _autocorrelation(z: Float[np.ndarray, "L"], most: int) -> Float[np.ndarray, "M"]:
    """r_0 to r_most, each over the pairs that there are, so that a late peak is not smaller for its lag."""
    power = np.abs(np.fft.rfft(z - z.mean(), 2 * len(z))) ** 2
    raw = np.fft.irfft(power)[: most + 1] / (len(z) - np.arange(most + 1))
    found: Float[np.ndarray, "M"] = raw / raw[0] if raw[0] > 1e-12 else np.zeros(most + 1)
    return found


def _filled(y: Float[np.ndarray, "L"], season: int) -> tuple[Float[np.ndarray, "L"], dict[str, Bool[np.ndarray, "L"]]]:
    """Without gaps, and which steps were filled how."""
    gap = ~np.isfinite(y)
    runs = np.cumsum(np.diff(gap.astype(int), prepend=0) != 0) * gap
    sizes = np.bincount(runs)
    trailing = gap & (np.arange(len(y)) > np.flatnonzero(~gap)[-1])
    between = gap & ~trailing & ((sizes[runs] < season) | (season == 1))
    out = y.copy()
    out[between] = pd.Series(y).interpolate().to_numpy()[between]
    for i in np.flatnonzero(gap & ~between):  # in their order, so that long gaps repeat
        out[i] = out[i - season] if i >= season else out[i - 1]
    return out, {"between": between, "season": gap & ~between}


def _clipped(
    y: Float[np.ndarray, "L"], season: int, observed: Bool[np.ndarray, "L"]
) -> tuple[Float[np.ndarray, "L"], Bool[np.ndarray, "L"]]:
    """Outliers among the observed steps at the bound that they crossed, and where they are."""
    if len(y) < 12:
        return y, np.zeros(len(y), dtype=bool)
    width = max(2 * season + 1, 11)
    base = pd.Series(y).rolling(width, center=True, min_periods=1).median().to_numpy()
    base = base + _profile(y - base, season, np.median)
    rest = pd.Series(y - base)
    rolling = rest.rolling(max(4 * season, 30), center=True, min_periods=1)
    low, high = rolling.quantile(0.25).to_numpy(), rolling.quantile(0.75).to_numpy()
    # A quiet stretch has quartiles so near that ordinary steps cross them: the whole series' range is the least.
    fence = FENCE * np.maximum(high - low, rest.quantile(0.75) - rest.quantile(0.25))
    # Where most values are equal the quartiles are too, and every other value would look like an outlier.
    off = (fence > 1e-9 * max(np.abs(y).max(), 1e-30)) & ((y - base < low - fence) | (y - base > high + fence))
    runs = np.cumsum(np.diff(off.astype(int), prepend=0) != 0) * off
    off &= observed & (np.bincount(runs)[runs] <= LONGEST_RUN)
    return np.where(off, base + np.clip(y - base, low - fence, high + fence), y), off


def _profile(x: Float[np.ndarray, "L"], season: int, middle: object = np.mean) -> Float[np.ndarray, "L"]:
    """The mean (or `middle`) at each place of the season, over all of the series; 0 without a season."""
    if season < 2:
        return np.zeros(len(x))
    places = np.array([middle(x[i::season]) for i in range(season)])  # type: ignore[operator]
    found: Float[np.ndarray, "L"] = places[np.arange(len(x)) % season]
    return found


def _statistics(y: Float[np.ndarray, "L"], season: int, missing: float) -> SeriesStatistics:
    if len(y) < 3 or y.std() <= 1e-9 * abs(y.mean()):
        return SeriesStatistics(len(y), missing, season, 0.0, 0.0, 0.0)
    z = (y - y.mean()) / y.std()
    trend = pd.Series(z).rolling(max(season, 5), center=True, min_periods=1).mean().to_numpy()
    seasonal = _profile(z - trend, season)
    rest = z - trend - seasonal
    return SeriesStatistics(
        len(y),
        missing,
        season,
        _strength(rest, seasonal) if season > 1 else 0.0,
        _strength(rest, trend),
        float(_autocorrelation(z, 1)[1]),
    )


def _strength(rest: Float[np.ndarray, "L"], part: Float[np.ndarray, "L"]) -> float:
    whole = float((rest + part).var())
    return max(0.0, 1.0 - float(rest.var()) / whole) if whole > 0 else 0.0
