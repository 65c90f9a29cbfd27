"""What simple forecasts of a generated cohort score (#76), beside the last visit repeated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.pipelines.longitudinal import DATE, SUBJECT, score_longitudinal
from manyheads.forecast.pipelines.longitudinal_baselines import VALUES, generated_cohort, progression, repeated_visit

_CUT, _YEARS = 36.0, 6  # months of history, years of a cohort
Entry = Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]


def _entered(entry: Entry) -> Callable[[int, int], dict[str, float]]:
    """Half of the subjects are the others, wholly known; of the rest three years are forecast from three."""

    def run(subjects: int, seed: int) -> dict[str, float]:
        cohort = generated_cohort(subjects, seed, years=_YEARS)
        own, others = (cohort[cohort[SUBJECT] % 2 == k] for k in (0, 1))
        forecasts = entry(own[own[DATE] < _CUT], others)
        found = score_longitudinal(forecasts, own[own[DATE] >= _CUT], resamples=0)
        return {f"{row.target} {row.metric}": row.value for row in found.table.itertuples()}

    return run


_MONTHS = np.arange(_CUT, 12.0 * _YEARS + 3).tolist()
_CLAIMS = [
    Claim(
        f"a progression learned from other subjects has at most .9 of the error in {name} of the last visit",
        lambda v, name=name: v["progression", f"{name} MAE"] / v["last visit", f"{name} MAE"],  # type: ignore[misc]
        at_most=0.9,
    )
    for name in VALUES
]

register_experiment(
    Experiment(
        "tadpole",
        (76,),
        "2002.03419",
        "Does a learned progression forecast a cohort better than its last visit repeated?",
        datasets=lambda quick: {"generated cohort": 40 if quick else 400},
        methods={
            "last visit": lambda n, seed: _entered(lambda own, others: repeated_visit(own, _MONTHS))(n, seed),
            "progression": lambda n, seed: _entered(lambda own, others: progression(own, _MONTHS, others))(n, seed),
        },
        baseline="last visit",
        claims=(
            *_CLAIMS,
            Claim(
                "its mAUC is higher by .02",
                lambda v: v["progression", "diagnosis mAUC"] - v["last visit", "diagnosis mAUC"],
                at_least=0.02,
            ),
            Claim(
                "its intervals of ADAS13 cover half of the visits, within .1",
                lambda v: v["progression", "ADAS13 CPA"],
                at_most=0.1,
            ),
        ),
        lower=frozenset({f"{name} {metric}" for name in VALUES for metric in ("MAE", "WES", "CPA")}),
        room="forecast",
    )
)
