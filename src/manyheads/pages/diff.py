"""The comparison of two atlases as a page: what changed, three heat maps a behaviour, roles and checks side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from manyheads.atlas.surveys.diff import CALLS, AtlasDiff
from manyheads.heads import HeadScores
from manyheads.pages.atlas_tables import called, model_name, threshold_of, title_of
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, found_key, grid_css, heat_table, hue
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import format_p, number, or_dash

_TERMS = (
    "Each head has a score for each behaviour in both models, and has the behaviour if the score reaches its threshold.",
    "Effect is how much of a task's metric is lost when the heads are ablated, random the same for random heads.",
    "p is how rarely random heads cost as much; q is p corrected for the number of claims.",
)


@page_of(AtlasDiff)
def diff_page(diff: AtlasDiff) -> str:
    """What changed, three heat maps a behaviour, roles and checks side by side."""
    names = f"{model_name(diff.a)} (A) and {model_name(diff.b)} (B)"
    body = join(
        masthead("Two atlases compared", names, _summary(diff), None, how_to_read(*_TERMS)),
        el(
            "main",
            _overview(diff),
            [_behaviour(diff, name, i) for i, name in enumerate(diff.agreement)],
            _section("Roles that changed", diff.roles, ("head", "gained", "lost", "kept")) if len(diff.roles) else None,
            _checks(diff) if len(diff.checks) else None,
        ),
    )
    version = str(diff.b.card.get("version", ""))
    return page(f"Compared: {names}", body, version=version, css=grid_css(diff.a.shape[1]))


def _summary(diff: AtlasDiff) -> str:
    counts = ", ".join(f"{len(diff.of(call))} {call}" for call in CALLS)
    return (
        f"Heads at a behaviour's threshold, over {len(diff.agreement)} behaviours: {counts} from A to B. "
        f"{len(diff.roles)} heads have other roles than before."
    )


def _overview(diff: AtlasDiff) -> Html:
    rows = []
    for i, name in enumerate(diff.agreement):
        cells = [called(diff, name, call) for call in CALLS]
        rows.append(
            el(
                "tr",
                el(
                    "th",
                    el("span", class_=f"dot-mark {hue(i)}", aria_hidden="true"),
                    title_of(diff.a, name),
                    scope="row",
                ),
                el("td", or_dash(diff.agreement[name])),
                [el("td", cell) for cell in cells],
            )
        )
    titles = ("Behaviour", "Rank agreement", *(call.capitalize() for call in CALLS))
    return el(
        "section",
        el("h2", "Overview"),
        plain_table(titles, rows, class_="plain overview"),
        el(
            "p",
            "Appeared: the score reaches the threshold in B only; vanished: in A only; strengthened or weakened: in both. Rank "
            "agreement: Spearman's correlation of all heads' scores. Heads in brackets changed by less than two standard errors.",
            class_="small soft",
        ),
    )


def _behaviour(diff: AtlasDiff, name: str, i: int) -> Html:
    a, b = diff.a[name], diff.b[name]
    change = HeadScores(name, b.values - a.values, a.stderr, min(a.n, b.n))
    about, threshold = diff.a.about[name], threshold_of(diff.a, name)
    shared = ColourScale.holding(pd.concat([pd.Series(a.values.ravel()), pd.Series(b.values.ravel())]).to_numpy())
    most = max(abs(change.values).max(), 1e-9)
    title = title_of(diff.a, name)
    figures = [
        _figure(a, shared, f"{title}: A", threshold),
        _figure(b, shared, f"{title}: B", threshold),
        _figure(change, ColourScale(-most, most), f"{title}: B less A", None),
    ]
    return el(
        "section",
        el("h2", title),
        el("p", str(about["what"])) if about.get("what") else None,
        el("div", *figures, class_="trio"),
        class_=f"behaviour {hue(i)}",
    )


def _figure(scores: HeadScores, scale: ColourScale, label: str, threshold: float | None) -> Html:
    return el(
        "figure",
        heat_table(scores, scale, label=label, threshold=threshold),
        el("figcaption", label, el("span", scale.key(), found_key(threshold), class_="keys")),
    )


def _checks(diff: AtlasDiff) -> Html:
    shown = diff.checks.assign(
        **{
            f"{what}_{side}": diff.checks[f"{what}_{side}"].map(format_p if what in "pq" else number)
            for what in ("effect", "random", "p", "q")
            for side in ("a", "b")
        }
    )
    sides = [f"{what}_{side}" for side in ("a", "b") for what in ("heads", "effect", "random", "p", "q")]
    columns = ("behaviour", "mode", *sides)
    return _section("Causal checks side by side", shown, columns)


def _section(title: str, frame: pd.DataFrame, columns: Sequence[str]) -> Html:
    rows = [el("tr", [el("td", _cell(value)) for value in row]) for row in frame[list(columns)].itertuples(index=False)]
    titles = [column.replace("_a", " A").replace("_b", " B").capitalize() for column in columns]
    return el("section", el("h2", title), plain_table(titles, rows, class_="plain overview"))


def _cell(value: Any) -> str:
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).replace("_", " ")
