"""Chronos-2: the released package's numbers, groups that do not see each other, heads that are read, forecasts of any length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation import experiments
from manyheads.evaluation.controls import Control, matched_sets
from manyheads.forecast.core.forecaster import FORECASTERS, Forecaster
from manyheads.forecast.core.heads import LEVELS
from manyheads.forecast.transformers.chronos2 import Chronos2, level_mass, weighted_quantiles
from manyheads.forecast.transformers.chronos2_in_context import slope_tasks
from manyheads.forecast.transformers.chronos2_model import QUANTILES_21, Chronos2Config, Chronos2Model, row_scale
from manyheads.inputs import read_tensors
from manyheads.model.reading.readers import ReadAttention

FIXTURE = Path(__file__).parent / "chronos2_parity.safetensors"  # made by recipes/chronos2_parity.py


@pytest.fixture(scope="module")
def tensors():
    return read_tensors(FIXTURE)


@pytest.fixture(scope="module")
def released(tensors, tmp_path_factory):
    """A folder as the package wrote it."""
    folder = tmp_path_factory.mktemp("released")
    with safe_open(FIXTURE, "pt") as file:
        (folder / "config.json").write_text(file.metadata()["config"], "utf-8")
    save_file(
        {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")},
        folder / "model.safetensors",
    )
    return folder


def case(tensors, name):
    return {key.split(".")[1]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def model_of(**sizes):
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "head_dim": 4,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "blocks": 2,
        "patch": 4,
    }
    small |= {"levels": LEVELS, "prediction_length": 6, "initializer_factor": 1.0, "time_scale": 32}
    return Chronos2Model(Chronos2Config(**small | sizes)).eval()


def quantiles(model, values, **more):
    with torch.no_grad():
        return model(values, **more).quantiles


def series(batch=2, steps=24, channels=3, seed=0):
    return torch.randn(batch, steps, channels, generator=torch.Generator().manual_seed(seed))


# The released package


@pytest.mark.parametrize("name", ["single", "several patches", "groups", "missing", "constant", "covariates", "long"])
def test_quantiles_are_those_of_the_released_package(tensors, released, name):
    given = case(tensors, name)
    model, truth = Chronos2Model.from_pretrained(released), given["expected"]
    found = model.forecast_rows(
        given["context"], given.get("group_ids"), given.get("future_covariates"), truth.shape[1]
    )
    mean, std = row_scale(given["context"][:, -64:])
    off = (found - truth).abs() / (std + mean.abs())[..., None].clamp_min(1)
    assert found.shape == truth.shape and off.max() < 1e-5
    if "group_ids" in given:
        alone = model.forecast_rows(given["context"], None, given.get("future_covariates"), truth.shape[1])
        assert (alone - truth).abs().max() > 0.1


def test_the_loss_is_that_of_the_released_package(tensors, released):
    given = case(tensors, "covariates")
    model = Chronos2Model.from_pretrained(released)
    mean, std = row_scale(given["context"])
    out = model.forecast_rows(given["context"], given["group_ids"], given["future_covariates"])
    scaled = torch.asinh((out - mean[..., None]) / std[..., None])
    y = torch.asinh((given["future_target"] - mean) / std)
    counted = (~y.isnan() & given["future_covariates"].isnan()).float()
    loss = model.head.loss(scaled[None], (y.nan_to_num()[None], counted[None], torch.ones(1, len(y))))
    assert float(loss) == pytest.approx(float(given["loss"]), rel=1e-5)


def paths_frame(given):
    n, target = given["target"].shape[1], given["target"].double().numpy()
    times = pd.date_range("2024-01-01", periods=len(given["known"]), freq="h")
    known = given["known"].double().numpy()
    frame = {
        "timestamp": times[:n],
        "a": target[0],
        "b": target[1],
        "p": given["past"].double().numpy(),
        "k": known[:n],
    }
    return pd.DataFrame(frame), pd.DataFrame({"timestamp": times[n:], "k": known[n:]})


def test_quantile_paths_beyond_one_pass_are_those_of_the_released_package(tensors, released):
    given = case(tensors, "paths")
    frame, future = paths_frame(given)
    forecaster = Chronos2.from_pretrained(released, horizon=8).fit(frame, target=["a", "b"], known=["k"])
    before = {name: value.clone() for name, value in forecaster.backbone.state_dict().items()}
    out = forecaster.predict(30, future_df=future, quantile_levels=forecaster.levels)
    found = out[[f"{t:g}" for t in forecaster.levels]].to_numpy().reshape(2, 30, -1)
    truth = given["expected"].transpose(1, 2).numpy()
    assert forecaster.reach == 12  # so that 30 steps take three passes
    assert np.abs(found - truth).max() < 2e-4 * np.abs(truth).max()  # our floor of the variance is another
    assert all(torch.equal(value, before[name]) for name, value in forecaster.backbone.state_dict().items())


def test_what_is_written_is_the_released_layout(released, tmp_path):
    model = Chronos2Model.from_pretrained(released)
    model.save_pretrained(tmp_path / "again")
    was, now = (read_tensors(folder / "model.safetensors") for folder in (released, tmp_path / "again"))
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    was, now = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (released, tmp_path / "again"))
    ours = {name: was[name] for name in now if name in was}
    assert ours == {name: now[name] for name in ours} and {"d_model", "chronos_config", "model_type"} <= ours.keys()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda c, t: t.pop("shared.weight"), InputError, "lacks the tensor 'shared.weight'"),
        (lambda c, t: t.update(more=torch.ones(1)), InputError, "has besides the tensor 'more'"),
        (lambda c, t: c.update(d_ff=8), InputError, "has shape"),
        (lambda c, t: c.pop("chronos_config"), InputError, "no chronos_config"),
        (lambda c, t: c["chronos_config"].pop("quantiles"), InputError, "damaged"),
        (lambda c, t: c["chronos_config"].update(use_arcsinh=False), UnsupportedError, "use_arcsinh False"),
        (lambda c, t: c.update(feed_forward_proj="gated-gelu"), UnsupportedError, "feed_forward_proj 'gated-gelu'"),
    ],
)
def test_another_folder_is_refused_by_name(released, tmp_path, change, error, says):
    config = json.loads((released / "config.json").read_text("utf-8"))
    found = read_tensors(released / "model.safetensors")
    change(config, found)
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(error, match=says):
        Chronos2Model.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        Chronos2Model.from_pretrained(tmp_path)


# Groups, missing values, time


def test_a_group_does_not_move_another_one():
    model, values = model_of(), series()
    changed = values.clone()
    changed[1] += 3
    was, now = quantiles(model, values), quantiles(model, changed)
    assert torch.equal(was[0], now[0]) and (was[1] - now[1]).abs().max() > 0.1
    model.trunk.across = True
    assert (quantiles(model, values)[0] - quantiles(model, changed)[0]).abs().max() > 1e-3


def test_channels_see_each_other_only_where_they_are_mixed():
    values = series()
    changed = values.clone()
    changed[:, :, 1] += 3 * series(seed=1)[:, :, 1]
    for mixes in (True, False):
        model = model_of(mixes=mixes)
        moved = (quantiles(model, values)[:, 0] - quantiles(model, changed)[:, 0]).abs().max()
        assert moved > 1e-3 if mixes else moved == 0


def test_permuting_the_channels_of_a_group_permutes_what_is_forecast():
    model, order = model_of(), [2, 0, 1]
    values, ahead = series(), series(steps=6, seed=1)
    values[0, :9, 1] = values[1, 5:, 2] = torch.nan
    was = quantiles(model, values, future_covariates=ahead)
    now = quantiles(model, values[:, :, order], future_covariates=ahead[:, :, order])
    assert (was[:, order] - now).abs().max() < 1e-5


def test_a_covariate_that_is_missing_ahead_is_the_value_0_with_mask_0():
    model, values, ahead = model_of(), series(), series(steps=6, channels=1, seed=1)
    ahead[:, 2:4] = torch.nan
    mask = (~ahead.isnan()).float()
    was = quantiles(model, values, future_covariates=ahead)
    assert torch.equal(
        was, quantiles(model, values, future_covariates=ahead.nan_to_num(0.0), future_covariates_mask=mask)
    )
    assert torch.equal(
        was, quantiles(model, values, future_covariates=ahead.nan_to_num(7.0), future_covariates_mask=mask)
    )
    assert (was - quantiles(model, values, future_covariates=ahead.nan_to_num(0.0))).abs().max() > 1e-3


def test_missing_values_are_not_read_whatever_they_hold():
    model, values = model_of(), series()
    mask = torch.ones_like(values)
    mask[0, :8, 0] = mask[0, 8:16, 2] = mask[1, ::3] = 0  # two patches, two others, single steps
    was = quantiles(model, values, past_observed_mask=mask)
    assert torch.equal(was, quantiles(model, torch.where(mask > 0, values, 9.0), past_observed_mask=mask))
    assert torch.equal(was, quantiles(model, values.masked_fill(mask == 0, torch.nan)))


def test_time_ends_before_the_cut_however_long_the_padding():
    model, values = model_of(), series()
    nothing = values.new_full((2, 13, 3), torch.nan)
    was = quantiles(model, values)
    assert (was - quantiles(model, torch.cat([nothing, values], 1))).abs().max() < 1e-5
    longer = torch.cat([torch.cat([nothing[:1], values[:1]], 1), series(1, 37, seed=3)])  # beside a row that fills it
    assert (was[0] - quantiles(model, longer)[0]).abs().max() < 1e-5


def test_a_row_of_one_channel_fewer_is_what_it_is_alone():
    model, values = model_of(), series()
    here = torch.tensor([[True, True, False], [True, True, True]])
    found = quantiles(model, values, channel_mask=here)
    assert (found[0, :2] - quantiles(model, values[:1, :, :2])[0]).abs().max() < 1e-5
    with pytest.raises(InputError, match="4 covariates are known ahead of 3 channels"):
        model(values, future_covariates=series(steps=6, channels=4))


def test_new_weights_are_drawn_as_the_paper_says():
    config = Chronos2Config(hidden_size=256, head_dim=32, num_attention_heads=8, intermediate_size=512, blocks=1)
    torch.manual_seed(0)
    attention, norm = Chronos2Model(config).trunk.layers[0].attention, 0.05
    for part, size in (("q", 256 * 32), ("k", 256), ("v", 256), ("o", 8 * 32)):
        assert getattr(attention, part).weight.std().item() == pytest.approx(norm * size**-0.5, rel=0.05)
    assert len(QUANTILES_21) == 21 and QUANTILES_21[0] == 0.01 and QUANTILES_21[-1] == 0.99


# Its heads


def test_its_heads_open_and_are_proved():
    model = mh.open_model(model_of())
    assert model.shape == (4, 4) and not model.proof.failed and not model.proof.gated
    values = series()
    values[0, :9, 1] = torch.nan
    patterns = {}
    seen = model.read({"past_values": values}, ReadAttention(lambda call: patterns.update({call.layer: call.pattern})))
    assert (seen - quantiles(model.plain, values)).abs().max() < 1e-5
    token = torch.arange(3 * 9)  # six patches, REG and two of the future, of three channels
    channel, place = token // 9, token % 9
    for layer, pattern in patterns.items():
        apart = (channel if layer % 2 == 0 else place)[:, None] != (channel if layer % 2 == 0 else place)
        assert pattern.shape == (2, 4, 27, 27) and pattern[:, :, apart].abs().max() == 0
    missing = (channel == 1) & (place < 2)
    assert patterns[0][0][:, ~missing][:, :, missing].abs().max() == 0  # nobody reads a patch without a value


def test_a_sweep_is_what_edits_do_one_by_one():
    model = mh.open_model(model_of())
    inputs = {"past_values": series()}
    clean = model.logits(inputs)
    effect = lambda out: (out - clean.repeat(len(out) // 2, 1, 1, 1)).abs().mean((1, 2, 3))  # noqa: E731
    edits = [mh.Ablate(["L0H1"]), mh.Ablate(["L1H2"]), mh.Ablate(["L1H2"], "uniform"), mh.Ablate(["L3H0", "L0H0"])]
    swept = model.sweep(inputs, edits, effect)
    for edit, found in zip(edits, swept, strict=True):
        with model.editing(edit):
            np.testing.assert_allclose(effect(model.logits(inputs)), found, atol=1e-5)
    assert (swept > 1e-3).all()


def test_baked_and_pruned_models_forecast_as_masked_ones(tmp_path):
    model = mh.open_model(model_of())
    inputs = {"past_values": series()}
    heads = [f"L{layer}H2" for layer in range(4)]
    with model.editing(mh.Ablate(heads)):
        masked = model.logits(inputs)
    assert (model.bake(mh.Ablate(heads)).logits(inputs) - masked).abs().max() < 1e-5
    pruned = model.prune(heads)
    assert pruned.shape == (4, 3) and (pruned.logits(inputs) - masked).abs().max() < 1e-5
    pruned.save_pretrained(tmp_path / "pruned")
    again = Chronos2Model.from_pretrained(tmp_path / "pruned")
    again.config.prediction_length = 6
    assert (quantiles(again, inputs["past_values"]) - masked).abs().max() < 1e-5
    with pytest.raises(UnsupportedError, match="cannot have other numbers of heads in some layers"):
        model.prune(["L1H0"])


def test_heads_that_attend_across_a_batch_are_refused_by_name():
    plain = model_of()
    model = mh.open_model(plain)
    plain.trunk.across = True
    with pytest.raises(UnsupportedError, match="across the series of a batch"):
        model.read({"past_values": series()}, ReadAttention(lambda call: None))


def copying(n_heads=24, planted=5):
    """A model of patches of one step whose head `planted` of the group layer copies the covariate that is known ahead.

    States hold the value (0), whether it is there (1), what the head writes (2), noise of all other heads (4, 5) and a large
    constant (7), beside which a norm scales all states alike: by c = sqrt(8) / 100.
    """
    model = model_of(
        hidden_size=8,
        head_dim=2,
        num_attention_heads=n_heads,
        intermediate_size=4,
        blocks=1,
        patch=1,
        levels=(0.1, 0.5, 0.9),
    )
    noise, c = torch.Generator().manual_seed(1), 8**0.5 / 100
    at = slice(2 * planted, 2 * planted + 2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.trunk.embed.residual_layer.weight[0, 1] = model.trunk.embed.residual_layer.weight[1, 2] = 1
        model.trunk.embed.residual_layer.bias[7] = model.trunk.shared.weight[1, 7] = 100
        for layer in model.trunk.layers:
            for part in (layer.attention.q, layer.attention.k, layer.attention.v):
                part.weight.copy_(torch.randn(part.weight.shape, generator=noise))
            layer.attention.o.weight[4:6] = torch.randn(2, 2 * n_heads, generator=noise)
        group = model.trunk.layers[1].attention
        for part in (group.q, group.k, group.v):
            part.weight[at] = 0
        group.o.weight[:, at] = 0
        group.q.weight[at.start, 7], group.k.weight[at.start, 1] = (
            1.0,
            30 / (c * 8**0.5),
        )  # a score of 30 where it is there
        group.v.weight[at.start, 0], group.o.weight[2, at.start] = 1 / c, 1.0
        model.head.block.residual_layer.weight[:, 2] = 1 / c
        model.head.block.residual_layer.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    return model


def test_the_head_that_copies_a_covariate_known_ahead_is_the_one_that_is_found():
    model = mh.open_model(copying())
    values, ahead = series(4, 12), series(4, 6, 1, seed=1)
    inputs = {"past_values": values, "future_covariates": ahead}
    found = model.logits(inputs)
    assert (found[:, 0, :, 1] - ahead[..., 0]).abs().max() < 0.02  # the target's median is the covariate
    assert (found[:, 0, :, 2] - found[:, 0, :, 0] - 2).abs().max() < 1e-4
    patterns = {}
    model.read(inputs, ReadAttention(lambda call: patterns.update({call.layer: call.pattern})))
    n = 12 + 1 + 6
    own, known = 13 + torch.arange(6), 2 * n + 13 + torch.arange(6)
    assert patterns[1][:, 5, own, known].min() > 0.99
    error = lambda out: (out[:, 0, :, 1] - ahead[..., 0].repeat(len(out) // 4, 1)).abs().mean(1)  # noqa: E731
    planted = model.head_set(["L1H5"])
    sets = [planted, *matched_sets(planted, 20)]
    control = Control.of(model.sweep(inputs, [mh.Ablate(one) for one in sets], error) - error(found).numpy())
    assert len(control.random) == 20 and control.effect > 0.5 and control.mean < 0.05
    assert control.p_value == pytest.approx(1 / 21)


def test_patching_the_copying_head_gives_the_forecast_of_the_other_covariate():
    model, values = mh.open_model(copying()), series(2, 12)
    one, other = series(2, 6, 1, seed=1), series(2, 6, 1, seed=2)
    z = model.read_z({"past_values": values, "future_covariates": other})
    inputs = {"past_values": values, "future_covariates": one}
    for head, wanted in (("L1H5", other), ("L1H6", one)):
        with model.editing(mh.Patch([head], source=z)):
            assert (model.logits(inputs)[:, 0, :, 1] - wanted[..., 0]).abs().max() < 0.02


# The forecaster


def frame(n=300, series=2, seed=0):
    rng = np.random.default_rng(seed)
    parts = []
    for i in range(series):
        x = rng.normal(size=n)
        day = np.sin(2 * np.pi * np.arange(n) / 24)
        times = pd.date_range("2024-01-01", periods=n, freq="h")
        values = {"target": 10 + 3 * day + 2 * x, "x": x, "other": rng.normal(size=n)}
        parts.append(pd.DataFrame({"item_id": f"s{i}", "timestamp": times, **values}))
    return pd.concat(parts, ignore_index=True)


def cut(df, ahead):
    groups = df.groupby("item_id", sort=False)
    return groups.head(groups.size().iloc[0] - ahead), groups.tail(ahead)


def small(**settings):
    sizes = {
        "horizon": 8,
        "context": 48,
        "patch": 4,
        "width": 16,
        "n_heads": 2,
        "head_dim": 8,
        "hidden": 32,
        "blocks": 1,
    }
    return Chronos2(**sizes | {"levels": LEVELS, "steps": 5, "rows": 8} | settings)


@pytest.fixture(scope="module")
def learned():
    past, _ = cut(frame(), 20)
    return small(steps=150, rate=3e-3).fit(past, known=["x"])


def off(forecast, future):
    return (forecast.merge(future, on=["item_id", "timestamp"]).eval("predictions - target")).abs().mean()


def test_it_learns_to_use_a_covariate_known_ahead(learned):
    _, future = cut(frame(), 20)
    ahead = learned.predict(future_df=future)
    shuffled = future.assign(x=-future["x"])
    assert FORECASTERS["chronos2"] is Chronos2 and learned.backbone.head.settings.targets == 1
    assert off(ahead, future) < 0.6 * off(learned.predict(future_df=shuffled), future)


def test_it_is_saved_and_forecasts_the_same_bits(learned, tmp_path):
    _, future = cut(frame(), 20)
    again = Forecaster.load(learned.save(tmp_path / "forecaster"))
    for horizon in (8, 20):
        assert again.predict(horizon, future_df=future).equals(learned.predict(horizon, future_df=future))


def test_released_weights_forecast_a_frame_at_once_and_tune_only_if_asked(learned, tmp_path):
    past, future = cut(frame(), 20)
    learned.backbone.save_pretrained(tmp_path / "released")
    zero = Chronos2.from_pretrained(tmp_path / "released", horizon=8).fit(past, known=["x"])
    was, now = learned.predict(future_df=future), zero.predict(future_df=future)
    np.testing.assert_allclose(now["predictions"], was["predictions"], atol=1e-3)
    loaded = Forecaster.load(zero.save(tmp_path / "zero"))
    tuned = Chronos2.from_pretrained(tmp_path / "released", horizon=8, tunes=True, steps=2, rate=1e-3)
    tuned.fit(past, known=["x"])
    assert not np.allclose(tuned.predict(future_df=future)["predictions"], now["predictions"], atol=1e-3)
    fresh = zero.fresh().fit(past, known=["x"])  # as a backtest makes one
    assert fresh.predict(future_df=future).equals(now)
    for file in (tmp_path / "released").iterdir():
        file.unlink()
    assert loaded.predict(future_df=future).equals(now)  # what was saved has its weights


def test_the_first_pass_stays_as_it_is_when_more_steps_are_asked_for(learned):
    _, future = cut(frame(), 20)
    paths = learned.predict(20, future_df=future, quantile_levels=(0.1, 0.9))
    first = learned.predict(8, future_df=future, quantile_levels=(0.1, 0.9))
    np.testing.assert_array_equal(paths.groupby("item_id").head(8)[["0.1", "0.9"]], first[["0.1", "0.9"]])
    assert len(paths) == 40 and (paths["0.9"] > paths["0.1"]).all()


def test_short_series_are_not_padded_to_a_long_context(learned, tmp_path):
    past, future = cut(frame(60), 20)
    learned.backbone.save_pretrained(tmp_path / "released")
    found = []
    for context in (40, 8192):
        forecaster = Chronos2.from_pretrained(tmp_path / "released", horizon=8, context=context).fit(past, known=["x"])
        found.append(forecaster.predict(future_df=future)["predictions"])
        assert forecaster.shape_.context == 40
    np.testing.assert_array_equal(*found)


def test_series_help_each_other_only_if_asked(learned):
    past, future = cut(frame(), 20)
    changed = past.copy()
    changed.loc[changed["item_id"] == "s1", "target"] *= -3
    for across in (False, True):
        other = small().set_params(across=across)
        other.heads_, other.shape_, other.scales_ = learned.heads_, learned.shape_, {}
        other.panel_ = learned.panel_
        was, now = (other.predict_df(df, future) for df in (past, changed))
        moved = (was["predictions"] - now["predictions"]).abs()[was["item_id"] == "s0"].max()
        assert moved > 1e-4 if across else moved == 0
    assert learned.backbone.trunk.across is False


def test_edits_of_its_heads_act_when_it_forecasts(learned):
    _, future = cut(frame(), 20)
    was = learned.predict(future_df=future)
    model = mh.open_model(learned.backbone)
    with model.editing(mh.Ablate(["L1H0", "L1H1"])):
        without = learned.predict(future_df=future)
    assert not model.proof.failed and off(without, future) > 1.2 * off(
        was, future
    )  # it had the covariate from those heads
    assert learned.predict(future_df=future).equals(was)


def test_missing_covariates_and_short_series_have_finite_forecasts():
    df = frame(60, 2)
    df.loc[df["item_id"] == "s0", "other"] = np.nan
    df.loc[5:20, "target"] = np.nan
    past, future = cut(df, 20)
    future = future.assign(x=future["x"].where(future.index % 2 == 0))
    out = small(mixes=False).fit(past, known=["x"]).predict(20, future_df=future)
    assert np.isfinite(out.select_dtypes("number")).all(axis=None) and len(out) == 40


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"objective": "point"}, UnsupportedError, "no other objective"),
        ({"tunes": False}, InputError, "nothing to forecast by"),
        ({"head_dim": 7}, InputError, "even"),
        ({"blocks": 0}, InputError, "blocks"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, error, says):
    with pytest.raises(error, match=says):
        Chronos2(**settings)
    with pytest.raises(InputError, match=r"no config\.json"):
        Chronos2.from_pretrained("nowhere")


def test_pooled_quantiles_are_those_of_the_weighted_samples():
    assert level_mass((0.1, 0.5, 0.9)) == pytest.approx(np.array([0.25, 0.4, 0.25]) / 0.9)
    assert level_mass(QUANTILES_21).sum() == pytest.approx(1)
    samples = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 10.0]])
    found = weighted_quantiles(samples, np.array([1.0, 1.0, 2.0]), (0.25, 0.75, 0.875, 0.99))
    # cumulated: 1 at .25, 2 at .75, 3 at 1; and 0 at .25, 0 at .5, 10 at 1
    np.testing.assert_allclose(found, [[1.0, 2.0, 2.5, 2.96], [0.0, 5.0, 7.5, 9.8]])


def test_the_tasks_of_the_experiment_have_their_answer_in_one_covariate():
    tasks = slope_tasks(400, 0)
    y, x, other = (tasks - tasks.mean(2, keepdim=True)).unbind(1)
    slope = (y * x).mean(1) / x.square().mean(1)
    assert (y - slope[:, None] * x).std() == pytest.approx(0.1, rel=0.05)
    assert slope.abs().min() > 0.45 and slope.abs().max() < 2.55 and abs((slope > 0).float().mean() - 0.5) < 0.1
    assert (
        tasks[:, 1].var() == pytest.approx(1, rel=0.1)
        and ((y * other).mean(1) / other.square().mean(1)).mean().abs() < 0.1
    )
    assert torch.equal(slope_tasks(3, (0, 1)), slope_tasks(3, (0, 1)))


@pytest.mark.slow
def test_a_group_learns_to_read_slopes_from_its_context():
    tried = experiments("forecast")["chronos2"].run(seeds=(0,))
    for verdict, bound in zip(tried.verdicts[:2], (0.8, 0.8), strict=True):
        assert verdict.mean < bound
    assert tried.verdicts[2].mean > 1
