"""The comparison of two atlases as a page: what changed, three heat maps a behaviour, roles and checks side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from manyheads.atlas.surveys.diff import CALLS, AtlasDiff
from manyheads.heads import HeadScores
from manyheads.pages.atlas_tables import called, families, model_name, threshold_of, title_of
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, found_key, grid_css, heat_table
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import format_p, number, or_dash

_TERMS = {
    "L4H2": "Head 2 of layer 4; both are counted from 0.",
    "Score": "How much a head does what the behaviour is named after. It has the behaviour if its score reaches the threshold.",
    "Rank agreement": "Spearman's correlation of all heads' scores: 1 where both models rank their heads alike, "
    "about 0 where by chance.",
    "In brackets": "Heads whose score changed by less than two standard errors.",
    "Effect": "How much of a task's metric is lost when the heads are ablated (taken out); random: the same for random heads.",
    "p": "How often random heads of the same layers cost as much. With 20 random sets it cannot be below 0.048.",
    "q": "p corrected for the number of claims: the share of false ones to expect among all with a p as small.",
}


@page_of(AtlasDiff)
def diff_page(diff: AtlasDiff) -> str:
    """What changed, three heat maps a behaviour, roles and checks side by side."""
    names = f"{model_name(diff.a)} (A) and {model_name(diff.b)} (B)"
    body = join(
        masthead("Two atlases compared", names, _summary(diff), None, how_to_read(_TERMS)),
        el(
            "main",
            _overview(diff),
            [_behaviour(diff, name) for name in _names(diff)],
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


def _names(diff: AtlasDiff) -> list[str]:
    """The behaviours of both, those of one family next to each other."""
    return [name for name in families(diff.a) if name in diff.agreement]


def _overview(diff: AtlasDiff) -> Html:
    rows = []
    for name in _names(diff):
        cells = [called(diff, name, call) for call in CALLS]
        rows.append(
            el(
                "tr",
                el(
                    "th",
                    families(diff.a)[name].mark(),
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
        plain_table(titles, rows, class_="plain overview", label="What changed, behaviour by behaviour"),
        el(
            "p",
            "Appeared: the score reaches the threshold in B only; vanished: in A only; strengthened or weakened: in both.",
            class_="small soft",
        ),
    )


def _behaviour(diff: AtlasDiff, name: str) -> Html:
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
        class_=f"behaviour {families(diff.a)[name].hue}",
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
    return el("section", el("h2", title), plain_table(titles, rows, class_="plain overview", label=title))


def _cell(value: Any) -> str:
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).replace("_", " ")
