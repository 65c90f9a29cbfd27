"""Small data for experiments with transfer: states, clusters and sentences.

Frozen states to tune a head on (#25), of processes whose truth is known and of a language model:

    StateChain     z_1 ~ N(0, I_k),  z_{t+1} = a z_t + e_t,  x_t = W z_t + u_t,  y_t = z_t beta + noise       linear-Gaussian
    belief_states  the filter of a hidden Markov model: b_t[i] = P(state_t = i | o_1 .. o_t), what an ideal model knows

e has variance 1 - a^2, so every z_t ~ N(0, I_k). The paper (Luo, Wang and Huang, arXiv:2410.00699) leaves A, W and the noise
open: here A = a I, and the latent states reach x nested (W has the first p rows of I) or mixed (rows of N(0, I / k)).

Classes: clusters with known centres; and sentences that are real and always there, the first lines of the documentation of
functions of pandas, NumPy, PyTorch and Python's own library, with the question which of the four each is from. Other versions of
these libraries have other sentences.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_number, check_seed
from manyheads.learning import Trunk
from manyheads.tasks.texts import passages

Sample = tuple[np.ndarray, np.ndarray]
SOURCES = (
    ("pandas", "pandas.DataFrame", "pandas.Series"),
    ("numpy", "numpy.ndarray"),
    ("torch", "torch.nn", "torch.nn.functional"),
    (
        "os",
        "statistics",
        "itertools",
        "string",
        "pathlib",
        "datetime",
        "collections",
        "functools",
        "inspect",
        "json",
        "logging",
    ),
)
LONGEST = 100  # characters of a sentence
NAMES = re.compile(r"(?i):[a-z]+:|[`*]|\b(pandas|numpy|np|pytorch|torch|python)\b\.?")


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


def clusters(
    n: int, centres: Float[Tensor, "K d"], generator: torch.Generator
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:
    """`n` points around random centres, with variance 1 in each direction, and which centre each is from."""
    which = torch.randint(len(centres), (n,), generator=generator)
    return centres[which] + torch.randn(n, centres.shape[1], generator=generator), which


def documented(n: int, seed: int = 0) -> tuple[list[str], Int[Tensor, "n"]]:
    """`n` shuffled sentences about functions, as many from each library, and the number of the library (`SOURCES`).

    Names of the libraries and marks of the markup are taken out. `InputError` for more than there are.
    """
    rng, found = random.Random(seed), list[tuple[str, int]]()
    for label, modules in enumerate(SOURCES):
        sentences = sorted({one for name in modules for one in _sentences(name)})
        need = (n + 3 - label) // 4
        if need > len(sentences):
            raise InputError(
                f"{SOURCES[label][0]} has {len(sentences)} sentences for the {need} asked of it; ask for fewer."
            )
        found += [(one, label) for one in rng.sample(sentences, need)]
    rng.shuffle(found)
    return [text for text, _ in found], torch.tensor([label for _, label in found])


def _sentences(name: str) -> Sequence[str]:
    module, _, last = name.rpartition(".")
    try:
        owner = importlib.import_module(name)
    except ImportError:
        owner = getattr(importlib.import_module(module), last)
    texts = (getattr(getattr(owner, one, None), "__doc__", None) for one in sorted(dir(owner)))
    return [clean for text in texts if isinstance(text, str) and (clean := _first(text))]


def _first(text: str) -> str:
    """The first sentence of prose, without names and markup; "" where there is none."""
    for part in inspect.cleandoc(text).split("\n\n"):
        words = part.split()
        if len(words) >= 5 and words[0][0].isupper() and "(" not in words[0] and "->" not in words[:8]:
            return " ".join(NAMES.sub("", " ".join(words).split(". ")[0][:LONGEST]).split())
    return ""
