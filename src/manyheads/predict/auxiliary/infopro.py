"""InfoPro (with #100): a block that learns by itself keeps what the input says, by a loss for painting the input again.

Wang et al., arXiv:2101.10832; Su et al., arXiv:2407.05623, put their momentum networks on it. Blocks that learn from labels alone
throw away early what later blocks need. Of K blocks, block i (from 0, i < K - 1) has

    L_i  =  a_i BCE(decoder_i(y_i), input) + b_i CE(head_i(y_i), label)
    (a_i, b_i)  =  (1 - r) first + r last,      r = i / (K - 2),     first = (5, .5),  last = (0, .5)

BCE is the mean over the input's values (nats), which must lie in [0, 1]; y_i is what the head reads. r counts blocks: so it is
never above 1 and no weight below 0. In the code of the second paper r counts stages over K - 2, which is above 1 for few blocks.
Its command for 16 blocks has last = (0, 0): by blocks, block K - 2 would not learn at all, so ours keeps .5 for the label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number

MIDDLE = 12  # channels of the picture's decoder, as in the paper's code


@dataclass(frozen=True)
class InfoPro:
    """`shape` is that of one input: [C, H, W] of a picture, [T, F] of T tokens, [F] of a row of a table.

    `first` and `last` are the weights (reconstruction, label) of the first block and of the last but one. `restore` makes numbers
    from 0 to 1 of an input, where it was scaled otherwise.
    """

    shape: tuple[int, ...]
    first: tuple[float, float] = (5.0, 0.5)
    last: tuple[float, float] = (0.0, 0.5)
    restore: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 2, 3):
            raise InputError(f"shape is {self.shape}; give that of one input: (C, H, W), (T, F) or (F,).")
        for size in self.shape:
            check_integer(size, "a size in shape", 1)
        for name, pair in (("first", self.first), ("last", self.last)):
            if len(pair) != 2:
                raise InputError(f"{name} is {pair}; give two weights, of the reconstruction and of the label.")
            for value in pair:
                check_number(value, f"a weight in {name}", 0.0)

    def weights(self, block: int, blocks: int) -> tuple[float, float]:
        """Of the reconstruction and of the label, for a block (from 0) that is not the last (formula above)."""
        check_integer(block, "block", 0, blocks - 2)
        r = block / (blocks - 2) if blocks > 2 else 0.0
        a, b = ((1 - r) * start + r * end for start, end in zip(self.first, self.last, strict=True))
        return a, b

    def target(self, x: Shaped[Tensor, "B *S"]) -> Float[Tensor, "B *S"]:
        """The input as it is to be painted again. `InputError` where it has another shape, or values outside [0, 1]."""
        wanted = x if self.restore is None else self.restore(x)
        if tuple(wanted.shape[1:]) != self.shape or not wanted.is_floating_point():
            raise InputError(
                f"inputs are {wanted.dtype} of shape {tuple(wanted.shape[1:])}; InfoPro was made for numbers {self.shape}."
            )
        low, high = (float(value) for value in wanted.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):
            raise InputError(
                f"inputs go from {low:.3g} to {high:.3g}; InfoPro paints numbers from 0 to 1: give restore=."
            )
        return wanted


class Painter(nn.Module):
    """Logits of the input from a block's states: bilinear growth and two convolutions for pictures, one linear map otherwise."""

    def __init__(self, width: int, shape: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        self.size = shape[1:] if len(shape) == 3 else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.paint: nn.Module = _convolutions(width, shape[0]) if self.size else nn.Linear(width, shape[-1])

    def forward(self, states: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """[B, D, h, w] to [B, C, H, W], [B, T, D] to [B, T, F], [B, D] to [B, F]."""
        if self.size is not None:
            states = F.interpolate(states, size=self.size, mode="bilinear", align_corners=True)
        out: Tensor = self.paint(states)
        return out

    def loss(self, states: Float[Tensor, "B ..."], wanted: Float[Tensor, "B *S"]) -> Float[Tensor, ""]:
        """BCE of the input, the mean over its values (nats)."""
        painted = self(states) if states.ndim == wanted.ndim else states
        if painted.shape != wanted.shape:
            raise InputError(
                f"a block's states {tuple(states.shape[1:])} cannot paint inputs {tuple(wanted.shape[1:])}."
            )
        return F.binary_cross_entropy_with_logits(painted, wanted)


def _convolutions(width: int, channels: int) -> nn.Sequential:
    first, last = nn.Conv2d(width, MIDDLE, 3, padding=1), nn.Conv2d(MIDDLE, channels, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(MIDDLE), nn.ReLU(), last)
