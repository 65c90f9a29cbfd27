"""Hidden-state optimisation (#83, HSO): while a text is read, its past is corrected by how well it foretold what came.

Yoshida and Gimpel, arXiv:2112.08653, and Yoshida's thesis, arXiv:2408.16241. The states S are the keys and values that the
model caches. A text is read in windows; for each

    nll[t] = -log p(x[t] | S, window so far)     nats, the window's targets, scored before S moves
    g      = d sum_t nll[t] / dS                 S of the past and of the window itself, [B, H, S, Dh] a layer
    S      <- S - eta * m / (sqrt(v) + eps)      m, v: Adam's moments of g, corrected for the steps that this state has taken

and the next window is read with the new S. Each state carries its own moments and age, so what enters later or leaves the memory
changes nothing for the others. The weights do not move. eta has the unit of a key or value; 0 is plain windowed scoring.

A window's inputs are `x[a:b]`, its targets `x[a+1:b+1]`: no token is ever scored with states that were updated on it. Few-shot
use: optimise the states of the demonstrations once, then score answers with them (`score_answers`).

The paper's details are our reading of its abstract and summaries. Ours: keys and values are moved, not the inputs of layers; one
step a window; eta 0.01 and windows of 32 tokens, chosen on ladon.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from manyheads.edit.learn.tuning import frozen_trunk
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import leaving
from manyheads.model.inputs import Text
from manyheads.model.replay.recording import first_logits
from manyheads.progress import Bar

PAPER = "arXiv:2112.08653"


@dataclass(frozen=True)
class StateSteps:
    """How states move: by `eta` once every `window` tokens; at most `memory` states are kept (default: all).

    `shuffled` is a control: each text's gradients are permuted with this seed over positions and features of a head, so that
    steps keep their size and lose their meaning.
    """

    eta: float = 1e-2
    window: int = 32
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    memory: int | None = None
    shuffled: int | None = None

    def __post_init__(self) -> None:
        if self.eta < 0 or self.window < 1 or (self.memory is not None and self.memory < 1):
            raise InputError(
                f"eta is {self.eta}, window {self.window}, memory {self.memory}; "
                "eta must be at least 0, window and memory at least 1."
            )


@dataclass
class OptimisedStates:
    """What reading left: `nll` of every token but the first, in nats, and the states, keys and values of each layer in turn."""

    nll: Float[Tensor, "B {length}-1"]
    states: list[Float[Tensor, "B H S Dh"]]
    length: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean nll, over all texts."""
        return float(self.nll.mean().exp())

    def cache(self) -> DynamicCache:
        """A fresh cache of the states, for the model to read on from at position `length`."""
        return _cache(self.states)


@dataclass
class _Moments:
    """Adam's m and v of every state, and how many steps each position has taken."""

    settings: StateSteps
    m: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    age: Tensor = field(default_factory=lambda: torch.zeros(0))

    def step(self, states: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The moved states; positions that are new begin with no moments."""
        first, second = self.settings.betas
        if not self.m:
            self.m = [torch.zeros_like(g[..., :0, :], dtype=torch.float32) for g in grads]
            self.v = [m.clone() for m in self.m]
        new = states[0].shape[-2] - len(self.age)
        self.age = F.pad(self.age.to(states[0].device), (0, new)) + 1
        scale_m, scale_v = (1 / (1 - beta**self.age)[:, None] for beta in (first, second))
        moved = []
        for i, (state, grad) in enumerate(zip(states, grads, strict=True)):
            grad = grad.float()
            self.m[i] = first * F.pad(self.m[i], (0, 0, 0, new)) + (1 - first) * grad
            self.v[i] = second * F.pad(self.v[i], (0, 0, 0, new)) + (1 - second) * grad**2
            step = self.m[i] * scale_m / ((self.v[i] * scale_v).sqrt() + self.settings.eps)
            moved.append(state - (self.settings.eta * step).to(state))
        return moved

    def keep(self, n: int) -> None:
        """Forget all but the newest `n` positions."""
        self.m, self.v = [m[..., -n:, :] for m in self.m], [v[..., -n:, :] for v in self.v]
        self.age = self.age[-n:]


def optimise_states(
    model: HeadModel,
    inputs: Text | Int[Tensor, "B T"] | Mapping[str, Any],
    settings: StateSteps = StateSteps(),
    *,
    bar: Bar = Bar(),
) -> OptimisedStates:
    """Read texts of one length in windows and move the states after each; every text has states of its own.

    `bar` is called with the number of windows read. `InputError` for texts of different lengths, of fewer than two tokens or
    of more than the model has positions; `UnsupportedError` for one that is not causal, or caches no keys and values.
    """
    ids = _checked(model, inputs)
    length = ids.shape[1]
    generator = None if settings.shuffled is None else torch.Generator().manual_seed(settings.shuffled)
    states: list[Tensor] = []
    moments, nll = _Moments(settings), []
    with frozen_trunk(model), _tracked(model.layout.embedding):
        for start in range(0, length, settings.window):
            cache = _cache(states)
            losses = _losses(model, ids[:, start : start + settings.window + 1], settings.window, cache, start)
            leaves = _states(model, cache)
            states = [leaf.detach() for leaf in leaves]
            if losses.numel():
                nll.append(losses.detach())
                grads = list(torch.autograd.grad(losses.sum(), leaves))
                states = moments.step(states, grads if generator is None else _shuffled(grads, generator))
            if settings.memory is not None:
                states = [state[..., -settings.memory :, :] for state in states]
                moments.keep(settings.memory)
            bar(1)
    return OptimisedStates(torch.cat(nll, 1), states, length)


@torch.no_grad()
def score_answers(
    model: HeadModel, read: OptimisedStates, queries: Sequence[str] | Int[Tensor, "N Q"], answers: Int[Tensor, "C"]
) -> Float[Tensor, "N C"]:
    """The log-probability of each answer token after each query, read on from the states of one text.

    The largest classifies. Queries are tokenised as continuations. `InputError` if the states are of several texts.
    """
    if len(read.nll) != 1:
        raise InputError(f"the states are of {len(read.nll)} texts; give those of one prompt of demonstrations.")
    rows = _continuations(model, queries)
    scores = [
        _read(model, row[None].to(model.device), read.cache(), read.length)[0, -1].float().log_softmax(-1)
        for row in rows
    ]
    return torch.stack(scores)[:, answers.to(model.device)]


def _continuations(model: HeadModel, queries: Any) -> list[Tensor]:
    if isinstance(queries, Tensor):
        return list(torch.atleast_2d(queries))
    if model.tokenizer is None:
        raise InputError("queries as text need a tokenizer; give token ids, or open the model with tokenizer=.")
    return [torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in queries]


def _checked(model: HeadModel, inputs: Any) -> Tensor:
    if not model.is_causal:
        raise UnsupportedError(
            f"{type(model.plain).__name__} reads both ways; states are moved in causal language models."
        )
    batch = model.inputs(inputs)
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise InputError("the texts have different lengths; give token ids of one length, or one text at a time.")
    if ids.shape[1] < 2:
        raise InputError("a text has fewer than two tokens; there is nothing to predict.")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and ids.shape[1] > most:
        raise InputError(f"the texts have {ids.shape[1]} tokens, the model {most} positions; cut the texts into rows.")
    return ids


def _losses(model: HeadModel, ids: Tensor, window: int, cache: DynamicCache, start: int) -> Float[Tensor, "B W"]:
    """Nats of every token of `ids` but the first, read after the states in `cache`; only `window` tokens are read."""
    with torch.enable_grad():
        logits = _read(model, ids[:, :window], cache, start)[:, : ids.shape[1] - 1]
        return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


def _read(model: HeadModel, ids: Tensor, cache: DynamicCache, start: int) -> Tensor:
    """Logits of `ids`, whose first token has position `start`, after the states in `cache`, which grows."""
    plain = model.plain
    where = {}
    if "position_ids" in inspect.signature(plain.forward).parameters:
        where["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device).expand(len(ids), -1)
    return first_logits(plain(input_ids=ids, past_key_values=cache, use_cache=True, **where))


def _cache(states: list[Tensor]) -> DynamicCache:
    """A cache that never drops what slid out of a layer's window: the model's own masks see to that."""
    return DynamicCache(list(zip(states[::2], states[1::2], strict=True))) if states else DynamicCache()


def _states(model: HeadModel, cache: DynamicCache) -> list[Tensor]:
    layers = list(cache.layers)
    held = [tensor for layer in layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    states = [tensor for tensor in held if isinstance(tensor, Tensor) and tensor.numel()]
    if not states or len(states) != len(held) or any(state.ndim != 4 for state in states):
        raise UnsupportedError(
            f"{type(model.plain).__name__} does not cache keys and values in every layer; there are no states to move."
        )
    return states


def _shuffled(grads: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    flat = [grad.flatten(2) for grad in grads]
    orders = [torch.randperm(f.shape[-1], generator=generator).to(f.device) for f in flat]
    return [f[..., order].reshape(grad.shape) for f, order, grad in zip(flat, orders, grads, strict=True)]


def _tracked(embedding: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While this lasts, what `embedding` returns asks for gradients, so that states have them though no weight does."""
    return leaving(embedding, lambda output: output.detach().requires_grad_())
