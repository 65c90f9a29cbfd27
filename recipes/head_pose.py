"""Trains a head-pose detector on renders of a head's mesh, into the folder runs/head-pose, and draws the picture of its page.

    pip install scikit-image && python recipes/head_pose.py

Two minutes on one idle core. Grounds are photographs without people from scikit-image and scikit-learn. It prints how well it
does on renders that it did not see, and writes that into the card.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage.data
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

from manyheads.progress import progressing
from manyheads.vision import predictor
from manyheads.vision.core.pictures import as_picture
from manyheads.vision.poses.direct_mhp import TRAINING, DirectMHP, save_direct_mhp, train_direct_mhp
from manyheads.vision.poses.direct_mhp_claims import best_score, detected, pose_errors
from manyheads.vision.poses.scenes import HeadScenes, head_scenes
from manyheads.vision.poses.seeing_heads import draw_heads

INTO = Path(__file__).parents[1] / "runs" / "head-pose"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "head-pose.png"
SCENES, STEPS = 1200, 1200


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    loaded = [getattr(skimage.data, name)() for name in ("coffee", "rocket", "chelsea", "brick", "grass")]
    loaded += load_sample_images().images
    photos = [torch.from_numpy(np.array(one)).float().div(255) for one in loaded]
    photos = [one.permute(2, 0, 1) if one.ndim == 3 else one.expand(3, -1, -1) for one in photos]
    train, tune, test = (
        head_scenes(n, seed, kind="heads", photographs=photos, sides=(22, 64))
        for n, seed in ((SCENES, 1000), (100, 1001), (250, 1002))
    )
    with progressing() as bar:
        model = train_direct_mhp(train, replace(TRAINING, steps=steps), change=colours, bar=bar.step("training", steps))
    score = best_score(detected(model, tune.pixels), tune)
    figures = {name: round(value, 3) for name, value in pose_errors(detected(model, test.pixels), test, score).items()}
    print(figures)
    about = {
        "score": score,
        "what": "finds heads and the way they look (pitch, yaw, roll in degrees, 300W-LP's signs), over the full circle",
        "trained on": f"{SCENES} renders of MakeHuman's head (CC0), grounds of scikit-image and scikit-learn, {steps} steps",
        "on 250 other renders": figures,
        "on photographs": "tried in docs/methods/direct-mhp.md; it has never seen a photographed head",
    }
    INTO.parent.mkdir(exist_ok=True)
    save_direct_mhp(model, INTO, about, force=True)
    print(f"{sum(file.stat().st_size for file in INTO.iterdir()):,} bytes: {INTO}")
    picture(model, test, score)


def picture(model: DirectMHP, scenes: HeadScenes, score: float) -> None:
    """For the page: eight renders that were not trained on, and NASA's photograph of an astronaut, with what was found."""
    shown = [
        draw_heads(one.permute(1, 2, 0).double().numpy(), heads.above(score))
        for one, heads in zip(scenes.pixels[:8], model.detect(scenes.pixels[:8]), strict=True)
    ]
    grid = np.concatenate([np.concatenate(shown[i : i + 4], 1) for i in (0, 4)]).repeat(2, 0).repeat(2, 1)
    seen = predictor("head-pose", INTO)(skimage.data.astronaut() / 255)
    print("astronaut:", seen.rows)
    as_picture(np.concatenate([grid, seen.drawn], 1)).quantize(128).save(PICTURE, optimize=True)


def colours(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Other light, contrast and tint, less colour, and some blur: a photograph varies in all of them."""
    n = (len(pixels), 1, 1, 1)

    def between(low: float, high: float, shape: tuple[int, ...] = n) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = torch.lerp(pixels, blurred, between(0, 1))
    pixels = torch.lerp(pixels, pixels.mean(1, keepdim=True), between(-0.2, 1).clamp(min=0))
    pixels = (pixels - 0.5) * between(0.5, 1.3) + 0.5 + between(-0.2, 0.2)
    return (pixels * between(0.85, 1.15, (len(pixels), 3, 1, 1))).clamp(0, 1)


if __name__ == "__main__":
    main()
