"""Do heads with many positives, taken away after training, make a detector learn faster (#67)?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.evaluation.experiment import Claim, Experiment, Values, register_experiment
from manyheads.vision.core.precision import Boxes, average_precision
from manyheads.vision.finding.co_detr import HEADS, TRAINING, train_co_detr
from manyheads.vision.finding.detr import STRIDE, SmallDETR
from manyheads.vision.finding.scenes import BoxScenes, digit_scenes, shape_scenes

TRAIN, TEST = 600, 100  # pictures
STEPS, LOOKS = 1500, 10  # the plain detector is half-way at one of ten looks


def true_boxes(scenes: BoxScenes) -> list[Boxes]:
    """A list entry a picture."""
    rows = [(scenes.scene == i).nonzero()[:, 0] for i in range(len(scenes.pixels))]
    return [Boxes(scenes.boxes[row], scenes.classes[row], torch.ones(len(row))) for row in rows]


def norm_auc(tokens: Float[Tensor, "B T D"], inside: Bool[Tensor, "B T"]) -> float:
    """The chance that a token of a thing is longer than one of the ground (ties count half): 1 is perfect, .5 chance."""
    lengths, mine = tokens.norm(dim=-1).flatten(), inside.flatten()
    things, ground = lengths[mine], lengths[~mine].sort().values
    below, upto = torch.searchsorted(ground, things), torch.searchsorted(ground, things, right=True)
    return float((below + upto).double().mean() / 2 / len(ground))


def cells_inside(scenes: BoxScenes) -> Bool[Tensor, "N T"]:
    """Which tokens have their middle in a box, row by row."""
    cells = scenes.pixels.shape[-1] // STRIDE
    at = (torch.arange(cells) + 0.5) * STRIDE
    b = scenes.boxes
    across = (at > b[:, :1]) & (at < b[:, 2:3])
    down = (at > b[:, 1:2]) & (at < b[:, 3:])
    inside = torch.zeros(len(scenes.pixels), cells * cells, dtype=torch.bool)
    for i, cover in zip(scenes.scene.tolist(), (down[:, :, None] & across[:, None]).flatten(1), strict=True):
        inside[i] |= cover
    return inside


@torch.no_grad()
def detector_facts(model: SmallDETR, scenes: BoxScenes) -> dict[str, float]:
    """AP50 in percent, and the AUC of the encoder's token lengths."""
    model.eval()
    found = average_precision(model.detect(scenes.pixels), true_boxes(scenes))
    tokens = torch.cat([model.encode(part) for part in scenes.pixels.split(64)])
    return {"AP50": 100 * found, "norm AUC": norm_auc(tokens, cells_inside(scenes))}


@lru_cache(2)
def _scenes(kind: str, small: bool, seed: int) -> tuple[BoxScenes, BoxScenes]:
    n, m = (16, 8) if small else (TRAIN, TEST)
    if kind == "shapes":
        return shape_scenes(n, 2 * seed), shape_scenes(m, 2 * seed + 1)
    return digit_scenes(n, 2 * seed), digit_scenes(m, 2 * seed + 1, "test")


def _run(heads: Sequence[str]) -> Callable[[tuple[str, int], int], dict[str, float]]:
    def run(data: tuple[str, int], seed: int) -> dict[str, float]:
        kind, steps = data
        train, test = _scenes(kind, steps < STEPS, seed)
        every, found = steps // LOOKS, dict[str, float]()

        def look(step: int, model: SmallDETR) -> None:
            for name, value in detector_facts(model, test).items():
                found[f"{name} {step // every}/{LOOKS}"] = value

        train_co_detr(train, replace(TRAINING, steps=steps, seed=seed), heads=heads, look=look, every=every)
        return found

    return run


def half_way(values: Values) -> int:
    """The look at which the plain detector's AP50 is nearest to half of what it has at the end."""
    end = values["plain", f"AP50 {LOOKS}/{LOOKS}"]
    return min(range(1, LOOKS + 1), key=lambda k: abs(values["plain", f"AP50 {k}/{LOOKS}"] - end / 2))


def _gain(metric: str, at: Callable[[Values], int]) -> Callable[[Values], float]:
    def gain(values: Values) -> float:
        name = f"{metric} {at(values)}/{LOOKS}"
        return values["with heads", name] - values["plain", name]

    return gain


register_experiment(
    Experiment(
        "co-detr",
        (67,),
        "2211.12860",
        "Do heads with many positives, taken away after training, make a detector learn faster?",
        datasets=lambda quick: {name: (name, LOOKS if quick else STEPS) for name in ("shapes", "digits")},
        methods={"with heads": _run(HEADS), "plain": _run(())},
        baseline="plain",
        claims=(
            Claim(
                "the heads add at least 3 points of AP50 where the plain detector is half-way",
                _gain("AP50", half_way),
                at_least=3,
            ),
            Claim(
                "at the end they add at least .05 to the AUC of token lengths, things against ground",
                _gain("norm AUC", lambda _: LOOKS),
                at_least=0.05,
            ),
        ),
        minutes=60,
        room="vision",
    )
)
