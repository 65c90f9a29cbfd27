"""Does one head find box and mask of what a phrase means, by the phrase, with a shared first convolution (#37)?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.evaluation.experiment import Claim, Experiment, Values, register_experiment
from manyheads.vision.core.boxes import box_iou
from manyheads.vision.finding.grounding import TRAINING, Found, Grounder, train_grounder
from manyheads.vision.finding.phrased_scenes import phrased_digits, phrased_shapes
from manyheads.vision.finding.phrases import Phrased

TRAIN, TEST, STEPS = 2500, 300, 600  # pictures, pictures, steps


def grounding_facts(model: Grounder, phrased: Phrased) -> dict[str, float]:
    """Percent of boxes with an IoU of at least .5, and the mean IoU of masks.

    `named` are phrases that name a thing, `placed` those that say where it stands to another (of more than four words).
    """
    found = model.find(phrased.pixels[phrased.scene], phrased.phrases)
    right, masks = box_hits(found, phrased), mask_iou(found, phrased)
    placed = torch.tensor([len(phrase.split()) > 4 for phrase in phrased.phrases])
    facts = {"boxes": 100 * float(right.mean()), "masks": float(masks.mean())}
    for name, where in (("named", ~placed), ("placed", placed)):
        if bool(where.any()):
            facts[f"boxes {name}"] = 100 * float(right[where].mean())
    return facts


def box_hits(found: Found, phrased: Phrased) -> Float[Tensor, "M"]:
    """1 for each phrase whose box has an IoU of at least .5 with the true one."""
    return (torch.cat([box_iou(a[None], b[None]) for a, b in zip(found.boxes, phrased.boxes, strict=True)]) >= 0.5)[
        :, 0
    ].float()


def mask_iou(found: Found, phrased: Phrased) -> Float[Tensor, "M"]:
    """IoU of each phrase's mask with the true one."""
    both = (found.masks & phrased.masks).flatten(1).sum(1)
    return both / (found.masks | phrased.masks).flatten(1).sum(1)


@torch.no_grad()
def heads_that_read(model: Grounder, phrased: Phrased) -> dict[str, float]:
    """By how many points boxes get worse when one head that looks at the words writes nothing: "block 1, head 0" and so on."""
    before = grounding_facts(model, phrased)["boxes"]
    looking: list[tuple[str, nn.MultiheadAttention]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and name.endswith((".read", ".multihead_attn")):
            part, number, _ = name.split(".")
            looking.append((f"{part.removesuffix('s')} {number}", module))
    lost = {}
    for place, module in looking:
        kept = module.out_proj.weight.clone()
        for head in range(module.num_heads):
            mine = slice(head * module.head_dim, (head + 1) * module.head_dim)
            module.out_proj.weight[:, mine] = 0
            lost[f"{place}, head {head}"] = before - grounding_facts(model, phrased)["boxes"]
            module.out_proj.weight.copy_(kept)
    return lost


def _by_words(values: Values) -> float:
    """How many points of boxes the right phrases make."""
    return values["shared", "boxes"] - values["shared, phrases shuffled", "boxes"]


@lru_cache(2)
def _scenes(kind: str, small: bool, seed: int) -> tuple[Phrased, Phrased]:
    n, m = (16, 8) if small else (TRAIN, TEST)
    if kind == "shapes":
        return phrased_shapes(n, 2 * seed), phrased_shapes(m, 2 * seed + 1)
    return phrased_digits(n, 2 * seed), phrased_digits(m, 2 * seed + 1, "test")


@lru_cache(2)
def _trained(kind: str, steps: int, seed: int, shared: bool) -> Grounder:
    train, _ = _scenes(kind, steps < STEPS, seed)
    return train_grounder(train, replace(TRAINING, steps=steps, seed=seed), shared=shared)


def _run(shared: bool) -> Callable[[tuple[str, int], int], dict[str, float]]:
    def run(data: tuple[str, int], seed: int) -> dict[str, float]:
        kind, steps = data
        return grounding_facts(_trained(kind, steps, seed, shared), _scenes(kind, steps < STEPS, seed)[1])

    return run


def _run_shuffled(data: tuple[str, int], seed: int) -> dict[str, float]:
    """The same model, asked by phrases that belong to other pictures."""
    kind, steps = data
    facts = grounding_facts(_trained(kind, steps, seed, True), _scenes(kind, steps < STEPS, seed)[1].shuffled())
    return {name: facts[name] for name in ("boxes", "masks")}


register_experiment(
    Experiment(
        "phrases",
        (37,),
        "2504.16145",
        "Does one head find box and mask of what a phrase means among coloured shapes, with a shared first convolution?",
        datasets=lambda quick: {"shapes": ("shapes", 10 if quick else STEPS)},
        methods={"shared": _run(True), "separate": _run(False), "shared, phrases shuffled": _run_shuffled},
        baseline="separate",
        claims=(
            Claim("at least 85 % of boxes are right at an IoU of .5", lambda v: v["shared", "boxes"], at_least=85),
            Claim("the mean IoU of masks is at least .75", lambda v: v["shared", "masks"], at_least=0.75),
            Claim("with shuffled phrases at least 40 points of boxes fewer are right", _by_words, at_least=40),
            Claim(
                "with separate first convolutions at most 1 point of boxes more are right",
                lambda v: v["separate", "boxes"] - v["shared", "boxes"],
                at_most=1,
            ),
        ),
        minutes=20,
        room="vision",
    )
)

register_experiment(
    Experiment(
        "phrases-on-photographs",
        (37,),
        "2504.16145",
        "Are written digits on photographs found by phrases such as 'the seven left of the three'?",
        datasets=lambda quick: {"digits": ("digits", 10 if quick else STEPS)},
        methods={"shared": _run(True), "shared, phrases shuffled": _run_shuffled},
        baseline="shared, phrases shuffled",
        claims=(Claim("with shuffled phrases at least 40 points of boxes fewer are right", _by_words, at_least=40),),
        minutes=10,
        room="vision",
    )
)
