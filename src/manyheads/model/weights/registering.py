"""Transformers knows converted models once manyheads is imported, in whichever order the two are imported.

A converted model's `model_type` is that of its architecture behind `manyheads_` (`manyheads_llama`). Its classes are made when
they are asked for (`weights.converted`). This file imports neither PyTorch nor Transformers: it waits until Transformers' table
of model types is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PREFIX = "manyheads_"
_TABLE = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Let `AutoConfig` and the `AutoModel` classes of Transformers find converted models."""
    if _TABLE in sys.modules:
        _register(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _OnDemand(dict[str, Any]):
    """Transformers' own record of registered types, in which converted ones are found without being there before."""

    def __init__(self, registered: dict[str, Any], types: Any) -> None:
        super().__init__(registered)
        self.types = types

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (
            isinstance(key, str) and key.startswith(PREFIX) and key.removeprefix(PREFIX) in self.types
        )

    def __missing__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        return import_module("manyheads.model.weights.converted").register_type(key)


class _Waiting(MetaPathFinder):
    """Comes first among Python's finders, and finds the one module as the usual finder does, to act when it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _TABLE else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_registered(spec.loader)  # type: ignore[method-assign, assignment]
        return spec


def _then_registered(loader: Loader) -> Callable[[ModuleType], None]:
    run = loader.exec_module

    def run_and_register(module: ModuleType) -> None:
        run(module)
        _register(module)

    return run_and_register


def _register(table: Any) -> None:
    mapping = table.CONFIG_MAPPING
    # A later Transformers may keep its types elsewhere. To import it must not fail for that.
    registered, types = getattr(mapping, "_extra_content", None), getattr(mapping, "_mapping", {})
    if isinstance(registered, dict) and not isinstance(registered, _OnDemand):
        mapping._extra_content = _OnDemand(registered, types)
