"""Figures of heads: heat maps, a map of findings, bars, strips of random controls, attention patterns.

Colours are classes: `b0`-`b10` name a hue, `q0`-`q20` how much of it, `n1`-`n20` how much of its opposite. The style
sheet gives them their colours for light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Float

from manyheads.heads import Head, HeadScores
from manyheads.report.html import Html, el, join, plain_table
from manyheads.report.numbers import brief, number, plus_minus, visible

HUES = 11
STEPS = 20
_LANES = (0, -8, 8, -16, 16)
_LONGEST_TOKEN = 12
_DEEP = 16  # with more layers rows are lower, so that a map fits on a screen
_WIDTH = 494  # of a pattern, in pixels
_CELL = {"large": 52, "medium": 38, "small": 32}  # the widest a cell gets, in pixels


def hue(i: int) -> str:
    """The class of the `i`-th hue; after the last comes the first again."""
    return f"b{i % HUES}"


@dataclass(frozen=True)
class ColourScale:
    """From a value to a colour or a place on a bar, linear from `low` to `high`; diverges from 0 if `low` < 0."""

    low: float
    high: float

    @classmethod
    def holding(
        cls, values: Float[np.ndarray, "..."], low: float | None = None, high: float | None = None
    ) -> ColourScale:
        """From `low` to `high`, widened to hold every finite value, with 0 always in it."""
        finite = values[np.isfinite(values)]
        given = [x for x in (low, high) if x is not None and math.isfinite(x)]
        ends = [0.0, *given, *([float(finite.min()), float(finite.max())] if finite.size else [])]
        return cls(min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 1.0)

    def step(self, value: float) -> str:
        """The class of `value`: how much of the hue, or of its opposite."""
        if not math.isfinite(value):
            return "q-none"
        step = round(STEPS * min(1.0, abs(value) / max(abs(self.low), self.high)))
        return f"{'n' if value < 0 and step else 'q'}{step}"

    def percent(self, value: float) -> float:
        """Where `value` lies between the ends, in percent."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    def key(self) -> Html:
        """The scale itself, to stand beside a figure."""
        most = max(abs(self.low), self.high)
        ends = number(-most if self.low < 0 else 0.0), number(most)
        return el(
            "span",
            el("b", ends[0]),
            el("span", class_="ramp both" if self.low < 0 else "ramp"),
            el("b", ends[1]),
            class_="key",
            aria_hidden="true",
        )


def heat_table(
    scores: HeadScores, scale: ColourScale, *, label: str, threshold: float | None = None, series: int | None = None
) -> Html:
    """Layers x heads as a table whose cells are coloured; heads at the threshold or above it are outlined.

    `series` is the place of these scores in the page's data, for what is shown under the pointer.
    """
    n_layers, n_heads = scores.shape

    def cell(value: float) -> Html:
        found = threshold is not None and value >= threshold
        return el("td", brief(value), class_=scale.step(value) + (" found" if found else ""))

    body = [
        el("tr", el("th", f"L{layer}", scope="row"), *[cell(float(v)) for v in scores.values[layer]])
        for layer in range(n_layers)
    ]
    return _grid(n_heads, body, class_="heat", label=label, series=series)


@dataclass(frozen=True)
class Finding:
    """The heads of one behaviour, `name`, drawn in the hue and with the letter of the family it is of."""

    name: str
    heads: Collection[Head]
    hue: str
    letter: str


def findings_map(shape: tuple[int, int], found: Sequence[Finding], *, label: str) -> Html:
    """Layers x heads, each head in the colours of the families of what it was found to do, a stripe a family."""
    n_layers, n_heads = shape

    def cell(head: Head) -> Html:
        does = [finding for finding in found if head in finding.heads]
        if not does:
            return el("td")
        families = dict.fromkeys((finding.hue, finding.letter) for finding in does)
        stripes = [el("i", letter, class_=hue, aria_hidden="true") for hue, letter in families]
        spoken = el("span", ", ".join(finding.name for finding in does), class_="spoken")
        return el("td", el("span", *stripes, class_="stripes"), spoken)

    body = [
        el("tr", el("th", f"L{layer}", scope="row"), *[cell(Head(layer, i)) for i in range(n_heads)])
        for layer in range(n_layers)
    ]
    return _grid(n_heads, body, class_="heat findings", label=label)


def grid_css(n_heads: int) -> str:
    """The style that lays out grids of `n_heads` columns."""
    return f":root {{ --heads: {n_heads}; --cell: {_CELL[_size(n_heads)]}px }}\n"


def _size(n_heads: int) -> str:
    return "large" if n_heads <= 10 else "medium" if n_heads <= 16 else "small"


def _grid(n_heads: int, body: Sequence[Html], *, class_: str, label: str, series: int | None = None) -> Html:
    size = _size(n_heads) + (" deep" if len(body) > _DEEP else "")
    header = el("tr", el("td"), *[el("th", f"H{i}", scope="col") for i in range(n_heads)])
    table = el(
        "table",
        el("thead", header),
        el("tbody", *body),
        class_=f"{class_} {size}",
        aria_label=label,
        data_series=series,
        tabindex=0,
    )
    return el("div", table, class_="wide")  # the table in it takes the focus, for the arrow keys


def score_bar(value: float, error: float, scale: ColourScale, threshold: float | None = None) -> Html:
    """A bar from 0 to `value` with its error, and a tick at the threshold."""
    if not math.isfinite(value):
        return el("span", "n/a", class_="none")
    zero, end = scale.percent(0.0), scale.percent(value)
    parts = [
        el("rect", x="0%", y=7, width="100%", height=2, class_="track"),
        el(
            "rect",
            x=f"{min(zero, end)}%",
            y=4,
            width=f"{abs(end - zero):.2f}%",
            height=8,
            class_="fill" if value >= 0 else "fill minus",
        ),
    ]
    if threshold is not None:
        parts.append(_line(scale.percent(threshold), scale.percent(threshold), 1, 15, "tick"))
    if math.isfinite(error) and error > 0:
        parts.append(_line(scale.percent(value - error), scale.percent(value + error), 8, 8, "error"))
    return el("svg", *parts, class_="bar", aria_hidden="true")


@dataclass(frozen=True)
class Strip:
    """One comparison: what was `found` (± `error`) against `others`; its `name`, and its `verdict` as text."""

    name: str
    found: float
    error: float
    others: Sequence[float]
    verdict: Html | str


def strips(
    rows: Sequence[Strip], *, axis: str, label: str, found: str = "found heads", others: str = "random heads"
) -> Html:
    """Comparisons on one axis: dots and mean ± standard deviation for the others, a diamond for what was found."""
    error = [r.error if math.isfinite(r.error) else 0.0 for r in rows]
    values = [0.0]
    for row, e in zip(rows, error, strict=True):
        values += [row.found - e, row.found + e, *row.others]
    finite = [v for v in values if math.isfinite(v)]
    margin = 0.06 * (max(finite) - min(finite)) or 1.0
    scale = ColourScale(min(finite) - margin, max(finite) + margin)
    ticks = nice_ticks(scale.low, scale.high)
    parts = [_strip(row, scale, ticks, found, others) for row in rows]
    numbers = [el("text", _tick(t, ticks), x=f"{scale.percent(t)}%", y=12, text_anchor="middle") for t in ticks]
    parts.append(
        el(
            "div",
            el("svg", *numbers, class_="axis", aria_hidden="true"),
            el("span", axis, class_="unit"),
            class_="strip-axis",
        )
    )
    return el("div", *parts, class_="strips", role="group", aria_label=label)


def _strip(row: Strip, scale: ColourScale, ticks: Sequence[float], found: str, others: str) -> Html:
    lines = [_line(scale.percent(t), scale.percent(t), 0, 56, "zero" if t == 0 else "grid") for t in ticks]
    shown = [v for v in row.others if math.isfinite(v)]
    dots = [
        el("circle", cx=f"{x}%", cy=28 + y, r=3.5, class_="dot", data_tip=f"{others}: {number(v, 3)}")
        for v, (x, y) in zip(sorted(shown), _swarm(sorted(scale.percent(v) for v in shown)), strict=True)
    ]
    spread = []
    if len(shown) > 1:
        mean, sd = float(np.mean(shown)), float(np.std(shown, ddof=1))
        spread = [
            _line(scale.percent(mean - sd), scale.percent(mean + sd), 51, 51, "spread"),
            _line(scale.percent(mean), scale.percent(mean), 46, 56, "spread"),
        ]
    mark: list[Html] = []
    if math.isfinite(row.found):
        if math.isfinite(row.error) and row.error > 0:
            mark.append(
                _line(scale.percent(row.found - row.error), scale.percent(row.found + row.error), 28, 28, "error")
            )
        diamond = el(
            "path", d="M0-8L8 0L0 8L-8 0Z", class_="diamond", data_tip=f"{found}: {plus_minus(row.found, row.error)}"
        )
        mark.append(el("svg", diamond, x=f"{scale.percent(row.found)}%", y=28, overflow="visible", width=1, height=1))
    spoken = f"{found} {plus_minus(row.found, row.error)}; {others}: " + (
        ", ".join(number(v, 3) for v in shown) or "none"
    )
    plot = el("svg", *lines, *spread, *dots, *mark, class_="plot", role="img", aria_label=spoken)
    return el(
        "div", el("span", row.name, class_="name"), plot, el("span", row.verdict, class_="verdict"), class_="strip"
    )


def _swarm(places: Sequence[float]) -> list[tuple[float, int]]:
    """Dots on a line, moved up or down where they would cover each other. `places` ascend, in percent."""
    last = dict.fromkeys(_LANES, -math.inf)
    result = []
    for x in places:
        lane = next((y for y in _LANES if x - last[y] > 1.4), min(_LANES, key=lambda y: last[y]))
        last[lane] = x
        result.append((x, lane))
    return result


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most `most` round numbers between `low` and `high`, evenly spaced."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return number(value, max(0, -math.floor(math.log10(step) + 1e-9)))


def _line(x1: float, x2: float, y1: float, y2: float, class_: str) -> Html:
    return el("line", x1=f"{x1}%", x2=f"{x2}%", y1=y1, y2=y2, class_=class_)


def pattern_figure(pattern: Float[np.ndarray, "T T"], tokens: Sequence[str], *, label: str, index: int) -> Html:
    """Attention on one text: rows are queries, columns keys. Colours run from 0 to 1.

    `index` is the place of this pattern in the page's data, for what is shown under the pointer.
    """
    pattern = np.nan_to_num(np.asarray(pattern, dtype=np.float64))
    shown = [_clip(visible(token)) for token in tokens]
    gutter = 12 + math.ceil(6.2 * max((len(token) for token in shown), default=1))
    side = round(min(15.0, max(2.0, (_WIDTH - gutter) / max(1, len(shown)))), 2)
    font = max(8.0, min(10.5, side - 1))
    every = math.ceil((font + 0.5) / side)  # where the cells are too small for a label each
    named = [(i, shown[i], round((i + 0.5) * side, 2)) for i in range(0, len(shown), every)]
    below = round(side * len(shown), 2)
    rows = [el("text", token, x=gutter - 5, y=middle, data_row=i) for i, token, middle in named]
    columns = [
        el("text", token, transform=f"translate({gutter + middle:g} {below + 5:g})rotate(-90)", data_key=i)
        for i, token, middle in named
    ]
    width, height = math.ceil(gutter + below), math.ceil(below + gutter)
    cells = [_frame(len(shown), pattern), el("g", *_levels(pattern), transform="translate(0 .5)")]
    return el(
        "svg",
        el("g", *rows, *columns, font_size=font, class_="labels", text_anchor="end", dominant_baseline="central"),
        el("g", *cells, transform=f"translate({gutter} 0)scale({side})", class_="cells"),
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        class_="pattern",
        role="img",
        aria_label=label,
        data_pattern=index,
        data_left=gutter,
        data_side=side,
    )


def _frame(n: int, pattern: Float[np.ndarray, "T T"]) -> Html:
    causal = not np.triu(pattern, 1).any()
    steps = "".join("h1v1" for _ in range(n)) if causal else f"h{n}v{n}"
    return el("path", d=f"M0 0{steps}H0Z", class_="frame")


def _levels(pattern: Float[np.ndarray, "T T"]) -> list[Html]:
    """A path for each colour, of horizontal strokes one cell wide over the cells that have it."""
    scale = ColourScale(0.0, 1.0)
    paths: dict[str, list[str]] = {}
    for row, weights in enumerate(pattern):
        column = 0
        for step, run in groupby(scale.step(float(weight)) for weight in weights):
            width = len(list(run))
            if step != "q0":
                paths.setdefault(step, []).append(f"M{column} {row}h{width}")
            column += width
    return [el("path", d="".join(strokes), class_=step) for step, strokes in sorted(paths.items())]


def _clip(text: str) -> str:
    return text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…"


def strongest_keys(pattern: Float[np.ndarray, "T T"], tokens: Sequence[str], *, label: str) -> Html:
    """A pattern as a table, for readers who do not see it: for each query the key it attends to most."""
    pattern = np.nan_to_num(np.asarray(pattern, dtype=np.float64))
    rows = []
    for i, weights in enumerate(pattern):
        j = int(weights.argmax())
        rows.append(
            el(
                "tr",
                el("td", i),
                el("td", visible(tokens[i])),
                el("td", visible(tokens[j])),
                el("td", j),
                el("td", number(float(weights[j]))),
            )
        )
    return plain_table(("position", "query", "attends most to", "position", "weight"), rows, label=label)


def token_strip(tokens: Sequence[str], values: Float[np.ndarray, "T"], scale: ColourScale) -> Html:
    """A text whose tokens are coloured by their values."""
    spans = [
        el("span", visible(token), title=number(float(value), 3), class_=scale.step(float(value)))
        for token, value in zip(tokens, values, strict=True)
    ]
    return el("p", *[join(span, " ") for span in spans], class_="strip-tokens")


def found_key(threshold: float | None) -> Html | None:
    """What an outline means, to stand beside a heat map."""
    if threshold is None:
        return None
    return el("span", el("i", class_="sample found"), f"at least {number(threshold)}", class_="nowrap")
