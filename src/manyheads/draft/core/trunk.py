"""What a draft head uses of the model it drafts for: its token embedding and its output matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads import learning
from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.offloading import is_away


class DraftTrunk(learning.Trunk):
    """A causal language model as its draft heads see it. None of its weights are trained, copied or saved with them.

    `unembed` replaces the product with the output matrix, for instance by a `FlashHead`'s: good enough to draft, not to verify.
    """

    model: HeadModel

    def __init__(
        self, model: HeadModel, unembed: Callable[[Float[Tensor, "... D"]], Float[Tensor, "... V"]] | None = None
    ) -> None:
        if model.layout.unembedding is None or not isinstance(
            getattr(model.layout.unembedding, "weight", None), Tensor
        ):
            raise UnsupportedError(f"{type(model.plain).__name__} predicts no tokens; give a causal language model.")
        if is_away(model.plain):
            raise UnsupportedError(
                f"weights of {type(model.plain).__name__} are offloaded, and draft heads read its embedding and output matrix "
                "all the time; open it without offloading to draft."
            )
        super().__init__(model)
        self._unembed = unembed or (lambda hidden: F.linear(hidden, self.readout, self.readout_bias))

    @property
    def readout(self) -> Float[Tensor, "V D"]:
        """The output matrix."""
        weight: Tensor = self.unembedding.weight
        return weight

    @property
    def readout_bias(self) -> Float[Tensor, "V"] | None:
        """The output bias, if there is one."""
        return getattr(self.unembedding, "bias", None)

    @property
    def width(self) -> int:
        """D, the width of the states that the output matrix reads."""
        return int(self.readout.shape[1])

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the output matrix."""
        return int(self.readout.shape[0])

    @property
    def device(self) -> torch.device:
        """The device of the output matrix and of the states it reads."""
        return self.readout.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its hidden states."""
        return self.readout.dtype

    @property
    def embed_width(self) -> int:
        """E, the width of the input embedding; it differs from `width` in a few models."""
        return int(self.embedding.weight.shape[1])

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... E"]:
        """Rows of the input embedding."""
        return F.embedding(ids, self.embedding.weight)

    def unembed(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits of hidden states, before any scaling or capping of the model's own."""
        return self._unembed(hidden)
