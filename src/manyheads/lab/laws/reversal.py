"""The reversal curse (#23): who learned "A is B" does not know "B is A".

Berglund et al., arXiv:2309.12288. Of facts seen in one order, the other order is known no better than by chance: the right name
is as likely as another name of the same place. Here of any model (`reversal`): the gain of right pairs (see `relations`) forwards
and backwards, each beside random pairings of the same names. Refuted by: a gain backwards that random pairings do not reach.

The law speaks of facts that were seen in one order. Texts hold many facts in both; of those a model tells both, and the row says
"fails" of this set, not of the law. `lab run reversal` trains on one order alone, where the law can be tried.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from manyheads.evaluation import p_value
from manyheads.heads import mean_stderr
from manyheads.lab.laws.law import SURE, Answer, LawRow, judged
from manyheads.lab.laws.relations import TwoWay, gains
from manyheads.model.headmodel import HeadModel


def reversal(
    model: HeadModel,
    facts: TwoWay,
    *,
    forwards: Float[np.ndarray, "N N"] | None = None,
    seed: int = 0,
    draws: int = 999,
) -> LawRow:
    """Gain forwards less gain backwards of the right pairs (nats); the control is that of random pairings, the same both ways.

    The law holds where that is above the control, and the gain backwards is not above its own.
    `forwards` are the scores of `facts`, where they are known already.
    """
    forwards = facts.scores(model) if forwards is None else forwards
    ways = {"forwards": gains(forwards), "backwards": gains(facts.scores(model, backward=True))}
    right = {way: np.diagonal(gain) for way, gain in ways.items()}
    nulls = {way: _paired(gain, seed, draws) for way, gain in ways.items()}
    p = {way: p_value(float(right[way].mean()), nulls[way]) for way in ways}
    apart = nulls["forwards"] - nulls["backwards"]
    hits = {way: float((gain.argmax(1) == np.arange(len(gain))).mean()) for way, gain in ways.items()}
    mean, stderr = map(float, mean_stderr(right["forwards"] - right["backwards"]))
    told = (
        f"right of {len(facts.pairs)}: {hits['forwards']:.2f} forwards, {hits['backwards']:.2f} backwards; "
        f"gain {right['forwards'].mean():.2f} and {right['backwards'].mean():.2f} nats (p {p['forwards']:.3f}, "
        f"{p['backwards']:.3f} of random pairings)"
    )
    answer: Answer
    if p["forwards"] > SURE:
        answer, told = "not decided", f"does not know these facts forwards; {told}"
    elif p["backwards"] <= SURE:
        answer, told = "fails", f"knows them backwards too; {told}"
    else:
        answer = judged(mean, stderr, p_value(mean, apart))
    return LawRow(
        "reversal curse",
        23,
        facts.name,
        mean,
        stderr,
        "nats",
        float(apart.mean()),
        p_value(mean, apart),
        len(facts.pairs),
        answer,
        told,
    )


def _paired(gain: Float[np.ndarray, "N N"], seed: int, draws: int) -> Float[np.ndarray, "R"]:
    """Mean gain of random pairings; the same ones for the same seed."""
    rng, rows = np.random.default_rng(seed), np.arange(len(gain))
    return np.array([gain[rows, rng.permutation(len(gain))].mean() for _ in range(draws)])
