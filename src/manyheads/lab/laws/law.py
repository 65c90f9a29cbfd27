"""What a law says of a model, beside what was measured: one row of the table of `manyheads laws`.

A law predicts the sign of an effect. With mean m and standard error e over items, and p against a control in which there can be
no effect,

    holds          m - 2 e > 0 and p <= .05
    fails          m + 2 e < 0, or what would have to be absent is there
    not decided    neither, or the model does not do what the law speaks of; the row says why
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.evaluation import p_value, q_values
from manyheads.heads import mean_stderr
from manyheads.report import Reported

Answer = Literal["holds", "fails", "not decided"]
SURE = 0.05


@dataclass(frozen=True)
class LawRow:
    """One law on one set of items: an effect (in `unit`) with its standard error over `n` items, and the verdict.

    `control` is the mean effect where there can be none; `p` how rarely the control is as large; `says` puts it in words.
    """

    law: str
    number: int
    on: str
    effect: float
    stderr: float
    unit: str
    control: float
    p: float
    n: int
    answer: Answer
    says: str


@dataclass(frozen=True)
class Laws(Reported):
    """All laws a model was held to."""

    model: str
    rows: tuple[LawRow, ...]

    def to_frame(self) -> pd.DataFrame:
        """A row a law and set: the fields of `LawRow`, and `q` over all of them (Benjamini-Hochberg)."""
        frame = pd.DataFrame([asdict(row) for row in self.rows])
        return frame.assign(q=q_values(frame["p"].to_numpy(dtype=np.float64)))


def judged(mean: float, stderr: float, p: float) -> Answer:
    """The verdict on a predicted positive effect (formula above)."""
    if mean - 2 * stderr > 0 and p <= SURE:
        return "holds"
    return "fails" if mean + 2 * stderr < 0 else "not decided"


def effect_of(
    values: Sequence[float] | Float[np.ndarray, "N"], seed: int = 0, draws: int = 999
) -> tuple[float, float, float, float]:
    """Mean, standard error, the control's mean and p of paired differences: their signs are flipped at random.

    If there is no effect, each difference may as well have the other sign.
    """
    values = np.asarray(values, dtype=np.float64)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(draws, len(values)))
    null = (signs * values).mean(1)
    mean, stderr = map(float, mean_stderr(values))
    return mean, stderr, float(null.mean()), p_value(mean, null)
