"""DHKD (#79): matching a teacher's logits class by class, through a second head that is thrown away.

Yang et al., arXiv:2411.08937. On a shared trunk, `head1` learns the labels and stays; `head2` learns a teacher's logits t and
goes. With s the logits of head2 and T a temperature, for N rows and C classes,

    binary        T^2 / N sum over n, c of KL(Bern(sigmoid(t / T)) || Bern(sigmoid(s / T)))
    normalised    T^2 / N sum over n, c of KL(Bern(1/2) || Bern(sigmoid((s - t) / T)))  =  T^2 / N sum of ln cosh((s - t) / 2 T)

The second form is the default; it is written as ln cosh, which needs no clipping. Where the two gradients at the trunk conflict,
g_kd - (<g_kd, g_ce> / |g_ce|^2) g_ce takes the place of g_kd (`align`), over all of the trunk's parameters at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import digits
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_choice, check_number
from manyheads.learning import Attached, Head, LinearHead, LinearSettings, MultiHead, Pool, Trunk, Weighting
from manyheads.learning.trunk import Layer
from manyheads.predict.distillation.dual_head import DistillHead, DistillSettings, check_teacher
from manyheads.predict.trunks import mlp
from manyheads.training import ADAM, row_batches


@dataclass(frozen=True)
class BinaryKLSettings:
    """`width` of the states, `outputs`, the temperature, the form of the loss, and the width of the hidden layer (0: none)."""

    width: int
    outputs: int
    temperature: float = 2.0
    form: Literal["normalised", "binary"] = "normalised"
    hidden: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.temperature, "temperature", 0.0, above=True)
        check_choice(self.form, "form", ("normalised", "binary"))


class BinaryKLHead(Head):
    """`head2`: Linear, dropout .1, batch norm, ReLU, Linear (or one Linear), and the losses above."""

    Settings = BinaryKLSettings

    def __init__(self, settings: BinaryKLSettings) -> None:
        super().__init__(settings)
        out = LinearHead.seeded(settings.hidden or settings.width, settings.outputs, settings.seed + 1)
        first = LinearHead.seeded(settings.width, settings.hidden or 1, settings.seed)
        deep = nn.Sequential(first, nn.Dropout(0.1), nn.BatchNorm1d(settings.hidden or 1), nn.ReLU(), out)
        self.layers: nn.Module = deep if settings.hidden else out

    def forward(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Logits."""
        out: Tensor = self.layers(states)
        return out

    def loss(self, output: Float[Tensor, "N C"], target: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
        """One of the losses above; `target` are the teacher's logits."""
        check_teacher(output, target)
        form = normalised_kl if self.settings.form == "normalised" else binary_kl
        return form(output, target, self.settings.temperature)


def binary_kl(s: Float[Tensor, "N C"], t: Float[Tensor, "N C"], temperature: float = 2.0) -> Float[Tensor, ""]:
    """The first form: a sum over classes, a mean over rows."""
    p = (t / temperature).sigmoid()
    yes, no = (F.logsigmoid(side * t / temperature) - F.logsigmoid(side * s / temperature) for side in (1, -1))
    return temperature**2 * (p * yes + (1 - p) * no).sum(-1).mean()


def normalised_kl(s: Float[Tensor, "N C"], t: Float[Tensor, "N C"], temperature: float = 2.0) -> Float[Tensor, ""]:
    """The second form. ln cosh u = |u| + ln(1 + exp(-2 |u|)) - ln 2 holds for any u without overflow."""
    u = ((s - t) / (2 * temperature)).abs()
    return temperature**2 * (u + torch.log1p(torch.exp(-2 * u)) - math.log(2)).sum(-1).mean()


def align(gram: Float[Tensor, "2 2"]) -> Float[Tensor, "2"]:
    """Coefficients of both gradients at the trunk, label head first (a `Weighting`): the teacher's loses what conflicts."""
    conflict = gram[0, 1].clamp_max(0) / gram[0, 0].clamp_min(1e-30)
    return torch.stack([1 - conflict, torch.ones_like(conflict)])


def distilling_heads(
    trunk: Trunk,
    width: int,
    classes: int,
    *,
    alpha: float = 1.0,
    layer: Layer = -1,
    pool: Pool = "mean",
    **options: Any,
) -> MultiHead:
    """`head1` for labels and `head2` for a teacher's logits, on a trunk; `options` are those of `BinaryKLSettings`.

    Train with `fit(..., balance=Weighting(align))`. Afterwards only head1 answers.
    """
    seed = int(options.get("seed", 0))
    head1, head2 = (
        LinearHead(LinearSettings(width, classes, seed)),
        BinaryKLHead(BinaryKLSettings(width, classes, **options)),
    )
    helper = Attached(head2, layer=layer, pool=pool, weight=alpha, stays=False)
    return MultiHead(trunk, {"head1": Attached(head1, layer=layer, pool=pool), "head2": helper})


# Is a second head worth it? The paper finds that both losses on one head do worse than either.


@dataclass(frozen=True)
class _Taught:
    x: Float[Tensor, "N D"]
    y: Tensor
    teacher: Float[Tensor, "N C"]
    test_x: Float[Tensor, "R D"]
    test_y: Tensor
    steps: int


def _gaussians(seed: int, steps: int) -> _Taught:
    """50 Gaussian classes in 64 dimensions, 20 rows of each, by which a wider network was taught before."""
    draw = torch.Generator().manual_seed(seed)
    centres = 0.5 * torch.randn(50, 64, generator=draw)
    y = torch.randint(50, (9000,), generator=draw)
    x = centres[y] + torch.randn(9000, 64, generator=draw)
    return _taught(x, y, 1000, steps, seed)


def _real_digits(seed: int, steps: int) -> _Taught:
    """Real digits, 15 of each kind, by which a wider network was taught before."""
    data = digits()
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    return _taught(torch.tensor(data.x).flatten(1)[order] * 4, torch.tensor(data.y)[order], 150, steps, seed)


def _taught(x: Tensor, y: Tensor, n: int, steps: int, seed: int) -> _Taught:
    classes = int(y.max()) + 1
    teacher = MultiHead(
        Trunk(mlp(x.shape[1], 256, seed=seed + 70), frozen=False),
        {"y": LinearHead(LinearSettings(256, classes, seed + 71))},
    )
    rows = row_batches({"input": x[:n], "y": y[:n]}, 64, seed)
    teacher.fit(rows, replace(ADAM, steps=600, rate=1e-3, decay=0.5), log_every=10_000)
    with torch.no_grad():
        logits = teacher({"input": x[:n]})["y"]
    return _Taught(x[:n], y[:n], logits, x[n:], y[n:], steps)


def _tried(kind: str) -> Any:
    def run(make: Any, seed: int) -> dict[str, float]:
        data = make(seed)
        classes = data.teacher.shape[1]
        heads = distilling_heads(Trunk(mlp(data.x.shape[1], 32, seed=seed), frozen=False), 32, classes, seed=seed)
        label, second = heads.attached["head1"], heads.attached["head2"]
        if kind == "one head":  # the same logits under both losses
            second = Attached(BinaryKLHead(BinaryKLSettings(32, classes, hidden=0, seed=seed)), stays=False)
            second.head.layers = label.head.linear
        elif kind == "distillation at T = 4":
            second = Attached(DistillHead(DistillSettings(32, classes, 4.0, seed)), stays=False)
            second.head.linear = label.head.linear
        used = {"head1": label} if kind == "labels only" else {"head1": label, "head2": second}
        trained = MultiHead(heads.trunk, used)
        batches = row_batches({"input": data.x, "head1": data.y, "head2": data.teacher}, 64, seed)
        settings = replace(ADAM, steps=data.steps, rate=2e-3, decay=0.5)
        run = trained.fit(batches, settings, balance=Weighting(align) if kind == "dual" else None)
        with torch.no_grad():
            right = trained({"input": data.test_x})["head1"].argmax(-1) == data.test_y
        cosines = run.conflicts.to_frame()["cosine"]
        return {
            "accuracy": float(right.float().mean()),
            "cosine of gradients": float(cosines.mean()) if len(cosines) else math.nan,
        }

    return run


def _beyond(other: str) -> Any:
    def value(values: Mapping[tuple[str, str], float]) -> float:
        return values["dual", "accuracy"] - values[other, "accuracy"]

    return value


register_experiment(
    Experiment(
        "dual-distillation",
        (79,),
        "2411.08937",
        "Is a teacher's loss better on a head of its own, which is thrown away?",
        datasets=lambda quick: {
            "gaussians": lambda seed: _gaussians(seed, 150 if quick else 1500),
            "digits": lambda seed: _real_digits(seed, 150 if quick else 1500),
        },
        methods={name: _tried(name) for name in ("labels only", "one head", "distillation at T = 4", "dual")},
        baseline="one head",
        claims=(
            Claim(
                "it is within half a point of one head for both losses, or above", _beyond("one head"), at_least=-0.005
            ),
            Claim("it beats labels alone by 1.5 points", _beyond("labels only"), at_least=0.015, on="gaussians"),
            Claim("it beats labels alone on real digits", _beyond("labels only"), at_least=0.0, on="digits"),
            Claim("it is no worse than ordinary distillation", _beyond("distillation at T = 4"), at_least=0.0),
        ),
        minutes=3,
    )
)
