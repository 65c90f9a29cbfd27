"""LP-FT (#42): fit the head on frozen features first, then tune everything; and a report of what that did to the features.

Tomihari and Sato, arXiv:2405.16747 (NeurIPS 2024); the recipe is Kumar et al.'s, arXiv:2202.10054. With f = V phi(x) + b,

    1 LP    V, b by logistic regression with an L2 penalty, phi frozen        min_V  |V|^2 / 2 + C sum_i nll_i
    2 FT    all parameters from there, at a small rate

A probed head has a large |V|. The pull on the features is linear in |V| and in delta = onehot - softmax (`tangent_kernel`), and
delta is small after LP, so features move little. The report has |V| (Frobenius) before and after, the mean shift of the features
|phi(x) - phi_0(x)|_2 over the training examples, the share of one step's effect that goes through the features (FT ratio), and
calibration on held-out examples before and after temperature scaling: large heads make overconfident probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.evaluation.calibration import Calibration, calibration, fit_temperature
from manyheads.inputs import check_number
from manyheads.learning import LinearHead, Pool
from manyheads.learning.head import LinearSettings
from manyheads.model.headmodel import HeadModel
from manyheads.predict.transfer.classifier import Classified, TrunkClassifier
from manyheads.predict.transfer.tangent_kernel import step_parts
from manyheads.progress import Bar
from manyheads.training import TrainSettings, epoch_rows, fit

TUNING = TrainSettings(epochs=10, rows=8, rate=2e-5, warmup=1, decay=0.0, weight_decay=0.0, precision="fp32")
PROBE_FIRST = "scikit-learn fits the linear probe; install it with pip install manyheads[predict]."


@dataclass(frozen=True)
class TransferReport:
    """What tuning did: |V| of a random head, before and after FT; shifts; held-out calibration, plain and scaled by 1 / T."""

    head_norm_start: float
    head_norm_before: float
    head_norm_after: float
    feature_shift: float
    relative_shift: float
    ft_ratio: float
    plain: Calibration
    scaled: Calibration
    temperature: float


def probe_head(
    states: Float[Tensor, "N D"], labels: Int[Tensor, "N"], *, C: float = 1.0, classes: int | None = None
) -> LinearHead:
    """Step 1: the L2-regularised logistic regression as a head. Separable data needs the penalty: without it |V| has no bound.

    `InputError` unless each of the classes 0 .. classes - 1 has an example, or without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise InputError(PROBE_FIRST) from None
    check_number(C, "C", 0.0, above=True)
    classes = int(labels.max()) + 1 if classes is None else classes
    if sorted(set(labels.tolist())) != list(range(classes)) or classes < 2:
        raise InputError(
            f"the labels are {sorted(set(labels.tolist()))[:10]}; a probe of {classes} classes needs all of them."
        )
    found = LogisticRegression(C=C, max_iter=5000, tol=1e-6).fit(states.double().numpy(), labels.numpy())
    weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if classes == 2:  # one row for the difference of two logits: half of it each, which has the least norm
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    head = LinearHead(LinearSettings(states.shape[1], classes))
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)
    return head


def probe_then_tune(
    model: HeadModel | nn.Module,
    train: Classified,
    held_out: Classified,
    *,
    layer: int | str = -1,
    pool: Pool = "mean",
    C: float = 1.0,
    probe: bool = True,
    head_scale: float = 1.0,
    settings: TrainSettings | None = TUNING,
    seed: int = 0,
    bar: Bar = Bar(),
) -> tuple[TrunkClassifier, TransferReport]:
    """Probe, then tune `model` in place (copy it first to keep it). Without `probe`, plain FT from a random head.

    `head_scale` multiplies V before FT. `settings=None` ends after the probe. Even rows of `held_out` fit the temperature, odd
    rows are judged, so shuffle them.
    """
    first = TrunkClassifier(model, LinearHead(LinearSettings(1, 1)), layer, pool)
    before = first.all_features(train)
    classes = int(train.labels.max()) + 1
    start = LinearHead(LinearSettings(before.shape[1], classes, seed))
    head = probe_head(before, train.labels, C=C, classes=classes) if probe else start
    with torch.no_grad():
        head.linear.weight.mul_(head_scale)
    tuned = TrunkClassifier(model, head.to(next(first.trunk.parameters()).device), layer, pool)
    norms = [one.linear.weight.norm().item() for one in (start, head)]
    ratio = _ratio(tuned, train.rows(torch.arange(min(32, len(train)))))
    if settings is not None:
        fine_tune(tuned, train, replace(settings, seed=seed), bar)
    after = tuned.all_features(train)
    shift = (after - before).norm(dim=1).mean()
    plain, scaled, temperature = _calibrated(tuned, held_out)
    sizes = (float(shift), float(shift / before.norm(dim=1).mean()))
    return tuned, TransferReport(*norms, head.linear.weight.norm().item(), *sizes, ratio, plain, scaled, temperature)


def fine_tune(tuned: TrunkClassifier, train: Classified, settings: TrainSettings, bar: Bar = Bar()) -> None:
    """Step 2: cross-entropy on shuffled epochs; whatever asks for gradients learns."""
    n, settings = len(train), settings.for_examples(len(train))

    def batch(i: int) -> tuple[Any, Tensor]:
        part = train.rows(epoch_rows(n, settings.rows, i, settings.seed))
        return part.inputs, part.labels

    fit(tuned, batch, settings, loss=lambda _, b: tuned.head.loss(tuned(b[0]), b[1]), bar=bar)


def _ratio(tuned: TrunkClassifier, data: Classified) -> float:
    learning = [p for p in tuned.trunk.parameters() if p.requires_grad]
    if not learning:
        raise InputError("no parameter of the trunk asks for gradients; set requires_grad on those to tune.")
    tuned.eval()
    return step_parts(lambda: tuned.features(data.inputs), learning, tuned.head, data.labels).ft_ratio


@torch.no_grad()
def _calibrated(tuned: TrunkClassifier, held_out: Classified) -> tuple[Calibration, Calibration, float]:
    logits = tuned.head(tuned.all_features(held_out).to(tuned.head.linear.weight)).double().cpu().numpy()
    labels = held_out.labels.numpy()
    temperature = fit_temperature(logits[::2], labels[::2])
    judged, truth = logits[1::2], labels[1::2]
    return calibration(judged, truth), calibration(judged, truth, temperature=temperature), temperature
