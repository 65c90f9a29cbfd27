"""`manyheads plan`: what a model and the work with its heads will take, before anything is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import MANY, terminal

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, or a hub id, of which the config is fetched.")],
    dtype: Annotated[
        str, typer.Option(help="Weights as this type: float32, bfloat16, float16 or float64.")
    ] = "float32",
    rows: Annotated[int, typer.Option(min=1, max=MANY, help="Prompts in one pass.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, max=100_000_000, help="Tokens of a prompt.")] = 512,
    memory: Annotated[
        str | None,
        typer.Option(help="Of each device, by comma, such as 80GB,80GB. Default: what is free in this machine."),
    ] = None,
    cpu: Annotated[str | None, typer.Option(help="Of the machine itself, such as 64GB, with --memory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Plan memory for a model by its config alone: weights, readers, replays, cache, training; and where it would lie."""
    from manyheads.errors import InputError
    from manyheads.model.loading.memory import plan_memory

    if cpu is not None and memory is None:
        raise InputError("--cpu goes with --memory; without it this machine's own is taken.")
    devices = None
    if memory is not None:
        devices = {str(i): _bytes(size) for i, size in enumerate(memory.split(","))} | {"cpu": _bytes(cpu or "0")}
    found = plan_memory(model, dtype=dtype, rows=rows, tokens=tokens, devices=devices)
    if as_json:
        print(json.dumps(asdict(found) | {"says": found.says}, indent=2))
        return
    layers, heads, kv_heads, width = found.heads
    title = (
        f"{model}: {found.parameters / 1e9:,.2f} billion weights in {dtype}, {layers} layers of {heads} heads on {kv_heads} for "
        f"keys and values, {width} wide; {rows} rows of {tokens:,} tokens"
    )
    needs = Table("for", "takes", title=title, title_justify="left")
    for name, size in found.needs.items():
        needs.add_row(name, _told(size))
    terminal().print(needs)
    places = Table("where", "has", "weights there")
    for name, size in found.placed.items():
        if name != "disk" or size:
            places.add_row(
                "disk" if name == "disk" else "cpu" if name == "cpu" else f"device {name}",
                _told(found.devices[name]) if name in found.devices else "",
                _told(size),
            )
    terminal().print(places)
    terminal().print(Text(found.says))


def _bytes(given: str) -> int:
    """The bytes that a text such as 80GB or 64GiB says."""
    from manyheads.errors import InputError

    told = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", given.upper())
    if told is None:
        raise InputError(f"{given!r} is no size of a memory; give one such as 80GB or 64GiB.")
    return int(float(told[1]) * _UNITS[told[2] or ""])


def _told(size: int) -> str:
    for unit, one in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= one:
            return f"{size / one:,.1f} {unit}"
    return f"{size} B"
