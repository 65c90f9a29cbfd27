"""From a recording to notes in seconds, and to a MIDI file (#64).

The sound is streamed in windows of 43,844 samples, 36,164 apart, of whose 172 frames the middle 142 are kept. 142 frames
are 36,352 samples: 188 more than the windows are apart. So the time of a frame needs its window:

    time of frame f of window w = (36,164 w + 256 f) / 22,050 seconds
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from manyheads.audio.core.sounds import SoundFile, open_recording
from manyheads.audio.notes.cqt import HOP, RATE
from manyheads.audio.notes.decoding import NoteDecoding, decode
from manyheads.audio.notes.network import BasicPitch, load_basic_pitch
from manyheads.files import write_atomically
from manyheads.progress import Bar
from manyheads.report import Reported

WINDOW = 2 * RATE - HOP
EDGE = 15  # frames dropped at each end of a window
APART = WINDOW - 2 * EDGE * HOP
KEPT = WINDOW // HOP + 1 - 2 * EDGE
TICKS, TEMPO = 480, 500_000  # of MIDI: ticks a beat, microseconds a beat


@dataclass(frozen=True)
class Note:
    """A note: seconds where it begins and ends, its MIDI pitch (60 is middle C), and its mean probability."""

    begins: float
    ends: float
    pitch: int
    level: float


@dataclass(frozen=True)
class Heard(Reported):
    """What the network heard: probabilities of notes and onsets, frame by frame, and the notes made of them."""

    notes: list[Note]
    sounding: Float[np.ndarray, "T 88"]
    onsets: Float[np.ndarray, "T 88"]


def transcribe(
    recording: SoundFile | str | Path,
    *,
    network: BasicPitch | None = None,
    how: NoteDecoding | None = None,
    batch: int = 8,
    bar: Bar | None = None,
) -> Heard:
    """The notes of a recording of any rate, mono or not, any length; by the published network unless another is given.

    The sound itself is never held whole; the probabilities are, and for an hour they and what decoding makes of them take
    about 1.1 GB. `InputError` as `open_recording`.
    """
    if not isinstance(recording, SoundFile):
        recording = open_recording(recording)
    network = network or load_basic_pitch()
    length = -(-recording.samples * RATE // recording.rate)
    progress = (bar or Bar()).step("windows", -(-(length + EDGE * HOP) // APART))
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for windows in _batches(sound_windows(recording.at_rate(RATE)), batch):
        with torch.inference_mode():
            heard = network(torch.from_numpy(np.stack(windows)))
        middle = slice(EDGE, EDGE + KEPT)
        kept.append((heard.notes[:, middle].flatten(0, 1).numpy(), heard.onsets[:, middle].flatten(0, 1).numpy()))
        progress(len(windows))
    frames = int((frame_times(len(kept) * batch * KEPT) * RATE < length).sum())
    sounding, onsets = (np.concatenate([one[which] for one in kept])[:frames] for which in (0, 1))
    times = frame_times(frames + 1)
    notes = [
        Note(float(times[one.begins]), float(times[one.ends]), one.pitch, one.level)
        for one in decode(sounding, onsets, how)
    ]
    return Heard(notes, sounding, onsets)


def frame_times(frames: int) -> Float[np.ndarray, "{frames}"]:
    """When the first `frames` kept frames are, in seconds (formula above)."""
    window, frame = np.divmod(np.arange(frames), KEPT)
    return (window * APART + frame * HOP) / RATE


def write_midi(path: str | Path, notes: Iterable[Note], *, force: bool = False) -> Path:
    """The notes as a MIDI file of one track, 120 beats a minute; loudness is the probability, 1 to 127."""
    events = []
    for note in notes:
        begins, ends = (round(1e6 * TICKS / TEMPO * second) for second in (note.begins, note.ends))
        events.append((begins, 1, note.pitch, min(127, max(1, round(127 * note.level)))))
        events.append((max(ends, begins + 1), 0, note.pitch, 0))
    # At one time, what ends comes before what begins: a repeated note would end at once otherwise.
    track, now = bytearray(b"\x00\xff\x51\x03" + TEMPO.to_bytes(3, "big")), 0
    for at, on, pitch, loud in sorted(events):
        track += _varying(at - now) + bytes([0x90 if on else 0x80, pitch, loud])
        now = at
    track += b"\x00\xff\x2f\x00"
    data = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, TICKS) + struct.pack(">4sI", b"MTrk", len(track)) + track
    return write_atomically(path, lambda file: file.write_bytes(data), force=force)


def _varying(number: int) -> bytes:
    """MIDI's numbers: seven bits a byte, the highest bit set on all but the last."""
    found = [number & 127]
    while number := number >> 7:
        found.append(number & 127 | 128)
    return bytes(reversed(found))


def sound_windows(blocks: Iterator[Float[np.ndarray, "n"]]) -> Iterator[Float[np.ndarray, "43844"]]:
    """Windows of the sound after `EDGE` frames of silence, so that the first kept frame is the sound's first."""
    held, more = np.zeros(EDGE * HOP, np.float32), True
    while more or len(held):
        while more and len(held) < WINDOW:
            block = next(blocks, None)
            more = block is not None
            held = held if block is None else np.concatenate([held, block])
        yield np.pad(held[:WINDOW], (0, max(0, WINDOW - len(held))))
        held = held[APART:]


def _batches(windows: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for window in windows:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
