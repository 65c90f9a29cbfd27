"""SHRP (#41): an encoder whose layers have experts of one head each; every token uses one, and only the most used one is kept.

"SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression", arXiv:2512.20635 (2025). A whole encoder layer,
attention and MLP, becomes

    e_h = softmax(q_h k_h^T / sqrt(Dh)) v_h        [B, T, Dh]                 expert h: its queries, keys and values, with biases
    p = softmax(x W_g);   h* = argmax p;   z = e_{h*} (1 + p_{h*} - stopgrad(p_{h*}))        of each token; the gate's value is 1
    y = LayerNorm(x + GELU(z W_1) W_2)             W_1 [Dh, F], W_2 [F, D]: one expander, shared by the experts

Fine-tune with `train_experts`, count with `usage` which experts win (the share of tokens, padding aside), and keep the winner
of each layer with `with_one_expert`: router and other experts go, and the layer computes what it did for tokens of that expert.

Queries, keys, values and W_2 come from the checkpoint, W_1 is the mean over heads of W_O[h] times the old W_1, the norm is the
last one of the layer. An expert layer does not compute what the layer did: it has to be trained. It replaces the MLP as well, so
compare it at equal parameters, not at equal heads.

Only the paper's abstract describes the method; all but the sizes (56.95M parameters of BERT-base's 109.48M, as published) is our
reading. The balance, 0.01 H sum_h P_h f_h, acts in the first half of training: without it one expert wins at once, and with it to
the end none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.layout import Block
from manyheads.model.linear import base_of, bias_of, features_of, projection_matrix
from manyheads.model.offloading import own_copy
from manyheads.model.weights.converted import conversion, conversions_of, converted_class, submodule
from manyheads.model.weights.copies import settled
from manyheads.model.weights.slices import HeadMap, Slices, head_map
from manyheads.progress import Bar
from manyheads.training import Batch, Progress, TrainSettings, fit

BALANCE = 0.01
TUNING = TrainSettings(
    steps=500, rows=32, rate=1e-4, warmup=20, decay=0.5, betas=(0.9, 0.999), weight_decay=0.01, precision="fp32"
)
Keep = Literal["most", "least", "random"]
_BY_EXPERT = ("query", "key", "value")


class ExpertLayer(nn.Module):
    """An encoder layer of experts (formulas above). With one expert it has no router. `forced` sends all tokens to one."""

    def __init__(self, width: int, experts: int, head_dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.experts = experts
        self.query, self.key, self.value = (nn.Linear(width, experts * head_dim) for _ in range(3))
        self.router = nn.Linear(width, experts, bias=False) if experts > 1 else None
        self.expand, self.contract = nn.Linear(head_dim, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps)
        self.forced: int | None = None
        self.chosen: Int[Tensor, "B T"] | None = None
        self.balance: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"chosen": None, "balance": None}  # graphs cannot be copied

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        mask = attention_mask
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None].bool()
        q, k, v = (
            part(hidden_states).unflatten(-1, (self.experts, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)  # [B, T, H, Dh]
        z = z[:, :, 0] if self.router is None else self._routed(hidden_states, z, mask)
        made: Tensor = self.norm(hidden_states + self.contract(F.gelu(self.expand(z))))
        return made

    def _routed(self, x: Tensor, e: Float[Tensor, "B T H Dh"], mask: Tensor | None) -> Float[Tensor, "B T Dh"]:
        assert self.router is not None
        p = F.softmax(self.router(x), -1)
        best = p.argmax(-1) if self.forced is None else torch.full_like(p[..., 0], self.forced, dtype=torch.long)
        self.chosen = best
        if self.training:
            self.balance = _balance(p, best, mask)
        at = best[..., None]
        share = p.gather(-1, at)
        return e.gather(2, at[..., None].expand(-1, -1, 1, e.shape[-1]))[:, :, 0] * (1 + share - share.detach())


def _balance(p: Float[Tensor, "B T H"], best: Int[Tensor, "B T"], mask: Tensor | None) -> Float[Tensor, ""]:
    """`H sum_h P_h f_h` over tokens that are no padding."""
    real = torch.ones_like(best, dtype=torch.bool)
    if mask is not None:
        seen = mask[:, 0, -1]  # an encoder's keys, the same for every query
        real = (seen if seen.dtype == torch.bool else seen > -1).expand_as(best)
    n = p.shape[-1]
    return n * (p[real].mean(0) * F.one_hot(best[real], n).to(p).mean(0)).sum()


@conversion("shrp")
def install(module: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Put layers of experts in the places that `settings` name. Their weights are new."""
    try:
        for layer in settings["layers"]:
            new = ExpertLayer(*(layer[name] for name in ("width", "experts", "head_dim", "hidden", "eps")))
            some = next(submodule(module, layer["path"]).parameters())
            owner, _, name = layer["path"].rpartition(".")
            setattr(submodule(module, owner), name, new.to(device=some.device, dtype=some.dtype))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"these settings of expert layers do not fit {type(module).__name__}: {reason}.") from error


def _marked(module: Any, settings: Mapping[str, Any]) -> None:
    """Let the config say what was done, so that a saved model opens again."""
    steps = [step for step in conversions_of(module.config) if step["conversion"] != "shrp"]
    own: Any = type(module)
    kind = converted_class(own)
    module.config.manyheads = [*steps, {"conversion": "shrp", "settings": dict(settings)}]
    module.config.__class__ = kind.config_class
    module.__class__ = kind
    module.config.__dict__.pop("model_type", None)  # that of the class


@dataclass(frozen=True)
class SHRP:
    """Turn layers of an encoder into layers of experts: `SHRP().convert(model)`. `layers` (None: all) is how much is saved."""

    layers: Sequence[int] | None = None
    seed: int = 0

    def convert(self, model: HeadModel) -> PreTrainedModel:
        """A copy with layers of experts, to be trained; `model` stays as it is.

        What it gives is no `HeadModel`: an expert has no output projection of its own that could be read.
        `UnsupportedError` for decoders, and for layers that are not attention and an MLP with a norm after each (BERT).
        """
        base = settled(model)
        wanted = list(range(model.n_layers)) if self.layers is None else sorted(set(self.layers))
        if not wanted or not 0 <= wanted[0] <= wanted[-1] < model.n_layers:
            raise InputError(f"layers are {self.layers}; give some of 0 to {model.n_layers - 1}.")
        if model.reads_tokens and model.is_causal:
            raise UnsupportedError(f"{type(model.plain).__name__} is a decoder, and SHRP is for encoders.")
        paths = {part: path for path, part in base.plain.named_modules()}
        maps = head_map(base, wanted)
        parts = {
            layer: _Parts.of(base.layout.blocks[layer], maps[layer], type(base.plain).__name__) for layer in wanted
        }
        sizes = dict(width=base.layout.hidden_size, experts=base.n_heads, head_dim=base.head_dim)
        settings = [
            {"path": paths[base.layout.blocks[layer].module], "hidden": part.hidden, "eps": part.norm.eps, **sizes}
            for layer, part in parts.items()
        ]
        module: PreTrainedModel = own_copy(base.plain)
        install(module, {"layers": settings})
        _marked(module, {"layers": settings})
        generator = torch.Generator().manual_seed(self.seed)
        for one, part in zip(settings, parts.values(), strict=True):
            part.fill(module.get_submodule(one["path"]), generator)
        return module


@dataclass(frozen=True)
class _Parts:
    """What an expert layer starts with: the heads, both maps of the MLP, and the layer's last norm."""

    heads: HeadMap
    first: nn.Module
    second: nn.Module
    norm: Any

    @classmethod
    def of(cls, block: Block, heads: HeadMap, name: str) -> _Parts:
        inside = {*block.attention.modules(), *(base_of(part.module) for part in heads.parts)}
        linear = [m for m in block.module.modules() if m not in inside and features_of(m) is not None]
        shapes = [features_of(m) for m in linear]
        norms = block.post_norms
        if norms is None or len(linear) != 2 or shapes[0] != shapes[1][::-1] or not isinstance(norms[1], nn.LayerNorm):  # type: ignore[index]
            raise UnsupportedError(
                f"a layer of {name} is not attention and an MLP of two maps with a LayerNorm after each (as BERT's), so it "
                "cannot become one of experts."
            )
        return cls(heads, linear[0], linear[1], norms[1])

    @property
    def hidden(self) -> int:
        return features_of(self.first)[1]  # type: ignore[index]

    @torch.no_grad()
    def fill(self, layer: Any, generator: torch.Generator) -> None:
        for new, old in ((layer.query, self.heads.query), (layer.key, self.heads.key), (layer.value, self.heads.value)):
            _fill(new, old.matrices().transpose(1, 2).flatten(0, 1), _bias(old))
        W_1 = projection_matrix(self.first)
        b_O, b_1 = (0 if bias is None else bias for bias in (bias_of(self.heads.output.module), bias_of(self.first)))
        _fill(
            layer.expand,
            (self.heads.output.matrices().mean(0) @ W_1).T,
            b_O @ W_1 + b_1 if torch.is_tensor(b_O) else b_1,
        )
        _fill(layer.contract, projection_matrix(self.second).T, bias_of(self.second))
        layer.norm.load_state_dict(self.norm.state_dict())
        if layer.router is not None:
            layer.router.weight.copy_(0.02 * torch.randn(layer.router.weight.shape, generator=generator))


def _fill(new: nn.Linear, weight: Tensor, bias: Any) -> None:
    new.weight.copy_(weight)
    new.bias.zero_()
    if bias is not None:
        new.bias.add_(bias)


def _bias(part: Slices) -> Tensor | None:
    bias = bias_of(part.module)
    return None if bias is None else bias[part.index.flatten().to(bias.device)]


def expert_layers(module: nn.Module) -> list[ExpertLayer]:
    """The layers of experts, in order."""
    return [part for part in module.modules() if isinstance(part, ExpertLayer)]


def train_experts(
    module: PreTrainedModel,
    batches: Callable[[int], Batch],
    settings: TrainSettings = TUNING,
    *,
    balance: float = BALANCE,
    bar: Bar = Bar(),
) -> None:
    """Fine-tune in place on `batches(i)`, what the module's forward takes, with labels. Balance acts for half of the steps."""
    half = (settings.steps or 0) // 2
    on = [True]

    def counted(progress: Progress, _: torch.optim.Optimizer) -> None:
        on[0] = progress.step < half

    place = next(module.parameters()).device
    loss = partial(_loss, balance=lambda: balance if on[0] else 0.0)
    fit(module.requires_grad_(True), batches, settings, loss=loss, after_step=counted, bar=bar)
    module.to(place).eval()  # type: ignore[arg-type]


def _loss(module: nn.Module, batch: Batch, balance: Callable[[], float]) -> Float[Tensor, ""]:
    loss: Tensor = module(**batch).loss
    layers = [layer for layer in expert_layers(module) if layer.balance is not None]
    if layers:
        loss = loss + balance() * torch.stack([layer.balance for layer in layers]).mean()  # type: ignore[misc]
    for layer in layers:
        layer.balance = None
    return loss


@torch.no_grad()
def usage(module: PreTrainedModel, batches: Iterable[Batch]) -> Float[Tensor, "L H"]:
    """The share of tokens that each expert wins, by layer; padding (`attention_mask` 0) has no vote."""
    layers = [layer for layer in expert_layers(module) if layer.router is not None]
    if not layers:
        raise InputError(f"{type(module).__name__} has no layers of several experts; convert it with SHRP first.")
    counts = torch.zeros(len(layers), layers[0].experts)
    for batch in batches:
        module(**batch)
        for total, layer in zip(counts, layers, strict=True):
            assert layer.chosen is not None
            real = batch.get("attention_mask", torch.ones_like(layer.chosen)).bool()
            total += torch.bincount(layer.chosen[real].cpu(), minlength=layer.experts)
    return counts / counts.sum(-1, keepdim=True)


def kept(shares: Float[Tensor, "L H"], keep: Keep = "most", seed: int = 0) -> list[int]:
    """The expert of each layer that is used most; the least used, or one drawn at random, to compare with."""
    if keep == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(shares.shape[1], (len(shares),), generator=generator).tolist()
    return (shares if keep == "most" else -shares).argmax(-1).tolist()


def with_one_expert(module: PreTrainedModel, experts: Sequence[int]) -> PreTrainedModel:
    """A copy with one expert in each layer: no router, and the queries, keys and values of no other expert."""
    layers = expert_layers(module)
    if len(experts) != len(layers):
        raise InputError(f"{len(experts)} experts were named for {len(layers)} layers of experts; give one for each.")
    for expert, layer in zip(experts, layers, strict=True):
        if not 0 <= expert < layer.experts:
            raise InputError(f"expert {expert} was named, and a layer has {layer.experts}.")
    small: PreTrainedModel = own_copy(module)
    done = next(step["settings"] for step in conversions_of(module.config) if step["conversion"] == "shrp")
    settings = {"layers": [{**layer, "experts": 1} for layer in done["layers"]]}
    for one, expert in zip(settings["layers"], experts, strict=True):
        own = slice(expert * one["head_dim"], (expert + 1) * one["head_dim"])
        layer = ExpertLayer(one["width"], 1, one["head_dim"], one["hidden"], one["eps"])
        state = small.get_submodule(one["path"]).state_dict()
        state = {name: v[own] if name.split(".")[0] in _BY_EXPERT else v for name, v in state.items()}
        layer.load_state_dict({name: v for name, v in state.items() if not name.startswith("router")})
        small.set_submodule(one["path"], layer.to(next(iter(state.values()))))
    _marked(small, settings)
    return small.eval()
