"""An edit in the terminal: what it does, and what else it changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from manyheads.model.editing.head_edit import HeadEdit
from manyheads.report.numbers import number, plus_minus


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
    shown = {"right": "answered right", "preferred": "answer likelier than foil"}
    random = any(effect[name]["random"] for name in shown if name in effect)
    table = Table(title="On held-out prompts", title_justify="left")
    for name in ("share", "without", "with", *(["random heads"] if random else []), "n"):
        table.add_column(name, justify="left" if name == "share" else "right")
    for name, label in shown.items():
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
        change, stderr = row["after"] - row["before"], row["stderr"]
        style = "bold yellow" if abs(change) > 2 * stderr and change else ""
        shown = Text(plus_minus(change, stderr), style=style)
        table.add_row(measure, number(row["before"], 3), number(row["after"], 3), shown, str(int(row["n"])))
    return table
