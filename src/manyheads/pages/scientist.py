"""What the pipeline of TimeSeriesScientist did with each series, as a page."""

from __future__ import annotations

from manyheads.forecast.pipelines.scientist import ScientistReport, SeriesPlan
from manyheads.report import page_of
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import count, number

SHOWN = 50  # series on a page
_TERMS = {
    "Validation error": "The mean absolute error of forecasts that begin in the last fifth of the series, in its own unit.",
    "Strength": "How much of the variance goes away when the season, or the trend, is taken out; 0 is none of it, 1 all.",
    "Repairs": "between: gaps that were interpolated; season: gaps that hold what was a season before; clipped: outliers.",
}


@page_of(ScientistReport)
def scientist_page(report: ScientistReport) -> str:
    """A section a series: what it is like, what was repaired, which candidates were tried and kept."""
    repaired = sum(sum(plan.repairs.values()) for plan in report.plans)
    lede = f"{count(len(report.plans), 'series', 'series')}, {count(repaired, 'repaired step')}."
    failed = [el("p", f"{one} failed and was left out: {why}", class_="note") for one, why in report.failures.items()]
    more = len(report.plans) - SHOWN
    body = join(
        masthead("Forecast", "What the pipeline did", lede, {"horizon": f"{report.horizon:,}"}, how_to_read(_TERMS)),
        el("main", *failed, *map(_section, report.plans[:SHOWN])),
        el("p", f"{more:,} more series are in the JSON of the report.") if more > 0 else None,
    )
    return page("What the pipeline did", body)


def _section(plan: SeriesPlan) -> Html:
    weight = {str(one): w for one, w in zip(plan.kept, plan.weights, strict=True)}
    rows = [
        el("tr", el("td", name), el("td", number(error, 4)), el("td", number(weight[name]) if name in weight else ""))
        for name, error in sorted(plan.errors.items(), key=lambda pair: pair[1])
    ]
    table = plain_table(["candidate", "validation error", "weight"], rows, label=plan.name) if rows else None
    return el("section", el("h2", plan.name), el("p", plan.says), table)
