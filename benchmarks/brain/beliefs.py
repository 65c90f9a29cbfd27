"""Seconds of filtering beside pyhgf 0.2.12 on one core, in turns in one run: one series, and many at once.

pip install pyhgf==0.2.12 (GPL; in an environment of its own), then: manyheads bench beliefs
pyhgf runs compiled; the compilation is timed apart and not in the figures. Many series run in pyhgf by jax.vmap.
"""

from __future__ import annotations

import os

os.environ.update(
    {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "OMP_NUM_THREADS": "1"}
)

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pyhgf
import torch
from jax.tree_util import tree_map
from pyhgf.model import HGF

from manyheads.brain.beliefs import filter_beliefs
from manyheads.brain.network import binary_beliefs, continuous_beliefs

ROUNDS = 9
MANY = (16, 256, 1024)


def interleaved(*calls: Callable[[], object]) -> np.ndarray:
    """Seconds [rounds, calls], each round in turn, after one that is not counted."""
    seconds = np.zeros((ROUNDS + 1, len(calls)))
    for i in range(ROUNDS + 1):
        for j, call in enumerate(calls):
            started = time.perf_counter()
            call()
            seconds[i, j] = time.perf_counter() - started
    return seconds[1:]


def compiled(values: np.ndarray, kind: str) -> Callable[[np.ndarray], object]:
    """The filter of pyhgf, mapped over series [B, T] and compiled."""
    model = HGF(n_levels=3, model_type=kind, update_type="unbounded")
    start = model.attributes
    step = model.create_belief_propagation_fn().scan_fn
    seen, gaps = (np.ones(len(values), dtype=int),), np.ones(len(values))

    def one(u: object) -> object:
        return jax.lax.scan(step, start, ((u[:, None],), seen, gaps, None))[1]  # type: ignore[index]

    mapped = jax.jit(jax.vmap(one))
    return lambda rows: tree_map(lambda x: x.block_until_ready(), mapped(rows))


def main() -> None:
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    print(
        f"seconds, median of {ROUNDS} rounds in turns; ratio: pyhgf / ours, with its quartiles (above 1: ours is faster)"
    )
    for kind, file in (("binary", "binary_input"), ("continuous", "usdchf")):
        compare(kind, np.loadtxt(Path(pyhgf.__file__).parent / "data" / f"{file}.txt"))


def compare(kind: str, values: np.ndarray) -> None:
    ours = binary_beliefs(3, update="unbounded") if kind == "binary" else continuous_beliefs(3, update="unbounded")
    started = time.perf_counter()
    theirs = HGF(n_levels=3, model_type=kind, update_type="unbounded").input_data(values)
    first = time.perf_counter() - started
    show(f"{kind}, 1 series of {len(values)}", lambda: theirs.input_data(values), lambda: filter_beliefs(ours, values))
    print(f"    pyhgf's first call, with its compilation: {first:.1f} s")
    filtered = compiled(values, kind)
    draw = np.random.default_rng(0)
    for many in MANY:  # pyhgf compiles for each size, in the round that is not counted
        if kind == "binary":
            rows = draw.integers(0, 2, (many, len(values))).astype(float)
        else:
            rows = values[0] + (draw.normal(size=(many, len(values))) * 0.004).cumsum(1)
        show(f"{kind}, {many} series", partial(filtered, rows), partial(filter_beliefs, ours, rows))


def show(name: str, theirs: Callable[[], object], ours: Callable[[], object]) -> None:
    seconds = interleaved(theirs, ours)
    low, middle, high = np.percentile(seconds[:, 0] / seconds[:, 1], (25, 50, 75))
    them, us = np.median(seconds, 0)
    print(f"{name:32} pyhgf {them:8.4f}  ours {us:8.4f}  ratio {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
