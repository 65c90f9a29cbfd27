"""Projection heads (#101): why the states before a head that is thrown away transfer better than those after it.

Xue, Gan, Ni, Joshi and Mirzasoleiman, arXiv:2403.11391 (ICLR 2024). An encoder and a head are trained on two views x, x+ of each
example, and x' of another, with z = head(encoder(x)):

    spectral contrastive loss   L = -2 E[z . z+] + E[(z . z')^2]

In a linear encoder W1 with a linear head W2 gradient descent from small weights keeps the layers balanced, W1 W1^T = W2^T
W2, so a feature that W2 W1 gives the relative weight w has sqrt(w) after W1: features become less equal the deeper one
looks. What the loss wants little of (weak features, or those that the augmentation destroys) is thus still there before the
head.

`head_effect` reports on any encoder and head: normalised singular spectra before and after the head, and what linear probes
can read. `ReweightingHead` is the paper's alternative to a learned head: the fixed weights kappa^-i on the encoder's
coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number
from manyheads.learning import Head, Pool, Trunk
from manyheads.model.headmodel import HeadModel
from manyheads.predict.transfer.probe_then_tune import probe_head
from manyheads.progress import Bar
from manyheads.training import TrainSettings, fit


def spectral_contrastive_loss(z: Float[Tensor, "N D"], z_plus: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """L over a batch of N >= 2 pairs (formula above): the views of all other examples stand for x'. Without bias."""
    if len(z) < 2:
        raise InputError(f"the loss compares different examples, and there is {len(z)}; give at least two pairs.")
    same = (z * z_plus).sum(1)
    # sum_ij (z_i . z+_j)^2 without the N x N products
    all_pairs = ((z.T @ z) * (z_plus.T @ z_plus)).sum()
    return -2 * same.mean() + (all_pairs - same.square().sum()) / (len(z) * (len(z) - 1))


class ContrastiveHead(Head):
    """A head whose target is its own output for the other view of each example."""

    def loss(self, output: Float[Tensor, "N O"], target: Float[Tensor, "N O"]) -> Float[Tensor, ""]:
        """The spectral contrastive loss."""
        return spectral_contrastive_loss(output, target)

    def metrics(self, output: Float[Tensor, "N O"], target: Float[Tensor, "N O"]) -> dict[str, float]:
        """The mean cosine of two views of one example, and of views of different examples."""
        cosines = F.normalize(output, dim=1) @ F.normalize(target, dim=1).T
        n, same = len(cosines), float(cosines.trace())
        return {"same": same / n, "different": (float(cosines.sum()) - same) / (n * n - n)}


@dataclass(frozen=True)
class ProjectionSettings:
    """`width` of the encoder's states, `outputs`, the widths of hidden ReLU layers, the standard deviation of initial weights."""

    width: int
    outputs: int
    hidden: tuple[int, ...] = ()
    relu: bool = False
    std: float | None = None
    seed: int = 0


class ProjectionHead(ContrastiveHead):
    """Linear maps with ReLU between them, and after the last with `relu`. No biases.

    Weights are from N(0, std^2); by default std is 1 / sqrt(inputs).
    """

    Settings = ProjectionSettings

    def __init__(self, settings: ProjectionSettings) -> None:
        super().__init__(settings)
        draw = torch.Generator().manual_seed(settings.seed)
        self.layers = nn.ModuleList()
        sizes = [settings.width, *settings.hidden, settings.outputs]
        for inputs, outputs in pairwise(sizes):
            layer = nn.Linear(inputs, outputs, bias=False)
            std = inputs**-0.5 if settings.std is None else settings.std
            with torch.no_grad():
                layer.weight.copy_(std * torch.randn(outputs, inputs, generator=draw))
            self.layers.append(layer)

    def forward(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """Z."""
        for i, layer in enumerate(self.layers):
            states = layer(states)
            if i + 1 < len(self.layers) or self.settings.relu:
                states = states.relu()
        return states


@dataclass(frozen=True)
class ReweightingSettings:
    """`width` of the states; each coordinate has 1 / `kappa` of the weight of the one before it."""

    width: int
    kappa: float = 1.05


class ReweightingHead(ContrastiveHead):
    """z_i = kappa^-i h_i for i from 0: nothing to learn, and nothing lost."""

    Settings = ReweightingSettings
    weights: Tensor

    def __init__(self, settings: ReweightingSettings) -> None:
        super().__init__(settings)
        check_integer(settings.width, "width", 1)
        kappa = check_number(settings.kappa, "kappa", 1.0)
        self.register_buffer("weights", kappa ** -torch.arange(settings.width, dtype=torch.float32))

    def forward(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Z."""
        return states * self.weights


def train_contrastive(
    model: HeadModel | nn.Module,
    head: Head,
    views: Callable[[int], tuple[object, object]],
    settings: TrainSettings,
    *,
    layer: int | str = -1,
    pool: Pool = "mean",
    bar: Bar = Bar(),
) -> None:
    """Train model and head in place: `views(i)` gives two views of the same examples, as the model takes them."""
    trunk = Trunk(model, frozen=False)

    def loss(_: nn.Module, batch: tuple[object, object]) -> Tensor:
        one, other = (head(trunk.states(view, layer, pool)) for view in batch)
        return head.loss(one, other)

    fit(nn.ModuleList([trunk.backbone, head]), views, settings, loss=loss, bar=bar)


def layer_balance(W1: Float[Tensor, "H D"], W2: Float[Tensor, "O H"]) -> float:
    """|W1 W1^T - W2^T W2| / |W1 W1^T| (Frobenius): 0 where two linear layers share their work evenly."""
    below, above = W1 @ W1.T, W2.T @ W2
    return float((below - above).norm() / below.norm())


def normalised_spectrum(states: Float[Tensor, "N D"]) -> Float[Tensor, "K"]:
    """Singular values of centred states over the largest: equal features give ones."""
    values = torch.linalg.svdvals((states - states.mean(0)).double())
    return values / values[0].clamp_min(1e-30)


@dataclass(frozen=True)
class HeadEffect:
    """Spectra before and after a head, and `probes`: a row a target with what linear probes read `before` and `after` it."""

    spectrum_before: Float[Tensor, "before"]
    spectrum_after: Float[Tensor, "after"]
    probes: pd.DataFrame

    def accuracy(self, target: str, where: str) -> float:
        """Held-out accuracy of the probe for a target, "before" or "after"."""
        return float(self.probes.set_index("target").loc[target, where])


def head_effect(
    states: Float[Tensor, "N D"],
    head: Callable[[Tensor], Tensor],
    targets: Mapping[str, Int[Tensor, "N"]],
    *,
    train: int,
    C: float = 1.0,
) -> HeadEffect:
    """What a head does to states: the first `train` rows fit the probes, the others judge them (shuffle them before).

    States are divided by their largest singular value over sqrt(N) first, so that the probes' penalty means the same on both
    sides.
    """
    check_integer(train, "train", 1, len(states) - 1)
    with torch.no_grad():
        sides = {"before": states.float(), "after": head(states).float()}
    spectra, rows = {name: normalised_spectrum(side) for name, side in sides.items()}, []
    for target, labels in targets.items():
        found = {name: _probed(side, labels, train, C) for name, side in sides.items()}
        rows.append((target, found["before"], found["after"]))
    return HeadEffect(spectra["before"], spectra["after"], pd.DataFrame(rows, columns=["target", "before", "after"]))


@torch.no_grad()
def _probed(states: Tensor, labels: Tensor, train: int, C: float) -> float:
    size = torch.linalg.svdvals(states - states.mean(0))[0] / len(states) ** 0.5
    scaled = (states - states.mean(0)) / size.clamp_min(1e-30)
    probe = probe_head(scaled[:train], labels[:train], C=C)
    return probe.metrics(probe(scaled[train:]), labels[train:])["accuracy"]
