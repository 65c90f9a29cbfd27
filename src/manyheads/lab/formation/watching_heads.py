"""Heads while a model learns: their scores, the loss and the accuracy after every few updates, and the run without some heads.

    previous token   mean over t of pattern[t, t - 1]
    induction        mean over t >= P of pattern[t, t - P + 1], on rows that are P random tokens twice over
    first token      mean over t of pattern[t, 0]                 all attention, in [0, 1] (Olsson et al., arXiv:2209.11895)

"What if this head never formed?" is asked by training from the same weights on the same batches with heads ablated (z = 0) at
every update (the clamping of Singh et al., arXiv:2404.07129, for any decoder). **Prediction:** ablated where it formed, the
head's work is done by others, later or not at all. The two runs differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from manyheads.errors import InputError
from manyheads.heads import HeadLike, HeadScores, HeadSet
from manyheads.inputs import check_integer
from manyheads.lab.small_llama import llama_config
from manyheads.model.editing.edits import Ablate, Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Reader
from manyheads.progress import Bar
from manyheads.report import Reported
from manyheads.training import ADAM, Batch, Progress, TrainSettings, fit, generator_of, next_token_loss
from manyheads.training.batches import on_device

SCORES = ("previous token", "induction", "first token")
Look = Callable[
    [HeadModel], Mapping[str, HeadScores]
]  # what else to score at each moment, such as behaviours of the atlas


@dataclass(frozen=True)
class HeadHistory(Reported):
    """One run: at each of `updates` the loss (nats), the accuracy, and each score [M, L, H]. `without` names ablated heads."""

    updates: Int[np.ndarray, " M"]
    loss: Float[np.ndarray, " M"]
    accuracy: Float[np.ndarray, " M"]
    scores: dict[str, Float[np.ndarray, "M L H"]]
    without: tuple[str, ...] = ()
    other: HeadHistory | None = None

    def at(self, moment: int, score: str) -> HeadScores:
        """A score at one moment, as every score of heads."""
        values = self.scores[score][moment]
        return HeadScores(score, values, np.zeros_like(values), 0)

    def to_frame(self) -> pd.DataFrame:
        """A row a moment and head: update, loss, accuracy, head, and its scores."""
        moments, layers, heads = next(iter(self.scores.values())).shape
        index = pd.MultiIndex.from_product([range(moments), range(layers), range(heads)]).to_frame(index=False)
        frame = pd.DataFrame({"update": self.updates[index[0]], "loss": self.loss[index[0]]})
        frame["accuracy"] = self.accuracy[index[0]]
        frame["head"] = [f"L{layer}H{head}" for layer, head in zip(index[1], index[2], strict=True)]
        return frame.assign(**{name: values.ravel() for name, values in self.scores.items()})


def said_twice(n: int, period: int, vocabulary: int, draw: torch.Generator) -> Int[Tensor, "n T"]:
    """Rows of `period` random tokens, twice over."""
    half = torch.randint(vocabulary, (n, period), generator=draw)
    return torch.cat([half, half], 1)


class _Patterns(Reader):
    site = "attention"  # type: ignore[assignment]

    def __init__(self, period: int) -> None:
        self.period, self.found = period, dict[int, Tensor]()

    def read(self, call: AttentionCall) -> None:  # type: ignore[override]
        pattern = call.pattern.detach().float()
        back = [pattern.diagonal(-1, 2, 3), pattern.diagonal(1 - self.period, 2, 3), pattern[..., 1:, 0]]
        back[1] = back[1][..., 1:]  # from position P on, where the token was seen before
        self.found[call.layer] = torch.stack([one.mean((0, 2)) for one in back])


def pattern_scores(model: HeadModel, rows: Int[Tensor, "B T"]) -> Float[np.ndarray, "S L H"]:
    """`SCORES` of every head on rows of two equal halves (formulas above)."""
    reader = _Patterns(rows.shape[1] // 2)
    with torch.no_grad():
        model.look({"input_ids": rows.to(model.device)}, reader)
    return torch.stack([reader.found[layer] for layer in sorted(reader.found)], 1).cpu().numpy()


def scores_of(model: HeadModel, rows: Int[Tensor, "B T"], more: Look | None) -> dict[str, Float[np.ndarray, "L H"]]:
    """`SCORES` by name, and those of `more`."""
    found = dict(zip(SCORES, pattern_scores(model, rows), strict=True))
    return found | ({} if more is None else {name: one.values for name, one in more(model).items()})


def watch_heads(
    module: nn.Module,
    batches: Callable[[int], Batch],
    held: Batch,
    settings: TrainSettings,
    *,
    every: int = 20,
    period: int = 16,
    without: Sequence[HeadLike] = (),
    more: Look | None = None,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadHistory:
    """Train any decoder of Transformers, in place, on next tokens; look at its heads and at the batch `held` every few updates.

    `without` are ablated in every pass, also when it is looked at. `more` scores heads in other ways too. `InputError` for a head
    that does not exist.
    """
    check_integer(every, "every", 1)
    check_integer(period, "period", 2)
    model = open_model(module)
    chosen = model.head_set(without) if without else ()
    edits: list[Edit] = [Ablate(chosen)] if chosen else []
    rows = said_twice(64, period, model.vocab_size, generator_of(seed, 10**6 - 3))
    kept: list[tuple[int, float, float, dict[str, np.ndarray]]] = []

    def look(update: int) -> None:
        module.eval()
        with torch.no_grad(), model.editing(*edits):
            loss, right = judged_rows(module, on_device(held, model.device))
            kept.append((update, loss, right, scores_of(model, rows, more)))
        module.train()

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        with model.editing(*edits):
            return next_token_loss(module, batch)

    def after(progress: Progress, _: torch.optim.Optimizer) -> None:
        if progress.step % every == 0:
            look(progress.step)

    look(0)
    fit(module, batches, replace(settings, seed=seed), loss=loss, after_step=after, device=model.device, bar=bar)
    module.eval()
    updates, losses, rights, found = zip(*kept, strict=True)
    scores = {name: np.stack([one[name] for one in found]) for name in found[0]}
    names = tuple(str(head) for head in chosen)
    return HeadHistory(np.array(updates), np.array(losses), np.array(rights), scores, names)


def repeats_history(
    *,
    layers: int = 2,
    heads: int = 4,
    steps: int = 600,
    every: int = 20,
    period: int = 16,
    vocabulary: int = 32,
    without: Sequence[HeadLike] = (),
    more: Look | None = None,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadHistory:
    """A small Llama learns to repeat `period / 2` to `period` random tokens; what is said again counts. With `without` also that.

    The period differs from row to row: with one for all, heads learn a distance and need no match. `more` scores heads in other
    ways too. `seed` draws weights and rows, the same for both runs. The first of both has the other as `other`.
    """
    for name, value in (("layers", layers), ("heads", heads), ("steps", steps), ("vocabulary", vocabulary)):
        check_integer(value, name, 1)
    if every > steps:
        raise InputError(f"every is {every}, and there are {steps} steps; look more often.")
    without = tuple(
        HeadSet(without, (layers, heads))
    )  # a head that does not exist is refused before the first training

    def batch(number: int) -> Batch:
        draw = generator_of(seed, number)
        periods = torch.randint(period // 2, period + 1, (64, 1), generator=draw)
        place = torch.arange(2 * period)
        rows = said_twice(64, period, vocabulary, draw).gather(1, place % periods)
        return {"input_ids": rows, "weights": (place > periods).float()}

    def run(ablated: Sequence[HeadLike]) -> HeadHistory:
        torch.manual_seed(seed)
        config = llama_config(vocabulary, 16 * heads, layers, heads, intermediate_size=32 * heads)
        model = LlamaForCausalLM(config)
        settings = replace(ADAM, steps=steps, rate=2e-3, warmup=20)
        told = bar.step("training" if not ablated else "training without them", steps)
        return watch_heads(
            model,
            batch,
            batch(10**6 - 1),
            settings,
            every=every,
            period=period,
            without=ablated,
            more=more,
            seed=seed,
            bar=told,
        )

    with torch.random.fork_rng(devices=[]):
        first = run(())
        return replace(first, other=run(without)) if without else first


def judged_rows(module: nn.Module, batch: Batch) -> tuple[float, float]:
    """The loss, and the share of weighted tokens that are right."""
    logits = module(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    weights = batch["weights"][:, 1:] if "weights" in batch else torch.ones_like(targets, dtype=torch.float)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
    right = (logits.argmax(-1) == targets).float()
    total = weights.sum().clamp_min(1e-6)
    return float((losses * weights).sum() / total), float((right * weights).sum() / total)
