"""A GPT-2 set by hand that answers four-option questions: `<bos> q A c B c C c D c END`, with a head of every class."""

from typing import Literal

import numpy as np
import torch
from planted_ioi import Stream, Wire, batch_of, gpt2, sink

from manyheads.atlas.multiple_choice.questions import Questions

KINDS, EACH = 4, 3  # categories, and contents of each
N_LABELS = 16  # A to D, then others
LABELS_AT, OPTIONS_AT, END = [2, 4, 6, 8], [3, 5, 7, 9], 10
KNOWN = {
    "correct_letter": ["L2H0"],
    "single_letter": ["L2H3"],
    "content_gatherer": ["L1H2"],
    "amplification": ["L3H1"],
    "constant": ["L2H1"],
}
Binds = Literal["nth", "labelled"]


def choice_model(binds: Binds = "nth", seed=0, noise=0.01):
    """`binds` says by what the correct-letter head finds the label: the number of the line, or the label that stands there."""
    sizes = {"cat": KINDS, "want": KINDS, "label": N_LABELS, "islabel": 1, "mine": N_LABELS, "sought": N_LABELS}
    s = Stream(256, sizes | {"line": 4, "out": N_LABELS, "pos": 11, "bos": 1}, seed)
    tokens = np.zeros((1 + KINDS + N_LABELS + KINDS * EACH + 1, s.width))
    tokens[0] = s["bos"][0]
    tokens[1 : 1 + KINDS] = s["cat"]
    labels = slice(1 + KINDS, 1 + KINDS + N_LABELS)
    tokens[labels] = s["label"] + s["islabel"]
    contents = np.arange(KINDS * EACH)
    tokens[labels.stop + contents] = s["cat"][contents // EACH]
    said = np.zeros_like(tokens)
    said[labels] = 4 * s["out"]
    pos, says = s["pos"], [(s["label"], s["out"], 1.0)]
    key = (s["line"], pos[LABELS_AT], 6.0) if binds == "nth" else (s["sought"], s["label"], 6.0)
    wires = {
        (0, 0): Wire([(pos[[END]], pos[[1]], 30.0), sink(s, 15.0)], [(s["cat"], s["want"], 1.0)]),
        (0, 3): Wire([(pos[OPTIONS_AT], pos[LABELS_AT], 30.0), sink(s, 15.0)], [(s["label"], s["mine"], 1.0)]),
        (1, 2): Wire(
            [(s["want"], s["cat"], 30.0), (pos[[END]], pos[[1]], -60.0), sink(s, 15.0)],
            [(pos[OPTIONS_AT], s["line"], 1.0), (s["mine"], s["sought"], 1.0)],
        ),
        (2, 0): Wire([key], says),
        (2, 3): Wire([(s["line"][[1]], pos[[4]], 30.0), sink(s, 15.0)], [(s["label"], s["out"], 0.3)]),
        (2, 1): Wire([(pos[[END]], pos[[6]], 30.0), sink(s, 15.0)], [(s["label"], s["out"], 0.2)]),
        (3, 1): Wire([(pos[[END]], pos[[END]], 30.0), sink(s, 15.0)], [(s["out"], s["out"], 0.5)]),
    }
    return gpt2(s, 4, 4, tokens, pos, said, wires, noise=noise, seed=seed)


def choice_questions(kind="standard", n=32, seed=0):
    """The same questions for every kind of labels."""
    rng, chance = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    ids, right, labels = [], [], []
    first = 1 + KINDS
    content = first + N_LABELS
    for i in range(n):
        kinds = rng.permutation(KINDS)
        line = i % 4
        options = [content + EACH * k + int(rng.integers(EACH)) for k in kinds]
        named = {
            "standard": np.arange(4),
            "shuffled": np.roll(np.arange(4), int(chance.integers(1, 4))),
            "letters": 4 + chance.permutation(8)[:4],
            "digits": 12 + chance.permutation(4),
        }[kind]
        lines = [token for pair in zip((first + named).tolist(), options, strict=True) for token in pair]
        ids.append([0, 1 + int(kinds[line]), *lines, content + KINDS * EACH])
        right.append(line)
        labels.append((first + named).tolist())
    spans = {f"label{k}": [c] * n for k, c in enumerate(LABELS_AT)} | {
        f"option{k}": [c] * n for k, c in enumerate(OPTIONS_AT)
    }
    answers = [row[r] for row, r in zip(labels, right, strict=True)]
    return Questions(batch_of(ids, answers, [-1] * n, None, spans), torch.tensor(labels), torch.tensor(right))
