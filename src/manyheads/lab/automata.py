"""Languages to learn in context (#44): random automata, prompts of their strings, and n-gram baselines.

Akyürek et al., arXiv:2401.12973. An automaton has n states, n uniform in 4..12, and an alphabet of 4..18 out of 18
symbols. Each state has 1, 2 or 3 edges with different symbols to different other states; state 0 is the start, and all
states accept. It is minimised and trimmed. A prompt is 10..19 strings of 1..49 symbols with separators between them;
every symbol is uniform over those that its state allows. A prediction p, `[V]`, is scored wherever a symbol comes next,
against u, uniform over the symbols that are legal there:

    accuracy = mean of [arg-max p is legal]        total variation = mean of 1/2 sum_w |p(w) - u(w)|        both in [0, 1]

The backoff predictor of order n counts which symbols followed each context of n - 1 tokens in the prompt so far. With c'
for c without its oldest token, and N(c) the occurrences of c, the present one included,

    p(w | c) = N(c w) / N(c)                                              if w came after c before
               (the remaining mass) * p(w | c') / sum_v p(v | c')           else; v: symbols that never came after c

Contexts do not cross the beginning of their string, which counts as a token. With no context, p is w's share of the prompt.

The released code means to discard duplicates, but its set compares automata by identity and keeps them. Here states are
numbered canonically: equal automata are equal languages, and no language is in two splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError

SYMBOLS = 18
SEPARATOR, PAD, VOCABULARY = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Automaton:
    """`edges[state]` holds `(symbol, next state)`, by symbol. The start is state 0, and all states accept.

    Two automata made by `minimal` are equal if and only if their languages are.
    """

    edges: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def minimal(cls, edges: Sequence[Mapping[int, int]]) -> Automaton:
        """The smallest automaton with the language of `edges[state][symbol] = next state`, numbered breadth first."""
        # Moore's partition refinement: states are split by their successors' classes until no class splits.
        kinds, n_kinds = [0] * len(edges), 1
        while True:
            signatures = [tuple(sorted((w, kinds[to]) for w, to in row.items())) for row in edges]
            names: dict[Any, int] = {}
            kinds = [names.setdefault((kind, s), len(names)) for kind, s in zip(kinds, signatures, strict=True)]
            if len(names) == n_kinds:
                break
            n_kinds = len(names)
        member = {kind: state for state, kind in enumerate(kinds)}
        number, found = {kinds[0]: 0}, [kinds[0]]
        for kind in found:
            for _, to in sorted(edges[member[kind]].items()):
                if kinds[to] not in number:
                    number[kinds[to]] = len(found)
                    found.append(kinds[to])
        return cls(
            tuple(tuple((w, number[kinds[to]]) for w, to in sorted(edges[member[kind]].items())) for kind in found)
        )

    def __len__(self) -> int:
        """Number of states."""
        return len(self.edges)

    def state(self, string: Sequence[int]) -> int | None:
        """The state that `string` leads to, None if it is not in the language."""
        now = 0
        for symbol in string:
            allowed = dict(self.edges[now])
            if symbol not in allowed:
                return None
            now = allowed[symbol]
        return now


def random_automaton(rng: np.random.Generator) -> Automaton:
    """One random automaton, minimised (distribution above)."""
    n = int(rng.integers(4, 13))
    alphabet = rng.permutation(SYMBOLS)[: rng.integers(4, SYMBOLS + 1)]
    edges = []
    for state in range(n):
        degree = int(rng.integers(1, 4))
        others = np.delete(np.arange(n), state)
        symbols, targets = rng.permutation(alphabet)[:degree], rng.permutation(others)[:degree]
        edges.append({int(w): int(to) for w, to in zip(symbols, targets, strict=True)})
    return Automaton.minimal(edges)


def random_automata(train: int, val: int = 0, test: int = 0, *, seed: int = 0) -> dict[str, list[Automaton]]:
    """Different automata for training, validation and test: all languages differ, within a list and between lists."""
    sizes = (train, val, test)
    if min(sizes) < 0 or sum(sizes) == 0:
        raise InputError(f"got {train} training, {val} validation and {test} test automata; give at least one in all.")
    rng = np.random.default_rng(seed)
    drawn: dict[Automaton, None] = {}
    while len(drawn) < sum(sizes):
        drawn[random_automaton(rng)] = None
    left = iter(drawn)
    return {split: [next(left) for _ in range(size)] for split, size in zip(SPLITS, sizes, strict=True)}


@dataclass(frozen=True)
class Prompts:
    """One prompt a row, padded on the right. `legal[b, t]` are the symbols that may follow token t, whether or not one does."""

    tokens: Int[Tensor, "B T"]
    legal: Bool[Tensor, "B T V"]

    @property
    def scored(self) -> Bool[Tensor, "B T"]:
        """Positions whose next token is a symbol: no separator, no padding, not past the end."""
        following = torch.cat([self.tokens[:, 1:], torch.full_like(self.tokens[:, :1], PAD)], 1)
        return following < SYMBOLS

    @property
    def truth(self) -> Float[Tensor, "B T V"]:
        """The true distribution of the next symbol: uniform over the legal ones."""
        legal = self.legal.float()
        return legal / legal.sum(-1, keepdim=True)


def language_prompts(
    automata: Sequence[Automaton],
    *,
    strings: tuple[int, int] = (10, 19),
    lengths: tuple[int, int] = (1, 49),
    width: int | None = None,
    seed: int = 0,
) -> Prompts:
    """One prompt for each automaton. `strings` and `lengths` bound the number and length of strings (inclusive); prompts
    are cut after `width` tokens."""
    if not automata or not 1 <= strings[0] <= strings[1] or not 1 <= lengths[0] <= lengths[1]:
        raise InputError(
            f"got {len(automata)} automata, strings={strings}, lengths={lengths}; give at least one of each."
        )
    if width is not None and width < 2:
        raise InputError(f"width is {width}; give at least 2, one token to read and one to predict.")
    rng = np.random.default_rng(seed)
    rows = [
        _separators(rng.integers(lengths[0], lengths[1] + 1, rng.integers(strings[0], strings[1] + 1)))
        for _ in automata
    ]
    longest = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, longest - len(row)), constant_values=PAD) for row in rows])[:, :width]
    symbol, target, degree, legal = _tables(automata)
    here, state = np.arange(len(automata)), np.zeros(len(automata), dtype=int)
    allowed = np.zeros((*tokens.shape, VOCABULARY), dtype=bool)
    for t, draw in enumerate(rng.random(tokens.shape).T):
        edge = (draw * degree[here, state]).astype(int)
        is_symbol = tokens[:, t] < SYMBOLS
        tokens[:, t] = np.where(is_symbol, symbol[here, state, edge], tokens[:, t])
        state = np.where(is_symbol, target[here, state, edge], 0)
        allowed[:, t] = legal[here, state]
    return Prompts(torch.from_numpy(tokens), torch.from_numpy(allowed))


def _separators(lengths: Int[np.ndarray, " N"]) -> Int[np.ndarray, " T"]:
    """A row with separators between the strings, and 0 as a placeholder for symbols."""
    row = np.zeros(lengths.sum() + len(lengths) - 1, dtype=np.int64)
    row[np.cumsum(lengths + 1)[:-1] - 1] = SEPARATOR
    return row


def _tables(automata: Sequence[Automaton]) -> tuple[Any, Any, Any, Any]:
    """Symbols and targets `[B, S, 3]`, number of edges `[B, S]` and legal tokens `[B, S, V]` of every state."""
    shape = (len(automata), max(map(len, automata)))
    symbol, target = np.zeros((2, *shape, 3), dtype=np.int64)
    degree, legal = np.zeros(shape, dtype=int), np.zeros((*shape, VOCABULARY), dtype=bool)
    for b, automaton in enumerate(automata):
        for state, edges in enumerate(automaton.edges):
            degree[b, state] = len(edges)
            for e, (w, to) in enumerate(edges):
                symbol[b, state, e], target[b, state, e], legal[b, state, w] = w, to, True
    return symbol, target, degree, legal


def next_symbol_accuracy(predicted: Float[Tensor, "B T V"], given: Prompts) -> float:
    """Share of the scored positions whose most likely token is legal (formula above)."""
    best = predicted.argmax(-1, keepdim=True)
    return float(given.legal.gather(-1, best)[..., 0][given.scored].float().mean())


def total_variation(p: Float[Tensor, "B T V"], q: Float[Tensor, "B T V"], given: Prompts) -> float:
    """Mean total variation of two predictions over the scored positions (formula above), in [0, 1]."""
    return float(0.5 * (p - q).abs().sum(-1)[given.scored].mean())


def backoff(tokens: Int[Tensor, "B T"], order: int) -> Float[Tensor, "B T V"]:
    """The backoff predictor of order `order` (formula above) after every token; it reads `order - 1` tokens of context."""
    if not 1 <= order <= 8:
        raise InputError(f"order is {order}; give 1 (no context) to 8.")
    rows = tokens.numpy()
    predicted = np.zeros((*rows.shape, VOCABULARY), dtype=np.float32)
    for k in range(order):
        after, occurrences = _counts(rows, k)
        seen = after / (occurrences if k else after.sum(-1, keepdims=True))
        unseen = np.where(after > 0, 0.0, predicted)
        left = unseen.sum(-1, keepdims=True)
        rest = 1.0 - seen.sum(-1, keepdims=True)
        predicted = seen + rest * unseen / np.where(left > 0, left, 1.0)
        predicted /= predicted.sum(-1, keepdims=True)
    return torch.from_numpy(predicted)


def _counts(rows: Int[np.ndarray, "B T"], k: int) -> tuple[Float[np.ndarray, "B T V"], Float[np.ndarray, "B T 1"]]:
    """After each token: how often each symbol followed the present context of k tokens, and how often that occurred."""
    context = _contexts(rows, k)
    after = np.zeros((context.max() + 1, VOCABULARY), dtype=np.float32)
    occurred = np.zeros((len(after), 1), dtype=np.float32)
    occurred[context[:, 0]] = 1
    symbols, occurrences = (np.zeros((*rows.shape, n), dtype=np.float32) for n in (VOCABULARY, 1))
    for t, token in enumerate(rows.T):
        is_symbol, present = token < SYMBOLS, context[:, t + 1]
        after[context[is_symbol, t], token[is_symbol]] += 1
        occurred[present] += 1
        symbols[:, t], occurrences[:, t] = after[present], occurred[present]
    return symbols, occurrences


def _contexts(rows: Int[np.ndarray, "B T"], k: int) -> Int[np.ndarray, "B T+1"]:
    """An id of the k tokens before each position, and before the end; rows share no ids."""
    padded = np.pad(rows, ((0, 0), (k, 0)), constant_values=SEPARATOR)
    number = np.repeat(np.arange(len(rows))[:, None], rows.shape[1] + 1, 1)
    inside = np.ones_like(number, dtype=bool)
    for back in range(1, k + 1):
        token = padded[:, k - back : k - back + rows.shape[1] + 1]
        inside &= token != SEPARATOR
        number = VOCABULARY * number + np.where(inside, token, SEPARATOR)
    return np.unique(number, return_inverse=True)[1].reshape(number.shape)
