"""Weights that Accelerate has moved away: to the disk, or to memory beside a smaller device.

At rest they are *meta* tensors, which have a shape and no numbers. They are fetched here for the length of a `with` block.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel

Module = TypeVar("Module", bound=nn.Module)


def is_away(module: nn.Module) -> bool:
    """Whether a parameter of the module is elsewhere."""
    return any(parameter.is_meta for parameter in module.parameters())


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """While this lasts, every weight of `module` is there; read them, and do not change them."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            if any(parameter.is_meta for parameter in part.parameters(recurse=False)):
                stack.enter_context(align_module_device(part, "cpu"))  # type: ignore[arg-type]
        yield


def own_copy(module: Module) -> Module:
    """A deep copy that has all its weights, whose forward is its class's and not Accelerate's."""
    hooks: dict[int, Any] = {id(part._hf_hook): None for part in module.modules() if hasattr(part, "_hf_hook")}
    if not hooks:
        return copy.deepcopy(module)
    with present(module):
        copied = copy.deepcopy(module, hooks)
    for part in copied.modules():
        if "_hf_hook" in part.__dict__:
            del part._hf_hook
            part.__dict__.pop("_old_forward", None)
            part.__dict__.pop("forward", None)
    if isinstance(copied, PreTrainedModel):
        copied.tie_weights()  # two names of one weight came back as two
    for name in ("hf_device_map", "_offload_folder"):
        copied.__dict__.pop(name, None)
    return copied
