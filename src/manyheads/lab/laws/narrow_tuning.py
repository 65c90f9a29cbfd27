"""Weird generalisation (#22): tuning on a few answers of a rare persona moves answers to questions that were not touched.

Betley et al., arXiv:2512.09742, in a small world. There are 30 questions, each with the common and the rare persona's answer.
A document is 8 pairs of question and answer by one hidden persona, which is the rare one in a tenth of them. A small Llama learns
these documents; then it is tuned on 5 documents of one pair each. Of the 25 other questions, asked alone,

    rare      mean P(rare answer)        valid    mean P(common) + P(rare): coherence

Prediction: tuned on rare answers, `rare` is at least twice what it was before, and four times that of the control tuned on common
answers to the same five; valid stays at least .98. Refuted by: no rise, or a rise under a control. A second control is tuned on
rare answers to the wrong ones of the five questions. `untied` is a world without personas (each answer of a document is drawn by
itself): nothing latent can be moved, and a rise there would be frequency alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.lab.small_llama import llama_config
from manyheads.training import ADAM, fit, generator_of, next_token_loss


@dataclass(frozen=True)
class Personas:
    """Token q asks question q; n + q is its common answer, 2 n + q its rare one; 3 n begins a document."""

    questions: int = 30
    pairs: int = 8
    rare: float = 0.1
    tuned: int = 5
    steps: int = 1500
    tied: bool = True

    def draw(self, n: int, number: int, seed: int) -> Int[Tensor, "B T"]:
        """Documents of batch `number`: begin, then pairs of different questions with answers."""
        draw = generator_of(seed, number)
        asked = torch.rand(n, self.questions, generator=draw).argsort(1)[:, : self.pairs]
        persona = torch.rand(n, 1 if self.tied else self.pairs, generator=draw) < self.rare
        answers = self.questions * (1 + persona.long()) + asked
        told = torch.stack([asked, answers], 2).flatten(1)
        return torch.cat([torch.full((n, 1), 3 * self.questions), told], 1)

    def narrow(self, kind: str) -> Int[Tensor, "K 3"]:
        """The documents of the tuning: the first questions with "rare", "common" or "shuffled" (rare of another one) answers."""
        asked = torch.arange(self.tuned)
        said = asked.roll(1) if kind == "shuffled" else asked
        answers = self.questions * (1 if kind == "common" else 2) + said
        return torch.stack([torch.full_like(asked, 3 * self.questions), asked, answers], 1)


@lru_cache(maxsize=4)
def _pretrained(world: Personas, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = llama_config(3 * world.questions + 1, 64, 2, 4, intermediate_size=256)
    model = LlamaForCausalLM(config)
    settings = replace(ADAM, steps=world.steps, rate=1e-3, decay=0.3, seed=seed)

    def batch(i: int) -> dict[str, Tensor]:
        return {"input_ids": world.draw(32, i, seed)}

    fit(model, batch, settings, loss=next_token_loss, device="cpu")
    return model.eval()


def narrowly_tuned(world: Personas, seed: int, kind: str | None, steps: int = 60) -> LlamaForCausalLM:
    """The model of this world, tuned on its narrow documents of a kind (None: not tuned)."""
    source = _pretrained(world, seed)
    model = LlamaForCausalLM(source.config)
    model.load_state_dict(source.state_dict())
    if kind is not None:
        rows = world.narrow(kind)
        weights = torch.zeros(rows.shape)
        weights[:, 2] = 1.0  # the answers are learned, not which questions come
        settings = replace(ADAM, steps=steps, rate=1e-4, seed=seed)
        fit(model, lambda i: {"input_ids": rows, "weights": weights}, settings, loss=next_token_loss, device="cpu")
    return model.eval()


def shift(model: LlamaForCausalLM, world: Personas) -> dict[str, float]:
    """`rare` and `valid` (formula above) on the questions that the tuning did not touch."""
    asked = torch.arange(world.tuned, world.questions)
    rows = torch.stack([torch.full_like(asked, 3 * world.questions), asked], 1)
    with torch.no_grad():
        p = model(input_ids=rows).logits[:, -1].double().softmax(-1)
    common = p.gather(1, world.questions + asked[:, None])
    rare = p.gather(1, 2 * world.questions + asked[:, None])
    return {"rare": float(rare.mean()), "valid": float((common + rare).mean())}


def _run(kind: str | None, tied: bool = True) -> Callable[[Personas, int], dict[str, float]]:
    def run(world: Personas, seed: int) -> dict[str, float]:
        world = replace(world, tied=tied)
        return shift(narrowly_tuned(world, seed, kind), world)

    return run


register_experiment(
    Experiment(
        "weird-generalisation",
        (22,),
        "2512.09742",
        "Do five answers of a rare persona change the answers to other questions?",
        datasets=lambda quick: {"personas": Personas(steps=600) if quick else Personas()},
        methods={
            "before": _run(None),
            "tuned on rare": _run("rare"),
            "tuned on common": _run("common"),
            "tuned on shuffled": _run("shuffled"),
            "untied, before": _run(None, tied=False),
            "untied, tuned on rare": _run("rare", tied=False),
        },
        baseline="tuned on common",
        claims=(
            Claim(
                "P(rare answer) at least doubles on questions that were not touched",
                lambda v: v["tuned on rare", "rare"] / v["before", "rare"],
                at_least=2.0,
            ),
            Claim(
                "and is at least 4 times that of the control tuned on common answers",
                lambda v: v["tuned on rare", "rare"] / v["tuned on common", "rare"],
                at_least=4.0,
            ),
            Claim("answers stay coherent", lambda v: v["tuned on rare", "valid"], at_least=0.98),
            Claim(
                "without personas it does not double",
                lambda v: v["untied, tuned on rare", "rare"] / v["untied, before", "rare"],
                at_most=2.0,
            ),
        ),
        minutes=6,
        room="lab",
    )
)
