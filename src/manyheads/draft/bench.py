"""Ways of decoding side by side, in one run: tokens a second, tokens a pass, acceptance by depth, and what drafting takes.

All contenders continue the same prompts, one prompt at a time, and take turns at every prompt, so that other load on the machine
affects all of them. Where one thread computes, processor time is measured, else time; of several rounds the median counts, prompt
by prompt. The baselines are Transformers' own `generate`, its prompt lookup, and its assisted generation where a smaller model is
given; and our own decoding without any guesses.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from manyheads.draft.core.costs import clock
from manyheads.draft.core.decode import Tally, generate
from manyheads.draft.core.drafter import Copying, Drafter
from manyheads.draft.core.growth import Growth
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Proposal, chain_of
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.model.tree_pass import TreePass
from manyheads.progress import Bar
from manyheads.report import Reported

PLAIN = "generate"


class NoGuesses(Copying):
    """Guesses nothing: plain decoding in our own loop."""

    kind = "none"

    @property
    def groups(self) -> int:
        """One, of nothing."""
        return 1

    def found(self, text: list[int]) -> tuple[int, list[int]]:
        """Nothing."""
        return 0, []

    def propose(self, trunk: DraftTrunk, accepted: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """An empty tree for each row."""
        rows = len(accepted.last)
        return Proposal((chain_of(0),) * rows, accepted.tokens.new_zeros(rows, 0))


@dataclass(frozen=True)
class Contender:
    """One way of decoding: a drafter with a growth, or options for Transformers' `generate`. `packed` as in `draft.generate`."""

    name: str
    drafter: Drafter | None = None
    growth: Growth | Literal["auto"] | None = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    trunk: DraftTrunk | None = None
    acceptance: Any = "lossless"
    packed: bool | None = None


@dataclass(frozen=True)
class OfKind:
    """Results on the prompts of one kind: speed over plain `generate`'s on all of them together, its standard deviation over the
    prompts and its lowest value; and new tokens a pass."""

    prompts: int
    ratio: float
    spread: float
    lowest: float
    tokens_a_pass: float | None


@dataclass(frozen=True)
class Outcome:
    """Results of one contender. `speed` is in new tokens a second, `ratio` is speed over plain `generate`'s. `same` is the share
    of prompts (decoded greedily) with exactly plain `generate`'s tokens. `peak` is memory beyond the model (drafter weights and
    decoding), in MiB, None where that cannot be measured. `draft_ms` and `verify_ms` are what a pass takes in drafting and in
    reading and checking guesses, `overhead` is the share of the first. `kinds` are results by kind of prompt."""

    name: str
    speed: float
    ratio: float
    tokens_a_pass: float | None
    acceptance: list[float] | None
    overhead: float | None
    peak: float | None
    same: float | None
    draft_ms: float | None = None
    verify_ms: float | None = None
    kinds: dict[str, OfKind] = field(default_factory=dict)


@dataclass(frozen=True)
class DraftBench(Reported):
    """Results of every contender, plain `generate` first; `about` describes the run in one sentence."""

    outcomes: tuple[Outcome, ...]
    about: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row per contender; `acceptance` is a list by depth, `kinds` a table by kind."""
        return pd.DataFrame([asdict(outcome) for outcome in self.outcomes])


def bench(
    model: HeadModel,
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]],
    *,
    max_new_tokens: int = 96,
    repeats: int = 3,
    temperature: float = 0.0,
    bar: Bar = Bar(),
) -> DraftBench:
    """Time plain `generate` and every contender on `prompts`, ids of one prompt each, which may come by kind; no row ends before
    `max_new_tokens`.

    A first round on one prompt of each kind warms up and is not timed. `bar` counts decoded prompts. `InputError` for prompts
    that leave no room in the model's positions.
    """
    by_kind = dict(prompts) if isinstance(prompts, Mapping) else {"": prompts}
    every = [(kind, list(prompt)) for kind, several in by_kind.items() for prompt in several]
    if max_new_tokens < 1 or repeats < 1 or not every:
        raise InputError(
            f"{len(every)} prompts, {max_new_tokens} new tokens, {repeats} repeats: give at least one of each."
        )
    Target(temperature=temperature)  # its checks
    TreePass(model).check_length(max(len(prompt) for _, prompt in every) + max_new_tokens)
    runs = {each.name: _Runs(each) for each in [Contender(PLAIN), *contenders]}
    firsts = [next(number for number, (kind, _) in enumerate(every) if kind == wanted) for wanted in by_kind]
    for number in firsts:
        for run in runs.values():
            run.decode(model, every[number][1], max_new_tokens, temperature, seed=1000 * number)
            bar(1)
    for repeat in range(repeats):
        for number, (_, prompt) in enumerate(every):
            for run in runs.values():
                run.timed(model, number, prompt, max_new_tokens, temperature, seed=repeat + 1000 * number)
                bar(1)
    kinds = [kind for kind, _ in every]
    outcomes = tuple(run.outcome(runs[PLAIN], kinds, max_new_tokens, greedy=not temperature) for run in runs.values())
    alone = "processor time" if model.device.type == "cpu" and torch.get_num_threads() == 1 else "time"
    about = (
        f"{len(every)} prompts, {max_new_tokens} new tokens each, temperature {temperature:g}, {alone}, "
        f"median of {repeats}."
    )
    return DraftBench(outcomes, about)


class _Runs:
    """What one contender did: seconds, tokens and tallies of every prompt in every round."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.seconds: dict[int, list[float]] = {}
        self.tallies: dict[int, list[Tally]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.peak: float | None = None

    def timed(
        self, model: HeadModel, number: int, prompt: list[int], length: int, temperature: float, seed: int
    ) -> None:
        now = clock(model.device)
        with _Peak(model.device) as peak:
            begun = now()
            tokens, tally = self.decode(model, prompt, length, temperature, seed)
            spent = now() - begun
        self.seconds.setdefault(number, []).append(spent)
        self.tokens.setdefault(number, tokens)
        if tally is not None:
            self.tallies.setdefault(number, []).append(tally)
        if peak.mib is not None:
            self.peak = max(self.peak or 0.0, peak.mib + _weights(self.contender.drafter))

    def decode(
        self, model: HeadModel, prompt: list[int], length: int, temperature: float, seed: int
    ) -> tuple[list[int], Tally | None]:
        each, ids = self.contender, torch.tensor([prompt], device=model.device)
        if each.drafter is None:
            return _plain(model, ids, length, temperature, seed, each.options), None
        got = generate(
            model,
            each.drafter,
            ids,
            growth=each.growth,
            max_new_tokens=length,
            stop=[],
            trunk=each.trunk,
            acceptance=each.acceptance,
            packed=each.packed,
            temperature=temperature,
            seed=seed,
        )
        return got.tokens[0], got.tally

    def took(self, numbers: Sequence[int]) -> float:
        return sum(statistics.median(self.seconds[number]) for number in numbers)

    def tally(self, numbers: Sequence[int]) -> Tally | None:
        return sum_of([tally for number in numbers for tally in self.tallies.get(number, [])])

    def outcome(self, plain: _Runs, kinds: Sequence[str], length: int, *, greedy: bool) -> Outcome:
        every = list(self.seconds)
        own = self.tally(every)
        later = max(own.passes - sum(map(len, self.tallies.values())), 1) if own else 1  # without those of prompts
        same = None
        if greedy and self is not plain:
            same = statistics.mean(self.tokens[number] == plain.tokens[number] for number in every)
        return Outcome(
            name=self.contender.name,
            speed=length * len(every) / self.took(every),
            ratio=plain.took(every) / self.took(every),
            tokens_a_pass=own.tokens_a_pass if own else None,
            acceptance=own.acceptance if own else None,
            overhead=own.drafting / max(own.drafting + own.verifying, 1e-9) if own else None,
            peak=self.peak,
            same=same,
            draft_ms=1e3 * own.drafting / later if own else None,
            verify_ms=1e3 * own.verifying / later if own else None,
            kinds={
                kind: self._of_kind(plain, [n for n in every if kinds[n] == kind])
                for kind in dict.fromkeys(kinds)
                if kind
            },
        )

    def _of_kind(self, plain: _Runs, numbers: list[int]) -> OfKind:
        each = [plain.took([number]) / self.took([number]) for number in numbers]
        own = self.tally(numbers)
        return OfKind(
            prompts=len(numbers),
            ratio=plain.took(numbers) / self.took(numbers),
            spread=statistics.stdev(each) if len(each) > 1 else float("nan"),
            lowest=min(each),
            tokens_a_pass=own.tokens_a_pass if own else None,
        )


def _weights(drafter: Drafter | None) -> float:
    """MiB of a drafter's weights, its draft model included."""
    if drafter is None:
        return 0.0
    own = [weight.nbytes for weight in drafter.parameters()]
    small = getattr(drafter, "small", None)
    return (sum(own) + (sum(weight.nbytes for weight in small.plain.parameters()) if small else 0)) / 2**20


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
        for name in ("tokens", "passes", "rounds", "drafted", "drafting", "verifying", "seconds"):
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
