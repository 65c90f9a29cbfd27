"""The survey's behaviours. Each registers itself at the foot of its own file, and the survey finds it there:

    register(ABOUT, score=delimiter, judge=TEXT)

`score` is the behaviour's public function. It takes `(model, n=, seed=, bar=)` and returns `HeadScores`, or a dictionary of them
by name where several behaviours come out of the same forward passes; those are registered together. A `score` that has `together`
(the reductions of patterns on repeated tokens) shares its passes with all others of its kind, whichever file they stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from pkgutil import walk_packages
from types import MappingProxyType
from typing import Any

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import Judged
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.editing.edits import Mode
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import Task

Steps = Callable[[HeadModel, int], int]


@dataclass(frozen=True)
class Behaviour:
    """A behaviour of the survey: what it is, what scores it, what judges its heads, the ablations they are judged by.

    `example` names what its heads are shown on in the report: "repeats", "text" or a task. `steps(model, n)` is how far its bar
    goes. `causal`: only for models that predict the next token.
    """

    about: About
    score: Any
    judge: Judged
    example: str
    modes: tuple[Mode, ...]
    steps: Steps
    causal: bool

    @property
    def shared(self) -> Any:
        """What behaviours that share their forward passes have in common."""
        return getattr(self.score, "together", self.score)


# Kinds in the order in which a reader meets them; all others follow by name.
FIRST = ("position", "rest", "repetition", "copying", "succession")
_FOUND: dict[str, Behaviour] = {}


def register(
    *abouts: About,
    score: Any,
    judge: Judged,
    example: str | None = None,
    modes: tuple[Mode, ...] = ("mean", "zero"),
    steps: Steps = lambda model, n: n,
    causal: bool = False,
) -> None:
    """Make one or several behaviours part of the survey (see above). `example` is by default what the judge reads."""
    for about in abouts:
        _FOUND[about.name] = Behaviour(about, score, judge, example or judge.name, modes, steps, causal)


def by_weights(function: Callable[..., HeadScores]) -> Callable[..., HeadScores]:
    """For `register(score=...)`: a score that is read off the weights and takes no number of examples."""

    @wraps(function)
    def score(model: HeadModel, *, n: int, seed: int, bar: Bar = Bar()) -> HeadScores:
        found = function(model, seed=seed)
        bar(1)
        return found

    score.by_weights = True  # type: ignore[attr-defined]
    return score


def behaviours() -> dict[str, Behaviour]:
    """Every behaviour by name, found by importing the files of `manyheads.atlas`; those of one kind side by side."""
    _import_all()
    return dict(sorted(_FOUND.items(), key=_place))


def _place(item: tuple[str, Behaviour]) -> tuple[int, str, str]:
    name, kind = item[0], item[1].about.kind
    return FIRST.index(kind) if kind in FIRST else len(FIRST), kind, name


@cache
def _import_all() -> None:
    spec = find_spec("manyheads.atlas")
    for module in walk_packages(spec.submodule_search_locations if spec else None, "manyheads.atlas."):
        import_module(module.name)


def sharing_passes(names: Collection[str]) -> list[list[Behaviour]]:
    """These behaviours, those that share their passes together."""
    every = behaviours()
    found: dict[Any, list[Behaviour]] = {}
    for name in every:
        if name in names:
            found.setdefault(every[name].shared, []).append(every[name])
    return list(found.values())


def score_all(
    model: HeadModel,
    names: Collection[str],
    *,
    n: int | Mapping[str, int],
    seed: int,
    bar: Bar = Bar(),
    tasks: Mapping[str, Task] = MappingProxyType({}),
    done: Mapping[str, HeadScores] = MappingProxyType({}),
    keep: Callable[[Mapping[str, HeadScores]], object] = lambda scores: None,
) -> tuple[dict[str, HeadScores], dict[str, str]]:
    """The scores of these behaviours, and the reasons of those that could not be had. What shares passes is scored at once.

    `n` is the number of examples, of all or of the first behaviour by name of each family. `done` are scores that an earlier run
    has; `keep` is told new ones as soon as they are there. `tasks` are, by behaviour, those to score on instead of a behaviour's
    own.
    """
    scores: dict[str, HeadScores] = {}
    skipped: dict[str, str] = {}
    for family in sharing_passes(names):
        wanted = [one.about.name for one in family]
        if all(name in done for name in wanted):
            scores |= {name: done[name] for name in wanted}
            continue
        if family[0].causal and not model.is_causal:
            skipped |= dict.fromkeys(wanted, "it needs a model that predicts the next token.")
            continue
        more = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        examples = n if isinstance(n, int) else n[wanted[0]]
        step = bar.step(f"{wanted[0]}{more}", family[0].steps(model, examples))
        try:
            found = _scored(model, family, examples, seed, step, tasks.get(wanted[0]))
        except (InputError, UnsupportedError) as error:
            skipped |= dict.fromkeys(wanted, str(error))
        else:
            new = {name: found[name] for name in wanted if name in found}
            keep(new)
            scores |= new
    return scores, skipped


def _scored(
    model: HeadModel, family: list[Behaviour], n: int, seed: int, bar: Bar, task: Task | None
) -> Mapping[str, HeadScores]:
    shared = family[0].shared
    if shared is not family[0].score:
        found = shared([one.score for one in family], model, n=n, seed=seed, bar=bar)
    else:
        more = {} if task is None else {"task": task}
        found = shared(model, n=n, seed=seed, bar=bar, **more)
    return {found.name: found} if isinstance(found, HeadScores) else found


def top_heads(scores: HeadScores, threshold: float) -> HeadSet:
    """The heads a check ablates: those at the threshold or above, at most a tenth of all (or three).

    Never fewer than two: a single head of a layer of eight has seven others to be compared with, too few for a p-value.
    """
    most = max(3, scores.values.size // 10)
    return scores.top(max(2, min(len(scores.above(threshold)), most)))
