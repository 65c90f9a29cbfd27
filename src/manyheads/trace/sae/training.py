"""Training sparse autoencoders of attention outputs (#10).

Kissane et al., arXiv:2406.17759, on a stream of token batches:

    loss = mean over tokens of ||x' - x||^2 + lam ||f||_1

Inputs come from a shuffled buffer of activations. The optimiser is Adam (betas 0, 0.9999) with a cosine warm-up from a tenth of
the rate. After each backward pass the decoder's gradient loses its component along the rows; after each step rows are
renormalised. Up to four times, features that fired for less than `dead` of the tokens since the last time are resampled: inputs x
are drawn with probability proportional to their squared loss. The decoder row becomes x - b_dec normalised, the encoder column
the same times 0.2 of the live columns' mean norm, the bias 0; Adam's moments are reset, and the warm-up starts again.

L1 makes features too small. With `refit`, the decoder is at last solved again by least squares on the activations of the next
`refit` batches, the encoder's gates as they are: the same features are active, and L0 stays (`refitted`; not the paper's).

The paper's values: 24,576 features, batches of 4,096, rate 1.2e-3, lam about 1, 1e8 tokens. The returned autoencoder is
renormalised once more, so that saved rows have unit length (released ones drift).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_atomically
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.trace.sae.autoencoder import PAPER, AttentionSae, head_outputs, refitted, with_unit_rows
from manyheads.training import ADAM, Progress, TrainSettings, fit

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
Batches = Callable[[int], Int[Tensor, "B T"]]
TRAINING = replace(ADAM, steps=3000, rows=1024, rate=1.2e-3, betas=(0.0, 0.9999), warmup=300)


@dataclass(frozen=True)
class SaeSettings:
    """An autoencoder of `features`, trained on batches of `training.rows` activations.

    `buffer` batches are shuffled together, without the `first` tokens of every row. `resample_at` are the steps after which
    features that fired for less than `dead` of the tokens are resampled. `refit` batches solve the decoder again (0: not at all).
    """

    features: int = 512
    sparsity: float = 1.0
    buffer: int = 16
    resample_at: tuple[int, ...] = (800, 1500)
    dead: float = 1e-6
    first: int = 0
    refit: int = 0
    training: TrainSettings = TRAINING


def train_sae(
    model: HeadModel,
    layer: int,
    batches: Batches | Float[Tensor, "N HDh"],
    settings: SaeSettings | None = None,
    *,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> AttentionSae:
    """Train an autoencoder of `layer` on `batches(i)`, token ids that depend on i alone, or on activations that
    `head_outputs` has read, of which every pass has another order.

    With a `folder` an interrupted call resumes, with the same result. `bar` counts steps. `InputError` for an unknown layer or no
    features, or too few batches to solve the decoder again; `MismatchError` for a folder that holds another run.
    """
    settings = settings or SaeSettings()
    if not 0 <= layer < model.n_layers:
        raise InputError(f"there is no layer {layer}; give 0 to {model.n_layers - 1}.")
    if settings.features < 1:
        raise InputError(f"got {settings.features} features; give 1 or more.")
    if settings.refit < 0 or 0 < settings.refit * settings.training.rows < 4 * settings.features:
        raise InputError(
            f"{settings.refit} batches of {settings.training.rows} cannot solve {settings.features} features again; give four "
            "activations a feature, or refit=0."
        )
    if folder is not None:
        _claim(Path(folder), model, layer, settings)
    activations = _Kept(batches, settings) if isinstance(batches, Tensor) else _Read(model, layer, batches, settings)
    sae = _Trained(model.n_heads * model.head_dim, settings, activations)
    fit(
        sae,
        activations.batch,
        settings.training,
        folder,
        after_backward=sae.after_backward,
        after_step=sae.after_step,
        device=model.device,
        bar=bar,
    )
    about = Provenance(
        "attention-output SAE", PAPER, asdict(settings), settings.training.seed, fingerprint=model.fingerprint
    ).to_json()
    parts = {name: getattr(sae, name).detach().cpu() for name in NAMES}
    found = AttentionSae(layer, model.n_heads, **parts, fingerprint=model.fingerprint, meta=about)
    if not settings.refit:
        return with_unit_rows(found)
    steps = settings.training.steps or 0
    return refitted(found, torch.cat([activations.batch(steps + i).cpu() for i in range(settings.refit)]))


def _claim(folder: Path, model: HeadModel, layer: int, settings: SaeSettings) -> None:
    """Record the run of `folder`, or check that it is this one. Only its length may change."""
    asked = asdict(replace(settings, training=replace(settings.training, steps=None, save_minutes=0.0)))
    text = json.dumps({"model": model.fingerprint, "layer": layer, "settings": asked}, indent=1) + "\n"
    note = folder / "run.json"
    if note.is_file() and note.read_text("utf-8") != text:
        raise MismatchError(f"{folder} holds a run of another model, layer or other settings; give another folder.")
    write_atomically(note, lambda path: path.write_text(text, "utf-8"), force=True)


class _Trained(nn.Module):
    """The autoencoder, its loss, and how often each feature fired in the `since` steps after the last resampling."""

    fired: Float[Tensor, "F"]
    since: Int[Tensor, ""]

    def __init__(self, width: int, settings: SaeSettings, activations: _Activations) -> None:
        super().__init__()
        self.settings, self.activations = settings, activations
        generator = torch.Generator().manual_seed(settings.training.seed)
        bound = math.sqrt(6 / width)  # Kaiming, uniform
        decoder = (2 * torch.rand(settings.features, width, generator=generator) - 1) * bound
        encoder = (2 * torch.rand(width, settings.features, generator=generator) - 1) * bound
        self.W_enc, self.b_enc = nn.Parameter(encoder), nn.Parameter(torch.zeros(settings.features))
        self.W_dec, self.b_dec = nn.Parameter(F.normalize(decoder, dim=-1)), nn.Parameter(torch.zeros(width))
        self.register_buffer("fired", torch.zeros(settings.features))
        self.register_buffer("since", torch.zeros((), dtype=torch.long))

    def encode(self, x: Float[Tensor, "N HDh"]) -> Float[Tensor, "N F"]:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def errors(self, x: Float[Tensor, "N HDh"], f: Float[Tensor, "N F"]) -> Float[Tensor, "N"]:
        return (f @ self.W_dec + self.b_dec - x).square().sum(-1)

    def forward(self, x: Float[Tensor, "N HDh"]) -> Float[Tensor, ""]:
        f = self.encode(x)
        self.fired += (f.detach() > 0).float().mean(0)
        return (self.errors(x, f) + self.settings.sparsity * f.sum(-1)).mean()

    def rate(self) -> float:
        """Cosine warm-up from a tenth, since the start or the last resampling."""
        risen = min(1.0, int(self.since) / max(1, self.settings.training.warmup))
        return self.settings.training.rate * (0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * risen)))

    @torch.no_grad()
    def after_backward(self, _: Progress, optimizer: torch.optim.Optimizer) -> None:
        """Set the rate, and remove the decoder gradient's component along its rows."""
        optimizer.param_groups[0]["lr"] = self.rate()
        assert self.W_dec.grad is not None
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def after_step(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        """Renormalise the decoder's rows, and resample at the steps of `resample_at`."""
        self.W_dec.copy_(F.normalize(self.W_dec, dim=-1))
        self.since += 1
        if progress.step in self.settings.resample_at:
            self.resample(progress.step, optimizer)

    @torch.no_grad()
    def resample(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Restart features that hardly fired at inputs with a large reconstruction error."""
        dead = (self.fired / self.since.clamp_min(1) < self.settings.dead).nonzero()[:, 0]
        if len(dead):
            x = self.activations.batch(step)
            badly = self.errors(x, self.encode(x)).square()
            generator = torch.Generator().manual_seed(self.settings.training.seed + step)
            chosen = torch.multinomial(badly.cpu() + 1e-12, len(dead), replacement=True, generator=generator)
            rows = F.normalize(x[chosen] - self.b_dec, dim=-1)
            live = torch.ones_like(self.b_enc, dtype=torch.bool)
            live[dead] = False
            norm = self.W_enc[:, live].norm(dim=0).mean() if live.any() else self.W_enc.norm(dim=0).mean()
            self.W_dec[dead] = rows
            self.W_enc[:, dead] = 0.2 * norm * rows.T
            self.b_enc[dead] = 0
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[self.W_dec][moment][dead] = 0
                optimizer.state[self.W_enc][moment][:, dead] = 0
                optimizer.state[self.b_enc][moment][dead] = 0
        self.fired.zero_()
        self.since.zero_()


class _Activations(Protocol):
    def batch(self, step: int) -> Float[Tensor, "N HDh"]: ...


class _Kept:
    """Batches of activations that are in memory, shuffled anew for each pass."""

    def __init__(self, x: Float[Tensor, "N HDh"], settings: SaeSettings) -> None:
        self.x, self.settings = x, settings
        self.each = len(x) // settings.training.rows
        if not self.each:
            raise InputError(f"{len(x)} activations make no batch of {settings.training.rows}; give more.")

    def batch(self, step: int) -> Float[Tensor, "N HDh"]:
        number, place = divmod(step, self.each)
        generator, size = torch.Generator().manual_seed(self.settings.training.seed + 7 * number + 1), len(self.x)
        order = torch.randperm(size, generator=generator)[place * self.settings.training.rows :]
        return self.x[order[: self.settings.training.rows]]


class _Read:
    """Activations `[batch, H Dh]` of step i: a shuffled buffer of `buffer` batches, refilled when used up."""

    def __init__(self, model: HeadModel, layer: int, batches: Batches, settings: SaeSettings) -> None:
        self.model, self.layer, self.batches, self.settings = model, layer, batches, settings
        self.number, self.held = -1, torch.zeros(0)
        self.each = 0

    def batch(self, step: int) -> Float[Tensor, "N HDh"]:
        number, place = divmod(step, self.settings.buffer)
        if number != self.number:
            self.number, self.held = number, self._fill(number)
        size = self.settings.training.rows
        return self.held[place * size : (place + 1) * size]

    def _fill(self, number: int) -> Float[Tensor, "N HDh"]:
        wanted = self.settings.buffer * self.settings.training.rows
        pieces, got = [], 0
        for piece in self._stream(number):
            pieces.append(piece)
            got += len(piece)
            if got >= wanted:
                break
        held = torch.cat(pieces)
        order = torch.randperm(
            len(held), generator=torch.Generator().manual_seed(self.settings.training.seed + 7 * number + 1)
        )
        return held[order.to(held.device)][:wanted]

    def _stream(self, number: int) -> Iterator[Float[Tensor, "N HDh"]]:
        if not self.each:
            tokens = self.batches(0)
            usable = tokens.shape[0] * (tokens.shape[1] - self.settings.first)
            if usable < 1:
                raise InputError(
                    f"batches of shape {list(tokens.shape)} have no token after the first {self.settings.first}; give more."
                )
            self.each = -(-self.settings.buffer * self.settings.training.rows // usable)
        i = number * self.each
        while True:
            yield head_outputs(self.model, self.layer, self.batches(i), self.settings.first)
            i += 1
