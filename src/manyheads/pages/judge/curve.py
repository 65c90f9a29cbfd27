"""A learning curve, where its trend goes, and how the asymptote moved while data came in."""

from __future__ import annotations

import numpy as np

from manyheads.judge.curves import LearningCurve, bayesian_curve
from manyheads.report import page_of
from manyheads.report.fan import Fan, fan
from manyheads.report.html import el, how_to_read, join, masthead, page
from manyheads.report.numbers import count

_AHEAD = 15  # points of the picture beyond the last observation
_TERMS = {
    "Trend": "The least-squares fit of c - a x^-b to all observations.",
    "Asymptote": "c, what endless data would bring by the trend. While it moves, do not believe it.",
    "Band": "The central 90 % of the average of all such curves, weighted by how well they fit.",
}


@page_of(LearningCurve)
def curve_page(curve: LearningCurve) -> str:
    """The curve and its trend up to four times its last size, then the asymptote of each prefix."""
    ahead = np.geomspace(curve.sizes[-1], 4 * curve.sizes[-1], _AHEAD + 1)[1:]
    trend = curve.trace[-1]
    told = [bayesian_curve(curve, float(size)) for size in ahead] if len(curve.sizes) > 3 else []
    bands = [(np.array([one.low for one in told]), np.array([one.high for one in told]))] if told else []
    sizes = [f"{size:,.0f}" for size in (*curve.sizes, *ahead)]
    drawn = fan(Fan(sizes, curve.scores, np.asarray(trend.at(ahead)), bands), label="The score by rows, and its trend")
    moved = fan(
        Fan(
            [f"{curve.sizes[one.n - 1]:,.0f}" for one in curve.trace],
            np.zeros(0),
            np.array([one.c for one in curve.trace]),
        ),
        label="The asymptote by rows seen",
    )
    lede = f"{count(len(curve.sizes), 'size')}, up to {curve.sizes[-1]:,.0f} rows; the trend goes to {trend.c:.2f}."
    top = masthead("Learning curve", "What would more data bring?", lede, {}, how_to_read(_TERMS))
    return page("Learning curve", join(top, el("main", drawn, moved)))
