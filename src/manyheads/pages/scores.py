"""Scores of heads as a page: every head in its colour, and the strongest by name."""

from __future__ import annotations

import numpy as np

from manyheads.heads import HeadScores
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, grid_css, heat_table, hue, score_bar
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table, with_links
from manyheads.report.numbers import count, number, plus_minus

SHOWN = 20
_TERMS = {
    "L4H2": "Head 2 of layer 4; both are counted from 0. In the map layers are rows and heads columns.",
    "Score": "How much a head does what the title names; the page of the method in the documentation gives the formula and unit.",
    "Standard error": "How much the score would vary with other examples. A score read off the weights has none.",
}


@page_of(HeadScores)
def scores_page(scores: HeadScores) -> str:
    """One score a head as a heat map, and the `SHOWN` heads whose scores have the largest magnitude."""
    title = scores.name.replace("_", " ").capitalize()
    paper = str(scores.meta.get("paper") or "")
    lede = join(
        f"{count(scores.values.size, 'head')}, {count(scores.n, 'example')}." if scores.n else "Read off the weights.",
        [" After ", with_links(paper), "."] if paper else None,
    )
    facts = {"Seed": scores.meta.get("seed"), "Model": scores.meta.get("fingerprint")}
    shown = {name: str(value) for name, value in facts.items() if value is not None}
    scale = ColourScale.holding(scores.values[np.isfinite(scores.values)])
    figure = el(
        "figure", heat_table(scores, scale, label=title), el("figcaption", title, " ", scale.key()), class_=hue(0)
    )
    main = el("main", figure, el("section", el("h2", "Strongest heads"), _table(scores, scale), class_=hue(0)))
    return page(
        title,
        join(masthead("Scores of heads", title, lede, shown, how_to_read(_TERMS)), main),
        css=grid_css(scores.shape[1]),
    )


def _table(scores: HeadScores, scale: ColourScale) -> Html:
    frame = scores.to_frame().sort_values("score", key=np.abs, ascending=False, kind="stable").head(SHOWN)
    rows = [
        el(
            "tr",
            el("th", row.head, scope="row"),
            el("td", score_bar(row.score, np.nan_to_num(row.stderr), scale), class_="bar-cell"),
            el(
                "td",
                number(row.score) if np.isnan(row.stderr) else plus_minus(row.score, row.stderr, exact=scores.n == 0),
            ),
        )
        for row in frame.itertuples()
        if np.isfinite(row.score)
    ]
    return plain_table(("Head", "", "Score ± standard error"), rows, label="Strongest heads")
