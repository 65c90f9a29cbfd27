"""Drafters as files: `drafter.json` and `drafter.safetensors`, bound to their model by its fingerprint.

The card says what kind of drafter it is, what it was built with, how it was trained, the acceptance that was measured
(`[K, R]`, by depth and rank) and the tree made of it. Layouts of other programs are in `manyheads.draft.files.exchange`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads.draft.core.drafter import DraftHeads
from manyheads.draft.core.trees import best_ranks
from manyheads.draft.core.trunk import Trunk
from manyheads.draft.drafters.chimera import Chimera
from manyheads.draft.drafters.clover import Clover
from manyheads.draft.drafters.eagle import Eagle
from manyheads.draft.drafters.hydra import Hydra
from manyheads.draft.drafters.medusa import Medusa
from manyheads.errors import InputError, MismatchError
from manyheads.files import write_folder_atomically
from manyheads.version import __version__

FORMAT = 1
KINDS: dict[str, type[DraftHeads]] = {kind.kind: kind for kind in (Medusa, Hydra, Clover, Chimera, Eagle)}


@dataclass(frozen=True)
class Saved:
    """A drafter as it was read, with its card."""

    drafter: DraftHeads
    card: dict[str, Any] = field(repr=False)

    @property
    def acceptance(self) -> Float[Tensor, "K R"] | None:
        """Measured acceptance by depth and rank, if it was."""
        found = self.card.get("acceptance")
        return None if found is None else torch.tensor(found, dtype=torch.double)

    def tree(self, nodes: int) -> Any:
        """The best tree of that size for the measured acceptance; the drafter's own where nothing was measured."""
        from manyheads.draft.core.growth import Fixed

        return self.drafter.growth if self.acceptance is None else Fixed(best_ranks(self.acceptance, nodes))


def save_drafter(
    drafter: DraftHeads,
    trunk: Trunk,
    folder: str | Path,
    *,
    acceptance: Float[Tensor, "K R"] | None = None,
    trained: dict[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a drafter into a new folder. `trained` is any JSON about how."""
    card = {
        "format": FORMAT,
        "version": __version__,
        "kind": drafter.kind,
        "settings": drafter.settings,
        "fingerprint": trunk.model.fingerprint,
        "acceptance": None if acceptance is None else acceptance.tolist(),
        "trained": trained or {},
    }

    def write(into: Path) -> None:
        weights = {name: weight.detach().contiguous().cpu() for name, weight in drafter.state_dict().items()}
        save_file(weights, into / "drafter.safetensors")
        (into / "drafter.json").write_text(json.dumps(card, indent=2))

    return write_folder_atomically(folder, write, force=force)


def load_drafter(folder: str | Path, trunk: Trunk, *, force: bool = False) -> Saved:
    """Read one back. `MismatchError` if it was trained beside another model, unless forced; `InputError` if it is no drafter."""
    folder = Path(folder)
    try:
        card = json.loads((folder / "drafter.json").read_text())
        weights = load_file(folder / "drafter.safetensors")
        kind, settings, owner = KINDS[card["kind"]], dict(card["settings"]), card["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"there is no drafter at {folder} ({error}); `manyheads draft train` makes one.") from None
    if owner != trunk.model.fingerprint and not force:
        raise MismatchError(
            f"the drafter at {folder} was trained beside model {owner}, not {trunk.model.fingerprint}; its guesses would be "
            "poor, though never wrong. Force it to try."
        )
    drafter = kind.build(trunk, **settings)
    try:
        drafter.load_state_dict(weights)
    except RuntimeError as error:
        raise MismatchError(
            f"the drafter at {folder} does not fit this model: {str(error).splitlines()[-1].strip()}"
        ) from None
    return Saved(drafter.eval(), card)
