"""Say more per pass, losing nothing: draft heads, trees, acceptance, decoding; and heads that make the last product cheaper."""

from manyheads.draft.chimera import Chimera
from manyheads.draft.clover import Clover
from manyheads.draft.corpus import Corpus, frequent, from_texts, own_words, sampled_and_greedy, with_hidden
from manyheads.draft.decode import Generation, Tally, generate, stream
from manyheads.draft.draft_model import DraftModel
from manyheads.draft.drafter import Drafter, DraftHeads, Stepwise
from manyheads.draft.eagle import Eagle
from manyheads.draft.exchange import export_hydra, export_medusa, import_hydra, import_medusa
from manyheads.draft.flash_head import FlashHead
from manyheads.draft.growth import Best, Chain, Fixed, Growth
from manyheads.draft.hidden_cot import HiddenCot
from manyheads.draft.hydra import Hydra
from manyheads.draft.medusa import Medusa
from manyheads.draft.multi_token import MultiToken, train_multi_token
from manyheads.draft.multi_token_drafter import MultiTokenDrafter
from manyheads.draft.prompt_lookup import PromptLookup
from manyheads.draft.saving import load_drafter, save_drafter
from manyheads.draft.stopping import AcceptanceHead, confidence, learn_acceptance, mixed_examples, observed_examples
from manyheads.draft.together import Together
from manyheads.draft.training import Learned, Recipe, rank_acceptance, train
from manyheads.draft.tree import Ranks, Tree
from manyheads.draft.trees import best_ranks, expected_tokens
from manyheads.draft.trunk import Trunk

__all__ = [
    "AcceptanceHead",
    "Best",
    "Chain",
    "Chimera",
    "Clover",
    "Corpus",
    "DraftHeads",
    "DraftModel",
    "Drafter",
    "Eagle",
    "Fixed",
    "FlashHead",
    "Generation",
    "Growth",
    "HiddenCot",
    "Hydra",
    "Learned",
    "Medusa",
    "MultiToken",
    "MultiTokenDrafter",
    "PromptLookup",
    "Ranks",
    "Recipe",
    "Stepwise",
    "Tally",
    "Together",
    "Tree",
    "Trunk",
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
    "own_words",
    "rank_acceptance",
    "sampled_and_greedy",
    "save_drafter",
    "stream",
    "train",
    "train_multi_token",
    "with_hidden",
]
