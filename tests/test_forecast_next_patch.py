"""Forecasters that say the next patch: what they are compared with, that they see no future, and that they roll out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from manyheads.errors import InputError
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.next_patch import NEXT_TARGET, NextPatchForecaster, next_patches
from manyheads.forecast.core.windows import Windows


class Patches(nn.Module):
    """A token is what patches 0 to j are: the last one, and the mean of all up to it."""

    def __init__(self, patch):
        super().__init__()
        self.patch, self.width = patch, 2 * patch
        self.size = nn.Parameter(torch.ones(1))

    def forward(self, past_values):
        x = past_values.transpose(1, 2).unflatten(-1, (-1, self.patch))
        means = x.cumsum(2) / torch.arange(1, x.shape[2] + 1)[:, None]
        return self.size * torch.cat([x, means], -1)


class Repeats(NextPatchForecaster):
    METHOD = "patches of tests"

    def trunk(self, shape):
        return Patches(self.patch)


def frame(values):
    return pd.DataFrame({"timestamp": pd.date_range("2024-01-01", periods=len(values), freq="h"), "target": values})


def test_each_token_is_compared_with_the_patch_after_it():
    values = np.arange(40.0)
    values[13] = np.nan
    df = frame(values)
    windows = Windows(panel_of(df, columns_of(df)), 12, 4, scaling="series")
    batch = windows.batch(np.array([[0, 20]]))
    wanted, counted = next_patches(tuple(batch[name] for name in NEXT_TARGET), 1, 3, 4)
    raw = windows.original(np.array([[0, 20]]), wanted.flatten(2)).reshape(3, 4)
    np.testing.assert_allclose(raw[1], [16, 17, 18, 19], rtol=1e-5)
    np.testing.assert_allclose(raw[2], [20, 21, 22, 23], rtol=1e-5)
    assert counted[0, 0].tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]  # steps 12 to 23; 13 is missing


def test_a_period_of_a_patch_is_learned_and_rolled_out_to_any_horizon():
    t = np.arange(600)
    y = np.sin(2 * np.pi * t / 24) + 0.05 * np.random.default_rng(0).normal(size=600)
    model = Repeats(horizon=96, context=72, patch=24, epochs=8, rate=3e-3).fit(frame(y))
    out = model.predict()
    truth = np.sin(2 * np.pi * np.arange(600, 696) / 24)
    assert np.abs(out["predictions"] - truth).max() < 0.35
    assert (model.predict(30)["predictions"].to_numpy() == out["predictions"].to_numpy()[:30]).all()
    first = model.predict(24, quantile_levels=(0.5,))["predictions"].to_numpy()
    grown = pd.concat([frame(y), frame(np.zeros(624)).iloc[600:].assign(target=first)])
    np.testing.assert_allclose(
        model.predict_df(grown)["predictions"][:24], out["predictions"][24:48], rtol=1e-3, atol=1e-4
    )


def test_contexts_that_are_no_whole_patches_are_refused():
    with pytest.raises(InputError, match="whole number of patches"):
        Repeats(context=50, patch=24)
    with pytest.raises(InputError, match="objective='point'"):
        Repeats(context=48, patch=24, objective="quantiles")
