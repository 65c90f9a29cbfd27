"""The constant-Q spectrogram that Basic Pitch (#64) hears: three bins a semitone, and its harmonics beside one another.

The transform of Brown and Puckette, octave after octave (Schoerkhuber and Klapuri): the kernels of the top octave are used for
every octave, on a signal of half the rate each time. The sizes are those of the published network: `N_BINS` 309 from 27.5 Hz,
22,050 samples a second, one frame every 256.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.audio.core.sounds import signal_tools

RATE, HOP, LOWEST = 22_050, 256, 27.5  # Hz, samples, Hz: the lowest key of a piano
SEMITONE, OCTAVE = 3, 36  # bins
N_BINS = 309  # 103 semitones: up to 10,346 Hz, below half the rate
PITCHES = 88
CONTOURS = PITCHES * SEMITONE
HARMONICS = (0.5, 1, 2, 3, 4, 5, 6, 7)


class ConstantQ(nn.Module):
    """`|CQT|` of a batch of sounds, `[B, N] -> [B, T, 309]` with `T = N // 256 + 1`. Nothing in it is learned.

        X[k, t] = sqrt(l_k) |sum_n x[t hop + n] w_k[n] exp(-2 pi i f_k n / rate)|,   f_k = 27.5 * 2^(k / 36) Hz

    with `w_k` a Hann window of `l_k = ceil(Q rate / f_k)` samples whose weights sum to 1, `Q = 1 / (2^(1/36) - 1)`.
    """

    kernels: Float[Tensor, "72 1 n_fft"]
    lowpass: Float[Tensor, "1 1 256"]
    scale: Float[Tensor, "309 1"]

    def __init__(self) -> None:
        super().__init__()
        tools = signal_tools()
        q = 1 / (2 ** (1 / OCTAVE) - 1)
        self.octaves = math.ceil(N_BINS / OCTAVE)
        frequencies = LOWEST * 2.0 ** (np.arange(N_BINS) / OCTAVE)
        top = frequencies[-OCTAVE:]
        n_fft = 2 ** math.ceil(math.log2(math.ceil(q * RATE / top[0])))
        bank = np.zeros((OCTAVE, n_fft), np.complex64)
        for row, frequency in enumerate(top):
            length = math.ceil(q * RATE / frequency)
            start = math.ceil(n_fft / 2 - length / 2) - length % 2
            turns = np.arange(-length // 2, length // 2) * frequency / RATE
            wave = tools.get_window("hann", length) * np.exp(2j * np.pi * turns)
            bank[row, start : start + length] = wave / np.abs(wave).sum()
        edge, width = 0.5, 0.001  # of the filter before a signal is halved, in units of half its rate
        lowpass = tools.firwin2(256, [0.0, edge / (1 + width), edge * (1 + width), 1.0], [1.0, 1.0, 0.0, 0.0])
        scale = np.sqrt(np.ceil(q * RATE / frequencies))
        both = torch.from_numpy(np.concatenate([bank.real, -bank.imag]))[:, None]
        self.register_buffer("kernels", both, persistent=False)
        self.register_buffer("lowpass", torch.from_numpy(lowpass).float()[None, None], persistent=False)
        self.register_buffer("scale", torch.from_numpy(scale).float()[:, None], persistent=False)

    def forward(self, sound: Float[Tensor, "B N"]) -> Float[Tensor, "B T 309"]:
        """The magnitudes; a sound is mirrored at its ends, and has to be long enough for that in its lowest octave."""
        signal, hop, found = sound[:, None], HOP, []
        half = self.kernels.shape[-1] // 2
        for octave in range(self.octaves):
            if octave:
                signal, hop = F.conv1d(F.pad(signal, (127, 127)), self.lowpass, stride=2), hop // 2
            found.append(F.conv1d(F.pad(signal, (half, half), mode="reflect"), self.kernels, stride=hop))
        real, imaginary = zip(*(one.split(OCTAVE, 1) for one in reversed(found)), strict=True)
        size = (torch.cat(real, 1)[:, -N_BINS:].square() + torch.cat(imaginary, 1)[:, -N_BINS:].square()).sqrt()
        return (size * self.scale).transpose(1, 2)


def normalised_log(size: Float[Tensor, "B T K"]) -> Float[Tensor, "B T K"]:
    """Decibels of the power, moved and scaled so that each sound of the batch lies in [0, 1]; 0 where all is equal."""
    level = 10 * torch.log10(size.square() + 1e-10)
    level = level - level.amin((1, 2), keepdim=True)
    most = level.amax((1, 2), keepdim=True)
    return torch.where(most > 0, level / most.clamp_min(1e-30), torch.zeros_like(level))


def harmonic_stack(bins: Float[Tensor, "B 1 T 309"]) -> Float[Tensor, "B 8 T 264"]:
    """Eight copies, one for each harmonic, moved so that bin f of copy h holds what is at h times f's frequency; 0 beyond."""
    copies = []
    for harmonic in HARMONICS:
        shift = round(OCTAVE * math.log2(harmonic))
        moved = F.pad(bins[..., max(shift, 0) :], (max(-shift, 0), max(shift, 0)))
        copies.append(moved[..., :CONTOURS])
    return torch.cat(copies, 1)
