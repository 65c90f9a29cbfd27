"""Frozen states to tune a head on (#25): of processes whose truth is known, and of a language model.

    StateChain     z_1 ~ N(0, I_k),  z_{t+1} = a z_t + e_t,  x_t = W z_t + u_t,  y_t = z_t beta + noise       linear-Gaussian
    belief_states  the filter of a hidden Markov model: b_t[i] = P(state_t = i | o_1 .. o_t), what an ideal model knows

e has variance 1 - a^2, so every z_t ~ N(0, I_k). The paper (Luo, Wang and Huang, arXiv:2410.00699) leaves A, W and the noise
open: here A = a I, and the latent states reach x nested (W has the first p rows of I) or mixed (rows of N(0, I / k)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from manyheads.inputs import check_choice, check_integer, check_number, check_seed
from manyheads.learning import Trunk
from manyheads.tasks.texts import passages

Sample = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class StateChain:
    """The chain above: `latent` k, `width` the most features p, `memory` a, |beta|, and the noise of y and of x (`blur`)."""

    latent: int = 600
    width: int = 600
    memory: float = 0.5
    signal: float = 1.0
    noise: float = 1.0
    blur: float = 0.0
    mixing: Literal["nested", "mixed"] = "nested"
    outputs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.latent, "latent", 1)
        check_integer(self.width, "width", 1)
        check_integer(self.outputs, "outputs", 1)
        check_number(self.memory, "memory", 0.0, 1.0)
        for name in ("signal", "noise", "blur"):
            check_number(getattr(self, name), name, 0.0)
        check_choice(self.mixing, "mixing", ("nested", "mixed"))
        check_seed(self.seed)

    @property
    def beta(self) -> Float[np.ndarray, "k q"]:
        """What y is of the latent states."""
        beta = np.random.default_rng(self.seed).standard_normal((self.latent, self.outputs))
        return self.signal * beta / np.linalg.norm(beta, axis=0)

    @property
    def W(self) -> Float[np.ndarray, "width k"]:
        """The representation of the latent states; a width of p takes its first p rows."""
        if self.mixing == "nested":
            return np.eye(self.width, self.latent)
        return np.random.default_rng((self.seed, 1)).standard_normal((self.width, self.latent)) / self.latent**0.5

    def sample(self, n: int, draw: int) -> Sample:
        """X [n, width] and Y [n, q] of n steps of one chain, number `draw`."""
        rng = np.random.default_rng((self.seed, 2, draw))
        z = rng.standard_normal((n, self.latent))
        for t in range(1, n):
            z[t] = self.memory * z[t - 1] + (1 - self.memory**2) ** 0.5 * z[t]
        x = z @ self.W.T + self.blur * rng.standard_normal((n, self.width))
        return x, z @ self.beta + self.noise * rng.standard_normal((n, self.outputs))

    @property
    def population(self) -> Sample:
        """Rows on which a head's mean squared error is its excess risk E|x theta - z beta|^2 exactly.

        z and u have covariances I and blur^2 I, so the risk is |W' theta - beta|^2 + blur^2 |theta|^2: a sum over rows.
        """
        rows = np.vstack([self.W.T, self.blur * np.eye(self.width)])
        wanted = np.vstack([self.beta, np.zeros((self.width, self.outputs))])
        return rows * len(rows) ** 0.5, wanted * len(rows) ** 0.5


def belief_states(
    n: int, hidden: int = 300, symbols: int = 50, *, noise: float = 1.0, seed: int = 0
) -> tuple[Float[np.ndarray, "n hidden"], Float[np.ndarray, "n"]]:
    """Log-beliefs of `n` steps of a random hidden Markov model, and a target: linear in the beliefs, plus noise.

    Rows of the transition and emission matrices are Dirichlet(0.1). The linear part has standard deviation 1.
    """
    rng = np.random.default_rng(check_seed(seed))
    moves, emits = rng.dirichlet(np.full(hidden, 0.1), hidden), rng.dirichlet(np.full(symbols, 0.1), hidden)
    state, belief, beliefs = int(rng.integers(hidden)), np.full(hidden, 1 / hidden), np.empty((n, hidden))
    for t in range(n):
        state = int(rng.choice(hidden, p=moves[state]))
        belief = (belief @ moves) * emits[:, rng.choice(symbols, p=emits[state])]
        belief /= belief.sum()
        beliefs[t] = belief
    signal = beliefs @ rng.standard_normal(hidden)
    target = signal / signal.std() + noise * rng.standard_normal(n)
    return np.log(beliefs + 1e-6), target


def next_word_states(model: Any, layer: int, *, n: int = 1500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States [n, D] of a language model at random places of the bundled prose, and how many letters the next token has."""
    ids = passages(model, None, n=n // 16 + 1, length=64, seed=seed)
    states = Trunk(model).states(ids, layer)[:, 8:-1]
    letters = [[len(word) for word in model.tokenizer.convert_ids_to_tokens(row.tolist())] for row in ids[:, 9:]]
    places = np.random.default_rng(seed).permutation(states.shape[0] * states.shape[1])[:n]
    return states.flatten(0, 1).numpy()[places], np.array(letters, dtype=np.float64).ravel()[places]
