"""A filtered series as a page: what was expected, how volatile it was believed to be, and who was less surprised."""

from __future__ import annotations

import numpy as np

from manyheads.brain.belief_forecasts import FilteredSeries
from manyheads.report import page_of
from manyheads.report.fan import Fan, fan
from manyheads.report.html import el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import count, number

_TERMS = {
    "Surprise": "-log of the density or probability that a method gave to what came, before it came, in nats a step. Lower is "
    "better; a difference of 0.1 means 10 % more density a step.",
    "Band": "Where nine of ten values were expected. Of a series of zeros and ones: where the probability of a one was "
    "believed to be.",
    "Volatility": "What is believed of the logarithm of the variance that the state gains each step. It rises when steps are "
    "larger than was expected.",
    "Random-walk Kalman": "The same filter without a belief about volatility. If it is as good, the volatility level bought "
    "nothing.",
}


@page_of(FilteredSeries)
def filtered_page(found: FilteredSeries) -> str:
    """The series in its band, its volatility, and the scores."""
    steps = len(found.values)
    times = [str(t) for t in range(steps)]
    nothing = np.zeros(0)
    main = [
        fan(
            Fan(times, nothing, found.expected, [(found.low, found.high)], found.values),
            label=f"{found.name}, {count(steps, 'step')}: what came, and what was expected before it came",
        )
    ]
    if found.volatility is not None:
        main.append(
            fan(
                Fan(times, nothing, found.volatility),
                label="Believed volatility: the logarithm of the variance gained a step",
            )
        )
    what = "mean absolute error" if found.kind == "continuous" else "1 - probability of what came"
    rows = [
        el("tr", el("td", one), el("td", number(found.scores[one], 4)), el("td", f"{found.errors[one]:.4g}"))
        for one in found.scores
    ]
    main.append(plain_table(("method", "surprise, nats a step", what), rows, label="Forecasts one step ahead"))
    lede = (
        f"Numbers were fitted on the first {steps - found.held_out} steps; the scores are of the last {found.held_out}, "
        "each forecast one step ahead."
    )
    top = masthead("Beliefs", f"What was believed of {found.name}?", lede, {}, how_to_read(_TERMS))
    return page("Beliefs", join(top, el("main", *main)))
