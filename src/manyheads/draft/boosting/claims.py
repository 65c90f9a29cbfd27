"""Does a chain that corrects its first model beat other uses of the same cost? Tried on modular sums and on ladon.

Model 1 is trained for a number of steps. A chain of model 1 with itself then learns for as many operations as that took. Beside
it stands what they buy otherwise: a second model, trained by itself, averaged with the first; one model trained twice as long, at
its rate and at four times that; one of twice the layers; and LoRA on model 1 for as many steps as the chain, without readers and
suppression. A chain whose second model is the twin that was trained by itself costs three such trainings, and so does an average
of three.

    fixed     of the questions that model 1 answers wrongly, the share answered rightly
    broken    of those that it answers rightly, the share answered wrongly
    TFLOP     operations of training, counted on one step (all that was trained for the answer)
    seconds   of the processor, for the same
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.draft.boosting.chain import BoostedChain
from manyheads.draft.boosting.objective import BOOSTING
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.tasks.encoding import encode
from manyheads.tasks.families.coloured_objects import ColouredObjects
from manyheads.training import Batch, TrainSettings, fit, row_batches

Given = dict[str, Tensor]
NOTHING = dict.fromkeys(("accuracy", "fixed", "broken", "TFLOP", "seconds"), float("nan"))


@dataclass(frozen=True, eq=False)
class _Asked:
    """Rows to learn from and others to be judged by, as `input_ids`, `attention_mask` and `weights` (1 for what is asked).

    A row is one question, right if all that is asked for is. `start(seed, times)` gives a model to be trained, with that many
    times the usual layers.
    """

    train: Given
    test: Given
    start: Callable[[int, int], HeadModel]
    training: TrainSettings
    boosting: TrainSettings = BOOSTING
    parts: dict[str, Any] = field(default_factory=dict)
    deeper: bool = True

    def right(self, scores: Float[Tensor, "N T V"]) -> Tensor:
        """Which questions are answered rightly."""
        right = scores.argmax(-1) == self.test["input_ids"][:, 1:]
        return (right | ~(self.test["weights"][:, 1:] > 0)).all(1)


def _given(rows: Int[Tensor, "N T"], last: int, mask: Int[Tensor, "N T"] | None = None) -> Given:
    """Rows in which the `last` tokens are asked for."""
    weights = torch.zeros(rows.shape)
    weights[:, -last:] = 1
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows) if mask is None else mask, "weights": weights}


def _small_llama(vocab_size: int, seed: int, deeper: int) -> HeadModel:
    settings: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    settings |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 16}
    config = LlamaConfig(vocab_size=vocab_size, num_hidden_layers=2 * deeper, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_model(LlamaForCausalLM(config).eval())


@lru_cache
def _modular(steps: int, p: int = 59) -> _Asked:
    """`a + b` modulo 59, every number a token. A fifth of the pairs is held out."""
    a, b = (side.flatten() for side in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    rows = torch.stack([a, torch.full_like(a, p), b, torch.full_like(a, p + 1), (a + b) % p], 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    cut = len(rows) * 4 // 5
    training = TrainSettings(steps=steps, rows=256, rate=1e-3, warmup=50, weight_decay=1.0, precision="fp32")
    start = partial(_small_llama, p + 2)
    boosting, parts = replace(BOOSTING, rate=3e-3, weight_decay=0.1, rows=256), {"head_dim": 16}
    return _Asked(_given(rows[:cut], 1), _given(rows[cut:], 1), start, training, boosting, parts)


@lru_cache
def _colours(steps: int) -> _Asked:
    """Colours that a list completes, of things held out: ladon answers a third, and is tuned on lists of other things."""
    model = open_model()

    def encoded(n: int, split: Any) -> Given:
        batch = encode(ColouredObjects(phrasing="completed"), model.tokenizer, n, 0, split)
        rows = torch.cat([batch.input_ids, batch.answer_ids[:, None]], 1)
        return _given(rows, 1, torch.cat([batch.attention_mask, torch.ones_like(rows[:, :1])], 1))

    training = TrainSettings(steps=steps, rows=8, rate=1e-4, warmup=2, weight_decay=0.01, precision="fp32")
    boosting = replace(BOOSTING, rows=8, warmup=2)
    return _Asked(encoded(800, "train"), encoded(500, "test"), lambda *_: model, training, boosting, deeper=False)


# What is compared


@lru_cache(maxsize=8)
def _trained(
    data: _Asked, seed: int, longer: int = 1, deeper: int = 1, faster: int = 1
) -> tuple[HeadModel, float, float]:
    """A model trained by itself, for `longer` times the steps at `faster` times the rate; TFLOP, and processor seconds."""
    begin = data.start(seed, deeper)

    def loss(module: Any, batch: Batch) -> Tensor:
        given = begin.inputs({name: batch[name] for name in ("input_ids", "attention_mask")})
        asked = batch["weights"][:, 1:] > 0
        return F.cross_entropy(module(**given, use_cache=False).logits[:, :-1][asked], batch["input_ids"][:, 1:][asked])

    def train(steps: int) -> Any:
        module = copy.deepcopy(begin.plain)
        settings = replace(data.training, steps=steps, rate=faster * data.training.rate, seed=seed)
        fit(module, row_batches(data.train, settings.rows, seed), settings, loss=loss)
        return module

    steps = longer * (data.training.steps or 0)
    each, started = _operations(lambda: train(1)), time.process_time()
    module = train(steps)
    seconds = time.process_time() - started
    return open_model(module.eval(), tokenizer=begin.tokenizer), each * steps, seconds


@lru_cache(maxsize=2)
def _boosted(data: _Asked, seed: int, readers: bool = True, twin: bool = False) -> tuple[BoostedChain, float, float]:
    """A chain of model 1 with itself, or with its `twin`, and what it took with the models.

    Without `readers` LoRA alone learns, without suppression.
    """
    first, operations, seconds = _trained(data, 2 * seed)
    second, *more = _trained(data, 2 * seed + 1) if twin else (first, 0.0, 0.0)

    def train(steps: int) -> BoostedChain:
        chain = BoostedChain([first, second], strength=float(readers), seed=seed, **data.parts)
        chain.fit(data.train, replace(data.boosting, steps=steps, seed=seed), beta=float(readers))
        return chain

    each = _operations(lambda: train(1))
    steps, started = max(1, int(operations / each)), time.process_time()
    chain = train(steps)
    cost = operations + each * steps + more[0], seconds + time.process_time() - started + more[1]
    return chain, *cost


def _operations(work: Callable[[], object]) -> float:
    """TFLOP of some work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def _alone(which: int = 0, **how: int) -> Callable[[_Asked, int], dict[str, float]]:
    def run(data: _Asked, seed: int) -> dict[str, float]:
        if "deeper" in how and not data.deeper:
            return NOTHING  # ladon has but one depth
        model, *cost = _trained(data, 2 * seed + which, **how)
        return _measured(data, seed, model.logits(_inputs(data)), *cost)

    return run


def _averaged(n: int) -> Callable[[_Asked, int], dict[str, float]]:
    def run(data: _Asked, seed: int) -> dict[str, float]:
        numbers = (2 * seed, 2 * seed + 1, 2 * seed + 1001)[:n]  # the third is no other seed's
        models = [_trained(data, number) for number in numbers]
        p = torch.stack([model.logits(_inputs(data)).softmax(-1) for model, *_ in models]).sum(0)
        return _measured(data, seed, p, sum(one[1] for one in models), sum(one[2] for one in models))

    return run


def _chain(last: bool = False, readers: bool = True, twin: bool = False) -> Callable[[_Asked, int], dict[str, float]]:
    def run(data: _Asked, seed: int) -> dict[str, float]:
        chain, *cost = _boosted(data, seed, readers, twin)
        scores = chain.each_logits(_inputs(data))[-1] if last else chain.logits(_inputs(data))
        return _measured(data, seed, scores, *cost)

    return run


def _inputs(data: _Asked) -> Given:
    return {name: data.test[name] for name in ("input_ids", "attention_mask")}


def _measured(
    data: _Asked, seed: int, scores: Float[Tensor, "N T V"], operations: float, seconds: float
) -> dict[str, float]:
    before = data.right(_trained(data, 2 * seed)[0].logits(_inputs(data))[:, :-1])
    right = data.right(scores[:, :-1])
    return {
        "accuracy": float(right.float().mean()),
        "fixed": float(right[~before].float().mean()),
        "broken": float((~right[before]).float().mean()),
        "TFLOP": operations,
        "seconds": seconds,
    }


def _datasets(quick: bool) -> dict[str, _Asked]:
    if quick:
        return {"sums": _modular(20), "colours": _colours(2)}
    return {"sums": _modular(225), "colours": _colours(10)}


def _gain(over: str, of: str = "chain") -> Callable[[Values], float]:
    return lambda v: v[of, "accuracy"] - v[over, "accuracy"]


_LORA = _gain("LoRA, as long", of="chain, last model alone")

register_experiment(
    Experiment(
        "llm-boost",
        (13,),
        "2512.22309",
        "Does a model that reads another's states correct it, and is it worth what it costs?",
        datasets=_datasets,
        methods={
            "model 1": _alone(),
            "another": _alone(1),
            "average of the two": _averaged(2),
            "chain": _chain(),
            "chain, last model alone": _chain(last=True),
            "twice as long": _alone(longer=2),
            "twice as long, four times the rate": _alone(longer=2, faster=4),
            "twice as deep": _alone(deeper=2),
            "LoRA, as long": _chain(last=True, readers=False),
            "chain of twins": _chain(twin=True),
            "average of three": _averaged(3),
        },
        baseline="model 1",
        claims=(
            Claim("it fixes 20 % of model 1's errors on sums", lambda v: v["chain", "fixed"], at_least=0.2, on="sums"),
            Claim(
                "and breaks 2 % of its right answers at most", lambda v: v["chain", "broken"], at_most=0.02, on="sums"
            ),
            Claim("it beats the average of two models on sums", _gain("average of the two"), at_least=0.0, on="sums"),
            Claim("and on colours", _gain("average of the two"), at_least=0.0, on="colours"),
            Claim("it beats one model trained twice as long", _gain("twice as long"), at_least=0.0),
            Claim("and four times as fast", _gain("twice as long, four times the rate"), at_least=0.0),
            Claim("it beats one model of twice the depth", _gain("twice as deep"), at_least=0.0, on="sums"),
            Claim("its last model beats LoRA alone on sums", _LORA, at_least=0.0, on="sums"),
            Claim("and on colours", _LORA, at_least=0.0, on="colours"),
            Claim(
                "a chain of two twins beats an average of three models",
                _gain("average of three", of="chain of twins"),
                at_least=0.0,
            ),
        ),
        minutes=5,
        lower=frozenset({"broken", "TFLOP", "seconds"}),
        room="draft",
    )
)
