"""seq-JEPA (#103): predict the features of the next view from a few views and what was done between them.

Ghaemi et al., arXiv:2505.03176. Views x_1 .. x_{M+1} of one thing, actions a_1 .. a_M between them; encoder f, its slow copy f',
which learns nothing, and a projector g of actions (linear, without bias, then a batch norm without gains):

    z_m = f(x_m)                 token m = [z_m ; g(a_m)], and the last one [z_M ; 0]
    s   = the state of a learned token in front, after a small Transformer over the tokens            [B, D + A']
    p   = predictor([s ; g(a_M)])            L = 1 - mean cos(p, f'(x_{M+1}))

z must tell how the view is turned, else p could not know the next one. s may forget it: it sums up what stays. The last token has
no action, since the predictor is given a_M; else the answer to "what comes next" could be sought in two places.

Different from the paper: the encoder and all widths are the user's. The rate is constant after warm-up, as in the released
script. Nothing but the slow copy and batch norms keeps features from falling together, so `evenness` of a run is to be looked
at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number
from manyheads.learning import Card, Trunk, fill, load, save
from manyheads.progress import Bar
from manyheads.training import Progress, TrainSettings, fit
from manyheads.vision.core.encoders import SlowCopy, ViewBatches, ViewEncoder, view_batches

KIND = "next-view"
TRAINING = TrainSettings(
    steps=1200, rows=128, rate=1e-3, warmup=50, decay=0.0, betas=(0.9, 0.999), weight_decay=1e-3, clip=None,
    precision="fp32",
)  # fmt: skip


@dataclass(frozen=True)
class NextViewSettings:
    """`action_width` is A', `layers` and `heads` are the Transformer's, `hidden` is the predictor's, `base` the first decay.

    With `actions=False` every action is taken as 0, which is the control.
    """

    action_width: int = 32
    layers: int = 2
    heads: int = 4
    hidden: int = 256
    base: float = 0.99
    actions: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("action_width", "layers", "heads", "hidden"):
            check_integer(getattr(self, name), name, 1)
        check_number(self.base, "base", 0.0, 1.0)


class NextView(nn.Module):
    """An encoder with what trains it. `encoder` gives z, `summary` gives s; called on a batch of views and actions it is L."""

    def __init__(
        self, encoder: nn.Module | Trunk, width: int, actions: int, settings: NextViewSettings = NextViewSettings()
    ) -> None:
        super().__init__()
        s, self.settings, self.sizes = settings, settings, (width, actions)
        size = width + s.action_width
        if size % s.heads:
            raise InputError(f"{width} features and {s.action_width} of an action do not divide into {s.heads} heads.")
        self.encoder = ViewEncoder(encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            self.action = nn.Sequential(
                nn.Linear(actions, s.action_width, bias=False), nn.BatchNorm1d(s.action_width, affine=False)
            )
            layer = nn.TransformerEncoderLayer(size, s.heads, 4 * size, dropout=0.0, batch_first=True)
            self.aggregator = nn.TransformerEncoder(
                layer, s.layers, norm=nn.LayerNorm(size), enable_nested_tensor=False
            )
            self.front = nn.Parameter(torch.zeros(size))
            self.predictor = nn.Sequential(
                nn.Linear(size + s.action_width, s.hidden),
                nn.BatchNorm1d(s.hidden),
                nn.ReLU(),
                nn.Linear(s.hidden, width),
            )
        self.slow = SlowCopy(self.encoder, s.base)

    def acted(self, actions: Float[Tensor, "B M A"]) -> Float[Tensor, "B M W"]:
        """G of each action."""
        given = actions if self.settings.actions else torch.zeros_like(actions)
        found: Tensor = self.action(given.flatten(0, 1))
        return found.unflatten(0, actions.shape[:2])

    def states(self, z: Float[Tensor, "B M D"], acted: Float[Tensor, "B M-1 W"]) -> Float[Tensor, "B M+1 S"]:
        """What the Transformer makes of the token in front and of M views with the M - 1 actions between them."""
        tokens = torch.cat([z, F.pad(acted, (0, 0, 0, 1))], -1)
        out: Tensor = self.aggregator(torch.cat([self.front.expand(len(z), 1, -1), tokens], 1))
        return out

    def summary(self, views: Float[Tensor, "B M ..."], actions: Float[Tensor, "B M-1 A"]) -> Float[Tensor, "B S"]:
        """s, from any number of views."""
        z = self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        acted = self.acted(actions) if actions.shape[1] else actions.new_zeros(len(z), 0, self.settings.action_width)
        return self.states(z, acted)[:, 0]

    def predicted(self, views: Float[Tensor, "B M ..."], actions: Float[Tensor, "B M A"]) -> Float[Tensor, "B D"]:
        """p: the features of the view that the last action leads to."""
        z = self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        acted = self.acted(actions)
        s = self.states(z, acted[:, :-1])[:, 0]
        out: Tensor = self.predictor(torch.cat([s, acted[:, -1]], -1))
        return out

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """L: the last view of the batch is to be predicted from those before it."""
        views = batch["views"]
        p = self.predicted(views[:, :-1], batch["actions"])
        return 1 - F.cosine_similarity(p, self.slow(views[:, -1]), dim=-1).mean()

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write all of it into a new folder, the encoder's weights and the slow copy's too; not its code."""
        about = {"width": self.sizes[0], "actions": self.sizes[1]}
        card = Card("seq-jepa", "2505.03176", asdict(self.settings), self.settings.seed, kind=KIND, about=about)
        return save(folder, card, self, force=force)


def load_next_view(folder: str | Path, encoder: nn.Module | Trunk) -> NextView:
    """What `save` wrote, its weights put into an encoder of the same shapes.

    `InputError` where nothing of the kind was saved, `MismatchError` where the encoder has other shapes.
    """
    card, tensors = load(folder, KIND, "next-view encoder")
    try:
        model = NextView(
            encoder, int(card.about["width"]), int(card.about["actions"]), NextViewSettings(**card.settings)
        )
    except (TypeError, KeyError, ValueError):
        raise InputError(f"the card in {folder} is damaged; save the encoder again.") from None
    fill(model, tensors, folder)
    return model.eval()


def fit_next_view(
    encoder: nn.Module | Trunk,
    views: Float[Tensor, "N V ..."] | ViewBatches,
    actions: Float[Tensor, "N W A"] | None = None,
    settings: NextViewSettings = NextViewSettings(),
    training: TrainSettings = TRAINING,
    folder: str | Path | None = None,
    *,
    bar: Bar = Bar(),
) -> NextView:
    """Train an encoder of your own on sequences of V = M + 1 views with the actions between them; it is trained in place.

    `views` is a tensor, or a function of the batch number that draws {"views", "actions"}. `training` needs steps: the slow copy
    gets slower with the share of the run. With a `folder` an interrupted run goes on. `InputError` for shapes that do not fit, or
    a trunk that is frozen.
    """
    if training.steps is None:
        raise InputError("the slow copy gets slower with the share of the run; give TrainSettings steps.")
    total = training.steps
    batches = view_batches(views, actions, training.rows, training.seed)
    first = batches(0)
    width = ViewEncoder(encoder).width(first["views"][:2, 0])
    model = NextView(encoder, width, first["actions"].shape[-1], settings)

    def after(progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        model.slow.follow(model.encoder, progress.step / total)

    fit(model, batches, training, folder, after_step=after, bar=bar)
    return model.eval()


@torch.no_grad()
def summary_heads(
    model: NextView, views: Float[Tensor, "B V ..."], actions: Float[Tensor, "B W A"]
) -> Float[Tensor, "L H"]:
    """How much 1 - cos rises when an attention head of the aggregator writes nothing: which heads carry the prediction."""
    batch = {"views": views, "actions": actions}
    whole, rises = float(model(batch)), []
    for layer in model.aggregator.layers:
        weight = layer.self_attn.out_proj.weight  # type: ignore[union-attr]
        kept, size = weight.clone(), weight.shape[1] // model.settings.heads
        row = []
        for head in range(model.settings.heads):
            weight[:, head * size : (head + 1) * size] = 0
            row.append(float(model(batch)) - whole)
            weight.copy_(kept)
        rises.append(row)
    return torch.tensor(rises)
