"""Layers x positions as pages: the logit lens and the patching maps, in one kind of table whose cells are coloured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from manyheads.report import page_of
from manyheads.report.figures import ColourScale, hue
from manyheads.report.html import Html, el, how_to_read, join, masthead, page
from manyheads.report.numbers import brief, number, visible
from manyheads.trace.positions.logit_lens import LogitLens
from manyheads.trace.positions.patching_map import PositionMap

_CSS = """
table.positions { width: auto; max-width: none; table-layout: auto }
table.positions thead th { height: auto; vertical-align: bottom; padding: .1rem .15rem; font-family: var(--mono) }
table.positions tbody th { width: auto; min-width: 2.1rem; white-space: nowrap }
table.positions tbody td { height: 24px; min-width: 2.6rem; max-width: 7rem; padding: 0 .25rem; font-size: .72rem;
text-overflow: ellipsis }
"""
_LONGEST = 12
_AXES = "A row is a layer (L4 is the fifth), a column a token of the prompt; · stands for a space."
_MAP = {
    "Rows and columns": _AXES,
    "Metric": "What was asked for, most often the difference of two logits: the answer's and the wrong answer's. A "
    "logit is a token's score before the softmax.",
    "Clean, corrupted": "The prompt, and another of as many tokens with another answer. One activation comes from "
    "the corrupted run, all others from the clean one.",
    "Value": "How much the metric changes for it, in the metric's unit: far from 0 where the answer depends on this place.",
}
_LENS = {
    "Rows and columns": _AXES,
    "State": "The residual stream at that depth: what all layers so far have written about a token; L4.attention: "
    "after the attention of layer 4.",
    "Token in a cell": "What the model's own output head would predict next if it read this state directly.",
    "Colour": "The probability of that token there.",
}


@page_of(PositionMap)
def map_page(found: PositionMap, *, row: int | None = None) -> str:
    """The map of one row (None: the mean over rows, under the first row's tokens); heads are summed."""
    values = found.mean if row is None else found.values[row]
    values = values if values.ndim == 2 else values.sum(-1)
    scale = ColourScale.holding(values)
    table = position_table(
        [f"L{layer}" for layer in range(len(values))],
        found.tokens[row or 0],
        values,
        scale,
        label=f"change of the metric by layer and position, at {found.site}",
    )
    name = found.meta.get("method", "patching")
    which = f"row {row}" if row is not None else f"the mean of {len(found.values)} rows, under the first one's tokens"
    lede = f"How the metric changes when {found.site} at one layer and position comes from the corrupted run: {which}."
    clean, corrupted = (run.mean() if row is None else run[row] for run in (found.clean, found.corrupted))
    caption = f"{name.capitalize()}; the metric is {number(clean)} clean and {number(corrupted)} corrupted."
    return _page("Where it matters", lede, table, caption, scale, _MAP)


@page_of(LogitLens)
def lens_page(found: LogitLens, *, row: int = 0) -> str:
    """One prompt's states x positions, each with its most likely token in the colour of its probability."""
    probability = np.exp(found.top_log_probs[:, row, :, 0])
    texts = [[found.names[int(i)] for i in ids] for ids in found.top_ids[:, row, :, 0]]
    label, scale = "most likely token by state and position", ColourScale(0.0, 1.0)
    table = position_table(found.states, found.tokens[row], probability, scale, label=label, texts=texts)
    lede = "The most likely next token if the model's head read each state directly; the colour is its probability."
    return _page("Logit lens", lede, table, "The embedding is at the bottom, the last layer at the top.", scale, _LENS)


def position_table(
    rows: Sequence[str],
    tokens: Sequence[str],
    values: Float[np.ndarray, "R T"],
    scale: ColourScale,
    *,
    label: str,
    texts: Sequence[Sequence[str]] | None = None,
) -> Html:
    """One row for each of `rows`, highest first, a column a token; a cell shows its text, or its value, in the value's colour."""

    def cell(r: int, t: int) -> Html:
        value = float(values[r, t])
        shown = brief(value) if texts is None else _clipped(texts[r][t])
        tip = f"{rows[r]}, {t} {visible(tokens[t])}: {number(value, 3)}"
        return el("td", shown, class_=scale.step(value), title=tip)

    header = el(
        "tr", el("td"), *[el("th", _clipped(token), scope="col", title=str(t)) for t, token in enumerate(tokens)]
    )
    body = [
        el("tr", el("th", rows[r], scope="row"), *[cell(r, t) for t in range(len(tokens))])
        for r in reversed(range(len(rows)))
    ]
    table = el("table", el("thead", header), el("tbody", *body), class_="heat positions", aria_label=label, tabindex=0)
    return el("div", table, class_="wide")  # the table in it takes the focus


def _page(title: str, lede: str, table: Html, caption: str, scale: ColourScale, terms: dict[str, str]) -> str:
    """A page with one table and its scale."""
    figure = el("figure", table, el("figcaption", caption, " ", scale.key()), class_=hue(0))
    return page(title, join(masthead("Trace", title, lede, None, how_to_read(terms)), el("main", figure)), css=_CSS)


def _clipped(token: str) -> str:
    text = visible(token)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
