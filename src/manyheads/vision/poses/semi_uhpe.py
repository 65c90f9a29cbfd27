"""SemiUHPE (#102): learn the way heads look from few labelled pictures and many others, of which some show no head at all.

Zhou et al., arXiv:2404.02544. A network gives nine numbers, the parameter `A` `[3, 3]` of a matrix-Fisher distribution over
rotations (`core/rotations.py`); its entropy H says how sure it is. First it learns from labels alone (the loss is the NLL). Then
a teacher, whose weights follow the student's (`alpha = min(1 - 1/(k+1), decay)` at step k), answers for weakly changed pictures,
and the student learns its answers on strongly changed ones, where the teacher is sure:

    L = NLL(labelled) + mean_B( 1[H_teacher < tau] CE(teacher, student) )        in nats; B counts all pictures, kept or not

tau begins at a fixed value, and is then, every `period` steps, the delta-quantile of the teacher's entropies over all pictures
without labels: 1 - delta is the share of pictures that are thought to be unrelated.

    weak     the square crop times .8 to 1.25, moved a little
    strong   times .6 to 1.5, three holes cut out, three patches of another picture put in, and turned by up to `turn` degrees in
             the plane, for which the teacher's A becomes M A

The teacher runs in training mode, and only parameters follow: its batch norms keep statistics of their own (as in the release).

Where we depart: a small convolutional trunk for pictures of 32 pixels instead of ResNet-50 at 224; the normaliser of the
distribution is exact instead of Bingham's approximation; the teacher's decay is .99, since a run has thousands of steps, not
hundreds of thousands. Turning is off unless asked for.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_number
from manyheads.progress import Bar
from manyheads.training import ADAM, Progress, TrainSettings, drawn_rows, fit, generator_of
from manyheads.vision.core.rotations import (
    fisher_cross_entropy,
    fisher_entropy,
    fisher_mode,
    fisher_nll,
    in_plane,
)

LABELLED = replace(ADAM, steps=500, rows=32, rate=1e-3)
UNLABELLED = replace(ADAM, steps=500, rows=32, rate=5e-4)
TIMES = 4  # as many pictures without labels in a batch for each labelled one


class FisherNet(nn.Module):
    """Pictures `[B, 3, S, S]` to parameters `A` `[B, 3, 3]`: convolutions, then 9 numbers with weights that begin near 0.

    So it begins near the uniform distribution.
    """

    def __init__(self, width: int = 16, *, size: int = 32, seed: int = 0) -> None:
        super().__init__()
        if size % 8:
            raise InputError(f"pictures have sides of {size} pixels; give a multiple of 8.")
        self.settings = {"width": width, "size": size}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            w = width
            self.trunk = nn.Sequential(
                *(_step(3, w, 2), _step(w, 2 * w, 1), _step(2 * w, 2 * w, 2), _step(2 * w, 4 * w, 2), nn.Flatten())
            )
            self.head = nn.Sequential(
                *(nn.Dropout(0.2), nn.Linear(4 * w * (size // 8) ** 2, 128), nn.BatchNorm1d(128), nn.ReLU6()),
                *(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU6(), nn.Linear(64, 9)),
            )
            last = self.head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 3"]:
        """The parameter of each picture's distribution."""
        return self.head(self.trunk(2 * pixels - 1)).unflatten(-1, (3, 3))

    @torch.no_grad()
    def rotations(self, pixels: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B 3 3"], Float[Tensor, "B"]]:
        """The likeliest rotation of each picture, and its entropy in nats: the lower, the surer."""
        self.eval()
        a = torch.cat([self(part) for part in pixels.split(256)])
        return fisher_mode(a), fisher_entropy(a)


@dataclass(frozen=True)
class SelfTrained:
    """A network that learned with pictures without labels: the network, the last tau, and the teacher's entropy of each picture.

    `kept` says of which pictures the teacher was sure enough in the end.
    """

    network: FisherNet
    tau: float
    entropies: Float[Tensor, "U"]

    @property
    def kept(self) -> Tensor:
        """Whether each picture without a label is used, `[U]`."""
        return self.entropies < self.tau


def square_crop(
    picture: Float[Tensor, "3 H W"], box: Float[Tensor, "4"], size: int, margin: float = 0.15
) -> Float[Tensor, "3 {size} {size}"]:
    """The square around a box, of half-side `(w + h)/2 * (1 + 2 margin) / 2`, black outside the picture: never stretched."""
    left, top, right, bottom = box.tolist()
    check_number(min(right - left, bottom - top), "the smaller side of the box", 0, above=True)
    half = ((right - left) + (bottom - top)) / 4 * (1 + 2 * margin)
    middle = torch.tensor([(left + right) / 2, (top + bottom) / 2])
    sides = torch.tensor([float(picture.shape[2]), float(picture.shape[1])])
    shift, scale = 2 * middle / sides - 1, 2 * half / sides
    theta = torch.tensor([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
    grid = F.affine_grid(theta[None], [1, 3, size, size], align_corners=False)
    return F.grid_sample(picture[None], grid, align_corners=False)[0]


def views(
    pixels: Float[Tensor, "B 3 S S"],
    generator: torch.Generator,
    *,
    scales: tuple[float, float],
    turn: float = 0.0,
) -> tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "B"]]:
    """Each picture cropped by a factor of `scales`, moved by up to a twentieth, turned by up to `turn` degrees; and those.

    Degrees count anticlockwise: a head with R is then seen with `in_plane(degrees) @ R`.
    """
    n = len(pixels)
    scale = scales[0] + (scales[1] - scales[0]) * torch.rand(n, generator=generator)
    degrees = turn * (2 * torch.rand(n, generator=generator) - 1)
    shift = 0.1 * (2 * torch.rand(n, 2, generator=generator) - 1)
    return rolled_pictures(pixels, degrees, scale, shift), degrees


def rolled_pictures(
    pixels: Float[Tensor, "B 3 S S"],
    degrees: Float[Tensor, "B"],
    scale: Float[Tensor, "B"] | None = None,
    shift: Float[Tensor, "B 2"] | None = None,
) -> Float[Tensor, "B 3 S S"]:
    """Pictures turned anticlockwise in their plane about their middle; what comes in from outside is black."""
    scale = torch.ones_like(degrees) if scale is None else scale
    shift = torch.zeros(len(degrees), 2) if shift is None else shift
    c, s = scale * torch.deg2rad(degrees).cos(), scale * torch.deg2rad(degrees).sin()
    # where a pixel of the new picture was in the old one; y counts downwards, so this is the turn backwards
    theta = torch.stack([torch.stack([c, -s, shift[:, 0]], -1), torch.stack([s, c, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def cut_mixed(pixels: Float[Tensor, "B 3 S S"], generator: torch.Generator, n: int = 3) -> Float[Tensor, "B 3 S S"]:
    """`n` holes cut out of each picture, then `n` patches of another picture of the batch put in.

    Holes have half-sides of 10 to 19 pixels in 224; their middles lie near that of the picture (a standard deviation of a sixth).
    """
    b, _, _, side = pixels.shape
    holes = _patches(b, n, side, generator)
    pixels = torch.where(holes[:, None], 0.0, pixels)
    order = torch.randperm(b, generator=generator)
    return torch.where(_patches(b, n, side, generator)[:, None], pixels[order], pixels)


def train_labelled(
    pixels: Float[Tensor, "N 3 S S"],
    rotations: Float[Tensor, "R 3 3"],
    settings: TrainSettings = LABELLED,
    *,
    network: FisherNet | None = None,
    turn: float = 0.0,
    bar: Bar = Bar(),
) -> FisherNet:
    """Learn from labelled pictures alone, weakly changed (and turned, with their rotations). `settings.seed` decides all."""
    _check(pixels, rotations)
    network = FisherNet(size=pixels.shape[-1], seed=settings.seed) if network is None else network

    def batch(number: int) -> dict[str, Tensor]:
        return _labelled_batch(pixels, rotations, settings, number, turn)

    fit(
        network,
        batch,
        settings,
        loss=lambda net, given: fisher_nll(net(given["pixels"]), given["rotations"]).mean(),
        device="cpu",
        bar=bar,
    )
    return network.eval()


def train_semi_uhpe(
    pixels: Float[Tensor, "N 3 S S"],
    rotations: Float[Tensor, "R 3 3"],
    unlabelled: Float[Tensor, "U 3 S S"],
    settings: TrainSettings = UNLABELLED,
    *,
    network: FisherNet | None = None,
    threshold: Literal["quantile", "fixed"] = "quantile",
    delta: float = 0.75,
    start: float = -5.3,
    period: int = 50,
    decay: float = 0.99,
    turn: float = 0.0,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> SelfTrained:
    """Go on with a network that learned from labels (`train_labelled`; None: do that first), now with pictures without labels.

    `threshold="fixed"` keeps tau at `start` (nats), the baseline of the paper; otherwise it is recomputed every `period` steps.
    """
    _check(pixels, rotations)
    check_choice(threshold, "threshold", ("quantile", "fixed"))
    check_number(delta, "delta", 0, 1)
    if len(unlabelled) == 0:
        raise InputError("there are no pictures without labels; give some, or use train_labelled.")
    network = train_labelled(pixels, rotations, replace(LABELLED, seed=settings.seed)) if network is None else network
    both = _Both(network, start)

    def batch(number: int) -> dict[str, Tensor]:
        g = generator_of(settings.seed, 500_000 + number)
        raw = unlabelled[drawn_rows(len(unlabelled), TIMES * settings.rows, number, settings.seed + 1)]
        weak, _ = views(raw, g, scales=(0.8, 1.25))
        strong, degrees = views(raw, g, scales=(0.6, 1.5), turn=turn)
        more = {"weak": weak, "strong": cut_mixed(strong, g), "degrees": degrees}
        return _labelled_batch(pixels, rotations, settings, number, turn) | more

    def after(progress: Progress, _: torch.optim.Optimizer) -> None:
        k = progress.step
        both.follow(min(1 - 1 / (k + 1), decay))
        if threshold == "quantile" and k % period == 0:
            both.tau.fill_(entropy_quantile(both.teacher_entropies(unlabelled), delta))

    fit(both, batch, settings, folder, after_step=after, device="cpu", bar=bar)
    return SelfTrained(both.student.eval(), float(both.tau), both.teacher_entropies(unlabelled))


def entropy_quantile(entropies: Float[Tensor, "U"], delta: float) -> float:
    """The tau below which the share `delta` of all pictures lies."""
    return float(torch.quantile(entropies.double(), delta))


class _Both(nn.Module):
    """Student and teacher, and tau: all that a run has to keep."""

    tau: Tensor

    def __init__(self, network: FisherNet, tau: float) -> None:
        super().__init__()
        self.student, self.teacher = deepcopy(network), deepcopy(network).requires_grad_(False)
        self.student.requires_grad_(True)
        self.register_buffer("tau", torch.tensor(tau))

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            answer = self.teacher(given["weak"])
            sure = fisher_entropy(answer) < self.tau  # read before turning, which changes no entropy anyway
            answer = in_plane(given["degrees"]) @ answer
        # labelled and strongly changed pictures pass as two batches: they have other statistics
        known = fisher_nll(self.student(given["pixels"]), given["rotations"]).mean()
        learned = fisher_cross_entropy(answer, self.student(given["strong"]))
        return known + (sure * learned).mean()

    @torch.no_grad()
    def follow(self, alpha: float) -> None:
        """The teacher's parameters, not its buffers, a step towards the student's."""
        for mine, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(new, 1 - alpha)

    @torch.no_grad()
    def teacher_entropies(self, pixels: Tensor) -> Tensor:
        """Of all pictures, in the mode in which the teacher answers; its statistics and the random state stay as they were."""
        judge = deepcopy(self.teacher).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # in an order of its own: batch norms should see the same mixture in every batch
            order = torch.randperm(len(pixels))
            found = torch.cat(
                [fisher_entropy(judge(part)) for part in pixels[order].tensor_split(max(1, len(pixels) // 256))]
            )
        return torch.empty_like(found).scatter_(0, order, found)


def _labelled_batch(
    pixels: Tensor, rotations: Tensor, settings: TrainSettings, number: int, turn: float
) -> dict[str, Tensor]:
    rows: Int[Tensor, "R"] = drawn_rows(len(pixels), settings.rows, number, settings.seed)
    weak, degrees = views(pixels[rows], generator_of(settings.seed, number), scales=(0.8, 1.25), turn=turn)
    return {"pixels": weak, "rotations": in_plane(degrees) @ rotations[rows]}


def _patches(b: int, n: int, side: int, g: torch.Generator) -> Tensor:
    """`n` rectangles in each of `b` pictures, where they are, `[b, side, side]`."""
    middle = side / 2 + side / 6 * torch.randn(b, n, 2, generator=g)
    half = side / 224 * (10 + 9 * torch.rand(b, n, 2, generator=g))
    at = torch.arange(side) + 0.5
    inside = ((at - middle[..., None]).abs() < half[..., None])[..., None, :]  # [b, n, 2, 1, side]
    return (inside[:, :, 0].mT & inside[:, :, 1]).any(1)


def _check(pixels: Tensor, rotations: Tensor) -> None:
    if len(pixels) != len(rotations) or len(pixels) < 2:
        raise InputError(f"{len(pixels)} pictures have {len(rotations)} rotations; give one for each, at least two.")


def _step(inner: int, outer: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)
    )
