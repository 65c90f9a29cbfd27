"""One quantity against another: a dot a thing that was measured, and a line through those of one series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyheads.report.figures import hue, nice_ticks
from manyheads.report.html import Html, el

WIDTH, HEIGHT = 680, 300  # px
LEFT, RIGHT, TOP, BELOW = 56, 120, 20, 44  # of the plot, for its labels


@dataclass(frozen=True)
class Point:
    """One measurement; `note` is told under the pointer."""

    series: str
    x: float
    y: float
    note: str = ""


def scatter(points: Sequence[Point], *, x_name: str, y_name: str) -> Html:
    """The picture, with its axes from the lowest to the highest value and a name at the end of each line."""
    across = _Axis([point.x for point in points], LEFT, WIDTH - RIGHT)
    up = _Axis([point.y for point in points], HEIGHT - BELOW, TOP)
    parts: list[Html] = []
    for tick in nice_ticks(across.low, across.high):
        x = across(tick)
        parts.append(el("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BELOW, class_="grid"))
        parts.append(el("text", f"{tick:g}", x=x, y=HEIGHT - BELOW + 16, text_anchor="middle"))
    for tick in nice_ticks(up.low, up.high):
        y = up(tick)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(el("text", f"{tick:g}", x=LEFT - 6, y=y + 4, text_anchor="end"))
    taken: list[float] = []
    for i, series in enumerate(dict.fromkeys(point.series for point in points)):
        own = sorted((point for point in points if point.series == series), key=lambda point: point.x)
        line = " ".join(f"{across(point.x)},{up(point.y)}" for point in own)
        parts.append(el("polyline", points=line, class_=f"trace {hue(i)}"))
        for point in own:
            told = f"{series} {point.note}: {x_name} {point.x:.4g}, {y_name} {point.y:.4g}"
            parts.append(
                el("circle", el("title", told), cx=across(point.x), cy=up(point.y), r=4.5, class_=f"mark {hue(i)}")
            )
        place = _free(up(own[-1].y), taken)
        parts.append(el("text", series, x=across(own[-1].x) + 9, y=place + 4, class_="named"))
    parts.append(el("text", x_name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    parts.append(el("text", y_name, x=LEFT, y=TOP - 8, text_anchor="middle"))
    told = f"{y_name} against {x_name}"
    svg = el("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=told, class_="plot scatter")
    return el("figure", svg, el("figcaption", told))


class _Axis:
    """From values to pixels, with a little room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _free(wanted: float, taken: list[float]) -> float:
    """A height for a label near `wanted`, 13 px from every one that is taken."""
    place = wanted
    while any(abs(place - other) < 13 for other in taken):
        place += 13 if wanted < HEIGHT / 2 else -13
    taken.append(place)
    return place
