"""`manyheads edit`: edits of heads as files. `manyheads edit MODEL --goal "prefer context"` leads to the method for a goal."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import (
    MANY,
    Commands,
    Force,
    ModelName,
    Opening,
    Seed,
    keeping,
    listed,
    opens,
    refuse,
    terminal,
)
from manyheads.errors import InputError
from manyheads.inputs import check_integer

if TYPE_CHECKING:
    from manyheads.edit.learn.examples import Portions
    from manyheads.heads import HeadSet
    from manyheads.model.editing.head_edit import HeadEdit
    from manyheads.model.headmodel import HeadModel

# What one wants, and the command that does it. TASK is a task of manyheads.tasks.
GOALS = {
    "prefer context": "prefer MODEL context",
    "prefer memory": "prefer MODEL memory",
    "learn TASK": "learn MODEL --method lofit --task TASK",
    "inject TASK": "learn MODEL --method inject --task TASK",
    "tune TASK": "learn MODEL --method tune --task TASK",
    "repair TASK": "repair MODEL --task TASK",
}


def for_goal(model: str, goal: str) -> list[str]:
    """The command for a goal, as its arguments. `InputError` lists the goals."""
    given = goal.split()
    for pattern, line in GOALS.items():
        wanted = pattern.split()
        asked = "_".join(given[1:]) if wanted[-1] == "TASK" else ""
        if (asked and given[0].lower() == wanted[0]) or [word.lower() for word in given] == wanted:
            words = {"MODEL": model, "TASK": asked}
            return [words.get(word, word) for word in line.split()]
    raise InputError(
        f"there is no goal {goal!r}; the goals are {', '.join(GOALS)}, where TASK is one such as ioi or "
        "counterfactual:form=bare."
    )


class _EditCommands(Commands):
    """`manyheads edit MODEL --goal GOAL ...` is the command for that goal; a first word that names a command runs that."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = self._towards(args)
        return super().parse_args(ctx, args)

    def _towards(self, args: list[str]) -> list[str]:
        at = next((i for i, arg in enumerate(args) if arg == "--goal" or arg.startswith("--goal=")), None)
        if at is None:
            raise InputError(
                f"{args[0]!r} is no command of manyheads edit ({', '.join(self.commands)}); with a model, say what it is "
                f"for: manyheads edit {args[0]} --goal {next(iter(GOALS))!r}. The goals are {', '.join(GOALS)}."
            )
        value = args[at].partition("=")[2] if "=" in args[at] else next(iter(args[at + 1 : at + 2]), "")
        rest = args[:at] + args[at + (1 if "=" in args[at] else 2) :]
        if not rest or rest[0].startswith("-"):
            raise InputError('no model was given; write manyheads edit MODEL --goal "prefer context".')
        return [*for_goal(rest[0], value), *rest[1:]]


edit_app = typer.Typer(
    cls=_EditCommands,
    help=(
        "Edits of heads as files: make, learn, look at, try, compose, bake into a checkpoint, undo. "
        f"`manyheads edit MODEL --goal GOAL ...` leads to the method for a goal: {', '.join(GOALS)}."
    ),
    no_args_is_help=True,
)

EditFolder = Annotated[Path, typer.Argument(help="An edit's folder.")]
Strength = Annotated[
    float, typer.Option(help="0 changes nothing, 1 is as found, beyond is more, below 0 the opposite.")
]


@edit_app.command("scale")
@opens()
def edit_scale(
    model: ModelName,
    heads: Annotated[str, typer.Argument(help="Heads, such as L3H6,L3H7.")],
    factor: Annotated[float, typer.Option(help="What their outputs are multiplied with; 0 takes them away.")],
    out: Annotated[Path, typer.Option(help="Write the edit into this new folder.")],
    measure: Annotated[bool, typer.Option(help="Measure its side effects, and keep them in the file.")] = True,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Make an edit that scales heads."""
    from manyheads.model.editing.edits import Scale
    from manyheads.model.editing.head_edit import HeadEdit

    refuse(out, force=force, inputs=[model], folder=True)
    opened = opening(model)
    edit = HeadEdit.of(
        opened, Scale(listed([heads]) or [], factor), method=f"scaling by {factor:g}", found="given by hand"
    )
    if measure:
        edit = _measured(opened, edit)
    edit.save(out, force=force)
    terminal().print(Text(f"Wrote {out}: {edit}."))


class _Source(StrEnum):
    memory = "memory"
    context = "context"


@edit_app.command("prefer")
@opens()
def edit_prefer(
    model: ModelName,
    source: Annotated[_Source, typer.Argument(help="Which side is to win where a prompt contradicts what is known.")],
    out: Annotated[Path, typer.Option(help="Write the edit into this new folder.")],
    scale: Annotated[
        bool, typer.Option("--scale", help="Scale one head (#8) instead of pruning several (#82).")
    ] = False,
    heads: Annotated[int, typer.Option(min=1, max=MANY, help="How many heads to prune.")] = 5,
    n: Annotated[
        int, typer.Option(min=16, max=MANY, help="Prompts to find heads on, and as many to judge the edit on.")
    ] = 64,
    seed: Seed = 0,
    measure: Annotated[bool, typer.Option(help="Measure its side effects, and keep them in the file.")] = True,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Make an edit that moves answers to memory or to the prompt, found on some facts and judged on others."""
    from manyheads.atlas.facts.prefer import prefer

    refuse(out, force=force, inputs=[model], folder=True)
    opened = opening(model)
    edit = prefer(opened, source.value, scale=scale, heads=heads, n=n, seed=seed)
    edit = _measured(opened, edit) if measure else edit
    edit.save(out, force=force)
    before, after = edit.effect["before"], edit.effect["after"]
    console = terminal()
    console.print(
        Text(f"Answers from {source.value}: {before[source.value]:.2f} before, {after[source.value]:.2f} after.")
    )
    recalled = f"{before['recall']:.2f} before, {after['recall']:.2f} after"
    lost = " It forgets what it should still know." if after["recall"] < before["recall"] - 0.2 else ""
    console.print(Text(f"Facts recalled where no prompt contradicts them: {recalled}.{lost}"))
    console.print(Text(f"Wrote {out}: {edit}. See manyheads edit inspect {out}."))


class _Method(StrEnum):
    lofit = "lofit"
    inject = "inject"
    tune = "tune"


class _Loss(StrEnum):
    answers = "answers"
    preferences = "preferences"


TaskName = Annotated[str | None, typer.Option(help="A task, with settings if any: by_example:relation=french,shots=0.")]
ExamplesFile = Annotated[
    Path | None, typer.Option(help='Your own, a line each: {"prompt": ..., "answer": ..., "foil": ...}.')
]
Swap = Annotated[bool, typer.Option("--swap", help="Take the foils for right and the answers for wrong.")]


@edit_app.command("learn")
@opens()
def edit_learn(
    model: ModelName,
    method: Annotated[
        _Method,
        typer.Option(
            help="lofit: offsets of a few heads (#30). inject: what demonstrations make of heads, mixed in (#57). "
            "tune: the weights of a few heads (#14)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Write the edit (of tune: a checkpoint) into this new folder.")],
    task: TaskName = None,
    examples: ExamplesFile = None,
    swap: Swap = False,
    loss: Annotated[
        _Loss, typer.Option(help="Learn the answers, or to prefer them to the foils (DPO).")
    ] = _Loss.answers,
    beta: Annotated[
        float,
        typer.Option(min=1e-6, max=1e6, help="Of preferences: how far to leave the model as it was; less is further."),
    ] = 0.5,
    heads: Annotated[
        str | None, typer.Option(help="Heads, or how many to choose by learned scalings. Default: 3 % of all.")
    ] = None,
    mlps: Annotated[str | None, typer.Option(help="tune: layers whose MLPs learn too, such as 3,4.")] = None,
    shots: Annotated[int, typer.Option(min=1, max=MANY, help="inject: demonstrations a prompt.")] = 5,
    n: Annotated[
        int, typer.Option(min=10, max=MANY, help="Examples of the task; a fifth of them decides when to stop.")
    ] = 256,
    rate: Annotated[float | None, typer.Option(min=1e-12, max=1e3, help="Learning rate. Default: the paper's.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Passes over the examples. Default: the paper's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=MANY, help="Steps, instead of epochs.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, max=MANY, help="Prompts a step.")] = None,
    patience: Annotated[
        int,
        typer.Option(min=1, max=MANY, help="Stop when held-out prompts have not improved for this many evaluations."),
    ] = 3,
    controls: Annotated[
        int,
        typer.Option(
            min=0, max=MANY, help="How many random choices of heads to compare with (inject: shuffled gates)."
        ),
    ] = 0,
    work: Annotated[
        Path | None,
        typer.Option(help="Keep the run's state here. Default: OUT.work, which goes when the edit is there."),
    ] = None,
    seed: Seed = 0,
    measure: Annotated[bool, typer.Option(help="Measure its side effects, and keep them in the file.")] = True,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Learn an edit from examples, judge it on others. The same call goes on where it was interrupted."""
    from dataclasses import replace

    from manyheads.edit.learn.examples import demonstrations, task_of
    from manyheads.edit.learn.lesson import SETTINGS, learn_edit
    from manyheads.files import working_folder
    from manyheads.pages.edit_tables import learned_table
    from manyheads.progress import progressing
    from manyheads.tasks import TASKS

    refuse(out, force=force, inputs=[model, examples], folder=True)
    portions = _portions(task, examples, n, seed, zero_shot=method == "inject")
    portions = portions.swapped if swap else portions
    layers = _layers(mlps)
    opened = opening(model)
    wishes = {"rate": rate, "epochs": epochs, "steps": steps, "rows": rows}
    given: dict[str, Any] = {name: value for name, value in wishes.items() if value is not None}
    if epochs is not None and steps is None:
        given["steps"] = None
    settings = replace(SETTINGS[method.value], **given, patience=patience, seed=seed)
    about = {
        "data": task or str(examples),
        "examples": [len(part) for part in (portions.train, portions.dev, portions.test)],
        "swapped": swap,
        "loss": loss.value,
        **({"beta": beta} if loss == "preferences" else {}),
    }
    asked = {"heads": heads, "mlps": mlps, "shots": shots if method == "inject" else None, "controls": controls, "n": n}
    request = {"model": opened.fingerprint, "method": method.value, **about, **asked, "learning": vars(settings)}
    request["prompts"] = portions.checksum
    shown: list[str] = []
    if method == "inject":
        shown = demonstrations(None if task is None or swap else task_of(task), portions, shots, seed=seed)
    where = out.with_name(f"{out.name}.work") if work is None else work
    with keeping(where), working_folder(where, request, keep=work is not None) as folder, progressing() as bar:
        found = learn_edit(
            opened,
            portions,
            method.value,
            folder=folder,
            settings=settings,
            beta=beta if loss == "preferences" else None,
            heads=None if heads is None else _count_or_heads(opened, heads),
            mlps=layers,
            demonstrations=shown,
            controls=controls,
            bar=bar.step("steps of training"),
        )
        found = replace(found, effect=about | found.effect)
        if measure:
            found = found.measured(bar.step("side effects", (2 if method == "tune" else 1) * len(TASKS)))
        found.save(out, force=force)
    console = terminal()
    console.print(learned_table(found.effect))
    outcome = found.outcome
    console.print(Text(f"Wrote {out}: {outcome.edit or f'{outcome.what}, an ordinary checkpoint'}."))


@edit_app.command("repair")
@opens()
def edit_repair(
    model: ModelName,
    task: TaskName = None,
    examples: ExamplesFile = None,
    swap: Swap = False,
    heads: Annotated[str, typer.Option(help="Heads, or how many to choose by what turning each alone does.")] = "4",
    n: Annotated[int, typer.Option(min=8, max=MANY, help="Prompts to choose on, and as many to judge on.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write heads and shares into this new JSON file.")] = None,
    seed: Seed = 0,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Turn a few heads to the wrong answers that stand in a prompt (#34): does the right one win then?

    Where those stand differs from prompt to prompt, so that this is shown, and not saved as an edit.
    """
    from dataclasses import asdict

    from manyheads.atlas.circuits.repair import N_RANDOM, marked, repair, turning_heads, wrong_columns
    from manyheads.files import write_atomically
    from manyheads.progress import progressing
    from manyheads.tasks import encode

    refuse(out, force=force, inputs=[model, examples], folder=False)
    portions = _portions(task, examples, 2 * n, seed)
    portions = portions.swapped if swap else portions
    opened = opening(model)
    if opened.tokenizer is None:
        raise InputError("a task needs a tokenizer, and none came with this model.")
    train, test = (encode(marked(part), opened.tokenizer, n) for part in (portions.train, portions.test))
    chosen = _count_or_heads(opened, heads)
    with progressing() as bar:
        if isinstance(chosen, int):
            chosen = turning_heads(opened, train, wrong_columns(train), chosen)
        step = bar.step("prompts judged", (2 + N_RANDOM) * len(test))
        found = repair(opened, test, chosen, wrong_columns(test), seed=seed, bar=step)
    none = float("nan")  # where a small layer has no other set to draw
    random = sum(found.random) / len(found.random) if found.random else none
    table = Table("heads", "right before", "after", "newly wrong", "random heads", f"best of {len(found.random)}", "p")
    shares = (found.before, found.after, found.new_errors, random, max(found.random, default=none), found.p_value)
    table.add_row(str(found.heads), *(f"{share:.2f}" for share in shares))
    console = terminal()
    console.print(table)
    console.print(
        Text(
            "This edit is told where the wrong answers stand in each prompt, so it is no file and cannot be baked; "
            "in Python it is manyheads.model.editing.rows.Rows."
        )
    )
    if out is not None:
        kept = asdict(found) | {"heads": [str(h) for h in found.heads], "fingerprint": opened.fingerprint, "seed": seed}
        write_atomically(out, lambda path: path.write_text(json.dumps(kept, indent=1) + "\n", "utf-8"), force=force)
        console.print(Text(f"Wrote {out}."))


@edit_app.command("inspect")
@opens()
def edit_inspect(
    edit: EditFolder,
    model: Annotated[str | None, typer.Option(help="Measure its side effects on this model.")] = None,
    strength: Strength = 1.0,
    n: Annotated[int, typer.Option(min=2, max=MANY, help="Prompts a task.")] = 64,
    opening: Opening = Opening(),
) -> None:
    """Say what an edit does, how it was found and what was measured of it."""
    from manyheads.model.editing.head_edit import HeadEdit
    from manyheads.pages.edit_tables import edit_facts, edit_table, effects_table

    loaded = HeadEdit.load(edit)
    console = terminal()
    console.print(edit_table(loaded))
    console.print(Text(edit_facts(loaded)))
    if model is not None:
        opened = opening(model)
        loaded = _measured(opened, loaded if strength == 1 else loaded.at_strength(strength * loaded.strength), n)
    if "side effects" in loaded.effect:
        console.print(effects_table(loaded.effect["side effects"]))


@edit_app.command("report")
@opens()
def edit_report(
    edit: EditFolder,
    out: Annotated[Path, typer.Option(help="Write the page, one HTML file, to this new path.")],
    model: Annotated[str | None, typer.Option(help="Measure its side effects on this model.")] = None,
    n: Annotated[int, typer.Option(min=2, help="Prompts a task.")] = 64,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Write a page of an edit: what it does, its effect beside random heads, what else it changes."""
    from manyheads import report
    from manyheads.model.editing.head_edit import HeadEdit

    refuse(out, force=force)
    loaded = HeadEdit.load(edit)
    loaded = loaded if model is None else _measured(opening(model), loaded, n)
    terminal().print(Text(f"Wrote {report.write(loaded, out, force=force)}."))


@edit_app.command("guard")
@opens()
def edit_guard(
    model: ModelName,
    edit: Annotated[
        Path | None, typer.Option(help="Say whether this edit touches a head that carries refusals.")
    ] = None,
    n: Annotated[int, typer.Option(min=2, max=MANY, help="Requests of either kind.")] = 64,
    top: Annotated[int, typer.Option(min=1, max=MANY, help="How many heads to print.")] = 10,
    opening: Opening = Opening(),
) -> None:
    """Say which single heads carry refusals (#113)."""
    from manyheads.edit.refusal_guard import guard
    from manyheads.model.editing.head_edit import HeadEdit
    from manyheads.pages.edit_tables import guard_table

    loaded = None if edit is None else HeadEdit.load(edit)
    opened = opening(model)
    terminal().print(guard_table(guard(opened, loaded, n=n), top))


@edit_app.command("apply")
@opens()
def edit_apply(
    model: ModelName,
    edit: EditFolder,
    prompt: Annotated[str, typer.Argument(help="What the model is to go on from.")],
    strength: Strength = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MANY, help="How many new tokens at most.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Apply an edit that was made for other weights.")] = False,
    opening: Opening = Opening(),
) -> None:
    """Let the model go on from a prompt, without the edit and with it."""
    from manyheads.model.editing.head_edit import HeadEdit

    loaded = HeadEdit.load(edit)
    opened = opening(model)
    loaded.check(opened, force=force)
    length = opened.inputs(prompt)["input_ids"].shape[1]
    plain = opened.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    with opened.editing(*loaded.at_strength(strength * loaded.strength).edits(prompt_length=length)):
        edited = opened.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    table = Table(show_header=False)
    table.add_row("without", Text(plain))
    table.add_row("with", Text(edited))
    terminal().print(table)


@edit_app.command("compose")
def edit_compose(
    edits: Annotated[list[Path], typer.Argument(help="Folders of edits; the first is applied first.")],
    out: Annotated[Path, typer.Option(help="Write the composed edit into this new folder.")],
    force: Force = False,
) -> None:
    """Make one edit of several, applied in the order given."""
    from manyheads.model.editing.head_edit import HeadEdit, compose

    refuse(out, force=force, inputs=edits, folder=True)
    whole = compose([HeadEdit.load(folder) for folder in edits])
    whole.save(out, force=force)
    terminal().print(Text(f"Wrote {out}: {'; then '.join(whole.parts) or whole}."))


@edit_app.command("bake")
@opens(dtype="auto")
def edit_bake(
    model: ModelName,
    edit: EditFolder,
    out: Annotated[Path, typer.Option(help="Write the checkpoint into this new folder.")],
    strength: Strength = 1.0,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Fold an edit into an ordinary checkpoint, which any tool loads and `undo` takes back."""
    from manyheads.edit.checkpoint import save_baked
    from manyheads.model.editing.head_edit import HeadEdit

    refuse(out, force=force, inputs=[model, edit], folder=True)
    loaded = HeadEdit.load(edit)
    opened = opening(model)
    loaded = loaded if strength == 1 else loaded.at_strength(strength * loaded.strength)
    terminal().print(Text(f"Wrote {save_baked(opened, loaded, out, force=force)}."))


@edit_app.command("prune")
@opens(dtype="auto")
def edit_prune(
    model: ModelName,
    heads: Annotated[str, typer.Argument(help="Heads, such as L3H6,L3H7.")],
    out: Annotated[Path, typer.Option(help="Write the checkpoint into this new folder.")],
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Remove heads for good: a smaller checkpoint. Where layers lose different numbers, opening it needs manyheads imported."""
    refuse(out, force=force, inputs=[model], folder=True)
    gone = listed([heads])
    if gone is None:
        raise InputError("no heads were given; name some, such as L3H6,L3H7.")
    opened = opening(model)
    small = opened.prune(gone)
    path = small.save_pretrained(out, force=force)
    counts = [sum(one.layout.heads_in(layer) for layer in one.layout.attention_layers) for one in (opened, small)]
    sizes = [sum(parameter.numel() for parameter in one.plain.parameters()) for one in (opened, small)]
    ours = " Import manyheads before Transformers opens it." if hasattr(small.config, "manyheads") else ""
    terminal().print(
        Text(f"Wrote {path}: {counts[0]} heads are {counts[1]}, {sizes[0]:,} parameters {sizes[1]:,}.{ours}")
    )


@edit_app.command("undo")
def edit_undo(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `manyheads edit bake` wrote.")],
    out: Annotated[Path, typer.Option(help="Write the checkpoint as it was into this new folder.")],
    force: Force = False,
) -> None:
    """Take a baked edit out again: the weights as they were, bit for bit."""
    from manyheads.edit.checkpoint import undo

    refuse(out, force=force, inputs=[checkpoint], folder=True)
    restored = undo(checkpoint)
    terminal().print(Text(f"Wrote {restored.save_pretrained(out, force=force)}, model {restored.fingerprint}."))


def _measured(model: HeadModel, edit: HeadEdit, n: int = 64) -> HeadEdit:
    """The edit with its side effects in its file."""
    from manyheads.edit.effects import with_side_effects
    from manyheads.progress import progressing
    from manyheads.tasks import TASKS

    with progressing() as bar:
        return with_side_effects(model, edit, n=n, bar=bar.step("side effects", len(TASKS)))


def _portions(task: str | None, examples: Path | None, n: int, seed: int, *, zero_shot: bool = False) -> Portions:
    from dataclasses import replace

    from manyheads.edit.learn.examples import of_file, of_task, task_of

    if (task is None) == (examples is None):
        raise InputError("give either --task or --examples.")
    if examples is not None:
        return of_file(examples, seed)
    assert task is not None
    family = task_of(task)
    if zero_shot and hasattr(family, "shots"):
        family = replace(family, shots=0)  # type: ignore[type-var]
    return of_task(family, n, seed)


def _count_or_heads(model: HeadModel, given: str) -> int | HeadSet:
    if given.strip().isdecimal():
        return check_integer(int(given) if len(given) < 10 else given, "the number of heads", 1, MANY)
    return model.head_set(listed([given]) or [])


def _layers(given: str | None) -> list[int]:
    parts = listed([given]) or [] if given else []
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise InputError(f"{given!r} are no layers; give numbers such as 3,4.")
    return [int(part) for part in parts]
