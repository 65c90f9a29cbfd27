"""Basic Pitch (#64): a network of 16,782 parameters with three heads, for pitch contours, notes and onsets.

Bittner et al., arXiv:2203.09893. The coarse heads read the fine one: contours (3 bins a semitone) make notes, notes and the
spectrogram make onsets. It is the network as released: the paper's first contour layer (5 x 5, 32 filters) is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.audio.notes.cqt import ConstantQ, harmonic_stack, normalised_log
from manyheads.inputs import read_tensors
from manyheads.learning.saved import fill

WEIGHTS = Path(__file__).parent / "basic_pitch.safetensors"
_EPSILON, _MOMENTUM = 1e-3, 0.01  # of Keras's batch norm, where PyTorch has 1e-5 and 0.1


@dataclass(frozen=True)
class Posteriorgrams:
    """Probabilities frame by frame: of a pitch (3 bins a semitone), of a sounding note, of its beginning, from A0 up."""

    contours: Float[Tensor, "B T 264"]
    notes: Float[Tensor, "B T 88"]
    onsets: Float[Tensor, "B T 88"]


class BasicPitch(nn.Module):
    """From a batch of windows at 22,050 Hz to `Posteriorgrams`, one frame every 256 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.cqt = ConstantQ()
        self.norm = _norm(1)
        self.contour = nn.Sequential(
            nn.Conv2d(8, 8, (3, 39), padding="same"), _norm(8), nn.ReLU(), nn.Conv2d(8, 1, 5, padding="same")
        )
        # Strides of 3 take the three bins of a semitone together, the middle one in the middle.
        self.note = nn.Sequential(
            nn.Conv2d(1, 32, 7, (1, 3), (3, 2)), nn.ReLU(), nn.Conv2d(32, 1, (7, 3), padding="same")
        )
        self.onset = nn.Sequential(nn.Conv2d(8, 32, 5, (1, 3), (2, 1)), _norm(32), nn.ReLU())
        self.onset_out = nn.Conv2d(33, 1, 3, padding="same")

    def forward(self, sound: Float[Tensor, "B N"]) -> Posteriorgrams:
        """The three heads' probabilities."""
        stacked = harmonic_stack(self.norm(normalised_log(self.cqt(sound))[:, None]))
        contours = self.contour(stacked).sigmoid()
        notes = self.note(contours).sigmoid()
        onsets = self.onset_out(torch.cat([notes, self.onset(stacked)], 1)).sigmoid()
        return Posteriorgrams(contours[:, 0], notes[:, 0], onsets[:, 0])


@cache
def load_basic_pitch() -> BasicPitch:
    """The network with the published weights, in evaluation mode. They are Spotify's, under Apache-2.0: see the card beside."""
    network = BasicPitch()
    fill(network, read_tensors(WEIGHTS), WEIGHTS)
    return network.eval().requires_grad_(False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON, momentum=_MOMENTUM)
