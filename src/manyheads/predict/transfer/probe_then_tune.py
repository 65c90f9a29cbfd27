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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.data.real import needed
from manyheads.errors import InputError
from manyheads.evaluation.calibration import Calibration, calibration, fit_temperature
from manyheads.inputs import check_number
from manyheads.learning import Attached, LinearHead, MultiHead, Pool, Trunk
from manyheads.learning.head import LinearSettings
from manyheads.model.headmodel import HeadModel
from manyheads.predict.transfer.tangent_kernel import step_parts
from manyheads.progress import Bar
from manyheads.training import TrainSettings, epoch_rows

TUNING = TrainSettings(epochs=10, rows=8, rate=2e-5, warmup=1, decay=0.0, weight_decay=0.0, precision="fp32")
LABEL = "label"  # the name of the head, and of its target in a batch


@dataclass(frozen=True)
class Classified:
    """Examples with their classes. `inputs` are what the trunk's forward takes, by name, a row an example; or "text": a list."""

    inputs: Mapping[str, Tensor | Sequence[str]]
    labels: Int[Tensor, "N"]

    def __post_init__(self) -> None:
        for name, values in self.inputs.items():
            if len(values) != len(self.labels):
                raise InputError(
                    f"there are {len(values)} rows of {name} and {len(self.labels)} labels; give one for each."
                )

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Int[Tensor, "R"]) -> Classified:
        """Some of the examples."""
        some = {
            k: v[index] if isinstance(v, Tensor) else [v[i] for i in index.tolist()] for k, v in self.inputs.items()
        }
        return Classified(some, self.labels[index])

    @property
    def batch(self) -> dict[str, Any]:
        """As `MultiHead` takes it."""
        return {**self.inputs, LABEL: self.labels}


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
    check_number(C, "C", 0.0, above=True)
    there = sorted(set(labels.tolist()))
    classes = there[-1] + 1 if classes is None else classes
    if there != list(range(classes)) or classes < 2:
        raise InputError(
            f"the labels are {there[:10]}; a probe of {classes} classes needs examples of each, from 0 on."
        )
    fitting = needed("sklearn.linear_model").LogisticRegression(C=C, max_iter=5000, tol=1e-6)
    found = fitting.fit(states.double().numpy(), labels.numpy())
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
) -> tuple[MultiHead, TransferReport]:
    """Probe, then tune `model` in place (copy it first to keep it): the model with its head, called "label", and the report.

    Without `probe`, plain FT from a random head. `head_scale` multiplies V before FT. `settings=None` ends after the probe. Even
    rows of `held_out` fit the temperature, odd rows are judged, so shuffle them. `InputError` as `probe_head` says, or where
    nothing of the model asks for gradients.
    """
    classes = int(train.labels.max()) + 1
    if len(held_out) < 2 or int(held_out.labels.max()) >= classes:
        raise InputError(
            f"held-out labels go to {int(held_out.labels.max())}; give two examples or more of classes below {classes}."
        )
    trunk = Trunk(model, frozen=False)
    if not any(p.requires_grad for p in trunk.backbone.parameters()):
        raise InputError("no parameter of the model asks for gradients; set requires_grad on those to tune.")
    before = all_features(trunk, train, layer, pool)
    start = LinearHead(LinearSettings(before.shape[1], classes, seed))
    head = (probe_head(before, train.labels, C=C, classes=classes) if probe else start).to(trunk.device)
    at_random = start.linear.weight.norm().item()
    with torch.no_grad():
        head.linear.weight.mul_(head_scale)
    tuned = MultiHead(trunk, {LABEL: Attached(head, layer=layer, pool=pool)})
    norm = head.linear.weight.norm().item()
    ratio = _ft_ratio(trunk, head, train.rows(torch.arange(min(32, len(train)))), layer, pool)
    if settings is not None:
        fine_tune(tuned, train, replace(settings, seed=seed), bar=bar)
    shift = (all_features(trunk, train, layer, pool) - before).norm(dim=1).mean().item()
    logits = head(all_features(trunk, held_out, layer, pool).to(trunk.device)).detach()
    plain, scaled, temperature = _calibrated(logits, held_out.labels)
    return tuned, TransferReport(
        head_norm_start=at_random,
        head_norm_before=norm,
        head_norm_after=head.linear.weight.norm().item(),
        feature_shift=shift,
        relative_shift=shift / before.norm(dim=1).mean().item(),
        ft_ratio=ratio,
        plain=plain,
        scaled=scaled,
        temperature=temperature,
    )


def fine_tune(tuned: MultiHead, train: Classified, settings: TrainSettings, *, bar: Bar = Bar()) -> None:
    """Step 2: cross-entropy on shuffled epochs; whatever asks for gradients learns."""
    n, settings = len(train), settings.for_examples(len(train))

    def batch(i: int) -> dict[str, Any]:
        return train.rows(epoch_rows(n, settings.rows, i, settings.seed)).batch

    tuned.fit(batch, settings, log_every=settings.steps, bar=bar)


def all_features(
    trunk: Trunk, data: Classified, layer: int | str = -1, pool: Pool = "mean", rows: int = 32
) -> Float[Tensor, "N D"]:
    """Phi of all examples, without gradients and without dropout."""
    read = Trunk(trunk.model)
    parts = (data.rows(index) for index in torch.arange(len(data)).split(rows))
    return torch.cat([read.states(part.batch, layer, pool).float().cpu() for part in parts])


def _ft_ratio(trunk: Trunk, head: LinearHead, data: Classified, layer: int | str, pool: Pool) -> float:
    learning = [p for p in trunk.backbone.parameters() if p.requires_grad]
    trunk.module.eval()
    labels = data.labels.to(trunk.device)
    return step_parts(lambda: trunk.states(data.batch, layer, pool), learning, head, labels).ft_ratio


def _calibrated(logits: Tensor, labels: Tensor) -> tuple[Calibration, Calibration, float]:
    values, truth = logits.double().cpu().numpy(), labels.numpy()
    temperature = fit_temperature(values[::2], truth[::2])
    judged = values[1::2], truth[1::2]
    return calibration(*judged), calibration(*judged, temperature=temperature), temperature
