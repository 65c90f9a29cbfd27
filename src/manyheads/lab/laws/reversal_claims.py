"""Facts learned from scratch in one order (#23): the order that was trained is known, the other is not.

Berglund et al., arXiv:2309.12288. Names and descriptions are one token each. Half of the facts are documents "name is
description", the other half "description is name", so both kinds of token stand in both slots. A two-layer Llama learns
them by heart.

    forwards    share of the trained order done right, prediction 1
    reverse     share of the untrained order done right, prediction 0
    t           of log p(right name) - log p(another name trained in that slot), over facts; prediction |t| < 2

Refuted by: a reverse share above 2 of 100, or |t| of 2 and more. A control must lift it: with the reverse documents of half
of the facts added, those, and only those, are known backwards. The same network untrained knows nothing.
Departures: one document a fact, no paraphrases; a forward share below 1 says that the training was too short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.lab.small_llama import llama_config
from manyheads.training import ADAM, drawn_rows, fit, next_token_loss

IS = 0  # the token between the two


@dataclass(frozen=True)
class OneOrder:
    """`facts` pairs of a name and a description, the first half told name first, the second half description first."""

    facts: int = 200
    steps: int = 1500

    @property
    def pairs(self) -> Int[Tensor, "F 2"]:
        """Tokens (first, second) of each fact as it is told."""
        names, others = torch.arange(self.facts) + 1, torch.arange(self.facts) + 1 + self.facts
        half = torch.arange(self.facts) < self.facts // 2
        return torch.stack([names.where(half, others), others.where(half, names)], 1)


def sentences_of(pairs: Int[Tensor, "F 2"]) -> Int[Tensor, "F 3"]:
    """First IS second."""
    return torch.stack([pairs[:, 0], torch.full((len(pairs),), IS), pairs[:, 1]], 1)


def learned(data: OneOrder, seed: int, *, both: bool = False, steps: int | None = None) -> LlamaForCausalLM:
    """A two-layer Llama trained on the second token of every document; with `both` every second fact is told both ways."""
    pairs = data.pairs
    rows = sentences_of(torch.cat([pairs, pairs[::2].flip(1)]) if both else pairs)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        llama_config(2 * data.facts + 1, 64, 2, 4, intermediate_size=256, max_position_embeddings=8)
    )
    weights = torch.zeros(rows.shape)
    weights[:, 2] = 1.0
    steps = data.steps if steps is None else steps
    if steps:

        def batch(i: int) -> dict[str, Tensor]:
            chosen = drawn_rows(len(rows), 64, i, seed)
            return {"input_ids": rows[chosen], "weights": weights[chosen]}

        fit(
            model,
            batch,
            replace(ADAM, steps=steps, rate=1e-3, decay=0.3, seed=seed),
            loss=next_token_loss,
            device="cpu",
        )
    return model.eval()


def told(model: LlamaForCausalLM, pairs: Int[Tensor, "F 2"]) -> Float[Tensor, "F V"]:
    """Log-probabilities (nats) of what follows "first IS"."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=sentences_of(pairs)[:, :2]).logits
    return logits[:, -1].double().log_softmax(-1)


def right_share(model: LlamaForCausalLM, pairs: Int[Tensor, "F 2"]) -> float:
    """Share of pairs whose second token is the likeliest."""
    return float((told(model, pairs).argmax(-1) == pairs[:, 1]).double().mean())


def right_against_other(model: LlamaForCausalLM, pairs: Int[Tensor, "F 2"], seed: int) -> float:
    """The t of log p(right) - log p(another second token of the same half, which was trained in the same slot)."""
    log_p, half = told(model, pairs), len(pairs) // 2
    draw = torch.Generator().manual_seed(seed)
    shift = 1 + torch.randint(half - 1, (len(pairs),), generator=draw)
    place = torch.arange(len(pairs))
    other = pairs[place // half * half + (place % half + shift) % half, 1]
    gap = log_p.gather(1, pairs[:, 1:])[:, 0] - log_p.gather(1, other[:, None])[:, 0]
    return float(gap.mean() / (gap.std() / math.sqrt(len(gap))))


def _run(both: bool, untrained: bool = False) -> Callable[[OneOrder, int], dict[str, float]]:
    def run(data: OneOrder, seed: int) -> dict[str, float]:
        model = learned(data, seed, both=both, steps=0 if untrained else None)
        pairs = data.pairs
        reverse = pairs.flip(1)
        found = {"forwards": right_share(model, pairs), "t": abs(right_against_other(model, reverse, seed))}
        return found | {
            "reverse": right_share(model, reverse[1::2]),
            "reverse, told too": right_share(model, reverse[::2]),
        }

    return run


register_experiment(
    Experiment(
        "reversal",
        (23,),
        "2309.12288",
        "Does a model that learned A is B know that B is A?",
        datasets=lambda quick: {"facts": OneOrder(60, 600) if quick else OneOrder()},
        methods={"one order": _run(False), "half in both orders": _run(True), "untrained": _run(False, untrained=True)},
        baseline="one order",
        claims=(
            Claim("the trained order is known", lambda v: v["one order", "forwards"], at_least=0.99),
            Claim("of the other order at most 2 in 100 are right", lambda v: v["one order", "reverse"], at_most=0.02),
            Claim("the right name is no likelier than another one (|t|)", lambda v: v["one order", "t"], at_most=2.0),
            Claim(
                "facts told both ways are known both ways",
                lambda v: v["half in both orders", "reverse, told too"],
                at_least=0.99,
            ),
            Claim("and only those", lambda v: v["half in both orders", "reverse"], at_most=0.02),
        ),
        minutes=3,
        room="lab",
    )
)
