"""Predictive auxiliary objectives (#61) on a grid of 8 x 8 cells, beside the same agent that learns Q alone.

Four latent numbers; the goal's cell is drawn by the seed; a random policy's episodes start anywhere and are cut off after 150
steps. One step of learning stands for one step of the walk. The truth is exact: from every cell the greedy policy's return is
gamma^(steps - 1), and the best has the distance for steps. **Prediction** (the sheet's): the full agent needs at most .8 of the
episodes of Q alone until its mean return is .9 of the best; the mean cosine of two cells' latents is at least .1 lower; their
effective rank (e to the entropy of the singular values' shares, not centred) is at least 1.5 times as high. **Refuted** if not.

The sheet compares medians over ten seeds; the claim here is the ratio seed by seed. An agent that never gets there counts with
all episodes of its walk. The paper's rate (1e-4) and renewal of Q' (every 1000 steps) are for about 35,000 steps; here they are
3e-3 and 100 for 2000. The sheet's third claim, a goal that moves under a frozen encoder, is not tried here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from manyheads.control.auxiliary_agent import (
    AGENT_TRAINING,
    Q_ONLY,
    AuxiliaryAgent,
    AuxiliaryWeights,
    learn_auxiliary_agent,
)
from manyheads.control.grid_rooms import GridRooms
from manyheads.control.random_walk import random_walk
from manyheads.evaluation import Claim, Experiment, register_experiment

SIDE, LATENT, GAMMA, CUT = 8, 4, 0.9, 150


@dataclass(frozen=True)
class OpenGridData:
    """How long one learns, and how often the greedy policy is looked at."""

    steps: int
    every: int = 50


class CutGrid(GridRooms):
    """An open grid whose episodes are cut off after 150 steps."""

    def reset(self, *, seed: int | None = None) -> tuple[Float[np.ndarray, "1 H W"], dict[str, Any]]:
        """As `GridRooms.reset`, and the count begins anew."""
        self._taken = 0
        return super().reset(seed=seed)

    def step(self, action: int) -> tuple[Float[np.ndarray, "1 H W"], float, bool, bool, dict[str, Any]]:
        """As `GridRooms.step`, cut off at the end of the count."""
        seen, reward, over, _, more = super().step(action)
        self._taken += 1
        return seen, reward, over, self._taken >= CUT, more


def share_of_best_return(env: GridRooms, actions: Int[np.ndarray, "S"]) -> float:
    """The mean discounted return of a policy on an open grid with a goal over all starts, divided by the best one's."""
    goal = env.index[env.goal] if env.goal is not None else -1
    distance = np.abs(env.cells - env.cells[goal]).sum(1)
    state, found = np.arange(len(env.cells)), np.zeros(len(env.cells))
    starts, going = distance > 0, distance > 0
    for k in range(CUT):
        state = np.where(going, env.after[state, actions[state]], state)
        arrived = going & (state == goal)
        found[arrived] = GAMMA**k
        going = going & ~arrived
    return float(found[starts].sum() / (GAMMA ** (distance[starts] - 1.0)).sum())


def mean_cosine(latents: Float[np.ndarray, "S D"]) -> float:
    """The mean cosine of two different rows."""
    one = latents / np.maximum(np.linalg.norm(latents, axis=1, keepdims=True), 1e-12)
    return float(((one @ one.T).sum() - (one * one).sum()) / (len(one) * (len(one) - 1)))


def effective_rank(latents: Float[np.ndarray, "S D"]) -> float:
    """Of singular values s the exponential of the entropy of s / sum(s): from 1 (all rows on a line) to D."""
    sizes = np.linalg.svd(latents.astype(np.float64), compute_uv=False)
    shares = sizes / max(sizes.sum(), 1e-12)
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum()))


def _run(weights: AuxiliaryWeights, data: OpenGridData, seed: int) -> Mapping[str, float]:
    goal = tuple(int(n) for n in np.random.default_rng([seed, 61]).integers(SIDE, size=2))
    env = CutGrid(["." * SIDE] * SIDE, goal=(goal[0], goal[1]))
    walk = random_walk(env, data.steps + AGENT_TRAINING.rows, seed=seed)
    begun = np.cumsum(np.append(True, walk.at[1:] != walk.then[:-1]))
    reached: list[int] = []

    def watch(steps: int, agent: AuxiliaryAgent) -> bool:
        if share_of_best_return(env, agent.q(env.images).argmax(1)) >= 0.9:
            reached.append(steps)
        return False

    settings = replace(AGENT_TRAINING, steps=data.steps, rate=3e-3)
    agent = learn_auxiliary_agent(
        walk,
        latent=LATENT,
        weights=weights,
        gamma=GAMMA,
        renewed=100,
        settings=settings,
        watch=watch,
        every=data.every,
        seed=seed,
    )
    latents, first = agent.latents(env.images), reached[0] if reached else data.steps
    return {
        "episodes": float(begun[first - 1]),
        "got there": float(bool(reached)),
        "return at the end": share_of_best_return(env, agent.q(env.images).argmax(1)),
        "cosine": mean_cosine(latents),
        "effective rank": effective_rank(latents),
    }


def _data(quick: bool) -> Mapping[str, OpenGridData]:
    return {"open grid": OpenGridData(300 if quick else 2000)}


FULL, ALONE = "full agent", "Q alone"
register_experiment(
    Experiment(
        "auxiliary-agent",
        (61,),
        "2310.06089",
        "Does an agent with few latent numbers learn sooner if its trunk also predicts its own next latent?",
        datasets=_data,
        methods={FULL: partial(_run, AuxiliaryWeights()), ALONE: partial(_run, Q_ONLY)},
        baseline=ALONE,
        claims=(
            Claim(
                "the full agent needs at most .8 of the episodes",
                lambda v: v[FULL, "episodes"] / v[ALONE, "episodes"],
                at_most=0.8,
            ),
            Claim(
                "Q alone has a cosine of latents at least .1 higher",
                lambda v: v[ALONE, "cosine"] - v[FULL, "cosine"],
                at_least=0.1,
            ),
            Claim(
                "the full agent's effective rank is at least 1.5 times as high",
                lambda v: v[FULL, "effective rank"] / v[ALONE, "effective rank"],
                at_least=1.5,
            ),
        ),
        minutes=2.0,
        lower=frozenset({"episodes", "cosine"}),
        room="control",
    )
)
