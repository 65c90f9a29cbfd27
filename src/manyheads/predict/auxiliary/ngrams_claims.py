"""ERNIE-Gram (#92), its claims: is an n-gram known better as one thing, and does a generator help?

Planted: sixty tokens, and texts whose topic says which two n-grams may stand in them. Prose: what comes with Python, in its
commonest words. How often a masked n-gram of held-out texts is named is measured behind masks, for every way of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import BertConfig, BertModel

from manyheads.evaluation import Claim, Experiment, auc, register_experiment
from manyheads.predict.auxiliary.ngrams import Gram, MaskedNgrams, ReplacedNgrams, ngram_lexicon
from manyheads.tasks.texts import bundled_prose
from manyheads.training import ADAM


@dataclass(frozen=True)
class _Texts:
    rows: list[list[int]]
    vocabulary: int  # tokens; the mask is one more
    planted: set[Gram]
    steps: int


def _planted(seed: int, steps: int) -> _Texts:
    """60 tokens; every text begins with one of 10 topics, each with two n-grams of its own, strewn among other tokens."""
    draw = torch.Generator().manual_seed(17)
    tokens = (20 + torch.randperm(40, generator=draw)).tolist()
    grams = [tuple(tokens[2 * i : 2 * i + 2 + i % 2]) for i in range(19)] + [(tokens[38], tokens[0])]
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(3000):
        topic = int(torch.randint(10, (1,), generator=draw))
        row = [topic]
        for kind in torch.rand(6, generator=draw).tolist():
            row += grams[2 * topic + int(kind < 0.25)] if kind < 0.5 else [10 + int(20 * kind) % 10]
        rows.append(row)
    return _Texts(rows, 60, set(grams), steps)


def _prose(seed: int, steps: int) -> _Texts:
    """The prose that comes with Python, in words: the 1,500 commonest, and one for all others."""
    words = [passage.lower().split() for passage in bundled_prose()]
    common = [word for word, _ in Counter(word for row in words for word in row).most_common(1499)]
    number = {word: i + 1 for i, word in enumerate(common)}
    flat = [number.get(word, 0) for row in words for word in row]
    rows = [flat[i : i + 24] for i in range(0, len(flat) - 24, 24)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return _Texts([rows[i] for i in order], 1500, set(), steps)


def _encoder(vocabulary: int, width: int, seed: int) -> BertModel:
    config = BertConfig(
        vocab_size=vocabulary + 1, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config, add_pooling_layer=False)


def _tried(
    *, whole: bool = True, generator: bool = False
) -> Callable[[Callable[[int], _Texts], int], dict[str, float]]:
    def run(make: Callable[[int], _Texts], seed: int) -> dict[str, float]:
        data = make(seed)
        cut = len(data.rows) * 9 // 10
        train, test = data.rows[:cut], data.rows[cut:]
        lexicon = ngram_lexicon(train, 400)
        encoder = _encoder(data.vocabulary, 64, seed)
        heads = MaskedNgrams(encoder, lexicon, mask_id=data.vocabulary, vocabulary=data.vocabulary, seed=seed)
        settings = replace(ADAM, steps=data.steps, rows=64, rate=1e-3, warmup=100, decay=0.5, clip=1.0, seed=seed)
        out = {}
        if generator:
            both = ReplacedNgrams(heads, _encoder(data.vocabulary, 32, seed + 100), seed=seed)
            both.fit(train, settings)
            labels, logits = both.eval().detection(test, seed)
            out = {"detection AUC": auc(logits, labels == 1), "share replaced": float(labels.mean())}
        else:
            heads.fit(train, settings, whole=whole)
        found = heads.eval().accuracy(test, whole=whole, seed=seed)
        names = {"single tokens": 1, "bigrams": 2, "trigrams": 3}
        out |= {name: found.get(n, float("nan")) for name, n in names.items()}
        if data.planted:
            out["recall"] = len(data.planted & set(lexicon)) / len(data.planted)
        return out

    return run


def _beyond(way: str, other: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    def value(values: Mapping[tuple[str, str], float]) -> float:
        return float(np.nanmean([values[way, name] - values[other, name] for name in ("bigrams", "trigrams")]))

    return value


register_experiment(
    Experiment(
        "ngrams",
        (92,),
        "2010.12148",
        "Is an n-gram predicted better as one thing than token by token?",
        datasets=lambda quick: {
            "planted": lambda seed: _planted(seed, 60 if quick else 1500),
            "prose": lambda seed: _prose(seed, 60 if quick else 800),
        },
        methods={
            "a mask a token": _tried(whole=False),
            "one mask": _tried(),
            "with a generator": _tried(generator=True),
        },
        baseline="a mask a token",
        claims=(
            Claim(
                "planted n-grams are in the lexicon",
                lambda v: v["one mask", "recall"],
                at_least=0.95,
                on="planted",
            ),
            Claim(
                "planted n-grams are named 10 points more often",
                _beyond("one mask", "a mask a token"),
                at_least=0.1,
                on="planted",
            ),
            Claim(
                "n-grams of real prose are named more often",
                _beyond("one mask", "a mask a token"),
                at_least=0.0,
                on="prose",
            ),
            Claim(
                "with a generator n-grams are named more often", _beyond("with a generator", "one mask"), at_least=0.0
            ),
            Claim("what was replaced is detected", lambda v: v["with a generator", "detection AUC"], at_least=0.75),
        ),
        minutes=10,
    )
)
