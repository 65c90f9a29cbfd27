"""Hold a model to all laws that need no training of it."""

from __future__ import annotations

from collections.abc import Sequence

from manyheads.errors import InputError
from manyheads.lab.laws.embers import embers
from manyheads.lab.laws.hallucination import hallucination
from manyheads.lab.laws.law import LawRow, Laws
from manyheads.lab.laws.relations import BUNDLED, TwoWay
from manyheads.lab.laws.reversal import reversal
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar


def laws(
    model: HeadModel,
    facts: Sequence[TwoWay] = BUNDLED,
    *,
    texts: Sequence[str] | None = None,
    monofacts: float | None = None,
    n: int = 192,
    words: int = 5,
    seed: int = 0,
    name: str = "model",
    bar: Bar = Bar(),
) -> Laws:
    """The reversal curse (#23) and calibrated hallucination (#88) on each relation, embers of autoregression (#89) on `n` lists.

    `monofacts` is the share of the model's training facts that were seen once, if it is known. `InputError` for a model without
    tokenizer or whose tokens see what comes after them.
    """
    if model.tokenizer is None or not model.is_causal:
        raise InputError(
            "the laws are about models that write text from left to right, with a tokenizer; give such a one."
        )
    rows: list[LawRow] = []
    done = bar.step("laws", 2 * len(facts) + 1)
    for one in facts:
        forwards = one.scores(model)
        done(1, note=f"{one.name} forwards")
        rows.append(reversal(model, one, forwards=forwards, seed=seed))
        rows.append(hallucination(model, one, forwards=forwards, monofacts=monofacts))
        done(1, note=f"{one.name} backwards")
    rows += embers(model, texts, n=n, words=words, seed=seed)
    done(1, note="embers")
    return Laws(name, tuple(rows))
