"""HeadModel: an unmodified Transformers model whose every head can be read, edited, swept, baked and pruned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from manyheads.heads import HeadLike, HeadSet
from manyheads.model.editing.edits import Edit
from manyheads.model.opened import OpenedModel
from manyheads.model.weights import baking, ov, pruning


class HeadModel(OpenedModel):
    """A Transformers model seen by its heads. Made by `open_model`, which proves the layout first.

    With no reader and no edit active it *is* the Transformers model: same kernels, bitwise the same logits. The module is
    never changed permanently; `module` is the very object that was opened.
    """

    def ov(self, resid: Float[Tensor, "N D"]) -> Float[Tensor, "L N H D"]:
        """What each head would write if a token with residual stream `resid` attended to itself alone: the OV circuit."""
        return ov.ov(self, resid)

    # Keeping an edit

    def bake(self, *edits: Edit) -> HeadModel:
        """A copy of the model with `edits` folded into its weights: an ordinary checkpoint once saved."""
        for edit in edits:
            self._check_edit(edit)
        return HeadModel(*baking.baked(self, edits))

    def prune(self, heads: HeadSet | Sequence[HeadLike]) -> HeadModel:
        """A copy of the model without `heads`: smaller weights, smaller config, the logits of masking them."""
        return HeadModel(*pruning.pruned(self, self.head_set(heads)))

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Save module and tokenizer as plain Transformers does. `InputError` if `folder` exists and `force` is not set."""
        return baking.save_pretrained(self, Path(folder), force=force)
