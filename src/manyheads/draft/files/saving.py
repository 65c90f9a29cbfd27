"""Drafters as files (`manyheads.learning.saved`), bound to their model by its fingerprint.

The card says what kind of drafter it is, what it was built with, how it was trained, the acceptance that was measured
(`[K, R]`, by depth and rank) and the tree made of it. Layouts of other programs are in `manyheads.draft.files.exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.draft.core.drafter import DraftHeads
from manyheads.draft.core.trees import best_ranks
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.chimera import Chimera
from manyheads.draft.drafters.clover import Clover
from manyheads.draft.drafters.eagle import Eagle
from manyheads.draft.drafters.hydra import Hydra
from manyheads.draft.drafters.medusa import Medusa
from manyheads.learning import Card, fill, load, save

KINDS: dict[str, type[DraftHeads]] = {kind.kind: kind for kind in (Medusa, Hydra, Clover, Chimera, Eagle)}


@dataclass(frozen=True)
class Saved:
    """A drafter as it was read, with its card."""

    drafter: DraftHeads
    card: Card = field(repr=False)

    @property
    def acceptance(self) -> Float[Tensor, "K R"] | None:
        """Measured acceptance by depth and rank, if it was."""
        found = self.card.about.get("acceptance")
        return None if found is None else torch.tensor(found, dtype=torch.double)

    def tree(self, nodes: int) -> Any:
        """The best tree of that size for the measured acceptance; the drafter's own where nothing was measured."""
        from manyheads.draft.core.growth import Fixed

        return self.drafter.growth if self.acceptance is None else Fixed(best_ranks(self.acceptance, nodes))


def save_drafter(
    drafter: DraftHeads,
    trunk: DraftTrunk,
    folder: str | Path,
    *,
    acceptance: Float[Tensor, "K R"] | None = None,
    trained: dict[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a drafter into a new folder. `trained` is any JSON about how."""
    about = {"acceptance": None if acceptance is None else acceptance.tolist(), "trained": trained or {}}
    card = Card("drafter", settings=drafter.settings, fingerprint=trunk.fingerprint, kind=drafter.kind, about=about)
    return save(folder, card, drafter, force=force)


def load_drafter(folder: str | Path, trunk: DraftTrunk, *, force: bool = False) -> Saved:
    """Read one back. `MismatchError` if it was trained beside another model, unless forced: its guesses would be poor, though
    never wrong. `InputError` if it is no drafter."""
    card, weights = load(folder, KINDS, "drafter", fingerprint=trunk.fingerprint, force=force)
    drafter = KINDS[card.kind].build(trunk, **card.settings)
    fill(drafter, weights, folder)
    return Saved(drafter.eval(), card)
