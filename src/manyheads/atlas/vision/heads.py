"""Vision heads (#40): importance, strength and patterns of every head of an image classifier, from shared forward passes.

Li et al., "How Does Attention Work in Vision Transformers?", arXiv:2303.13731. Each piece of images runs once: readers look at
its attention (`vision_strength`, `vision_patterns`) while it is recorded, and every head and set of heads is pruned by replaying
from its layer (`vision_pruning`). Sets are chosen on the first half of the images and checked on the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.vision.patterns import AttentionPatterns, ProfileReader, patterns_of
from manyheads.atlas.vision.pruning import (
    METRICS,
    PruningCheck,
    PruningImportance,
    check_from,
    check_sets,
    importance_of,
    named_rightly,
    pruned_answers,
    singles,
)
from manyheads.atlas.vision.strength import AttentionStrength, StrengthReader, check_images, image_chunks, patch_grid
from manyheads.errors import InputError
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.report import Reported


@dataclass(frozen=True)
class VisionHeads(Reported):
    """What `vision_heads` found. `checks` prunes the most important heads together, and the least important ones."""

    name: str
    fingerprint: str
    importance: PruningImportance
    checks: dict[str, PruningCheck]
    strength: AttentionStrength
    patterns: AttentionPatterns

    @property
    def scores(self) -> dict[str, HeadScores]:
        """Every score by its name: four importances, distance, attention to CLS, and the share of each pattern."""
        return {
            **self.importance.scores,
            self.strength.distance.name: self.strength.distance,
            self.strength.special.name: self.strength.special,
            **{scores.name: scores for scores in self.patterns.scores.values()},
        }

    def to_frame(self) -> pd.DataFrame:
        """A row a head: layer, index, head, importances, attention distance, attention to CLS, pattern and its shares."""
        frame = self.importance.to_frame()
        for scores in (self.strength.distance, self.strength.special):
            frame[scores.name] = scores.values.ravel()
        return frame.merge(self.patterns.to_frame(), on=["layer", "index", "head"])


def vision_heads(
    model: HeadModel,
    images: Float[Tensor, "N C Y X"],
    labels: Int[Tensor, "N"],
    *,
    top: int | None = None,
    n_random: int = 20,
    clusters: int = 12,
    seed: int = 0,
    bar: Bar = Bar(),
) -> VisionHeads:
    """Importance, strength and patterns of every head of an image classifier (`pixel_values` and true classes).

    `top` heads (default: an eighth of all, at least 3) are pruned together: those with the largest drop of the true class on
    the first half of the images and those with the smallest, each set beside `n_random` random ones on the second half.
    Shuffle the images if they are sorted. `bar` counts images. `InputError` for fewer than 4 images.
    """
    check_images(images, labels)
    most = len(model.heads) // 2
    top = max(1, min(most, max(3, len(model.heads) // 8))) if top is None else top
    if len(images) < 4 or n_random < 20 or not 1 <= top <= most:
        raise InputError(
            f"give at least 4 images, 20 random sets and 1 to {most} top heads, not {len(images)}, {n_random} and {top}."
        )
    grid = patch_grid(model, images)
    strength, profiles = StrengthReader(grid), ProfileReader(grid)

    def run(half: slice, sets: list[HeadSet]) -> tuple[Float[np.ndarray, "V 4 N"], Float[np.ndarray, "N"]]:
        values, right = [], []
        some, wanted = images[half], labels[half]
        for rows in image_chunks(grid, len(some)):
            with model.reading(strength, profiles):
                recording = model.record(model.inputs({"pixel_values": some[rows]}))
            values.append(pruned_answers(model, recording, wanted[rows], sets, grid))
            right.append(named_rightly(recording, wanted[rows]))
            bar(rows.stop - rows.start)
        return np.concatenate(values, -1), np.concatenate(right)

    each, half = singles(model.heads), len(images) // 2
    first, right = run(slice(0, half), each)
    drop = first[:, METRICS.index("probability_drop")].mean(1)
    heads = [next(iter(one)) for one in each]
    order = [heads[i] for i in np.argsort(-drop, kind="stable")]
    chosen = {"most important": order[:top], "least important": order[-top:]}
    sets = {name: check_sets(model, some, n_random, seed) for name, some in chosen.items()}
    second, right_too = run(slice(half, len(images)), each + [one for group in sets.values() for one in group])
    checks, start = {}, len(each)
    for name, group in sets.items():
        values = second[start : start + len(group), METRICS.index("probability_drop")]
        checks[name] = check_from(group[0], values, "probability_drop")
        start += len(group)
    per_image = np.concatenate([first, second[: len(each)]], -1)
    return VisionHeads(
        name=type(model.plain).__name__,
        fingerprint=model.fingerprint,
        importance=importance_of(model, per_image, labels, np.concatenate([right, right_too])),
        checks=checks,
        strength=strength.result(model),
        patterns=patterns_of(model, profiles.result(), grid, clusters=clusters, seed=seed),
    )
