"""What does a head do? Scores for every behaviour, in one survey, each with its causal check."""

from manyheads.atlas.arithmetic import arithmetic, key_heads, knockout
from manyheads.atlas.causal import ablation_effects, causal_check, repeats_judge, task_judge, text_judge
from manyheads.atlas.choice import choice, choice_classes, compress, label_mutations, questions
from manyheads.atlas.conflict_paths import conflict_flow, conflict_paths, conflict_prompts, pruning
from manyheads.atlas.copying import copying
from manyheads.atlas.delimiter import delimiter
from manyheads.atlas.diff import AtlasDiff, diff
from manyheads.atlas.duplicate_token import duplicate_token
from manyheads.atlas.emergence import emergence, emergence_of_scores, emergence_series, scaling_check, trace_circuit
from manyheads.atlas.fact_recall import fact_recall, topic_movers
from manyheads.atlas.families import BEHAVIOURS
from manyheads.atlas.first_token import first_token
from manyheads.atlas.gating import Gate, Schedule, contrastive_gating, gating
from manyheads.atlas.index_domain import index_domain
from manyheads.atlas.induction import induction
from manyheads.atlas.influence import influence, retrieval_heads, token_matched
from manyheads.atlas.influence_files import influence_files
from manyheads.atlas.ioi import ioi_classes, ioi_members
from manyheads.atlas.json_recall import JsonRecall
from manyheads.atlas.judges import make_judge
from manyheads.atlas.memory_context import conflicts, find_strength, memory_context
from manyheads.atlas.mlp_decomposition import mlp_decomposition
from manyheads.atlas.ngram import ngram, ngram_judge
from manyheads.atlas.ordinals import Circuit, ordinals
from manyheads.atlas.overconfidence import overconfidence
from manyheads.atlas.positional import positional
from manyheads.atlas.previous_token import previous_token
from manyheads.atlas.result import Agreement, Atlas, CausalCheck, PatternExample
from manyheads.atlas.retrieval import retrieval
from manyheads.atlas.retrieval_properties import retrieval_properties
from manyheads.atlas.reuse import circuit, overlap, repair, reuse
from manyheads.atlas.roles import HeadRoles, Role, roles, roles_frame
from manyheads.atlas.sahara import audit, sahara
from manyheads.atlas.ships import ships
from manyheads.atlas.stability import stability
from manyheads.atlas.successor import ordinal_classes, successor, successor_of_set
from manyheads.atlas.successor_arithmetic import successor_arithmetic
from manyheads.atlas.successor_features import successor_features
from manyheads.atlas.successor_sets import successor_set
from manyheads.atlas.survey import survey
from manyheads.atlas.vision import VisionHeads, vision_heads
from manyheads.atlas.vision_patterns import attention_patterns
from manyheads.atlas.vision_pruning import interactions, pruning_check, pruning_importance
from manyheads.atlas.vision_strength import PatchGrid, attention_strength, patch_grid
from manyheads.atlas.winning_cases import winning_cases, winning_cases_in_text
from manyheads.tasks.refusal_audit import refusal_requests

__all__ = [
    "BEHAVIOURS",
    "Agreement",
    "Atlas",
    "AtlasDiff",
    "CausalCheck",
    "Circuit",
    "Gate",
    "HeadRoles",
    "JsonRecall",
    "PatchGrid",
    "PatternExample",
    "Role",
    "Schedule",
    "VisionHeads",
    "ablation_effects",
    "arithmetic",
    "attention_patterns",
    "attention_strength",
    "audit",
    "causal_check",
    "choice",
    "choice_classes",
    "circuit",
    "compress",
    "conflict_flow",
    "conflict_paths",
    "conflict_prompts",
    "conflicts",
    "contrastive_gating",
    "copying",
    "delimiter",
    "diff",
    "duplicate_token",
    "emergence",
    "emergence_of_scores",
    "emergence_series",
    "fact_recall",
    "find_strength",
    "first_token",
    "gating",
    "index_domain",
    "induction",
    "influence",
    "influence_files",
    "interactions",
    "ioi_classes",
    "ioi_members",
    "key_heads",
    "knockout",
    "label_mutations",
    "make_judge",
    "memory_context",
    "mlp_decomposition",
    "ngram",
    "ngram_judge",
    "ordinal_classes",
    "ordinals",
    "overconfidence",
    "overlap",
    "patch_grid",
    "positional",
    "previous_token",
    "pruning",
    "pruning_check",
    "pruning_importance",
    "questions",
    "refusal_requests",
    "repair",
    "repeats_judge",
    "retrieval",
    "retrieval_heads",
    "retrieval_properties",
    "reuse",
    "roles",
    "roles_frame",
    "sahara",
    "scaling_check",
    "ships",
    "stability",
    "successor",
    "successor_arithmetic",
    "successor_features",
    "successor_of_set",
    "successor_set",
    "survey",
    "task_judge",
    "text_judge",
    "token_matched",
    "topic_movers",
    "trace_circuit",
    "vision_heads",
    "winning_cases",
    "winning_cases_in_text",
]
