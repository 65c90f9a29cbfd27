"""The check of shapes: beartype where an annotation says a shape, and nothing elsewhere, which is mypy's.

    pytest --jaxtyping-packages=manyheads,shapes.checked

Functions that say no shape would only cost time. The first item of a list is checked, not a random one, so that two runs agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

CONF = BeartypeConf(is_random=False, is_pep484_tower=True)  # an int is a float, as mypy has it


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, checked at every call if it says a shape."""
    if any(_says_a_shape(annotation) for annotation in function.__annotations__.values()):
        return beartype(function, conf=CONF)
    return function


def _says_a_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(_says_a_shape(argument) for argument in get_args(annotation))
