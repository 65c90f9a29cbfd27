"""What does a head do? Scores for every behaviour, in one survey, each with its causal check."""

from manyheads.atlas.circuits.arithmetic import arithmetic, key_heads, knockout
from manyheads.atlas.circuits.emergence import (
    emergence,
    emergence_of_scores,
    emergence_series,
    scaling_check,
    trace_circuit,
)
from manyheads.atlas.circuits.gating import Gate, contrastive_gating, gating
from manyheads.atlas.circuits.ioi import ioi_classes, ioi_members
from manyheads.atlas.circuits.repair import repair
from manyheads.atlas.circuits.reuse import overlap, reuse, task_circuit
from manyheads.atlas.core.causal import ablation_effects, causal_check
from manyheads.atlas.core.judges import repeats_judge, task_judge, text_judge
from manyheads.atlas.core.registry import behaviours
from manyheads.atlas.core.result import Agreement, Atlas, CausalCheck, PatternExample
from manyheads.atlas.core.roles import HeadRoles, Role, roles, roles_frame
from manyheads.atlas.facts.conflict_paths import conflict_flow, conflict_paths, conflict_prompts, pruning
from manyheads.atlas.facts.memory_context import conflicts, find_strength, memory_context
from manyheads.atlas.facts.mlp_decomposition import mlp_decomposition
from manyheads.atlas.facts.overconfidence import overconfidence
from manyheads.atlas.facts.recall import fact_recall, topic_movers
from manyheads.atlas.multiple_choice.classes import choice_classes
from manyheads.atlas.multiple_choice.effects import choice
from manyheads.atlas.multiple_choice.labels import label_mutations
from manyheads.atlas.multiple_choice.questions import questions
from manyheads.atlas.multiple_choice.subspaces import compress
from manyheads.atlas.patterns.copying import copying
from manyheads.atlas.patterns.delimiter import delimiter
from manyheads.atlas.patterns.duplicate_token import duplicate_token
from manyheads.atlas.patterns.first_token import first_token
from manyheads.atlas.patterns.induction import induction
from manyheads.atlas.patterns.ngram import ngram, ngram_judge
from manyheads.atlas.patterns.positional import positional
from manyheads.atlas.patterns.previous_token import previous_token
from manyheads.atlas.retrieval_heads.influence import influence, retrieval_heads, token_matched
from manyheads.atlas.retrieval_heads.influence_files import influence_files
from manyheads.atlas.retrieval_heads.json_recall import JsonRecall
from manyheads.atlas.retrieval_heads.properties import retrieval_properties
from manyheads.atlas.retrieval_heads.scores import retrieval
from manyheads.atlas.safety.sahara import audit, sahara
from manyheads.atlas.safety.ships import ships
from manyheads.atlas.successor_heads.arithmetic import successor_arithmetic
from manyheads.atlas.successor_heads.features import successor_features
from manyheads.atlas.successor_heads.index_domain import index_domain
from manyheads.atlas.successor_heads.ordinals import OrdinalCircuit, ordinals
from manyheads.atlas.successor_heads.scores import ordinal_classes, successor, successor_of_set
from manyheads.atlas.successor_heads.sets import successor_set
from manyheads.atlas.successor_heads.winning_cases import winning_cases, winning_cases_in_text
from manyheads.atlas.surveys.diff import AtlasDiff, diff
from manyheads.atlas.surveys.run import survey
from manyheads.atlas.surveys.stability import stability
from manyheads.atlas.vision.heads import VisionHeads, vision_heads
from manyheads.atlas.vision.patterns import attention_patterns
from manyheads.atlas.vision.pruning import interactions, pruning_check, pruning_importance
from manyheads.atlas.vision.strength import PatchGrid, attention_strength, patch_grid
from manyheads.tasks.refusal_audit import refusal_requests

__all__ = [
    "Agreement",
    "Atlas",
    "AtlasDiff",
    "CausalCheck",
    "Gate",
    "HeadRoles",
    "JsonRecall",
    "OrdinalCircuit",
    "PatchGrid",
    "PatternExample",
    "Role",
    "VisionHeads",
    "ablation_effects",
    "arithmetic",
    "attention_patterns",
    "attention_strength",
    "audit",
    "behaviours",
    "causal_check",
    "choice",
    "choice_classes",
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
    "task_circuit",
    "task_judge",
    "text_judge",
    "token_matched",
    "topic_movers",
    "trace_circuit",
    "vision_heads",
    "winning_cases",
    "winning_cases_in_text",
]
