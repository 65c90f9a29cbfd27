"""The one training loop: Accelerate, safetensors checkpoints, resumable, bounded by steps or by the clock."""

from manyheads.training.batches import Batch, drawn_rows, epoch_rows, generator_of, row_batches
from manyheads.training.head_slices import head_slices, only_heads
from manyheads.training.loop import Progress, fit, next_token_loss
from manyheads.training.many_seeds import fit_seeds
from manyheads.training.settings import ADAM, TrainSettings

__all__ = [
    "ADAM",
    "Batch",
    "Progress",
    "TrainSettings",
    "drawn_rows",
    "epoch_rows",
    "fit",
    "fit_seeds",
    "generator_of",
    "head_slices",
    "next_token_loss",
    "only_heads",
    "row_batches",
]
