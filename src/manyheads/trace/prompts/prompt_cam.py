"""Prompt-CAM (#119): a frozen vision trunk classifies with one prompt a class; its attention shows the patches each class uses.

Paul et al., CVPR 2025, arXiv:2501.09333. Layer l reads its C prompts before its tokens and drops their outputs; the last layer
keeps them. One linear score, shared by all classes, reads each class's own output:

    logit_c = w . norm(block_{L-1}([P_{L-1}; x_{L-1}]))_c + w0        p_c = softmax(logit)_c        [B, C]

Prompts start uniform in +-sqrt(6 / (3 patch^2 + D)). Prompts and w are trained with cross-entropy, L C D + D numbers.
`prompt_cam_maps` shows what the heads of a class's prompt attend to.

Departure. The paper trains by SGD with momentum over 130 epochs; here it is the package's loop, AdamW with warm-up, plateau and
linear decay. w0 stays 0, since it cancels in the softmax. The trunk stays in the mode it was opened in (eval, for folders and hub
ids), so without stochastic depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.learning import Card, fill, load, save
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.trace.prompts.prompting import check_promptable, finish, last_call
from manyheads.training import TrainSettings, epoch_rows, fit

PAPER = "arXiv:2501.09333"
SETTINGS = TrainSettings(steps=2000, rate=1e-2, warmup=100, decay=0.6, weight_decay=1e-3, precision="fp32")
KIND = "Prompt-CAM"


class PromptCAM(nn.Module):
    """One prompt a class and layer on a frozen trunk, and the score they share.

    `classes` are names, or their number. `trunk` is no submodule: it is neither trained, nor moved, nor saved. `dropout` acts on
    prompts during training (the paper: 0.1, and 0 for DINOv2). `UnsupportedError` for a trunk that reads no image.
    """

    def __init__(self, trunk: HeadModel, classes: Sequence[str] | int, *, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        check_promptable(trunk)
        names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(f"got classes {names[:8]}; give two classes or more with different names.")
        self.trunk, self.classes = trunk, tuple(names)
        self.meta: dict[str, Any] = {"method": "Prompt-CAM", "paper": PAPER, "seed": seed}
        width, patch = trunk.layout.hidden_size, trunk.config.patch_size
        area = patch * patch if isinstance(patch, int) else math.prod(patch)
        bound = math.sqrt(6 / (3 * area + width))
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.empty(trunk.n_layers, len(names), width).uniform_(-bound, bound, generator=generator)
        weight = torch.empty(1, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.prompts = nn.Parameter(prompts)
        self.weight = nn.Parameter(weight)
        # w0 cancels in the softmax: its gradient is rounding noise, which AdamW would follow.
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.dropout = nn.Dropout(dropout)

    @property
    def n_classes(self) -> int:
        """C, the number of classes."""
        return len(self.classes)

    def forward(self, pixels: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B C"]:
        """Class logits (formula above)."""
        return self.score(finish(self.trunk, last_call(self.trunk, pixels, self.dropout(self.prompts))))

    def score(self, outputs: Float[Tensor, "... C D"]) -> Float[Tensor, "... C"]:
        """The shared score of each prompt's output."""
        return F.linear(outputs, self.weight.to(outputs), self.bias.to(outputs)).squeeze(-1)

    def probabilities(
        self, pixels: Float[Tensor, "N channels H W"], *, rows: int = 64, bar: Bar = Bar()
    ) -> Float[Tensor, "N C"]:
        """Class probabilities, without gradients or dropout, `rows` images a pass; `bar` counts images."""
        training, found = self.training, []
        self.eval()
        try:
            with torch.no_grad():
                for chunk in pixels.split(rows):
                    found.append(self(chunk).float().softmax(-1).cpu())
                    bar(len(chunk))
        finally:
            self.train(training)
        return torch.cat(found)

    def index(self, name: str | int) -> int:
        """The number of a class, given its name or number. `InputError` if there is none."""
        number = self.classes.index(name) if name in self.classes else name
        if not isinstance(number, int) or not 0 <= number < self.n_classes:
            raise InputError(f"no class {name!r}; give one of the {self.n_classes}: {', '.join(self.classes[:8])}.")
        return number

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write prompts, score and settings with the trunk's fingerprint, but not the trunk."""
        settings = {"classes": self.classes, "dropout": self.dropout.p}
        about = {"meta": self.meta}
        card = Card(
            "Prompt-CAM (#119)",
            PAPER,
            settings,
            self.meta.get("seed"),
            fingerprint=self.trunk.fingerprint,
            kind=KIND,
            about=about,
        )
        return save(folder, card, self, force=force)

    @classmethod
    def load(cls, folder: str | Path, trunk: HeadModel, *, force: bool = False) -> PromptCAM:
        """Read what `save` wrote. `MismatchError` if it was trained on another trunk, unless `force`."""
        card, tensors = load(folder, KIND, KIND, fingerprint=trunk.fingerprint, force=force)
        cam = cls(trunk, **card.settings)
        fill(cam, tensors, folder)
        cam.meta = dict(card.about["meta"])
        return cam.eval()


def fit_prompt_cam(
    trunk: HeadModel,
    images: Float[Tensor, "N channels H W"],
    labels: Int[Tensor, "N"],
    folder: str | Path | None = None,
    *,
    classes: Sequence[str] | int | None = None,
    settings: TrainSettings = SETTINGS,
    dropout: float = 0.1,
    seed: int = 0,
    bar: Bar = Bar(),
) -> PromptCAM:
    """Train the class prompts on images in the form that `trunk` takes; every epoch has a new order.

    With a `folder` an interrupted call resumes. `bar` counts steps. `InputError` if images and labels do not match.
    """
    if len(images) != len(labels) or images.ndim != 4 or labels.ndim != 1 or not len(images):
        raise InputError(
            f"expected images [N, channels, H, W] and labels [N]; got {list(images.shape)} and {list(labels.shape)}."
        )
    named = classes if classes is not None else int(labels.max()) + 1
    cam = PromptCAM(trunk, named, dropout=dropout, seed=seed)
    if labels.min() < 0 or labels.max() >= cam.n_classes:
        raise InputError(
            f"got labels {int(labels.min())} to {int(labels.max())} for classes 0 to {cam.n_classes - 1}; name every class."
        )
    size = min(settings.rows, len(images))

    def batch_at(number: int) -> tuple[Tensor, Tensor]:
        rows = epoch_rows(len(images), size, number, seed)
        return images[rows], labels[rows]

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(given[0])
        return F.cross_entropy(logits.float(), given[1].to(logits.device))

    run = fit(cam, batch_at, settings, folder, loss=loss, bar=bar)
    cam.meta |= {
        "settings": asdict(settings),
        "batch": size,
        "images": len(images),
        "steps": run.step,
        "loss": run.loss,
    }
    return cam.eval()
