"""An experiment that was run: verdicts, a picture of every seed, all values. In the terminal and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from rich.table import Table
from rich.text import Text

from manyheads.evaluation.experiment import Answer, Experiment, Tried, Verdict
from manyheads.report import page_of
from manyheads.report.figures import Strip, strips
from manyheads.report.html import Html, el, how_to_read, join, link, masthead, page, plain_table
from manyheads.report.numbers import number, plus_minus

VERDICT_KINDS: tuple[Answer, ...] = ("held", "unsure", "missed")
WIDEST = 6  # metrics that fit beside each other in a terminal


def verdicts_table(tried: Tried) -> Table:
    """A row a claim: the verdict, what was measured, the bound, how many seeds are within it, and the claim."""
    table = Table(title=f"{tried.experiment.question} (#{_numbers(tried)})", title_justify="left")
    for title in ("verdict", "measured", "claimed", "seeds"):
        table.add_column(title, no_wrap=True)
    table.add_column("claim", overflow="fold")
    for one in tried.verdicts:
        table.add_row(one.answer, _measured(one.mean, one.stderr), one.bound, f"{one.within} of {one.of}", one.says)
    return table


def tried_table(rows: Sequence[tuple[Experiment, Tried | str]]) -> Table:
    """A row an experiment: its numbers, seconds of all its runs, how many claims have which verdict, or why it failed."""
    ran = [tried for _, tried in rows if isinstance(tried, Tried)]
    table = Table(caption=f"{sum(tried.seconds for tried in ran):.0f} seconds in all", caption_justify="left")
    for title in ("name", "#", "seconds", "seeds", *VERDICT_KINDS, "what went wrong"):
        many = title in ("seconds", "seeds", *VERDICT_KINDS)
        table.add_column(title, justify="right" if many else "left", no_wrap=title == "name")
    for one, tried in rows:
        cells = [one.name, ", ".join(f"#{n}" for n in one.numbers)]
        if isinstance(tried, str):
            table.add_row(*cells, *[""] * (2 + len(VERDICT_KINDS)), Text(tried))
            continue
        answers = [verdict.answer for verdict in tried.verdicts]
        seeds = tried.comparison.table["seed"].nunique()
        counts = [str(answers.count(kind)) for kind in VERDICT_KINDS]
        table.add_row(*cells, f"{tried.seconds:.0f}", str(seeds), *counts, "")
    return table


def values_table(tried: Tried) -> Table:
    """A row a data set and method, a column a metric: mean ± standard error over seeds.

    Of more metrics than fit beside each other, a row a data set and metric, a column a method.
    """
    frame = tried.to_frame()
    down, across = ("method", "metric") if frame["metric"].nunique() <= WIDEST else ("metric", "method")
    columns = list(dict.fromkeys(frame[across]))
    seeds = tried.comparison.table["seed"].nunique()
    baseline = tried.comparison.baseline
    table = Table(
        caption=f"mean ± standard error over seeds ({seeds}); the baseline is {baseline}", caption_justify="left"
    )
    for title in ("data", down, *columns):
        table.add_column(title, justify="left" if title in ("data", down) else "right")
    for (dataset, name), part in frame.groupby(["dataset", down], sort=False):
        own = part.set_index(across)
        cells = [_measured(*own.loc[c, ["mean", "stderr"]]) if c in own.index else "" for c in columns]
        table.add_row(str(dataset), str(name), *cells)
    return table


_TERMS = {
    "Held": "The mean over seeds is within the bound of the claim, and so is everything within two standard errors of it.",
    "Unsure": "The mean is within the bound, but not by two standard errors; more seeds would tell.",
    "Missed": "The mean is not within the bound.",
    "Seeds": "How many seeds keep the bound by themselves, on every data set that the claim is about.",
    "Dots": "One seed each. The diamond is their mean, with its standard error.",
    "Difference": "From the baseline on the same data with the same seed, mean ± standard error.",
}


@page_of(Tried)
def experiment_page(tried: Tried) -> str:
    """Verdicts, then a picture a data set and metric."""
    one = tried.experiment
    facts = {
        "systems": ", ".join(f"#{number}" for number in one.numbers),
        "paper": link(f"https://arxiv.org/abs/{one.paper}", one.paper),
        "baseline": one.baseline,
        "seeds": ", ".join(map(str, sorted(tried.comparison.table["seed"].unique()))),
    }
    lede = (
        "A quick run, on less data: its verdicts say little." if tried.quick else "What was claimed, and what came out."
    )
    rows = [el("tr", *[el("td", cell) for cell in _cells(verdict)]) for verdict in tried.verdicts]
    frame = tried.to_frame()
    pictures = [
        _picture(tried, str(dataset), str(metric), part)
        for (dataset, metric), part in frame.groupby(["dataset", "metric"], sort=False)
    ]
    body = join(
        masthead("Experiment", one.question, lede, facts, how_to_read(_TERMS)),
        el(
            "main",
            el(
                "section",
                el("h2", "Verdicts"),
                plain_table(["verdict", "measured", "claimed", "seeds", "claim"], rows, label="verdicts"),
            ),
            *pictures,
        ),
    )
    return page(one.name, body)


def _picture(tried: Tried, dataset: str, metric: str, part: pd.DataFrame) -> Html:
    table = tried.comparison.table
    strip = []
    for row in part.itertuples():
        own = table.query("dataset == @dataset and metric == @metric and method == @row.method")["value"]
        base = row.method == tried.comparison.baseline
        told = "the baseline" if base else f"difference {_measured(row.difference, row.difference_stderr)}"
        strip.append(Strip(row.method, row.mean, row.stderr, own.tolist(), told))
    better = "lower is better" if metric in tried.experiment.lower else "higher is better"
    shown = strips(strip, axis=f"{metric} ({better})", label=f"{metric} on {dataset}", found="mean", others="one seed")
    return el("section", el("h2", f"{metric}, on {dataset}"), shown)


def _cells(verdict: Verdict) -> list[str]:
    measured = _measured(verdict.mean, verdict.stderr)
    if len(verdict.values) > 1 and all(math.isfinite(value) for value in verdict.values):
        measured += f" ({min(verdict.values):.3g} to {max(verdict.values):.3g})"
    return [verdict.answer, measured, verdict.bound, f"{verdict.within} of {verdict.of}", verdict.says]


def _measured(mean: float, stderr: float) -> str:
    return plus_minus(mean, stderr) if math.isfinite(stderr) else number(mean, 3)


def _numbers(tried: Tried) -> str:
    return ", #".join(map(str, tried.experiment.numbers))
