"""A ranking of regions (#93) as a page: the regions in shades, the curves of showing and hiding them, a table."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from manyheads.report import page_of
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table, with_links
from manyheads.report.numbers import number
from manyheads.trace.regions.insertion import Curves
from manyheads.trace.regions.lima import PAPER, Ranking

_CSS = """
.regions { display: flex; flex-wrap: wrap; gap: 1.5rem } .regions svg { max-width: 100%; height: auto }
.regions image { image-rendering: pixelated }
.regions path { fill: color-mix(in oklab, var(--end) var(--t, 0%), var(--zero)); fill-opacity: .9 }
svg.curves { width: 100%; max-width: 34rem; height: auto; overflow: visible } .curves line { stroke: var(--rule) }
.curves polyline { fill: none; stroke: var(--hue); stroke-width: 2 }
.curves text { font: 11px var(--sans); fill: var(--soft) } .curves g text { fill: var(--hue); font-weight: 600 }
"""

_TERMS = {
    "Region": "A part into which the input is cut: words of a text, patches of an image.",
    "p": "The probability of the answer when only some regions are shown (not a p-value).",
    "Insertion": "The mean of p while regions are shown in the ranking's order, from none to all: the higher, the "
    "better the ranking.",
    "Deletion": "The mean of p while they are hidden in that order: the lower, the better.",
    "F": "What the search maximises: how much the regions chosen so far say about the answer.",
}


@page_of(Ranking)
def lima_page(ranking: Ranking) -> str:
    """The regions in the shades of their order, both curves, a table."""
    title = "LiMA: which regions carry the answer"
    found = ranking.curves
    facts = {
        "Answer": ranking.labels[0],
        "p, whole input": number(ranking.full, 3),
        "p, empty input": number(ranking.empty, 3),
        "Insertion": number(found.insertion_score, 3),
        "Deletion": number(found.deletion_score, 3),
        "Regions": len(ranking.order),
        "Forward passes": f"{ranking.passes:,} + {ranking.extra}",
    }
    target, predicted = (f"“{label}”" for label in ranking.labels)
    lede = f"Which regions of the input make the model predict {target}: those that raise its probability most come first. "
    if ranking.predicted != ranking.target:
        best, share = found.highest()
        lede += (
            f"For the whole input it predicts {predicted}; with {share:.0%} of it shown, p of {target} is {best:.2f}."
        )
    names = ("rank", "region", "name", "share", "end", "F", "p_shown", "p_hidden")
    frame = ranking.to_frame().loc[:, list(names)]
    rows = [
        el("tr", *[el("td", number(v, 3) if isinstance(v, float) else v) for v in row])
        for row in frame.itertuples(index=False)
    ]
    shades = "The stronger its colour, the earlier a region comes in the ranking. "
    lines = "Probability of the class while regions are shown, and while they are hidden, in the ranking's order."
    main = el(
        "main",
        el("figure", ranking.regions.picture(ranking.values), el("figcaption", shades, with_links(PAPER))),
        el("figure", _chart(found), el("figcaption", lines)),
        plain_table(names, rows, label="Regions in the ranking's order"),
    )
    return page(
        title,
        join(masthead("LiMA", "Which regions carry the answer", lede, facts, how_to_read(_TERMS)), main),
        css=_CSS,
    )


def _chart(found: Curves) -> Html:
    """Both curves over the share of the input."""
    ends = 170 - 160 * found.insertion[-1], 170 - 160 * found.deletion[-1]
    apart = max(0.0, 14 - abs(ends[0] - ends[1])) / 2 * (1 if ends[0] > ends[1] else -1)  # so that names do not overlap

    def line(values: Float[np.ndarray, "K"], name: str, hue: str, y: float) -> Html:
        points = " ".join(f"{40 + 360 * a:.1f},{170 - 160 * p:.1f}" for a, p in zip(found.area, values, strict=True))
        return el("g", el("polyline", points=points), el("text", name, x=408, y=round(y + 4, 1)), class_=hue)

    grid = [
        (
            el("line", x1=40, x2=400, y1=170 - 160 * p, y2=170 - 160 * p),
            el("text", p, x=34, y=174 - 160 * p, text_anchor="end"),
        )
        for p in (0.0, 0.5, 1.0)
    ]
    ticks = [el("text", f"{a:.0%}", x=40 + 360 * a, y=188, text_anchor="middle") for a in (0.0, 0.5, 1.0)]
    drawn = (
        line(found.insertion, "shown", "b0", ends[0] + apart),
        line(found.deletion, "hidden", "b1", ends[1] - apart),
    )
    return el(
        "svg", *grid, *ticks, *drawn, viewBox="0 0 470 195", class_="curves", role="img", aria_label="both curves"
    )
