"""A series, its forecast and how sure it is: a line, then a fan of quantiles, and the truth where it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from manyheads.report.figures import ColourScale, nice_ticks
from manyheads.report.html import Html, el

WIDTH, HEIGHT = 860, 280  # px
LEFT, RIGHT, TOP, BELOW = 60, 12, 14, 36
_HEAT = 10  # px, of the strip of colours below


@dataclass(frozen=True)
class Fan:
    """What to draw: times as text for all H + F steps, the history [H] (NaN: missing), the truth ahead [F] if it is known, the
    point [F], and bands (lowest, highest) [F] from the widest to the narrowest.

    `heat` colours stretches of the history: (first step, last step, value, what is told of it).
    """

    times: Sequence[str]
    history: Float[np.ndarray, "H"]
    point: Float[np.ndarray, "F"]
    bands: Sequence[tuple[Float[np.ndarray, "F"], Float[np.ndarray, "F"]]] = ()
    truth: Float[np.ndarray, "F"] | None = None
    heat: Sequence[tuple[int, int, float, str]] = ()


def fan(one: Fan, *, label: str) -> Html:
    """The picture, with a few of the times below it."""
    n, ahead = len(one.history), len(one.point)
    everything = [one.history, one.point, *[side for band in one.bands for side in band]]
    everything += [] if one.truth is None else [one.truth]
    values = np.concatenate(everything)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    margin = 0.06 * (high - low) or abs(high) or 1.0
    low, high = low - margin, high + margin
    bottom = HEIGHT - BELOW - (_HEAT + 4 if one.heat else 0)

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step + 0.5) / (n + ahead), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - TOP) * (value - low) / (high - low), 1)

    parts: list[Html] = []
    for tick in nice_ticks(low, high, 5):
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(el("text", f"{tick:g}", x=LEFT - 6, y=y(tick) + 4, text_anchor="end"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        step = round(share * (n + ahead - 1))
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(el("text", one.times[step], x=x(step), y=HEIGHT - 8, text_anchor=anchor))
    after = range(n, n + ahead)
    for lower, upper in one.bands:
        corners = [*zip(after, upper, strict=True), *reversed([*zip(after, lower, strict=True)])]
        parts.append(el("polygon", points=" ".join(f"{x(s)},{y(v)}" for s, v in corners), class_="quantiles b0"))
    parts += [el("polyline", points=run, class_="history") for run in _runs(range(n), one.history, x, y)]
    if one.truth is not None:
        parts += [el("polyline", points=run, class_="history") for run in _runs(after, one.truth, x, y)]
    parts += [el("polyline", points=run, class_="trace b0") for run in _runs(after, one.point, x, y)]
    parts.append(el("line", x1=x(n - 0.5), x2=x(n - 0.5), y1=TOP, y2=bottom, class_="zero"))
    scale = ColourScale.holding(np.array([h[2] for h in one.heat])) if one.heat else ColourScale(0, 1)
    for first, last, value, told in one.heat:
        left = x(first - 0.5)
        box = {"x": left, "y": bottom + 4, "width": round(x(last + 0.5) - left, 1), "height": _HEAT}
        parts.append(el("rect", el("title", told), **box, class_=f"heat-cell b3 {scale.step(value)}"))
    svg = el("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="plot scatter fan")
    return el("figure", svg, el("figcaption", label))


def _runs(steps: Sequence[int], values: Float[np.ndarray, "N"], x: object, y: object) -> list[str]:
    """The points of each stretch without a gap."""
    runs: list[list[str]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if np.isfinite(value):
            runs[-1].append(f"{x(step)},{y(float(value))}")  # type: ignore[operator]
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]
