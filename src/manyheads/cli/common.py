"""What the commands share: options, the console, and what becomes of an error."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import TyperException

from manyheads.errors import ManyheadsError

if TYPE_CHECKING:
    from manyheads.model.headmodel import HeadModel

ModelName = Annotated[str, typer.Argument(help="A folder or a hub id; ladon is the bundled model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
MANY = 100_000  # the most examples, heads, steps ... that an option may ask for


@dataclass(frozen=True)
class Opening:
    """How a command opens models: what the options that `opens` gives it say."""

    dtype: str = "float32"
    device_map: str | None = None
    trust_remote_code: bool = False
    part: str | None = None

    def __call__(self, model: str | None) -> HeadModel:
        """The model at a folder or hub id; without one, the bundled model."""
        from manyheads.model.opening import open_model

        return open_model(
            model,
            dtype=self.dtype,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
            part=self.part,  # type: ignore[arg-type]
        )


def opens(dtype: str = "float32") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options --dtype, --device-map, --trust-remote-code and --part; `opening` is what they say."""
    options = {
        "dtype": (Annotated[str, typer.Option(help="Load weights as this type.")], dtype),
        "device_map": (
            Annotated[str | None, typer.Option(help="Spread weights as Accelerate does, for example auto.")],
            None,
        ),
        "trust_remote_code": (
            Annotated[
                bool,
                typer.Option("--trust-remote-code", help="Run code that came with the weights. Only if you trust it."),
            ],
            False,
        ),
        "part": (
            Annotated[
                str | None,
                typer.Option(help="Of a model of several parts: text, vision, audio, encoder, decoder or cross."),
            ],
            None,
        ),
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            opening = Opening(**{name: given.pop(name) for name in options})
            command(**given, opening=opening)

        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "opening"]
        more = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
            for name, (kind, default) in options.items()
        ]
        run.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *more]}
        return run

    return decorate


def refuse(
    out: Path | None, *, force: bool, inputs: Iterable[str | Path | None] = (), folder: bool | None = None
) -> None:
    """Before the work begins: `InputError` if nothing can be written at `out` (see `files.check_output`)."""
    from manyheads.files import check_output

    if out is not None:
        check_output(out, force=force, inputs=[one for one in inputs if one is not None], folder=folder)


@contextlib.contextmanager
def keeping(folder: Path | None) -> Iterator[None]:
    """Ctrl-C says that what is done so far is kept in `folder`, if it is."""
    try:
        yield
    except KeyboardInterrupt:
        kept = folder is not None and folder.exists()
        said = f"what was done is kept in {folder}, and the same command goes on from there" if kept else ""
        raise KeyboardInterrupt(said) from None


def _check_given(name: str, value: Any) -> None:
    """`InputError` for a value of the command line that no command can use: NaN, infinity, what is no text or path."""
    from manyheads.inputs import check_number, check_text

    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, float):
            check_number(one, f"--{name}")
        elif isinstance(one, str | Path):
            check_text(str(one), name)


def _checked(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that looks at all it is given before it begins."""

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, value in given.items():
            _check_given(name.replace("_", "-"), value)
        return command(**given)

    return run


class Commands(TyperGroup):
    """Checks what commands are given, and turns what they raise into one sentence and an exit code."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for command in self.commands.values():
            if not isinstance(command, TyperGroup) and command.callback is not None:
                command.callback = _checked(command.callback)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interruption:
            say(f"interrupted; {interruption}" if str(interruption) else "interrupted; unfinished work was not kept")
            raise typer.Exit(130) from None
        except ManyheadsError as error:
            if ctx.params.get("debug"):
                raise
            say(str(error))
            raise typer.Exit(2) from None
        except (typer.Exit, typer.Abort, TyperException):
            raise
        except OSError as error:
            if ctx.params.get("debug") or error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            say(f"the disk or the system refuses: {where}{error.strerror or error}.")
            raise typer.Exit(2) from None
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            say(sentence(error))
            again = shlex.join(["manyheads", "--debug", *sys.argv[1:]])
            Console(stderr=True).print(Text(f"See where with: {again}"), soft_wrap=True)
            raise typer.Exit(1) from None


class DefaultCommands(Commands):
    """`manyheads ROOM X ...` is `manyheads ROOM DEFAULT X ...`; a first word that names a command runs that."""

    DEFAULT = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [self.DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Also the options of the default command, since that is the one that runs where none is named."""
        super().format_help(ctx, formatter)
        default = self.commands[self.DEFAULT]
        default.format_help(default.context_class(default, parent=ctx, info_name=self.DEFAULT), formatter)


def sentence(error: Exception) -> str:
    """What went wrong, in one sentence: ours, or the system's with its kind."""
    if isinstance(error, ManyheadsError):
        return str(error)
    return f"this should not have happened: {type(error).__name__}: {' '.join(str(error).split())}"


def say(sentence: str) -> None:
    """Print one sentence of regret to stderr."""
    Console(stderr=True).print(Text(sentence, style="red"), soft_wrap=True)


def announce(sentence: str) -> None:
    """Print to stderr what is about to happen."""
    Console(stderr=True).print(Text(sentence, style="dim"), soft_wrap=True)


def listed(values: list[str] | None) -> list[str] | None:
    """The parts of comma-separated options; None if there are none."""
    return [part.strip() for given in values or [] for part in given.split(",") if part.strip()] or None


def terminal() -> Console:
    """Where results are printed: 120 wide where nobody watches."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
