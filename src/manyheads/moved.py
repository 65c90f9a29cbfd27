"""Programs written before the rooms were split go on working: a module of a room is found in the folder where it lies now.

`manyheads.draft.prompt_lookup` is `manyheads.draft.drafters.prompt_lookup`: the same module, not a copy. A warning says so.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parent
_ELSEWHERE = {"manyheads.edit.head_edit": "manyheads.model.editing.head_edit"}


class _Moved(MetaPathFinder, Loader):
    """Comes last among Python's finders, so it is asked only for modules that nothing else finds."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith("manyheads.") and _place(name) else None

    def exec_module(self, module: ModuleType) -> None:
        place = _place(module.__name__)
        assert place is not None
        warnings.warn(f"{module.__name__} is now {place}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(place)


def _place(name: str) -> str | None:
    """Where the module lies now; None where the room has no such file, or several."""
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    _, *room, file = name.split(".")
    found = list(_ROOT.joinpath(*room).rglob(f"{file}.py")) if len(room) == 1 and not file.startswith("_") else []
    return "manyheads." + ".".join(found[0].relative_to(_ROOT).with_suffix("").parts) if len(found) == 1 else None


def install() -> None:
    """Let Python find moved modules."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
