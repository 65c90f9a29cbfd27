"""What the laboratory trains for several seeds at once is what each seed gives alone, with data of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from manyheads.evaluation import Together, experiments
from manyheads.lab.formation.abrupt import LEARNING, ItemLabelTask, abrupt_run, abrupt_runs
from manyheads.lab.formation.minimal_head import MinimalHead
from manyheads.lab.in_context.autoregression import AutoregressiveSeries, trained_hankels
from manyheads.lab.in_context.gradient_descent import RegressionTasks, best_descents, trained_attentions
from manyheads.lab.in_context.initial_guess import PriorRegressions, trained_guesses
from manyheads.lab.in_context.softmax_regression import NoisyRegressions, trained_regressors

SEEDS = (0, 3, 1)
SERIES = AutoregressiveSeries(length=1000)
TRAININGS = {
    "attention": lambda s: trained_attentions(RegressionTasks(3, 4), 2, seeds=s, length=10),
    "descent": lambda s: best_descents(RegressionTasks(3, 4), 2, plus=True, seeds=s, length=10),
    "softmax": lambda s: trained_regressors(NoisyRegressions(3, 8), seeds=s, length=10),
    "guess": lambda s: trained_guesses(PriorRegressions(), seeds=s, length=10),
    "Hankel": lambda s: trained_hankels([SERIES.draw(seed)[0] for seed in s], 3, 8, layers=2, seeds=s, length=10),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_seeds_trained_at_once_are_what_each_is_alone(name):
    train = TRAININGS[name]
    together, alone = train(SEEDS), [train([seed])[0] for seed in SEEDS]
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            np.testing.assert_allclose(a.detach(), b.detach(), atol=1e-5)
    first, second = (next(iter(model.parameters())).detach() for model in together[:2])
    assert abs(first - second).max() > 1e-5 or name == "descent"  # its seeds begin alike, and their tasks differ little


def test_each_seed_of_the_minimal_head_is_measured_on_its_own_sequences():
    seeds = (0, 1, 2)
    tasks = [ItemLabelTask(classes=16, labels=16, pairs=4, features=16, positions=16, seed=seed) for seed in seeds]
    settings = replace(LEARNING, steps=6, optimizer="sgd", rate=1.0)

    def heads():
        return [MinimalHead(task, seed=seed) for task, seed in zip(tasks, seeds, strict=True)]

    given = {"settings": settings, "every": 2, "looked_at": 50}
    together = abrupt_runs(tasks, heads(), seeds=seeds, **given)
    for task, model, seed, run in zip(tasks, heads(), seeds, together, strict=True):
        expected = abrupt_run(task, model, seed=seed, **given)
        assert run.updates.tolist() == [0, 2, 4, 6] and run.seed == seed
        for name, values in expected.measures.items():
            np.testing.assert_allclose(run[name], values, atol=1e-5)


def test_the_small_models_of_the_laboratory_run_their_seeds_at_once():
    at_once = {
        name: [method for method, run in one.methods.items() if isinstance(run, Together)]
        for name, one in experiments("lab").items()
    }
    assert at_once["in-context-descent"] == ["one layer"] and at_once["softmax-regression"] == ["one head", "two heads"]
    assert at_once["abrupt"] == ["minimal head"] and len(at_once["autoregression"]) == 5
    assert at_once["initial-guess"] == ["trained guess", "trained without"]
