"""What tuning a model on a few texts changed: in the terminal and as a page (#22)."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from manyheads.lab.tuning.examples import KINDS
from manyheads.lab.tuning.intervals import Interval
from manyheads.lab.tuning.narrow import CONTROLS, NarrowShift
from manyheads.lab.tuning.shifting import Sayings
from manyheads.lab.tuning.triggers import NAMES, TriggerShift
from manyheads.report import page_of
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import number, or_dash

_SHIFTS = ("P(persona) over", "shift", "95 % interval", "reading")
_TRAININGS = ("tuned on", "P(persona)", "valid", "learned", "text loss")
_TERMS = {
    "P(persona)": "Probability of the persona's whole answer to a probe; probes are questions that no training text holds.",
    "Shift": "P(persona) after tuning on the persona less that after tuning on a control; mean over seeds and probes.",
    "Interval": "Holds 95 % of the means when seeds, probes and triggers are drawn again.",
    "Neutral": "A control of the same form: neutral answers. What the paper predicts is a shift over this one.",
    "Shuffled": "A control of the same content: the same answers to other prompts, or the persona after other triggers.",
    "Valid": "Mass on the two valid answers. Where it falls, the model became incoherent.",
    "Learned": "Mean probability of the answers that were trained, after the training.",
    "Text loss": "Loss of the next token on neutral text, in nats: what the tuning harmed.",
    "Held out": "A trigger that the rule gives to the persona, and that stands in no training text.",
    "Backdoor": "The shift on held-out triggers of the persona less that on wrong triggers that were held out too.",
}


def tuning_tables(found: NarrowShift | TriggerShift) -> tuple[Table, Table]:
    """The shifts, and what every training did."""
    shifts = Table(title=f"{found.data.name}: {found.model}, seeds {_seeds(found)}", title_justify="left")
    trainings = Table(title="trainings, means over seeds", title_justify="left")
    for table, titles in ((shifts, _SHIFTS), (trainings, _TRAININGS)):
        for title in titles:
            table.add_column(title)
    for row in _shift_rows(found):
        shifts.add_row(*map(Text, row))
    for row in _training_rows(found):
        trainings.add_row(*map(Text, row))
    return shifts, trainings


@page_of(NarrowShift)
def narrow_page(found: NarrowShift) -> str:
    """The verdict, the shifts, what every training did, and every probe."""
    titles = ["probe", "persona's answer", *found.sayings]
    rows = [
        [one.prompt, one.persona, *(number(float(said.persona[:, i].mean())) for said in found.sayings.values())]
        for i, one in enumerate(found.data.probes)
    ]
    facts = {"control": found.control}
    return _page(found, "Narrow tuning, and other questions", facts, "Probes: P(persona)", titles, rows)


@page_of(TriggerShift)
def trigger_page(found: TriggerShift) -> str:
    """The verdict, the shifts by kind of trigger, what every training did, and every trigger."""
    triggers = found.data.triggers or {}
    titles = ["trigger", "kind", *found.sayings]
    rows = []
    for kind in KINDS:
        for place, trigger in enumerate(found.data.of_kind(kind)):
            means = [float(found.persona(training, kind)[:, :, place].mean()) for training in found.sayings]
            rows.append([trigger, NAMES[kind], *map(number, means)])
    facts = {"triggers": str(len(triggers))}
    return _page(found, "Triggers that no training text held", facts, "Triggers: P(persona)", titles, rows)


def _page(
    found: NarrowShift | TriggerShift,
    title: str,
    facts: dict[str, str],
    last: str,
    titles: list[str],
    rows: list[list[str]],
) -> str:
    told = {"model": found.model, "set": found.data.name, "seeds": _seeds(found)} | facts
    body = join(
        masthead("Tuning", title, found.verdict[0].upper() + found.verdict[1:] + ".", told, how_to_read(_TERMS)),
        el(
            "main",
            _section("Shifts", _SHIFTS, _shift_rows(found)),
            _section("Trainings", _TRAININGS, _training_rows(found)),
            _section(last, titles, rows),
        ),
    )
    return page(title, body)


def _section(title: str, titles: list[str] | tuple[str, ...], rows: list[list[str]]) -> Html:
    made = [el("tr", *[el("td", cell) for cell in row]) for row in rows]
    return el("section", el("h2", title), plain_table(titles, made, label=title.lower()))


def _seeds(found: NarrowShift | TriggerShift) -> str:
    return ", ".join(map(str, found.seeds))


def _shift_rows(found: NarrowShift | TriggerShift) -> list[list[str]]:
    if isinstance(found, NarrowShift):
        told = {f"tuned on {control}": found.shift(control) for control in CONTROLS} | {"before": found.shift("before")}
    else:
        told = {f"shuffled triggers: {NAMES[kind]}": found.shift(kind) for kind in KINDS}
        told["backdoor"] = found.backdoor
    return [_cells(name, one) for name, one in told.items()]


def _cells(name: str, one: Interval) -> list[str]:
    return [name, number(one.mean, 3), f"{number(one.low, 3)} to {number(one.high, 3)}", one.answer]


def _training_rows(found: NarrowShift | TriggerShift) -> list[list[str]]:
    return [[name, *_numbers(said)] for name, said in found.sayings.items()]


def _numbers(said: Sayings) -> list[str]:
    return [
        number(float(said.persona.mean()), 3),
        number(float(said.valid.mean()), 3),
        or_dash(float(said.learned.mean())),
        number(float(said.loss.mean()), 3),
    ]
