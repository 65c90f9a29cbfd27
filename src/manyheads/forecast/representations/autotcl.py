"""AutoTCL (#29): representations of series by contrast, with an augmentation that is learned: which part of a series informs.

"Parametric Augmentation for Time Series Contrastive Learning", arXiv:2402.10434 (ICLR 2024): univariate forecasts by a ridge
regression, mean MSE .157 (CoST .168, TS2Vec .207); classification +1.2 points.

    model = AutoTCL().fit(x)              # x [N, T, C], or a list of [T, C]; no classes
    model.embed(x)                        # [N, D], a row a series; model.embed(x, pool="last") for what follows it
    model.mask(x)                         # [N, T], the share that the augmenter keeps of each step
    AutoTCLClassifier().fit(x, y)         # a ridge regression on the rows

With f the encoder (dilated convolutions; [B, T, C] -> [B, T, D]), z = max over steps of f, and two outputs of the augmenter,
h (logits) and g in (0, 1), [B, T, 1], and u uniform,

    gate       m = clip((zeta - gamma) sigmoid(log u - log(1 - u) + h) + gamma, 0, 1),    zeta = 1, gamma = -.1
    view       v = g m x
    augmenter  MMD(z(x), z(v)) over 5 Gaussian kernels + area relu(mean sigmoid(h) - .4) + smooth mean (h_t - h_(t-1))^2
    encoder    InfoNCE(z(x), z(v)) + local InfoNCE of 16 parts of f, both of unit length at temperature 1

The augmenter steps once in `period` steps, the encoder in the others; read is the mean of the encoder's weights over all steps.

We depart: in the paper h is a sigmoid already, so that the odds of a gate lie between 1 and e, and no gate keeps a step more
than 1.4 times as often as another (`gate="bounded"` is that). Width 64, not 320. The local loss is that of all series of a batch,
where the released code takes that of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from manyheads.errors import InputError
from manyheads.forecast.representations.classify import RidgeProbe, ScaledSeries, SeriesClassifier
from manyheads.inputs import check_choice, check_integer, check_number, check_seed
from manyheads.learning import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import TrainSettings, epoch_rows, fit, generator_of

GATES = ("free", "bounded")
AUGMENTERS = ("learned", "fixed")
AREA, GAMMA, PARTS = 0.4, -0.1, 16
CONTRASTING = TrainSettings(
    rows=16, rate=1e-3, warmup=20, weight_decay=0.01, decay=0.3, floor=0.05, precision="fp32", betas=(0.9, 0.999)
)


@dataclass(frozen=True)
class AutoTCLSettings:
    """`width` D, `depth` convolutions, `steps` of training (0: the encoder as it is drawn), an augmenter's step in `period`.

    `augmenter` "fixed" learns nothing: gates of mean .4, scales from .5 to 1. `area`, `smooth`, `local` are weights of losses.
    """

    width: int = 64
    hidden: int = 32
    depth: int = 6
    steps: int = 200
    period: int = 3
    augmenter: str = "learned"
    gate: str = "free"
    area: float = 5.0
    smooth: float = 0.1
    local: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "depth"):
            check_integer(getattr(self, name), name, 1)
        check_integer(self.steps, "steps", 0)
        check_integer(self.period, "period", 2)
        for name in ("area", "smooth", "local"):
            check_number(getattr(self, name), name, 0.0)
        check_choice(self.augmenter, "augmenter", AUGMENTERS)
        check_choice(self.gate, "gate", GATES)
        check_seed(self.seed)


class DilatedEncoder(nn.Module):
    """A linear map, residual convolutions of 3 steps at dilations 1, 2, 4, ..., a linear map."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.begin, self.end = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.layers = nn.ModuleList([nn.Conv1d(hidden, hidden, 3, padding=2**i, dilation=2**i) for i in range(depth)])

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T D"]:
        """A state a step."""
        h = self.begin(x).transpose(1, 2)
        for layer in self.layers:
            h = h + layer(F.gelu(h))
        out: Tensor = self.end(F.gelu(h).transpose(1, 2))
        return out


def concrete_gate(h: Float[Tensor, "B T 1"], u: Float[Tensor, "B T 1"]) -> Float[Tensor, "B T 1"]:
    """The stretched and clipped binary concrete relaxation of a gate with log-odds h."""
    return ((1 - GAMMA) * (torch.logit(u, eps=1e-6) + h).sigmoid() + GAMMA).clamp(0, 1)


def gaussian_mmd(a: Float[Tensor, "B D"], b: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Maximum mean discrepancy with 5 Gaussian kernels, whose widths are .25 to 4 times the mean squared distance."""
    both = torch.cat([a, b])
    far = (both[:, None] - both[None]).square().sum(-1)
    n = len(both)
    width = far.detach().sum() / (n * n - n)
    kernel = torch.stack([(-far / (width * 2.0**i).clamp_min(1e-12)).exp() for i in range(-2, 3)]).sum(0)
    half = len(a)
    return kernel[:half, :half].mean() + kernel[half:, half:].mean() - 2 * kernel[:half, half:].mean()


def info_nce(a: Float[Tensor, "*G B D"], b: Float[Tensor, "*G B D"]) -> Float[Tensor, ""]:
    """Cross-entropy in nats of which b belongs to each a and the reverse, by cosines at temperature 1."""
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(-1, -2)
    own = torch.diagonal(cosines, dim1=-2, dim2=-1)
    return ((cosines.logsumexp(-1) - own).mean() + (cosines.logsumexp(-2) - own).mean()) / 2


class AutoTCLNetwork(nn.Module):
    """Encoder and augmenter. A batch has series `x`, its `number`, and uniform numbers `u`, [2, B, T, 1]."""

    def __init__(self, inputs: int, settings: AutoTCLSettings) -> None:
        super().__init__()
        self.settings, s = settings, settings
        self.encoder = DilatedEncoder(inputs, s.hidden, s.width, s.depth)
        self.augmenter = DilatedEncoder(inputs, s.hidden, 2, s.depth)

    def log_odds(self, x: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B T 1"], Float[Tensor, "B T 1"]]:
        """Log-odds of the gates, before any sigmoid, and g."""
        h, g = self.augmenter(x).split(1, -1)
        return h, g.sigmoid()

    def view(self, x: Float[Tensor, "B T C"], u: Float[Tensor, "2 B T 1"]) -> tuple[Float[Tensor, "B T C"], Tensor]:
        """The augmented series, and h."""
        if self.settings.augmenter == "fixed":
            h = torch.full_like(u[0], float(torch.logit(torch.tensor(AREA))))
            return (0.5 + 0.5 * u[1, :, :1]) * concrete_gate(h, u[0]) * x, h
        h, g = self.log_odds(x)
        gate = concrete_gate(h.sigmoid() if self.settings.gate == "bounded" else h, u[0])
        return g * gate * x, h

    def forward(self, batch: dict[str, Any]) -> Float[Tensor, ""]:
        """The loss of the one whose turn it is; the other gets no gradient."""
        x, s = batch["x"], self.settings
        if s.augmenter == "learned" and batch["number"] % s.period == 0:
            view, h = self.view(x, batch["u"])
            still = {name: p.detach() for name, p in self.encoder.named_parameters()}
            a, b = (functional_call(self.encoder, still, (one,)).amax(1) for one in (x, view))
            area = F.relu(h.sigmoid().mean() - AREA)
            return gaussian_mmd(a, b) + s.area * area + s.smooth * h.diff(dim=1).square().mean()
        with torch.no_grad():
            view, _ = self.view(x, batch["u"])
        a, b = self.encoder(x), self.encoder(view)
        parts = [torch.stack([p.amax(1) for p in one.tensor_split(min(PARTS, x.shape[1]), 1)], 1) for one in (a, b)]
        return info_nce(a.amax(1), b.amax(1)) + s.local * info_nce(*parts)


class AutoTCL(ScaledSeries):
    """Fit, embed, mask, save and load."""

    def __init__(self, settings: AutoTCLSettings = AutoTCLSettings(), training: TrainSettings = CONTRASTING) -> None:
        self.settings, self.training = settings, training

    def fit(self, x: Any, *, bar: Bar = Bar()) -> AutoTCL:
        """Learn from series alone. `InputError` for fewer than two."""
        return self.learn(self.measure(x), bar)

    def learn(self, x: Float[Tensor, "N T C"], bar: Bar = Bar()) -> AutoTCL:
        """`fit`, of series that are scaled already."""
        if len(x) < 2:
            raise InputError("there is one series, and contrast needs others; give two at least.")
        self._build(x.shape[2])
        s = self.settings
        if not s.steps:
            return self
        mean = AveragedModel(self.network_.encoder)

        def batch(number: int) -> dict[str, Any]:
            rows = epoch_rows(len(x), self.training.rows, number, s.seed)
            u = torch.rand(2, len(rows), x.shape[1], 1, generator=generator_of(s.seed + 1, number))
            return {"x": x[rows], "number": number, "u": u}

        def after(*_: Any) -> None:
            mean.update_parameters(self.network_.encoder)

        settings = replace(self.training, steps=s.steps, seed=s.seed)
        fit(self.network_, batch, settings, after_step=after, device="cpu", bar=bar.step("autotcl", s.steps))
        self.network_.encoder.load_state_dict(mean.module.state_dict())
        self.network_.eval()
        return self

    def embed(self, x: Any, pool: str = "max") -> Float[np.ndarray, "N D"]:
        """A row a series: the largest state over steps, or the "last" one."""
        return self.pooled(self.scaled(x), check_choice(pool, "pool", ("max", "last"))).numpy()

    @torch.no_grad()
    def pooled(self, x: Float[Tensor, "N T C"], pool: str = "max") -> Float[Tensor, "N D"]:
        """`embed`, of series that are scaled already."""
        states = [self.network_.encoder(part) for part in x.split(64)]
        return torch.cat([one.amax(1) if pool == "max" else one[:, -1] for one in states])

    @torch.no_grad()
    def mask(self, x: Any, draws: int = 32) -> Float[np.ndarray, "N T"]:
        """The mean gate of each step, over `draws` of u."""
        rows, s = self.scaled(x), self.settings
        if s.augmenter == "fixed":
            raise InputError("a fixed augmenter keeps every step as often; give augmenter='learned'.")
        h, _ = self.network_.log_odds(rows)
        h = h.sigmoid() if s.gate == "bounded" else h
        u = torch.rand(draws, *h.shape, generator=torch.Generator().manual_seed(s.seed))
        return torch.stack([concrete_gate(h, one) for one in u]).mean(0)[..., 0].numpy()

    def _build(self, channels: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.network_ = AutoTCLNetwork(channels, self.settings).eval()

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings and weights into a new folder."""
        if not hasattr(self, "steps_"):
            raise InputError("this AutoTCL was not fitted; call fit first.")
        card = Card(
            "autotcl", "2402.10434", vars(self.settings), self.settings.seed, kind="autotcl", about=self._scales()
        )
        return save(folder, card, self.network_, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> AutoTCL:
        """One as it was saved: its rows are the same bits."""
        card, tensors = load(folder, "autotcl", "AutoTCL")
        try:
            made = cls(AutoTCLSettings(**card.settings))
            made._take_scales(card.about)
            made._build(len(made.mean_))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the card in {folder} is damaged ({error}).") from None
        fill(made.network_, tensors, folder)
        return made


class AutoTCLClassifier(SeriesClassifier):
    """A ridge regression of the classes on the rows of `AutoTCL`, which learns from the same series without them."""

    def __init__(self, settings: AutoTCLSettings = AutoTCLSettings(), training: TrainSettings = CONTRASTING) -> None:
        self.model = AutoTCL(settings, training)

    def learn(self, x: Float[Tensor, "N T C"], y: Int[Tensor, "N"], bar: Bar) -> None:
        """Both. `model` then embeds series as they are given to the classifier."""
        rows = self.model.learn(x, bar).pooled(x)
        self.model._take_scales(self._scales())
        self.probe = RidgeProbe().fit(rows, 2.0 * F.one_hot(y) - 1)

    def logits(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N K"]:
        """What the regression says: an order of classes, no probability."""
        return self.probe.predict(self.model.pooled(x))
