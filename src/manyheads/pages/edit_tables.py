"""An edit in the terminal and as a page: what it does to which heads, its effect on its goal, and what else it changes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from manyheads.edit.effects import SideEffects
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, Finding, Strip, findings_map, grid_css, hue, score_bar, strips
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table, unfold
from manyheads.report.numbers import count, number, p_equals, plus_minus

_LEARNED = {"right": "answered right", "preferred": "answer likelier than foil"}
_PAIRS = ("before", "after")
_TERMS: dict[str, Html | str] = {
    "L4H2": "Head 2 of layer 4; both are counted from 0.",
    "z": "What a head reads, before the output projection. An edit multiplies it by a number, adds a vector, or both.",
    "Strength": "0 changes nothing, 1 is the edit as it was found.",
    "Without, with": "The same prompts without the edit and with it; they took no part in making it.",
    "Random heads": "The same kind of edit of as many random heads of the same layers: what any heads would do.",
}
_CHANGES = {
    "Text": "Mean cross-entropy of plain text, in nats a token; more is worse. All other measures are shares of prompts.",
    "Bold": "A change of more than two standard errors. Among twenty measures about one is so by chance.",
}


def edit_table(edit: HeadEdit) -> Table:
    """A row a head."""
    table = Table(title=Text(str(edit)), title_justify="left")
    for name in ("head", "scale", "length of shift"):
        table.add_column(name, justify="left" if name == "head" else "right")
    for head, scale, shift in zip(edit.heads, edit.scale.tolist(), edit.shift, strict=True):
        table.add_row(str(head), number(scale, 3), number(float(shift.norm()), 3))
    return table


def edit_facts(edit: HeadEdit) -> str:
    """Its model, its settings, how its heads were found and what was measured, a line each."""
    where = "every token" if edit.at == "all" else "the prompt's last token"
    facts = [f"For model {edit.fingerprint}, at {where}, strength {edit.strength:g}."]
    facts += [f"Found: {edit.found}."] if edit.found else []
    facts += [f"In this order: {'; '.join(edit.parts)}."] if edit.parts else []
    facts += [f"Settings: {json.dumps(edit.settings)}."] if edit.settings else []
    measured = {name: value for name, value in edit.effect.items() if name != "side effects"}
    facts += [f"Measured: {json.dumps(measured)}."] if measured else []
    return "\n".join(facts)


def learned_table(effect: Mapping[str, Mapping[str, Any]]) -> Table:
    """What an edit learned, on prompts that took no part: a row a measure."""
    random = any(effect[name]["random"] for name in _LEARNED if name in effect)
    table = Table(title="On held-out prompts", title_justify="left")
    for name in ("share", "without", "with", *(["random heads"] if random else []), "n"):
        table.add_column(name, justify="left" if name == "share" else "right")
    for name, label in _LEARNED.items():
        if name in effect:
            row = effect[name]
            others = [number(sum(row["random"]) / len(row["random"]), 3)] if random else []
            table.add_row(label, number(row["before"], 3), number(row["after"], 3), *others, str(row["n"]))
    return table


def guard_table(carriers: pd.DataFrame, top: int) -> Table:
    """The heads without which most refusals are lost."""
    lost = int((carriers["carries"] > 0).sum())
    title = f"{lost} of {len(carriers)} heads carry refusals by themselves"
    table = Table(title=title, title_justify="left")
    edited = "edited" in carriers
    for name in (
        "without",
        "answered",
        "nonsense",
        "harmless refused",
        "refusals lost",
        *(["edited"] if edited else []),
    ):
        table.add_column(name, justify="left" if name == "without" else "right")
    for row in carriers.head(top).itertuples():
        shares = (row.answered, row.nonsense, row.false_refusals, row.carries)
        table.add_row(row.head, *(number(float(x)) for x in shares), *(["yes" if row.edited else ""] if edited else []))
    return table


def effects_table(effects: Mapping[str, Mapping[str, float]]) -> Table:
    """A row a measure; changes beyond two standard errors stand out."""
    table = Table(title="Side effects", title_justify="left")
    for name in ("measure", "without", "with", "change", "n"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for measure, row in effects.items():
        shown = Text(plus_minus(_change(row), row["stderr"]), style="bold yellow" if _stands_out(row) else "")
        table.add_row(measure, number(row["before"], 3), number(row["after"], 3), shown, str(int(row["n"])))
    return table


@page_of(HeadEdit)
def edit_page(edit: HeadEdit) -> str:
    """What an edit does to which heads, its effect on its goal beside random heads, and its side effects."""
    effects = edit.effect.get("side effects", {})
    goal = _goal(edit.effect)
    measured = goal is not None or bool(effects)
    where = "every token" if edit.at == "all" else "the prompt's last token"
    facts = {
        "Heads": len(edit.heads),
        "Strength": f"{edit.strength:g}",
        "Acts at": where,
        "Model": el("code", edit.fingerprint),
    }
    method = edit.method or "Edit"
    lede = f"It changes {count(len(edit.heads), 'head')} at {where}." + (f" Found: {edit.found}." if edit.found else "")
    if not measured:
        lede += " Nothing was measured of it; manyheads edit report EDIT --model MODEL measures its side effects."
    beside = _side_effects(effects, edit.effect.get("blind", {})) if effects else None
    main = el("main", _changed(edit), goal, beside, _rest(edit))
    terms = _TERMS | (_CHANGES if effects else {})
    head = masthead("An edit of heads", method[:1].upper() + method[1:], lede, facts, how_to_read(terms))
    n_heads = edit.heads.shape[1] if edit.heads.shape else 1
    return page(f"Edit: {method}", join(head, main), css=grid_css(n_heads))


@page_of(SideEffects)
def side_effects_page(found: SideEffects) -> str:
    """What an edit changes besides what it is for."""
    effects = found.to_dict()
    changed = sum(map(_stands_out, effects.values()))
    lede = f"{count(len(effects), 'measure')} without the edit and with it; {changed} changed by more than two standard errors."
    terms = {name: _TERMS[name] for name in ("Without, with",)} | _CHANGES
    head = masthead("An edit of heads", "Side effects", lede, None, how_to_read(terms))
    return page("Side effects of an edit", join(head, el("main", _side_effects(effects, found.blind))))


def _changed(edit: HeadEdit) -> Html:
    scales = (1 + edit.strength * (edit.scale.double() - 1)).tolist()
    lengths = (edit.strength * edit.shift.double()).norm(dim=-1).tolist()
    rows = [
        el("tr", el("th", str(head), scope="row"), el("td", number(scale, 3)), el("td", number(length, 3)))
        for head, scale, length in zip(edit.heads, scales, lengths, strict=True)
    ]
    heads = list(edit.heads)
    findings = [
        Finding("z is multiplied", [h for h, scale in zip(heads, scales, strict=True) if scale != 1], hue(0), "×"),
        Finding("a vector is added", [h for h, length in zip(heads, lengths, strict=True) if length], hue(3), "+"),
    ]
    assert edit.heads.shape is not None
    figure = el(
        "figure",
        findings_map(edit.heads.shape, findings, label="Layers by heads: what the edit does to each head"),
        el("figcaption", "×: z is multiplied; +: a vector is added to z; pale heads stay as they are."),
    )
    titles = ("Head", "z is multiplied by", "Length of the vector added")
    order = el("p", f"In this order: {'; '.join(edit.parts)}.", class_="small soft") if edit.parts else None
    table = plain_table(titles, rows, label="What the edit does, head by head")
    return el(
        "section",
        el("h2", "What it does"),
        order,
        el("div", figure, table if len(rows) <= 12 else unfold(f"All {len(rows)} heads", table), class_="pair beside"),
    )


def _goal(effect: Mapping[str, Any]) -> Html | None:
    """Without and with the edit, from what methods keep: shares before and after, or a row a share with its random controls."""
    rows: list[tuple[str, float, float, list[float], int]] = []
    if all(isinstance(effect.get(side), Mapping) for side in _PAIRS):
        before, after = (effect[side] for side in _PAIRS)
        rows += [
            (name, float(before[name]), float(after[name]), [], int(after.get("n", 0)))
            for name in before
            if name in after and name != "n" and isinstance(before[name], int | float)
        ]
    for name, label in _LEARNED.items():
        if isinstance(row := effect.get(name), Mapping):
            others = [float(x) for x in row.get("random") or []]
            rows.append((label, float(row["before"]), float(row["after"]), others, int(row["n"])))
    if not rows:
        return None
    cells = [
        el(
            "tr",
            el("th", name.capitalize(), scope="row"),
            *(el("td", text) for text in (number(before), number(after), number(after - before))),
            el("td", f"{number(float(np.mean(others)))} ({len(others)})" if others else "–"),
            el("td", n or "–"),
        )
        for name, before, after, others, n in rows
    ]
    drawn = [
        Strip(name.capitalize(), after - before, math.nan, [x - before for x in others], _beside(after, others))
        for name, before, after, others, _ in rows
        if others
    ]
    figure = el(
        "figure",
        strips(drawn, axis="change of the share", label="The edit beside random heads", found="the edit"),
        el("figcaption", "How much the edit changes each share (diamond) beside edits of random heads (dots)."),
    )
    titles = ("Share of prompts", "Without", "With", "Change", "Random heads (sets)", "Prompts")
    return el(
        "section",
        el("h2", "What it is for"),
        plain_table(titles, cells, label="The goal, without the edit and with it"),
        figure if drawn else None,
        _gain(effect),
        class_=hue(0),
    )


def _beside(after: float, others: list[float]) -> str:
    reach = sum(x >= after for x in others)
    return f"{reach} of {count(len(others), 'random choice')} {'reaches' if reach == 1 else 'reach'} as much."


def _gain(effect: Mapping[str, Any]) -> Html | None:
    """The gain beside random heads, where a method kept their mean only."""
    if "gain" not in effect or "mean gain of random sets" not in effect:
        return None
    p = effect.get("p")
    text = (
        f"The gain is {number(effect['gain'])}; random heads of the same layers gain "
        f"{number(effect['mean gain of random sets'])} on average"
    )
    return el("p", text, [", ", p_equals(float(p))] if p is not None else None, ".")


def _side_effects(effects: Mapping[str, Mapping[str, float]], blind: Mapping[str, str]) -> Html:
    scale = ColourScale.holding(np.array([_change(row) for row in effects.values()]))
    rows = [
        el(
            "tr",
            el("th", measure.replace("_", " ").capitalize(), scope="row"),
            el("td", number(row["before"], 3)),
            el("td", number(row["after"], 3)),
            el("td", el("b" if _stands_out(row) else "span", plus_minus(_change(row), row["stderr"]))),
            el("td", score_bar(_change(row), row["stderr"], scale), class_="bar-cell"),
            el("td", int(row["n"])),
        )
        for measure, row in effects.items()
    ]
    titles = ("Measure", "Without", "With", "Change ± standard error", "", "Prompts")
    return el(
        "section",
        el("h2", "What else it changes"),
        plain_table(titles, rows, label="Side effects"),
        el("p", "Not measured, since there is nothing to harm: ", _listed_blind(blind), class_="small")
        if blind
        else None,
        class_=hue(0),
    )


def _listed_blind(blind: Mapping[str, str]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}, {reason}" for name, reason in blind.items()) + "."


def _change(row: Mapping[str, float]) -> float:
    return row["after"] - row["before"]


def _stands_out(row: Mapping[str, float]) -> bool:
    """Whether a measure changed by more than two standard errors."""
    return bool(_change(row)) and abs(_change(row)) > 2 * row["stderr"]


def _rest(edit: HeadEdit) -> Html:
    """All that the edit's file keeps, as it stands there."""
    shown = {"found": edit.found, "settings": edit.settings, "measured": edit.effect, "composed of": list(edit.parts)}
    kept = {name: value for name, value in shown.items() if value}
    text = json.dumps(kept, indent=1, ensure_ascii=False, default=str)
    return el("section", unfold("Everything in its file", el("pre", el("code", text), tabindex=0)))
