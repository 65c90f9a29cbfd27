"""The table of replications: in the terminal, and as a page of the docs that is written and not edited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from manyheads.catalogue import methods
from manyheads.catalogue.headlines import headline
from manyheads.evaluation.replication import Replication

_TITLES = ("#", "system", "claim", "bound", "measured", "beside", "verdict", "seconds", "what to type")
_HEAD = """# Replications

Every system's claim, tried again. This page is written by `manyheads replicate --out docs/replication.md`; nobody edits it.

| verdict | meaning |
| --- | --- |
| held | the mean over seeds keeps the bound, and so does every value within two standard errors of it |
| unsure | the mean keeps the bound, but not all of these values |
| missed | the mean does not keep the bound |
| not shown | the quick form does not keep the bound; on so little data that refutes nothing, and the full form decides |
| passed, failed | the system has no experiment; tests show its claim, and they pass or fail |
| not run | it could not be tried; the reason stands there |
| not built | the system is absent |

*Measured* is mean ± standard error over seeds, and in how many seeds the bound was kept. *Quick* experiments take less data than
the full ones, whose figures stand on the systems' own pages; some are only there to see that a thing runs. Where a verdict here
and one there differ, theirs counts. *Seconds* are of the whole command, on the machine that wrote this page.
"""


def replication_table(rows: Sequence[Replication]) -> Table:
    """A row a claim."""
    names = {m.number: m.name for m in methods()}
    table = Table(*_TITLES[:-1])
    for row in rows:
        told = (f"#{row.number}", names[row.number], *_cells(row)[:-1])
        table.add_row(*map(Text, told))
    return table


def replication_markdown(rows: Sequence[Replication]) -> str:
    """All systems: those in `rows` claim by claim, the others as not tried yet."""
    found: dict[int, list[Replication]] = {}
    for row in rows:
        found.setdefault(row.number, []).append(row)
    counts = Counter(row.verdict for row in rows)
    told = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    parts = [_HEAD, f"{len(rows)} claims of {len(found)} systems were tried: {told}.", ""]
    for m in methods():
        page = f"; [its page]({m.docs.removeprefix('docs/')})" if m.docs else ""
        claim, paper = headline(m.number)
        parts += [f"## \\#{m.number} {m.name}", "", f"The paper claims: {claim}. Its figure: {paper}{page}.", ""]
        if m.number not in found:
            parts += ["Not tried yet.", ""]
            continue
        if m.state == "absent":
            parts += ["Not built.", ""]
            continue
        parts += [f"| {' | '.join(_TITLES[2:])} |", f"|{' --- |' * len(_TITLES[2:])}"]
        parts += [f"| {' | '.join(_escaped(cell) for cell in _cells(row))} |" for row in found[m.number]]
        parts += [""]
    return "\n".join(parts)


def _cells(row: Replication) -> tuple[str, ...]:
    seconds = f"{row.seconds:.0f}" if row.seconds else ""
    return (row.claim, row.bound, row.measured, row.baseline, row.verdict, seconds, row.command and f"`{row.command}`")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")
