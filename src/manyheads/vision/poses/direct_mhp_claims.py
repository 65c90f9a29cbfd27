"""Does one detector find heads and their full-range angles at once, and do the angles cost it anything (#5)?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.vision.core.boxes import matched_boxes
from manyheads.vision.core.rotations import geodesic, rotation_of_euler
from manyheads.vision.poses.direct_mhp import TRAINING, DirectMHP, Heads, train_direct_mhp, yaw_error
from manyheads.vision.poses.scenes import HeadScenes, head_scenes

BEHIND = 90.0  # degrees of yaw: beyond, a head is seen from behind


def pose_errors(found: Sequence[Heads], scenes: HeadScenes, score: float) -> dict[str, float]:
    """F1 and recall of boxes (IoU above .5, one detection a head), and over the heads that were found the errors in degrees.

    Yaw errors go over the circle; `geodesic` is the median angle between the rotations; each apart for heads seen from the front
    and from behind. `constant yaw` is the error of the best constant guess of yaw on the same heads.
    """
    pairs, of, angles = 0, 0, []
    for i, heads in enumerate(found):
        heads, mine = heads.above(score), (scenes.scene == i).nonzero()[:, 0]
        matched = matched_boxes(heads.boxes, heads.scores, scenes.boxes[mine])
        pairs, of = pairs + len(matched), of + len(heads.scores)
        angles += [torch.stack([heads.angles[a], scenes.angles[mine[b]]]) for a, b in matched]
    recall = pairs / max(len(scenes.boxes), 1)
    result = {"F1": 2 * pairs / max(of + len(scenes.boxes), 1), "recall": recall, "precision": pairs / max(of, 1)}
    given, truth = (torch.stack(angles) if angles else torch.full((1, 2, 3), torch.nan)).unbind(1)
    yaw, apart = yaw_error(given[:, 1], truth[:, 1]), geodesic(rotation_of_euler(given), rotation_of_euler(truth))
    rear = truth[:, 1].abs() > BEHIND
    for name, where in (("", torch.ones_like(rear)), (" front", ~rear), (" behind", rear)):
        if bool(where.any()):
            result |= {f"yaw MAE{name}": float(yaw[where].mean()), f"geodesic{name}": float(apart[where].median())}
    guesses = torch.arange(-180.0, 180.0, 5.0)
    result["constant yaw"] = float(yaw_error(guesses[:, None], truth[None, :, 1]).mean(1).min())
    return result | {
        "pitch MAE": float((given[:, 0] - truth[:, 0]).abs().mean()),
        "roll MAE": float((given[:, 2] - truth[:, 2]).abs().mean()),
    }


def best_score(found: Sequence[Heads], scenes: HeadScenes) -> float:
    """The score from which on a detection counts: of .1 to .9 the one with the best F1 on these scenes."""
    return max((s / 20 for s in range(2, 19)), key=lambda s: pose_errors(found, scenes, s)["F1"])


def detected(model: DirectMHP, pixels: Tensor) -> list[Heads]:
    """Detections of many pictures, 32 at a time."""
    return [heads for part in pixels.split(32) for heads in model.detect(part)]


@lru_cache(1)
def _scenes(n: int, seed: int) -> tuple[HeadScenes, HeadScenes, HeadScenes]:
    """To train on, to choose the score on, and to test on."""
    return head_scenes(n, 3 * seed), head_scenes(n // 16, 3 * seed + 1), head_scenes(n // 8, 3 * seed + 2)


def _run(angle_gain: float) -> Callable[[int, int], dict[str, float]]:
    def run(n: int, seed: int) -> dict[str, float]:
        train, tune, test = _scenes(n, seed)
        settings = replace(TRAINING, steps=3 * n // 4, seed=seed)
        model = train_direct_mhp(train, settings, model=DirectMHP(angle_gain=angle_gain, seed=seed))
        score = best_score(detected(model, tune.pixels), tune)
        found = pose_errors(detected(model, test.pixels), test, score)
        return found if angle_gain else {name: found[name] for name in ("F1", "recall", "precision")}

    return run


register_experiment(
    Experiment(
        "head-pose",
        (5,),
        "2302.01110",
        "Does one detector find heads and their angles over the full circle, at no cost for the detection?",
        datasets=lambda quick: {"balls with faces": 32 if quick else 2000},
        methods={"joint": _run(0.1), "detection only": _run(0.0)},
        baseline="detection only",
        claims=(
            Claim("F1 at an IoU of .5 is at least .9", lambda v: v["joint", "F1"], at_least=0.9),
            Claim(
                "the error of yaw is at most a quarter of the best constant guess's",
                lambda v: v["joint", "yaw MAE"] / v["joint", "constant yaw"],
                at_most=0.25,
            ),
            Claim("while recall is at least .85", lambda v: v["joint", "recall"], at_least=0.85),
            Claim(
                "learning angles too costs at most 2 points of F1",
                lambda v: 100 * (v["detection only", "F1"] - v["joint", "F1"]),
                at_most=2,
            ),
        ),
        minutes=10,
        lower=frozenset(
            {"yaw MAE", "yaw MAE front", "yaw MAE behind", "geodesic", "geodesic front", "geodesic behind"}
        ),
        room="vision",
    )
)
