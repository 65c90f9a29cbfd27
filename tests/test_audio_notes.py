"""Basic Pitch: the published network's outputs, its size, its decoding on constructed probabilities, and files of notes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("scipy")
from typer.testing import CliRunner

from manyheads.audio import transcribe
from manyheads.audio.core.sounds import write_recording
from manyheads.audio.notes.decoding import decode
from manyheads.audio.notes.network import BasicPitch, load_basic_pitch
from manyheads.audio.notes.transcribing import Note, frame_times, write_midi
from manyheads.cli import app

HELD = load_file(Path(__file__).parent / "basic_pitch_parity.safetensors")


def test_on_a_chord_in_noise_outputs_are_those_of_the_published_network():
    with torch.inference_mode():
        found = load_basic_pitch()(HELD["sound"].float() / 32768)
    for name in ("contours", "notes", "onsets"):
        theirs = HELD[name]
        assert theirs.max() - theirs.min() > 0.3  # it hears the chord: equal numbers say something
        assert (getattr(found, name)[:, ::8] - theirs).abs().max() < 1e-4


def test_it_has_16782_parameters():
    assert sum(one.numel() for one in BasicPitch().parameters()) == 16_782


def posteriorgram(*notes):
    """Probabilities of notes `(begins, ends, key)`, with an onset of each."""
    sounding, onsets = np.full((200, 88), 0.01), np.full((200, 88), 0.01)
    for begins, ends, key in notes:
        sounding[begins:ends, key] = 0.8
        onsets[begins, key] = 0.9
    return sounding, onsets


def spans(found):
    return [(note.begins, note.ends, note.pitch - 21) for note in found]


def test_two_repeated_notes_without_a_gap_are_two():
    assert spans(decode(*posteriorgram((20, 60, 40), (60, 110, 40)))) == [(20, 60, 40), (60, 110, 40)]


def test_gaps_are_forgiven_short_notes_dropped_and_notes_without_onset_found():
    sounding, onsets = posteriorgram((20, 80, 40), (20, 31, 10), (20, 32, 60))
    sounding[40:56, 40] = [0.1] * 10 + [0.31, 0.4, 0.5, 0.6, 0.7, 0.75]  # ten low frames, and no jump after them
    assert spans(decode(sounding, onsets)) == [(20, 80, 40), (20, 32, 60)]
    sounding[39, 40] = 0.1  # the eleventh
    assert spans(decode(sounding, onsets)) == [(20, 39, 40), (20, 32, 60), (50, 79, 40)]
    sounding[50:56, 40] = 0.8  # a jump is an onset, and from an onset a note goes on to its end
    assert spans(decode(sounding, onsets)) == [(20, 39, 40), (20, 32, 60), (50, 80, 40)]
    sounding, _ = posteriorgram((50, 100, 30))
    sounding[50:100, 31] = 0.4  # what leaks into the next semitone is no note
    slow = np.full_like(sounding, 0.01)
    assert spans(decode(sounding, slow)) == [(50, 99, 30)]  # as published, the last frame is lost on this way


def sung(pitches, begins, seconds, rate):
    """Tones of eight harmonics that fade, each of 0.4 seconds."""
    time = np.arange(round(seconds * rate)) / rate
    wave = np.zeros_like(time)
    for pitch, start in zip(pitches, begins, strict=True):
        at = time - start
        shape = np.where((at > 0) & (at < 0.4), np.exp(-3 * at), 0) * np.minimum(1, np.maximum(at, 0) / 0.005)
        wave += sum(np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * h * at) / h for h in range(1, 9)) * shape
    return 0.15 * wave


def test_notes_in_many_windows_come_when_they_were_played_at_any_rate(tmp_path):
    begins = 0.3 + 0.5 * np.arange(30)
    pitches = 55 + (7 * np.arange(30)) % 17
    write_recording(tmp_path / "a.wav", sung(pitches, begins, 16, 44_100), 44_100)
    heard = [note for note in transcribe(tmp_path / "a.wav", batch=3).notes if note.level > 0.3]
    hits = [
        min((abs(n.begins - b) for n in heard if n.pitch == p), default=9) for p, b in zip(pitches, begins, strict=True)
    ]
    assert np.mean(np.array(hits) < 0.05) >= 0.9
    # Without the offset of each window the last notes would come 9 windows x 8.5 ms = 77 ms late.
    played = list(zip(pitches, begins, strict=True))
    late = [n.begins - b for p, b in played for n in heard if n.pitch == p and abs(n.begins - b) < 0.15]
    assert abs(np.median(late[-8:]) - np.median(late[:8])) < 0.02
    assert frame_times(143)[142] == pytest.approx(36_164 / 22_050)


def test_silence_has_no_notes(tmp_path):
    write_recording(tmp_path / "a.wav", np.zeros(50_000), 8_000)
    assert transcribe(tmp_path / "a.wav").notes == []


def test_the_midi_file_holds_the_notes_byte_for_byte(tmp_path):
    notes = [Note(0.0, 0.5, 60, 1.0), Note(0.5, 1.0, 60, 0.5)]
    data = write_midi(tmp_path / "a.mid", notes).read_bytes()
    head = b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\0\0\x1f"
    # After 480 ticks (two bytes) the first ends before the second begins.
    track = b"\0\xff\x51\3\7\xa1\x20\0\x90\x3c\x7f\x83\x60\x80\x3c\0\0\x90\x3c\x40\x83\x60\x80\x3c\0\0\xff\x2f\0"
    assert data == head[:-1] + bytes([len(track)]) + track


def test_the_command_writes_a_midi_file_and_says_what_is_wrong(tmp_path):
    write_recording(tmp_path / "a.wav", sung([60, 67], [0.2, 0.9], 1.6, 22_050), 22_050)
    said = CliRunner().invoke(app, ["audio", "notes", str(tmp_path / "a.wav"), "--out", str(tmp_path / "a.mid")])
    assert said.exit_code == 0, said.output
    assert (tmp_path / "a.mid").read_bytes()[:4] == b"MThd"
    again = [
        "audio",
        "notes",
        str(tmp_path / "a.wav"),
        "--out",
        str(tmp_path / "c.mid"),
        "--page",
        str(tmp_path / "a.html"),
    ]
    assert CliRunner().invoke(app, again).exit_code == 0
    page = (tmp_path / "a.html").read_text("utf-8")
    assert page.count('class="note"') == len(transcribe(tmp_path / "a.wav").notes) == page.count("<tr>") - 1
    assert page.count("data:image/png") == 1 and ">C4<" in page and 'src="http' not in page
    assert CliRunner().invoke(app, again).exit_code == 2, "nothing is written over"
    (tmp_path / "b.wav").write_bytes(b"no sound")
    said = CliRunner().invoke(app, ["audio", "notes", str(tmp_path / "b.wav"), "--out", str(tmp_path / "b.mid")])
    assert said.exit_code == 2
    assert not (tmp_path / "b.mid").exists()
