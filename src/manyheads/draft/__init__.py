"""Faster generation with unchanged output: draft heads, token trees, acceptance rules, decoding, and cheaper output heads."""

from manyheads.draft.boosting.chain import BoostedChain
from manyheads.draft.core.decode import Generation, Tally, generate, stream
from manyheads.draft.core.drafter import Drafter, DraftHeads, Stepwise
from manyheads.draft.core.growth import BestFirst, Chain, Fixed, Growth
from manyheads.draft.core.tree import Ranks, Tree
from manyheads.draft.core.trees import best_ranks, expected_tokens
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.chimera import Chimera
from manyheads.draft.drafters.clover import Clover
from manyheads.draft.drafters.draft_model import DraftModel
from manyheads.draft.drafters.eagle import Eagle
from manyheads.draft.drafters.hydra import Hydra
from manyheads.draft.drafters.medusa import Medusa
from manyheads.draft.drafters.prompt_lookup import PromptLookup
from manyheads.draft.drafters.together import CombinedDrafter
from manyheads.draft.files.exchange import export_hydra, export_medusa, import_hydra, import_medusa
from manyheads.draft.files.saving import load_drafter, save_drafter
from manyheads.draft.hidden_cot.model import HiddenCot
from manyheads.draft.multi_token.drafter import MultiTokenDrafter
from manyheads.draft.multi_token.model import MultiToken, train_multi_token
from manyheads.draft.output.flash_head import FlashHead
from manyheads.draft.training.corpus import Corpus, frequent, from_texts, own_texts, sampled_and_greedy, with_states
from manyheads.draft.training.heads import Recipe, TrainedHeads, rank_acceptance, train
from manyheads.draft.training.stopping import (
    AcceptanceHead,
    confidence,
    learn_acceptance,
    mixed_examples,
    observed_examples,
)

__all__ = [
    "AcceptanceHead",
    "BestFirst",
    "BoostedChain",
    "Chain",
    "Chimera",
    "Clover",
    "CombinedDrafter",
    "Corpus",
    "DraftHeads",
    "DraftModel",
    "DraftTrunk",
    "Drafter",
    "Eagle",
    "Fixed",
    "FlashHead",
    "Generation",
    "Growth",
    "HiddenCot",
    "Hydra",
    "Medusa",
    "MultiToken",
    "MultiTokenDrafter",
    "PromptLookup",
    "Ranks",
    "Recipe",
    "Stepwise",
    "Tally",
    "TrainedHeads",
    "Tree",
    "best_ranks",
    "confidence",
    "expected_tokens",
    "export_hydra",
    "export_medusa",
    "frequent",
    "from_texts",
    "generate",
    "import_hydra",
    "import_medusa",
    "learn_acceptance",
    "load_drafter",
    "mixed_examples",
    "observed_examples",
    "own_texts",
    "rank_acceptance",
    "sampled_and_greedy",
    "save_drafter",
    "stream",
    "train",
    "train_multi_token",
    "with_states",
]
