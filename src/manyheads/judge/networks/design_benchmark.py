"""A benchmark of designs whose truth is known (#104, #106): three families, and the accuracy that a formula gives each design.

    s      = .25 log2(c / 16) + sum over blocks of [ .6 min(w / c, 1) + (.4 if hw > 16 else -.3) (k - 1) / 6
             + .35 skip (b + 1) / nb + attention (.7 if skip else -.4) (1 if hw < 32 else .3) ] / sqrt(nb)
    label  = .80 + .14 sigmoid(1.8 (s - 1.3)) + N(0, .001)

c is the width of the stem, w and k those of block b of nb, hw its height. What a block is worth depends on where it stands and on
what stands beside it, so that counting operations is not enough. The benchmark is ours; no network is trained.

    A    conv(c, w, k), batchnorm, relu, conv(w, c, 1)
    B    conv(c, w, k), relu beside depthwise(1, 3 or 5), concat, conv 1x1
    C    branches conv(c, w / 2, 1, 3 or 5), batchnorm, each kept with .8 (none: a 3x3 pool), concat, conv 1x1; k counts as 3,
         and s gains .08 branches / nb a block
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from manyheads.inputs import check_choice, check_integer
from manyheads.judge.networks.graphs import GraphMaker, NetworkGraph

FAMILIES = ("A", "B", "C")
MOST = 30  # nodes from which on no block is added


def design(family: str, draw: np.random.Generator) -> tuple[NetworkGraph, float]:
    """A design of a family, and its label."""
    check_choice(family, "family", FAMILIES)
    made, hw = GraphMaker(family), 32.0
    c = int(draw.choice([16, 24, 32, 48, 64]))
    place = _conv(made, made.add("input", (hw, 3, 3)), hw, 3, c, 3)
    nb, terms, branches = int(draw.integers(2, 6)), [], 0
    for b in range(nb):
        if len(made.rows) >= MOST:
            nb = b
            break
        w, k = int(draw.choice([16, 32, 48, 64, 96, 128])), int(draw.choice([1, 3, 5, 7]))
        skip, attention = bool(draw.random() < 0.55), bool(draw.random() < 0.35)
        first, more = place, 0
        if family == "A":
            place = made.add("relu", (hw, w, w), made.add("batchnorm", (hw, w, w), _conv(made, place, hw, c, w, k)))
            place = _conv(made, place, hw, w, c, 1)
        elif family == "B":
            left = made.add("relu", (hw, w, w), _conv(made, place, hw, c, w, k))
            right = _conv(made, place, hw, c, c, int(draw.choice([1, 3, 5])), "depthwise")
            place = _conv(made, made.add("concat", (hw, w + c, w + c), left, right), hw, w + c, c, 1)
        else:
            k, half = 3, max(w // 2, 1)
            kept = [size for size in (1, 3, 5) if draw.random() < 0.8]
            ends = [made.add("batchnorm", (hw, half, half), _conv(made, place, hw, c, half, size)) for size in kept]
            width = half * len(ends) if ends else c
            ends = ends or [made.add("max pool", (hw, c, c), place, kernel=3)]
            place = _conv(made, made.add("concat", (hw, width, width), *ends), hw, width, c, 1)
            more = len(kept)
        if attention:
            for op in ("matmul", "softmax", "matmul"):
                cost = c * c * hw**2 / 1e9 if op == "matmul" else 0.0
                place = made.add(op, (hw, c, c), place, cost=cost)
        if skip:
            place = made.add("add", (hw, c, c), first, place)
        terms.append((w / c, k, hw, skip, attention, b))
        branches += more
        if hw > 8 and draw.random() < 0.5:
            hw /= 2
            place = made.add("max pool", (hw, c, c), place, kernel=2)
    made.add("output", (1, c, 10), made.add("linear", (1, c, 10), made.add("mean", (1, c, c), place)))
    s = 0.25 * math.log2(c / 16) + sum(_worth(*term, nb) for term in terms) / math.sqrt(nb)
    s += 0.08 * branches / nb if family == "C" else 0.0
    return made.made(), 0.80 + 0.14 / (1 + math.exp(-1.8 * (s - 1.3))) + float(draw.normal(0, 0.001))


def designs(family: str, n: int, seed: int) -> tuple[list[NetworkGraph], np.ndarray]:
    """`n` designs of a family, and their labels."""
    draw = np.random.default_rng([FAMILIES.index(check_choice(family, "family", FAMILIES)), seed])
    graphs, labels = zip(*(design(family, draw) for _ in range(check_integer(n, "n", 1, 100_000))), strict=True)
    return list(graphs), np.array(labels)


def costs(graphs: Sequence[NetworkGraph]) -> np.ndarray:
    """GFLOPs of each."""
    return np.array([one.cost for one in graphs])


def _conv(made: GraphMaker, before: int, hw: float, c_in: int, c_out: int, k: int, op: str = "conv") -> int:
    return made.add(op, (hw, c_in, c_out), before, kernel=k, cost=k * k * c_in * c_out * hw**2 / 1e9)


def _worth(width: float, k: int, hw: float, skip: bool, attention: bool, b: int, nb: int) -> float:
    found = 0.6 * min(width, 1.0) + (0.4 if hw > 16 else -0.3) * (k - 1) / 6 + 0.35 * skip * (b + 1) / nb
    return found + attention * (0.7 if skip else -0.4) * (1.0 if hw < 32 else 0.3)
