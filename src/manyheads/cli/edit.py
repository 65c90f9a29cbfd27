"""`manyheads edit`: edits of heads as files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Commands, DeviceMap, Dtype, Force, ModelName, RemoteCode, Seed, listed, terminal

edit_app = typer.Typer(
    cls=Commands,
    help="Edits of heads as files: make, look at, try, compose, bake into a checkpoint, undo.",
    no_args_is_help=True,
)

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
    console = terminal()
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
    console = terminal()
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
    terminal().print(guard_table(guard(opened, loaded, n=n), top))


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
    terminal().print(table)


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
    terminal().print(Text(f"Wrote {out}: {'; then '.join(whole.parts) or whole}."))


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
    terminal().print(Text(f"Wrote {save_baked(opened, loaded, out, force=force)}."))


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
    terminal().print(Text(f"Wrote {restored.save_pretrained(out, force=force)}, model {restored.fingerprint}."))


def _measured(model: Any, edit: Any, n: int = 64) -> Any:
    """The edit with its side effects in its file."""
    from dataclasses import replace

    from manyheads.edit.side_effects import side_effects
    from manyheads.progress import progressing
    from manyheads.tasks import TASKS

    with progressing() as bar:
        found = side_effects(model, edit, n=n, progress=bar.step("side effects", len(TASKS)))
    return replace(edit, effect={**edit.effect, "side effects": found.to_dict()})
