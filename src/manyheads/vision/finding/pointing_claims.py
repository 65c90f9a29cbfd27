"""Do two networks for two pointing lines, judged by an agreement, beat the better one, and what does the centre head add (#2)?"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.vision.core.boxes import box_iou
from manyheads.vision.finding.phrased_scenes import FORMS
from manyheads.vision.finding.pointing import LINES, TRAINING, PointingEnsemble, train_pointer
from manyheads.vision.finding.pointing_scenes import ColourJudge, Pointed, pointed_shapes

TRAIN, TUNE, TEST, STEPS = 2000, 150, 400, 300  # pictures, steps
WORDS = ("the", *FORMS)  # the networks know no colours: what only the judge knows


def judged_right(boxes: Float[Tensor, "N 4"], pointed: Pointed) -> Float[Tensor, "N"]:
    """1 for each picture whose box has an IoU of at least .25 with the true one, as the paper counts."""
    pairs = zip(boxes, pointed.boxes, strict=True)
    return (torch.cat([box_iou(a[None], b[None]) for a, b in pairs])[:, 0] >= 0.25).float()


def centre_error(boxes: Float[Tensor, "N 4"], pointed: Pointed) -> float:
    """How far the boxes' middles are from the true ones, the mean in pixels."""
    apart = (boxes[:, :2] + boxes[:, 2:] - pointed.boxes[:, :2] - pointed.boxes[:, 2:]) / 2
    return float(apart.norm(dim=-1).mean())


@lru_cache(1)
def _scenes(small: bool, seed: int) -> tuple[Pointed, Pointed, Pointed]:
    """To train on, to take means and deviations from, and to test on."""
    n, k, m = (16, 8, 8) if small else (TRAIN, TUNE, TEST)
    return pointed_shapes(n, 3 * seed), pointed_shapes(k, 3 * seed + 1), pointed_shapes(m, 3 * seed + 2, "test")


def _run(steps: int, seed: int) -> dict[str, float]:
    """Both networks with centre heads, and the ensemble."""
    train, tune, test = _scenes(steps < STEPS, seed)
    settings = replace(TRAINING, steps=steps, seed=seed)
    head, wrist = (train_pointer(train, line, settings, words=WORDS) for line in LINES)
    found = [one.best(test).boxes for one in (head, wrist)]
    right = torch.stack([judged_right(one, test) for one in found])
    both = PointingEnsemble.fitted(head, wrist, tune, ColourJudge(seed=2 * seed))
    chosen = both.choose(test, ColourJudge(seed=2 * seed + 1))[1]
    alone = replace(both, weight=0.0).choose(test, ColourJudge(seed=2 * seed + 1))[1]
    return {
        "ensemble": 100 * float(judged_right(chosen, test).mean()),
        "head's line": 100 * float(right[0].mean()),
        "wrist's line": 100 * float(right[1].mean()),
        "oracle": 100 * float(right.amax(0).mean()),
        "scores alone": 100 * float(judged_right(alone, test).mean()),
        "centre error, head's line": centre_error(found[0], test),
    }


def _run_without(steps: int, seed: int) -> dict[str, float]:
    """The network of the head's line alone, without a centre head."""
    train, _, test = _scenes(steps < STEPS, seed)
    settings = replace(TRAINING, steps=steps, seed=seed)
    found = train_pointer(train, LINES[0], settings, words=WORDS, centre=False).best(test).boxes
    return {
        "head's line": 100 * float(judged_right(found, test).mean()),
        "centre error, head's line": centre_error(found, test),
    }


register_experiment(
    Experiment(
        "pointing",
        (2,),
        "2507.21888",
        "Do two networks for two pointing lines, judged by an agreement, beat the better one, and what does the centre head add?",
        datasets=lambda quick: {"shapes on photographs": 10 if quick else STEPS},
        methods={"with centre head": _run, "without": _run_without},
        baseline="without",
        claims=(
            Claim(
                "the ensemble is right at least 10 points more often than the better network",
                lambda v: (
                    v["with centre head", "ensemble"] - max(v["with centre head", f"{line}'s line"] for line in LINES)
                ),
                at_least=10,
            ),
            Claim(
                "it is right at least .9 times as often as the better one of each picture",
                lambda v: v["with centre head", "ensemble"] / v["with centre head", "oracle"],
                at_least=0.9,
            ),
            Claim(
                "the centre head lowers the error of boxes' middles by at least 10 %",
                lambda v: (
                    v["with centre head", "centre error, head's line"] / v["without", "centre error, head's line"]
                ),
                at_most=0.9,
            ),
        ),
        minutes=20,
        lower=frozenset({"centre error, head's line"}),
        room="vision",
    )
)
