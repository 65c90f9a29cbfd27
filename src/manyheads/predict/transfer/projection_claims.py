"""Projection heads (#101), their claims: on linear layers whose features are known, and on images of digits.

Known: x = 2 a v_1 + 1.2 b v_2 + 2 c v_3 + 2 noise in R^5, with signs a, b, c and orthonormal v. Two views share a (strong)
and b (weak); c is drawn anew in each, so the augmentation destroys it. The loss is least where W2 W1 has weight phi / (phi^2
+ 4) on the first two, and none on the third. Real: digits at a random place of a larger image, whose augmentation puts the
digit elsewhere; and digits whose other view is another image of the same parity (supervised contrastive learning with coarse
labels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from manyheads.data import digits
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.learning import Head, Trunk
from manyheads.predict.transfer.projection import (
    HeadEffect,
    ProjectionHead,
    ProjectionSettings,
    ReweightingHead,
    ReweightingSettings,
    head_effect,
    layer_balance,
    train_contrastive,
)
from manyheads.predict.trunks import mlp
from manyheads.training import TrainSettings, drawn_rows, generator_of

Views = Callable[[int], tuple[Tensor, Tensor]]
STRONG, WEAK, DESTROYED = "strong", "weak", "destroyed"
PHI, WIDTH, NOISE, START = (2.0, 1.2, 2.0), 5, 2.0, 0.03
FLOW = TrainSettings(rate=0.02, warmup=1, decay=0.5, optimizer="sgd", weight_decay=0.0, clip=None, precision="fp32")


class LayeredFeatures:
    """The constructed data (file's head): `views`, and `sample` with the signs of each feature."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        square = torch.randn(WIDTH, WIDTH, generator=generator_of(seed, 999_999))
        self.directions = torch.linalg.qr(square)[0][:, :3]

    def views(self, i: int, rows: int = 500) -> tuple[Tensor, Tensor]:
        """Two views of `rows` examples."""
        draw = generator_of(self.seed, i)
        signs = _signs(rows, 3, draw)
        return self._shown(signs, draw), self._shown(torch.cat([signs[:, :2], _signs(rows, 1, draw)], 1), draw)

    def sample(self, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Examples, and the class of each feature, 0 or 1."""
        draw = generator_of(self.seed, 999_998)
        signs = _signs(rows, 3, draw)
        names = (STRONG, WEAK, DESTROYED)
        return self._shown(signs, draw), {n: (signs[:, i] > 0).long() for i, n in enumerate(names)}

    def _shown(self, signs: Tensor, draw: torch.Generator) -> Tensor:
        noise = NOISE * torch.randn(len(signs), WIDTH, generator=draw)
        return signs * torch.tensor(PHI) @ self.directions.T + noise


def _signs(rows: int, n: int, draw: torch.Generator) -> Tensor:
    return torch.randint(2, (rows, n), generator=draw) * 2.0 - 1


@lru_cache(maxsize=1)
def trained_layers(steps: int, seed: int) -> tuple[Tensor, Tensor, LayeredFeatures]:
    """W1 and W2 after training from small weights on the constructed data."""
    data = LayeredFeatures(seed)
    encoder = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        encoder.weight.copy_(START * torch.randn(WIDTH, WIDTH, generator=generator_of(seed, 999_997)))
    head = ProjectionHead(ProjectionSettings(WIDTH, WIDTH, std=START, seed=seed))
    train_contrastive(encoder, head, data.views, replace(FLOW, steps=steps, seed=seed))
    return encoder.weight.detach(), next(head.parameters()).detach(), data


def _known(where: str, steps: int, seed: int) -> dict[str, float]:
    W1, W2, data = trained_layers(steps, seed)
    weights = ((W1 if where == "before" else W2 @ W1) @ data.directions).norm(dim=0)
    x, classes = data.sample(2100)
    effect = head_effect(x @ W1.T, lambda states: states @ W2.T, classes, train=100)
    return {
        "balance": layer_balance(W1, W2),
        "weak weight": float(weights[1] / weights[0]),
        "destroyed weight": float(weights[2] / weights[0]),
        **{f"{name} probe": effect.accuracy(name, where) for name in classes},
    }


@dataclass(frozen=True)
class _Images:
    """A way to make two views, and examples with targets that the views share ("kept") or not ("lost"), shuffled."""

    views: Callable[[int, int], tuple[Tensor, Tensor]]
    x: Tensor
    targets: dict[str, Tensor]


def _placed(images: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 at random places of 11 x 11, flat; and which of 4 rows each begins in."""
    out, at = torch.zeros(len(images), 11, 11), torch.randint(4, (len(images), 2), generator=draw)
    for image, canvas, (row, column) in zip(images, out, at.tolist(), strict=True):
        canvas[row : row + 8, column : column + 8] = image
    return out.flatten(1), at[:, 0]


def _images(name: str) -> _Images:
    found = digits()
    order = torch.randperm(len(found), generator=generator_of(0, 0))
    pixels, digit = torch.from_numpy(found.x)[order], torch.from_numpy(found.y).long()[order]
    if name == "places":
        x, row = _placed(pixels, generator_of(0, 1))

        def views(seed: int, i: int) -> tuple[Tensor, Tensor]:
            rows = pixels[drawn_rows(1000, 128, i, seed)]
            draw = generator_of(seed, 10_000 + i)
            return _placed(rows, draw)[0], _placed(rows, draw)[0]

        return _Images(views, x, {"kept": digit, "lost": row})
    flat, parity = pixels.flatten(1), digit[:1000] % 2
    same = [(parity == p).nonzero()[:, 0] for p in (0, 1)]

    def pairs(seed: int, i: int) -> tuple[Tensor, Tensor]:
        one, other = (torch.cat([group[drawn_rows(len(group), 64, i, seed + s)] for group in same]) for s in (0, 500))
        return flat[one], flat[other]

    return _Images(pairs, flat, {"kept": digit % 2, "lost": digit})


@lru_cache(maxsize=3)
def _encoded(way: str, name: str, steps: int, seed: int) -> HeadEffect:
    data = _images(name)
    encoder = mlp(data.x.shape[1], 128, 64, seed=seed)
    heads: dict[str, Head] = {
        "head": ProjectionHead(ProjectionSettings(64, 32, (64,), seed=seed)),
        "re-weighting": ReweightingHead(ReweightingSettings(64, 1.1)),
        "none": ReweightingHead(ReweightingSettings(64, 1.0)),
    }
    head = heads.get(way, heads["none"])
    settings = TrainSettings(steps=steps, rate=1e-3, warmup=20, weight_decay=0.0, precision="fp32", seed=seed)
    if way != "random":
        train_contrastive(encoder, head, lambda i: data.views(seed, i), settings)
    return head_effect(Trunk(encoder).states(data.x), head, data.targets, train=1000)


WAYS = {
    "before head": ("head", "before"),
    "after head": ("head", "after"),
    "no head": ("none", "before"),
    "re-weighting": ("re-weighting", "before"),
    "random": ("random", "before"),
}


def _real(way: str, data: tuple[str, int], seed: int) -> dict[str, float]:
    made, where = WAYS[way]
    effect = _encoded(made, *data, seed)
    spectrum = effect.spectrum_before if where == "before" else effect.spectrum_after
    return {name: effect.accuracy(name, where) for name in ("kept", "lost")} | {"rank": float(spectrum.square().sum())}


def _square(v: Values) -> float:
    return abs(v["after", "weak weight"] - v["before", "weak weight"] ** 2)


def _less(metric: str, one: str, other: str) -> Callable[[Values], float]:
    return lambda v: v[one, metric] - v[other, metric]


register_experiment(
    Experiment(
        "projection-heads",
        (101,),
        "2403.11391",
        "Are features more equal before a linear head than after it, as the square root says?",
        datasets=lambda quick: {"linear layers": 3500},
        methods={where: partial(_known, where) for where in ("before", "after")},
        baseline="after",
        claims=(
            Claim("the layers are balanced to 0.1", lambda v: v["before", "balance"], at_most=0.1),
            Claim("the weak feature's weight after is the square of that before, within 0.05", _square, at_most=0.05),
            Claim("a probe reads the weak feature as well before", _less("weak probe", "before", "after"), at_least=0),
            Claim("and the destroyed one", _less("destroyed probe", "before", "after"), at_least=0),
        ),
        minutes=1.0,
    )
)
register_experiment(
    Experiment(
        "projection-heads-real",
        (101,),
        "2403.11391",
        "On digits, is what the views do not share better read before the head, and what they share as well?",
        datasets=lambda quick: {name: (name, 200 if quick else 600) for name in ("places", "parity")},
        methods={way: partial(_real, way) for way in WAYS},
        baseline="after head",
        claims=(
            Claim(
                "what is lost is read better before the head", _less("lost", "before head", "after head"), at_least=0
            ),
            Claim("what is kept, at most 0.02 worse", _less("kept", "before head", "after head"), at_least=-0.02),
            Claim(
                "what is lost is read better than without a head", _less("lost", "before head", "no head"), at_least=0
            ),
            Claim("re-weighting helps as well", _less("lost", "re-weighting", "no head"), at_least=0),
        ),
        minutes=1.0,
    )
)
