"""DHO (#38): labels and a teacher each teach a head of their own, and the two predictions are mixed afterwards.

Kang et al., arXiv:2505.07675. On one trunk z = f(x), with few labels y and a teacher's logits t for every row, labelled or not,

    loss  =  CE(ce(z), y) / 2  +  (mean over labelled + mean over unlabelled rows of l) / 2
    l     =  T^2 KL(softmax(t / T) || softmax(kd(z) / T))
    p     =  alpha softmax(ce(z)) + (1 - alpha) softmax(kd(z) / beta)

alpha and beta are chosen on validation data, and nothing is trained again. A batch has rows of both kinds; rows without a label
have the class -100. The reference code's two batches of one size are our one batch with as many rows of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import digits
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_number
from manyheads.learning import Attached, Head, LinearHead, LinearSettings, MultiHead, Pool, Trunk
from manyheads.learning.attached import MISSING
from manyheads.learning.trunk import Layer
from manyheads.predict.trunks import mlp
from manyheads.training import ADAM, drawn_rows

ALPHAS = tuple(i / 20 for i in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


def check_teacher(output: Tensor, target: Tensor) -> None:
    """`InputError` if a teacher's logits have another shape than a student's."""
    if target.shape != output.shape:
        raise InputError(f"it has logits of shape {list(output.shape)} and a teacher's of shape {list(target.shape)}.")


@dataclass(frozen=True)
class DistillSettings:
    """`width` of the states, `outputs` (the teacher's classes), the temperature T, and the seed of the initial weights."""

    width: int
    outputs: int
    temperature: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.temperature, "temperature", 0.0, above=True)


class DistillHead(Head):
    """A linear head that imitates a teacher: T^2 KL(softmax(t / T) || softmax(s / T)), the mean over rows, in nats."""

    Settings = DistillSettings

    def __init__(self, settings: DistillSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, settings.outputs, settings.seed)

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... C"]:
        """Logits."""
        out: Tensor = self.linear(states)
        return out

    def loss(self, output: Float[Tensor, "N C"], target: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
        """The formula above; `target` are the teacher's logits."""
        check_teacher(output, target)
        t = self.settings.temperature
        mine, theirs = (output / t).log_softmax(-1), (target / t).log_softmax(-1)
        return t**2 * F.kl_div(mine, theirs, reduction="batchmean", log_target=True)

    def metrics(self, output: Float[Tensor, "N C"], target: Float[Tensor, "N C"]) -> dict[str, float]:
        """The share of rows on which both have the same best class."""
        return {"agreement": float((output.argmax(-1) == target.argmax(-1)).float().mean())}


def dual_heads(
    trunk: Trunk,
    width: int,
    classes: int,
    *,
    temperature: float = 2.0,
    layer: Layer = -1,
    pool: Pool = "mean",
    seed: int = 0,
) -> MultiHead:
    """The two heads on a trunk, "ce" for labels and "kd" for a teacher's logits; a batch has entries of these names.

    To have the loss above, give batches half of whose rows have the class -100.
    """
    ce = LinearHead(LinearSettings(width, classes, seed))
    kd = DistillHead(DistillSettings(width, classes, temperature, seed + 1))
    return MultiHead(
        trunk, {"ce": Attached(ce, layer=layer, pool=pool, weight=0.5), "kd": Attached(kd, layer=layer, pool=pool)}
    )


@dataclass(frozen=True)
class Mix:
    """How both heads' outputs become one prediction: p of the formula above."""

    alpha: float
    beta: float

    def __call__(self, outputs: Mapping[str, Float[Tensor, "N C"]]) -> Float[Tensor, "N C"]:
        """Probabilities, from the outputs of both heads."""
        return self.alpha * outputs["ce"].softmax(-1) + (1 - self.alpha) * (outputs["kd"] / self.beta).softmax(-1)


@torch.no_grad()
def best_mix(
    outputs: Mapping[str, Float[Tensor, "N C"]],
    y: Int[Tensor, "N"],
    alphas: tuple[float, ...] = ALPHAS,
    betas: tuple[float, ...] = BETAS,
) -> Mix:
    """The mix with the highest accuracy on these rows, which neither head was trained on; among equals the likeliest one."""

    def worth(mix: Mix) -> tuple[float, float]:
        p = mix(outputs)
        return float((p.argmax(-1) == y).float().mean()), float(p.gather(1, y[:, None]).clamp_min(1e-12).log().mean())

    return max((Mix(alpha, beta) for alpha, beta in product(alphas, betas)), key=worth)


# Is one head for each better than one for both?


@dataclass(frozen=True)
class FewLabels:
    """Rows, classes, a teacher's logits; which rows have labels, which have none, and those of validation and test."""

    x: Float[Tensor, "N D"]
    y: Int[Tensor, "N"]
    teacher: Float[Tensor, "N C"]
    labelled: Int[Tensor, "L"]
    unlabelled: Int[Tensor, "U"]
    valid: Int[Tensor, "V"]
    test: Int[Tensor, "R"]
    steps: int


def confused_classes(seed: int, steps: int, classes: int = 20, width: int = 32, spread: float = 0.35) -> FewLabels:
    """Gaussian classes, 8 labels of each, and a teacher that sees each class as one of two."""
    draw = torch.Generator().manual_seed(seed)
    centres = spread * torch.randn(classes, width, generator=draw)
    y = torch.randint(classes, (10_000,), generator=draw)
    x = centres[y] + torch.randn(10_000, width, generator=draw)
    logits = x @ centres.T - centres.square().sum(1) / 2
    pairs = torch.arange(classes).view(-1, 2).flip(1).flatten()
    teacher = (logits + 0.8 * logits[:, pairs]) / 1.8
    return _few(x, y, teacher, 8, 6000, steps, seed)


def half_seen_digits(seed: int, steps: int) -> FewLabels:
    """Real digits, 4 labels of each, and a teacher that was shown the upper half of other images."""
    data = digits()
    x, y = torch.tensor(data.x).flatten(1), torch.tensor(data.y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    own, others = order[:1200], order[1200:]
    means = torch.stack([x[others][y[others] == c, :32].mean(0) for c in range(10)])
    teacher = -4 * torch.cdist(x[own, :32], means)
    return _few(x[own], y[own], teacher, 4, 600, steps, seed)


def _few(x: Tensor, y: Tensor, teacher: Tensor, each: int, unlabelled: int, steps: int, seed: int) -> FewLabels:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))
    labelled = torch.cat([order[y[order] == c][:each] for c in range(teacher.shape[1])])
    rest = order[~torch.isin(order, labelled)]
    valid, test = rest[unlabelled:].chunk(2)
    return FewLabels(x, y, teacher, labelled, rest[:unlabelled], valid, test, steps)


def _batches(data: FewLabels, seed: int) -> Any:
    def batch(number: int) -> dict[str, Tensor]:
        with_label = data.labelled[drawn_rows(len(data.labelled), 32, number, seed)]
        without = data.unlabelled[drawn_rows(len(data.unlabelled), 32, number, seed + 500)]
        rows = torch.cat([with_label, without])
        y = torch.cat([data.y[with_label], torch.full((32,), MISSING)])
        return {"input": data.x[rows], "ce": y, "kd": data.teacher[rows]}

    return batch


def _trained(data: FewLabels, seed: int, kept: tuple[str, ...] = ("ce", "kd"), *, shared: bool = False) -> Tensor:
    """The outputs on validation and test rows, as accuracy of the best mix; with one head there is nothing to mix."""
    trunk = Trunk(nn.Sequential(mlp(data.x.shape[1], 64, seed=seed)), frozen=False)
    both = dual_heads(trunk, 64, data.teacher.shape[1], seed=seed)
    if shared:  # one linear layer under both losses
        both.attached["kd"].head.linear = both.attached["ce"].head.linear
    heads = MultiHead(trunk, {name: both.attached[name] for name in kept})
    heads.fit(_batches(data, seed), replace(ADAM, steps=data.steps, rate=1e-3, decay=0.5))
    with torch.no_grad():
        valid, test = (heads({"input": data.x[rows]}) for rows in (data.valid, data.test))
    if len(kept) > 1 and not shared:
        p = best_mix(valid, data.y[data.valid])(test)
    else:
        p = test[kept[0]]
    return (p.argmax(-1) == data.y[data.test]).float().mean()


def _method(**options: Any) -> Any:
    return lambda make, seed: {"accuracy": float(_trained(make(seed), seed, **options))}


def _teacher(make: Any, seed: int) -> dict[str, float]:
    data = make(seed)
    return {"accuracy": float((data.teacher[data.test].argmax(-1) == data.y[data.test]).float().mean())}


def _gain(values: Mapping[tuple[str, str], float]) -> float:
    single = max(values[name, "accuracy"] for name in ("labels only", "teacher only", "one head"))
    return values["dual", "accuracy"] - single


register_experiment(
    Experiment(
        "dual-head",
        (38,),
        "2505.07675",
        "Do labels and a teacher with a head each do better than with one head for both?",
        datasets=lambda quick: {
            "gaussians": lambda seed: confused_classes(seed, 300 if quick else 3000),
            "digits": lambda seed: half_seen_digits(seed, 200 if quick else 2000),
        },
        methods={
            "teacher": _teacher,
            "labels only": _method(kept=("ce",)),
            "teacher only": _method(kept=("kd",)),
            "one head": _method(shared=True),
            "dual": _method(),
        },
        baseline="one head",
        claims=(
            Claim("it beats the best of the three single heads by a point", _gain, at_least=0.01, on="gaussians"),
            Claim("it is no worse than the best of them on real digits", _gain, at_least=0.0, on="digits"),
        ),
        minutes=4,
    )
)
