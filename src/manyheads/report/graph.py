"""A circuit drawn as a graph: the pass goes up, heads stand side by side, MLPs right of them. Strokes are as wide as
the square root of effects, so that one strong edge does not hide the others.

Blue raises, orange lowers. A line's end shows which input of a head it feeds: query on the left, key in the middle, value on the
right. Nodes that only edges name have no score of their own and are drawn plain; heads outside the circuit are dots.
"""

from __future__ import annotations

from collections.abc import Mapping

from manyheads.heads import Head
from manyheads.report.html import Html, el
from manyheads.report.numbers import number

_COLUMN, _ROW, _RADIUS, _GUTTER = 58, 84, 15, 54
_WIDEST = 9.0
_INPUTS = {"query": -0.6, "key": 0.0, "value": 0.6}


def graph(
    shape: tuple[int, int],
    nodes: Mapping[str, float],
    edges: Mapping[tuple[str, str], float] | None = None,
    *,
    label: str,
) -> Html:
    """`nodes` and `edges` (by names such as `embedding`, `L0H3`, `L1H0.query`, `M2`, `logits`) with their scores, as one SVG."""
    edges = edges or {}
    places = _Places(*shape)
    named = {**{end.partition(".")[0]: None for edge in edges for end in edge}, **nodes}
    most_node = max((abs(score) for score in nodes.values()), default=0.0) or 1.0
    most_edge = max((abs(score) for score in edges.values()), default=0.0) or 1.0
    weakest_first = sorted(edges.items(), key=lambda item: abs(item[1]))
    lines = [_line(places, *edge, score, (abs(score) / most_edge) ** 0.5) for edge, score in weakest_first]
    others = [
        el("circle", cx=x, cy=y, r=2.5, class_="other")
        for name, (x, y) in places.heads.items()
        if name not in named and shape[1] <= 64
    ]
    drawn = [_node(name, *places[name], score, most_node) for name, score in named.items()]
    return el(
        "svg",
        el("g", *[el("text", f"L{i}", x=_GUTTER - 22, y=places.row(i)) for i in range(shape[0])], class_="labels"),
        el("g", *others),
        el("g", *lines, fill="none", stroke_linecap="round"),
        el("g", *drawn),
        viewBox=f"0 0 {places.width} {places.height}",
        width=places.width,
        height=places.height,
        class_="graph",
        role="img",
        aria_label=label,
    )


class _Places:
    """Where each node is drawn, in pixels."""

    def __init__(self, n_layers: int, n_heads: int) -> None:
        self.n_layers = n_layers
        self.width = _GUTTER + _COLUMN * (n_heads + 1) + _RADIUS
        self.height = _ROW * (n_layers + 2)
        self.heads = {
            str(Head(i, h)): (_GUTTER + _COLUMN * h + _RADIUS, self.row(i))
            for i in range(n_layers)
            for h in range(n_heads)
        }
        self.mlp = _GUTTER + _COLUMN * n_heads + _RADIUS

    def row(self, layer: int) -> int:
        """The middle of a layer's row; -1 is the embedding's, `n_layers` the logits'."""
        return _ROW * (self.n_layers - layer) + _ROW // 2

    def __getitem__(self, name: str) -> tuple[int, int]:
        if name in ("embedding", "logits"):
            middle = (_GUTTER + self.mlp) // 2
            return middle, self.row(-1 if name == "embedding" else self.n_layers)
        return (self.mlp, self.row(int(name[1:]))) if name[0] == "M" else self.heads[name]


def _sign(score: float) -> str:
    return "minus" if score < 0 else "plus"


def _line(places: _Places, sender: str, receiver: str, score: float, share: float) -> Html:
    node, _, part = receiver.partition(".")
    (x1, y1), (x2, y2) = places[sender], places[node]
    y1, y2 = y1 - _RADIUS, y2 + _RADIUS
    x2 += round(_RADIUS * _INPUTS.get(part, 0.0))
    bend = max(24, (y1 - y2) // 2)
    return el(
        "path",
        el("title", f"{sender} → {receiver}: {number(score, 3)}"),
        d=f"M{x1} {y1}C{x1} {y1 - bend} {x2} {y2 + bend} {x2} {y2}",
        stroke_width=round(max(0.6, _WIDEST * share), 2),
        stroke_opacity=round(0.25 + 0.6 * share, 2),
        class_=_sign(score),
    )


def _node(name: str, x: int, y: int, score: float | None, most: float) -> Html:
    title = name if score is None else f"{name}: {number(score, 3)}"
    share = 0.0 if score is None else abs(score) / most
    wide = name in ("embedding", "logits")
    half = 40 if wide else _RADIUS
    short = name.partition("H")[2] if name[0] == "L" else name
    box = el(
        "rect",
        x=x - half,
        y=y - _RADIUS,
        width=2 * half,
        height=2 * _RADIUS,
        rx=4 if name[0] == "M" else _RADIUS,
        fill_opacity=round(0.12 + 0.78 * share, 2),
        class_="node" if score is None else f"node {_sign(score)}",
    )
    text = el("text", short, x=x, y=y, class_="strong" if share > 0.6 else None)
    return el("g", el("title", title), box, text)
