"""Predictive auxiliary objectives (#61): a Q-learner whose trunk also predicts what its own latent will be next.

Fang & Stachenfeld, arXiv:2310.06089. An encoder gives a latent z `[B, D]`, a Q network reads it, and a transition network
T(z, a) predicts the latent after action a. With sg for a value that gets no gradient and `|.|` the Euclidean norm,

    L+   = mean |T(z_t, a_t) - (z_{t+1} + g sg[T(z_{t+1}, a_{t+1})])|^2        g: how far ahead is predicted, 0 for one step
    L-nb = mean exp(-5 |z_t - z_{t+1}|)                                       neighbours in time are kept apart
    L-rnd = mean exp(-5 |z_t - z_j|)                                          and so are rows j of the batch rolled by one
    L    = w1 L+ + w2 L-nb + w3 L-rnd + w4 (r + gamma (1 - ended) Q'(s', argmax_a Q(s', a)) - Q(s, a))^2

Q' is a copy of Q, renewed every `renewed` steps. z_{t+1} in L+ gets a gradient, as in the authors' code: L-nb and L-rnd are what
keeps all latents from becoming one. Behaviour is random, so that the data are a `RandomWalk`; step i of learning draws from what
the walk had met by then, and one step of learning stands for one step in the environment.

We differ: where an episode ends or is cut off there is no next action, and the term with g is left out. Observations that are no
small images are read by `observation_trunk`. The squared error of Q is not clipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.control.random_walk import RandomWalk
from manyheads.control.trunks import observation_trunk
from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings, fit

AGENT_TRAINING = replace(ADAM, steps=20_000, rows=32, rate=1e-4, decay=0.0)
_APART = 5.0
_HIDDEN = 16
_ROWS = 1024


@dataclass(frozen=True)
class AuxiliaryWeights:
    """w1 to w4 of the formula. All but the last at zero is the agent without auxiliary objectives, `Q_ONLY`."""

    predict: float = 1e-2
    neighbours: float = 1e-1
    others: float = 1e-1
    values: float = 1.0


Q_ONLY = AuxiliaryWeights(0.0, 0.0, 0.0, 1.0)


class AuxiliaryNetwork(nn.Module):
    """The encoder, the Q network and the transition network. `forward(x)` is Q `[B, A]`."""

    def __init__(self, shape: tuple[int, ...], latent: int, actions: int) -> None:
        super().__init__()
        self.encoder = _encoder(shape, latent)
        self.q = nn.Sequential(nn.ReLU(), nn.Linear(latent, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, actions))
        self.transition = nn.Sequential(
            nn.ReLU(), nn.Linear(latent + actions, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, latent)
        )
        self.actions = actions

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B A"]:
        found: Tensor = self.q(self.encoder(x))
        return found

    def ahead(self, z: Float[Tensor, "B D"], action: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """T(z, a)."""
        found: Tensor = self.transition(torch.cat([z, F.one_hot(action, self.actions).to(z.dtype)], 1))
        return found


@dataclass(frozen=True)
class AuxiliaryAgent:
    """A trained agent. Observations are divided by `scale`, the largest number of its walk."""

    network: AuxiliaryNetwork
    shape: tuple[int, ...]
    scale: float
    settings: dict[str, Any]

    def latents(self, observations: Any) -> Float[np.ndarray, "N D"]:
        """The latents of observations `[N, *shape]`. `InputError` for another shape."""
        return self._of(self.network.encoder, observations)

    def q(self, observations: Any) -> Float[np.ndarray, "N A"]:
        """Q of observations `[N, *shape]`; its arg-max is the action. `InputError` for another shape."""
        return self._of(self.network, observations)

    @torch.no_grad()
    def _of(self, part: nn.Module, observations: Any) -> Float[np.ndarray, "N E"]:
        given = np.asarray(observations)
        if given.shape[1:] != self.shape or given.dtype.kind not in "biuf" or len(given) == 0:
            raise InputError(f"observations have the shape {list(given.shape)}; give [N, {str(list(self.shape))[1:]}.")
        part.eval()
        return np.concatenate(
            [part(_read(given[i : i + _ROWS], self.scale)).numpy() for i in range(0, len(given), _ROWS)]
        )


def auxiliary_loss(
    network: AuxiliaryNetwork,
    slow: nn.Module,
    given: dict[str, Tensor],
    weights: AuxiliaryWeights,
    g: float,
    gamma: float,
) -> Float[Tensor, ""]:
    """L of the formula, for a batch of steps: x, then, action, reward, goes on, next action, and whether there is a next one."""
    z, after = network.encoder(given["x"]), network.encoder(given["then"])
    q = network.q(z)
    with torch.no_grad():
        best = network.q(after).argmax(1, keepdim=True)
        target = given["reward"] + gamma * given["goes on"] * slow(given["then"]).gather(1, best)[:, 0]
    loss = weights.values * (target - q.gather(1, given["action"][:, None])[:, 0]).square().mean()
    if weights.predict:
        with torch.no_grad():
            later = g * given["has next"][:, None] * network.ahead(after, given["next action"])
        loss = loss + weights.predict * (network.ahead(z, given["action"]) - after - later).square().sum(1).mean()
    for weight, other in ((weights.neighbours, after), (weights.others, z.roll(1, 0))):
        if weight:
            loss = loss + weight * torch.exp(-_APART * torch.linalg.vector_norm(z - other, dim=1)).mean()
    return loss


def learn_auxiliary_agent(
    walk: RandomWalk,
    *,
    latent: int = 8,
    weights: AuxiliaryWeights = AuxiliaryWeights(),
    g: float = 0.0,
    gamma: float = 0.9,
    renewed: int = 1000,
    settings: TrainSettings = AGENT_TRAINING,
    frozen: nn.Module | None = None,
    watch: Callable[[int, AuxiliaryAgent], bool] | None = None,
    every: int = 250,
    seed: int = 0,
    bar: Bar = Bar(),
) -> AuxiliaryAgent:
    """Learn to act from what a random policy meets in any environment with counted actions.

    `frozen` is an encoder learned before, which is copied and kept: only Q (and T) are learned then. `watch(steps, agent)` is
    called every `every` steps and ends the run by returning True. `InputError` for settings out of range, for a walk that is
    shorter than a batch, and for one that met no reward: its values are all zero.
    """
    check_integer(latent, "latent", 1, 65_536)
    check_number(g, "g", low=0.0, high=0.99)
    check_number(gamma, "gamma", low=0.0, high=0.9999)
    check_integer(renewed, "renewed", 1, 1_000_000)
    check_integer(every, "every", 1, 1_000_000)
    check_seed(seed)
    for name, weight in vars(weights).items():
        check_number(weight, f"the weight {name}", low=0.0, high=1e6)
    if len(walk.at) <= settings.rows:
        raise InputError(f"the walk has {len(walk.at)} steps and a batch {settings.rows}; give a longer walk.")
    if not walk.rewards.any():
        raise InputError("the walk met no reward, so that there is nothing to learn; give a longer one.")
    shape = tuple(walk.observations.shape[1:])
    scale = float(np.abs(walk.observations).max()) or 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AuxiliaryNetwork(shape, latent, walk.n_actions)
    if frozen is not None:
        network.encoder = copy.deepcopy(frozen).requires_grad_(False)
    slow = copy.deepcopy(network).requires_grad_(False)
    # The last step of a walk has no next one, nor has one after which the next begins elsewhere.
    follows = np.append(walk.at[1:] == walk.then[:-1], False) & ~walk.ended
    next_action = np.append(walk.actions[1:], 0)
    about: dict[str, Any] = {
        "latent": latent,
        "g": g,
        "gamma": gamma,
        "renewed": renewed,
        "seed": seed,
        "actions": walk.n_actions,
    }
    about |= {"weights": vars(weights), "rows": settings.rows, "rate": settings.rate}

    def batch(i: int) -> dict[str, Tensor]:
        met = min(len(walk.at), settings.rows + i)
        rows = np.random.default_rng([seed, i, 61]).integers(met, size=settings.rows)
        return {
            "x": _read(walk.observations[walk.at[rows]], scale),
            "then": _read(walk.observations[walk.then[rows]], scale),
            "action": torch.from_numpy(walk.actions[rows]).long(),
            "reward": torch.from_numpy(walk.rewards[rows]).float(),
            "goes on": torch.from_numpy(~walk.ended[rows]).float(),
            "next action": torch.from_numpy(next_action[rows]).long(),
            "has next": torch.from_numpy(follows[rows]).float(),
        }

    def loss(model: nn.Module, given: dict[str, Tensor]) -> Float[Tensor, ""]:
        return auxiliary_loss(network, slow, given, weights, g, gamma)

    def after_step(progress: Any, _: object) -> bool:
        if progress.step % renewed == 0:
            slow.load_state_dict(network.state_dict())
        if watch is None or progress.step % every:
            return True
        ended = watch(progress.step, AuxiliaryAgent(network, shape, scale, about))
        network.train()
        return not ended

    step = bar.step("agent", settings.steps)
    progress = fit(
        network, batch, replace(settings, seed=seed), loss=loss, after_step=after_step, device="cpu", bar=step
    )
    return AuxiliaryAgent(network.eval(), shape, scale, about | {"steps": progress.step})


def _encoder(shape: tuple[int, ...], latent: int) -> nn.Module:
    """The paper's convolutions for small images `[C, H, W]`, else `observation_trunk`."""
    if len(shape) != 3 or not (shape[0] <= 4 and min(shape[1:]) >= 4 and max(shape[1:]) <= 32):
        return observation_trunk(shape, latent)
    side = [(n - 2) // 2 for n in shape[1:]]
    parts = [nn.Conv2d(shape[0], 16, 2), nn.ReLU(), nn.Conv2d(16, 32, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(32 * side[0] * side[1], 32), nn.ReLU(), nn.Linear(32, latent))


def _read(observations: Any, scale: float) -> Tensor:
    return torch.from_numpy(np.asarray(observations, dtype=np.float32) / np.float32(scale))
