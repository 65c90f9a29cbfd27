"""Trains a model of phrases on written digits before photographs, into the folder runs/phrases, and draws its page's picture.

    pip install scikit-learn && python recipes/phrases.py

Two minutes on one idle core. Digits and parts of photographs in the picture were not trained on. It prints how well the model
does on 300 other pictures, and by how much boxes get worse without each of the heads that look at the words.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ImageDraw

from manyheads.progress import progressing
from manyheads.vision.core.pictures import as_picture
from manyheads.vision.finding.grounding import TRAINING, save_grounder, train_grounder
from manyheads.vision.finding.grounding_claims import STEPS, TEST, TRAIN, grounding_facts, heads_that_read
from manyheads.vision.finding.phrased_scenes import phrased_digits
from manyheads.vision.finding.seeing_phrases import look_for

INTO = Path(__file__).parents[1] / "runs" / "phrases"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "phrases.png"
SEED, LARGER = 1000, 3


def main() -> None:
    train, test = phrased_digits(TRAIN, SEED), phrased_digits(TEST, SEED + 1, "test")
    with progressing() as bar:
        settings = replace(TRAINING, steps=STEPS, seed=SEED)
        model = train_grounder(train, settings, bar=bar.step("training", STEPS))
    figures = {name: round(value, 3) for name, value in grounding_facts(model, test).items()}
    print(figures)
    for name, lost in sorted(heads_that_read(model, test).items(), key=lambda one: -one[1]):
        print(f"{name}: {lost:.1f} points")
    INTO.parent.mkdir(exist_ok=True)
    about = {"trained on": f"{TRAIN} pictures of digits on scikit-learn's photographs", "on 300 others": figures}
    save_grounder(model, INTO, about, force=True)
    placed = [i for i, phrase in enumerate(test.phrases) if len(phrase.split()) > 2]
    tiles = []
    for i in placed[:8]:
        pixels = test.pixels[test.scene[i]].permute(1, 2, 0).double().numpy()
        seen = look_for(model, pixels.repeat(LARGER, 0).repeat(LARGER, 1), test.phrases[i])
        label = as_picture(np.ones((16, seen.drawn.shape[1], 3)))
        ImageDraw.Draw(label).text((2, 2), test.phrases[i], fill=(0, 0, 0))
        both = np.concatenate([seen.drawn, np.asarray(label) / 255])
        tiles.append(np.pad(both, ((0, 6), (0, 6), (0, 0)), constant_values=1.0))
    grid = np.concatenate([np.concatenate(tiles[j : j + 4], 1) for j in (0, 4)])
    as_picture(grid).quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
