"""Drafters as files (`manyheads.learning.saved`), tied to their model by its fingerprint.

The card holds the drafter's kind and settings, how it was trained, and the measured acceptance (`[K, R]`, by depth and rank).
Layouts of other programs are in `manyheads.draft.files.exchange`.
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
    """A drafter that was read, with its card."""

    drafter: DraftHeads
    card: Card = field(repr=False)

    @property
    def acceptance(self) -> Float[Tensor, "K R"] | None:
        """Measured acceptance by depth and rank, None if it was not measured."""
        found = self.card.about.get("acceptance")
        return None if found is None else torch.tensor(found, dtype=torch.double)

    def tree(self, nodes: int) -> Any:
        """The best tree of that size for the measured acceptance; the drafter's own growth if none was measured."""
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
    """Write a drafter into a new folder. `trained` is any JSON on how it was trained."""
    about = {"acceptance": None if acceptance is None else acceptance.tolist(), "trained": trained or {}}
    card = Card("drafter", settings=drafter.settings, fingerprint=trunk.fingerprint, kind=drafter.kind, about=about)
    return save(folder, card, drafter, force=force)


def load_drafter(folder: str | Path, trunk: DraftTrunk, *, force: bool = False) -> Saved:
    """Read a drafter. `MismatchError` if it was trained on another model, unless forced: the output would stay right, but few
    guesses would be accepted. `InputError` if the folder holds no drafter."""
    card, weights = load(folder, KINDS, "drafter", fingerprint=trunk.fingerprint, force=force)
    drafter = KINDS[card.kind].build(trunk, **card.settings)
    fill(drafter, weights, folder)
    return Saved(drafter.eval(), card)
