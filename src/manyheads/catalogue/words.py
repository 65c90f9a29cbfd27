"""The search by words: which rows of the catalogue hold the words of a question. It needs nothing that is not in Python."""

from __future__ import annotations

import re
from math import log

from manyheads.catalogue.rows import Method, methods

# How much a word says about a method, by where it stands.
_WEIGHTS = {"name": 4.0, "room": 3.0, "title": 2.0, "what": 2.0}
_PREFIX = 0.5
_IGNORED = frozenset(
    "a an and are as at by do does for from how i in is it me my need of on or that the to want what which with".split()
)


def named(query: str) -> list[Method]:
    """The method whose number (`11`, `#11`) or arXiv number `query` is, if it is one."""
    exact = query.strip().lower().removeprefix("#").removeprefix("arxiv:")
    return [m for m in methods() if exact in (str(m.number), m.arxiv)]


def content(query: str) -> list[str]:
    """The words of `query` that say what is looked for, in lower case and without endings, each once."""
    return sorted({_stem(word) for word in _words(query) if word not in _IGNORED})


def search(query: str) -> list[Method]:
    """The methods that `query` describes, best first; every method, by number, if it holds no word to look for.

    A word counts in any case and ending (head, heads; prune, pruning), and as the beginning of a longer word at half
    weight. Each adds

        idf(word) * weight of the best field it stands in        with idf = log(1 + methods / methods that hold it)

    and a method must hold at least half as much of the query, measured in idf, as the method that holds most: where
    "retrieval heads" finds a retrieval head, any other head is no answer. A number (`11`, `#11`) or an arXiv number
    names its method.
    """
    if exact := named(query):
        return exact
    if not content(query):
        return methods()
    said = word_scores(query)
    return sorted((m for m in methods() if said.get(m.number, 0.0) > 0), key=lambda m: (-said[m.number], m.number))


def word_scores(query: str) -> dict[int, float]:
    """What the words of `query` add up to (see `search`), for the methods that hold enough of it, by number."""
    hits = {word: {m.number: hit for m in methods() if (hit := _hit(word, m)) > 0} for word in content(query)}
    idf = {word: log(1 + len(methods()) / len(hit)) for word, hit in hits.items() if hit}

    held = {m.number: sum(idf[word] for word in idf if m.number in hits[word]) for m in methods()}
    found = [m for m in methods() if held[m.number] >= max(held.values()) / 2 > 0]
    return {m.number: sum(idf[word] * hits[word].get(m.number, 0.0) for word in idf) for m in found}


def _hit(word: str, m: Method) -> float:
    best = 0.0
    for name, weight in _WEIGHTS.items():
        for other in map(_stem, _words(getattr(m, name))):
            if other == word:
                best = max(best, weight)
            elif len(word) >= 3 and other.startswith(word):
                best = max(best, weight * _PREFIX)
    return best


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _stem(word: str) -> str:
    """The word without its English ending: heads, pruning, prune -> head, prun, prun. At least four letters stay."""
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word
