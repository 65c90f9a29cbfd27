"""Heads on one trunk: how they trained, and where their gradients pull against each other."""

from __future__ import annotations

from manyheads.learning import GradientConflicts, HeadsRun
from manyheads.report import page_of
from manyheads.report.figures import Strip, strips
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import number
from manyheads.report.scatter import Point, scatter

_TERMS = {
    "Cosine": "Of two heads' gradients at the trunk's weights: 1 where both want the same change, 0 where neither meddles with "
    "the other, below 0 where what helps one hurts the other.",
    "Dots": "One look each; the diamond is their mean, with its standard error.",
    "Norm": "How large a head's gradient at the trunk is, weight included: who moves the trunk most.",
}


@page_of(GradientConflicts)
def conflicts_page(found: GradientConflicts) -> str:
    """A strip a pair of heads, then the norms."""
    looks = len(found.seen)
    lede = f"How the heads' gradients at the trunk agree, in {looks} looks."
    body = join(
        masthead("Heads", "Do the heads agree?", lede, None, how_to_read(_TERMS)), el("main", *_sections(found))
    )
    return page("Heads on one trunk", body)


@page_of(HeadsRun)
def heads_run_page(run: HeadsRun) -> str:
    """Losses by step, then the conflicts of their gradients."""
    points = [Point(str(row.head), float(row.step), float(row.loss)) for row in run.losses.itertuples()]
    picture = scatter(points, x_name="step", y_name="loss, before weights") if len(run.losses) > 1 else None
    lede = f"{run.progress.step} steps, {run.progress.minutes:.1f} minutes."
    losses = el("section", el("h2", "Losses"), picture)
    body = join(
        masthead("Heads", "How the heads trained", lede, None, how_to_read(_TERMS)),
        el("main", losses, *_sections(run.conflicts)),
    )
    return page("Heads on one trunk", body)


def _sections(found: GradientConflicts) -> list[Html]:
    frame, summary = found.to_frame(), found.summary()
    if summary.empty:
        return [el("p", "No two heads' gradients reach the trunk, so that none can conflict.")]
    rows = []
    for row in summary.itertuples():
        cosines = frame.query("a == @row.a and b == @row.b")["cosine"]
        told = f"conflict in {row.conflicts:.0%} of looks"
        rows.append(Strip(f"{row.a}, {row.b}", row.cosine, row.stderr, cosines.tolist(), told))
    shown = strips(rows, axis="cosine of gradients", label="cosines of pairs of heads", found="mean", others="one look")
    norms: dict[str, list[float]] = {}
    for row in frame.itertuples():
        norms.setdefault(row.a, []).append(row.norm_a)
        norms.setdefault(row.b, []).append(row.norm_b)
    cells = [el("tr", el("td", name), el("td", number(sum(own) / len(own), 4))) for name, own in norms.items()]
    table = plain_table(["head", "mean norm of its gradient at the trunk"], cells, label="norms")
    return [el("section", el("h2", "Conflicts"), shown), el("section", el("h2", "Norms"), table)]
