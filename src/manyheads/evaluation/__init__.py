"""Evaluation: random controls with their p- and q-values, metrics, and comparisons of methods over data and seeds.

The rooms above call these functions, and their results keep the values.
"""

from manyheads.evaluation.comparison import Comparison, compare
from manyheads.evaluation.controls import Control, matched_sets, p_value, q_values, random_sets
from manyheads.evaluation.metrics import auc, jaccard, log_probability, rank_correlation

__all__ = [
    "Comparison",
    "Control",
    "auc",
    "compare",
    "jaccard",
    "log_probability",
    "matched_sets",
    "p_value",
    "q_values",
    "random_sets",
    "rank_correlation",
]
