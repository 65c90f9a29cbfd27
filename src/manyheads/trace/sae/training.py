"""Training sparse autoencoders of attention outputs (#10).

Kissane et al., arXiv:2406.17759, on a stream of token batches:

    loss = mean over tokens of ||x' - x||^2 + lam ||f||_1

Inputs come from a shuffled buffer of activations; Adam (betas 0, 0.9999) with a cosine warm-up from a tenth of the rate; after
each backward pass the decoder's gradient loses what it has along its own rows, and rows are renormalised. Up to four times,
features that fired for less than `dead` of the tokens since the last time are given a new start: inputs x are drawn with
probability proportional to the square of their loss; the decoder row becomes x - b_dec normalised, the encoder column that times
0.2 of the live columns' mean norm, the bias 0; their moments are forgotten and the warm-up starts again.

The paper's values: 24,576 features, batches of 4,096, rate 1.2e-3, lam about 1, 1e8 tokens. Rows are renormalised once more
before the result is returned, so that what is saved has unit rows (released ones drift).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_atomically
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.trace.sae.autoencoder import PAPER, AttentionSae, head_outputs, with_unit_rows

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
Batches = Callable[[int], Int[Tensor, "B T"]]


@dataclass(frozen=True)
class SaeSettings:
    """`steps` of `batch` activations each; `buffer` of them are shuffled together, the `first` tokens of every row left out.

    `resample_at` are the steps after which features that fired for less than `dead` of the tokens get a new start.
    """

    features: int = 512
    sparsity: float = 1.0
    steps: int = 3000
    batch: int = 1024
    rate: float = 1.2e-3
    betas: tuple[float, float] = (0.0, 0.9999)
    warmup: int = 300
    buffer: int = 16
    resample_at: tuple[int, ...] = (800, 1500)
    dead: float = 1e-6
    first: int = 0
    seed: int = 0


def train_sae(
    model: HeadModel,
    layer: int,
    batches: Batches,
    settings: SaeSettings | None = None,
    *,
    folder: str | Path | None = None,
    save_every: int = 500,
    bar: Bar = Bar(),
) -> AttentionSae:
    """Train an autoencoder of `layer` on `batches(i)`, token ids that depend on i alone.

    With a `folder` the run's state goes there every `save_every` steps, and the same call goes on from it to the same result.
    `bar` gets the number of steps done. `InputError` for a layer that is not there or settings without a step.
    """
    settings = settings or SaeSettings()
    if not 0 <= layer < model.n_layers:
        raise InputError(f"there is no layer {layer}; this model has layers 0-{model.n_layers - 1}.")
    if min(settings.steps, settings.batch, settings.features) < 1:
        raise InputError("steps, batch and features must be 1 or more.")
    run = _Run(model, layer, batches, settings)
    state = None if folder is None else Path(folder) / "sae_state.safetensors"
    if state is not None and state.is_file():
        run.load(state)
    while run.step < settings.steps:
        run.one_step()
        if state is not None and (run.step % save_every == 0 or run.step == settings.steps):
            write_atomically(state, run.save, force=True)
        bar(1)
    return run.result()


class _Run:
    """Parameters, Adam's moments and the buffer; a step depends on these and on the step's number alone."""

    def __init__(self, model: HeadModel, layer: int, batches: Batches, settings: SaeSettings) -> None:
        self.model, self.layer, self.settings = model, layer, settings
        self.activations = _Activations(model, layer, batches, settings)
        width = model.n_heads * model.head_dim
        generator = torch.Generator().manual_seed(settings.seed)
        bound = math.sqrt(6 / width)  # Kaiming, uniform
        decoder = (2 * torch.rand(settings.features, width, generator=generator) - 1) * bound
        self.W_dec = F.normalize(decoder, dim=-1)
        self.W_enc = (2 * torch.rand(width, settings.features, generator=generator) - 1) * bound
        self.b_enc, self.b_dec = torch.zeros(settings.features), torch.zeros(width)
        for name in NAMES:
            setattr(self, name, self[name].to(model.device))
        self.moments = {name: (torch.zeros_like(self[name]), torch.zeros_like(self[name])) for name in NAMES}
        self.fired = torch.zeros_like(self.b_enc)
        self.step, self.since, self.updates = 0, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        return value

    def one_step(self) -> None:
        x = self.activations.batch(self.step)
        leaves = {name: self[name].requires_grad_() for name in NAMES}
        f = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        error = (f @ self.W_dec + self.b_dec - x).square().sum(-1)
        loss = (error + self.settings.sparsity * f.sum(-1)).mean()
        gradients = dict(zip(NAMES, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        with torch.no_grad():
            for name in NAMES:
                setattr(self, name, leaves[name].detach())
            along = (gradients["W_dec"] * self.W_dec).sum(-1, keepdim=True)
            gradients["W_dec"] -= along * self.W_dec
            self._adam(gradients)
            self.W_dec = F.normalize(self.W_dec, dim=-1)
            self.fired += (f.detach() > 0).float().mean(0)
            self.since += 1
            self.step += 1
            if self.step in self.settings.resample_at:
                self._resample()

    def _adam(self, gradients: dict[str, Tensor]) -> None:
        self.updates += 1
        one, two = self.settings.betas
        for name, gradient in gradients.items():
            mean, square = self.moments[name]
            mean.mul_(one).add_(gradient, alpha=1 - one)
            square.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            corrected = (square / (1 - two**self.updates)).sqrt() + 1e-8
            self[name].sub_(self._rate() / (1 - one**self.updates) * mean / corrected)

    def _rate(self) -> float:
        """Cosine warm-up from a tenth, since the start or the last resampling."""
        risen = min(1.0, self.since / max(1, self.settings.warmup))
        return self.settings.rate * (0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * risen)))

    def _resample(self) -> None:
        """Give features that hardly fired a new start at inputs that are restored badly."""
        dead = (self.fired / max(1, self.since) < self.settings.dead).nonzero()[:, 0]
        if len(dead):
            x = self.activations.batch(self.step)
            f = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
            badly = (f @ self.W_dec + self.b_dec - x).square().sum(-1).square()
            generator = torch.Generator().manual_seed(self.settings.seed + self.step)
            chosen = torch.multinomial(badly.cpu() + 1e-12, len(dead), replacement=True, generator=generator)
            rows = F.normalize(x[chosen] - self.b_dec, dim=-1)
            live = torch.ones_like(self.b_enc, dtype=torch.bool)
            live[dead] = False
            norm = self.W_enc[:, live].norm(dim=0).mean() if live.any() else self.W_enc.norm(dim=0).mean()
            self.W_dec[dead] = rows
            self.W_enc[:, dead] = 0.2 * norm * rows.T
            self.b_enc[dead] = 0
            for moment in (0, 1):
                self.moments["W_dec"][moment][dead] = 0
                self.moments["W_enc"][moment][:, dead] = 0
                self.moments["b_enc"][moment][dead] = 0
        self.fired.zero_()
        self.since = 0

    def result(self) -> AttentionSae:
        settings = asdict(self.settings)
        about = Provenance.of(self.model, "attention-output SAE", PAPER, self.settings.seed, **settings).to_json()
        parts = {name: self[name].cpu() for name in NAMES}
        sae = AttentionSae(self.layer, self.model.n_heads, **parts, fingerprint=self.model.fingerprint, meta=about)
        return with_unit_rows(sae)

    # Its state

    def save(self, path: Path) -> None:
        moments = {
            f"{kind}.{name}": self.moments[name][i] for i, kind in enumerate(("mean", "square")) for name in NAMES
        }
        tensors = {name: self[name] for name in NAMES} | moments | {"fired": self.fired}
        counts = {name: str(getattr(self, name)) for name in ("step", "since", "updates")}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=counts | self._about())

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        if {key: about.get(key) for key in self._about()} != self._about():
            raise MismatchError(f"{path} holds a run of another model, layer or other settings; give another folder.")
        tensors = load_file(path, device=str(self.b_enc.device))
        for name in NAMES:
            setattr(self, name, tensors[name])
            self.moments[name] = (tensors[f"mean.{name}"], tensors[f"square.{name}"])
        self.fired = tensors["fired"]
        self.step, self.since, self.updates = (int(about[name]) for name in ("step", "since", "updates"))

    def _about(self) -> dict[str, str]:
        settings = {k: v for k, v in asdict(self.settings).items() if k != "steps"}  # a run may be made longer
        return {"model": self.model.fingerprint, "layer": str(self.layer), "settings": repr(settings)}


class _Activations:
    """Activations `[batch, H Dh]` of step i: a shuffled buffer of `buffer` batches, filled anew when it is used up."""

    def __init__(self, model: HeadModel, layer: int, batches: Batches, settings: SaeSettings) -> None:
        self.model, self.layer, self.batches, self.settings = model, layer, batches, settings
        self.number, self.held = -1, torch.zeros(0)
        self.each = 0

    def batch(self, step: int) -> Float[Tensor, "N HDh"]:
        number, place = divmod(step, self.settings.buffer)
        if number != self.number:
            self.number, self.held = number, self._fill(number)
        size = self.settings.batch
        return self.held[place * size : (place + 1) * size]

    def _fill(self, number: int) -> Float[Tensor, "N HDh"]:
        wanted = self.settings.buffer * self.settings.batch
        pieces, got = [], 0
        for piece in self._stream(number):
            pieces.append(piece)
            got += len(piece)
            if got >= wanted:
                break
        held = torch.cat(pieces)
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(self.settings.seed + 7 * number + 1))
        return held[order.to(held.device)][:wanted]

    def _stream(self, number: int) -> Iterator[Float[Tensor, "N HDh"]]:
        if not self.each:
            tokens = self.batches(0)
            usable = tokens.shape[0] * (tokens.shape[1] - self.settings.first)
            if usable < 1:
                raise InputError(
                    f"batches of shape {list(tokens.shape)} have no token after the first {self.settings.first}."
                )
            self.each = -(-self.settings.buffer * self.settings.batch // usable)
        i = number * self.each
        while True:
            yield head_outputs(self.model, self.layer, self.batches(i), self.settings.first)
            i += 1
