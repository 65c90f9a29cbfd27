"""Answers that are kept on a page without a model: for each prompt what comes next, why, and where the loudest heads look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from manyheads.explorer import asking
from manyheads.explorer.overview import head_names
from manyheads.explorer.workbench import Workbench
from manyheads.progress import Bar

PATTERNS = 64  # heads a prompt whose patterns are kept: all of a small model, else those that say most


def answered(bench: Workbench, prompts: Sequence[str], *, bar: Bar = Bar()) -> list[dict[str, Any]]:
    """What the page shows of each prompt. `InputError` for one that is too long."""
    step = bar.step("prompts", len(prompts))
    found = []
    for prompt in prompts:
        explained = bench.answer(asking.Explain(kind="explain", prompt=prompt))
        sizes = np.abs(np.array([value or 0.0 for value in explained["heads"]]))
        names = head_names(bench.model.shape)
        loudest = [names[i] for i in np.argsort(-sizes, kind="stable")[:PATTERNS]]
        patterns = [bench.answer(asking.LookAt(kind="pattern", prompt=prompt, head=head)) for head in loudest]
        predict = bench.answer(asking.Predict(kind="predict", prompt=prompt))
        found.append({"prompt": prompt, "predict": predict, "explain": explained, "patterns": patterns})
        step(1)
    return found
