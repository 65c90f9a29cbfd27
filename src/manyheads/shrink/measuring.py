"""What a smaller model costs and what it lost, beside the model it was made from.

    parameters, bytes     of the weights, as `save_pretrained` writes them
    kv bytes              of keys and values after a context of so many tokens, as they lie in memory
    prefill, decode       seconds of a context and of one more token, divided by the model's own; both take turns, medians
    loss                  nats a token of the text that follows a context of prose
    needles               share of sentences in a context that are said word for word when asked for afterwards
    tasks                 share answered, of the families that the model answers or prefers before; their prompts are short and
                          leave a cut cache nothing to cut: these are for weights alone

Memory and time are measured on this machine, never computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from manyheads.errors import InputError
from manyheads.inputs import check_integer
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import takes
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.report.write import Reported
from manyheads.shrink.cache.attending import check_model
from manyheads.shrink.cache.haystacks import haystacks, needle_recall
from manyheads.shrink.cache.press import Press
from manyheads.tasks import get_task
from manyheads.tasks.texts import passages
from manyheads.tasks.verdicts import task_verdict

NEW = 64  # tokens whose loss is measured
TASKS = ("ioi", "by_example", "successor", "facts", "coloured_objects", "docstring")


@dataclass(frozen=True)
class Cost:
    """One model, or one press on it (see above); dictionaries are by length of context, or by task."""

    method: str
    ratio: float
    parameters: int
    weight_bytes: int
    kv_bytes: dict[int, int]
    prefill: dict[int, float]
    decode: dict[int, float]
    loss: float
    needles: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Shrunk(Reported):
    """Costs of the model as it was (`before`) and of everything made of it. `context` is how many tokens stood before those whose
    loss was measured."""

    model: str
    before: Cost
    after: list[Cost]
    context: int
    meta: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A row a cost, the model as it was first."""
        return pd.DataFrame([_flat(cost) for cost in (self.before, *self.after)])

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a file."""
        return asdict(self)


def _flat(cost: Cost) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in asdict(cost).items():
        row |= {f"{name} {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return row


def measure(
    model: HeadModel,
    variants: Mapping[tuple[str, float], Press | HeadModel],
    *,
    lengths: Sequence[int] = (512, 2048),
    texts: Sequence[str] | None = None,
    tasks: Sequence[str] = TASKS,
    n: int = 32,
    contexts: int = 4,
    rounds: int = 15,
    seed: int = 0,
    keep: Callable[[Cost], object] = lambda cost: None,
    bar: Bar = Bar(),
) -> Shrunk:
    """Measure `model` and its `variants`, `{(method, ratio): a press on it, or a model made of it}`.

    Contexts of `lengths` tokens; `n` examples a task; `contexts` contexts of five needles, of the shortest length; `texts` are
    prose for the loss (default: the bundled texts). `keep` is told each cost as soon as it is there. `InputError` for lengths
    beyond the model's positions, and without a tokenizer; `UnsupportedError` for a model that generates no text.
    """
    check_model(model)
    lengths = _lengths(model, lengths)
    context = _context(model, texts, max(lengths))
    step = bar.step("measuring", 1 + len(variants))
    of_weights = any(isinstance(variant, HeadModel) for variant in variants.values())
    asked = tasks if of_weights else ()
    known = [name for name in asked if not task_verdict(model, get_task(name), n=n, seed=seed).blind]
    given = _Given(lengths, context, texts, n, contexts, rounds, seed)
    before = given.cost("as it is", 0.0, model, model, Press(), known)
    step(1)
    after = []
    for (method, ratio), variant in variants.items():
        smaller, press = (variant, Press()) if isinstance(variant, HeadModel) else (model, variant)
        after.append(given.cost(method, ratio, model, smaller, press, known if smaller is not model else []))
        keep(after[-1])
        step(1)
    settings: dict[str, Any] = {"lengths": list(lengths), "n": n, "contexts": contexts, "rounds": rounds}
    meta = Provenance.of(model, "shrink", seed=seed, **settings).to_json()
    name = str(getattr(model.config, "_name_or_path", "") or type(model.plain).__name__).rstrip("/").rsplit("/", 1)[-1]
    return Shrunk(name, before, after, context, meta)


def _lengths(model: HeadModel, lengths: Sequence[int]) -> list[int]:
    most = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30) - NEW
    found = sorted({check_integer(length, "a length of --lengths", 2 * NEW) for length in lengths})
    if not found or found[-1] > most:
        raise InputError(
            f"contexts of {', '.join(map(str, found)) or 'no'} tokens were asked for; this model has positions for {most} and "
            f"{NEW} more."
        )
    return found


def _context(model: HeadModel, texts: Sequence[str] | None, longest: int) -> int:
    """The longest context for which there is prose: `longest`, or half of it, and so on."""
    length = longest
    while length >= NEW:
        try:
            passages(model, texts, n=1, length=length + NEW, seed=0)
            return length
        except InputError:
            length //= 2
    raise InputError(f"the texts hold no passage of {2 * NEW} tokens; give longer ones.")


@dataclass(frozen=True)
class _Given:
    """What all costs of one measurement have in common."""

    lengths: Sequence[int]
    context: int
    texts: Sequence[str] | None
    n: int
    contexts: int
    rounds: int
    seed: int

    def cost(
        self, method: str, ratio: float, base: HeadModel, model: HeadModel, press: Press, tasks: Sequence[str]
    ) -> Cost:
        timed = {length: self._timed(base, model, press, length) for length in self.lengths}
        hay = haystacks(model, self.contexts, self.lengths[0], seed=self.seed)
        return Cost(
            method,
            ratio,
            sum(parameter.numel() for parameter in model.plain.parameters()),
            sum(parameter.numel() * parameter.element_size() for parameter in model.plain.parameters()),
            {length: one[0] for length, one in timed.items()},
            {length: one[1] for length, one in timed.items()},
            {length: one[2] for length, one in timed.items()},
            loss_after(model, press, self.context, self.texts, seed=self.seed),
            float(needle_recall(model, press, hay).mean()),
            {name: task_verdict(model, get_task(name), n=self.n, seed=self.seed).answered for name in tasks},
        )

    def _timed(self, base: HeadModel, model: HeadModel, press: Press, length: int) -> tuple[int, float, float]:
        """Bytes of the cache, and prefill and decode as ratios to the model as it was."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(model.vocab_size, (1, length), generator=generator).to(model.device)
        changed = model is not base or type(press) is not Press
        plain, other = Read(base, None), Read(model, press if type(press) is not Press else None)
        kept, prefill = 0, []
        for _ in range(3):
            seconds = [one.context(ids) for one in ((plain, other) if changed else (plain,))]
            prefill.append(seconds[-1] / seconds[0])
            kept = other.nbytes if changed else plain.nbytes
        decode = []
        for _ in range(self.rounds):
            seconds = [one.token(ids[:, :1]) for one in ((plain, other) if changed else (plain,))]
            decode.append(seconds[-1] / seconds[0])
        return kept, float(np.median(prefill)), float(np.median(decode))


class Read:
    """A model that reads a context and then token by token, under a press or with Transformers' own cache (None)."""

    def __init__(self, model: HeadModel, press: Press | None) -> None:
        self.model, self.press = model, press
        self.cache: Any = None
        if press is not None:
            with press(model) as self.block:  # what a press finds out about a model first is no part of its speed
                pass

    def _active(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.press is None else self.block.active()

    @torch.inference_mode()
    def _seconds(self, ids: Tensor) -> float:
        plain: Any = self.model.plain
        few: dict[str, Any] = {"logits_to_keep": 1} if takes(plain, "logits_to_keep") else {}
        started = time.perf_counter()
        plain(ids, past_key_values=self.cache, use_cache=True, **few)
        return time.perf_counter() - started

    def context(self, ids: Int[Tensor, "1 T"]) -> float:
        """Seconds to read a context into an empty cache."""
        with self._active():
            self.cache = DynamicCache(config=self.model.config) if self.press is None else self.block.new_cache()
            return self._seconds(ids)

    def token(self, ids: Int[Tensor, "1 1"]) -> float:
        """Seconds of one more token."""
        with self._active():
            return self._seconds(ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        if self.press is not None:
            return int(self.cache.nbytes)
        tensors = [getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values")]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))


@torch.inference_mode()
def loss_after(
    model: HeadModel, press: Press, context: int, texts: Sequence[str] | None = None, *, n: int = 8, seed: int = 0
) -> float:
    """Nats a token of the `NEW` tokens after `context` tokens of prose, read from the cache that `press` leaves of these."""
    rows = passages(model, texts, n=n, length=context + NEW, seed=seed).to(model.device)
    found: list[Float[Tensor, ""]] = []
    plain: Any = model.plain
    for row in rows:
        with press(model) as block:
            cache = block.new_cache()
            plain(row[None, : context - 1], past_key_values=cache)
            logits = plain(row[None, context - 1 : -1], past_key_values=cache).logits[0].float()
        found.append(-logits.log_softmax(-1).gather(-1, row[context:, None]).mean())
    return float(torch.stack(found).mean())
