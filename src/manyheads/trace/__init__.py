"""Explanations of an answer: attribution, patching, decomposition, circuits, sparse autoencoders."""

from manyheads.trace.circuits.acdc import Acdc, acdc, acdc_nodes
from manyheads.trace.circuits.attribution_patching import NodeScores, attribution_patching, task_attribution
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.circuits.codes import Codes, sae_codes
from manyheads.trace.circuits.discovery_roc import Roc, roc
from manyheads.trace.circuits.faithfulness import (
    Faithfulness,
    SizeCurve,
    Trial,
    completeness,
    faithfulness,
    minimality,
    size_curve,
)
from manyheads.trace.concepts.causalm import ConceptTexts, Forgetting, forget
from manyheads.trace.concepts.concept_effect import ConceptEffect, estimate_effect
from manyheads.trace.contextual.circuit import ContextualCircuit, contextual_circuit
from manyheads.trace.contextual.effects import HeadEffects, WordEffect, head_effects, token_effects, word_effects
from manyheads.trace.explanation import Explanation, explain
from manyheads.trace.positions.attention_score import AttentionScore, attention_score
from manyheads.trace.positions.composition import CompositionScores, composition_scores
from manyheads.trace.positions.logit_lens import LogitLens, read_states
from manyheads.trace.positions.patching_map import PositionMap, patching_map
from manyheads.trace.prompts.maps import cls_attention, prompt_attention, prompt_maps, rank_heads
from manyheads.trace.prompts.prompt_cam import PromptCAM, fit_prompt_cam
from manyheads.trace.regions.cutting import ImageRegions, TextRegions, grid_regions, superpixels, text_regions
from manyheads.trace.regions.insertion import (
    Classifier,
    Game,
    curves,
    importance,
    leave_one_out,
    mufidelity,
    single_regions,
)
from manyheads.trace.regions.lima import Ranking, Weights, rank_regions
from manyheads.trace.sae.attribution import attribute_feature, recursive_attribution
from manyheads.trace.sae.autoencoder import AttentionSae, SaeQuality
from manyheads.trace.sae.autoencoder import quality as sae_quality
from manyheads.trace.sae.features import FeatureReport, feature_cards, logit_effects, polysemanticity
from manyheads.trace.sae.files import export_sae_lens, import_sae_lens, load_sae, save_sae
from manyheads.trace.sae.training import SaeSettings, train_sae

__all__ = [
    "Acdc",
    "AttentionSae",
    "AttentionScore",
    "Circuit",
    "Classifier",
    "Codes",
    "CompositionScores",
    "ConceptEffect",
    "ConceptTexts",
    "ContextualCircuit",
    "Explanation",
    "Faithfulness",
    "FeatureReport",
    "Forgetting",
    "Game",
    "HeadEffects",
    "ImageRegions",
    "LogitLens",
    "NodeScores",
    "PositionMap",
    "PromptCAM",
    "Ranking",
    "Roc",
    "SaeQuality",
    "SaeSettings",
    "SizeCurve",
    "TextRegions",
    "Trial",
    "Weights",
    "WordEffect",
    "acdc",
    "acdc_nodes",
    "attention_score",
    "attribute_feature",
    "attribution_patching",
    "cls_attention",
    "completeness",
    "composition_scores",
    "contextual_circuit",
    "curves",
    "estimate_effect",
    "explain",
    "export_sae_lens",
    "faithfulness",
    "feature_cards",
    "fit_prompt_cam",
    "forget",
    "grid_regions",
    "head_effects",
    "import_sae_lens",
    "importance",
    "leave_one_out",
    "load_sae",
    "logit_effects",
    "minimality",
    "mufidelity",
    "patching_map",
    "polysemanticity",
    "prompt_attention",
    "prompt_maps",
    "rank_heads",
    "rank_regions",
    "read_states",
    "recursive_attribution",
    "roc",
    "sae_codes",
    "sae_quality",
    "save_sae",
    "single_regions",
    "size_curve",
    "superpixels",
    "task_attribution",
    "text_regions",
    "token_effects",
    "train_sae",
    "word_effects",
]
