"""What a spiking network learned of events after a cue: its readouts, and how their heights moved from trial to trial."""

from __future__ import annotations

import numpy as np

from manyheads.brain.timing import LearnedTiming
from manyheads.report import page_of
from manyheads.report.fan import Fan, fan
from manyheads.report.html import el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import count, number

_TERMS = {
    "Readout": "What the network expects of an event at each moment after the cue. Where its bump stands says when, and how high "
    "it is says how likely. Wherever no event ever came nothing is learned, and what is read there means nothing.",
    "Height": "Of an event's readout before each trial, in units of what the event looks like on average when it comes. It "
    "rises when the event comes and falls when it does not.",
    "How likely": "The height, on average over the last trials.",
}


@page_of(LearnedTiming)
def timing_page(found: LearnedTiming) -> str:
    """A readout an event, then the heights over trials."""
    steps, trials = len(found.expected), len(found.heights)
    clock = [f"{t * found.dt:.0f} ms" for t in range(steps)]
    nothing = np.zeros(0)
    figures = [
        fan(Fan(clock, nothing, found.expected[:, k]), label=f"{name}: the readout after the last trial")
        for k, name in enumerate(found.names)
    ]
    figures += [
        fan(
            Fan([f"trial {r}" for r in range(trials)], nothing, found.heights[:, k]),
            label=f"{name}: the height of its bump before each trial",
        )
        for k, name in enumerate(found.names)
    ]
    rows = [
        el("tr", el("td", name), el("td", f"{found.when[k]:.0f} ms"), el("td", number(float(found.probability[k]))))
        for k, name in enumerate(found.names)
    ]
    table = plain_table(
        ("event", "when", "how likely"), rows, label=f"What was learned, over the last {found.averaged} trials"
    )
    lede = f"{count(trials, 'trial')}, {count(len(found.names), 'event')}."
    top = masthead("What and when", "What comes, when, and how likely?", lede, {}, how_to_read(_TERMS))
    return page("What and when", join(top, el("main", table, *figures)))
