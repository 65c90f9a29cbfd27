"""Evaluation: random controls with their p- and q-values, metrics, comparisons over data and seeds, experiments with verdicts.

The rooms above call these functions, and their results keep the values.
"""

from manyheads.evaluation.calibration import Calibration, calibration, fit_temperature
from manyheads.evaluation.comparison import Comparison, compare
from manyheads.evaluation.controls import Control, matched_sets, p_value, q_values, random_sets
from manyheads.evaluation.experiment import (
    Claim,
    Experiment,
    Together,
    Tried,
    Verdict,
    experiment,
    experiments,
    register_experiment,
)
from manyheads.evaluation.metrics import auc, jaccard, log_probability, rank_correlation

__all__ = [
    "Calibration",
    "Claim",
    "Comparison",
    "Control",
    "Experiment",
    "Together",
    "Tried",
    "Verdict",
    "auc",
    "calibration",
    "compare",
    "experiment",
    "experiments",
    "fit_temperature",
    "jaccard",
    "log_probability",
    "matched_sets",
    "p_value",
    "q_values",
    "random_sets",
    "rank_correlation",
    "register_experiment",
]
