"""Why a head looks there, in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from manyheads.report.numbers import number, visible
from manyheads.trace.positions.attention_score import AttentionScore

_WIDTH = 18


def attention_score_table(found: AttentionScore, top: int) -> Group:
    """The `top` writers of the query, of the key, and pairs of them; each share signed, in units of the score."""
    frame = found.to_frame()
    pairs = [(f"{row.query} × {row.key}", float(row.share)) for row in frame.head(top).itertuples()]
    tables = [
        _shares("query written by", _largest(found.by_query.items(), top)),
        _shares("key written by", _largest(found.by_key.items(), top)),
        _shares("query × key", pairs),
    ]
    grid = Table.grid(padding=(0, 3))
    grid.add_row(*tables)
    return Group(Text(attention_score_sentence(found)), grid)


def attention_score_sentence(found: AttentionScore) -> str:
    """What is split: head, tokens, score and weight, in one line."""

    def named(at: int) -> str:
        return f"{visible(found.tokens[at])} ({at})" if found.tokens else f"position {at}"

    bias = f", {number(found.bias, 3)} of it for the positions alone" if found.bias else ""
    cap = f"; the model caps scores at {found.softcap:g} afterwards" if found.softcap else ""
    return (
        f"{found.head} at {named(found.query)} gives {named(found.key)} the score {number(found.score, 3)}{bias}, and so "
        f"{number(found.weight, 3)} of its attention{cap}."
    )


def _largest(shares: Iterable[tuple[str, float]], top: int) -> list[tuple[str, float]]:
    return sorted(shares, key=lambda pair: -abs(pair[1]))[:top]


def _shares(title: str, rows: list[tuple[str, float]]) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column(title, no_wrap=True)
    table.add_column("score", justify="right")
    table.add_column("", min_width=_WIDTH)
    most = max((abs(share) for _, share in rows), default=1.0) or 1.0
    for name, share in rows:
        bar = Text("█" * round(_WIDTH * abs(share) / most), style="yellow" if share < 0 else "blue")
        table.add_row(name, number(share, 3), bar)
    return table
