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
from manyheads.errors import InputError
from manyheads.learning import Card, fill, load, save

KINDS: dict[str, type[DraftHeads]] = {kind.kind: kind for kind in (Medusa, Hydra, Clover, Chimera, Eagle)}


@dataclass(frozen=True)
class Saved:
    """A drafter that was read, with its card."""

    drafter: DraftHeads
    card: Card = field(repr=False)

    @property
    def acceptance(self) -> Float[Tensor, "K R"] | None:
        """Measured acceptance by depth and rank, None if it was not measured. `InputError` if the card holds something else."""
        found = self.card.about.get("acceptance")
        if found is None:
            return None
        try:
            table = torch.tensor(found, dtype=torch.double)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the acceptance in this drafter's card is no table ({error}); measure it again."
            ) from None
        if table.ndim != 2 or not table.numel() or not bool(((table >= 0) & (table <= 1)).all()):
            raise InputError(
                f"the acceptance in this drafter's card has shape {list(table.shape)}; expected shares of [K, R], 0 to 1."
            )
        return table

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
    try:
        drafter = KINDS[card.kind].build(trunk, **card.settings)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} holds no drafter of kind {card.kind}: {reason}") from None
    fill(drafter, weights, folder)
    saved = Saved(drafter.eval(), card)
    drafter.expected = saved.acceptance  # an error of the card is told now, and not in the middle of a generation
    return saved
