"""Recordings as people have them: WAV of any rate, of 8 to 32 bits or floating-point, stereo, long. Read right, or refused.

A file is opened once and its header checked. Samples are read in blocks, so that an hour costs no more memory than a second.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from manyheads.errors import InputError

RATES = (1_000, 384_000)  # samples a second that a recording may have
CHANNELS = 64
BLOCK = 1 << 16  # samples of each channel read at once
SILENT = 1e-5  # below this, -100 dB of full scale, nothing is heard
CUT = 3  # so many samples in a row at full scale are a clipped peak
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN = 0xFFFFFFFF  # the size that a program writes into a pipe, where it cannot come back to the header


@dataclass(frozen=True)
class SoundFile:
    """An open WAV file: its rate in samples a second, its channels, its bits, and how many samples each channel has."""

    path: Path
    rate: int
    channels: int
    bits: int
    floating: bool
    samples: int
    begins: int  # byte of the first sample

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.samples / self.rate

    def blocks(self, size: int = BLOCK) -> Iterator[Float[np.ndarray, "n"]]:
        """The samples in order, channels averaged, full scale 1, at most `size` at a time. `InputError` for NaN or infinity."""
        frame = self.channels * self.bits // 8
        with self.path.open("rb") as file:
            file.seek(self.begins)
            for start in range(0, self.samples, size):
                data = file.read(frame * min(size, self.samples - start))
                values = _numbers(data, self.bits, self.floating).reshape(-1, self.channels).mean(1)
                if not np.isfinite(values).all():
                    raise InputError(f"{self.path} holds NaN or infinity; write it again from its source.")
                yield values.astype(np.float32)

    def at_rate(self, rate: int, size: int = BLOCK) -> Iterator[Float[np.ndarray, "n"]]:
        """The samples at another rate, block after block: `ceil(samples rate / self.rate)` of them in all.

        The filter is SciPy's `resample_poly`: a windowed sinc (Kaiser, beta 5) of 20 max(up, down) + 1 taps. Blocks overlap by
        its length, so that where they meet nothing is heard or seen.
        """
        common = math.gcd(rate, self.rate)
        up, down = rate // common, self.rate // common
        if up == down:
            yield from self.blocks(size)
            return
        half = 10 * max(up, down)
        taps = signal_tools().firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", 5.0)) * up
        reach = half // up + 1  # input samples on each side that an output sample depends on
        wanted = -(-self.samples * up // down)
        held, begins, done = np.zeros(0, np.float32), 0, 0
        for block in self.blocks(size):
            held = np.concatenate([held, block])
            whole = begins + len(held) >= self.samples
            ready = wanted if whole else max(done, (begins + len(held) - reach) * up // down)
            if ready > done:
                # Output k stands at input k down / up; in the up-sampled held block that is sample k down - begins up.
                filtered = _polyphase(held, taps, up, done * down - begins * up + half, down, ready - done)
                yield filtered.astype(np.float32)
                done = ready
            keep = max(begins, done * down // up - reach)
            held, begins = held[keep - begins :], keep

    def warnings(self) -> list[str]:
        """What one should know before one trusts a result: silence, or peaks that were cut off. Reads the file once."""
        largest, clipped, run = 0.0, 0, 0
        full = 1.0 if self.floating else 1 - 2.0 ** (1 - min(self.bits, 24))
        for block in self.blocks():
            level = np.abs(block)
            largest = max(largest, float(level.max(initial=0)))
            at_full = np.concatenate([np.ones(run, bool), level >= full - 1e-7])
            edges = np.flatnonzero(np.diff(np.concatenate([[0], at_full.astype(np.int8), [0]])))
            lengths = edges[1::2] - edges[::2]
            ends = bool(at_full[-1]) if len(at_full) else False
            run = int(lengths[-1]) if ends else 0
            clipped += int((lengths[:-1] if ends else lengths).__ge__(CUT).sum())
        clipped += int(run >= CUT)
        if largest < SILENT:
            return [f"{self.path} is silent: its largest sample is {largest:.1g} of full scale"]
        if clipped:
            return [f"{self.path} is clipped: {clipped} peaks are cut off at full scale"]
        return []


def signal_tools() -> Any:
    """SciPy's filters. `InputError` says how to install them: they are no part of the smallest installation."""
    try:
        from scipy import signal
    except ImportError:
        raise InputError("sound needs SciPy; install it: pip install 'manyheads[audio]'.") from None
    return signal


def open_recording(path: str | Path) -> SoundFile:
    """A WAV file of 8, 16, 24 or 32 bits, or floating-point of 32 or 64, any rate and channels.

    `InputError`, one sentence, for what is no WAV, is compressed, cut off, or has no samples.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a recording, a .wav.")
    try:
        with path.open("rb") as file:
            head = file.read(12)
            if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
                raise InputError(f"{path} is no WAV file; convert it to one, for example by ffmpeg -i FILE out.wav.")
            return _opened(path, file, path.stat().st_size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def write_recording(path: str | Path, samples: Float[np.ndarray, "n"], rate: int) -> None:
    """One channel of numbers in [-1, 1] as a WAV file of 16 bits; what is outside is cut."""
    data = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, _PCM, 1, rate, 2 * rate, 2, 16)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVE" + layout + struct.pack("<4sI", b"data", len(data))
    Path(path).write_bytes(head + data)


def _opened(path: Path, file, size: int) -> SoundFile:  # type: ignore[no-untyped-def]
    kind = channels = rate = bits = 0
    while len(chunk := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        if name == b"fmt ":
            data = file.read(min(length, 40))
            if len(data) < 16:
                raise InputError(f"{path} is damaged: its header ends early; write it again.")
            kind, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", data[:16])
            if kind == _EXTENSIBLE and len(data) >= 26:
                kind = struct.unpack("<H", data[24:26])[0]
            _check(path, kind, channels, rate, bits, frame)
            file.seek(length + length % 2 - len(data), 1)
        elif name == b"data":
            if not rate:
                raise InputError(f"{path} is damaged: samples come before the header; write it again.")
            begins, left, frame = file.tell(), size - file.tell(), channels * bits // 8
            if length > left and length != _UNKNOWN:
                raise InputError(f"{path} is cut off: {left} of its {length} bytes of sound are there; fetch it again.")
            samples = min(length, left) // frame
            if not samples:
                raise InputError(f"{path} has no samples; give a recording that is not empty.")
            return SoundFile(path, rate, channels, bits, kind == _FLOAT, samples, begins)
        else:
            file.seek(length + length % 2, 1)
    raise InputError(f"{path} is damaged: it holds no samples; write it again.")


def _check(path: Path, kind: int, channels: int, rate: int, bits: int, frame: int) -> None:
    known = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
    if bits not in known.get(kind, ()):
        raise InputError(f"{path} has samples of kind {kind} and {bits} bits; convert it to PCM of 16 bits.")
    if not 1 <= channels <= CHANNELS or not RATES[0] <= rate <= RATES[1] or frame != channels * bits // 8:
        raise InputError(f"{path} has {channels} channels at {rate} Hz, which no recording has; write it again.")


def _numbers(data: bytes, bits: int, floating: bool) -> np.ndarray:
    if floating:
        return np.frombuffer(data, f"<f{bits // 8}").astype(np.float64)
    if bits == 8:  # the only width without a sign
        return (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    if bits == 24:
        bytes_ = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        wide = (bytes_[:, 0] << 8) | (bytes_[:, 1] << 16) | (bytes_[:, 2] << 24)
        return wide / 2.0**31
    return np.frombuffer(data, f"<i{bits // 8}") / 2.0 ** (bits - 1)


def _polyphase(held: np.ndarray, taps: np.ndarray, up: int, first: int, down: int, count: int) -> np.ndarray:
    """Samples `first`, `first + down`, ... of `held`, up-sampled by `up` and convolved with `taps`; beyond it there are zeros."""
    # upfirdn gives multiples of `down`: zeros before the filter move `first` onto one.
    shift = -first % down
    filtered = signal_tools().upfirdn(np.concatenate([np.zeros(shift), taps]), held.astype(np.float64), up, down)
    start = (first + shift) // down
    found = filtered[max(start, 0) : start + count]
    return np.pad(found, (max(-start, 0), count - max(-start, 0) - len(found)))
