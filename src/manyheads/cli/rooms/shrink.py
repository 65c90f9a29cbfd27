"""`manyheads shrink`: the same model for less, and what it cost."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from manyheads.cli.common import Force, ModelName, Opening, Seed, keeping, opens, refuse, terminal
from manyheads.errors import InputError

if TYPE_CHECKING:
    from manyheads.model.headmodel import HeadModel
    from manyheads.shrink.cache.press import Press
    from manyheads.shrink.shrinking import ShrinkWay


@opens()
def shrink(
    model: ModelName = "ladon",
    method: Annotated[
        str, typer.Option(help="One or several, such as duo,snapkv; `--method list` lists them.")
    ] = "duo",
    ratio: Annotated[str, typer.Option(help="The share that goes, or several, such as 0.25,0.5,0.75.")] = "0.5",
    out: Annotated[Path | None, typer.Option(help="Write the page, the figures and each method's result here.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the contexts on which memory and time are measured.")
    ] = "512,2048",
    texts: Annotated[
        Path | None, typer.Option(help="A file of prose for the loss. Default: the bundled texts.")
    ] = None,
    recover: Annotated[int, typer.Option(min=0, help="Tokens on which smaller weights are tuned afterwards.")] = 0,
    teach: Annotated[
        bool,
        typer.Option(
            "--teach/--no-teach",
            help="Tune to predict what the model as it is predicts, or the texts' own next tokens.",
        ),
    ] = True,
    rounds: Annotated[int, typer.Option(min=3, max=1000, help="Rounds in which speed is compared.")] = 15,
    seed: Seed = 0,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Make a model smaller by one or several methods, and measure what each saves and loses beside the model as it is.

    In --out: report.html, costs.json and a folder a method and ratio: a checkpoint for methods on weights, press.json for those
    on the cache (`manyheads.shrink.load_press` reads it).
    """
    if method == "list":
        _list()
        return
    refuse(out, force=force, inputs=[model, texts], folder=True)
    sizes = [int(number) for number in _numbers(lengths, "--lengths", whole=True)]
    ratios = _numbers(ratio, "--ratio")
    from manyheads.files import write_folder_atomically
    from manyheads.inputs import read_text
    from manyheads.pages.shrink import costs_table
    from manyheads.progress import progressing
    from manyheads.shrink.measuring import measure
    from manyheads.shrink.shrinking import shrink_way

    chosen = [shrink_way(name.strip()) for name in method.split(",")]
    for one in chosen:
        for share in ratios:
            one(share)  # before anything is opened: a ratio that cannot be
    prose = None if texts is None else [read_text(texts, most=1 << 26)]
    opened = opening(model)
    with progressing() as bar, keeping(None):
        tuning = {"tokens": recover, "teacher": opened if teach else None, "seed": seed}
        made = {(one.name, share): _made(one, share, opened, tuning, bar) for one in chosen for share in ratios}
        found = measure(opened, made, lengths=sizes, texts=prose, rounds=rounds, seed=seed, bar=bar)
    terminal().print(costs_table(found))
    if out is None:
        return

    def write(folder: Path) -> None:
        found.report(folder / "report.html")
        (folder / "costs.json").write_text(json.dumps(found.to_json(), indent=1), "utf-8")
        for (name, share), one in made.items():
            _write(one, folder / f"{name}-{share:g}", name, share)

    terminal().print(Text(f"Wrote {write_folder_atomically(out, write, force=force)}."))


def _list() -> None:
    from manyheads.shrink.shrinking import shrink_ways

    for one in shrink_ways().values():
        terminal().print(Text(f"{one.name:12} {one.kind:8} {one.what}"))


def _numbers(given: str, option: str, *, whole: bool = False) -> list[float]:
    """Numbers between commas. `InputError` for anything else."""
    try:
        return [int(part) if whole else float(part) for part in given.split(",")]
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise InputError(
            f"{option} is {given!r}; give {kind} with commas between, such as {'512,2048' if whole else '0.25,0.5'}."
        ) from None


def _made(one: ShrinkWay, ratio: float, model: HeadModel, tuning: dict[str, Any], bar: Any) -> Press | HeadModel:
    method = one(ratio)
    if one.kind == "cache":
        press: Press = method.settled(model)
        return press
    trains = "bar" in signature(method.convert).parameters
    shown = {"bar": bar.step(f"{one.name} {ratio:g}")} if trains else {}
    smaller: HeadModel = method.convert(model, **shown)
    if tuning["tokens"]:
        from manyheads.shrink.recovery import recover

        smaller, _ = recover(smaller, bar=bar.step(f"recovery of {one.name} {ratio:g}"), **tuning)
    return smaller


def _write(one: Press | HeadModel, folder: Path, name: str, ratio: float) -> None:
    from manyheads.model.headmodel import HeadModel
    from manyheads.shrink.saving import save_press

    if isinstance(one, HeadModel):
        one.save_pretrained(folder)
    else:
        save_press(one, folder, name, ratio)
