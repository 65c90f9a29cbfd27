"""SIE (#118): features of which one half stays when the view changes, and the other half moves as the view does.

Garrido, Najman and LeCun, arXiv:2302.10283. Two views of each thing, and g [B, A], which says how the first became the
second. The encoder's vector is cut in two, each part has a projector of its own, and gives x_inv, x_eq of the first view and
y_inv, y_eq of the second, [B, E] each. A layer without bias turns g into a matrix, W(g) [E, E], so the prediction cannot
leave g aside:

    y^ = W(g) x_eq
    L  = 10 MSE(x_inv, y_inv) + 4.5 MSE(y^, y_eq) + 5 v(y^) + 10 V([inv, eq]) + C([inv, eq])

v is the variance term of `core.collapse`, V its mean over the two views, C the covariance term summed over them. V and C see both
halves side by side. With `share=1` there is no moving part, and L is VICReg's, the two-view baseline.

Different from the paper: encoder and widths are the user's; the paper trains a ResNet-18 on 3DIEBench for 2,000 epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.learning import Card, Trunk, fill, load, save
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings, fit
from manyheads.vision.core.collapse import covariance_term, variance_term
from manyheads.vision.core.encoders import ViewBatches, ViewEncoder, view_batches

KIND = "split-views"
TRAINING = replace(ADAM, steps=1500, rate=1e-3, rows=128)


@dataclass(frozen=True)
class SplitSettings:
    """`share` of the encoder's vector stays, the rest moves. `width` is E, and that of the projectors' hidden layers.

    `predictor` "matrix" is the paper's W(g); "concatenated" is a network that reads [x_eq, g], and may leave g aside. The weights
    are those of L, in its order.
    """

    share: float = 0.5
    width: int = 128
    predictor: Literal["matrix", "concatenated"] = "matrix"
    invariance: float = 10.0
    equivariance: float = 4.5
    predicted_variance: float = 5.0
    variance: float = 10.0
    covariance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.share, "share", 0.0, 1.0, above=True)
        check_integer(self.width, "width", 2)
        check_choice(self.predictor, "predictor", ("matrix", "concatenated"))


class ActionMatrix(nn.Module):
    """x [B, E] and g [B, A] to W(g) x, where W is linear in g: W(2 g) = 2 W(g)."""

    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Linear(actions, width * width, bias=False)
        self.size = width

    def matrix(self, g: Float[Tensor, "B A"]) -> Float[Tensor, "B E E"]:
        """W(g), rows are outputs."""
        found: Tensor = self.rows(g)
        return found.unflatten(-1, (self.size, self.size))

    def forward(self, x: Float[Tensor, "B E"], g: Float[Tensor, "B A"]) -> Float[Tensor, "B E"]:
        """W(g) x, without making the matrices: the rows' weights times all products of an x and a g."""
        weight = self.rows.weight.reshape(self.size, -1)  # [E, E A]
        return (x[..., None] * g[:, None]).flatten(1) @ weight.T


class _Concatenated(nn.Module):
    """The control: a network that reads x and g side by side."""

    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + actions, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, g], -1))
        return out


class SplitViews(nn.Module):
    """An encoder with what trains it. `embed` gives its two halves; called on a batch of two views it is L."""

    def __init__(
        self, encoder: nn.Module | Trunk, width: int, actions: int, settings: SplitSettings = SplitSettings()
    ) -> None:
        super().__init__()
        self.encoder, self.settings, self.sizes = ViewEncoder(encoder), settings, (width, actions)
        self.still = round(settings.share * width)
        if not self.still or (settings.share < 1 and self.still == width):
            raise InputError(
                f"a share of {settings.share} of {width} features leaves a part empty; give another share."
            )
        self.moves = self.still < width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.still_projector = _projector(self.still, settings.width)
            self.moving_projector = _projector(width - self.still, settings.width) if self.moves else None
            kind = ActionMatrix if settings.predictor == "matrix" else _Concatenated
            self.predictor = kind(actions, settings.width) if self.moves else None

    def embed(self, pictures: Float[Tensor, "B ..."]) -> tuple[Float[Tensor, "B Ds"], Float[Tensor, "B Dm"]]:
        """The half that stays and the half that moves (empty with `share=1`), as the encoder gives them."""
        found = self.encoder(pictures)
        return found[:, : self.still], found[:, self.still :]

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """L on the first two views of a batch."""
        s, views = self.settings, batch["views"][:, :2]
        still, moving = self.embed(views.flatten(0, 1))  # both views in one pass, so that batch norms see them alike
        inv = self.still_projector(still).unflatten(0, (-1, 2)).unbind(1)
        loss = s.invariance * F.mse_loss(inv[0], inv[1])
        whole = inv
        if self.moving_projector is not None and self.predictor is not None:
            eq = self.moving_projector(moving).unflatten(0, (-1, 2)).unbind(1)
            predicted = self.predictor(eq[0], batch["actions"][:, 0])
            loss = loss + s.equivariance * F.mse_loss(predicted, eq[1])
            loss = loss + s.predicted_variance * variance_term(predicted)
            whole = tuple(torch.cat(both, -1) for both in zip(inv, eq, strict=True))
        loss = loss + s.variance * sum(variance_term(one) for one in whole) / 2
        return loss + s.covariance * sum(covariance_term(one) for one in whole)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write all of it into a new folder, the encoder's weights too; not its code."""
        about = {"width": self.sizes[0], "actions": self.sizes[1]}
        settings = asdict(self.settings)
        card = Card("sie", "2302.10283", settings, self.settings.seed, kind=KIND, about=about)
        return save(folder, card, self, force=force)


def load_split(folder: str | Path, encoder: nn.Module | Trunk) -> SplitViews:
    """What `save` wrote, its weights put into an encoder of the same shapes.

    `InputError` where nothing of the kind was saved, `MismatchError` where the encoder has other shapes.
    """
    card, tensors = load(folder, KIND, "split encoder")
    try:
        model = SplitViews(
            encoder, int(card.about["width"]), int(card.about["actions"]), SplitSettings(**card.settings)
        )
    except (TypeError, KeyError, ValueError):
        raise InputError(f"the card in {folder} is damaged; save the encoder again.") from None
    fill(model, tensors, folder)
    return model.eval()


def fit_split(
    encoder: nn.Module | Trunk,
    views: Float[Tensor, "N M ..."] | ViewBatches,
    actions: Float[Tensor, "N T A"] | None = None,
    settings: SplitSettings = SplitSettings(),
    training: TrainSettings = TRAINING,
    folder: str | Path | None = None,
    *,
    bar: Bar = Bar(),
) -> SplitViews:
    """Train an encoder of your own on pairs of views and how the second came from the first; it is trained in place.

    `views` is a tensor, or a function of the batch number that draws {"views", "actions"}. With a `folder` an interrupted run
    goes on. `InputError` for shapes that do not fit, or a trunk that is frozen.
    """
    batches = view_batches(views, actions, training.rows, training.seed)
    first = batches(0)
    width = ViewEncoder(encoder).width(first["views"][:2, 0])
    model = SplitViews(encoder, width, first["actions"].shape[-1], settings)
    fit(model, batches, training, folder, bar=bar)
    return model.eval()


def _projector(width: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU(), nn.Linear(out, out), nn.BatchNorm1d(out), nn.ReLU(),
        nn.Linear(out, out),
    )  # fmt: skip
