"""Rooms on a grid whose successor measure is known: an environment like gymnasium's, and its exact values.

A state is a free cell; the actions go up, right, down and left, and a step into a wall stays. An observation is an image
`[1, H, W]` with a one where the agent stands. Under the uniformly random policy, with the probabilities P of the next state,

    Psi = sum_k gamma^k P^k = (I - gamma P)^-1        [S, S], discounted visits

so that the value of any reward r on states is Psi r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_number

_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
_FOUR_ROOMS = """
#############
#     #     #
#     #     #
#           #
#     #     #
#     #     #
## ####     #
#     ### ###
#     #     #
#     #     #
#           #
#     #     #
#############
"""


@dataclass(frozen=True)
class MoveSpace:
    """How many actions there are, as gymnasium's Discrete says it."""

    n: int = len(_MOVES)


class GridRooms:
    """Rooms drawn as lines of text, `#` for a wall. With a `goal` (row, column) a step onto it pays 1 and ends the episode."""

    def __init__(self, lines: Sequence[str], *, goal: tuple[int, int] | None = None) -> None:
        if not lines or len({len(line) for line in lines}) != 1:
            raise InputError("the lines of the rooms have different lengths; draw a rectangle.")
        self.free = np.array([[sign != "#" for sign in line] for line in lines])
        self.cells: Int[np.ndarray, "S 2"] = np.argwhere(self.free)
        if len(self.cells) == 0:
            raise InputError("the rooms have no free cell; draw some that are no #.")
        if goal is not None and not (self.cells == goal).all(1).any():
            raise InputError(f"the goal {goal} is no free cell; give (row, column) of one.")
        self.index = {(int(r), int(c)): s for s, (r, c) in enumerate(self.cells)}
        self.goal, self.action_space, self._draw, self._state = goal, MoveSpace(), np.random.default_rng(0), 0

    @property
    def after(self) -> Int[np.ndarray, "S A"]:
        """The state after each action in each state."""
        found = np.empty((len(self.cells), len(_MOVES)), dtype=np.int64)
        for (r, c), s in self.index.items():
            found[s] = [self.index.get((r + dr, c + dc), s) for dr, dc in _MOVES]
        return found

    @property
    def images(self) -> Float[np.ndarray, "S 1 H W"]:
        """The observation of every state."""
        found = np.zeros((len(self.cells), 1, *self.free.shape), dtype=np.float32)
        found[np.arange(len(self.cells)), 0, self.cells[:, 0], self.cells[:, 1]] = 1.0
        return found

    def successor_measure(self, gamma: float = 0.99) -> Float[np.ndarray, "S S"]:
        """Psi of the uniformly random policy, without a goal: episodes never end."""
        check_number(gamma, "gamma", low=0.0, high=0.9999)
        P = np.zeros((len(self.cells), len(self.cells)))
        np.add.at(P, (np.arange(len(P))[:, None], self.after), 1 / len(_MOVES))
        found: Float[np.ndarray, "S S"] = np.linalg.inv(np.eye(len(P)) - gamma * P)
        return found

    def reset(self, *, seed: int | None = None) -> tuple[Float[np.ndarray, "1 H W"], dict[str, Any]]:
        """Start in a state drawn at random (never the goal)."""
        if seed is not None:
            self._draw = np.random.default_rng(seed)
        starts = [s for cell, s in self.index.items() if cell != self.goal or len(self.index) == 1]
        self._state = int(self._draw.choice(starts))
        return self._seen(), {}

    def step(self, action: int) -> tuple[Float[np.ndarray, "1 H W"], float, bool, bool, dict[str, Any]]:
        """Observation, reward, whether it ended, whether it was cut off (never), and nothing else."""
        if not 0 <= action < len(_MOVES):
            raise InputError(f"the action is {action}; give 0 (up), 1 (right), 2 (down) or 3 (left).")
        r, c = self.cells[self._state] + _MOVES[action]
        self._state = self.index.get((int(r), int(c)), self._state)
        there = self.goal is not None and tuple(self.cells[self._state]) == self.goal
        return self._seen(), float(there), there, False, {}

    def _seen(self) -> Float[np.ndarray, "1 H W"]:
        image = np.zeros((1, *self.free.shape), dtype=np.float32)
        image[0, self.cells[self._state, 0], self.cells[self._state, 1]] = 1.0
        return image


def four_rooms(goal: tuple[int, int] | None = None) -> GridRooms:
    """The four rooms of 13 x 13 cells (104 of them free) that are common in the field."""
    return GridRooms(_FOUR_ROOMS.strip().splitlines(), goal=goal)
