"""What does a head do? Scores for every behaviour, in one survey, each with its causal check."""

from manyheads.atlas.causal import causal_check, repeats_judge, task_judge
from manyheads.atlas.copying import copying
from manyheads.atlas.duplicate_token import duplicate_token
from manyheads.atlas.induction import induction
from manyheads.atlas.previous_token import previous_token
from manyheads.atlas.result import Atlas, CausalCheck, PatternExample
from manyheads.atlas.retrieval import retrieval
from manyheads.atlas.successor import ordinal_classes, successor, successor_of_set
from manyheads.atlas.survey import BEHAVIOURS, survey

__all__ = [
    "BEHAVIOURS",
    "Atlas",
    "CausalCheck",
    "PatternExample",
    "causal_check",
    "copying",
    "duplicate_token",
    "induction",
    "ordinal_classes",
    "previous_token",
    "repeats_judge",
    "retrieval",
    "successor",
    "successor_of_set",
    "survey",
    "task_judge",
]
