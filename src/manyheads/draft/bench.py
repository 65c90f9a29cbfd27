"""Ways of decoding side by side, in one run: tokens a second, tokens a pass, acceptance by depth, and what drafting takes.

All contenders continue the same prompts, one prompt at a time. They take turns in each round, so that other load on the machine
affects all of them; the median round of each is reported. The baselines are Transformers' own `generate`, its prompt lookup, and
its assisted generation where a smaller model is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from manyheads.draft.core.decode import Tally, generate
from manyheads.draft.core.drafter import Drafter
from manyheads.draft.core.growth import Growth
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.model.tree_pass import TreePass
from manyheads.progress import Bar
from manyheads.report import Reported

PLAIN = "generate"


@dataclass(frozen=True)
class Contender:
    """One way of decoding: a drafter with a growth, or options for Transformers' `generate`."""

    name: str
    drafter: Drafter | None = None
    growth: Growth | None = None
    options: dict[str, Any] = field(default_factory=dict)
    trunk: DraftTrunk | None = None
    acceptance: Any = "lossless"


@dataclass(frozen=True)
class Outcome:
    """Results of one contender. `speed` is in new tokens a second, `ratio` is speed over plain `generate`'s. `same` is the share
    of prompts (decoded greedily) with exactly plain `generate`'s tokens. `peak` is memory beyond the model (drafter weights and
    decoding), in MiB, None where that cannot be measured. `overhead` is the share of time spent drafting."""

    name: str
    speed: float
    ratio: float
    tokens_a_pass: float | None
    acceptance: list[float] | None
    overhead: float | None
    peak: float | None
    same: float | None


@dataclass(frozen=True)
class DraftBench(Reported):
    """Results of every contender, plain `generate` first; `about` describes the run in one sentence."""

    outcomes: tuple[Outcome, ...]
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row per contender; `acceptance` is a list by depth."""
        return pd.DataFrame([asdict(outcome) for outcome in self.outcomes])


def bench(
    model: HeadModel,
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 96,
    repeats: int = 3,
    temperature: float = 0.0,
    bar: Bar = Bar(),
) -> DraftBench:
    """Time plain `generate` and every contender on `prompts`, ids of one prompt each; no row ends before `max_new_tokens`.

    `InputError` for prompts that leave no room in the model's positions.
    """
    if max_new_tokens < 1 or repeats < 1 or not len(prompts):
        raise InputError(
            f"{len(prompts)} prompts, {max_new_tokens} new tokens, {repeats} repeats: give at least one of each."
        )
    TreePass(model).check_length(max(map(len, prompts)) + max_new_tokens)
    every = [Contender(PLAIN), *contenders]
    seconds: dict[str, list[float]] = {each.name: [] for each in every}
    tallies: dict[str, list[Tally]] = {each.name: [] for each in every}
    peaks: dict[str, float | None] = {}
    tokens_by: dict[str, list[list[int]]] = {}
    for number in range(repeats + 1):  # round 0 warms up and gives the tokens; it is not timed
        for each in every:
            with _Peak(model.device) as peak:
                started = time.perf_counter()
                tokens, made = _decode(model, each, prompts, max_new_tokens, temperature, seed=number)
                spent = time.perf_counter() - started
            if number == 0:
                tokens_by[each.name] = tokens
            else:
                seconds[each.name].append(spent)
                tallies[each.name] += made
                peaks[each.name] = None if peak.mib is None else peak.mib + _weights(each.drafter)
            bar(1)
    plain = statistics.median(seconds[PLAIN])
    total = len(prompts) * max_new_tokens
    outcomes = []
    for each in every:
        took = statistics.median(seconds[each.name])
        own = sum_of(tallies[each.name])
        same = None
        if not temperature and each.name != PLAIN:
            pairs = zip(tokens_by[each.name], tokens_by[PLAIN], strict=True)
            same = statistics.mean(a == b for a, b in pairs)
        outcomes.append(
            Outcome(
                name=each.name,
                speed=total / took,
                ratio=plain / took,
                tokens_a_pass=own.tokens_a_pass if own else None,
                acceptance=own.acceptance if own else None,
                overhead=own.drafting / own.seconds if own else None,
                peak=peaks[each.name],
                same=same,
            )
        )
    about = (
        f"{len(prompts)} prompts, {max_new_tokens} new tokens each, temperature {temperature:g}, median of {repeats}."
    )
    return DraftBench(tuple(outcomes), about)


def _weights(drafter: Drafter | None) -> float:
    """MiB of a drafter's weights, its draft model included."""
    if drafter is None:
        return 0.0
    own = [weight.nbytes for weight in drafter.parameters()]
    small = getattr(drafter, "small", None)
    return (sum(own) + (sum(weight.nbytes for weight in small.plain.parameters()) if small else 0)) / 2**20


def _decode(
    model: HeadModel, each: Contender, prompts: Sequence[Sequence[int]], length: int, temperature: float, seed: int
) -> tuple[list[list[int]], list[Tally]]:
    tokens, tallies = [], []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt)], device=model.device)
        if each.drafter is None:
            tokens.append(_plain(model, ids, length, temperature, seed + 1000 * number, each.options))
            continue
        got = generate(
            model,
            each.drafter,
            ids,
            growth=each.growth,
            max_new_tokens=length,
            stop=[],
            trunk=each.trunk,
            acceptance=each.acceptance,
            temperature=temperature,
            seed=seed + 1000 * number,
        )
        tokens += got.tokens
        tallies.append(got.tally)
    return tokens, tallies


def _plain(
    model: HeadModel, ids: Tensor, length: int, temperature: float, seed: int, options: dict[str, Any]
) -> list[int]:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    pad = model.config.pad_token_id
    out = model.plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=pad if isinstance(pad, int) else 0,
        **sampling,
        **options,
    )
    new: list[int] = out[0, ids.shape[1] :].tolist()
    return new


def sum_of(tallies: Sequence[Tally]) -> Tally | None:
    """The sum of several tallies; None for none."""
    if not tallies:
        return None
    depth = max(len(tally.reached) for tally in tallies)
    total = Tally(reached=[0] * depth, accepted=[0] * depth)
    for tally in tallies:
        for name in ("tokens", "passes", "rounds", "drafted", "drafting", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        for level, (reached, accepted) in enumerate(zip(tally.reached, tally.accepted, strict=True)):
            total.reached[level] += reached
            total.accepted[level] += accepted
    return total


class _Peak:
    """Most memory used in a `with` block beyond what was in use before, in MiB: the accelerator's, else the process's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib: float | None = None

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = float(torch.cuda.memory_allocated(self.device))
        else:
            _give_back()
            self._before = _resident(reset=True) or 0.0
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated(self.device) - self._before) / 2**20
        else:
            most = _resident(reset=False)
            self.mib = None if most is None else (most - self._before) / 2**20


def _give_back() -> None:
    """Return free memory to the system where the C library can: otherwise the next block would reuse it and show no growth."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(*, reset: bool) -> float | None:
    """Bytes of the process's high-water mark (Linux); with `reset` it falls to what is in use now."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
