"""Trains the two networks of pointing lines into runs/pointing-head and runs/pointing-wrist, and draws their page's picture.

    pip install scikit-learn && python recipes/pointing.py

Two minutes on one idle core. The pictures drawn were not trained on. The agreement is the stand-in for CLIP, right in 75 %; how
well the ensemble does with better ones is printed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import ImageDraw

from manyheads.progress import progressing
from manyheads.vision.core.pictures import as_picture
from manyheads.vision.finding.pointing import LINES, TRAINING, PointingEnsemble, save_pointer, train_pointer
from manyheads.vision.finding.pointing_claims import STEPS, TEST, TRAIN, TUNE, WORDS, judged_right
from manyheads.vision.finding.pointing_scenes import ColourJudge, Pointed, pointed_shapes
from manyheads.vision.finding.seeing_pointing import draw_pointing

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "pointing.png"
SEED = 1000


def main() -> None:
    train, tune, test = (
        pointed_shapes(TRAIN, SEED),
        pointed_shapes(TUNE, SEED + 1),
        pointed_shapes(TEST, SEED + 2, "test"),
    )
    (ROOT / "runs").mkdir(exist_ok=True)
    networks = []
    with progressing() as bar:
        step = bar.step("training", 2 * STEPS)
        for line in LINES:
            settings = replace(TRAINING, steps=STEPS, seed=SEED)
            networks.append(train_pointer(train, line, settings, words=WORDS, bar=step))
            about = {"trained on": f"{TRAIN} pictures of shapes on scikit-learn's photographs"}
            save_pointer(networks[-1], ROOT / "runs" / f"pointing-{line}", about, force=True)
    both = PointingEnsemble.fitted(*networks, tune, ColourJudge(seed=0))
    right = torch.stack([judged_right(one.best(test).boxes, test) for one in networks])
    best = 100 * float(right.amax(0).mean())
    print(
        f"head {100 * float(right[0].mean()):.1f} %, wrist {100 * float(right[1].mean()):.1f} %, the better one {best:.1f} %"
    )
    for accuracy in (0.75, 0.9, 1.0):
        fitted = PointingEnsemble.fitted(*networks, tune, ColourJudge(accuracy, seed=0))
        hits = judged_right(fitted.choose(test, ColourJudge(accuracy, seed=1))[1], test)
        print(f"a judge that is right in {accuracy:.0%}: ensemble {100 * float(hits.mean()):.1f} %")
    few = Pointed(test.pixels[:8], test.phrases[:8], test.points[:8], test.boxes[:8])
    tiles = []
    for drawn, phrase in zip(draw_pointing(both, few, ColourJudge(seed=1)), few.phrases, strict=True):
        label = as_picture(np.ones((16, drawn.shape[1], 3)))
        ImageDraw.Draw(label).text((2, 2), phrase, fill=(0, 0, 0))
        tile = np.concatenate([drawn, np.asarray(label) / 255])
        tiles.append(np.pad(tile, ((0, 6), (0, 6), (0, 0)), constant_values=1.0))
    grid = np.concatenate([np.concatenate(tiles[j : j + 4], 1) for j in (0, 4)])
    as_picture(grid).quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
