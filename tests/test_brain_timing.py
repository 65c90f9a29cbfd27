"""A spiking reservoir and its readouts: neurons one by one, least squares step by step, the sheet's claims, and real trials."""

import math

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from manyheads.brain.reservoir import SpikingReservoir
from manyheads.brain.timing import (
    TimedReadout,
    bump_heights,
    learn_timing,
    normalised_error,
    ridge_readout,
    timed_bumps,
)
from manyheads.brain.timing_claims import DELAYS, SwappedEvents, swapped_trials
from manyheads.cli import app
from manyheads.errors import InputError


def test_neurons_fire_as_izhikevichs_equations_say_one_by_one():
    """Without connections each neuron is alone: integrated here with plain numbers, in the order of the equations."""
    reservoir = SpikingReservoir(neurons=30, density=0.0, seed=3)
    draw = np.random.default_rng(3)
    excites, r = np.arange(30) < 24, draw.random(30)
    draw.random((30, 30)), draw.random((30, 30))
    drive, cued = 6.0 * draw.random(30), draw.random(30) < 1 / 3
    spikes = reservoir.spikes(200)
    for i in range(30):
        a, b, c, d = (
            (0.02, 0.2, -65 + 15 * r[i] ** 2, 8 - 6 * r[i] ** 2)
            if excites[i]
            else (0.02 + 0.08 * r[i], 0.25 - 0.05 * r[i], -65, 2)
        )
        v, u = -65.0, b * -65.0
        for t in range(200):
            current = drive[i] + (15.0 if cued[i] and t < 50 else 0.0)
            for _ in range(2):
                v = min(v + 0.5 * (0.04 * v * v + 5 * v + 140 - u + current), 30.0)
            u += a * (b * v - u)
            assert spikes[t, i] == (v >= 30)
            if v >= 30:
                v, u = c, u + d
    assert 0 < spikes.mean() < 0.2
    # Connections change when neurons fire; a trace sums to its spikes.
    whole = SpikingReservoir(neurons=30, density=0.5, seed=3)
    assert (whole.spikes(200) != spikes).any()
    alone = SpikingReservoir(neurons=30, density=0.0, seed=3, tau=4.0).traces(400)
    assert np.allclose(
        alone.sum(0), SpikingReservoir(neurons=30, density=0.0, seed=3).spikes(400).sum(0), rtol=0.6, atol=0.6
    )


def test_force_is_recursive_least_squares_step_by_step():
    draw = np.random.default_rng(0)
    traces, gate = draw.random((12, 5)), np.arange(12) > 2
    readout = TimedReadout(traces, gate, 2, "force")
    covariance, weights = np.eye(5) / (1e-3 * readout.power), np.zeros((5, 2))
    for _ in range(4):
        target = draw.normal(size=(12, 2))
        for s, y in zip(traces[gate], target[gate], strict=True):
            gain = covariance @ s / (1 + s @ covariance @ s)
            covariance = covariance - np.outer(gain, s @ covariance)
            weights = weights + np.outer(gain, y - s @ weights)
        readout.learn(target)
        assert np.abs(readout.weights - weights).max() < 1e-8


def test_a_local_step_sees_its_trace_and_the_error_of_its_readout():
    traces = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    readout = TimedReadout(traces, np.array([True, True, False]), 1, rate=0.5)
    assert readout.power == 2.5
    readout.learn(np.array([[1.0], [1.0], [9.0]]))
    assert readout.weights[:, 0].tolist() == pytest.approx([0.2, 0.4]), "the closed gate teaches nothing"
    # Its fixed point is the mean of what came.
    draw, heights = np.random.default_rng(0), []
    for _ in range(3000):
        readout.learn(np.full((3, 1), float(draw.random() < 0.3)))
        heights.append(readout.read()[0, 0])
    assert np.mean(heights[500:]) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_traces_of_a_reservoir_tell_the_time(seed):
    traces, bumps = SpikingReservoir(seed=seed).traces(500), timed_bumps(np.array(DELAYS), 500, 20.0)
    assert normalised_error(traces @ ridge_readout(traces, bumps), bumps) <= 0.15


def test_noise_destroys_timing():
    bumps = timed_bumps(np.array(DELAYS), 500, 20.0)
    errors = []
    for noise in (0.0, 5.0):
        reservoir = SpikingReservoir(seed=11, noise=noise)
        weights = ridge_readout(reservoir.traces(500, trial=0), bumps)
        errors.append(normalised_error(reservoir.traces(500, trial=1) @ weights, bumps))
    assert errors[0] < 0.15 and errors[1] > 1


def test_the_local_rule_learns_when_and_how_likely_and_learns_a_swap_where_least_squares_does_not():
    data = SwappedEvents()
    times = swapped_trials(data, 12)
    assert np.isnan(times[:300]).mean(0) == pytest.approx([0.2, 0.7], abs=0.08)
    local, force = (learn_timing(times, reservoir=SpikingReservoir(seed=12), rule=rule) for rule in ("local", "force"))
    heights = local.heights[200:300].mean(0)
    assert 2.1 <= heights[0] / heights[1] <= 3.3
    after = {
        name: one.errors[400:].mean() / one.errors[200:300].mean() for name, one in (("local", local), ("force", force))
    }
    assert after["force"] >= 1.25 and after["force"] > after["local"] + 0.2
    assert local.heights[400:].mean(0)[1] > 0.6 > force.heights[-1, 1]
    assert local.when.tolist() == pytest.approx(list(DELAYS), abs=20)


def test_heights_are_probabilities_where_all_is_known():
    bumps = timed_bumps(np.array([100.0, math.nan]), 300, 20.0)
    assert bumps[:, 1].max() == 0 and bumps[100, 0] == 1
    two = timed_bumps(np.array([100.0, 150.0]), 300, 20.0)
    assert bump_heights(two * [0.7, 0.2], two).tolist() == pytest.approx([0.7, 0.2])
    sure = learn_timing([[150.0, 250.0]] * 30, rule="force", averaged=5)
    assert sure.probability.tolist() == pytest.approx([1, 1], abs=0.02) and sure.when.tolist() == pytest.approx(
        [150, 250], abs=3
    )


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: learn_timing([1.0, 2.0]), "trials, events"),
        (lambda: learn_timing([[100.0, math.nan]]), "'event 1' never comes"),
        (lambda: learn_timing([[-1.0]]), "scale the times"),
        (lambda: learn_timing([[9000.0]]), "scale the times"),
        (lambda: learn_timing([["soon"]]), "not numbers"),
        (lambda: learn_timing([[100.0]], rule="magic"), "choose from"),
        (lambda: learn_timing([[100.0]], reservoir=SpikingReservoir(drive=0.0, cue=0.0)), "no neuron fires"),
        (lambda: SpikingReservoir(neurons=1), "neurons"),
        (lambda: TimedReadout(np.ones((3, 2)), np.ones(4, dtype=bool), 1), "a value a step"),
    ],
)
def test_wrong_input_gets_one_sentence(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_the_command_learns_from_a_file(tmp_path):
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"food": np.where(draw.random(40) < 0.5, 2.0, np.nan), "light": 3.0, "day": "monday"})
    frame.to_csv(tmp_path / "a.csv", index=False)
    told = [
        "brain",
        "timing",
        str(tmp_path / "a.csv"),
        "--scale",
        "100",
        "--rule",
        "force",
        "--events",
        "food",
        "--events",
        "light",
    ]
    found = CliRunner().invoke(app, [*told, "--page", str(tmp_path / "b.html")])
    assert found.exit_code == 0, found.output
    assert "food" in found.output and "What comes, when" in (tmp_path / "b.html").read_text("utf-8")
    for bad, said in (("z", "no column 'z'"), ("day", "no column of times")):
        assert said in CliRunner().invoke(app, [*told, "--events", bad]).output
