"""Networks that read observations: a small one for vectors and small images, the Impala network for frames of a game."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 2048  # numbers of an observation up to which it is read as a vector
_HIDDEN = 256


def observation_trunk(shape: Sequence[int], features: int, *, width: int = 1) -> nn.Module:
    """A network from observations `[B, *shape]` to `[B, features]`, without a last ReLU; weights Xavier-uniform, biases 0.

    Up to 2048 numbers: two hidden layers of 256. Images above: three Impala stacks of 16, 32 and 32 channels times `width`.
    """
    numbers = int(torch.Size(shape).numel())
    if numbers <= SMALL or len(shape) < 2:
        body: nn.Module = nn.Sequential(
            nn.Flatten(), nn.Linear(numbers, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU()
        )
        trunk = nn.Sequential(body, nn.Linear(_HIDDEN, features))
    else:
        body = _Impala(shape, width)
        with torch.no_grad():
            out = body(torch.zeros(1, *shape)).shape[1]
        trunk = nn.Sequential(body, nn.Linear(out, features))
    for module in trunk.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return trunk


class _Block(nn.Module):
    """What is added to the picture: two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        found: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return found


class _Impala(nn.Module):
    """Stacks of a convolution, a maximum over 3 x 3 that halves the picture, and two blocks (arXiv:1802.01561)."""

    def __init__(self, shape: Sequence[int], width: int) -> None:
        super().__init__()
        # gymnasium's pictures have the channels last; ours and stacked frames have them first.
        self.last = len(shape) == 3 and shape[2] <= 4 < shape[0]
        channels, parts = 1 if len(shape) == 2 else shape[2] if self.last else shape[0], []
        for out in (16 * width, 32 * width, 32 * width):
            parts += [nn.Conv2d(channels, out, 3, padding=1), nn.MaxPool2d(3, 2, 1), _Block(out), _Block(out)]
            channels = out
        self.stacks = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Float[Tensor, "B F"]:
        x = x[:, None] if x.ndim == 3 else x.movedim(-1, 1) if self.last else x
        return F.relu(self.stacks(x)).flatten(1)
