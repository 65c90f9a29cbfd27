"""Causal head gating: which heads help a task, which stand in its way, and which do not matter, by learned gates.

Nam et al., arXiv:2505.13737 (NeurIPS 2025). Every head's z is multiplied by a gate g = sigmoid(x) in [0, 1]; the model is
frozen, and the gates of all heads together minimise, over a task's prompts,

    mean of -log p(answer | prompt, g)  -  lambda mean over heads of clip(x, -4, 4)        in nats

first with lambda = 0 from random gates, then from there twice: with lambda > 0, which keeps what does no harm (G+), and with
lambda < 0, which removes what does no good (G-). A fit is random, so there are several; scores are means over fits, in [0, 1]:

    facilitating = G-        interfering = 1 - G+        irrelevant = G+ (1 - G-)

Contrastive: one fit that keeps log p of the task to retain and lowers that of the task to forget, with lambda > 0, so that only
gates that must close do: forgotten = 1 - G.

The paper's sums are means here as in its code (learning rates and lambda belong to them). Every fit draws rows of its own and
has its gradient clipped by itself, so that fits are independent samples; G+ and G- are fitted side by side in one batch. The
second stage starts from clip(x): beyond the clip nothing pushes, so a gate that drifted there in the first would stay wherever
chance had left it, and a head that does nothing be called facilitating or interfering. So a head has a role if its gate
moves the mean log-likelihood by more than about 4 lambda / (L H) nats: the push is lambda / (L H), and g (1 - g) at most 1/4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation.metrics import log_probability
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.edit.edits import Edit, ScaleAndShift
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import frozen
from manyheads.model.read.readers import Activation
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.model.replay.sweeping import only_last
from manyheads.progress import Bar
from manyheads.tasks import Example, Task, TaskBatch, encode

MAX_TOKENS = 2048  # of one pass forward and back
CLIP, CLIP_DIFFERENCE = 4.0, 5.0
PAPER = "arXiv:2505.13737"
ABOUTS = {
    about.name: about
    for about in (
        About(
            name="facilitating",
            title="Facilitating",
            what="Stays open although gates are pushed shut: the task needs it.",
            formula="gate fitted to the task's log-likelihood under pressure towards 0 (G-)",
            unit="gate",
            paper=PAPER,
            threshold=0.5,
        ),
        About(
            name="interfering",
            title="Interfering",
            what="Closes although gates are pushed open: the task goes better without it.",
            formula="1 - gate fitted to the task's log-likelihood under pressure towards 1 (1 - G+)",
            unit="gate",
            paper=PAPER,
            threshold=0.5,
        ),
        About(
            name="irrelevant",
            title="Irrelevant",
            what="Open or shut as the pressure has it: the task does not notice.",
            formula="G+ (1 - G-)",
            unit="gate",
            paper=PAPER,
            threshold=0.5,
        ),
        About(
            name="forgotten",
            title="Forgotten",
            what="Closes when one task is to be forgotten and another kept: only the first needs it.",
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


@dataclass(frozen=True)
class Schedule:
    """How a fit goes: `steps` of Adam on `rows` prompts for each of the two stages, learning rates falling linearly."""

    steps: int = 100
    rows: int = 16
    first: tuple[float, float] = (0.3, 0.03)
    second: tuple[float, float] = (0.5, 0.1)
    pressure: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or self.pressure <= 0:
            raise InputError(
                f"a fit needs steps and rows of at least 1 and a pressure above 0, not {self.steps}, {self.rows} and "
                f"{self.pressure}."
            )


def gating(
    model: HeadModel,
    task: Source,
    *,
    n: int = 256,
    fits: int = 4,
    schedule: Schedule | None = None,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head as facilitating, interfering or irrelevant for `task` (formulas above), from `fits` fits on `n` prompts.

    Prompts are of the task's split "train", so that a check on "test" is on others. `n` of the result counts fits, over which
    its standard error is. `meta` has the answers' negative log-likelihood on 64 prompts with all heads, at G+ and at G- (nats),
    and each score's least and largest value over fits: a head that scores high in some fits only is in one of several circuits
    that suffice. `bar` gets 1 for each step of the first stage and each of the second.
    """
    schedule = schedule or Schedule()
    batch = _batch(model, task, n, seed)
    x, generator = _random_gates(model, fits, seed)
    fit = _Fit(model, schedule, generator, batch.input_ids.shape[1], bar)

    def loss(gates: Weights) -> Float[Tensor, "M"]:
        return -fit.log_p(batch, fit.draw(len(batch), len(gates)), gates).mean(1)

    x = fit.run(loss, x, torch.zeros(fits), schedule.first)
    pressure = schedule.pressure * torch.tensor([1.0, -1.0]).repeat_interleave(fits)
    up, down = fit.run(loss, x.clamp(-CLIP, CLIP).repeat(2, 1, 1), pressure, schedule.second).sigmoid().split(fits)
    gated = {"all heads": torch.ones_like(up[:1]), "G+": up, "G-": down}
    more = {"nll": {name: fit.nll(batch, min(len(batch), 64), gates) for name, gates in gated.items()}}
    scores = {"facilitating": down, "interfering": 1 - up, "irrelevant": up * (1 - down)}
    settings = {"task": _name(task), "n": len(batch), "fits": fits, **asdict(schedule)}
    return {name: _scores(model, name, value, seed, settings, more) for name, value in scores.items()}


def contrastive_gating(
    model: HeadModel,
    retain: Source,
    forget: Source,
    *,
    n: int = 256,
    fits: int = 4,
    schedule: Schedule | None = None,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadScores:
    """Score every head by whether it must close for `forget` to be lost while `retain` stays (formula above).

    Row i of one task is set against row i of the other: best are two wordings of the same questions. `meta` has both tasks'
    negative log-likelihood with all heads and with the gates.
    """
    schedule = schedule or Schedule(first=(0.5, 0.05))
    kept, lost = _batch(model, retain, n, seed), _batch(model, forget, n, seed)
    count = min(len(kept), len(lost))
    x, generator = _random_gates(model, fits, seed)
    width = kept.input_ids.shape[1] + lost.input_ids.shape[1]
    fit = _Fit(model, schedule, generator, width, bar)

    def loss(gates: Weights) -> Float[Tensor, "M"]:
        rows = fit.draw(count, len(gates))
        keep, lose = fit.log_p(kept, rows, gates), fit.log_p(lost, rows, gates)
        return ((lose - keep.detach()).clamp(min=-CLIP_DIFFERENCE) - keep).mean(1)

    gates = fit.run(loss, x, torch.full((fits,), schedule.pressure), schedule.first).sigmoid()
    nll = {
        f"{what}, {name}": fit.nll(batch, min(count, 64), some)
        for what, batch in (("retain", kept), ("forget", lost))
        for name, some in (("all heads", torch.ones_like(gates[:1])), ("gated", gates))
    }
    settings = {"retain": _name(retain), "forget": _name(forget), "n": count, "fits": fits, **asdict(schedule)}
    return _scores(model, "forgotten", 1 - gates, seed, settings, {"nll": nll})


def roles(scores: dict[str, HeadScores]) -> dict[str, HeadSet]:
    """Every head under the role that it scores highest in."""
    names = ("irrelevant", "facilitating", "interfering")
    best = np.stack([scores[name].values for name in names]).argmax(0)
    shape = scores[names[0]].shape
    return {
        name: HeadSet([(int(layer), int(h)) for layer, h in np.argwhere(best == i)], shape)
        for i, name in enumerate(names)
    }


class _Fit:
    """Fits of one model on prompts of `width` tokens: where their rows come from, and how their loss falls."""

    def __init__(
        self,
        model: HeadModel,
        schedule: Schedule,
        generator: torch.Generator,
        width: int,
        bar: Bar,
    ) -> None:
        self.model, self.schedule, self.generator, self.bar = model, schedule, generator, bar
        self.at_once = max(1, MAX_TOKENS // (schedule.rows * width))

    def draw(self, count: int, fits: int) -> Int[Tensor, "M R"]:
        """Rows of a batch of `count`, for each fit its own."""
        return torch.randint(count, (fits, self.schedule.rows), generator=self.generator)

    def run(
        self,
        loss: Callable[[Weights], Float[Tensor, "M"]],
        x: Weights,
        pressure: Float[Tensor, "M"],
        rates: tuple[float, float],
    ) -> Weights:
        """`x` after `steps` of Adam on `loss(sigmoid(x)) - pressure mean(clip(x))`, each fit by itself."""
        x, pressure = x.clone().requires_grad_(), pressure.to(x.device)
        optimizer = torch.optim.Adam([x], lr=rates[0])
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, rates[1] / rates[0], self.schedule.steps)
        with frozen(self.model.plain), torch.enable_grad():
            for _ in range(self.schedule.steps):
                x.grad = torch.zeros_like(x)
                for some in torch.arange(len(x)).split(self.at_once):
                    total = loss(x[some].sigmoid()) - pressure[some] * x[some].clamp(-CLIP, CLIP).mean((1, 2))
                    x.grad += torch.autograd.grad(total.sum(), x)[0]
                x.grad /= x.grad.norm(dim=(1, 2), keepdim=True).clamp(min=1.0)
                optimizer.step()
                falling.step()
                self.bar(1)
        return x.detach()

    def log_p(self, batch: TaskBatch, rows: Int[Tensor, "M R"], gates: Weights) -> Float[Tensor, "M R"]:
        """Log-probability of the answers of `rows`, in nats, each row under its fit's gates."""
        flat = rows.flatten()
        ids, mask = batch.input_ids[flat], batch.attention_mask[flat]
        start = int(mask.any(0).long().argmax())
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


def _batch(model: HeadModel, task: Source, n: int, seed: int) -> TaskBatch:
    if isinstance(task, TaskBatch):
        return task
    if model.tokenizer is None:
        raise InputError("gates are fitted on prompts, which need a tokenizer; open the model with tokenizer=.")
    return encode(task, model.tokenizer, n, seed, "train")


def _random_gates(model: HeadModel, fits: int, seed: int) -> tuple[Weights, torch.Generator]:
    if fits < 1:
        raise InputError(f"fits is {fits}; ask for at least 1, or for 2 and more to have a standard error.")
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
