"""Chimera (#33): draft heads over the last three tokens, drafted ones included, and over all of the trunk's states.

Zeng et al., arXiv:2402.15758. Head k = 1..K guesses x_{t+1+k} from the states up to h_t and the tokens up to x_{t+k}:

    y       = [E(x_{j-2}) ; E(x_{j-1}) ; E(x_j)],   j = t + k                                                        [3 E]
    u_j     = L (y + SiLU(W y + b))                                                      trigram encoder, 3 E -> D   [D]
    o^k     = last column of Layer(h_1 .. h_t, o^1 .. o^{k-1}, u_{t+k})                  full-context encoder        [D]
    logits  = W_k [h_t ; o^k]                                                                                        [V]

Layer is one decoder layer; h_i stands at position i, o^i and u_{t+i} at t + i. The outputs o^1 .. o^{k-1} take the places of the
states h_{t+1} .. that the trunk has not computed yet, and are detached. W_k starts as [W_lm, W_lm]: an untrained head adds
W_lm o to the trunk's logits. With one layer no head sees a later state. A second layer would leak it, through columns that see
their own next token. The distillation term is `distil` times the mean over D of (o^1 - h_{t+1})^2.

The three blocks of columns of W give three look-up tables W_j E, `[3, V, 3 E]`; with `tables` they are computed when a generation
starts (again if weights changed). This saves the product W y, three quarters of the trigram encoder's work; L remains.

Departures: while drafting, later heads read the tokens of their path, of any rank. They are trained with the true tokens, since
their guess only matters when those before it were right. In the paper they learn with the arg-max of the head before, right
or wrong. In the released trainer features also see the features before them, which do not exist while drafting; here they do
not. The text's first token is repeated to its left. Heads add the trunk's output bias, where it has one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from manyheads.draft.core.block import CachedBlock
from manyheads.draft.core.drafter import DraftHeads, ResidualBlock, check_counts
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.trees import small_tree
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError


class Chimera(DraftHeads):
    """`heads` heads over one trigram and one full-context encoder."""

    kind = "chimera"

    def __init__(self, trunk: DraftTrunk, heads: int = 4, distil: float = 0.0, tables: bool = False) -> None:
        super().__init__()
        check_counts(heads=heads)
        if not 0 <= distil < math.inf:
            raise InputError(f"distil is {distil}; give no negative or infinite weight.")
        self.settings = {"heads": heads, "distil": distil, "tables": tables}
        self.depth = heads
        self.growth = small_tree(heads)
        self.trigrams = TrigramEncoder(trunk.embed_width, trunk.width)
        self.context = CachedBlock.like(trunk)
        twice = torch.cat([trunk.readout, trunk.readout], 1).detach()
        self.readouts = nn.ParameterList(nn.Parameter(twice.clone()) for _ in range(heads))
        self.to(trunk.device, trunk.dtype)
        self.distil, self.tables = distil, tables

    def teacher_forced(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B _ V"]]:
        """Head k on every state that has a token k + 1 later, given the true tokens between."""
        outputs = self._outputs(trunk, hidden, ids, len(self.readouts))
        return [self._head(trunk, k, hidden[:, : o.shape[1]], o) for k, o in enumerate(outputs)]

    def extra_loss(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""] | float:
        """The distillation term (formula above); 0 without `distil`."""
        if not self.distil:
            return 0.0
        first = self._outputs(trunk, hidden, ids, 1)[0]
        return self.distil * F.mse_loss(first, hidden[:, 1 : 1 + first.shape[1]])

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Empty the cache of states, and make the tables if they are used."""
        self.context.start(rows)
        if self.tables:
            embedding: Any = trunk.model.layout.embedding
            self.trigrams.tabulate(embedding.weight)

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """Cache the states; the first head's logits, of the token after the root."""
        self.context.read(accepted.hidden, accepted.positions, accepted.valid)
        last = [(text[:1] * 2 + text)[-3:] for text in accepted.text]
        self._grams = torch.tensor(last, device=accepted.tokens.device)[:, None]
        self._state, self._position = accepted.state[:, None], accepted.root_position[:, None]
        itself = torch.ones(len(last), 1, 1, dtype=torch.bool, device=self._grams.device)
        self._paths = torch.zeros_like(itself)
        self.features = self.context.peek(self._features(trunk), self._position, itself)
        return self._head(trunk, 0, self._state, self.features)

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"]:
        """The next head's logits; each node reads the tokens and the outputs along its path."""
        assert self.features is not None
        above, count = self.features, nodes.tokens.shape[1]
        self._grams = torch.cat([nodes.of_parents(self._grams)[..., 1:], nodes.tokens[..., None]], -1)
        steps = torch.tensor([nodes.depth - 1] * above.shape[1] + [nodes.depth] * count, device=above.device)
        states = torch.cat([above, self._features(trunk)], 1)
        self.features = self.context.peek(states, self._position + steps, self._seen(nodes, above.shape[1]))[:, -count:]
        return self._head(trunk, nodes.depth, self._state.expand(-1, count, -1), self.features)

    def _seen(self, nodes: Nodes, above: int) -> Bool[Tensor, "B {above+nodes.tokens.shape[1]} S"]:
        """Mask over all columns peeked at in this round. This call adds the outputs of the `above` nodes of the last level and
        the features of these nodes. A feature sees the outputs along its path, and itself; the outputs' own rows are unused."""
        parent = F.one_hot(nodes.parents, above).bool().expand(len(self._paths), -1, -1)
        paths = torch.cat([nodes.of_parents(self._paths), parent], -1)
        count, size = paths.shape[1:]
        self._paths = F.pad(paths, (0, count))
        itself = torch.eye(above + count, size + count, dtype=torch.bool, device=paths.device).roll(size - above, 1)
        return torch.cat([itself[:above].expand(len(paths), -1, -1), self._paths | itself[above:]], 1)

    def _features(self, trunk: DraftTrunk) -> Float[Tensor, "B m D"]:
        """Features of the trigrams that end in the newest tokens, by the tables where these are used."""
        if self.tables:
            return self.trigrams.looked_up(trunk.embed(self._grams), self._grams)
        return self.trigrams(trunk.embed(self._grams))

    def _outputs(self, trunk: DraftTrunk, hidden: Tensor, ids: Tensor, heads: int) -> list[Float[Tensor, "B _ D"]]:
        """o^k of the full-context encoder for each head, on every state that has a token k + 1 later."""
        features = self.trigrams(trunk.embed(trigrams_of(ids)))
        known = Columns(self.context, hidden)
        outputs = []
        for ahead in range(1, 1 + heads):
            own = features[:, ahead : max(ahead, ids.shape[1] - 1)]
            outputs.append(known.beside(own, ahead) if own.shape[1] else own)
            known.add(outputs[-1].detach(), ahead)
        return outputs

    def _head(self, trunk: DraftTrunk, head: int, state: Tensor, output: Tensor) -> Float[Tensor, "B m V"]:
        return F.linear(torch.cat([state, output], -1), self.readouts[head], trunk.readout_bias)


class TrigramEncoder(nn.Module):
    """`L (y + SiLU(W y + b))` for the embeddings y of three tokens; W and b zero at first."""

    def __init__(self, embed_width: int, width: int) -> None:
        super().__init__()
        self.block = ResidualBlock(3 * embed_width)
        self.out = nn.Linear(3 * embed_width, width, bias=False)
        self._tables: Tensor | None = None
        self._made_of: tuple[object, ...] = ()

    def forward(self, embedded: Float[Tensor, "... 3 E"]) -> Float[Tensor, "... D"]:
        """The formula above, from the embeddings."""
        out: Tensor = self.out(self.block(embedded.flatten(-2)))
        return out

    def looked_up(self, embedded: Float[Tensor, "... 3 E"], grams: Int[Tensor, "... 3"]) -> Float[Tensor, "... D"]:
        """The same, with W y read from the tables that `tabulate` made."""
        assert self._tables is not None, "call tabulate() first"
        inner = self.block.linear.bias + sum(self._tables[j][grams[..., j]] for j in range(3))
        out: Tensor = self.out(embedded.flatten(-2) + F.silu(inner))
        return out

    @torch.no_grad()
    def tabulate(self, embedding: Float[Tensor, "V E"]) -> None:
        """Make the tables, unless W and the embedding are the same as last time."""
        weight = self.block.linear.weight
        # An optimiser step changes weights in place: the address stays, the version counter does not.
        made_of = tuple((w.data_ptr(), w.is_inference() or w._version) for w in (weight, embedding))
        if made_of == self._made_of:
            return
        width = embedding.shape[1]
        self._tables = torch.stack([F.linear(embedding, part) for part in weight.split(width, 1)])
        self._made_of = made_of


def trigrams_of(ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T 3"]:
    """Each token and the two before it; the first token is repeated to its left."""
    padded = torch.cat([ids[:, :1], ids[:, :1], ids], 1)
    return padded.unfold(1, 3, 1)


class Columns:
    """Keys and values that the features of a whole text attend to in training: of its states, and of the outputs that stand
    in for later states. Each is computed once, with gradients. It takes the place of a cache in the layer."""

    def __init__(self, block: CachedBlock, states: Float[Tensor, "B T D"]) -> None:
        self._block = block
        self._held: list[tuple[Tensor, Tensor]] = []
        self.add(states, 0)

    def add(self, states: Float[Tensor, "B n D"], ahead: int) -> None:
        """Add columns at positions `ahead`, `ahead` + 1, ..."""
        attention, normed = self._block.layer.self_attn, self._block.layer.input_layernorm(states)
        heads = (attention.config.num_key_value_heads, attention.head_dim)
        keys, values = (f(normed).unflatten(-1, heads).transpose(1, 2) for f in (attention.k_proj, attention.v_proj))
        self._held.append((apply_rotary_pos_emb(keys, keys, *self._angles(states, ahead))[0], values))

    def beside(self, features: Float[Tensor, "B n D"], ahead: int) -> Float[Tensor, "B n D"]:
        """The layer over the features of tokens `ahead` of states 0 .. n - 1. Each sees the states up to its own, the
        outputs that belong to its own state, and itself."""
        n, device = features.shape[1], features.device
        before, own = (torch.ones(n, n, dtype=torch.bool, device=device).tril(), torch.eye(n, device=device).bool())
        seen = torch.cat([before, own.repeat(1, len(self._held))], 1)
        angles = self._angles(features, ahead)
        layer = self._block.layer
        out: Tensor = layer(features, attention_mask=seen[None, None], position_embeddings=angles, past_key_values=self)
        return out

    def update(self, keys: Tensor, values: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns, cut to the number of new states, and of the new ones (a cache's interface)."""
        n = keys.shape[2]
        every = [(k[:, :, :n], v[:, :, :n]) for k, v in self._held] + [(keys, values)]
        return torch.cat([k for k, _ in every], 2), torch.cat([v for _, v in every], 2)

    def _angles(self, states: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        cos, sin = self._block.rotary(states, torch.arange(states.shape[1], device=states.device)[None] + ahead)
        return cos, sin
