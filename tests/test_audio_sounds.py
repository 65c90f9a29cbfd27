"""Recordings of users: every width read as what was written, streamed as if whole, and refused in one sentence."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from manyheads.errors import InputError

pytest.importorskip("scipy")
from scipy.signal import resample_poly

from manyheads.audio.core.sounds import open_recording, write_recording

WAVE = np.random.default_rng(0).uniform(-0.9, 0.9, 30_011)


def wav(kind, channels, rate, bits, data, *, extensible=False, junk=b"", length=None):
    frame = channels * bits // 8
    fmt = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * frame, frame, bits)
    if extensible:
        fmt += struct.pack("<HHIH14s", 22, bits, 0, kind, b"\0" * 14)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + junk
    body += b"data" + struct.pack("<I", len(data) if length is None else length) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def written(values, kind, bits):
    if kind == 3:
        return values.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return (np.round(values * 127) + 128).astype(np.uint8).tobytes()
    whole = np.round(values * (2 ** (bits - 1) - 1)).astype("<i4")
    return whole.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes()


@pytest.mark.parametrize(("kind", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_every_width_is_read_as_what_was_written_and_channels_are_averaged(tmp_path, kind, bits):
    both = np.stack([WAVE, WAVE[::-1]], 1)
    for extensible in (False, True):
        path = tmp_path / f"{extensible}.wav"
        junk = b"LIST\x03\0\0\0abc\0"  # of odd length, with its filling byte
        path.write_bytes(
            wav(kind, 2, 48_000, bits, written(both.ravel(), kind, bits), extensible=extensible, junk=junk)
        )
        recording = open_recording(path)
        assert (recording.rate, recording.channels, recording.samples) == (48_000, 2, len(WAVE))
        read = np.concatenate(list(recording.blocks(997)))
        # The largest number that is written is one step below full scale.
        assert np.abs(read - both.mean(1)).max() < 2.0 ** (2 - min(bits, 23))


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 22_051, 96_000])
def test_a_streamed_recording_at_another_rate_is_what_scipy_makes_of_the_whole(tmp_path, rate):
    write_recording(tmp_path / "a.wav", WAVE, rate)
    recording = open_recording(tmp_path / "a.wav")
    whole = np.concatenate(list(recording.blocks()))
    common = math.gcd(rate, 22_050)
    wanted = resample_poly(whole.astype(np.float64), 22_050 // common, rate // common)
    for size in (65_536, 997) if rate != 22_051 else (65_536, 20_000):
        found = np.concatenate(list(recording.at_rate(22_050, size)))
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1e-6


def test_silence_and_clipping_are_said_and_a_clean_recording_is_not(tmp_path):
    path = tmp_path / "a.wav"
    loud = np.sin(np.arange(80_000) / 30)
    for wave, word in ((0 * loud, "silent"), (2 * loud, "clipped"), (0.5 * loud, None)):
        write_recording(path, wave, 8_000)
        warnings = open_recording(path).warnings()
        assert (word in warnings[0]) if word else not warnings
    write_recording(path, 2 * loud, 8_000)
    # A peak of the wave every 30 pi samples; those that lie on the edge of a block are counted once.
    assert f"{round(80_000 / (30 * math.pi))} peaks" in open_recording(path).warnings()[0]


def test_what_is_no_recording_is_refused_in_one_sentence(tmp_path):
    good = wav(1, 1, 8_000, 16, b"\1\0" * 100)
    nan = wav(3, 1, 8_000, 32, np.array([0, np.nan], "<f4").tobytes())
    for data, word in (
        (b"", "no WAV"),
        (b"ID3" + b"\0" * 100, "no WAV"),
        (good[:30], "damaged"),
        (good[:100], "cut off"),
        (wav(1, 1, 8_000, 16, b""), "no samples"),
        (wav(2, 1, 8_000, 4, b"\0" * 100), "kind 2"),
        (wav(1, 0, 8_000, 16, b"\0" * 100), "0 channels"),
        (wav(1, 1, 0, 16, b"\0" * 100), "0 Hz"),
        (nan, "NaN"),
    ):
        (tmp_path / "a.wav").write_bytes(data)
        with pytest.raises(InputError, match=word) as error:
            list(open_recording(tmp_path / "a.wav").blocks())
        assert str(error.value).count("\n") == 0
    with pytest.raises(InputError, match="no file"):
        open_recording(tmp_path / "none.wav")
