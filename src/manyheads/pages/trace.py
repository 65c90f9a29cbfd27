"""An explanation, and a circuit, as pages one can look at."""

from __future__ import annotations

import numpy as np

from manyheads.report import page_of
from manyheads.report.figures import ColourScale, grid_css, heat_table, hue, token_strip
from manyheads.report.graph import graph
from manyheads.report.html import Html, el, join, masthead, page, plain_table
from manyheads.report.numbers import number
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.explaining import way
from manyheads.trace.explanation import Explanation

SHOWN = 20


@page_of(Explanation)
def explanation_page(found: Explanation) -> str:
    """Why one answer: what made it, drawn on the grid of heads, along the prompt and as a graph."""
    title = f"Why “{found.answer.strip()}”?"
    body = join(
        masthead("One answer explained", title, _summary(found)),
        el("main", _ranking(found), _map(found), _read(found) if found.sources else None, _picture(found.circuit)),
    )
    return page(title, body, css=grid_css(found.circuit.shape[1]))


@page_of(Circuit)
def circuit_page(circuit: Circuit) -> str:
    """A circuit drawn, and its items ranked."""
    title = f"Circuit of {len(circuit)} {circuit.kind}"
    lede = f"{circuit.method or 'A circuit'}: {', '.join(circuit.members) or 'nothing'}."
    body = join(
        masthead("Circuit", title, lede),
        el("main", _picture(circuit), el("section", el("h2", "Ranked"), _table(circuit, len(circuit)))),
    )
    return page(title, body)


def _summary(found: Explanation) -> Html:
    beside = [] if found.corrupted is None else [" Compared with ", el("q", found.corrupted), "."]
    return join(
        "After ",
        el("q", found.prompt),
        f" the model gives “{found.answer}” a probability of {number(found.probability, 3)}. Its logit lies "
        f"{number(abs(found.difference))} {'above' if found.difference >= 0 else 'below'} that of “{found.against}”.",
        *beside,
        f" Method: {found.method}, {way(found.method).what}.",
    )


def _ranking(found: Explanation) -> Html:
    constants = ", ".join(f"{name} {number(value)}" for name, value in found.constants.items())
    return el(
        "section",
        el("h2", "What made it"),
        _table(found.circuit, SHOWN),
        el("p", f"Belonging to no component: {constants}.", class_="small soft") if constants else None,
    )


def _table(circuit: Circuit, n: int) -> Html:
    frame = circuit.to_frame()
    scale = ColourScale.holding(frame["score"].to_numpy())
    names = [column for column in frame.columns if column != "score"]
    rows = [
        el(
            "tr",
            *[el("td", getattr(row, name)) for name in names],
            el("td", number(row.score, 3)),
            el("td", _bar(float(row.score), scale), class_="bar-cell"),
        )
        for row in frame.head(n).itertuples()
    ]
    titles = [*(name.capitalize() for name in names), "Score", ""]
    more = f"{len(frame) - n} more." if len(frame) > n else None
    return join(
        plain_table(titles, rows),
        el("p", more, class_="small soft") if more else None,
    )


def _bar(value: float, scale: ColourScale) -> Html:
    """A stroke from 0 to the value."""
    zero, end = scale.percent(0.0), scale.percent(value)
    left, right = min(zero, end), max(zero, end)
    return el(
        "svg",
        el(
            "line",
            x1=left,
            x2=max(right, left + 0.5),
            y1=5,
            y2=5,
            stroke_width=8,
            class_="minus" if value < 0 else "plus",
        ),
        viewBox="0 0 100 10",
        width="100%",
        height=10,
        preserveAspectRatio="none",
        class_="graph",
        aria_hidden="true",
    )


def _map(found: Explanation) -> Html:
    scores = found.heads
    most = max(float(np.abs(scores.values).max()), 1e-9)
    scale = ColourScale(-most, most) if (scores.values < 0).any() else ColourScale(0.0, most)
    summed = "; the kept edges out of a head, summed" if found.method == "edges" else ""
    return el(
        "section",
        el("h2", "All heads"),
        el(
            "figure",
            heat_table(scores, scale, label=f"{found.method} of every head"),
            el("figcaption", f"Layers down, heads across, in logits{summed}. ", scale.key()),
        ),
        class_=f"behaviour {hue(0)}",
    )


def _read(found: Explanation) -> Html:
    strips = []
    for name, values in found.sources.items():
        most = max(float(np.abs(values).max()), 1e-9)
        scale = ColourScale(-most, most) if (values < 0).any() else ColourScale(0.0, most)
        strips += [el("h3", f"{name}: {number(float(values.sum()))}"), token_strip(found.tokens, values, scale)]
    return el(
        "section",
        el("h2", "What they read"),
        el("p", "The heads with the largest direct parts, and from which tokens they read them.", class_="small soft"),
        *strips,
        class_=hue(0),
    )


def _picture(circuit: Circuit) -> Html:
    shown = circuit if circuit.kind == "edges" else circuit.top(SHOWN)
    label = f"The circuit: {', '.join(shown.members)}"
    said = (
        "Blue raises the answer, orange lowers it. The darker a node the larger its score; strokes are as wide as the square "
        "root of theirs. Numbers are heads, M an MLP."
    )
    return el(
        "section",
        el("h2", "The circuit"),
        el(
            "figure",
            el("div", graph(shown.shape, shown.nodes, shown.edges, label=label), class_="scroll"),
            el("figcaption", said),
        ),
    )
