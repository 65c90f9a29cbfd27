"""Proto-value networks (#98): features of an environment, learned before there is any reward.

Farebrother et al., arXiv:2304.12567. Psi(s, A) = sum_k gamma^k P(s_k in A | s_0 = s) counts the discounted visits of a uniformly
random policy to a set A of states. Task i has a set of its own, drawn by a frozen random network o_i, and its reward is

    r_i(s) = 1[o_i(s) + b_i > 0]                     b_i: so that a share p of states is in the set

whose value function is a column of Psi times that indicator. A trunk phi `[B, D]` with a linear head a task, q `[B, K, A]`,
learns all of them off-policy:

    loss = 1/2 mean_{B,K} (r_i(s) + gamma (1 - ended) mean_a' q'_i(s', a') - q_i(s, a))^2        q' a slow copy, .99 old + .01 new

The best D features for random sets span the top singular vectors of Psi; a linear head on the frozen phi then gives values of
rewards that were never trained. The mean over a' (and not the maximum) makes this evaluation of one policy, which is stable.

We differ: b_i is the exact quantile of o_i over the walk, which is the minimum that the paper's quantile regression goes to, and
stays as it is during learning. The random networks and phi end without a ReLU (`relu=True` puts the one of phi back): with few
features it kills units for good.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.control.random_walk import RandomWalk
from manyheads.control.trunks import observation_trunk
from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.learning import saved
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings, fit

KIND, METHOD = "proto-values", "Proto-value networks (#98)"
PROTO_TRAINING = replace(ADAM, steps=6000, rows=128, rate=2e-3, decay=0.25)
_TASKS_A_NETWORK = 10
_ROWS = 1024  # observations read at a time


class ProtoValueNetwork(nn.Module):
    """phi, and K heads that read it: `forward(x)` is q `[B, K, A]`."""

    def __init__(self, shape: tuple[int, ...], features: int, tasks: int, actions: int, relu: bool = False) -> None:
        super().__init__()
        trunk = observation_trunk(shape, features)
        self.trunk = nn.Sequential(trunk, nn.ReLU()) if relu else trunk
        # Without a bias: it would take the constant, the first singular vector of many environments, out of the features.
        self.heads = nn.Linear(features, tasks * actions, bias=False)
        nn.init.xavier_uniform_(self.heads.weight)
        self.tasks = tasks

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K A"]:
        q: Tensor = self.heads(self.trunk(x))
        return q.unflatten(1, (self.tasks, -1))

    def values(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """The uniform policy's values, the mean of q over actions."""
        found: Tensor = self.trunk(x) @ self.heads.weight.unflatten(0, (self.tasks, -1)).mean(1).T
        return found


@dataclass(frozen=True)
class ProtoValues:
    """A trained network. `rates` `[K]` are the shares of the walk's observations that are in each task's set, `loss` the last.

    Observations are divided by `scale`, the largest number of the walk, before they are read.
    """

    network: ProtoValueNetwork
    shape: tuple[int, ...]
    scale: float
    rates: Float[np.ndarray, "K"]
    loss: float
    settings: dict[str, Any]

    @torch.no_grad()
    def features(self, observations: Any) -> Float[np.ndarray, "N D"]:
        """Phi of observations `[N, *shape]`. `InputError` for another shape."""
        given = np.asarray(observations)
        if given.shape[1:] != self.shape or given.dtype.kind not in "biuf":
            raise InputError(f"observations have the shape {list(given.shape)}; give [N, {str(list(self.shape))[1:]}.")
        self.network.eval()
        parts = [
            self.network.trunk(_read(given[i : i + _ROWS], self.scale)).numpy() for i in range(0, len(given), _ROWS)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.settings["features"]), dtype=np.float32)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the network into a new folder, with a card that says how it was made."""
        about = {"shape": list(self.shape), "scale": self.scale, "rates": self.rates.tolist(), "loss": self.loss}
        card = saved.Card(method=METHOD, seed=self.settings["seed"], settings=self.settings, kind=KIND, about=about)
        return saved.save(folder, card, self.network, force=force)


def learn_proto_values(
    walk: RandomWalk,
    *,
    features: int = 16,
    tasks: int = 100,
    share: float = 0.01,
    gamma: float = 0.99,
    settings: TrainSettings = PROTO_TRAINING,
    relu: bool = False,
    seed: int = 0,
    bar: Bar = Bar(),
) -> ProtoValues:
    """Learn `features` features of a walk's observations from `tasks` random sets, each of a `share` of them.

    `InputError` for settings out of range, and where a set would be empty or everything: too few different observations.
    """
    check_integer(features, "features", 1, 65_536)
    check_integer(tasks, "tasks", 1, 100_000)
    check_number(share, "share", low=0.0, high=0.5, above=True)
    check_number(gamma, "gamma", low=0.0, high=0.9999)
    check_seed(seed)
    shape = tuple(walk.observations.shape[1:])
    scale = float(np.abs(walk.observations).max()) or 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        active = sets_of_states(walk.observations, scale, tasks, share)
        network = ProtoValueNetwork(shape, features, tasks, walk.n_actions, relu)
    rates = active.mean(0)
    if (rates == 0).any() or (rates == 1).any():
        raise InputError(
            "a random set is empty or has all observations; give a larger share, or a walk that sees more."
        )
    reward, slow = torch.from_numpy(active), copy.deepcopy(network).requires_grad_(False)

    def batch(i: int) -> dict[str, Tensor]:
        rows = np.random.default_rng([seed, i, 98]).integers(len(walk.at), size=settings.rows)
        at, then = walk.at[rows], walk.then[rows]
        return {
            "x": _read(walk.observations[at], scale),
            "then": _read(walk.observations[then], scale),
            "action": torch.from_numpy(walk.actions[rows]),
            "goes on": torch.from_numpy(~walk.ended[rows]).float(),
            "reward": reward[torch.from_numpy(at)].float(),
        }

    def loss(model: nn.Module, given: dict[str, Tensor]) -> Float[Tensor, ""]:
        with torch.no_grad():
            ahead = slow.values(given["then"])
            target = given["reward"] + gamma * given["goes on"][:, None] * ahead
        q = model(given["x"])
        taken = q[torch.arange(len(q)), :, given["action"]]
        return 0.5 * (target - taken).square().mean()

    def follow(*_: object) -> None:
        with torch.no_grad():
            for old, new in zip(slow.parameters(), network.parameters(), strict=True):
                old.lerp_(new, 0.01)

    progress = fit(
        network,
        batch,
        replace(settings, seed=seed),
        loss=loss,
        after_step=follow,
        device="cpu",
        bar=bar.step("proto-values", settings.steps),
    )
    about = {"features": features, "tasks": tasks, "share": share, "gamma": gamma, "relu": relu, "seed": seed}
    about |= {"actions": walk.n_actions, "steps": progress.step, "rows": settings.rows, "rate": settings.rate}
    return ProtoValues(network.eval(), shape, scale, rates, progress.loss, about)


def load_proto_values(folder: str | Path) -> ProtoValues:
    """What `ProtoValues.save` wrote. `InputError` for anything else, `MismatchError` where tensors do not fit the card."""
    card, tensors = saved.load(folder, KIND, "proto-value network")
    try:
        own, about = card.settings, card.about
        shape = tuple(check_integer(n, "shape", 1, 100_000) for n in about["shape"])
        features, tasks, n = (check_integer(own[name], name, 1, 100_000) for name in ("features", "tasks", "actions"))
        network = ProtoValueNetwork(shape, features, tasks, n, bool(own["relu"]))
        kept = float(about["scale"]), np.array(about["rates"], dtype=np.float64), float(about["loss"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"the card in {folder} is damaged; save the network again.") from None
    saved.fill(network, tensors, folder)
    return ProtoValues(network.eval(), shape, *kept, dict(own))


def sets_of_states(observations: Any, scale: float, tasks: int, share: float) -> Bool[np.ndarray, "M K"]:
    """Which observations are in each task's set: the `share` of them for which a random network's output is highest."""
    # What was seen before is not read again: on a grid a walk sees few observations, each often.
    places: dict[bytes, int] = {}
    back = np.array([places.setdefault(one.tobytes(), len(places)) for one in observations])
    once = observations[np.unique(back, return_index=True)[1]]
    found = []
    for first in range(0, tasks, _TASKS_A_NETWORK):
        outputs = min(_TASKS_A_NETWORK, tasks - first)
        network = observation_trunk(observations.shape[1:], outputs)
        with torch.no_grad():
            parts = [network(_read(once[i : i + _ROWS], scale)).numpy() for i in range(0, len(once), _ROWS)]
        raw = np.concatenate(parts)[back]
        found.append(raw > np.quantile(raw, 1 - share, axis=0))
    return np.concatenate(found, 1)


def _read(observations: Any, scale: float) -> Tensor:
    return torch.from_numpy(np.asarray(observations, dtype=np.float32) / np.float32(scale))
