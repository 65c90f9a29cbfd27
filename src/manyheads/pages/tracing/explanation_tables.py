"""An explanation in the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from manyheads.report.numbers import number, visible
from manyheads.trace.explanation import Explanation

_WIDTH = 24


def explanation_table(found: Explanation, top: int) -> Table:
    """The `top` components (or edges) with the largest scores, and for heads the tokens they read most of it from."""
    title = (
        f"{visible(found.answer)} rather than {visible(found.against)}: {number(found.difference)} logits, "
        f"probability {number(found.probability, 3)} · {found.method}"
    )
    frame = found.to_frame()
    constants = [f"{name} {number(value)}" for name, value in found.constants.items()]
    more = [f"{len(frame) - top} more"] if len(frame) > top else []
    table = Table(title=Text(title), title_justify="left", caption=", ".join(more + constants), caption_justify="left")
    names = [column for column in frame.columns if column != "score"]
    for name in names:
        table.add_column(name)
    table.add_column("logits", justify="right")
    table.add_column("", min_width=_WIDTH)
    if found.sources:
        table.add_column("read from", overflow="fold")
    most = max(float(frame["score"].abs().max()), 1e-9) if len(frame) else 1.0
    for row in frame.head(top).itertuples():
        score = float(row.score)
        bar = Text("█" * round(_WIDTH * abs(score) / most), style="yellow" if score < 0 else "blue")
        cells = [*(getattr(row, name) for name in names), number(score, 3), bar]
        table.add_row(*cells, *([_read(found, getattr(row, names[0]))] if found.sources else []))
    return table


def _read(found: Explanation, name: str) -> str:
    values = found.sources.get(name)
    if values is None:
        return ""
    order = [i for i in abs(values).argsort()[::-1][:3] if abs(values[i]) >= 0.05 * abs(values).max()]
    return ", ".join(f"{visible(found.tokens[i])} {number(float(values[i]))}" for i in order)
