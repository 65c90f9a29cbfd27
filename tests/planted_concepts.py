"""A small world of texts: a word of concept C, which causes the label, one of C', which only goes along with it, fillers."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

import manyheads as mh
from manyheads.trace.concepts.causalm import TRAINING, ConceptTexts, Forgetting, forget

PAD, CLS, MASK, WORDS, FILLERS, LENGTH = 0, 1, 2, 5, 24, 14
C, OTHER = 3, 3 + 2 * WORDS  # first words of the two concepts: class 0, then class 1
FIRST_FILLER = OTHER + 2 * WORDS
VOCABULARY = FIRST_FILLER + FILLERS


@dataclass(frozen=True)
class World:
    texts: ConceptTexts
    labels: torch.Tensor
    concept_changed: torch.Tensor
    control_changed: torch.Tensor


def world(n, seed=0, together=0.9):
    """Texts whose label is C; C' agrees with it in a share `together`. Fillers come in pairs, so that masks can be filled."""
    rng = np.random.default_rng(seed)
    concept = rng.integers(2, size=n)
    control = np.where(rng.random(n) < together, concept, 1 - concept)
    first = rng.integers(FILLERS // 2, size=(n, LENGTH // 2))
    ids = np.stack([FIRST_FILLER + 2 * first, FIRST_FILLER + 2 * first + 1], -1).reshape(n, LENGTH)
    ids[:, 0] = CLS
    places = np.stack([1 + rng.permutation(LENGTH - 1)[:2] for _ in range(n)])
    rows, word = np.arange(n), rng.integers(WORDS, size=(2, n))
    ids[rows, places[:, 0]] = C + WORDS * concept + word[0]
    ids[rows, places[:, 1]] = OTHER + WORDS * control + word[1]
    changed = [ids.copy(), ids.copy()]
    changed[0][rows, places[:, 0]] = C + WORDS * (1 - concept) + word[0]
    changed[1][rows, places[:, 1]] = OTHER + WORDS * (1 - control) + word[1]
    ids, *changed = (torch.from_numpy(some) for some in (ids, *changed))
    texts = ConceptTexts(ids, torch.ones_like(ids), torch.from_numpy(concept), torch.from_numpy(control))
    return World(texts, torch.from_numpy(concept), *changed)


@lru_cache
def original(seed=0, steps=600):
    """A small BERT that has learned to fill masks in this world."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    plain = mh.open_model(BertForMaskedLM(config).eval())
    settings = replace(TRAINING, steps=steps, rows=32, rate=2e-3, warmup=max(1, steps // 20), seed=seed)
    how = Forgetting(adversary=0.0, control=0.0, training=settings)
    return forget(plain, world(4000, seed=11).texts, how, mask_id=MASK)
