"""The predictor by Baum and Welch (#44): a hidden Markov model, fitted to the prompt's own strings, predicts the next symbol.

Akyürek et al., arXiv:2401.12973, compare models that learn in context with it. The hidden Markov model puts symbols on its edges,
as an automaton does; all strings begin in state 0:

    A[s, w, s'] = p(symbol w and next state s' | state s)          p(w | string so far) = sum_s belief[s] sum_s' A[s, w, s']
    E: expected counts of all edges by the forward and the backward pass      M: A = (counts + smoothing) / their sum over w, s'

Without smoothing the likelihood of the strings falls in no step. Every automaton is such a model exactly. A prompt's predictions
use the strings that are complete before the present one: after each string the fit goes on from where it was.

Claim: fitting the whole family of languages in the prompt is no better than counting n-grams. Refuted where Baum and Welch's
accuracy is above that of the backoff predictor of order 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.lab.automata import PAD, SEPARATOR, SYMBOLS, VOCABULARY, Automaton
from manyheads.training import generator_of

States = Float[Tensor, "B S W S"]


def random_edges(n: int, states: int, seed: int = 0) -> States:
    """Random A of `n` prompts: uniform weights from .5 to 1.5, so that no two states are alike."""
    size = (check_integer(n, "n", 1), check_integer(states, "states", 1), SYMBOLS, states)
    weights = 0.5 + torch.rand(size, generator=generator_of(check_seed(seed), 0))
    return weights / weights.sum((2, 3), keepdim=True)


def edges_of(automaton: Automaton) -> States:
    """The A of an automaton, every legal symbol as likely, [1, S, W, S]."""
    out = torch.zeros(1, len(automaton), SYMBOLS, len(automaton))
    for state, edges in enumerate(automaton.edges):
        for symbol, target in edges:
            out[0, state, symbol, target] = 1 / len(edges)
    return out


def split_strings(tokens: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B N L"], Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The strings of each prompt, padded; and of each token which string it is in, and how many of its symbols came before it.

    A separator belongs to the string that begins after it, at place -1.
    """
    separator = tokens == SEPARATOR
    number = separator.long().cumsum(1)
    every = torch.arange(tokens.shape[1]).expand_as(tokens)
    begin = torch.where(separator, every, -1).cummax(1).values
    place = every - begin - 1
    symbols = tokens < SYMBOLS
    strings = torch.full((len(tokens), int(number.max()) + 1, int(place.max()) + 1), PAD)
    row = torch.arange(len(tokens))[:, None].expand_as(tokens)
    strings[row[symbols], number[symbols], place[symbols]] = tokens[symbols]
    return strings, number, place


def _step(a: States, strings: Int[Tensor, "B N L"], t: int) -> tuple[Float[Tensor, "B N S S"], Bool[Tensor, "B N 1"]]:
    """The edges of each string's symbol at place t, and whether there is one."""
    symbol = strings[:, :, t]
    there = (symbol < SYMBOLS)[..., None]
    by_symbol = a.transpose(1, 2)  # [B, W, S, S]
    return by_symbol[torch.arange(len(a))[:, None], symbol.clamp_max(SYMBOLS - 1)], there


def beliefs(a: States, strings: Int[Tensor, "B N L"]) -> tuple[Float[Tensor, "B N L1 S"], Float[Tensor, "B N L"]]:
    """What is known of the state before each place (the forward pass, normalised), and the log-probability of its symbol."""
    now = torch.zeros(*strings.shape[:2], a.shape[1])
    now[..., 0] = 1.0
    states, scores = [now], []
    for t in range(strings.shape[2]):
        edges, there = _step(a, strings, t)
        after = torch.einsum("bns,bnsr->bnr", now, edges)
        total = after.sum(-1, keepdim=True)
        now = torch.where(there, after / total.clamp_min(1e-30), now)
        scores.append(torch.where(there, total.clamp_min(1e-30).log(), 0.0)[..., 0])
        states.append(now)
    return torch.stack(states, 2), torch.stack(scores, 2)


def string_predictions(a: States, strings: Int[Tensor, "B N L"]) -> Float[Tensor, "B N L1 W"]:
    """The distribution of the symbol at each place of each string, and of the one after its end."""
    known, _ = beliefs(a, strings)
    return torch.einsum("bnls,bsw->bnlw", known, a.sum(-1))


def expectation_step(
    a: States, strings: Int[Tensor, "B N L"], *, smoothing: float = 0.0
) -> tuple[States, Float[Tensor, " B"]]:
    """One step of Baum and Welch: the new A, and the log-likelihood of each prompt's strings under the old one."""
    check_number(smoothing, "smoothing", 0.0)
    forward, scores = beliefs(a, strings)
    later = torch.ones(*strings.shape[:2], a.shape[1])
    counts = torch.zeros(len(a), SYMBOLS, a.shape[1], a.shape[1])
    row = torch.arange(len(a))[:, None].expand(strings.shape[:2])
    for t in reversed(range(strings.shape[2])):
        edges, there = _step(a, strings, t)
        joint = forward[:, :, t, :, None] * edges * later[:, :, None]
        joint = joint / joint.sum((2, 3), keepdim=True).clamp_min(1e-30)
        joint = torch.where(there[..., None], joint, 0.0)
        counts.index_put_((row, strings[:, :, t].clamp_max(SYMBOLS - 1)), joint, accumulate=True)
        before = torch.einsum("bnsr,bnr->bns", edges, later)
        later = torch.where(there, before / before.sum(-1, keepdim=True).clamp_min(1e-30), later)
    counts = counts.transpose(1, 2) + smoothing
    total = counts.sum((2, 3), keepdim=True)
    return torch.where(total > 0, counts / total.clamp_min(1e-30), a), scores.sum((1, 2))


def baum_welch(
    tokens: Int[Tensor, "B T"], *, states: int = 12, steps: int = 5, smoothing: float = 0.01, seed: int = 0
) -> Float[Tensor, "B T V"]:
    """The prediction after every token. After each string, `steps` steps on all strings before; the first string is guessed.

    `states` are as many as the largest automaton has. About a second a prompt on one core.
    """
    check_integer(steps, "steps", 1)
    strings, number, place = split_strings(tokens)
    a = random_edges(len(tokens), states, seed)
    predicted = torch.zeros(*tokens.shape, VOCABULARY)
    for n in range(strings.shape[1]):
        for _ in range(steps if n else 0):
            a, _ = expectation_step(a, strings[:, :n], smoothing=smoothing)
        symbols = string_predictions(a, strings[:, n : n + 1])[:, 0]
        rows, at = torch.nonzero((number == n) & (tokens != PAD), as_tuple=True)
        predicted[rows, at, :SYMBOLS] = symbols[rows, place[rows, at] + 1]
    return predicted
