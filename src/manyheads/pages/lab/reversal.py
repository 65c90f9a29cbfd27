"""Made-up facts, asked in both orders: in the terminal and as a page (#23)."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from manyheads.lab.tuning.intervals import interval_of
from manyheads.lab.tuning.reversed_facts import ReversalTuning, is_told
from manyheads.report import page_of
from manyheads.report.html import el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import number

_TITLES = ("facts told", "asked", "was it told so", "gain, nats", "95 % interval", "right", "chance")
_TERMS = {
    "Gain": "How much more likely tuning made the right answer than other answers of the same group, in nats; 0 is nothing.",
    "Interval": "Holds 95 % of the means when seeds, facts and phrasings are drawn again.",
    "Right": "Share of facts, over seeds and phrasings, whose own answer gains most of its group.",
    "Asked": "In phrasings that no training text has.",
    "Both": "A control: facts told in both orders can be told in both.",
}


def reversal_table(found: ReversalTuning) -> Table:
    """A row a group and order."""
    loss = (
        f"text loss {found.loss_before:.2f}, after tuning {found.loss.mean():.2f}; learned {found.learned.mean():.2f}"
    )
    seeds = ", ".join(map(str, found.seeds))
    table = Table(title=f"{found.facts.name}: {found.model}, seeds {seeds}; {loss}", title_justify="left")
    for title in _TITLES:
        table.add_column(title)
    for row in _rows(found):
        table.add_row(*map(Text, row))
    return table


@page_of(ReversalTuning)
def reversal_page(found: ReversalTuning) -> str:
    """The verdict, the table of groups and orders, and every fact."""
    facts = {
        "model": found.model,
        "facts": f"{len(found.facts.pairs)}, {found.facts.name}",
        "seeds": ", ".join(map(str, found.seeds)),
        "text loss": f"{number(found.loss_before)}, after tuning {number(float(found.loss.mean()))} nats",
        "learned": f"{number(float(found.learned.mean()))} of the trained answers, mean probability",
    }
    verdict = found.verdict[0].upper() + found.verdict[1:] + "."
    frame = found.to_frame().groupby(["group", "asked", "name", "description"], sort=False)[["gain", "right"]].mean()
    each = [[*map(str, key), number(float(one["gain"])), number(float(one["right"]))] for key, one in frame.iterrows()]
    body = join(
        masthead("Tuning", "Facts in one order, asked in both", verdict, facts, how_to_read(_TERMS)),
        el(
            "main",
            _section("Orders", _TITLES, _rows(found)),
            _section("Facts", ("facts told", "asked", "name", "description", "gain, nats", "right"), each),
        ),
    )
    return page("Facts in one order, asked in both", body)


def _section(title: str, titles: tuple[str, ...], rows: list[list[str]]) -> object:
    made = [el("tr", *[el("td", cell) for cell in row]) for row in rows]
    return el("section", el("h2", title), plain_table(list(titles), made, label=title.lower()))


def _rows(found: ReversalTuning) -> list[list[str]]:
    rows = []
    for (group, order), gain in found.gains.items():
        one = interval_of(gain)
        told = "yes" if is_told((group, order)) else "no"
        interval = f"{number(one.low)} to {number(one.high)}"
        right = number(float(found.right[group, order].mean()))
        rows.append([group, order, told, number(one.mean), interval, right, number(1 / gain.shape[1])])
    return rows
