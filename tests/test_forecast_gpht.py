"""GPHT: no token sees a later one, each stage is given what is left over, tuning moves heads alone, and it is saved whole."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import manyheads as mh
from manyheads.errors import InputError
from manyheads.evaluation import experiment
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.transformers.gpht import GPHT, GPHTConfig, GPHTTrunk, shifted


def trunk(pools=(4, 2, 1), patch=16, tokens=7, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "stage_layers": 1}
    return GPHTTrunk(GPHTConfig(**sizes, pools=pools, patch=patch, context_length=patch * tokens, **more)).eval()


def frame(values, **more):
    times = pd.date_range("2024-01-01", periods=len(values), freq="h")
    return pd.DataFrame({"timestamp": times, "target": values}).assign(**more)


def waves(n=300, seed=0):
    t, rng = np.arange(n), np.random.default_rng(seed)
    return np.sin(2 * np.pi * t / 12) + 0.5 * np.sin(2 * np.pi * t / 24 + seed) + 0.05 * rng.normal(size=n)


@pytest.mark.parametrize("pools", [(4,), (2,), (1,), (4, 2, 1)])
def test_a_token_changes_its_own_block_and_no_earlier_one(pools):
    model, x = trunk(pools), torch.randn(2, 112, 1)
    with torch.no_grad():
        before = model(x).last_hidden_state[..., :16]
        for j in range(7):
            other = x.clone()
            other[:, 16 * j : 16 * (j + 1)] += 3.0
            off = (model(other).last_hidden_state[..., :16] - before).abs().amax((0, 1, 3))
            assert (off[:j] < 1e-6).all()
            assert off[j] > 1e-4


def test_pooling_is_the_maximum_and_stages_are_given_what_is_left_over():
    model, x = trunk(), torch.randn(3, 112)
    with torch.no_grad():
        for s, head in enumerate(model.heads):
            head.weight.zero_()
            head.bias.copy_(torch.arange(16.0) + s)
        passes = list(model.stages(x))
    first = passes[0][2]
    assert torch.equal(passes[1][0], x - shifted(first, 16))
    assert torch.equal(passes[2][0], passes[1][0] - shifted(passes[1][2], 16))
    assert torch.equal(shifted(first, 16)[:, :16], torch.zeros(3, 16))
    assert torch.equal(shifted(first, 16)[:, 16:32], first[:, :16])
    said = model(x[..., None]).last_hidden_state[:, 0, :, :16].flatten(1)
    torch.testing.assert_close(said, sum(o for _, _, o in passes))
    lower = x.clone()
    lower.view(3, -1, 4)[..., :3] = lower.view(3, -1, 4).amin(
        -1, keepdim=True
    )  # all but the last of four, below the maximum
    lower.view(3, -1, 4)[..., 3] = x.view(3, -1, 4).amax(-1)
    states = [next(iter(model.stages(rows)))[1] for rows in (x, lower)]
    assert torch.equal(*states)


@pytest.fixture(scope="module")
def fitted():
    df = pd.concat([frame(waves(seed=s), item_id=f"s{s}") for s in range(2)])
    sizes = dict(context=48, patch=12, pools=(4, 2, 1), width=16, n_heads=2, hidden=32, dropout=0.0)
    return GPHT(horizon=36, **sizes, epochs=8, rows=32, rate=3e-3).fit(df), df


def test_with_heads_of_zero_the_forecast_is_the_mean_of_the_window(fitted):
    model, df = fitted
    heads = model.backbone.heads
    kept = {name: value.clone() for name, value in heads.state_dict().items()}
    with torch.no_grad():
        for head in heads:
            head.weight.zero_()
            head.bias.zero_()
    try:
        found = model.predict(12)
    finally:
        heads.load_state_dict(kept)
    for name, part in df.groupby("item_id"):
        own = found[found["item_id"] == name]["predictions"]
        np.testing.assert_allclose(own, part["target"].to_numpy()[-48:].mean(), atol=1e-5)


def test_it_learns_and_one_model_serves_any_horizon(fitted):
    model, _ = fitted
    found = model.predict(60)
    assert (model.predict(20).groupby("item_id").head(20)["predictions"].to_numpy() ==
            found.groupby("item_id").head(20)["predictions"].to_numpy()).all()  # fmt: skip
    for s in range(2):
        truth = waves(360, seed=s)[300:]
        off = found[found["item_id"] == f"s{s}"]["predictions"].to_numpy() - truth
        assert (off**2).mean() < 0.3 * truth.var()


def test_tuning_on_another_frame_moves_the_heads_alone_and_leaves_the_first_model(fitted):
    model, _ = fitted
    before = {name: value.clone() for name, value in model._tensors().items()}
    other = frame(3 * waves(seed=5) + 7, second=np.cos(np.arange(300)))
    tuned = model.tune_heads(other, target=["target", "second"], steps=4, rate=1e-2)
    after = {name: value for name, value in tuned._tensors().items() if not name.startswith("scales")}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    parts = [f"backbone.heads.{s}.{kind}" for s in range(3) for kind in ("weight", "bias")]
    assert moved == {*parts, "heads.quantiles.linear.weight", "heads.quantiles.linear.bias"}
    assert all(torch.equal(value, before[name]) for name, value in model._tensors().items())
    assert all(p.requires_grad for p in tuned.backbone.parameters())
    assert len(tuned.predict(24)) == 48


def test_without_tuning_another_frame_is_forecast_by_the_same_weights(fitted):
    model, df = fitted
    again = model.zero_shot(df.rename(columns={"target": "y", "item_id": "unique_id", "timestamp": "ds"}))
    # The scales of the series are of other parts of them, which windows forget.
    np.testing.assert_allclose(again.predict()["gpht"], model.predict()["predictions"], rtol=1e-3, atol=1e-3)
    shifted_by = model.zero_shot(df.assign(target=1e6 * df["target"] + 1e7)).predict()["predictions"]
    np.testing.assert_allclose((shifted_by - 1e7) / 1e6, model.predict()["predictions"], rtol=1e-2, atol=1e-2)


def test_it_is_saved_bit_for_bit_and_its_heads_are_read(fitted, tmp_path):
    model, _ = fitted
    model.save(tmp_path / "gpht")
    assert Forecaster.load(tmp_path / "gpht").predict().equals(model.predict())
    opened = mh.open_model(model.backbone)
    assert opened.shape == (3, 2)
    before = model.predict()["predictions"]
    with opened.editing(mh.Ablate(opened.heads)):
        assert (model.predict()["predictions"] - before).abs().max() > 1e-3
    assert model.predict()["predictions"].equals(before)


def test_pools_that_do_not_divide_the_patch_are_refused():
    with pytest.raises(InputError, match="divide the patch"):
        GPHT(context=48, patch=12, pools=(8, 1))
    with pytest.raises(InputError, match="multiple of"):
        GPHT(width=30, n_heads=4)


@pytest.mark.slow
def test_the_calibrated_claims_hold():
    tried = experiment("forecast", "gpht").run()
    print(tried.to_frame().to_string())
    assert {one.answer for one in tried.verdicts} <= {"held"}
