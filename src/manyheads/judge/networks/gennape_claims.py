"""Does a graph tell what a network would reach (#104)? On designs whose truth is known, and on networks that were trained.

**Designs** (`design_benchmark`): 900 of family A to learn from, 300 each of A, B and C to judge; 50 of B to go on with. Claims
and bounds are the sheet's. **Digits** (`small_networks`): 150 networks trained on handwritten digits; a part of two families
teaches, the rest of them and the third family are judged, and which family is the third turns with the seed. There the claims,
written before a figure was seen, are that the order is told better than by the number of parameters, in the families and in the
third.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from manyheads.evaluation import Claim, Experiment, rank_correlation, register_experiment
from manyheads.judge.networks.design_benchmark import costs, designs
from manyheads.judge.networks.gennape import (
    FEW,
    GRAPHS,
    ClusteredHeads,
    GraphEncoder,
    GraphRegressor,
    contrastive_encoder,
)
from manyheads.judge.networks.graphs import NetworkGraph
from manyheads.judge.networks.small_networks import KINDS, digits_networks

_KNN, _RIDGE, _COST, _SCRATCH = "k-GNN", "counts of operations, ridge", "FLOPs", "k-GNN on the 50 alone"
_CONTRAST, _RANDOM = "contrastive, clusters", "random encoder, clusters"


def _designed(method: str, n: int, seed: int) -> Mapping[str, float]:
    graphs, labels = designs("A", n + 300, seed)
    known, y, judged, truth = graphs[:n], labels[:n], graphs[n:], labels[n:]
    settings = replace(GRAPHS, seed=seed)
    if method == _COST:
        return {"in the family": rank_correlation(costs(judged), truth)}
    if method == _RIDGE:
        return {"in the family": rank_correlation(_ridge(known, y, judged), truth)}
    if method == _SCRATCH:
        few, few_y, b, b_y = _fifty(seed)
        alone = GraphRegressor(replace(FEW, seed=seed)).fit(few, few_y)
        return {"B, with 50 labels": rank_correlation(alone.predict(b), b_y)}
    if method in (_CONTRAST, _RANDOM):
        encoder = contrastive_encoder(known, settings) if method == _CONTRAST else GraphEncoder(seed)
        heads = ClusteredHeads(encoder, settings=settings).fit(known, y)
        return {"in the family": rank_correlation(heads.predict(judged), truth)} | _others(heads, seed)
    fitted = GraphRegressor(settings).fit(known, y)
    few, few_y, b, b_y = _fifty(seed)
    tuned = fitted.tuned(few, few_y, replace(FEW, seed=seed))
    return {
        "in the family": rank_correlation(fitted.predict(judged), truth),
        "B, with 50 labels": rank_correlation(tuned.predict(b), b_y),
    } | _others(fitted, seed)


def _others(fitted: GraphRegressor | ClusteredHeads, seed: int) -> dict[str, float]:
    found = {}
    for family in ("B", "C"):
        graphs, truth = designs(family, 300, seed)
        found[f"{family}, no labels"] = rank_correlation(fitted.predict(graphs), truth)
    return found


def _fifty(seed: int) -> tuple[list[NetworkGraph], np.ndarray, list[NetworkGraph], np.ndarray]:
    graphs, truth = designs("B", 350, seed)
    return graphs[300:], truth[300:], graphs[:300], truth[:300]


def _ridge(known: list[NetworkGraph], y: np.ndarray, judged: list[NetworkGraph]) -> np.ndarray:
    from sklearn.linear_model import Ridge

    rows = [np.stack([one.counts().numpy() for one in graphs]) for graphs in (known, judged)]
    found: np.ndarray = Ridge().fit(rows[0], y).predict(rows[1])
    return found


def _trained(method: str, _: None, seed: int) -> Mapping[str, float]:
    found = digits_networks()
    third = KINDS[seed % len(KINDS)]
    own = np.flatnonzero(found.families != third)
    order = np.random.default_rng(seed).permutation(own)
    known, judged, other = order[:70], order[70:], np.flatnonzero(found.families == third)
    if method in found.proxies:
        told = found.proxies[method]
    elif method == _RIDGE:
        told = _ridge([found.graphs[i] for i in known], found.accuracy[known], found.graphs)
    else:
        fitted = GraphRegressor(replace(GRAPHS, seed=seed)).fit([found.graphs[i] for i in known], found.accuracy[known])
        told = fitted.predict(found.graphs)
    return {
        "in the families": rank_correlation(told[judged], found.accuracy[judged]),
        "the third family": rank_correlation(told[other], found.accuracy[other]),
    }


register_experiment(
    Experiment(
        "gennape",
        (104,),
        "2211.17226",
        "Does the graph of a design tell what it would reach, in its family and in others?",
        datasets=lambda quick: {"designs": 300 if quick else 900},
        methods={name: partial(_designed, name) for name in (_RIDGE, _COST, _KNN, _SCRATCH, _CONTRAST, _RANDOM)},
        baseline=_RIDGE,
        claims=(
            Claim("rank correlation in the family", lambda v: v[_KNN, "in the family"], at_least=0.90),
            Claim(
                "above a ridge on counts of operations by .2",
                lambda v: v[_KNN, "in the family"] - v[_RIDGE, "in the family"],
                at_least=0.2,
            ),
            Claim("in family B without labels", lambda v: v[_KNN, "B, no labels"], at_least=0.70),
            Claim("in family C without labels", lambda v: v[_KNN, "C, no labels"], at_least=0.60),
            Claim("in family B with 50 labels", lambda v: v[_KNN, "B, with 50 labels"], at_least=0.82),
            Claim(
                "above what these 50 teach alone by .05",
                lambda v: v[_KNN, "B, with 50 labels"] - v[_SCRATCH, "B, with 50 labels"],
                at_least=0.05,
            ),
            Claim(
                "a contrastive encoder is above a random one by .03, with the same heads",
                lambda v: v[_CONTRAST, "in the family"] - v[_RANDOM, "in the family"],
                at_least=0.03,
            ),
        ),
        minutes=3.0,
        room="judge",
    )
)
register_experiment(
    Experiment(
        "gennape-digits",
        (104,),
        "2211.17226",
        "Does the graph of a network tell what it reaches on digits, before it is trained?",
        datasets=lambda quick: {"150 networks": None},
        methods={
            name: partial(_trained, name) for name in ("parameters", "GFLOPs", "gradient norm", "synflow", _RIDGE, _KNN)
        },
        baseline="parameters",
        claims=(
            Claim(
                "in the families it learned from it is above the number of parameters by .1",
                lambda v: v[_KNN, "in the families"] - v["parameters", "in the families"],
                at_least=0.1,
            ),
            Claim(
                "in a third family it is not below it",
                lambda v: v[_KNN, "the third family"] - v["parameters", "the third family"],
                at_least=0.0,
            ),
        ),
        minutes=1.0,
        room="judge",
    )
)
