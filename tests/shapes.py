"""The check of shapes: beartype where an annotation says a shape, and nothing elsewhere, which is mypy's.

    pytest --jaxtyping-packages=manyheads,shapes.checked

Functions that say no shape would only cost time. The first item of a list is checked, not a random one, so that two runs agree.

jaxtyping's import hook decorates every function of the package. Its wrapper costs each of them three calls and a binding of the
arguments, shapes or not, a function inside another one at each call of the outer one: 40 % of the time of some tests. So
`only_where_shapes_are_said` puts a decorator before it that returns all others as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, AbstractDtype

CONF = BeartypeConf(is_random=False, is_pep484_tower=True)  # an int is a float, as mypy has it


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, checked at every call if it says a shape."""
    if any(_says_a_shape(annotation) for annotation in function.__annotations__.values()):
        return beartype(function, conf=CONF)
    return function


def only_where_shapes_are_said() -> None:
    """From here on jaxtyping's hook leaves functions and dataclasses alone in whose annotations no shape is said."""
    plain = jaxtyping.jaxtyped

    def jaxtyped(*args: Any, **kwargs: Any) -> Any:
        if args or set(kwargs) != {"typechecker"}:
            return plain(*args, **kwargs)
        return lambda item: plain(item, **kwargs) if _to_be_checked(item) else item

    jaxtyping.jaxtyped = jaxtyped


def _to_be_checked(item: Any) -> bool:
    if isinstance(item, type):  # of a class, its dataclass's __init__ is checked: methods are decorated by themselves
        return dataclasses.is_dataclass(item) and _to_be_checked(item.__init__)
    function = getattr(item, "__func__", item)
    names = getattr(function, "__globals__", None)
    if names is None:  # a property, or what another decorator made
        return True
    return any(_said_in(annotation, names) for annotation in function.__annotations__.values())


def _said_in(annotation: Any, names: dict[str, Any]) -> bool:
    if not isinstance(annotation, str):
        return _says_a_shape(annotation)
    return any(_says_a_shape(names.get(name)) for name in re.findall(r"\w+", annotation))


def _says_a_shape(annotation: Any) -> bool:
    """Whether it is or holds a shape, or one of the names with which shapes are written (`Float`)."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray | AbstractDtype):
        return True
    return any(_says_a_shape(argument) for argument in get_args(annotation))
