"""The laws a model was held to: in the terminal and as a page."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from manyheads.lab.laws.law import LawRow, Laws
from manyheads.report import page_of
from manyheads.report.html import el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import number, or_dash, plus_minus

_TITLES = ("law", "on", "verdict", "effect", "control", "p", "n")
_TERMS = {
    "Effect": "What the law predicts to be above 0, mean ± standard error over items, with its unit.",
    "Control": "The mean effect where there can be none: random pairings of the names, or differences with random signs.",
    "Holds": "The effect is above 0 by two standard errors, and the control is as large in at most one draw of twenty.",
    "Fails": "On these items the opposite is seen. A law about facts of one order fails on facts that texts hold in both.",
    "Not decided": "Neither, or the model does not do what the law speaks of; the last line of the row says why.",
}


def laws_table(found: Laws) -> Table:
    """A row a law and set of items."""
    table = Table(title=f"Laws, and {found.model}", title_justify="left")
    for title in _TITLES:
        table.add_column(title, justify="left" if title in _TITLES[:3] else "right", no_wrap=title == "verdict")
    for row in found.rows:
        table.add_row(*map(Text, _cells(row)))
    return table


@page_of(Laws)
def laws_page(found: Laws) -> str:
    """The table, and under each row what was seen."""
    rows = []
    for row in found.rows:
        rows.append(el("tr", *[el("td", cell) for cell in _cells(row)]))
        rows.append(el("tr", el("td", row.says, colspan=str(len(_TITLES)))))
    lede = "Each law predicts an effect. Here it is beside its control."
    body = join(
        masthead("Laws", found.model, lede, {"laws": str(len({row.law for row in found.rows}))}, how_to_read(_TERMS)),
        el("main", el("section", el("h2", "Verdicts"), plain_table(_TITLES, rows, label="laws"))),
    )
    return page(f"Laws of {found.model}", body)


def _cells(row: LawRow) -> list[str]:
    effect = f"{plus_minus(row.effect, row.stderr)} {row.unit}"
    p = or_dash(row.p) if math.isnan(row.p) else number(row.p, 3)
    return [f"{row.law} (#{row.number})", row.on, row.answer, effect, or_dash(row.control), p, str(row.n)]
