"""A small recurrent model that learns languages in context, with or without n-gram heads between its layers (#44).

    embedding -> GRU -> n-gram heads (if any) -> GRU -> logits

The loss is cross-entropy in nats where a symbol comes next; separators and padding are not predicted. Akyürek et al.,
arXiv:2401.12973, put the heads into larger models; this is their experiment at a size that trains in minutes on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.lab.automata import PAD, VOCABULARY, Prompts
from manyheads.progress import Bar
from manyheads.training import Batch, Progress, TrainSettings, fit

LEARNING = TrainSettings(steps=600, rows=32, rate=5e-3, warmup=60, decay=0.5, precision="fp32")


class Recurrent(nn.Module):
    """Two GRU layers of `width`; between them `heads`, called with the first layer's states and the tokens."""

    def __init__(self, width: int = 64, heads: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lower = nn.GRU(width, width, batch_first=True)
        self.heads = heads
        self.upper = nn.GRU(width, width, batch_first=True)
        self.readout = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the next token after each token."""
        hidden = self.lower(self.embedding(input_ids))[0]
        if self.heads is not None:
            hidden = self.heads(hidden, input_ids)
        logits: Tensor = self.readout(self.upper(hidden)[0])
        return logits


def symbol_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of the symbols in `input_ids[:, 1:]`, in nats."""
    logits, targets = model(batch["input_ids"])[:, :-1], batch["targets"]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)


def train_recurrent(
    model: nn.Module,
    given: Prompts,
    settings: TrainSettings = LEARNING,
    folder: str | Path | None = None,
    *,
    bar: Bar = Bar(),
) -> Progress:
    """Train on the prompts, in a new order each epoch. With a `folder` an interrupted call resumes."""
    rows, batch = len(given.tokens), settings.rows
    if batch > rows:
        raise InputError(
            f"a batch of {batch} needs at least as many prompts, and there are {rows}; give more or a smaller batch."
        )
    each = rows // batch

    def batch_at(number: int) -> Batch:
        order = np.random.default_rng((settings.seed, number // each)).permutation(rows)
        chosen = torch.from_numpy(order[number % each * batch :][:batch])
        tokens = given.tokens[chosen]
        return {"input_ids": tokens, "targets": torch.where(given.scored[chosen], tokens.roll(-1, 1), PAD)[:, :-1]}

    return fit(model, batch_at, settings, folder, loss=symbol_loss, bar=bar, device="cpu")


@torch.no_grad()
def predict(model: nn.Module, tokens: Int[Tensor, "B T"], *, rows: int = 50) -> Float[Tensor, "B T V"]:
    """The model's distribution of the next token after every token, `rows` prompts at a time."""
    model.eval()
    return torch.cat([model(chunk).softmax(-1) for chunk in tokens.split(rows)])
