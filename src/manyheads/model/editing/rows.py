"""Rows: overwrite whole attention rows of some heads, the repair of #34 (Merullo et al., arXiv:2310.08744).

    pattern[l, h, t, :] = 0 but for pattern[l, h, t, keys[i]] = weights[i]        for t in `positions`
    z[l, h, t] = sum_i weights[i] v[l, h, keys[i]]

`Mask` can only take keys away and let the softmax share out the rest; `Rows` sets how much each key gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.editing.edits import Edit, Positions
from manyheads.model.reading.attention import AttentionCall


@dataclass(frozen=True, eq=False)
class Rows(Edit):
    """The heads' queries at `positions` attend to the columns `keys` with `weights`, and to nothing else.

    `keys` and `weights` are `[K]`, or `[B, K]` where rows of the batch differ; without weights each key gets 1/K. A column named
    twice gets both weights. Negative columns count from the end of the pass. Readers see the pattern as it was before.
    """

    keys: Positions = 0
    weights: Float[Tensor, "K"] | Float[Tensor, "B K"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = self._columns()
        if self.weights is not None and self.weights.shape[-1] != keys.shape[-1]:
            raise InputError(
                f"Rows got {keys.shape[-1]} keys and weights of shape {list(self.weights.shape)}; give one weight a key."
            )

    @property
    def acts_in_attention(self) -> bool:
        """It needs the values."""
        return True

    def attend(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Replace z by the values' sum with the given weights."""
        heads = self.indices(call.layer)
        batch, length, total = z.shape[0], z.shape[1], call.key.shape[2]
        keys = self._columns().to(z.device).expand(batch, -1)
        keys = torch.where(keys < 0, keys + call.offset + length, keys) - call.first_column
        if ((keys < 0) | (keys >= total)).any():
            raise InputError(f"Rows was given key columns outside of the {total} that this pass can attend to.")
        weights = torch.full(keys.shape, 1 / keys.shape[1]) if self.weights is None else self.weights
        weights = torch.atleast_2d(weights).to(z).expand(keys.shape)
        row = torch.zeros(batch, total, dtype=z.dtype, device=z.device).scatter_add(1, keys, weights)
        self._refuse_forbidden(call, heads, row)
        new = torch.einsum("bs,bhsd->bhd", row, call.values_of(heads).to(z.dtype))
        return self._set(z, heads, new[:, None].expand(-1, length, -1, -1), call.offset)

    def _columns(self) -> Tensor:
        return torch.atleast_2d(torch.as_tensor(self.keys))

    def _refuse_forbidden(self, call: AttentionCall, heads: list[int], row: Float[Tensor, "B S"]) -> None:
        length = call.query.shape[2]
        where: Bool[Tensor, "B T"] | None = self._where(len(row), length, call.offset, row.device)
        forbidden = (row != 0)[:, None] & ~call.allowed[:, heads].all(1)
        if (forbidden if where is None else forbidden & where[..., None]).any():
            raise InputError(
                "Rows was given a key that a query may not attend to (it comes later, or is padding); "
                "limit the edit with positions=."
            )
