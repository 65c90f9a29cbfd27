"""What does a head do? Scores for every behaviour, in one survey, each with its causal check.

    behaviours      `induction(model)` and the others below: HeadScores, or a dictionary of them by name
    survey          all of them at once, checked: an `Atlas`; `diff` compares two, `roles` says what each head does
    causal_check    one claim against random heads of the same layers, on a judge

What goes further stands in the folders: `circuits`, `facts`, `multiple_choice`, `retrieval_heads`, `safety`, `successor_heads`,
and `vision`.
"""

from manyheads.atlas.circuits.arithmetic import arithmetic
from manyheads.atlas.circuits.ioi import ioi_classes
from manyheads.atlas.core.causal import ablation_effects, causal_check
from manyheads.atlas.core.judges import repeats_judge, task_judge, text_judge
from manyheads.atlas.core.registry import behaviours, register
from manyheads.atlas.core.result import Atlas, CausalCheck
from manyheads.atlas.core.roles import roles, roles_frame
from manyheads.atlas.facts.memory_context import memory_context
from manyheads.atlas.facts.recall import fact_recall
from manyheads.atlas.multiple_choice.effects import choice
from manyheads.atlas.patterns.copying import copying
from manyheads.atlas.patterns.delimiter import delimiter
from manyheads.atlas.patterns.duplicate_token import duplicate_token
from manyheads.atlas.patterns.first_token import first_token
from manyheads.atlas.patterns.induction import induction
from manyheads.atlas.patterns.ngram import ngram
from manyheads.atlas.patterns.positional import positional
from manyheads.atlas.patterns.previous_token import previous_token
from manyheads.atlas.retrieval_heads.scores import retrieval
from manyheads.atlas.safety.ships import ships
from manyheads.atlas.successor_heads.scores import successor
from manyheads.atlas.surveys.diff import AtlasDiff, diff
from manyheads.atlas.surveys.run import survey

__all__ = [
    "Atlas",
    "AtlasDiff",
    "CausalCheck",
    "ablation_effects",
    "arithmetic",
    "behaviours",
    "causal_check",
    "choice",
    "copying",
    "delimiter",
    "diff",
    "duplicate_token",
    "fact_recall",
    "first_token",
    "induction",
    "ioi_classes",
    "memory_context",
    "ngram",
    "positional",
    "previous_token",
    "register",
    "repeats_judge",
    "retrieval",
    "roles",
    "roles_frame",
    "ships",
    "successor",
    "survey",
    "task_judge",
    "text_judge",
]
