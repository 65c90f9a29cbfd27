"""Proto-value features: the grid's truth, the walk, the sets, the loss, and files; features beside the exact singular vectors."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.control import GridRooms, four_rooms, learn_proto_values, load_proto_values, random_walk
from manyheads.control.environments import open_environment
from manyheads.control.proto_values import PROTO_TRAINING, sets_of_states
from manyheads.control.proto_values_claims import fit_of_values, share_of_subspace
from manyheads.control.trunks import observation_trunk
from manyheads.errors import InputError


def test_discounted_visits_of_four_rooms_are_those_that_a_random_policy_counts():
    env, gamma = four_rooms(), 0.8
    psi = env.successor_measure(gamma)
    assert psi.shape == (104, 104)
    assert np.allclose(psi.sum(1), 1 / (1 - gamma))
    # Counted: many short episodes from one cell.
    draw, start, runs = np.random.default_rng(0), 3, 4000
    state, counted = np.full(runs, start), np.zeros(104)
    for k in range(40):
        np.add.at(counted, state, gamma**k / runs)
        state = env.after[state, draw.integers(4, size=runs)]
    assert np.abs(counted - psi[start]).max() < 0.03


def test_a_walk_is_what_the_environment_did():
    env = GridRooms(["#####", "#   #", "#####"], goal=(1, 3))
    walk = random_walk(env, 400, seed=1)
    cell = walk.observations.reshape(-1, 15).argmax(1) % 5 - 1
    before, after = cell[walk.at], cell[walk.then]
    move = np.array([0, 1, 0, -1])[walk.actions]
    assert (after == np.clip(before + move, 0, 2)).all()
    assert (walk.ended == (after == 2)).all()
    assert (walk.rewards == walk.ended).all()
    assert walk.ended.any()
    assert (walk.at[1:][walk.ended[:-1]] == walk.then[:-1][walk.ended[:-1]] + 1).all()


def test_sets_are_the_least_of_the_quantile_loss():
    """The paper's bias minimises mean(u ((1-p) - 1[u<0])), u = o + b; no other bias on a grid does better than ours."""
    draw = np.random.default_rng(0)
    seen = draw.normal(size=(500, 6)).astype(np.float32)
    torch.manual_seed(0)
    active = sets_of_states(seen, 1.0, 10, 0.05)
    assert active.shape == (500, 10)
    assert (active.sum(0) == 25).all()
    torch.manual_seed(0)
    with torch.no_grad():
        raw = observation_trunk((6,), 10)(torch.from_numpy(seen)).numpy().astype(float)
    bias = -np.quantile(raw, 0.95, axis=0)

    def pinball(b: np.ndarray) -> np.ndarray:
        u = raw + b
        return (u * (0.95 - (u < 0))).mean(0)

    for shift in np.linspace(-1, 1, 41):
        assert (pinball(bias) <= pinball(bias + shift) + 1e-9).all()


def test_with_as_many_features_as_states_heads_learn_the_exact_visits():
    """On a corridor of three cells q, averaged over actions, must become Psi of each set; a maximum over actions would not."""
    env, gamma = GridRooms(["#####", "#   #", "#####"]), 0.5
    walk = random_walk(env, 2000, seed=0)
    found = learn_proto_values(
        walk, features=8, tasks=10, share=0.4, gamma=gamma, settings=replace(PROTO_TRAINING, steps=1200, rows=64)
    )
    torch.manual_seed(0)
    active = sets_of_states(walk.observations, 1.0, 10, 0.4)
    cells = walk.observations.reshape(len(active), -1).argmax(1) - 6
    sets = np.stack([active[cells == s][0] for s in range(3)]).astype(float)
    with torch.no_grad():
        q = found.network(torch.from_numpy(env.images)).mean(2).numpy()
    assert np.abs(q - env.successor_measure(gamma) @ sets).max() < 0.05
    assert 0.2 < sets.mean() < 0.8


def test_measures_know_the_span_and_the_fit():
    draw = np.random.default_rng(0)
    U = np.linalg.qr(draw.normal(size=(30, 30)))[0]
    assert share_of_subspace(U[:, :5] @ draw.normal(size=(5, 5)), U[:, :5]) == pytest.approx(1)
    assert share_of_subspace(U[:, 3:8], U[:, :6]) == pytest.approx(0.5)
    assert share_of_subspace(np.zeros((30, 4)), U[:, :6]) == 0
    values = U[:, :3] @ draw.normal(size=(3, 7)) + 4
    assert fit_of_values(U[:, :3], values) == pytest.approx(1)
    assert fit_of_values(U[:, 10:12], values) < 0.4


def test_a_network_is_saved_and_loaded_and_wrong_input_is_refused(tmp_path):
    walk = random_walk(four_rooms(), 3000, seed=0)
    found = learn_proto_values(walk, features=4, tasks=5, share=0.1, settings=replace(PROTO_TRAINING, steps=3))
    found.save(tmp_path / "phi")
    again = load_proto_values(tmp_path / "phi")
    images = four_rooms().images
    assert np.array_equal(again.features(images), found.features(images))
    assert found.features(images).shape == (104, 4)
    for wrong, words in [
        (lambda: found.features(images[:, :, :5]), "shape"),
        (lambda: learn_proto_values(random_walk(_Env([np.ones(3)]), 9)), "sees more"),
        (lambda: random_walk(object()), "no environment"),
        (lambda: random_walk(_Env([np.zeros(3), np.zeros(4)]), 5), "shapes"),
        (lambda: random_walk(_Env([np.zeros(3), np.full(3, np.nan)]), 5), "NaN"),
        (lambda: random_walk(_Env([{"text": 1}]), 5), "no image"),
        (lambda: load_proto_values(tmp_path), "no proto-value network"),
        (lambda: GridRooms(["##", "#"]), "rectangle"),
        (lambda: four_rooms(goal=(0, 0)), "no free cell"),
    ]:
        with pytest.raises(InputError, match=words):
            wrong()


def test_frames_of_a_game_go_through_the_larger_network():
    """Channels last, as gymnasium gives frames; and a stack of frames, channels first."""
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 255, (40, 32, 3), dtype=np.uint8) for _ in range(50)]
    walk = random_walk(_Env(frames), 60, seed=0)
    found = learn_proto_values(walk, features=6, tasks=10, share=0.1, settings=replace(PROTO_TRAINING, steps=2, rows=8))
    assert found.features(walk.observations[:3]).shape == (3, 6)
    assert observation_trunk((4, 40, 40), 6)(torch.zeros(2, 4, 40, 40)).shape == (2, 6)


class _Env:
    """Shows the given observations one after another, round and round, whatever is done."""

    def __init__(self, shown):
        self.shown, self.at, self.action_space = shown, 0, SimpleNamespace(n=2)

    def reset(self, seed=None):
        return self.shown[0], {}

    def step(self, action):
        self.at += 1
        return self.shown[self.at % len(self.shown)], 0.0, False, self.at % 7 == 0, {}


def test_the_command_saves_features_and_says_what_is_missing(tmp_path, monkeypatch):
    line = f"control features four-rooms --walked 3000 --steps 5 --out {tmp_path / 'phi'}"
    assert "Wrote" in CliRunner().invoke(app, line.split()).output
    assert load_proto_values(tmp_path / "phi").features(four_rooms().images).shape == (104, 16)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(InputError, match="manyheads"):
        open_environment("CartPole-v1")


@pytest.mark.slow
def test_features_of_a_real_environment_of_gymnasium():
    pytest.importorskip("gymnasium")
    pytest.importorskip("minigrid")
    env = open_environment("MiniGrid-FourRooms-v0", "minigrid")
    walk = random_walk(env, 2000, seed=0)
    assert walk.observations.shape[1:] == (7, 7, 3)
    found = learn_proto_values(walk, share=0.05, tasks=20, settings=replace(PROTO_TRAINING, steps=300))
    assert np.isfinite(found.features(walk.observations[:10])).all()
    with pytest.raises(InputError, match="gymnasium has no"):
        open_environment("NoSuchThing-v0")


@pytest.mark.slow
def test_features_from_random_sets_span_what_the_exact_singular_vectors_span():
    env, gamma = four_rooms(), 0.9
    psi = env.successor_measure(gamma)
    phi = learn_proto_values(
        random_walk(env, 100_000, seed=0), share=0.05, gamma=gamma, settings=replace(PROTO_TRAINING, steps=6000)
    ).features(env.images)
    U = np.linalg.svd(psi)[0]
    unseen = psi[:, ::2]
    assert fit_of_values(phi, unseen) > 0.85 * fit_of_values(U[:, :16], unseen)
    assert share_of_subspace(phi, U[:, :8]) > 0.85
