"""An attention-only transformer whose intermediates can be clamped while it trains (for #45).

Singh et al., arXiv:2404.07129. Exemplars (vectors) and labels alternate, e_1 y_1 e_2 y_2 .. e_q, and the model predicts the label
of e_q. It has two pre-norm layers with attention only, rotary positions, a final norm, and logits over the labels. Every
intermediate has a name by which it may be clamped, inside the forward pass that is differentiated:

    value = where(mask, cached, value)        so d loss / d value = 0 exactly where mask holds

`cached` may come from another pass; gradients then flow into that pass. Names, for layer l = 0, 1:

    embedding, l.resid (the stream after the layer) [B, T, D]     l.q, l.k (rotated), l.v, l.z [B, H, T, Dh]
    l.scores (before the softmax, -inf at later positions), l.pattern [B, H, T, T]     logits [B, T, labels]

Clamp `scores` to block attention, `pattern` to fix it. Departure: q and k have no names before their rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GPTJConfig, GPTJForCausalLM

from manyheads.errors import InputError

N_LAYERS = 2
ROPE_BASE = 10_000.0
LABEL_SCALE = 0.02
NEVER = -1e9  # the logit of a token that cannot be an answer


@dataclass(frozen=True)
class Clamp:
    """Where an intermediate is clamped (`mask`, broadcast to its shape), and to which values (`cached`)."""

    mask: Bool[Tensor, "..."]
    cached: Float[Tensor, "..."]

    @classmethod
    def whole(cls, cached: Float[Tensor, "..."]) -> Clamp:
        """A clamp of every entry."""
        return cls(torch.tensor(True), cached)


Clamps = Mapping[str, Clamp]


class Trace(dict[str, Tensor]):
    """The intermediates of one forward pass, after clamping."""

    def __init__(self, clamps: Clamps) -> None:
        super().__init__()
        self.clamps = clamps

    def put(self, name: str, value: Tensor) -> Tensor:
        """Store `value` under `name`, clamped if there is a clamp for it, and return what was stored."""
        clamp = self.clamps.get(name)
        if clamp is not None:
            if not _fits(clamp, value):
                raise InputError(
                    f"the clamp of {name} has a mask {tuple(clamp.mask.shape)} and values {tuple(clamp.cached.shape)}; "
                    f"give shapes that broadcast to {tuple(value.shape)}."
                )
            value = torch.where(clamp.mask, clamp.cached, value)
        self[name] = value
        return value


class Attention(nn.Module):
    """One layer: `x + W_O z(norm(x))`, without biases except the norm's."""

    def __init__(self, width: int, n_heads: int, seed: torch.Generator) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = _lecun(width, 3 * width, seed, bias=False)
        self.out = _lecun(width, width, seed, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], layer: int, trace: Trace) -> Float[Tensor, "B T D"]:
        """The stream after this layer; its intermediates go to `trace`."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        turned = _rotate(heads[:2])
        q, k = trace.put(f"{layer}.q", turned[0]), trace.put(f"{layer}.k", turned[1])
        v = trace.put(f"{layer}.v", heads[2])
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = trace.put(f"{layer}.scores", scores.masked_fill(_ahead(length), -torch.inf))
        pattern = trace.put(f"{layer}.pattern", scores.softmax(-1))
        z = trace.put(f"{layer}.z", pattern @ v)
        return trace.put(f"{layer}.resid", x + self.out(z.transpose(1, 2).reshape(batch, length, width)))


class ClampedTransformer(nn.Module):
    """The transformer above. Exemplars are embedded by a linear map with bias, labels by a table; `seed` draws the weights.

    Matrices are LeCun normal (truncated at two standard deviations), biases 0, label embeddings truncated normal of 0.02.
    """

    def __init__(self, features: int, labels: int, *, width: int = 64, n_heads: int = 8, seed: int = 0) -> None:
        super().__init__()
        if min(features, labels, width, n_heads) < 1 or width % (2 * n_heads):
            raise InputError(
                f"got {features} features, {labels} labels, width {width} and {n_heads} heads; give positive numbers, and "
                "a width that makes heads of an even size."
            )
        self.n_heads, self.n_labels = n_heads, labels
        draw = torch.Generator().manual_seed(seed)
        self.exemplar = _lecun(features, width, draw)
        self.label = nn.Parameter(_truncated(labels, width, scale=LABEL_SCALE, seed=draw))
        self.layers = nn.ModuleList(Attention(width, n_heads, draw) for _ in range(N_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.readout = _lecun(width, labels, draw)

    def names(self) -> list[str]:
        """Names of the intermediates, all of which can be clamped."""
        parts = ("q", "k", "v", "scores", "pattern", "z", "resid")
        return ["embedding", *(f"{i}.{part}" for i in range(N_LAYERS) for part in parts), "logits"]

    def embed(self, exemplars: Float[Tensor, "B N F"], labels: Int[Tensor, "B N"]) -> Float[Tensor, "B T D"]:
        """Exemplars and labels alternating, without the last label: T = 2N - 1."""
        pairs = torch.stack([self.exemplar(exemplars), self.label[labels]], 2)
        return pairs.flatten(1, 2)[:, :-1]

    def forward(
        self, exemplars: Float[Tensor, "B N F"], labels: Int[Tensor, "B N"], clamps: Clamps | None = None
    ) -> Trace:
        """All intermediates; `logits[:, -1]` is the prediction. The last label is not read.

        Raises:
            InputError: if a clamp has no intermediate of its name, or does not fit it.
        """
        trace = Trace(clamps or {})
        if unknown := sorted(trace.clamps.keys() - set(self.names())):
            raise InputError(
                f"there is no intermediate {', '.join(unknown)} to clamp; give some of {', '.join(self.names())}."
            )
        stream = trace.put("embedding", self.embed(exemplars, labels))
        for index, layer in enumerate(self.layers):
            stream = layer(stream, index, trace)
        trace.put("logits", self.readout(self.norm(stream)))
        return trace

    def __call__(
        self, exemplars: Float[Tensor, "B N F"], labels: Int[Tensor, "B N"], clamps: Clamps | None = None
    ) -> Trace:
        """`forward`, with its type."""
        trace: Trace = super().__call__(exemplars, labels, clamps)
        return trace


def as_transformers(model: ClampedTransformer, features: Float[Tensor, "C F"]) -> GPTJForCausalLM:
    """The same function without clamps as a GPT-J whose MLPs are 0: readers, edits and scores of any model apply.

    Its tokens are the classes (0 .. C - 1, of these `features`), then the labels; only labels can be answers.
    """
    width, classes = model.norm.normalized_shape[0], len(features)
    config = GPTJConfig(
        vocab_size=classes + model.n_labels,
        n_positions=64,
        n_embd=width,
        n_layer=N_LAYERS,
        n_head=model.n_heads,
        rotary_dim=width // model.n_heads,
        n_inner=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        twin = GPTJForCausalLM(config).eval()
    with torch.no_grad():
        twin.transformer.wte.weight.copy_(torch.cat([model.exemplar(features), model.label]))
        for block, layer in zip(twin.transformer.h, model.layers, strict=True):
            assert isinstance(layer, Attention)
            for parameter in block.mlp.parameters():
                parameter.zero_()
            block.ln_1.load_state_dict(layer.norm.state_dict())
            attention = block.attn
            for part, weight in zip(("q_proj", "k_proj", "v_proj"), layer.qkv.weight.chunk(3), strict=True):
                getattr(attention, part).weight.copy_(weight)
            attention.out_proj.weight.copy_(layer.out.weight)
        twin.transformer.ln_f.load_state_dict(model.norm.state_dict())
        twin.lm_head.weight[:classes], twin.lm_head.bias[:classes] = 0.0, NEVER
        twin.lm_head.weight[classes:], twin.lm_head.bias[classes:] = model.readout.weight, model.readout.bias
    return twin


def _fits(clamp: Clamp, value: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(clamp.mask.shape, clamp.cached.shape, value.shape) == value.shape
    except RuntimeError:
        return False


def _truncated(*shape: int, scale: float, seed: torch.Generator) -> Tensor:
    return scale * nn.init.trunc_normal_(torch.empty(shape), a=-2.0, b=2.0, generator=seed)


def _lecun(inputs: int, outputs: int, seed: torch.Generator, bias: bool = True) -> nn.Linear:
    """A linear map whose weights have variance 1 / inputs after truncation at two standard deviations."""
    made = nn.Linear(inputs, outputs, bias=bias)
    made.weight = nn.Parameter(_truncated(outputs, inputs, scale=_UNCUT / math.sqrt(inputs), seed=seed))
    if bias:
        nn.init.zeros_(made.bias)
    return made


_UNCUT = 1 / 0.8796256610342398  # over the standard deviation of a unit normal truncated at 2


@cache
def _ahead(length: int) -> Bool[Tensor, "T T"]:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@cache
def _angles(length: int, size: int) -> tuple[Float[Tensor, "T Dh"], Float[Tensor, "T Dh"]]:
    rates = ROPE_BASE ** -(torch.arange(0, size, 2) / size)
    angle = (torch.arange(length)[:, None] * rates).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def _rotate(x: Float[Tensor, "... T Dh"]) -> Float[Tensor, "... T Dh"]:
    """Rotary positions, on neighbouring pairs of dimensions."""
    cos, sin = _angles(*x.shape[-2:])
    quarter = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + quarter * sin
