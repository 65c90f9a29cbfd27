"""From probabilities to notes (#64): where a note begins, how long it goes on, and what sounds without a beginning.

The rules of Bittner et al., arXiv:2203.09893, section 3: onsets are peaks; a note goes on while its probability stays above
a threshold, low frames for a while forgiven; what is used is taken away, with the semitones beside it; what is left and loud
becomes notes, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

LOWEST_KEY = 21  # MIDI number of A0, the first of 88 pitches


@dataclass(frozen=True)
class FrameNote:
    """A note from frame `begins` up to `ends`, which it does not hold; `pitch` is MIDI's, `level` its mean probability."""

    begins: int
    ends: int
    pitch: int
    level: float


@dataclass(frozen=True)
class NoteDecoding:
    """Thresholds, and lengths in frames: a note has more than `shortest` frames, and `forgiven` low ones in a row end it."""

    onset: float = 0.5
    frame: float = 0.3
    shortest: int = 11
    forgiven: int = 11


def decode(
    notes: Float[np.ndarray, "T P"], onsets: Float[np.ndarray, "T P"], how: NoteDecoding | None = None
) -> list[FrameNote]:
    """The notes in order of time. First those that begin with an onset, from the last to the first, then the others."""
    how = how or NoteDecoding()
    n_frames = len(notes)
    left, found = notes.copy(), []
    raised = raise_onsets(notes, onsets)
    peaks = np.zeros(raised.shape, bool)
    peaks[1:-1] = (raised[1:-1] > raised[:-2]) & (raised[1:-1] > raised[2:]) & (raised[1:-1] >= how.onset)
    for begins, key in np.argwhere(peaks)[::-1]:
        ends, low = begins + 1, 0
        while ends < n_frames - 1 and low < how.forgiven:
            low = low + 1 if left[ends, key] < how.frame else 0
            ends += 1
        ends -= low
        if ends - begins > how.shortest:
            left[begins:ends, max(key - 1, 0) : key + 2] = 0
            found.append(_note(notes, begins, ends, key))
    # Taken-away cells only become 0, so one sorted list serves for all searches of the largest that is left.
    order = np.argsort(-left, axis=None, kind="stable")
    for place in order[: int((left > how.frame).sum())]:
        middle, key = divmod(int(place), left.shape[1])
        if left[middle, key] <= how.frame:
            continue
        left[middle, key] = 0
        beside = slice(max(key - 1, 0), key + 2)
        ends, low = middle + 1, 0
        while ends < n_frames - 1 and low < how.forgiven:
            low = low + 1 if left[ends, key] < how.frame else 0
            left[ends, beside] = 0
            ends += 1
        ends -= 1 + low
        begins, low = middle - 1, 0
        while begins > 0 and low < how.forgiven:
            low = low + 1 if left[begins, key] < how.frame else 0
            left[begins, beside] = 0
            begins -= 1
        begins += 1 + low
        if ends - begins > how.shortest:
            found.append(_note(notes, begins, ends, key))
    return sorted(found, key=lambda note: (note.begins, note.pitch))


def raise_onsets(notes: Float[np.ndarray, "T P"], onsets: Float[np.ndarray, "T P"]) -> Float[np.ndarray, "T P"]:
    """Onsets, or where they are larger the jumps of notes: the smaller of the rises over one frame and two.

    Jumps are scaled so that the largest equals the largest onset.
    """
    jumps = np.zeros_like(notes)
    jumps[2:] = np.maximum(np.minimum(notes[2:] - notes[1:-1], notes[2:] - notes[:-2]), 0)
    largest = jumps.max(initial=0)
    return np.maximum(onsets, onsets.max(initial=0) * jumps / largest) if largest > 0 else onsets


def _note(notes: np.ndarray, begins: int, ends: int, key: int) -> FrameNote:
    return FrameNote(int(begins), int(ends), int(key) + LOWEST_KEY, float(notes[begins:ends, key].mean()))
