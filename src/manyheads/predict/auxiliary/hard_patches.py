"""Hard patches mining (#97): a head that predicts which patches are hard to reconstruct chooses the next masks.

Wang et al., arXiv:2312.13714. A masked autoencoder hides most patches of a picture; a decoder reconstructs them, and a second
one of the same shape says for each patch how hard that will be, s. With l_i the mean squared error of a masked patch i,

    L  =  mean of l  -  mean over masked pairs i, j with l_i != l_j of  log sigmoid(+- (s_i - s_j)),     + where l_i > l_j

The l in the second part are targets: it moves the predictor, and the encoder, but not the reconstruction's own decoder. A slow
copy of the model (EMA) scores whole pictures. Of the gamma N patches to hide, alpha gamma N are the hardest, and the others are
random; alpha grows from 0 to one half in training.

Scores of a whole picture are asked of a head that was taught on masked patches alone. `score_mode="folds"` hides a quarter of the
patches at a time and reads the scores there, in four passes; "full" is the paper's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import digits
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, auc, rank_correlation, register_experiment
from manyheads.inputs import check_choice, check_number
from manyheads.progress import Bar
from manyheads.training import ADAM, Progress, TrainSettings, drawn_rows, fit, generator_of


@dataclass(frozen=True)
class PatchSettings:
    """`patch` is the side of a patch, `width`, `heads` and `layers` the encoder's, `decoder_layers` those of both decoders.

    `ratio` is the share of patches to hide, `most` the largest alpha; 0 leaves masks random. `decay` is the slow copy's.
    """

    patch: int = 4
    width: int = 64
    heads: int = 4
    layers: int = 3
    decoder_layers: int = 1
    ratio: float = 0.75
    most: float = 0.5
    predict: bool = True
    score_mode: Literal["full", "folds"] = "folds"
    decay: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.ratio, "ratio", 0.0, 1.0, above=True)
        check_number(self.most, "most", 0.0, 1.0)
        check_choice(self.score_mode, "score_mode", ("full", "folds"))


def patches(pictures: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B N P"]:
    """Pictures cut into N squares, row by row. `InputError` where they do not divide."""
    if pictures.shape[2] % side or pictures.shape[3] % side:
        size = f"{pictures.shape[2]} x {pictures.shape[3]}"
        raise InputError(f"pictures of {size} do not divide into patches of {side} x {side}.")
    return F.unfold(pictures, side, stride=side).transpose(1, 2)


def hard_mask(
    scores: Float[Tensor, "B N"], ratio: float, alpha: float, generator: torch.Generator | None = None
) -> Bool[Tensor, "B N"]:
    """True where a patch is hidden: round(ratio N) a picture, of which round(alpha ratio N) have the highest scores."""
    n = scores.shape[1]
    count, hardest = round(ratio * n), round(alpha * ratio * n)
    rank = scores.argsort(1, descending=True).argsort(1)
    random = torch.rand(scores.shape, generator=generator).to(scores.device)
    order = torch.where(rank < hardest, rank - n, random)  # the hardest first, then at random
    return order.argsort(1).argsort(1) < count


def relative_loss(
    scores: Float[Tensor, "B N"], losses: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """The second part of the formula above, over pairs of masked patches of the same picture."""
    apart, harder = scores[:, :, None] - scores[:, None], losses[:, :, None] > losses[:, None]
    pairs = mask[:, :, None] & mask[:, None] & (losses[:, :, None] != losses[:, None])
    return -(F.logsigmoid(torch.where(harder, apart, -apart)) * pairs).sum() / pairs.sum().clamp_min(1)


class HardPatches(nn.Module):
    """A masked autoencoder with a loss predictor, for pictures of one size, `shape` = (channels, height, width)."""

    def __init__(self, shape: tuple[int, int, int], settings: PatchSettings = PatchSettings()) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        s, (channels, height, width) = settings, shape
        self.count = patches(torch.zeros(1, *shape), s.patch).shape[1]
        size = channels * s.patch**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            self.embed = nn.Linear(size, s.width)
            self.encoder = _stack(s.width, s.heads, s.layers)
            self.reconstructor, self.predictor = (_stack(s.width, s.heads, s.decoder_layers) for _ in range(2))
            self.pixels, self.hardness = nn.Linear(s.width, size), nn.Linear(s.width, size)
            self.hidden = nn.Parameter(0.02 * torch.randn(s.width))
        self.register_buffer("places", _sines(height // s.patch, width // s.patch, s.width), persistent=False)
        self.slow: HardPatches | None = None

    places: Tensor

    def forward(
        self, pictures: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B N P"], Float[Tensor, "B N"]]:
        """Every patch's pixels and hardness, from the patches that are not hidden. Every picture hides as many."""
        tokens = self.embed(patches(pictures, self.settings.patch)) + self.places
        shown = (~mask).float().argsort(dim=1, descending=True, stable=True)[:, : int((~mask[0]).sum())]
        kept = shown[..., None].expand(-1, -1, tokens.shape[-1])
        encoded = self.encoder(tokens.gather(1, kept))
        whole = self.hidden.expand_as(tokens).scatter(1, kept, encoded) + self.places
        return self.pixels(self.reconstructor(whole)), self.hardness(self.predictor(whole)).mean(-1)

    def states(self, pictures: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The encoder's mean state of whole pictures, for heads on top."""
        out: Tensor = self.encoder(self.embed(patches(pictures, self.settings.patch)) + self.places).mean(1)
        return out

    @torch.no_grad()
    def scores(self, pictures: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        """How hard each patch is, by the slow copy once there is one, in the way that `score_mode` says."""
        model = self.slow or self
        n = self.count
        if self.settings.score_mode == "full":
            return model(pictures, torch.zeros(len(pictures), n, dtype=torch.bool))[1]
        out = torch.zeros(len(pictures), n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        for fold in range(4):
            mask = torch.zeros(n, dtype=torch.bool)
            mask[order[fold::4]] = True
            out[:, mask] = model(pictures, mask.expand(len(pictures), n))[1][:, mask]
        return out

    def loss(self, pictures: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, ""]:
        """L of the formula above, or its first part alone without `predict`."""
        found, scores = self(pictures, mask)
        losses = (found - patches(pictures, self.settings.patch)).square().mean(-1)
        reconstruction = losses[mask].mean()
        return (
            reconstruction + relative_loss(scores, losses.detach(), mask) if self.settings.predict else reconstruction
        )

    def fit(
        self,
        pictures: Float[Tensor, "N C H W"],
        settings: TrainSettings,
        folder: str | Path | None = None,
        *,
        bar: Bar = Bar(),
    ) -> Progress:
        """Train in place on pictures. `settings` need steps: alpha grows with the share of the run."""
        if settings.steps is None:
            raise InputError("masks get harder with the share of the run; give TrainSettings steps.")
        total = settings.steps
        self.slow = None
        slow = copy.deepcopy(self).requires_grad_(False)
        self.slow = slow  # a part of the model, so that an interrupted run has it

        def batch(number: int) -> dict[str, Tensor]:
            rows = pictures[drawn_rows(len(pictures), settings.rows, number, settings.seed)]
            return {"pictures": rows, "number": torch.tensor(number)}

        def loss(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
            number, rows = int(given["number"]), given["pictures"]
            alpha = self.settings.most * number / total
            scores = self.scores(rows) if alpha else torch.zeros(len(rows), self.count)
            return self.loss(rows, hard_mask(scores, self.settings.ratio, alpha, generator_of(settings.seed, number)))

        learned = dict(self.named_parameters())

        def after(progress: Progress, optimizer: torch.optim.Optimizer) -> None:
            with torch.no_grad():
                for name, old in slow.named_parameters():
                    old.lerp_(learned[name], 1 - self.settings.decay)

        return fit(self, batch, settings, folder, loss=loss, after_step=after, bar=bar)


def _stack(width: int, heads: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def _sines(height: int, width: int, size: int) -> Float[Tensor, "N D"]:
    """Fixed places: a quarter of the features each for the sine and cosine of row and column."""
    rates = 1 / 100 ** (torch.arange(size // 4) / (size // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = [wave(axis.flatten()[:, None] * rates) for axis in (row, column) for wave in (torch.sin, torch.cos)]
    return F.pad(torch.cat(parts, 1), (0, size - 4 * (size // 4)))


# Does it find what is hard, and is it worth anything?


def noisy_pictures(seed: int, n: int = 512) -> tuple[Float[Tensor, "N 1 24 24"], Bool[Tensor, "N 36"]]:
    """Smooth gradients with one block of noise, 3 x 3 patches of 4 x 4; and which patches the noise is in."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 1, 24)
    slope = torch.randn(n, 2, 1, 1, generator=draw)
    pictures = (slope[:, :1] * grid[:, None] + slope[:, 1:] * grid)[:, 0, None] * 0.5
    noisy = torch.zeros(n, 6, 6, dtype=torch.bool)
    corner = torch.randint(0, 4, (n, 2), generator=draw)
    for i, (row, column) in enumerate(corner.tolist()):
        noisy[i, row : row + 3, column : column + 3] = True
    where = noisy.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    return torch.where(where, torch.randn(pictures.shape, generator=draw), pictures), noisy.flatten(1)


@dataclass(frozen=True)
class _Run:
    pictures: Tensor
    steps: int
    noisy: Tensor | None = None
    y: Tensor | None = None


def _noise(seed: int, steps: int) -> _Run:
    pictures, noisy = noisy_pictures(seed)
    return _Run(pictures, steps, noisy=noisy)


def _digits(seed: int, steps: int) -> _Run:
    data = digits()
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    return _Run(torch.tensor(data.x)[order][:, None], steps, y=torch.tensor(data.y)[order])


def _tried(**options: Any) -> Callable[[Callable[[int], _Run], int], dict[str, float]]:
    def run(make: Callable[[int], _Run], seed: int) -> dict[str, float]:
        data = make(seed)
        settings = PatchSettings(patch=4 if data.noisy is not None else 2, seed=seed, **options)
        _, *shape = data.pictures.shape
        model = HardPatches((shape[0], shape[1], shape[2]), settings)
        model.fit(data.pictures, replace(ADAM, steps=data.steps, rate=1e-3, rows=32, seed=seed))
        return _found_noise(model, data, seed) if data.noisy is not None else _probed(model, data)

    return run


@torch.no_grad()
def _found_noise(model: HardPatches, data: _Run, seed: int) -> dict[str, float]:
    pictures, noisy = noisy_pictures(seed + 1000, 128)
    mask = hard_mask(torch.zeros(128, 36), 0.75, 0.0, torch.Generator().manual_seed(seed))
    found, s = model(pictures, mask)
    losses = (found - patches(pictures, 4)).square().mean(-1)
    ranks = [rank_correlation(s[i][mask[i]].numpy(), losses[i][mask[i]].numpy()) for i in range(128)]
    scores = model.scores(pictures)
    top = scores.argsort(1, descending=True)[:, :9]
    used = hard_mask(scores, 0.75, 0.5, torch.Generator().manual_seed(seed))
    return {
        "rank correlation": float(np.nanmean(ranks)),
        "noise among the hardest": float(noisy.gather(1, top).float().mean()),
        "noise masked": float((used & noisy).sum() / noisy.sum()),
        "auc of noise": auc(scores.numpy().ravel(), noisy.numpy().ravel()),
    }


def _probed(model: HardPatches, data: _Run) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression

    assert data.y is not None
    with torch.no_grad():
        states = model.states(data.pictures).numpy()
    probe = LogisticRegression(max_iter=2000, C=10.0).fit(states[:300], data.y[:300].numpy())
    return {"probe accuracy": float(probe.score(states[300:], data.y[300:].numpy()))}


def _gain(method: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda v: v[method, "probe accuracy"] - v["random masks", "probe accuracy"]


def _of(metric: str, chance: float = 1.0) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda v: v["hard patches", metric] / chance


register_experiment(
    Experiment(
        "hard-patches",
        (97,),
        "2312.13714",
        "Does a head that predicts its own loss find what is hard, and teach the trunk more?",
        datasets=lambda quick: {
            "noise": lambda seed: _noise(seed, 60 if quick else 600),
            "digits": lambda seed: _digits(seed, 60 if quick else 400),
        },
        methods={
            "random masks": _tried(predict=False, most=0.0),
            "prediction, random masks": _tried(most=0.0),
            "hard patches": _tried(),
            "hard patches, full scores": _tried(score_mode="full"),
        },
        baseline="random masks",
        claims=(
            Claim("it ranks masked patches by their loss", _of("rank correlation"), at_least=0.4, on="noise"),
            Claim(
                "of the nine hardest 40 % are noise (chance 25 %)",
                _of("noise among the hardest"),
                at_least=0.4,
                on="noise",
            ),
            Claim(
                "noise is masked 1.1 times as often as at random", _of("noise masked", 0.75), at_least=1.1, on="noise"
            ),
            Claim(
                "the probe on digits is above that of random masks", _gain("hard patches"), at_least=0.0, on="digits"
            ),
            Claim("prediction alone helps, too", _gain("prediction, random masks"), at_least=0.0, on="digits"),
        ),
        minutes=10,
    )
)
