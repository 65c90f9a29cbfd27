"""Clover (#32): draft heads in sequence, each attending to the one token drafted before it and passing its state on.

Xiao et al., arXiv:2405.00263. A decoder layer over all of the trunk's states, run once a round, prepares
h^0 = Layer(h_1 .. h_t); then head k = 1..K, with e the output matrix's row of x_{t+k}, scaled to length 1,

    q, u, v  = W_Q norm(h^{k-1}), W_K e, W_V e                                              each [D], in G groups
    h^k      = h^{k-1} + g v        g = cos(q, u) in each group ("cosine"), or 1 ("none")                      [D]
    logits_k = W_lm (h^k + SiLU(M_k h^k + b_k))                             predicts x_{t+1+k}                 [V]

W_V, M_k and b_k start at zero, W_Q and W_K at the identity with noise of size 0.01. The layer starts as a copy of the
trunk's last one where that has Llama's tensors, else as the identity. So an untrained head ignores the drafted tokens.
W_lm is the trunk's for all heads: this keeps Clover small, and a `FlashHead` can replace it. It learns from data at rate
1e-3 (`Recipe(data=1, teacher=0, decay=0.8)`; the decay is Medusa's). Its own tree (`growth=None`) has four guesses, the likeliest
among those within the top-p mass of their node and with at least a quarter of its best one's probability.

Set to False, `attention`, `regressive` and `augmenting` remove what the paper's ablation removes: the drafted tokens
(h^k = h^0), the passing on (h^k = h^0 + g v), the layer (h^0 = h_t).

Departures: with one key a softmax is the constant 1; we could not confirm what the paper uses instead. The cosine is
the gate of its successor's code (arXiv:2408.00264), 1 the literal reading. G is the largest common divisor of D and
the trunk's number of heads. The layer reads states after the trunk's final norm. How the ablation fills the gaps is our
reading, and so is a top-p of .9.
"""

from __future__ import annotations

from math import gcd
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.draft.core.block import CachedBlock
from manyheads.draft.core.drafter import DraftHeads, ResidualBlock, check_counts
from manyheads.draft.core.growth import BestFirst
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError

Gate = Literal["cosine", "none"]


class Clover(DraftHeads):
    """`heads` heads with attention to one token each."""

    kind = "clover"

    def __init__(
        self,
        trunk: DraftTrunk,
        heads: int = 3,
        gate: Gate = "cosine",
        attention: bool = True,
        regressive: bool = True,
        augmenting: bool = True,
    ) -> None:
        super().__init__()
        check_counts(heads=heads)
        if gate not in get_args(Gate):
            raise InputError(f"gate is {gate!r}; give 'cosine' or 'none'.")
        self.settings = {
            "heads": heads,
            "gate": gate,
            "attention": attention,
            "regressive": regressive,
            "augmenting": augmenting,
        }
        self.depth = heads
        self.growth = BestFirst(nodes=4, beam=2, children=4, levels=heads, floor=0.25, top_p=0.9)
        self.regressive = regressive
        self.layer = CachedBlock.like(trunk, copied=True) if augmenting else None
        groups = gcd(trunk.model.layout.n_heads, trunk.width)
        decoders = (_OneToken(trunk.width, groups, gate) for _ in range(heads if attention else 0))
        self.decoders = nn.ModuleList(decoders)
        self.blocks = nn.ModuleList(ResidualBlock(trunk.width) for _ in range(heads))
        self.to(trunk.device, trunk.dtype)

    def teacher_forced(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B _ V"]]:
        """Head k on every state that has a token k + 1 later, given the true tokens between."""
        prepared = hidden if self.layer is None else self.layer(hidden)
        state, out = prepared, []
        for k in range(len(self.blocks)):
            end = max(0, ids.shape[1] - 2 - k)
            state = self._attend(
                trunk, k, (state if self.regressive else prepared)[:, :end], ids[:, 1 + k : 1 + k + end]
            )
            out.append(trunk.unembed(self.blocks[k](state)))
        return out

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Empty the layer's cache."""
        if self.layer is not None:
            self.layer.start(rows)

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """Cache the accepted states; the first head's logits, of the token after the root."""
        state = accepted.state
        if self.layer is not None:
            states = self.layer.read(accepted.hidden, accepted.positions, accepted.valid)
            state = states[accepted.rows, accepted.last]
        self._prepared = state[:, None]
        return self._logits(trunk, 0, self._prepared, accepted.root[:, None])

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"]:
        """The next head's logits, from the states of the nodes' parents, or from h^0 if not `regressive`."""
        above = nodes.of_parents(self._state if self.regressive else self._prepared)
        return self._logits(trunk, nodes.depth, above, nodes.tokens)

    def _logits(
        self, trunk: DraftTrunk, head: int, above: Float[Tensor, "B m D"], tokens: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m V"]:
        self._state = self._attend(trunk, head, above, tokens)
        self.features = self.blocks[head](self._state)
        return trunk.unembed(self.features)

    def _attend(
        self, trunk: DraftTrunk, head: int, states: Float[Tensor, "B m D"], tokens: Int[Tensor, "B m"]
    ) -> Float[Tensor, "B m D"]:
        if not len(self.decoders):
            return states
        out: Tensor = self.decoders[head](states, F.normalize(F.embedding(tokens, trunk.readout), dim=-1))
        return out


class _OneToken(nn.Module):
    """`h + g W_V e`: attention of a state to one token."""

    def __init__(self, width: int, groups: int, gate: Gate) -> None:
        super().__init__()
        self.value = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.value.weight)
        self.gate = _Cosine(width, groups) if gate == "cosine" else None

    def forward(self, states: Float[Tensor, "*N D"], token: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        value: Tensor = self.value(token)
        return states + (value if self.gate is None else self.gate(states, token) * value)


class _Cosine(nn.Module):
    """Cosine of a state's query and a token's key in each group, repeated for each entry of the group."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        with torch.no_grad():
            for matrix in (self.query, self.key):
                matrix.weight.normal_(std=0.01).add_(torch.eye(width))
        self.groups = groups

    def forward(self, states: Float[Tensor, "*N D"], token: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        query, key = (x.unflatten(-1, (self.groups, -1)) for x in (self.query(self.norm(states)), self.key(token)))
        return F.cosine_similarity(query, key, dim=-1, eps=1e-6).repeat_interleave(query.shape[-1], -1)
