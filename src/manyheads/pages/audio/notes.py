"""A piano roll: the notes that were written down, over what the network heard frame by frame."""

from __future__ import annotations

import math

import torch

from manyheads.audio.notes.cqt import HOP, RATE
from manyheads.audio.notes.decoding import LOWEST_KEY
from manyheads.audio.notes.transcribing import Heard, frame_times
from manyheads.report import page_of
from manyheads.report.figures import hue
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.images import png_uri
from manyheads.report.numbers import count, number

STRETCH, MOST = 20.0, 15  # seconds of a picture, and pictures
WIDTH, KEY, LEFT, BELOW = 860, 9, 44, 22  # px; of a key its height
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_TERMS = {
    "Light": "How probable it is that the key sounds at that time: black is not at all, white is surely.",
    "Frame": "A note that was written down: its key, where it begins and ends. Where it is bright without one, no note was made.",
    "Level": "Mean probability of a note while it sounds; the MIDI file has it as loudness.",
}


@page_of(Heard)
def notes_page(heard: Heard) -> str:
    """The pictures, twenty seconds each, and the notes as a table."""
    seconds = len(heard.sounding) * HOP / RATE
    pitches = [note.pitch for note in heard.notes] or [60]
    low, high = max(min(pitches) - 3, LOWEST_KEY), min(max(pitches) + 3, LOWEST_KEY + heard.sounding.shape[1] - 1)
    pictures = [_roll(heard, i * STRETCH, low, high) for i in range(min(MOST, max(1, math.ceil(seconds / STRETCH))))]
    rows = [
        el(
            "tr",
            *[
                el("td", cell)
                for cell in (f"{one.begins:.2f}", f"{one.ends:.2f}", key_name(one.pitch), number(one.level))
            ],
        )
        for one in heard.notes[:1000]
    ]
    facts = {"seconds": f"{seconds:.1f}", "notes": f"{len(heard.notes):,}"}
    shown = "" if seconds <= MOST * STRETCH else f" The first {MOST * STRETCH / 60:.0f} minutes are drawn."
    lede = f"{count(len(heard.notes), 'note')} in {seconds:.1f} seconds.{shown}"
    table = plain_table(("begins, s", "ends, s", "key", "level"), rows, label="The first thousand notes")
    body = join(
        masthead("Sound", "Notes of a recording", lede, facts, how_to_read(_TERMS)),
        el("main", el("section", el("h2", "Piano roll"), *pictures), el("section", el("h2", "Notes"), table)),
    )
    return page("Notes of a recording", body)


def key_name(pitch: int) -> str:
    """The key of a MIDI number, with its octave: 60 is C4."""
    return f"{NAMES[pitch % 12]}{pitch // 12 - 1}"


def _roll(heard: Heard, begins: float, low: int, high: int) -> Html:
    """Twenty seconds from `begins` on."""
    times = frame_times(len(heard.sounding))
    inside = (times >= begins) & (times < begins + STRETCH)
    keys = heard.sounding[inside][:, low - LOWEST_KEY : high + 1 - LOWEST_KEY]
    light = torch.from_numpy(keys.T[::-1].copy())[None]
    light[0, 0, :2] = torch.tensor([0.0, 1.0])  # so that black and white are 0 and 1 on every picture
    height, wide = KEY * (high - low + 1), WIDTH - LEFT

    def x(second: float) -> float:
        return round(LEFT + wide * min(max((second - begins) / STRETCH, 0.0), 1.0), 1)

    def y(pitch: int) -> int:
        return KEY * (high - pitch)

    end = float(times[inside][-1]) + HOP / RATE if inside.any() else begins
    parts: list[Html] = [
        el(
            "image",
            href=png_uri(light),
            x=LEFT,
            y=0,
            width=x(end) - LEFT,
            height=height,
            preserveAspectRatio="none",
        )
    ]
    for note in heard.notes:
        if note.ends > begins and note.begins < begins + STRETCH:
            wide_ = max(x(note.ends) - x(note.begins), 1.0)
            parts.append(
                el("rect", x=x(note.begins), y=y(note.pitch), width=round(wide_, 1), height=KEY, class_="note")
            )
    for pitch in range(low, high + 1):
        if pitch % 12 == 0:
            parts.append(el("text", key_name(pitch), x=LEFT - 6, y=y(pitch) + KEY, text_anchor="end"))
    for second in range(int(begins), int(begins + STRETCH) + 1, 5):
        anchor = "end" if second >= begins + STRETCH else "middle" if second > begins else "start"
        parts.append(el("text", f"{second} s", x=x(second), y=height + 16, text_anchor=anchor))
    label = f"Keys that sound from second {begins:.0f} to {begins + STRETCH:.0f}"
    svg = el(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {height + BELOW}", role="img", aria_label=label, class_="plot scatter roll"
    )
    return el("figure", svg, el("figcaption", label), class_=hue(1))
