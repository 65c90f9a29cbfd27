"""One predictor for another task (#106), on designs whose truth is known. Claims and bounds are the sheet's.

The base learned the accuracy of 900 designs of family A. The task is another, of family B, and depends on cost:

    y = (.10 + 1.2 (accuracy - least accuracy)) (log10(F + 1) + 1) + N(0, .002)

with 300 cheap labels .7 y - .02 + N(0, .006), 20 true ones, and 200 designs to judge. Errors are in points (hundredths).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial

import numpy as np

from manyheads.evaluation import Claim, Experiment, rank_correlation, register_experiment
from manyheads.judge.networks.aio_p import ADAPTER, TWENTY, Standard, for_task, learned_adapter
from manyheads.judge.networks.design_benchmark import costs, designs
from manyheads.judge.networks.gennape import GRAPHS, GraphRegressor
from manyheads.judge.networks.graphs import NetworkGraph

_RAW, _STAND, _FLOPS, _TUNED = "base, its own unit", "base, stand", "base, stand_flops", "base, stand_flops, 20 labels"
_ADAPTER, _BOTH = "adapter, stand_flops", "adapter, stand_flops, 20 labels"
Rows = tuple[list[NetworkGraph], np.ndarray]  # designs, and a label each


def cost_task(seed: int) -> tuple[Rows, Rows, Rows]:
    """Designs with cheap labels, with true ones, and those that judge."""
    graphs, accuracy = designs("B", 520, seed)
    draw = np.random.default_rng([7, seed])
    y = (0.10 + 1.2 * (accuracy - accuracy.min())) * (np.log10(costs(graphs) + 1) + 1) + draw.normal(0, 0.002, 520)
    cheap = 0.7 * y[:300] - 0.02 + draw.normal(0, 0.006, 300)
    return (graphs[:300], cheap), (graphs[300:320], y[300:320]), (graphs[320:], y[320:])


@cache
def _base(n: int, seed: int) -> GraphRegressor:
    return GraphRegressor(replace(GRAPHS, seed=seed)).fit(*designs("A", n, seed))


def _run(method: str, n: int, seed: int) -> Mapping[str, float]:
    base = _base(n, seed)
    (cheap, cheap_y), (known, known_y), (judged, y) = cost_task(seed)
    if method == _RAW:
        told = base.predict(judged)
    elif method in (_ADAPTER, _BOTH):
        adapter = learned_adapter(base, cheap, cheap_y, settings=replace(ADAPTER, seed=seed))
        told = for_task([adapter], known, known_y, tune=method == _BOTH).predict(judged)
    else:
        unit = Standard.of(known, known_y, flops=method != _STAND)
        if method == _TUNED:
            tuned = base.tuned(known, unit.scaled(known, known_y), replace(TWENTY, seed=seed))
            told = unit.back(judged, tuned.predict(judged))
        else:
            told = unit.back(judged, base.standardised(judged))
    return {"error": 100 * float(np.abs(told - y).mean()), "rank correlation": rank_correlation(told, y)}


register_experiment(
    Experiment(
        "aio-p",
        (106,),
        "2211.17228",
        "Can a predictor of accuracy serve another task with cheap labels and twenty true ones?",
        datasets=lambda quick: {"a task of cost": 300 if quick else 900},
        methods={name: partial(_run, name) for name in (_TUNED, _RAW, _STAND, _FLOPS, _ADAPTER, _BOTH)},
        baseline=_TUNED,
        claims=(
            Claim("in the unit of the first task the error is 30 points", lambda v: v[_RAW, "error"], at_least=30.0),
            Claim("standardised by 20 labels it is 2.5", lambda v: v[_STAND, "error"], at_most=2.5),
            Claim("with FLOPs it is .92 of that", lambda v: v[_FLOPS, "error"] / v[_STAND, "error"], at_most=0.92),
            Claim("with an adapter it is 1.3 points", lambda v: v[_ADAPTER, "error"], at_most=1.3),
            Claim("and with 20 labels learned too", lambda v: v[_BOTH, "error"], at_most=1.3),
            Claim(
                "the order is told by .85",
                lambda v: min(v[_ADAPTER, "rank correlation"], v[_BOTH, "rank correlation"]),
                at_least=0.85,
            ),
            Claim(
                "the error is .9 of that of a base that learned the 20 labels without an adapter",
                lambda v: v[_ADAPTER, "error"] / v[_TUNED, "error"],
                at_most=0.9,
            ),
        ),
        minutes=2.0,
        lower=frozenset({"error"}),
        room="judge",
    )
)
