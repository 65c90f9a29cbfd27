"""What a model of a chain learns: attention to its predecessor's states before each of its layers, and LoRA on its linear maps.

With h [B, T, D] what layer l of a model is given, and s [B, S, D] what layer l of its predecessor gave out,

    read   h + lam * W_o softmax(q k^T / sqrt(Dh) - m_h (t - u)) v      q = W_q norm(h_t), k, v = W_k, W_v norm(s_u), u <= t
    LoRA   W x + 2 B A x                                                A [r, F_in], B [F_out, r]  (alpha = 2 r)

W_o and B begin at zero, so at first the model is itself. m_h > 0 is one learned slope a head: streams do not say plainly where a
token stands, and the first thing to read is the predecessor's state at the same token.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.model.headmodel import HeadModel
from manyheads.model.linear import features_of


class StateReader(nn.Module):
    """The cross-attention before one layer (formula above)."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.own_norm, self.read_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, heads * head_dim, bias=False)
        self.value = nn.Linear(width, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.log_slope = nn.Parameter(-torch.arange(1.0, heads + 1) * 8 / heads * torch.log(torch.tensor(2.0)))
        nn.init.zeros_(self.out.weight)

    def keys_values(
        self, states: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B H S Dh"], Float[Tensor, "B H S Dh"]]:
        """What is kept of the predecessor's states."""
        read = self.read_norm(states.to(self.key.weight.dtype))
        return self._by_heads(self.key(read)), self._by_heads(self.value(read))

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        kept: tuple[Float[Tensor, "B H S Dh"], Float[Tensor, "B H S Dh"]],
        apart: Int[Tensor, "B T S"],
        seen: Bool[Tensor, "B T S"],
    ) -> Float[Tensor, "B T D"]:
        """What is added to `hidden`. `apart` is how many tokens lie between a token and a kept one."""
        query = self._by_heads(self.query(self.own_norm(hidden.to(self.query.weight.dtype))))
        bias = -self.log_slope.exp()[:, None, None] * apart[:, None].to(query)
        z = F.scaled_dot_product_attention(query, *kept, attn_mask=bias.masked_fill(~seen[:, None], -torch.inf))
        added: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return added.to(hidden.dtype)

    def _by_heads(self, flat: Float[Tensor, "B S F"]) -> Float[Tensor, "B H S Dh"]:
        return flat.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LowRank(nn.Module):
    """What LoRA adds to one linear map."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Float[Tensor, "*B F_in"]) -> Float[Tensor, "*B F_out"]:
        """2 B A x."""
        made: Tensor = self.B(self.A(x.to(self.A.weight.dtype)))
        return 2 * made.to(x.dtype)


class Corrector(nn.Module):
    """All that one model of a chain learns: a reader a layer, and LoRA on the layers' linear maps (none at rank 0)."""

    def __init__(self, model: HeadModel, rank: int, heads: int, head_dim: int) -> None:
        super().__init__()
        width = model.layout.hidden_size
        self.readers = nn.ModuleList(StateReader(width, heads, head_dim) for _ in range(model.n_layers))
        sizes = [features_of(module) for module in linear_parts(model)] if rank else []
        self.low_rank = nn.ModuleList(LowRank(*size, rank) for size in sizes if size is not None)
        self.to(model.device)


def linear_parts(model: HeadModel) -> list[nn.Module]:
    """The linear maps of the layers, in the order of the module."""
    parts = (part for block in model.layout.blocks for part in block.module.modules())
    return [part for part in parts if features_of(part) is not None]
