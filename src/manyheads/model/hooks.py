"""Hooks: seeing and changing what a module is given and what it returns, for the length of a `with` block.

A block's residual stream comes to it by position or by keyword, and comes out alone or first in a tuple, as each architecture
has it. The functions here know that, so that nobody else has to:

    hooked(module, before, after)    any hooks; gone after the block, also after an exception
    entering(module, change)         change the hidden states that the module is given
    leaving(module, change)          change the first tensor that the module returns
    caught(modules, ...)             a list of what modules returned, or were given
    stoppable()                      a forward pass that ends as soon as somebody has seen enough
    frozen(module, but)              parameters without gradients
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from manyheads.errors import InputError

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""`(module, args, kwargs)` -> new `(args, kwargs)`, or None to leave them."""
After = Callable[[nn.Module, Any, Any], Any]
"""`(module, args, output)` -> a new output, or None to leave it."""
Change = Callable[[Tensor], Tensor | None]
"""A tensor -> another in its place, or None to leave it."""

# What goes in and what comes out


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments."""
    hidden: Tensor = args[0] if args else kwargs[_hidden_name(kwargs)]
    return hidden


def _hidden_name(kwargs: dict[str, Any]) -> str:
    """What the hidden states are called: `hidden_states`, or else the first tensor of numbers (PatchTST has `hidden_state`)."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], new: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with other hidden states, given in the same way."""
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, _hidden_name(kwargs): new})


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of its outputs."""
    value = output if isinstance(output, Tensor) else output[0]
    if not isinstance(value, Tensor):
        raise InputError(f"expected a layer to return a tensor, it returned {type(value).__name__}.")
    return value


def with_first(output: Any, new: Tensor) -> Any:
    """A module's output with another first tensor."""
    if isinstance(output, list):
        return [new, *output[1:]]
    return new if isinstance(output, Tensor) else (new, *output[1:])


# Hooks


@contextlib.contextmanager
def hooked(module: nn.Module, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Call `before` before, and `after` after, every call of `module` while this lasts."""
    handles = []
    if before is not None:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    if after is not None:
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def entering(module: nn.Module, change: Change) -> contextlib.AbstractContextManager[None]:
    """While this lasts, `module` is given `change(hidden)`, or what it is given anyway where that is None."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = change(hidden_of(args, kwargs))
        return None if new is None else with_hidden(args, kwargs, new)

    return hooked(module, before=before)


def leaving(module: nn.Module, change: Change) -> contextlib.AbstractContextManager[None]:
    """While this lasts, the first tensor that `module` returns is `change` of it, or itself where that is None."""

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        new = change(first_tensor(output))
        return None if new is None else with_first(output, new)

    return hooked(module, after=after)


@contextlib.contextmanager
def caught(
    *modules: nn.Module,
    side: Literal["input", "output"] = "output",
    keep: Callable[[Any], Any] = first_tensor,
) -> Iterator[list[Any]]:
    """Yields a list that grows with every call of one of `modules`: by `keep` of what it returned, or by what it was given.

    `keep` may copy, where somebody writes into an output later, or hand on an output whole.
    """
    found: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(keep(hidden_of(args, kwargs)))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        found.append(keep(output))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(
                hooked(module, before if side == "input" else None, after if side == "output" else None)
            )
        yield found


class _Stop(Exception):
    """A forward pass has come far enough for the block that owns `token`."""

    def __init__(self, token: object) -> None:
        super().__init__("a forward pass was ended early")
        self.token = token


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[..., NoReturn]]:
    """Yields `stop`, a hook (it takes any arguments) that ends the block from anywhere inside a forward pass.

    Only this block ends: where passes are nested, an inner one does not swallow what an outer one stopped for.
    """
    token = object()

    def stop(*_: Any) -> NoReturn:
        raise _Stop(token)  # a new one each time: a kept exception would keep the pass's tensors

    try:
        yield stop
    except _Stop as stopped:
        if stopped.token is not token:
            raise


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """While this lasts, modules compiled in place run uncompiled: compiled code does not see new hooks."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            if part.__dict__.get("_compiled_call_impl") is not None:
                stack.callback(setattr, part, "_compiled_call_impl", part._compiled_call_impl)
                part._compiled_call_impl = None
        yield


# Parameters


@contextlib.contextmanager
def frozen(module: nn.Module, but: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """While this lasts no parameter of `module` but these asks for a gradient, so that a graph keeps nothing for them.

    Afterwards every `requires_grad` is as it was, whatever happened to it inside.
    """
    free = {id(parameter) for parameter in but}
    were = [(p, p.requires_grad) for p in module.parameters() if id(p) not in free]
    try:
        for parameter, _ in were:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in were:
            parameter.requires_grad_(before)
