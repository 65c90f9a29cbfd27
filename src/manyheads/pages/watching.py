"""Heads while a model learns: a slider over training time moves the head grids and a mark on the curves."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from rich.table import Table

from manyheads.lab.formation.watching_heads import SCORES, HeadHistory
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, grid_css, heat_table, hue, nice_ticks
from manyheads.report.html import Html, el, how_to_read, join, masthead, page
from manyheads.report.numbers import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 860, 200, 60, 12, 14, 32  # px
_TERMS = {
    "L1H3": "Head 3 of layer 1; both are counted from 0. In the maps layers are rows and heads columns.",
    "Previous token": "Mean attention of a token to the one before it.",
    "Induction": "Mean attention to the token after the last occurrence of the present one.",
    "First token": "Mean attention to the first token of the row.",
    "Without": "The same weights, batches and order, with these heads ablated at every update: what if they had never formed?",
}


@page_of(HeadHistory)
def watching_page(history: HeadHistory) -> str:
    """The run, and under it the run without some heads if there is one; one slider for both."""
    last = len(history.updates) - 1
    slider = el(
        "p",
        el(
            "label",
            "training ",
            el("input", type="range", min="0", max=str(last), value=str(last), data_scrub="", aria_label="update"),
        ),
        class_="scrub",
    )
    runs = [_run(history, "As it learns")]
    if history.other is not None:
        runs.append(_run(history.other, f"The same without {', '.join(history.other.without)}"))
    facts = {"updates": str(history.updates[-1]), "measured at": f"{len(history.updates)} moments"}
    body = join(
        masthead("Formation", "Heads while a model learns", "Move the slider.", facts, how_to_read(_TERMS)),
        el("main", slider, *runs),
    )
    return page("Heads while a model learns", body, css=grid_css(next(iter(history.scores.values())).shape[2]))


def _run(history: HeadHistory, title: str) -> Html:
    moments, last = range(len(history.updates)), len(history.updates) - 1
    curves = {name: getattr(history, name) for name in ("loss", "accuracy")}
    figures = [_curve(history.updates, values, name) for name, values in curves.items()]
    told = [
        el(
            "p",
            f"Update {history.updates[i]}: loss {number(float(history.loss[i]))} nats, "
            f"accuracy {number(float(history.accuracy[i]))}.",
            data_moment=str(i),
            **({} if i == last else {"hidden": ""}),
        )
        for i in moments
    ]
    for name, values in history.scores.items():
        scale = _scale(name, values)
        figure_hue = hue(len(figures))
        grids = [
            el(
                "div",
                heat_table(history.at(i, name), scale, label=f"{name}, update {history.updates[i]}"),
                data_moment=str(i),
                **({} if i == last else {"hidden": ""}),
            )
            for i in moments
        ]
        figures.append(el("figure", *grids, el("figcaption", f"{name} ", scale.key()), class_=figure_hue))
    return el("section", el("h2", title), *told, *figures)


def _scale(name: str, values: Float[np.ndarray, "M L H"]) -> ColourScale:
    """Attention is from 0 to 1; any other score from its lowest to its highest over all moments."""
    if name in SCORES:
        return ColourScale(0.0, 1.0)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return ColourScale(min(low, 0.0), max(high, 1e-9))


def _curve(updates: np.ndarray, values: Float[np.ndarray, " M"], name: str) -> Html:
    """A line over training time, with a mark a moment of which one is shown."""
    high = max(float(values.max()), 1e-9)
    bottom, end = HEIGHT - BELOW, max(int(updates[-1]), 1)

    def x(update: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * update / end, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - TOP) * value / high, 1)

    parts: list[Html] = []
    for tick in nice_ticks(0.0, high, 4):
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(el("text", f"{tick:g}", x=LEFT - 6, y=y(tick) + 4, text_anchor="end"))
    for tick in nice_ticks(0.0, float(end), 6):
        parts.append(el("text", f"{tick:g}", x=x(tick), y=HEIGHT - 10, text_anchor="middle"))
    line = " ".join(f"{x(u)},{y(v)}" for u, v in zip(updates.tolist(), values.tolist(), strict=True))
    parts.append(el("polyline", points=line, class_="trace b0"))
    last = len(updates) - 1
    for i, update in enumerate(updates.tolist()):
        shown = {} if i == last else {"hidden": ""}
        parts.append(
            el("line", x1=x(update), x2=x(update), y1=TOP, y2=bottom, class_="zero", data_moment=str(i), **shown)
        )
    svg = el("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name, class_="plot scatter fan")
    return el("figure", svg, el("figcaption", f"{name} by updates"))


def history_table(history: HeadHistory, rows: int = 10) -> Table:
    """About `rows` moments: loss, accuracy, and the head with the largest value of each score."""
    title = f"without {', '.join(history.without)}" if history.without else "as it learns"
    table = Table(title=title, title_justify="left")
    for name in ("update", "loss", "accuracy", *history.scores):
        table.add_column(name, justify="right")
    for i in sorted({round(j) for j in np.linspace(0, len(history.updates) - 1, rows)}):
        best = []
        for values in history.scores.values():
            layer, head = np.unravel_index(int(values[i].argmax()), values[i].shape)
            best.append(f"L{layer}H{head} {values[i].max():.2f}")
        table.add_row(str(history.updates[i]), f"{history.loss[i]:.3f}", f"{history.accuracy[i]:.2f}", *best)
    return table
