"""What hidden states hold of a language in the prompt (#44): counts of n-grams, and where the automaton is.

Akyürek et al., arXiv:2401.12973, probe states h [B, T, D] after every token. Our probes are linear (scikit-learn), fitted on some
automata and tested on others. With c the last n tokens of the text so far and N(c w) how often w came after c before,

    counts          log(1 + N(c w)) for every token w              ridge regression of h, standardised
    conditionals    N(c w) / sum_v N(c v), 0 where c is new        the same
    R2 = 1 - sum |y - y_hat|^2 / sum |y - mean y|^2                1: exact; 0: as the mean; it can be below 0

States have no names that two automata share, so the automaton's state is asked of pairs: two positions i < j of one prompt with
the same last symbol: is the automaton in the same state? A logistic regression of h_i * h_j and |h_i - h_j|, entry by entry, on
as many pairs of either answer; its score is the AUC, 0.5 by chance. The last symbol alone says nothing about such pairs.

Departure: the paper's probes are small networks, and its score of counts is the relative error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.evaluation.metrics import auc
from manyheads.inputs import check_integer, check_seed
from manyheads.lab.automata import PAD, SYMBOLS, VOCABULARY, Automaton
from manyheads.lab.ngram_layer import matches

NOWHERE = -1  # the state after padding


def ngram_counts(tokens: Int[Tensor, "B T"], n: int) -> Float[Tensor, "B T V"]:
    """N(c w) of the formula above after every token: how often each token w came after the last `n` tokens, up to now."""
    check_integer(n, "n", 1)
    (matched,) = matches(tokens, (n,))
    return matched.float() @ F.one_hot(tokens, VOCABULARY).float()


def ngram_conditionals(tokens: Int[Tensor, "B T"], n: int) -> Float[Tensor, "B T V"]:
    """The (n + 1)-gram conditionals of the prompt so far, after every token (formula above)."""
    counts = ngram_counts(tokens, n)
    return counts / counts.sum(-1, keepdim=True).clamp_min(1.0)


def automaton_states(automata: Sequence[Automaton], tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The state of each prompt's automaton after every token; a separator leads to state 0, padding to NOWHERE.

    `InputError` for a prompt that its automaton does not allow.
    """
    if len(automata) != len(tokens):
        raise InputError(f"got {len(automata)} automata and {len(tokens)} prompts; give one automaton a prompt.")
    out = torch.full_like(tokens, NOWHERE)
    for b, (automaton, row) in enumerate(zip(automata, tokens.tolist(), strict=True)):
        steps, now = [dict(edges) for edges in automaton.edges], 0
        for t, token in enumerate(row):
            if token == PAD:
                break
            if token < SYMBOLS and token not in steps[now]:
                raise InputError(f"prompt {b} is not of its automaton: token {t} cannot be {token}.")
            now = steps[now][token] if token < SYMBOLS else 0
            out[b, t] = now
    return out


def last_tokens(tokens: Int[Tensor, "B T"], n: int) -> Float[Tensor, "B T nV"]:
    """What a prompt shows on its surface: each of its last `n` tokens as one-hot, 0 before the beginning."""
    check_integer(n, "n", 1)
    one_hot = F.one_hot(tokens, VOCABULARY).float()
    length = tokens.shape[1]
    return torch.cat([F.pad(one_hot, (0, 0, k, 0))[:, :length] for k in range(n)], -1)


def shares_so_far(tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V1"]:
    """How frequent each token was so far, and the logarithm of the place."""
    place = torch.arange(1, tokens.shape[1] + 1)[:, None]
    shares = F.one_hot(tokens, VOCABULARY).float().cumsum(1) / place
    return torch.cat([shares, place.log().expand(len(tokens), -1, 1)], -1)


def probe_r2(
    learned: tuple[Float[Tensor, "B T D"], Float[Tensor, "B T K"], Bool[Tensor, "B T"]],
    tested: tuple[Float[Tensor, "C S D"], Float[Tensor, "C S K"], Bool[Tensor, "C S"]],
    *,
    penalty: float = 1.0,
    shuffle: int | None = None,
) -> float:
    """R2 on `tested` of a ridge regression fitted on `learned` (formula above); each is states, targets, and where they count.

    With `shuffle`, a seed, the learned targets change places: nothing can be learned from them but their mean.
    """
    (h, y, there), (h_new, y_new, there_new) = learned, tested
    known, unknown = y[there].numpy(), y_new[there_new].numpy()
    if shuffle is not None:
        known = np.random.default_rng(check_seed(shuffle)).permutation(known)
    probe = make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(h[there].numpy(), known)
    wrong = unknown - probe.predict(h_new[there_new].numpy())
    return float(1 - np.square(wrong).sum() / np.square(unknown - unknown.mean(0)).sum())


@dataclass(frozen=True)
class StatePairs:
    """Pairs of positions in a prompt with the same last symbol: row, first, second, and whether the state is the same."""

    row: Int[np.ndarray, " P"]
    first: Int[np.ndarray, " P"]
    second: Int[np.ndarray, " P"]
    same: Bool[np.ndarray, " P"]

    def of(self, states: Float[Tensor, "B T D"]) -> Float[np.ndarray, "P F"]:
        """Products and distances of both positions' entries."""
        h = states.numpy()
        a, b = h[self.row, self.first], h[self.row, self.second]
        return np.concatenate([a * b, abs(a - b)], -1)


def state_pairs(tokens: Int[Tensor, "B T"], states: Int[Tensor, "B T"], *, each: int = 20, seed: int = 0) -> StatePairs:
    """Up to `each` pairs of either answer a prompt, as many of both, drawn at random (definition above)."""
    check_integer(each, "each", 1)
    rng, found = np.random.default_rng(check_seed(seed)), []
    for b, (row, state) in enumerate(zip(tokens.numpy(), states.numpy(), strict=True)):
        first, second = np.nonzero(np.triu(row[:, None] == row, 1) & (row < SYMBOLS)[:, None])
        same = state[first] == state[second]
        take = min(each, int(same.sum()), int((~same).sum()))
        chosen = np.concatenate([rng.choice(np.flatnonzero(kind), take, replace=False) for kind in (same, ~same)])
        found.append((np.full(2 * take, b), first[chosen], second[chosen], same[chosen]))
    return StatePairs(*(np.concatenate(part) for part in zip(*found, strict=True)))


def state_auc(
    learned: tuple[Float[Tensor, "B T D"], StatePairs],
    tested: tuple[Float[Tensor, "C S D"], StatePairs],
    *,
    shuffle: int | None = None,
) -> float:
    """AUC on `tested` of the regression that says which pairs are in one state (formula above); each is states and pairs."""
    (h, pairs), (h_new, new) = learned, tested
    answers = pairs.same if shuffle is None else np.random.default_rng(check_seed(shuffle)).permutation(pairs.same)
    # Entries are standardised before they are multiplied, so that no large one drowns the others.
    flat = h.flatten(0, 1)
    mean, deviation = flat.mean(0), flat.std(0).clamp_min(1e-6)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    probe.fit(pairs.of((h - mean) / deviation), answers)
    return auc(probe.decision_function(new.of((h_new - mean) / deviation)), new.same)
