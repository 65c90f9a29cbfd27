"""What screening heads misses, beside ablating every head alone: `python benchmarks/screening.py [MODEL]`.

For each judge of the survey: ablations made, heads that exact ablation finds (one-sided t-test over examples, q <= .05 over
heads, and an effect of at least `SIZE` of the largest), how many of them screening did not ablate alone, and the largest such
effect as a share of the largest of all. Seconds are of the processor, of one thread.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from scipy import stats

import manyheads as mh
from manyheads.atlas.core.causal import ablation_effects
from manyheads.atlas.core.registry import behaviours
from manyheads.atlas.core.screening import screened_effects
from manyheads.errors import ManyheadsError
from manyheads.evaluation.controls import q_values
from manyheads.heads import HeadScores

SIZE = 0.02  # of the largest effect: what screening is asked to find


def main(model_name: str | None = None) -> None:
    torch.set_num_threads(1)
    model = mh.open_model(model_name)
    judges = {one.judge.name: one.judge for one in behaviours().values()}
    totals = np.zeros(6)
    print(
        f"{'judge':14} {'ablations':>12} {'seconds':>8} {'exact':>8} {'found':>6} {'missed':>7} {'largest missed':>15}"
    )
    for name, make in judges.items():
        try:
            judge = make(model, 1)
        except ManyheadsError as error:
            print(f"{name:14} left out: {error}")
            continue
        started = time.process_time()
        exact = ablation_effects(model, name, judge)
        between = time.process_time()
        screened = screened_effects(model, name, judge)
        seconds, seconds_exact = time.process_time() - between, between - started
        found, missed = matters(exact, judge.n), np.isnan(screened.values)
        effects = np.abs(exact.values)
        worst = float(effects[found & missed].max(initial=0) / effects.max())
        made = screened.meta["screening"]["ablations"]
        print(
            f"{name:14} {made:5} of {effects.size:3} {seconds:8.1f} {seconds_exact:8.1f} {found.sum():6} "
            f"{(found & missed).sum():7} {worst:15.3f}"
        )
        totals += (made, effects.size, seconds, seconds_exact, found.sum(), (found & missed).sum())
    made, size, seconds, seconds_exact, found_, missed_ = totals
    print(f"{'all':14} {made:5.0f} of {size:3.0f} {seconds:8.1f} {seconds_exact:8.1f} {found_:6.0f} {missed_:7.0f}")


def matters(exact: HeadScores, n: int) -> np.ndarray:
    """Heads whose loss is no chance (q <= .05 over heads) and of a size that screening is asked to find."""
    t = exact.values / np.maximum(exact.stderr, 1e-12)
    q = q_values(stats.t.sf(t, n - 1).ravel()).reshape(exact.shape)
    return (q <= 0.05) & (exact.values >= SIZE * np.abs(exact.values).max())


if __name__ == "__main__":
    main(*sys.argv[1:2])
