"""Notes heard in a Bach chorale, BWV 269, played by five instruments of a sound font: note F beside the published network.

    python -m venv .venv-bench && .venv-bench/bin/pip install -e . scipy mir_eval music21 pretty_midi tinysoundfont onnxruntime
    pip download --no-deps basic-pitch==0.4.0
    .venv-bench/bin/python benchmarks/audio/bach_notes.py basic_pitch-0.4.0-py2.py3-none-any.whl

Beside ours stands the published network itself, run by onnxruntime on the same samples and windows, with the published times of
frames and our decoding (which gives the notes that theirs gives). The font is `TimGM6mb.sf2` of pretty_midi. F is mir_eval's
without offsets: right pitch, begin within 50 ms.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import mir_eval
import numpy as np
import onnxruntime
import pretty_midi
import tinysoundfont
import torch
from music21 import corpus

from manyheads.audio.core.sounds import open_recording, write_recording
from manyheads.audio.notes.decoding import decode
from manyheads.audio.notes.network import load_basic_pitch
from manyheads.audio.notes.transcribing import EDGE, KEPT, WINDOW, sound_windows, transcribe

RATE, VOLUME = 44_100, 100
FONT = Path(pretty_midi.__file__).parent / "TimGM6mb.sf2"
INSTRUMENTS = {"piano": 0, "violin": 40, "guitar": 24, "flute": 73, "organ": 19}  # General MIDI's numbers, from 0


def score() -> list[tuple[float, float, int]]:
    """Seconds of begin and end, and pitch, at two quarters a second; tied notes are one, unisons of two voices too."""
    found = {}
    for part in corpus.parse("bwv269").parts:
        for note in part.stripTies().flatten().notes:
            begins = float(note.offset) * 0.5
            for pitch in note.pitches:
                ends = begins + float(note.quarterLength) * 0.5
                found[begins, pitch.midi] = max(ends, found.get((begins, pitch.midi), 0.0))
    return [(begins, ends, pitch) for (begins, pitch), ends in sorted(found.items())]


def played(notes: list[tuple[float, float, int]], program: int) -> np.ndarray:
    """The score as samples of one channel."""
    synth = tinysoundfont.Synth(samplerate=RATE, gain=-6)
    synth.program_select(0, synth.sfload(str(FONT)), 0, program)
    events = sorted(
        (round(at * RATE), on, pitch) for b, e, pitch in notes for at, on, pitch in ((b, 1, pitch), (e, 0, pitch))
    )
    blocks, now = [], 0
    for at, on, pitch in [*events, (events[-1][0] + RATE, 0, 0)]:
        if at > now:
            blocks.append(np.frombuffer(synth.generate(at - now), np.float32).reshape(-1, 2).mean(1))
            now = at
        synth.noteon(0, pitch, VOLUME) if on else synth.noteoff(0, pitch)
    return np.concatenate(blocks)


def published(path: Path, session: onnxruntime.InferenceSession) -> tuple[list[tuple[float, float, int]], float]:
    """The notes of the published network with its own times, and the largest difference of any of its outputs from ours."""
    outputs = ["StatefulPartitionedCall:1", "StatefulPartitionedCall:2", "StatefulPartitionedCall:0"]
    largest = 0.0
    recording = open_recording(path)
    kept = []
    for window in sound_windows(recording.at_rate(22_050)):
        both = session.run(outputs, {"serving_default_input_2:0": window[None, :, None].astype(np.float32)})
        with torch.inference_mode():
            ours = load_basic_pitch()(torch.from_numpy(window[None]))
        for one, other in zip(both, (ours.notes, ours.onsets, ours.contours), strict=True):
            largest = max(largest, float(np.abs(one - other.numpy()).max()))
        kept.append([one[0, EDGE : EDGE + KEPT] for one in both])
    length = sum(map(len, recording.at_rate(22_050)))
    notes, onsets = (np.concatenate([one[which] for one in kept])[: int(length * 86 / 22_050)] for which in (0, 1))
    frames = np.arange(len(notes))
    times = frames * 256 / 22_050 - (256 / 22_050 * (172 - WINDOW / 256) + 0.0018) * (frames // 172)
    return [(times[one.begins], times[one.ends], one.pitch) for one in decode(notes, onsets)], largest


def f_of(truth: list[tuple[float, float, int]], found: list[tuple[float, float, int]]) -> tuple[float, float, float]:
    """Precision, recall and F."""
    both = []
    for notes in (truth, found):
        both += [np.array([one[:2] for one in notes]), mir_eval.util.midi_to_hz(np.array([one[2] for one in notes]))]
    return mir_eval.transcription.precision_recall_f1_overlap(*both, offset_ratio=None)[:3]


def main(wheel: str) -> None:
    """Print the table."""
    truth = score()
    held = zipfile.ZipFile(wheel).read("basic_pitch/saved_models/icassp_2022/nmp.onnx")
    session = onnxruntime.InferenceSession(held, providers=["CPUExecutionProvider"])
    print(f"{len(truth)} notes in {max(one[1] for one in truth):.1f} seconds")
    print(f"{'instrument':12}{'precision':>10}{'recall':>10}{'F':>8}{'published F':>13}{'difference':>12}")
    for name, program in INSTRUMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.wav"
            write_recording(path, played(truth, program), RATE)
            ours = [(note.begins, note.ends, note.pitch) for note in transcribe(path).notes]
            theirs, largest = published(path, session)
        p, r, f = f_of(truth, ours)
        print(f"{name:12}{p:10.3f}{r:10.3f}{f:8.3f}{f_of(truth, theirs)[2]:13.3f}{largest:12.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
