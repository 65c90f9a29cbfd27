"""Seeds that are trained together are what each would be alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.training import ADAM, TrainSettings, fit, fit_seeds, generator_of

SETTINGS = replace(ADAM, steps=15, rate=0.02, warmup=3, decay=0.5)


@dataclass(frozen=True)
class Rows:
    """A batch that is no plain tensor."""

    x: Tensor
    more: dict[str, Tensor]


class Net(nn.Module):
    """Something of every kind: matrices, a bias, a scalar, a buffer, a frozen part, and a method that is not forward."""

    def __init__(self, seed: int, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(4, width, generator=generator))
        self.b = nn.Parameter(torch.randn(width, generator=generator))
        self.c = nn.Parameter(torch.randn((), generator=generator))
        self.frozen = nn.Parameter(torch.randn(4, generator=generator), requires_grad=False)
        self.register_buffer("d", torch.randn(4, generator=generator))

    def predict(self, x: Tensor) -> Tensor:
        return ((x + self.d * self.frozen) @ self.a).tanh() @ self.b + self.c


def loss(model, batch):
    return (model.predict(batch.x) - batch.more["y"]).square().mean()


def batches_of(seed):
    def batch(number):
        generator = generator_of(seed, number)
        return Rows(torch.randn(8, 4, generator=generator), {"y": 5 * torch.randn(8, generator=generator)})

    return batch


def alone(seeds, how):
    models = [Net(seed) for seed in seeds]
    for seed, model in zip(seeds, models, strict=True):
        fit(model, batches_of(seed), how, loss=loss, device="cpu")
    return models


def together(seeds, how, **more):
    models = [Net(seed) for seed in seeds]
    fit_seeds(models, [batches_of(seed) for seed in seeds], how, loss=loss, **more)
    return models


def largest_difference(models, others):
    pairs = zip(models, others, strict=True)
    return max(
        float((a - b).detach().abs().max())
        for m, o in pairs
        for a, b in zip(m.parameters(), o.parameters(), strict=True)
    )


WAYS = {
    "adam": SETTINGS,
    "sgd": replace(SETTINGS, optimizer="sgd"),
    "adamw": replace(SETTINGS, optimizer="adamw", weight_decay=0.1, decayed="all"),
    "clipped": replace(SETTINGS, optimizer="sgd", clip=0.3),
}


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 10**4), min_size=2, max_size=5, unique=True), st.sampled_from(sorted(WAYS)))
def test_seeds_together_are_what_each_is_alone(seeds, way):
    expected, found = alone(seeds, WAYS[way]), together(seeds, WAYS[way])
    assert largest_difference(found, expected) < 1e-5
    assert largest_difference(found, [Net(seed) for seed in seeds]) > 1e-2  # they were trained
    for model, seed in zip(found, seeds, strict=True):
        torch.testing.assert_close(model.frozen, Net(seed).frozen, rtol=0, atol=0)


def test_the_norm_is_clipped_seed_by_seed_and_not_over_all():
    seeds = (0, 1, 2)
    mixed = [copy.deepcopy(model) for model in together(seeds, replace(WAYS["clipped"], clip=0.3 / 3**0.5))]
    assert largest_difference(alone(seeds, WAYS["clipped"]), mixed) > 1e-3


def test_the_models_are_as_they_are_then_when_somebody_looks():
    seen = {}
    models = [Net(seed) for seed in (3, 4)]

    def look(step):
        seen[step] = [copy.deepcopy(model) for model in models]

    fit_seeds(models, [batches_of(3), batches_of(4)], replace(SETTINGS, decay=0.0), loss=loss, look=look, every=5)
    assert list(seen) == [5, 10, 15]
    for step, now in seen.items():
        assert largest_difference(now, alone((3, 4), replace(SETTINGS, decay=0.0, steps=step))) < 1e-5


def test_one_seed_is_the_plain_loop_to_the_last_bit():
    assert largest_difference(together((5,), SETTINGS), alone((5,), SETTINGS)) == 0


@pytest.mark.parametrize(
    ("models", "how", "error", "words"),
    [
        ([Net(0), Net(1, width=5)], SETTINGS, InputError, "differ in class"),
        ([Net(0)], SETTINGS, InputError, "1 models and 2 batches"),
        ([Net(0), Net(1)], TrainSettings(steps=3), InputError, "would decay like a matrix"),
        ([Net(0), Net(1)], replace(SETTINGS, minutes=1.0), InputError, "no minutes"),
        ([Net(0), Net(1)], replace(SETTINGS, patience=1), InputError, "different steps"),
        ([nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.1)) for _ in "ab"], SETTINGS, UnsupportedError, "Dropout"),
        ([nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1)) for _ in "ab"], SETTINGS, UnsupportedError, "BatchNorm1d"),
    ],
)
def test_what_would_mix_seeds_is_refused(models, how, error, words):
    with pytest.raises(error, match=words):
        fit_seeds(models, [batches_of(0), batches_of(1)], how, loss=loss)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([lambda i: torch.zeros(3, 4), lambda i: torch.zeros(2, 4)], "different shapes"),
        ([lambda i: i, lambda i: i], "hold no tensors"),
    ],
)
def test_batches_that_cannot_be_stacked_are_refused(batches, words):
    with pytest.raises(InputError, match=words):
        fit_seeds([Net(0), Net(1)], batches, SETTINGS, loss=lambda model, x: model.predict(x).mean())


def test_a_loss_that_is_no_number_is_refused():
    draws = [batches_of(0), batches_of(1)]
    with pytest.raises(InputError, match="give one number"):
        fit_seeds([Net(0), Net(1)], draws, SETTINGS, loss=lambda model, batch: model.predict(batch.x))
