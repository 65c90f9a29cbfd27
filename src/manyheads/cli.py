"""The command line: `manyheads <command>`. A command is a function below; what is heavy it imports when it is called.

Exit codes: 0 done; 2 the input was wrong, and one sentence says how; 130 interrupted; 1 an error of ours.
"""

from __future__ import annotations

import errno
import json
import shlex
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import TyperException

from manyheads import __version__
from manyheads.catalogue import STATES, Room, State
from manyheads.errors import InputError, ManyheadsError

_STATE_STYLE = {"ready": "green", "partial": "yellow", "absent": "dim"}


class _Commands(TyperGroup):
    """Turns what a command raises into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted; nothing was lost")
            raise typer.Exit(130) from None
        except ManyheadsError as error:
            if ctx.params.get("debug"):
                raise
            _say(str(error))
            raise typer.Exit(2) from None
        except (typer.Exit, typer.Abort, TyperException):
            raise
        except Exception as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            _say(f"this should not have happened: {type(error).__name__}: {' '.join(str(error).split())}")
            again = shlex.join(["manyheads", "--debug", *sys.argv[1:]])
            Console(stderr=True).print(Text(f"See where with: {again}"), soft_wrap=True)
            raise typer.Exit(1) from None


def _say(sentence: str) -> None:
    Console(stderr=True).print(Text(sentence, style="red"), soft_wrap=True)


app = typer.Typer(
    name="manyheads",
    cls=_Commands,
    help="The workbench for the heads of transformer models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def methods(
    query: Annotated[
        list[str] | None, typer.Argument(help="What you need, in your own words. Nothing lists all.")
    ] = None,
    room: Annotated[Room | None, typer.Option(help="Only this room.", case_sensitive=False)] = None,
    state: Annotated[State | None, typer.Option(help="Only methods in this state.", case_sensitive=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Search the catalogue of methods: number, state, room, and what each is for."""
    from manyheads import catalogue

    found = [
        m
        for m in catalogue.search(" ".join(query or []))
        if (room is None or m.room == room) and (state is None or m.state == state)
    ]
    if as_json:
        print(json.dumps([asdict(m) for m in found], indent=2, ensure_ascii=False))
        return
    if not found:
        _say("no method of the catalogue matches; try fewer or other words, or `manyheads methods` for the whole list")
        return
    counts = ", ".join(f"{sum(m.state == s for m in found)} {s}" for s in STATES)
    table = Table(caption=f"{len(found)} methods: {counts}", caption_justify="left")
    table.add_column("#", justify="right")
    for title in ("method", "room", "state", "what it does"):
        table.add_column(title, overflow="fold")
    for m in found:
        table.add_row(str(m.number), Text(m.name), m.room, Text(m.state, style=_STATE_STYLE[m.state]), Text(m.what))
    Console().print(table)


class _AtlasCommands(_Commands):
    """`manyheads atlas MODEL ...` is `manyheads atlas survey MODEL ...`; a first word that names a command runs that."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["survey", *args]
        return super().parse_args(ctx, args)


atlas_app = typer.Typer(
    cls=_AtlasCommands,
    help="What does every attention head do? `manyheads atlas [MODEL]` surveys a model; more below.",
    no_args_is_help=False,
)
app.add_typer(atlas_app, name="atlas")

Behaviours = Annotated[
    list[str] | None, typer.Option("--behaviours", "-b", help="Only these, separated by commas. Default: all.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
Dtype = Annotated[str, typer.Option(help="Load weights as this type.")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread weights as Accelerate does, for example auto.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that came with the weights. Only if you trust it.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@atlas_app.command()
def survey(
    model: Annotated[str | None, typer.Argument(help="A folder or a hub id. Nothing: the bundled model.")] = None,
    behaviours: Behaviours = None,
    out: Annotated[Path | None, typer.Option(help="Write scores, checks and report.html into this new folder.")] = None,
    force: Force = False,
    checks: Annotated[bool, typer.Option(help="Check each claim by ablation against random heads.")] = True,
    n: Annotated[int, typer.Option(min=2, help="Rows of repeated tokens, and as many texts or prompts.")] = 32,
    n_random: Annotated[int, typer.Option(min=20, help="Random head sets a check.")] = 20,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Score so often on fresh inputs, and say how well they agree.")] = 1,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Find out what every attention head does, and check it."""
    from manyheads.files import refuse_existing

    if out is not None:
        refuse_existing(out, force=force)
    from manyheads.atlas.survey import survey as survey_model
    from manyheads.atlas.table import summary_table
    from manyheads.model.opening import open_model

    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    names = _listed(behaviours)
    result = survey_model(opened, names, checks=checks, n=n, n_random=n_random, seed=seed, seeds=seeds)
    console = _console()
    console.print(summary_table(result))
    if out is None:
        console.print(Text("Add --out FOLDER to keep the scores and the report.", style="dim"))
        return
    result.card["command"] = shlex.join(["manyheads", *sys.argv[1:]])
    result.save(out, report=True, force=force)
    console.print(Text(f"Wrote {out / 'report.html'} and the scores beside it ({result.card['seconds']} s)."))


@atlas_app.command()
def roles(
    atlas: Annotated[Path, typer.Argument(help="A folder that `manyheads atlas --out` wrote.")],
) -> None:
    """Print what each head was found to do, a line a head."""
    from manyheads.atlas.result import Atlas
    from manyheads.atlas.table import roles_table

    _console().print(roles_table(Atlas.load(atlas)))


@atlas_app.command()
def diff(
    a: Annotated[str, typer.Argument(help="An atlas folder, or a model to survey.")],
    b: Annotated[str, typer.Argument(help="The other: an atlas folder, or a model.")],
    behaviours: Behaviours = None,
    out: Annotated[Path | None, typer.Option(help="Write the tables and diff.html into this new folder.")] = None,
    force: Force = False,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Compare the heads of two models or checkpoints: scores, roles and causal effects side by side."""
    from manyheads.files import refuse_existing

    if out is not None:
        refuse_existing(out, force=force)
    from manyheads.atlas.diff import diff as compare
    from manyheads.atlas.result import Atlas
    from manyheads.atlas.survey import survey as survey_model
    from manyheads.atlas.table import diff_table
    from manyheads.model.opening import open_model

    def read(name: str) -> Atlas:
        if (Path(name) / "atlas.json").is_file():
            return Atlas.load(name)
        opened = open_model(name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        return survey_model(opened, _listed(behaviours), seed=seed)

    result = compare(read(a), read(b))
    console = _console()
    console.print(diff_table(result))
    if out is not None:
        result.save(out, force=force)
        console.print(Text(f"Wrote {out / 'diff.html'} and the tables beside it."))


@atlas_app.command()
def influence(
    files: Annotated[list[Path], typer.Argument(help="Text (a document a line), JSONL or Parquet files.")],
    out: Annotated[Path, typer.Option(help="Write the scores to this new Parquet file.")],
    model: Annotated[str | None, typer.Option(help="A folder or a hub id. Nothing: the bundled model.")] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads to mask, such as L3H6,L3H7. Default: top 5 % by retrieval.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Where JSONL and Parquet keep the text.")] = "text",
    domain_column: Annotated[str | None, typer.Option(help="Rank within the domains that this column names.")] = None,
    keep: Annotated[float, typer.Option(help="Share of each domain to select.")] = 0.2,
    max_tokens: Annotated[int | None, typer.Option(help="Read so many tokens of each document.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 4096,
    seed: Seed = 0,
    force: Force = False,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Score documents by how much harder they get without the retrieval heads (#17). Goes on where it was interrupted."""
    from manyheads.atlas.influence_files import influence_files
    from manyheads.model.opening import open_model
    from manyheads.progress import progressing

    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    chosen = None if heads is None else _listed([heads])
    with progressing() as bar:
        written = influence_files(
            opened,
            files,
            out,
            heads=chosen,
            text_column=text_column,
            domain_column=domain_column,
            keep=keep,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
            force=force,
            progress=bar.step("documents", None),
        )
    _console().print(Text(f"Wrote {written}."))


def _listed(values: list[str] | None) -> list[str] | None:
    """The parts of comma-separated options; None if there are none."""
    return [part.strip() for given in values or [] for part in given.split(",") if part.strip()] or None


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


class _TraceMethod(StrEnum):
    direct = "direct"
    ablation = "ablation"
    patching = "patching"
    attribution = "attribution"
    decomposition = "decomposition"
    edges = "edges"


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="A folder or a hub id; ladon is the bundled model.")],
    prompt: Annotated[str, typer.Argument(help="The text that the model goes on from.")],
    answer: Annotated[str | None, typer.Option(help="The answer to explain. Default: the model's own.")] = None,
    against: Annotated[str | None, typer.Option(help="What to compare it with. Default: the next best.")] = None,
    method: Annotated[_TraceMethod, typer.Option(help="How components are scored.")] = _TraceMethod.direct,
    corrupted: Annotated[
        str | None, typer.Option(help="A prompt of as many tokens with another answer, to patch from.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Print so many components.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Write trace.html and circuit.json into this new folder.")] = None,
    force: Force = False,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say which heads and MLPs made one answer."""
    from manyheads.files import refuse_existing

    if out is not None:
        refuse_existing(out, force=force)
    from manyheads.model.opening import open_model
    from manyheads.trace.explain import explain
    from manyheads.trace.table import explanation_table

    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    found = explain(opened, prompt, answer, against, method=method.value, corrupted=corrupted)
    console = _console()
    console.print(explanation_table(found, top))
    if out is None:
        console.print(Text("Add --out FOLDER to keep the scores and the picture.", style="dim"))
        return
    found.save(out, force=force)
    console.print(Text(f"Wrote {out / 'trace.html'} and the circuit beside it."))


edit_app = typer.Typer(
    cls=_Commands,
    help="Edits of heads as files: make, look at, try, compose, bake into a checkpoint, undo.",
    no_args_is_help=True,
)
app.add_typer(edit_app, name="edit")

ModelName = Annotated[str, typer.Argument(help="A folder or a hub id; ladon is the bundled model.")]
EditFolder = Annotated[Path, typer.Argument(help="An edit's folder.")]
Strength = Annotated[
    float, typer.Option(help="0 changes nothing, 1 is as found, beyond is more, below 0 the opposite.")
]


@edit_app.command("scale")
def edit_scale(
    model: ModelName,
    heads: Annotated[str, typer.Argument(help="Heads, such as L3H6,L3H7.")],
    factor: Annotated[float, typer.Option(help="What their outputs are multiplied with; 0 takes them away.")],
    out: Annotated[Path, typer.Option(help="Write the edit into this new folder.")],
    measure: Annotated[bool, typer.Option(help="Measure its side effects, and keep them in the file.")] = True,
    force: Force = False,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Make an edit that scales heads."""
    from manyheads.edit.head_edit import HeadEdit
    from manyheads.files import refuse_existing
    from manyheads.model.editing import Scale
    from manyheads.model.opening import open_model

    refuse_existing(out, force=force)
    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    edit = HeadEdit.of(
        opened, Scale(_listed([heads]) or [], factor), method=f"scaling by {factor:g}", found="given by hand"
    )
    if measure:
        edit = _measured(opened, edit)
    edit.save(out, force=force)
    _console().print(Text(f"Wrote {out}: {edit}."))


class _Source(StrEnum):
    memory = "memory"
    context = "context"


@edit_app.command("prefer")
def edit_prefer(
    model: ModelName,
    source: Annotated[_Source, typer.Argument(help="Which side is to win where a prompt contradicts what is known.")],
    out: Annotated[Path, typer.Option(help="Write the edit into this new folder.")],
    scale: Annotated[
        bool, typer.Option("--scale", help="Scale one head (#8) instead of pruning several (#82).")
    ] = False,
    heads: Annotated[int, typer.Option(min=1, help="Prune so many heads.")] = 5,
    n: Annotated[int, typer.Option(min=16, help="Prompts to find heads on, and as many to judge the edit on.")] = 64,
    seed: Seed = 0,
    measure: Annotated[bool, typer.Option(help="Measure its side effects, and keep them in the file.")] = True,
    force: Force = False,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Make an edit that moves answers to memory or to the prompt, found on some facts and judged on others."""
    from dataclasses import asdict

    from manyheads.atlas.conflict_paths import conflict_paths, conflict_prompts, pruning
    from manyheads.atlas.memory_context import conflicts, find_strength, memory_context
    from manyheads.edit.head_edit import HeadEdit
    from manyheads.files import refuse_existing
    from manyheads.model.editing import Scale
    from manyheads.model.opening import open_model

    refuse_existing(out, force=force)
    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    other = "context" if source == "memory" else "memory"
    if scale:
        found = memory_context(opened, conflicts(opened, n=n, seed=seed, split="train"), seed=seed)
        extremes = found["memory"].top(1) | found["context"].top(1)
        strength = find_strength(
            opened, conflicts(opened, n=n, seed=seed), extremes, source.value, share=0.5, seed=seed
        )
        change: Any = strength.edit
        method, how = "value scaling (#8)", f"extreme head by direct attribution, factor {strength.factor:g} by grid"
        effect: dict[str, Any] = {"before": asdict(strength.before), "after": asdict(strength.after)}
    else:
        paths = conflict_paths(opened, conflict_prompts(opened, n=n, seed=seed, split="train"), seed=seed)
        result = pruning(opened, paths[f"{other}_path"].top(heads), conflicts(opened, n=n, seed=seed), seed=seed)
        change = Scale(result.heads, 0.0)
        method, how = "pruning (#82)", f"top {heads} {other} heads by path patching, stable over two forms"
        effect = {
            "before": asdict(result.before),
            "after": asdict(result.after),
            "gain": result.gain(source.value),
            "mean gain of random sets": float(result.random_gains(source.value).mean()),
            "p": result.p_value(source.value),
        }
    edit = HeadEdit.of(opened, change, method=method, found=how, settings={"n": n, "seed": seed}, effect=effect)
    edit = _measured(opened, edit) if measure else edit
    edit.save(out, force=force)
    before, after = effect["before"], effect["after"]
    console = _console()
    console.print(
        Text(f"Answers from {source.value}: {before[source.value]:.2f} before, {after[source.value]:.2f} after.")
    )
    console.print(Text(f"Wrote {out}: {edit}. See manyheads edit inspect {out}."))


@edit_app.command("inspect")
def edit_inspect(
    edit: EditFolder,
    model: Annotated[str | None, typer.Option(help="Measure its side effects on this model.")] = None,
    strength: Strength = 1.0,
    n: Annotated[int, typer.Option(min=2, help="Prompts a task.")] = 64,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say what an edit does, how it was found and what was measured of it."""
    from manyheads.edit.head_edit import HeadEdit
    from manyheads.edit.table import edit_facts, edit_table, effects_table
    from manyheads.model.opening import open_model

    loaded = HeadEdit.load(edit)
    console = _console()
    console.print(edit_table(loaded))
    console.print(Text(edit_facts(loaded)))
    if model is not None:
        opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        loaded = _measured(opened, loaded if strength == 1 else loaded.at_strength(strength * loaded.strength), n)
    if "side effects" in loaded.effect:
        console.print(effects_table(loaded.effect["side effects"]))


@edit_app.command("guard")
def edit_guard(
    model: ModelName,
    edit: Annotated[
        Path | None, typer.Option(help="Say whether this edit touches a head that carries refusals.")
    ] = None,
    n: Annotated[int, typer.Option(min=2, help="Requests of either kind.")] = 64,
    top: Annotated[int, typer.Option(min=1, help="Print so many heads.")] = 10,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Say which single heads carry refusals (#113)."""
    from manyheads.edit.guard import guard
    from manyheads.edit.head_edit import HeadEdit
    from manyheads.edit.table import guard_table
    from manyheads.model.opening import open_model

    loaded = None if edit is None else HeadEdit.load(edit)
    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    _console().print(guard_table(guard(opened, loaded, n=n), top))


@edit_app.command("apply")
def edit_apply(
    model: ModelName,
    edit: EditFolder,
    prompt: Annotated[str, typer.Argument(help="What the model is to go on from.")],
    strength: Strength = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Say so many tokens at most.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Apply an edit that was made for other weights.")] = False,
    dtype: Dtype = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Let the model go on from a prompt, without the edit and with it."""
    from manyheads.edit.head_edit import HeadEdit
    from manyheads.model.opening import open_model

    loaded = HeadEdit.load(edit)
    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    loaded.check(opened, force=force)
    length = opened.inputs(prompt)["input_ids"].shape[1]
    said = opened.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    with opened.editing(*loaded.at_strength(strength * loaded.strength).edits(prompt_length=length)):
        edited = opened.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    table = Table(show_header=False)
    table.add_row("without", Text(said))
    table.add_row("with", Text(edited))
    _console().print(table)


@edit_app.command("compose")
def edit_compose(
    edits: Annotated[list[Path], typer.Argument(help="Folders of edits; the first is applied first.")],
    out: Annotated[Path, typer.Option(help="Write the composed edit into this new folder.")],
    force: Force = False,
) -> None:
    """Make one edit of several, applied in the order given."""
    from manyheads.edit.head_edit import HeadEdit, compose

    whole = compose([HeadEdit.load(folder) for folder in edits])
    whole.save(out, force=force)
    _console().print(Text(f"Wrote {out}: {'; then '.join(whole.parts) or whole}."))


@edit_app.command("bake")
def edit_bake(
    model: ModelName,
    edit: EditFolder,
    out: Annotated[Path, typer.Option(help="Write the checkpoint into this new folder.")],
    strength: Strength = 1.0,
    force: Force = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fold an edit into an ordinary checkpoint, which any tool loads and `undo` takes back."""
    from manyheads.edit.checkpoint import save_baked
    from manyheads.edit.head_edit import HeadEdit
    from manyheads.files import refuse_existing
    from manyheads.model.opening import open_model

    refuse_existing(out, force=force)
    loaded = HeadEdit.load(edit)
    opened = open_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    loaded = loaded if strength == 1 else loaded.at_strength(strength * loaded.strength)
    _console().print(Text(f"Wrote {save_baked(opened, loaded, out, force=force)}."))


@edit_app.command("undo")
def edit_undo(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `manyheads edit bake` wrote.")],
    out: Annotated[Path, typer.Option(help="Write the checkpoint as it was into this new folder.")],
    force: Force = False,
) -> None:
    """Take a baked edit out again: the weights as they were, bit for bit."""
    from manyheads.edit.checkpoint import undo
    from manyheads.files import refuse_existing

    refuse_existing(out, force=force)
    restored = undo(checkpoint)
    _console().print(Text(f"Wrote {restored.save_pretrained(out, force=force)}, model {restored.fingerprint}."))


def _measured(model: Any, edit: Any, n: int = 64) -> Any:
    """The edit with its side effects in its file."""
    from dataclasses import replace

    from manyheads.edit.side_effects import side_effects
    from manyheads.progress import progressing
    from manyheads.tasks import TASKS

    with progressing() as bar:
        found = side_effects(model, edit, n=n, progress=bar.step("side effects", len(TASKS)))
    return replace(edit, effect={**edit.effect, "side effects": found.to_dict()})


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark: the name of a file in benchmarks/.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to it.")] = None,
) -> None:
    """Run a benchmark of the source checkout: our figures beside a named baseline's, in one run."""
    import runpy

    folder = Path(__file__).parents[2] / "benchmarks"
    known = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if name not in known:
        raise InputError(
            f"there is no benchmark {name!r}; choose from {', '.join(known)}."
            if known
            else "benchmarks come with the source checkout; install it with pip install -e '.[bench]'."
        )
    sys.argv = [name, *(arguments or [])]
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")


@app.command()
def version() -> None:
    """Print the version."""
    print(f"manyheads {__version__}")


if __name__ == "__main__":
    main()
