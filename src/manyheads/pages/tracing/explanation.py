"""An explanation, and a circuit, as pages."""

from __future__ import annotations

import numpy as np

from manyheads.report import page_of
from manyheads.report.figures import ColourScale, grid_css, heat_table, hue, token_strip
from manyheads.report.graph import graph
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table, scroll
from manyheads.report.numbers import number
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.explaining import way
from manyheads.trace.explanation import Explanation

SHOWN = 20
_NODES = {
    "Node": "A part of the model: L4H2 is head 2 of layer 4, M5 the MLP of layer 5 (both counted from 0), embedding "
    "the input, logits the output.",
    "Edge": "Goes from the node that writes to the one that reads, for a head into its query, key or value.",
}
_LOGITS = {
    **_NODES,
    "Logit": "A token's score before the softmax. The difference of two logits is what is explained here.",
    "Score": "The part of that difference that the node or edge makes, by the method named above: above 0 it raises "
    "the answer, below 0 it lowers it.",
}
_CIRCUIT = {
    **_NODES,
    "Score": "In the unit of the method named above: above 0 the node or edge raises the answer, below 0 it lowers it.",
    "Not drawn": "What the circuit leaves out, except other heads, as small dots.",
}


@page_of(Explanation)
def explanation_page(found: Explanation) -> str:
    """Why one answer: the parts that made it, as a table, on the grid of heads, along the prompt and as a graph."""
    title = f"Why “{found.answer.strip()}”?"
    body = join(
        masthead("One answer explained", title, _summary(found), None, how_to_read(_LOGITS)),
        el("main", _ranking(found), _map(found), _read(found) if found.sources else None, _picture(found.circuit)),
    )
    return page(title, body, css=grid_css(found.circuit.shape[1]))


@page_of(Circuit)
def circuit_page(circuit: Circuit) -> str:
    """A circuit drawn, and its items ranked."""
    title = f"Circuit of {len(circuit)} {circuit.kind}"
    lede = f"{circuit.method or 'A circuit'}: {', '.join(circuit.members) or 'nothing'}."
    body = join(
        masthead("Circuit", title, lede, None, how_to_read(_CIRCUIT)),
        el("main", _picture(circuit), el("section", el("h2", "Ranked"), _table(circuit, len(circuit)))),
    )
    return page(title, body)


def _summary(found: Explanation) -> Html:
    beside = [] if found.corrupted is None else [" Compared with ", el("q", found.corrupted), "."]
    return join(
        "After ",
        el("q", found.prompt),
        f" the model gives “{found.answer.strip()}” a probability of {number(found.probability, 3)}. Its logit lies "
        f"{number(abs(found.difference))} {'above' if found.difference >= 0 else 'below'} that of “{found.against.strip()}”.",
        *beside,
        f" Method: {found.method}, {way(found.method).what}.",
    )


def _ranking(found: Explanation) -> Html:
    constants = ", ".join(f"{name} {number(value)}" for name, value in found.constants.items())
    return el(
        "section",
        el("h2", "What made it"),
        _table(found.circuit, SHOWN),
        el("p", f"Parts of the difference that belong to no head or MLP: {constants}.", class_="small soft")
        if constants
        else None,
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
        plain_table(titles, rows, label="Parts, the strongest first"),
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
    summed = " (the sum of the kept edges out of a head)" if found.method == "edges" else ""
    return el(
        "section",
        el("h2", "All heads"),
        el(
            "figure",
            heat_table(scores, scale, label=f"{found.method} of every head"),
            el("figcaption", f"Each head's score in logits{summed}: layers down, heads across. ", scale.key()),
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
        el(
            "p",
            "For the heads with the largest direct scores: how much of the score comes from each token that the head reads.",
            class_="small soft",
        ),
        *strips,
        class_=hue(0),
    )


def _picture(circuit: Circuit) -> Html:
    shown = circuit if circuit.kind == "edges" else circuit.top(SHOWN)
    label = f"The circuit: {', '.join(shown.members)}"
    caption = (
        "Blue raises the answer, orange lowers it. The darker a node, the larger its score; a line is as wide as the square root "
        "of its score. A number is a head of its layer, M5 the MLP of layer 5."
    )
    return el(
        "section",
        el("h2", "The circuit"),
        el(
            "figure",
            scroll("The circuit", graph(shown.shape, shown.nodes, shown.edges, label=label)),
            el("figcaption", caption),
        ),
    )
