"""A table of layers x positions whose cells are coloured: the picture shared by the logit lens and the patching maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from manyheads import __version__
from manyheads.files import write_atomically
from manyheads.report.figures import Scale, hue
from manyheads.report.html import Html, el, join, page
from manyheads.report.numbers import brief, number, visible

_CSS = """
table.positions { width: auto; max-width: none; table-layout: auto }
table.positions thead th { height: auto; vertical-align: bottom; padding: .1rem .15rem; font-family: var(--mono) }
table.positions tbody th { width: auto; min-width: 2.1rem; white-space: nowrap }
table.positions tbody td { height: 24px; min-width: 2.6rem; max-width: 7rem; padding: 0 .25rem; font-size: .72rem;
text-overflow: ellipsis }
"""
_LONGEST = 12


def position_table(
    rows: Sequence[str],
    tokens: Sequence[str],
    values: Float[np.ndarray, "R T"],
    scale: Scale,
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
    return el("div", table, class_="scroll")


def write_page(
    title: str, lede: str, table: Html, caption: str, scale: Scale, path: str | Path, *, force: bool
) -> Path:
    """A page with one table and its scale. `InputError` if something is at `path` already and `force` is not set."""
    figure = el("figure", table, el("figcaption", caption, " ", scale.key()), class_=hue(0))
    body = join(
        el("header", el("p", "Trace", class_="eyebrow"), el("h1", title), el("p", lede, class_="lede"), class_="top"),
        el("main", figure),
    )
    text = page(title, body, generator=f"manyheads {__version__}", css=_CSS)
    return write_atomically(path, lambda file: file.write_text(text, "utf-8", newline="\n"), force=force)


def _clipped(token: str) -> str:
    text = visible(token)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
