"""What the commands share: options, the console, and what becomes of an error."""

from __future__ import annotations

import errno
import shlex
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import TyperException

from manyheads.errors import ManyheadsError

ModelName = Annotated[str, typer.Argument(help="A folder or a hub id; ladon is the bundled model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
Dtype = Annotated[str, typer.Option(help="Load weights as this type.")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread weights as Accelerate does, for example auto.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that came with the weights. Only if you trust it.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


class Commands(TyperGroup):
    """Turns what a command raises into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted; nothing was lost")
            raise typer.Exit(130) from None
        except ManyheadsError as error:
            if ctx.params.get("debug"):
                raise
            say(str(error))
            raise typer.Exit(2) from None
        except (typer.Exit, typer.Abort, TyperException):
            raise
        except Exception as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            say(f"this should not have happened: {type(error).__name__}: {' '.join(str(error).split())}")
            again = shlex.join(["manyheads", "--debug", *sys.argv[1:]])
            Console(stderr=True).print(Text(f"See where with: {again}"), soft_wrap=True)
            raise typer.Exit(1) from None


def say(sentence: str) -> None:
    """Print one sentence of regret to stderr."""
    Console(stderr=True).print(Text(sentence, style="red"), soft_wrap=True)


def listed(values: list[str] | None) -> list[str] | None:
    """The parts of comma-separated options; None if there are none."""
    return [part.strip() for given in values or [] for part in given.split(",") if part.strip()] or None


def terminal() -> Console:
    """Where results are printed: 120 wide where nobody watches."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
