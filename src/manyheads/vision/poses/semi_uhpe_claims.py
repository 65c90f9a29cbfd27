"""Do pictures without labels make poses better, where a fifth of them show something else (#102)?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.vision.core.rotations import geodesic, random_rotations
from manyheads.vision.poses.semi_uhpe import (
    LABELLED,
    UNLABELLED,
    FisherNet,
    SelfTrained,
    train_labelled,
    train_semi_uhpe,
)

POINTS, SIDE = 24, 32


@dataclass(frozen=True)
class PartlyLabelled:
    """Labelled pictures with their rotations, others without (`noise` says which show something else), and some to test on."""

    pixels: Float[Tensor, "N 3 S S"]
    rotations: Float[Tensor, "N 3 3"]
    unlabelled: Float[Tensor, "U 3 S S"]
    noise: Bool[Tensor, "U"]
    test_pixels: Float[Tensor, "T 3 S S"]
    test_rotations: Float[Tensor, "T 3 3"]


def point_cloud(generator: torch.Generator) -> tuple[Float[Tensor, "P 3"], Float[Tensor, "P 3"]]:
    """Points of the unit ball, no two sides of which are alike, and their colours."""
    points = F.normalize(torch.randn(POINTS, 3, generator=generator), dim=-1)
    return points * torch.rand(POINTS, 1, generator=generator) ** (1 / 3), torch.rand(POINTS, 3, generator=generator)


def render_points(
    points: Float[Tensor, "B P 3"], colours: Float[Tensor, "B P 3"], side: int = SIDE
) -> Float[Tensor, "B 3 {side} {side}"]:
    """Coloured spots on black, a tenth of the ball's radius wide, brighter the nearer they are. Without noise."""
    at = (torch.arange(side) + 0.5 - side / 2) / (0.4 * side)
    spread = 2 * 0.1**2
    across = (-((at - points[..., :1]) ** 2) / spread).exp()
    down = (-((-at - points[..., 1:2]) ** 2) / spread).exp()
    near = (0.6 + 0.4 * points[..., 2:]) * colours
    return torch.einsum("bpc,bpy,bpx->bcyx", near, down, across).clamp(0, 1)


def rotated_points(n: int, cloud: tuple[Tensor, Tensor], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures of one cloud in `n` rotations drawn from all, and the rotations."""
    rotations = random_rotations(n, g)
    points, colours = cloud
    return render_points(torch.einsum("bij,pj->bpi", rotations, points), colours.expand(n, -1, -1)), rotations


def unrelated(n: int, g: torch.Generator) -> Float[Tensor, "N 3 S S"]:
    """Pictures of something else: half of them other clouds, each of its own, half coloured noise of any coarseness."""
    clouds = [point_cloud(g) for _ in range(n // 2)]
    others = render_points(torch.stack([one for one, _ in clouds]), torch.stack([one for _, one in clouds]))
    noise = []
    for _ in range(n - n // 2):
        coarse = int(torch.randint(3, SIDE, (), generator=g))
        waves = torch.rand(1, 3, coarse, coarse, generator=g)
        noise.append(F.interpolate(waves, (SIDE, SIDE), mode="bilinear")[0])
    return torch.cat([others, torch.stack(noise)])


@lru_cache(1)
def partly_labelled(labels: int, others: int, seed: int) -> PartlyLabelled:
    """`labels` pictures with rotations, `others` without, of which a fifth are unrelated, and 1000 to test on."""
    g = torch.Generator().manual_seed(seed)
    cloud = point_cloud(g)
    pixels, rotations = rotated_points(labels, cloud, g)
    wrong = others // 5
    more, _ = rotated_points(others - wrong, cloud, g)
    order = torch.randperm(others, generator=g)
    noise = torch.arange(others) >= others - wrong
    test_pixels, test_rotations = rotated_points(1000, cloud, g)
    return PartlyLabelled(
        pixels, rotations, torch.cat([more, unrelated(wrong, g)])[order], noise[order], test_pixels, test_rotations
    )


@dataclass(frozen=True)
class _Sizes:
    """How many pictures with and without labels, and how many steps before and after the latter come in."""

    labels: int
    others: int
    first: int = LABELLED.steps or 0
    then: int = UNLABELLED.steps or 0

    def data(self, seed: int) -> PartlyLabelled:
        return partly_labelled(self.labels, self.others, seed)


@lru_cache(1)
def _first_stage(sizes: _Sizes, seed: int) -> FisherNet:
    data = sizes.data(seed)
    return train_labelled(data.pixels, data.rotations, replace(LABELLED, steps=sizes.first, seed=seed))


def _errors(network: FisherNet, data: PartlyLabelled) -> dict[str, float]:
    found, _ = network.rotations(data.test_pixels)
    apart = geodesic(found, data.test_rotations)
    return {"mean error": float(apart.mean()), "median error": float(apart.median())}


def _labels_alone(sizes: _Sizes, seed: int) -> dict[str, float]:
    """As many steps at the same rates as the others, on the labels."""
    data = sizes.data(seed)
    settings = replace(UNLABELLED, steps=sizes.then, seed=seed)
    first = _copy(_first_stage(sizes, seed))
    return _errors(train_labelled(data.pixels, data.rotations, settings, network=first), data)


def _with_others(**options: object) -> Callable[[_Sizes, int], dict[str, float]]:
    def run(sizes: _Sizes, seed: int) -> dict[str, float]:
        data = sizes.data(seed)
        trained: SelfTrained = train_semi_uhpe(
            data.pixels,
            data.rotations,
            data.unlabelled,
            replace(UNLABELLED, steps=sizes.then, seed=seed),
            network=_first_stage(sizes, seed),
            **options,  # type: ignore[arg-type]
        )
        kept = trained.kept
        return _errors(trained.network, data) | {
            "kept": float(kept.float().mean()),
            "noise rejected": float((~kept[data.noise]).float().mean()),
        }

    return run


def _copy(network: FisherNet) -> FisherNet:
    new = FisherNet(**network.settings)
    new.load_state_dict(network.state_dict())
    return new


register_experiment(
    Experiment(
        "semi-head-pose",
        (102,),
        "2404.02544",
        "Do pictures without labels make poses better, where a fifth of them show something else?",
        datasets=lambda quick: {"100 labels of 5100": _Sizes(20, 40, 5, 5) if quick else _Sizes(100, 5000)},
        methods={
            "semi-uhpe": _with_others(),
            "fixed threshold": _with_others(threshold="fixed"),
            "labels alone": _labels_alone,
        },
        baseline="labels alone",
        claims=(
            Claim(
                "the error is at least a tenth below that of the labels alone",
                lambda v: v["semi-uhpe", "mean error"] / v["labels alone", "mean error"],
                at_most=0.9,
            ),
            Claim(
                "it is below that with a fixed threshold",
                lambda v: v["semi-uhpe", "mean error"] / v["fixed threshold", "mean error"],
                at_most=1.0,
            ),
            Claim(
                "the share of pictures that is kept is .75, within .01",
                lambda v: abs(v["semi-uhpe", "kept"] - 0.75),
                at_most=0.01,
            ),
            Claim(
                "at least .8 of the unrelated pictures are rejected",
                lambda v: v["semi-uhpe", "noise rejected"],
                at_least=0.8,
            ),
        ),
        minutes=11,
        lower=frozenset({"mean error", "median error"}),
        room="vision",
    )
)
