"""One decoder layer for draft heads, with a key/value memory of its own.

It is always Transformers' Llama layer, whatever the trunk's architecture. So it can be saved in the layout of published drafters,
and can start as a copy of the trunk's last layer where that has the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from manyheads.draft.core.trunk import DraftTrunk
from manyheads.model.tree_pass import TreeCache


class CachedBlock(nn.Module):
    """A pre-norm decoder layer with rotary positions. At first it returns its input: its output projections are zero."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, inner: int, theta: float, eps: float
    ) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=inner,
            num_hidden_layers=1,
            rms_norm_eps=eps,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        config._attn_implementation = "sdpa"
        self.layer = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)
        for matrix in (self.layer.self_attn.o_proj, self.layer.mlp.down_proj):
            nn.init.zeros_(matrix.weight)
        self._memory: TreeCache | None = None

    @classmethod
    def like(cls, trunk: DraftTrunk, *, copied: bool = False) -> CachedBlock:
        """A block with the trunk's sizes. `copied` takes the weights of the trunk's last layer, where that has the same
        tensors: only an initialisation, since the two layers may compute differently."""
        config = getattr(trunk.model.config, "get_text_config", lambda **_: trunk.model.config)(decoder=True)
        layout = trunk.model.layout
        rope: Any = getattr(config, "rope_parameters", None) or {}
        block = cls(
            width=trunk.width,
            heads=layout.n_heads,
            kv_heads=layout.n_kv_heads,
            head_dim=layout.head_dim,
            inner=int(getattr(config, "intermediate_size", None) or 4 * trunk.width),
            theta=float(rope.get("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0),
            eps=float(getattr(config, "rms_norm_eps", None) or 1e-5),
        ).to(trunk.device, trunk.dtype)
        if copied:
            given = layout.blocks[-1].module.state_dict()
            own = block.layer.state_dict()
            if {name: w.shape for name, w in given.items()} == {name: w.shape for name, w in own.items()}:
                block.layer.load_state_dict(given)
        return block

    def forward(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Whole texts at once, with a causal mask, as in training."""
        positions = torch.arange(states.shape[1], device=states.device)[None]
        out: Tensor = self.layer(states, position_embeddings=self.rotary(states, positions))
        return out

    def masked(
        self,
        states: Float[Tensor, "B Q D"],
        positions: Int[Tensor, "#B Q"],
        seen: Bool[Tensor, "#B Q S"],
        before: Cache | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Whole texts at once, where column i sees column j if `seen[:, i, j]`. The first S - Q columns are those of earlier
        calls with the same cache `before`."""
        angles = self.rotary(states, positions)
        out: Tensor = self.layer(
            states, attention_mask=seen[:, None], position_embeddings=angles, past_key_values=before
        )
        return out

    def start(self, rows: int) -> None:
        """Empty the memory."""
        self._memory = TreeCache(1, [0] * rows)

    def read(
        self, states: Float[Tensor, "B A D"], positions: Int[Tensor, "B A"], valid: Bool[Tensor, "B A"]
    ) -> Float[Tensor, "B A D"]:
        """Process accepted states and cache the valid ones. Drops what `peek` added."""
        memory = self._held
        memory.forget()
        length = states.shape[1]
        within = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        # A padding column sees itself, so that its softmax is not empty (NaN).
        out = self._run(states, positions, within & valid[:, None, :] | torch.eye(length, device=within.device).bool())
        memory.keep([[j for j, kept in enumerate(row) if kept] for row in valid.tolist()])
        return out

    def peek(
        self, states: Float[Tensor, "B m D"], positions: Int[Tensor, "#B m"], within: Bool[Tensor, "#B m S"]
    ) -> Float[Tensor, "B m D"]:
        """Process drafted states. Each sees the cached states and, of all states peeked at since `read`, those in `within`."""
        return self._run(states, positions.expand(len(states), -1), within)

    @property
    def _held(self) -> TreeCache:
        assert self._memory is not None, "call start() first"
        return self._memory

    def _run(self, states: Tensor, positions: Tensor, within: Tensor) -> Tensor:
        out: Tensor = self.layer(
            states,
            attention_mask=self._held.seen(within),
            position_embeddings=self.rotary(states, positions),
            past_key_values=self._held,
        )
        return out
