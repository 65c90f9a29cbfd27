"""Forecasts as distributions over bins: their quantiles, their losses, and what a Fourier density is worth on a series."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Normal

from manyheads.forecast.baselines.linear import LinearForecaster
from manyheads.forecast.core.densities import DensityHorizonHead, DensitySettings


class InSeriesScale(LinearForecaster):
    SCALING = "series"


def gaussian_logits(mean, sd, settings):
    edges = settings.span * (2 * torch.arange(settings.bins + 1) / settings.bins - 1)
    cdf = Normal(mean, sd).cdf(edges)
    return (cdf[1:] - cdf[:-1]).clamp_min(1e-30).log()[None, None, None]


@pytest.mark.parametrize("mean, sd", [(0.0, 1.0), (-1.3, 0.4), (2.0, 0.7)])
def test_quantiles_of_a_distribution_over_bins_are_its_own(mean, sd):
    settings = DensitySettings(4, 1, 1, "bins", bins=500)
    head = DensityHorizonHead(settings)
    levels = (0.05, 0.25, 0.5, 0.9)
    found = head.quantiles(gaussian_logits(mean, sd, settings), levels)[0, 0, 0]
    torch.testing.assert_close(found, Normal(mean, sd).icdf(torch.tensor(levels)), atol=0.01, rtol=0)


def test_the_loss_is_the_cross_entropy_of_what_was_observed():
    settings = DensitySettings(3, 2, 1, "bins", bins=10, span=5.0)
    head = DensityHorizonHead(settings)
    output = torch.randn(4, 1, 2, 10).log_softmax(-1)
    future = torch.tensor([[-4.9, 9.0], [0.1, 0.0], [4.9, -9.0], [1.1, 0.0]])[:, None]
    counted = torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 0]])[:, None]
    picked = [
        output[0, 0, 0, 0],
        output[0, 0, 1, 9],
        output[1, 0, 0, 5],
        output[2, 0, 0, 9],
        output[2, 0, 1, 0],
        output[3, 0, 0, 6],
    ]
    torch.testing.assert_close(head.loss(output, (future, counted, torch.ones(4, 1))), -torch.stack(picked).mean())


@pytest.mark.parametrize("kind", ["fourier", "bins"])
def test_a_two_humped_future_is_seen_where_quantiles_know_no_hump(kind):
    """The next value is +2 or -2, whatever was before: between the humps there is next to nothing."""
    rng = np.random.default_rng(0)
    y = rng.choice([-2.0, 2.0], 3000) + 0.3 * rng.normal(size=3000)
    df = pd.DataFrame({"timestamp": pd.date_range("2024-01-01", periods=3000, freq="h"), "target": y})
    model = InSeriesScale(horizon=1, context=8, epochs=12, rows=64, rate=1e-2, objective=kind).fit(df)
    batch = model._windows(model.panel_).batch(np.array([[0, 2000], [0, 2500]]))
    logits = model.heads_(batch)[kind].softmax(-1)
    z = model.heads_.heads[kind].settings.span * (2 * (torch.arange(128) + 0.5) / 128 - 1)
    between, humps = logits[..., z.abs() < 0.4].sum(-1), logits[..., (z.abs() > 0.5) & (z.abs() < 1.6)].sum(-1)
    assert float(between.max()) < 0.1 and float(humps.min()) > 0.75
    out = model.predict(quantile_levels=(0.2, 0.8))
    assert out["0.2"].iloc[0] < -1 and out["0.8"].iloc[0] > 1
