"""Train a small vision transformer on scikit-learn's digits, for work on the heads of vision models.

python recipes/digits_vit.py --out runs/digits-vit     trains (about a minute on one core) and saves it
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich import print
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from manyheads.errors import InputError
from manyheads.files import refuse_existing, write_folder_atomically

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
HELD_OUT = 360  # of 1,797 images


def digits(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """`{"train", "held_out"}`: images `[N, 1, 8, 8]` in [-1, 1] and labels `[N]`, split by a seeded shuffle."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    pixels = torch.tensor(images[order] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    wanted = torch.tensor(labels[order])
    return {
        "train": (pixels[HELD_OUT:], wanted[HELD_OUT:]),
        "held_out": (pixels[:HELD_OUT], wanted[:HELD_OUT]),
    }


def build_model(n_layers: int = 4, n_heads: int = 8, width: int = 48, patch: int = 1) -> ViTForImageClassification:
    """An untrained ViT for 8 x 8 images: one token a patch, and CLS."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            image_size=8,
            patch_size=patch,
            num_channels=1,
            num_labels=10,
            initializer_range=0.15,  # at 0.02 so narrow a model learns for long without its heads
            attn_implementation="sdpa",
        )
    )


def digits_vit(
    seed: int = 0,
    *,
    n_layers: int = 4,
    n_heads: int = 8,
    width: int = 48,
    patch: int = 1,
    epochs: int = 15,
    batch: int = 32,
    peak: float = 3e-3,
) -> ViTForImageClassification:
    """A trained model, in eval mode: `epochs` of AdamW under a rate that falls as a cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_model(n_layers, n_heads, width, patch).train()
    pixels, labels = digits(seed)["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    steps = epochs * (len(labels) // batch)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.randint(len(labels), (batch,), generator=generator)
        loss = F.cross_entropy(model(pixels[rows]).logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def accuracy(model: ViTForImageClassification, seed: int = 0) -> float:
    """Share of the held-out images that the model names rightly."""
    pixels, labels = digits(seed)["held_out"]
    with torch.no_grad():
        return float((model(pixels).logits.argmax(-1) == labels).float().mean())


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the model, as save_pretrained writes it.")] = Path(
        "runs/digits-vit"
    ),
    force: Annotated[bool, typer.Option(help="Overwrite OUT if it exists.")] = False,
    seed: int = 0,
    epochs: int = 15,
    patch: Annotated[int, typer.Option(help="Pixels a side of a patch: 1, 2 or 4.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Train, print the held-out accuracy, save."""
    try:
        refuse_existing(out, force=force)
        torch.set_num_threads(threads)
        started = time.monotonic()
        model = digits_vit(seed, epochs=epochs, patch=patch)
        print(f"held-out accuracy {accuracy(model, seed):.3f} after {time.monotonic() - started:.0f} s")
        write_folder_atomically(out, model.save_pretrained, force=force)
    except InputError as error:
        print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
