"""Predictive auxiliary objectives (#61): the loss by hand, and an agent whose optimal steps are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from manyheads.control.auxiliary_agent import (
    AGENT_TRAINING,
    Q_ONLY,
    AuxiliaryNetwork,
    AuxiliaryWeights,
    auxiliary_loss,
    learn_auxiliary_agent,
)
from manyheads.control.auxiliary_agent_claims import CutGrid, effective_rank, mean_cosine, share_of_best_return
from manyheads.control.grid_rooms import GridRooms
from manyheads.control.random_walk import random_walk
from manyheads.errors import InputError


def _batch(n=5):
    torch.manual_seed(1)
    given = {"x": torch.rand(n, 1, 6, 6), "then": torch.rand(n, 1, 6, 6), "reward": torch.rand(n)}
    given |= {"action": torch.arange(n) % 3, "next action": (torch.arange(n) + 1) % 3}
    return given | {"goes on": torch.tensor([1.0, 1, 0, 1, 1]), "has next": torch.tensor([1.0, 0, 0, 1, 1])}


def test_the_loss_is_the_papers_row_by_row():
    torch.manual_seed(0)
    net, slow, given = AuxiliaryNetwork((1, 6, 6), 4, 3), AuxiliaryNetwork((1, 6, 6), 4, 3), _batch()
    w, g, gamma, total = AuxiliaryWeights(0.3, 0.5, 0.7, 0.9), 0.5, 0.8, 0.0
    z, after = net.encoder(given["x"]), net.encoder(given["then"])
    for i in range(5):
        a, b = (torch.eye(3)[given[name][i]] for name in ("action", "next action"))
        target = after[i] + g * given["has next"][i] * net.transition(torch.cat([after[i], b]))
        total += w.predict * (net.transition(torch.cat([z[i], a])) - target).square().sum()
        total += w.neighbours * torch.exp(-5 * (z[i] - after[i]).norm())
        total += w.others * torch.exp(-5 * (z[i] - z[i - 1]).norm())
        best = net.q(after[i]).argmax()
        value = given["reward"][i] + gamma * given["goes on"][i] * slow(given["then"])[i, best]
        total += w.values * (value - net.q(z[i])[given["action"][i]]).square()
    torch.testing.assert_close(auxiliary_loss(net, slow, given, w, g, gamma), total / 5)


def test_the_next_latent_gets_a_gradient_and_the_bootstrapped_term_none():
    torch.manual_seed(0)
    net, given = AuxiliaryNetwork((1, 6, 6), 4, 3), _batch()
    only = AuxiliaryWeights(1.0, 0.0, 0.0, 0.0)
    auxiliary_loss(net, net, given, only, 0.5, 0.9).backward()
    found = {name: one.grad.clone() for name, one in net.named_parameters() if one.grad is not None}
    net.zero_grad()
    z, after = net.encoder(given["x"]), net.encoder(given["then"])
    later = (0.5 * given["has next"][:, None] * net.ahead(after, given["next action"])).detach()
    (net.ahead(z, given["action"]) - after - later).square().sum(1).mean().backward()
    for name, one in net.named_parameters():
        if name.startswith(("encoder", "transition")):
            torch.testing.assert_close(found[name], one.grad)


def test_an_agent_learns_the_shortest_ways_and_other_walks_are_refused():
    env = GridRooms(["......"] * 6, goal=(5, 5))
    walk = random_walk(env, 3000, seed=0)
    settings = replace(AGENT_TRAINING, steps=1500, rate=3e-3)
    agent = learn_auxiliary_agent(walk, settings=settings, renewed=100)
    distance = np.abs(env.cells - 5).sum(1)
    there = env.after[np.arange(36), agent.q(env.images).argmax(1)]
    nearer = (distance[there] < distance)[distance > 0]
    assert nearer.mean() > 0.9, nearer.mean()
    assert agent.latents(env.images).shape == (36, 8)
    kept = learn_auxiliary_agent(
        walk, settings=replace(settings, steps=5), weights=Q_ONLY, frozen=agent.network.encoder, seed=3
    )
    np.testing.assert_array_equal(kept.latents(env.images), agent.latents(env.images))
    with pytest.raises(InputError, match="no reward"):
        learn_auxiliary_agent(random_walk(GridRooms(["...."] * 4), 100))
    with pytest.raises(InputError, match="shape"):
        agent.q(np.zeros((2, 1, 5, 6)))
    with pytest.raises(InputError, match="longer walk"):
        learn_auxiliary_agent(random_walk(env, 10))


def test_returns_cosines_and_ranks_are_those_of_constructed_policies_and_latents():
    env = CutGrid(["." * 8] * 8, goal=(7, 7))
    down_then_right = np.where(env.cells[:, 0] < 7, 2, 1)
    assert share_of_best_return(env, down_then_right) == pytest.approx(1.0)
    # Always down arrives from the goal's own column alone: distances 1 to 7.
    best = sum(0.9 ** (r + c - 1) for r in range(8) for c in range(8) if r + c)
    assert share_of_best_return(env, np.full(64, 2)) == pytest.approx(sum(0.9**k for k in range(7)) / best)
    assert mean_cosine(np.ones((5, 3))) == pytest.approx(1.0)
    assert mean_cosine(np.eye(4)) == pytest.approx(0.0)
    assert effective_rank(np.ones((5, 3))) == pytest.approx(1.0)
    assert effective_rank(np.eye(4)) == pytest.approx(4.0)
