"""The circuits of constructed models: subspaces of the residual stream, and the four matrices of each kind of head.

Nothing here depends on an architecture; `constructed.py` explains the whole.

A head is given by four matrices, each `[64, D]`, that act on the normalised residual stream `x`, `[D]`:

    score(t, s) = <R_t W_Q x_t, R_s W_K x_s>        z_t = sum_s pattern(t, s) W_V x_s        write_t = z_t W_O

with `R` the rotary embedding where the architecture has one. The 64 dimensions of q and k are used as rotary pairs
`(i, i + 32)`, whether they rotate or not: pairs 0-9 are clocks, pairs 16-31 hold a token code and, in the last
dimension, the sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from manyheads.lab.words import BOS, CLASSES, IDS, WORDS

Array = np.ndarray[Any, np.dtype[np.float64]]

HEAD_DIM = 64
CODE = 31
N_CLOCKS = 10
ROPE_THETA = 1e8
CONST, CLOCK = 10.0, 0.25  # lengths in the residual stream of the constant and each clock; token codes have length 1
ORDINALS = [word for members in CLASSES.values() for word in members]
SUCCESSORS = [pair for members in CLASSES.values() for pair in pairwise(members)]

_content = [*range(16, 32), *range(48, 63)]
_sink = [63]
_clock = [*range(N_CLOCKS), *range(HEAD_DIM // 2, HEAD_DIM // 2 + N_CLOCKS)]
_speed = ROPE_THETA ** (-2 * np.arange(N_CLOCKS) / HEAD_DIM)
_weight = np.array([0.5] + [0.5 / (N_CLOCKS - 1)] * (N_CLOCKS - 1))


@lru_cache(maxsize=1)
def codes() -> Float[Array, "V CODE"]:
    """One code for each token: unit vectors with inner products of 7/31, -1/31 or -9/31; the zero vector for `<bos>`.

    The signs are those of Gold's sequences of length 31: the bits of a token's number select which of eight generators
    are added (modulo 2): five shifts of a maximal sequence u, and three of every third element of u.
    """
    u = [0, 0, 0, 0, 1]
    while len(u) < CODE:
        u.append(u[-5] ^ u[-3])
    third = [u[3 * i % CODE] for i in range(CODE)]
    generators = np.array([np.roll(u, i) for i in range(5)] + [np.roll(third, i) for i in range(3)])
    shuffled = 1 + np.random.default_rng(0).permutation(
        len(WORDS) - 1
    )  # neighbours in a class must not have related codes
    numbers = np.insert(shuffled, IDS[BOS], 0)
    bits = numbers[:, None] >> np.arange(len(generators)) & 1
    code = (1 - 2 * (bits @ generators % 2)) / CODE**0.5
    code[IDS[BOS]] = 0.0
    return code


def clock_times(n_positions: int) -> tuple[Float[Array, "T C"], Float[Array, "T C"]]:
    """Cosine and sine of every clock at every position; clock i turns by `ROPE_THETA ** (-2 i / 64)` radians a step."""
    angle = np.outer(np.arange(n_positions), _speed)
    return np.cos(angle), np.sin(angle)


@dataclass(frozen=True)
class Space:
    """Named orthogonal subspaces of the residual stream, as rows of length 1. All are orthogonal to the vector of ones.

    Positions come from the rotary embedding if `rotary`, else from the clocks `cos` and `sin` in the residual stream.
    """

    tok: Float[Array, "CODE D"]
    prev: Float[Array, "CODE D"]
    dup: Float[Array, "CODE D"]
    out: Float[Array, "CODE D"]
    ordinal: Float[Array, "N D"]
    cos: Float[Array, "C D"]
    sin: Float[Array, "C D"]
    const: Float[Array, " D"]
    bos: Float[Array, " D"]
    rotary: bool

    @classmethod
    def draw(cls, width: int, rotary: bool, rng: np.random.Generator) -> Space:
        """Random subspaces, spanned by cosine waves over shuffled coordinates."""
        waves = np.cos(np.pi / width * np.outer(np.arange(1, width), rng.permutation(width) + 0.5)) * (2 / width) ** 0.5
        sizes = [CODE] * 4 + [len(ORDINALS), N_CLOCKS, N_CLOCKS, 1, 1]
        tok, prev, dup, out, ordinal, cos, sin, const, bos, _ = np.split(rng.permutation(waves), np.cumsum(sizes))
        return cls(tok, prev, dup, out, ordinal, cos, sin, const[0], bos[0], rotary)

    @property
    def one(self) -> Float[Array, " D"]:
        """The row that reads 1 from every token."""
        return self.const / CONST

    def clock(self, offset: int = 0) -> Float[Array, "2*{len(self.cos)} D"]:
        """Rows that read every clock as it was `offset` tokens ago (if `rotary`: that the embedding rotates to it)."""
        cos, sin = np.cos(offset * _speed)[:, None], np.sin(offset * _speed)[:, None]
        if self.rotary:
            return np.concatenate([cos * self.one, -sin * self.one])
        now_cos, now_sin = self.cos / CLOCK, self.sin / CLOCK
        return np.concatenate([cos * now_cos + sin * now_sin, cos * now_sin - sin * now_cos])


@dataclass(frozen=True)
class PlantedCircuit:
    """The matrices of one planted head. `W_Q` and `W_K` are None where the head attends as a noise head does."""

    W_V: Float[Array, "64 D"]
    W_O: Float[Array, "64 D"]
    W_Q: Float[Array, "64 D"] | None = None
    W_K: Float[Array, "64 D"] | None = None


def plant_previous(space: Space, tok: Array) -> PlantedCircuit:
    """Attends to the token before and writes its code: prev[t] = tok[t-1]. Score: 80 K(D - 1)."""
    return PlantedCircuit(_moves(tok), _moves(space.prev), *_looks_back(space, 1))


def duplicate(space: Space, tok: Array) -> PlantedCircuit:
    """Attends to earlier occurrences of the token and writes dup[t] = tok[t]; else to `<bos>`, which writes nothing.

    Score: 280 <tok_t, tok_s> - 110 K(D) for words, 183 for `<bos>`. An earlier occurrence scores 280 - 84 at least, the
    token itself 170, another word at most 63 + 84.
    """
    apart, key = -110 * _weighted(space.clock()), space.clock()
    key[:N_CLOCKS] -= space.bos  # at the first position, `<bos>` has the clocks (1, 0), ..., (1, 0)
    return PlantedCircuit(
        _moves(tok),
        _moves(space.dup),
        _rows((_content, 280 * tok), (_clock, apart), (_sink, 183 * space.one)),
        _rows((_content, tok), (_clock, key), (_sink, space.bos)),
    )


def plant_induction(space: Space, tok: Array) -> PlantedCircuit:
    """Attends to where the previous token equals the current one, and predicts the token there; else to `<bos>`.

    Score: 60 <tok_t, prev_s>, for `<bos>` 36.
    """
    return PlantedCircuit(
        _moves(tok),
        _moves(space.out),
        _rows((_content, 60 * tok), (_sink, 36 * space.one)),
        _rows((_content, space.prev), (_sink, space.bos)),
    )


def plant_copying(space: Space, tok: Array) -> PlantedCircuit:
    """Attends like a noise head, and raises the logits of the tokens it attends to a little."""
    return PlantedCircuit(_moves(tok), _moves(0.25 * space.out))


def anti_copying(space: Space, tok: Array) -> PlantedCircuit:
    """Attends to the current token and lowers its logit a little."""
    return PlantedCircuit(_moves(tok), _moves(-0.25 * space.out), *_looks_back(space, 0))


def plant_successor(space: Space, tok: Array) -> PlantedCircuit:
    """Attends to the current token and predicts its successor: one dimension of z for each ordinal that has one."""
    before, after = zip(*SUCCESSORS, strict=True)
    writes = 0.5 * codes()[[IDS[word] for word in after]] @ space.out
    reads = space.ordinal[[ORDINALS.index(word) for word in before]]
    dims = range(len(SUCCESSORS))
    return PlantedCircuit(_rows((dims, reads)), _rows((dims, writes)), *_looks_back(space, 0))


def _looks_back(space: Space, offset: int) -> tuple[Array, Array]:
    return _rows((_clock, 80 * _weighted(space.clock(offset)))), _rows((_clock, space.clock()))


def _weighted(clocks: Float[Array, "R D"]) -> Float[Array, "R D"]:
    return np.tile(_weight, 2)[:, None] * clocks


def _moves(code: Float[Array, "CODE D"]) -> Float[Array, "64 D"]:
    return _rows((_content, code))


def _rows(*parts: tuple[Sequence[int], Array]) -> Float[Array, "64 D"]:
    matrix = np.zeros((HEAD_DIM, parts[0][1].shape[-1]))
    for dims, rows in parts:
        matrix[list(dims)] = rows
    return matrix
