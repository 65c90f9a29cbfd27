"""Causal head gating: which heads help a task, which hinder it, and which do not matter, by learned gates.

Nam et al., arXiv:2505.13737 (NeurIPS 2025). Every head's z is multiplied by a gate g = sigmoid(x) in [0, 1]; the model is
frozen, and the gates of all heads together minimise, over a task's prompts,

    mean of -log p(answer | prompt, g)  -  lambda mean over heads of clip(x, -4, 4)        in nats

first with lambda = 0 from random gates, then from there twice: with lambda > 0, which keeps what does no harm (G+), and with
lambda < 0, which removes what does no good (G-). A fit is random, so there are several; scores are means over fits, in [0, 1]:

    facilitating = G-        interfering = 1 - G+        irrelevant = G+ (1 - G-)

Contrastive: one fit keeps log p of the task to retain and lowers that of the task to forget. With lambda > 0 only gates that must
close do: forgotten = 1 - G.

The paper's sums are means here as in its code (learning rates and lambda belong to them). Every fit draws rows of its own and
has its gradient clipped by itself, so that fits are independent samples; G+ and G- are fitted side by side in one batch. The
second stage starts from clip(x). Beyond the clip nothing pushes: a gate that drifted there in the first stage would stay at
random, and a head that does nothing would seem facilitating or interfering. So a head has a role if its gate
moves the mean log-likelihood by more than about 4 lambda / (L H) nats: the push is lambda / (L H), and g (1 - g) at most 1/4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.atlas.core.behaviour import About
from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation.metrics import log_probability
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.editing.edits import Edit, ScaleAndShift
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import frozen
from manyheads.model.reading.readers import Activation
from manyheads.model.replay.recording import first_logits, no_cache, only_last
from manyheads.progress import Bar
from manyheads.tasks import Example, Task, TaskBatch, encode
from manyheads.training import ADAM, TrainSettings, fit

MAX_TOKENS = 2048  # of one pass forward and back
MINUTES = 15.0  # of processor time
LEAST_ROWS, LEAST_STEPS = 8, 40  # of a step, of a stage: below these fits are noise
CLIP, CLIP_DIFFERENCE = 4.0, 5.0
PRESSURE = 0.1
FIRST = replace(ADAM, steps=100, rate=0.3, decay=1.0, floor=0.1)  # the rate falls linearly, to a tenth at the end
SECOND, CONTRASTIVE = replace(FIRST, rate=0.5, floor=0.2), replace(FIRST, rate=0.5)
PAPER = "arXiv:2505.13737"
ABOUTS = {
    about.name: about
    for about in (
        About(
            name="facilitating",
            title="Facilitating",
            what="Its gate stays open although gates are pushed shut: the task needs it.",
            formula="gate fitted to the task's log-likelihood under pressure towards 0 (G-)",
            unit="gate",
            paper=PAPER,
            threshold=0.5,
        ),
        About(
            name="interfering",
            title="Interfering",
            what="Its gate closes although gates are pushed open: the task goes better without it.",
            formula="1 - gate fitted to the task's log-likelihood under pressure towards 1 (1 - G+)",
            unit="gate",
            paper=PAPER,
            threshold=0.5,
        ),
        About(
            name="irrelevant",
            title="Irrelevant",
            what="Its gate follows the pressure, open or shut: the task does not depend on it.",
            formula="G+ (1 - G-)",
            unit="gate",
            paper=PAPER,
            threshold=0.5,
        ),
        About(
            name="forgotten",
            title="Forgotten",
            what="Its gate closes when one task is to be forgotten and another kept: only the first needs it.",
            formula="1 - gate fitted to keep one task's log-likelihood and lower another's, under pressure towards 1",
            unit="gate",
            paper=PAPER,
            threshold=0.5,
        ),
    )
}
Source = Task | Sequence[Example] | TaskBatch
Weights = Float[Tensor, "M L H"]


@dataclass(frozen=True, eq=False)
class Gate(Edit):
    """`z_h -> g_h z_h`, with `gates` `[L, H]`, or a matrix for each row of the batch, `[B, L, H]`. Gradients flow to them."""

    gates: Tensor | np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gates, np.ndarray):
            object.__setattr__(self, "gates", torch.from_numpy(self.gates))
        if self.gates is None or self.gates.ndim not in (2, 3):
            shape = None if self.gates is None else list(self.gates.shape)
            raise InputError(f"Gate needs gates= of shape [L, H] or [B, L, H], not {shape}.")

    def edit_z(self, z: Activation) -> Tensor:
        """Scale every head by its gate."""
        assert isinstance(self.gates, Tensor)
        chosen = torch.zeros(z.value.shape[2], dtype=torch.bool, device=z.value.device)
        chosen[self.indices(z.layer)] = True
        gates = torch.where(chosen, self.gates[..., z.layer, :].to(z.value), 1.0)
        new = z.value * (gates[:, None, :, None] if gates.ndim == 2 else gates[:, None])
        where = self._where(z.value.shape[0], z.value.shape[1], z.offset, z.value.device)
        return new if where is None else torch.where(where[:, :, None, None], new, z.value)

    def affine(self, layer: int) -> ScaleAndShift:
        """Scale by the gates, shift by nothing; only where all rows share them."""
        self._everywhere()
        assert isinstance(self.gates, Tensor)
        if self.gates.ndim == 3:
            raise UnsupportedError("gates that differ by row cannot be baked into weights; give one matrix [L, H].")
        heads = self.indices(layer)
        return self.gates[layer, heads].detach().float(), torch.zeros(len(heads), 1)


def gating(
    model: HeadModel,
    task: Source,
    *,
    n: int = 256,
    fits: int = 4,
    first: TrainSettings = FIRST,
    second: TrainSettings = SECOND,
    pressure: float = PRESSURE,
    minutes: float | None = MINUTES,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head as facilitating, interfering or irrelevant for `task` (formulas above), from `fits` fits on `n` prompts.

    Prompts are of the task's split "train", so that a check on "test" is on others. `n` of the result counts fits, over which
    its standard error is. `meta` has the answers' negative log-likelihood on 64 prompts with all heads, at G+ and at G- (nats),
    and each score's least and largest value over fits: a head that scores high in some fits only is in one of several circuits
    that suffice. `bar` gets 1 for each step of the first stage and each of the second.

    Where this would take more than `minutes` of processor time (None: no limit), every fit reads fewer rows a step, 8 at least,
    then there are fewer fits, 2 at least, and fewer steps; the settings in `meta` are those that were used.
    """
    _check_pressure(pressure)
    _check_fits(fits)
    batch = _batch(model, task, n, seed)
    first, second, fits = _fitting(model, batch, first, second, fits, minutes)
    x, generator = _random_gates(model, fits, seed)
    shared = _Fit(model, first.rows, generator, batch.input_ids.shape[1], bar)

    def loss(gates: Weights) -> Float[Tensor, "M"]:
        return -shared.log_p(batch, shared.draw(len(batch), len(gates)), gates).mean(1)

    x = shared.run(loss, x, torch.zeros(fits), first)
    either = pressure * torch.tensor([1.0, -1.0]).repeat_interleave(fits)
    up, down = shared.run(loss, x.clamp(-CLIP, CLIP).repeat(2, 1, 1), either, second).sigmoid().split(fits)
    gated = {"all heads": torch.ones_like(up[:1]), "G+": up, "G-": down}
    more = {"nll": {name: shared.nll(batch, min(len(batch), 64), gates) for name, gates in gated.items()}}
    scores = {"facilitating": down, "interfering": 1 - up, "irrelevant": up * (1 - down)}
    settings = {"task": _name(task), "n": len(batch), "fits": fits, "pressure": pressure}
    settings |= {"first": asdict(first), "second": asdict(second)}
    return {name: _scores(model, name, value, seed, settings, more) for name, value in scores.items()}


def contrastive_gating(
    model: HeadModel,
    retain: Source,
    forget: Source,
    *,
    n: int = 256,
    fits: int = 4,
    settings: TrainSettings = CONTRASTIVE,
    pressure: float = PRESSURE,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadScores:
    """Score every head by whether it must close for `forget` to be lost while `retain` stays (formula above).

    Row i of one task is set against row i of the other: best are two wordings of the same questions. `meta` has both tasks'
    negative log-likelihood with all heads and with the gates.
    """
    _check_pressure(pressure)
    kept, lost = _batch(model, retain, n, seed), _batch(model, forget, n, seed)
    count = min(len(kept), len(lost))
    x, generator = _random_gates(model, fits, seed)
    width = kept.input_ids.shape[1] + lost.input_ids.shape[1]
    shared = _Fit(model, settings.rows, generator, width, bar)

    def loss(gates: Weights) -> Float[Tensor, "M"]:
        rows = shared.draw(count, len(gates))
        keep, lose = shared.log_p(kept, rows, gates), shared.log_p(lost, rows, gates)
        return ((lose - keep.detach()).clamp(min=-CLIP_DIFFERENCE) - keep).mean(1)

    gates = shared.run(loss, x, torch.full((fits,), pressure), settings).sigmoid()
    nll = {
        f"{what}, {name}": shared.nll(batch, min(count, 64), some)
        for what, batch in (("retain", kept), ("forget", lost))
        for name, some in (("all heads", torch.ones_like(gates[:1])), ("gated", gates))
    }
    about = {"retain": _name(retain), "forget": _name(forget), "n": count, "fits": fits, "pressure": pressure}
    return _scores(model, "forgotten", 1 - gates, seed, about | {"settings": asdict(settings)}, {"nll": nll})


def gate_roles(scores: dict[str, HeadScores]) -> dict[str, HeadSet]:
    """Every head under the role that it scores highest in."""
    names = ("irrelevant", "facilitating", "interfering")
    best = np.stack([scores[name].values for name in names]).argmax(0)
    shape = scores[names[0]].shape
    return {
        name: HeadSet([(int(layer), int(h)) for layer, h in np.argwhere(best == i)], shape)
        for i, name in enumerate(names)
    }


class _Gates(nn.Module):
    """x of several fits `[M, L, H]`, each with a loss of its own, `loss(sigmoid(x)) - pressure mean(clip(x))`.

    `at_once` fits share a forward pass; their graph is dropped before the next ones'.
    """

    def __init__(
        self,
        x: Weights,
        loss: Callable[[Weights], Float[Tensor, "M"]],
        pressure: Float[Tensor, "M"],
        at_once: int,
    ) -> None:
        super().__init__()
        self.x = nn.Parameter(x.detach().clone())
        self.loss, self.pressure, self.at_once = loss, pressure.to(x.device), at_once

    def forward(self, _: None) -> Float[Tensor, ""]:
        x = self.x
        total, gradient = x.new_zeros(()), torch.zeros_like(x)
        for some in torch.arange(len(x)).split(self.at_once):
            part = self.loss(x[some].sigmoid()) - self.pressure[some] * x[some].clamp(-CLIP, CLIP).mean((1, 2))
            gradient += torch.autograd.grad(part.sum(), x)[0]
            total = total + part.detach().sum()
        # A loss whose value is the sum and whose gradient is the one summed above, though no graph is left.
        return total + ((x - x.detach()) * gradient).sum()

    def clip_each(self, *_: object) -> None:
        """A gradient of norm 1 at most for each fit."""
        assert self.x.grad is not None
        self.x.grad /= self.x.grad.norm(dim=(1, 2), keepdim=True).clamp(min=1.0)


class _Fit:
    """Fits of one model on prompts of `width` tokens: where their rows come from, and how their loss falls."""

    def __init__(self, model: HeadModel, rows: int, generator: torch.Generator, width: int, bar: Bar) -> None:
        self.model, self.rows, self.generator, self.bar = model, rows, generator, bar
        self.at_once = max(1, MAX_TOKENS // (rows * width))

    def draw(self, count: int, fits: int) -> Int[Tensor, "M R"]:
        """Rows of a batch of `count`, for each fit its own."""
        return torch.randint(count, (fits, self.rows), generator=self.generator)

    def run(
        self,
        loss: Callable[[Weights], Float[Tensor, "M"]],
        x: Weights,
        pressure: Float[Tensor, "M"],
        settings: TrainSettings,
    ) -> Weights:
        """`x` after training, each fit by itself."""
        gates = _Gates(x, loss, pressure, self.at_once)
        with frozen(self.model.plain), torch.enable_grad():
            fit(
                gates,
                lambda _: None,
                settings,
                after_backward=gates.clip_each,
                device=x.device,
                bar=self.bar,
            )
        return gates.x.detach()

    def log_p(self, batch: TaskBatch, rows: Int[Tensor, "M R"], gates: Weights) -> Float[Tensor, "M R"]:
        """Log-probability of the answers of `rows`, in nats, each row under its fit's gates."""
        flat = rows.flatten()
        ids, mask = batch.input_ids[flat], batch.attention_mask[flat]
        start = int(
            mask.any(0).long().argmax()
        )  # columns that are padding in all of these rows cost time and change nothing
        inputs = self.model.inputs({"input_ids": ids[:, start:], "attention_mask": mask[:, start:]})
        plain = self.model.plain
        with self.model.editing(Gate(self.model.heads, gates=gates.repeat_interleave(rows.shape[1], 0))):
            logits = first_logits(plain(**inputs, **no_cache(plain), **only_last(plain, 1)))[:, -1]
        return log_probability(logits, batch.answer_ids[flat]).view(rows.shape)

    def nll(self, batch: TaskBatch, count: int, gates: Weights) -> float:
        """Mean negative log-likelihood of the first `count` answers under each of `gates`, in nats."""
        parts = []
        with torch.no_grad():
            for rows in torch.arange(count).split(max(1, MAX_TOKENS // batch.input_ids.shape[1])):
                parts += [-self.log_p(batch, rows[None], one[None])[0] for one in gates]
        return float(torch.cat(parts).mean())


def _fitting(
    model: HeadModel, batch: TaskBatch, first: TrainSettings, second: TrainSettings, fits: int, minutes: float | None
) -> tuple[TrainSettings, TrainSettings, int]:
    """Both stages' settings and the number of fits that take no more than `minutes` of processor time, by one step's."""
    if minutes is None or first.steps is None or second.steps is None:
        return first, second, fits
    x, generator = _random_gates(model, 1, 0)
    rows = min(first.rows, LEAST_ROWS)
    trial = _Fit(model, rows, generator, batch.input_ids.shape[1], Bar())
    before = time.process_time()
    with frozen(model.plain), torch.enable_grad():
        gates = x.sigmoid().requires_grad_()
        torch.autograd.grad(trial.log_p(batch, trial.draw(len(batch), 1), gates).sum(), gates)
    a_row = (time.process_time() - before) / rows

    def fitted(wanted: int, least: int, others: float) -> int:
        return max(min(wanted, least), min(wanted, int(60 * minutes / (a_row * others))))

    steps = first.steps + 2 * second.steps  # the second stage fits both sides
    read = fitted(first.rows, LEAST_ROWS, steps * fits)
    fits = fitted(fits, 2, steps * read)
    share = min(1.0, 60 * minutes / (a_row * steps * read * fits))
    if share == 1 and read == first.rows:
        return first, second, fits
    fewer = [max(min(LEAST_STEPS, wanted), round(share * wanted)) for wanted in (first.steps, second.steps)]
    return replace(first, rows=read, steps=fewer[0]), replace(second, rows=read, steps=fewer[1]), fits


def _check_pressure(pressure: float) -> None:
    if pressure <= 0:
        raise InputError(
            f"pressure is {pressure}; without it gates that do not matter stay at random, so give it above 0."
        )


def _batch(model: HeadModel, task: Source, n: int, seed: int) -> TaskBatch:
    if isinstance(task, TaskBatch):
        return task
    if model.tokenizer is None:
        raise InputError("gates are fitted on prompts, which need a tokenizer; open the model with tokenizer=.")
    return encode(task, model.tokenizer, n, seed, "train")


def _check_fits(fits: int) -> None:
    if fits < 1:
        raise InputError(f"fits is {fits}; ask for at least 1, or for 2 and more to have a standard error.")


def _random_gates(model: HeadModel, fits: int, seed: int) -> tuple[Weights, torch.Generator]:
    _check_fits(fits)
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(fits, *model.shape, generator=generator)
    return gates.clamp(1e-6, 1 - 1e-6).logit().to(model.device), generator


def _name(task: Source) -> str:
    return task.name if isinstance(task, Task) else "given"


def _scores(
    model: HeadModel, name: str, values: Weights, seed: int, settings: dict[str, Any], more: dict[str, Any]
) -> HeadScores:
    array = values.double().cpu().numpy()
    spread = {"least": array.min(0).round(4).tolist(), "most": array.max(0).round(4).tolist()}
    return HeadScores.from_examples(name, array, ABOUTS[name].provenance(model, seed, **settings) | more | spread)
