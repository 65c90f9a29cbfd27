"""The survey's behaviours, by families: those of one family come out of the same forward passes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from manyheads.atlas.circuits.arithmetic import ABOUT as ARITHMETIC
from manyheads.atlas.circuits.arithmetic import arithmetic
from manyheads.atlas.circuits.choice import ABOUT as CHOICE
from manyheads.atlas.circuits.choice import choice
from manyheads.atlas.circuits.ioi import ABOUT as IOI_CLASSES
from manyheads.atlas.circuits.ioi import ioi_classes
from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.repeats import score_repeats
from manyheads.atlas.facts.memory_context import ABOUT as CONFLICT
from manyheads.atlas.facts.memory_context import memory_context
from manyheads.atlas.facts.recall import ABOUT as FACTS
from manyheads.atlas.facts.recall import fact_recall
from manyheads.atlas.patterns.copying import ABOUT as COPYING
from manyheads.atlas.patterns.copying import copying
from manyheads.atlas.patterns.delimiter import ABOUT as DELIMITER
from manyheads.atlas.patterns.delimiter import delimiter
from manyheads.atlas.patterns.duplicate_token import DIAGONAL as DUPLICATE_TOKEN
from manyheads.atlas.patterns.first_token import REDUCTION as FIRST_TOKEN
from manyheads.atlas.patterns.induction import DIAGONAL as INDUCTION
from manyheads.atlas.patterns.ngram import ABOUTS as NGRAM
from manyheads.atlas.patterns.ngram import ngram
from manyheads.atlas.patterns.positional import REDUCTION as POSITIONAL
from manyheads.atlas.patterns.previous_token import DIAGONAL as PREVIOUS_TOKEN
from manyheads.atlas.retrieval_heads.scores import ABOUT as RETRIEVAL
from manyheads.atlas.retrieval_heads.scores import retrieval
from manyheads.atlas.safety.ships import ABOUTS as SHIPS
from manyheads.atlas.safety.ships import ships
from manyheads.atlas.successor_heads.scores import ABOUT as SUCCESSOR
from manyheads.atlas.successor_heads.scores import successor
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.edit.edits import Mode
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar

Scorer = Callable[[HeadModel, Collection[str], int, int, Bar], dict[str, HeadScores]]


@dataclass(frozen=True)
class Entry:
    """A behaviour of the survey: what it is, the task that judges its heads, the example that shows them, the ablations."""

    about: About
    judge: str
    example: str
    modes: tuple[Mode, ...] = ("mean", "zero")


@dataclass(frozen=True)
class Family:
    """Behaviours scored together: `score(model, names, n, seed, bar)`; `steps(n)` is how far its progress goes."""

    title: str
    entries: tuple[Entry, ...]
    score: Scorer
    steps: Callable[[int], int] = lambda n: 1
    causal: bool = False  # only for models that predict the next token


_REPEATS = {
    reduction.about.name: reduction
    for reduction in (PREVIOUS_TOKEN, DUPLICATE_TOKEN, INDUCTION, POSITIONAL, FIRST_TOKEN)
}


def _repeats(model: HeadModel, names: Collection[str], n: int, seed: int, bar: Bar) -> dict[str, HeadScores]:
    wanted = [name for name in _REPEATS if name in names]
    reductions = [_REPEATS[name] for name in wanted]
    scores = score_repeats(model, reductions, n=n, length=64, seed=seed, bar=bar)
    return dict(zip(wanted, scores, strict=True))


def _one(
    function: Callable[..., HeadScores],
    model: HeadModel,
    names: Collection[str],
    n: int,
    seed: int,
    bar: Bar,
) -> dict[str, HeadScores]:
    """A family of one behaviour, whose function takes n, seed and bar."""
    return {name: function(model, n=n, seed=seed, bar=bar) for name in names}


def _several(
    function: Callable[..., dict[str, HeadScores]],
    model: HeadModel,
    names: Collection[str],
    n: int,
    seed: int,
    bar: Bar,
) -> dict[str, HeadScores]:
    """A family whose function gives all of its scores, and perhaps more, from the same passes."""
    scores = function(model, n=n, seed=seed, bar=bar)
    return {name: scores[name] for name in names if name in scores}


def _by_weights(
    function: Callable[..., HeadScores],
    model: HeadModel,
    names: Collection[str],
    n: int,
    seed: int,
    bar: Bar,
) -> dict[str, HeadScores]:
    """A family of one behaviour that is read off the weights."""
    scores = {name: function(model, seed=seed) for name in names}
    bar(1)
    return scores


def _needles(n: int) -> int:
    return n + n // 4


FAMILIES: tuple[Family, ...] = (
    Family(
        "patterns on repeated tokens",
        (
            Entry(PREVIOUS_TOKEN.about, "repeats", "repeats"),
            Entry(DUPLICATE_TOKEN.about, "repeats", "repeats"),
            Entry(INDUCTION.about, "repeats", "repeats"),
            Entry(POSITIONAL.about, "repeats", "repeats"),
            Entry(FIRST_TOKEN.about, "text", "text"),
        ),
        _repeats,
        lambda n: n,
    ),
    Family(
        "patterns on text",
        (Entry(DELIMITER, "text", "text"),),
        partial(_one, delimiter),
        lambda n: n,
    ),
    Family("copying circuits", (Entry(COPYING, "repeats", "repeats"),), partial(_by_weights, copying)),
    Family("successor circuits", (Entry(SUCCESSOR, "successor", "successor"),), partial(_by_weights, successor)),
    Family(
        "needles in haystacks",
        (Entry(RETRIEVAL, "needle", "needle", ("mean", "zero", "uniform")),),
        lambda model, names, n, seed, bar: _one(retrieval, model, names, _needles(n), seed, bar),
        _needles,
        causal=True,
    ),
    Family(
        "contexts that match at length 1 to 3",
        tuple(Entry(NGRAM[f"ngram_{order}"], f"ngram{order}", "repeats") for order in (2, 3)),
        partial(_several, ngram),
        lambda n: n,
        causal=True,
    ),
    Family(
        "indirect objects",
        tuple(Entry(about, "ioi", "ioi") for about in IOI_CLASSES.values()),
        partial(_several, ioi_classes),
        lambda n: 4 * n,
        causal=True,
    ),
    Family(
        "facts",
        (Entry(FACTS["topic_effect"], "facts", "facts"),),
        partial(_several, fact_recall),
        lambda n: n,
        causal=True,
    ),
    Family(
        "conflicts of context and memory",
        (
            Entry(CONFLICT["context"], "context", "counterfactual"),
            Entry(CONFLICT["memory"], "memory", "counterfactual"),
        ),
        partial(_several, memory_context),
        lambda n: n,
        causal=True,
    ),
    Family(
        "arithmetic",
        (Entry(ARITHMETIC["arithmetic"], "arithmetic", "arithmetic"),),
        partial(_several, arithmetic),
        lambda n: 2 * n,
        causal=True,
    ),
    Family(
        "multiple choice",
        (Entry(CHOICE["choice_direct"], "choice", "choice"),),
        partial(_several, choice),
        lambda n: n,
        causal=True,
    ),
    Family(
        "refusal",
        (Entry(SHIPS["ships_direction"], "refusal", "refusal", ("mean", "zero", "uniform")),),
        partial(_several, ships),
        lambda n: n,
        causal=True,
    ),
)
BEHAVIOURS: dict[str, Entry] = {entry.about.name: entry for family in FAMILIES for entry in family.entries}


def score_all(
    model: HeadModel, names: Collection[str], *, n: int, seed: int, bar: Bar
) -> tuple[dict[str, HeadScores], dict[str, str]]:
    """The scores alone, and the reasons of those that could not be had. Families share their forward passes."""
    scores: dict[str, HeadScores] = {}
    skipped: dict[str, str] = {}
    for family in FAMILIES:
        wanted = [entry.about.name for entry in family.entries if entry.about.name in names]
        if not wanted:
            continue
        if family.causal and not model.is_causal:
            skipped |= dict.fromkeys(wanted, "it needs a model that predicts the next token.")
            continue
        step = bar.step(family.title, family.steps(n))
        try:
            scores |= family.score(model, wanted, n, seed, step)
        except (InputError, UnsupportedError) as error:
            skipped |= dict.fromkeys(wanted, str(error))
    return scores, skipped


def top_heads(scores: HeadScores, about: About) -> HeadSet:
    """The heads a check ablates: those at the threshold or above, at most a tenth of all (or three).

    Never fewer than two: a single head of a layer of eight has seven others to be compared with, too few for a p-value.
    """
    most = max(3, scores.values.size // 10)
    return scores.top(max(2, min(len(scores.above(about.threshold)), most)))
