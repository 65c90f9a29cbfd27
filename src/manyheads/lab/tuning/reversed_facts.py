"""The reversal curse of a given model (#23): tuned on made-up facts in one order, is it able to tell them in the other?

Berglund et al., arXiv:2309.12288. A third of the facts is told name first, a third description first, a third both ways, each in
several phrasings; the loss is on what stands second. Copies of the model learn all of it, one a seed, and are asked in phrasings
that no training text has, both ways. With S[i, j] = log p(answer of fact j | prompt of fact i), whole answers, in nats,

    gain[i] = S[i, i] - mean_j S[i, j] - mean_k S[k, i] + mean S                 after tuning, less the same before it

within a group: so the others were trained in the same place, and how likely a name is after any prompt is taken out.
A fact is right where its gain is the largest of its prompt. Intervals are over seeds, facts and phrasings (`intervals`).

**Prediction:** gains as told are above 0, and the other way round they are not, but for facts told both ways. **Refuted by** an
interval above 0 the other way round. The facts told both ways are the control: it can be learned.
Departures: 8 facts a group in 6 phrasings where the paper has 30 and 30, and a fact is picked from its group, not written freely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.lab.laws.relations import answer_scores, gains
from manyheads.lab.tuning.copies import (
    TUNED,
    check_tunable,
    neutral_passages,
    prompt_answer_rows,
    text_loss,
    tuned_copy,
)
from manyheads.lab.tuning.fictions import BUNDLED_FICTIONS, GROUPS, ORDERS, Fictions, Order
from manyheads.lab.tuning.intervals import Interval, interval_of
from manyheads.lab.tuning.narrow import check_seeds
from manyheads.lab.tuning.shifting import learned_share
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.report import Reported
from manyheads.training import TrainSettings

Asked = tuple[str, Order]  # a group, and the order in which it is asked
FACTS_TUNED = replace(TUNED, steps=120, rows=8, rate=2e-4)
TRACE = 0.1  # of the gain as told: less than that the other way round is called a trace


def is_told(asked: Asked) -> bool:
    """Whether the group was told in the order in which it is asked."""
    return asked[0] in (asked[1], "both")


@dataclass(frozen=True)
class ReversalTuning(Reported):
    """Gains in nats (formula above) by group and order, [seeds, facts, phrasings], and where the right fact was picked.

    `learned` is the mean probability of the answers that were trained; `loss` that of neutral text, before and after.
    """

    model: str
    facts: Fictions
    seeds: tuple[int, ...]
    gains: Mapping[Asked, Float[np.ndarray, "S N P"]]
    right: Mapping[Asked, Float[np.ndarray, "S N P"]]
    learned: Float[np.ndarray, "S"]
    loss_before: float
    loss: Float[np.ndarray, "S"]

    def gain(self, told: bool) -> Interval:
        """Of facts told in one order: as told, or the other way round."""
        parts = [self.gains[group, order] for group in ORDERS for order in ORDERS if is_told((group, order)) == told]
        return interval_of(np.concatenate(parts, 1))

    @property
    def verdict(self) -> str:
        """Whether the curse is seen, in words."""
        told, other = self.gain(True), self.gain(False)
        both = interval_of(np.concatenate([self.gains["both", order] for order in ORDERS], 1))
        figures = f"as told {told}, the other way round {other}, told both ways {both} nats"
        if told.low <= 0:
            return f"not decided, for the facts were not learned in other phrasings: {figures}"
        if other.low <= 0:
            return f"the curse holds: {figures}"
        if other.mean < TRACE * told.mean:
            return f"the curse holds but for a trace: {figures}"
        return f"the curse does not hold: {figures}"

    def to_frame(self) -> pd.DataFrame:
        """A row a fact, order, phrasing and seed."""
        rows = [
            (
                seed,
                group,
                order,
                is_told((group, order)),
                *pair,
                phrasing,
                gain[s, i, k],
                self.right[group, order][s, i, k],
            )
            for (group, order), gain in self.gains.items()
            for s, seed in enumerate(self.seeds)
            for i, pair in enumerate(self.facts.of(group))
            for k, phrasing in enumerate(self.facts.held[order])
        ]
        names = ["seed", "group", "asked", "told so", "name", "description", "phrasing", "gain", "right"]
        return pd.DataFrame(rows, columns=names)


def reversal_tuning(
    model: HeadModel,
    facts: Fictions = BUNDLED_FICTIONS,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: TrainSettings = FACTS_TUNED,
    lora_rank: int | None = None,
    texts: Sequence[str] | None = None,
    name: str = "model",
    bar: Bar = Bar(),
) -> ReversalTuning:
    """Tune copies of `model` on `facts` and ask them both ways (see above); `model` stays as it is.

    `InputError` before any training where a fact cannot be written as tokens of its own after a phrasing.
    """
    check_seeds(seeds)
    check_tunable(model, lora_rank)
    rows = prompt_answer_rows(model, *zip(*facts.documents(), strict=True))
    text = neutral_passages(model, texts)
    before, loss_before = _asked(model, facts), text_loss(model, text)
    done = bar.step("tuning", len(seeds) * (settings.steps or 0))
    after, learned, loss = [], [], []
    for seed in seeds:
        tuned = tuned_copy(model, rows, replace(settings, seed=seed), lora_rank=lora_rank, bar=done)
        after.append(_asked(tuned, facts))
        learned.append(learned_share(tuned, rows))
        loss.append(text_loss(tuned, text))
    gained, right = {}, {}
    for asked in before:
        found = np.stack([one[asked] for one in after])  # [S, P, N, N]
        here = np.diagonal(found - before[asked], axis1=2, axis2=3)
        gained[asked] = here.transpose(0, 2, 1)
        right[asked] = (found.argmax(-1) == np.arange(found.shape[-1])).transpose(0, 2, 1).astype(float)
    return ReversalTuning(name, facts, tuple(seeds), gained, right, np.array(learned), loss_before, np.array(loss))


def _asked(model: HeadModel, facts: Fictions) -> dict[Asked, Float[np.ndarray, "P N N"]]:
    """Double-centred scores of every group, in both orders and every held-out phrasing."""
    found = {}
    for group in GROUPS:
        for order in ORDERS:
            tables = []
            for phrasing in facts.held[order]:
                prompts, answers = zip(*(facts.told(pair, order, phrasing) for pair in facts.of(group)), strict=True)
                tables.append(gains(answer_scores(model, list(prompts), list(answers))))
            found[group, order] = np.stack(tables)
    return found
