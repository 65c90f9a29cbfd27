"""Frozen language models as trunks: no leak of the future, no weight of theirs moved, what is learned counted, saved and read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.evaluation import experiment
from manyheads.forecast.choosing import forecaster_named
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.network import extended
from manyheads.forecast.explaining import explain_forecast
from manyheads.forecast.language.autotimes import AutoTimes, spans
from manyheads.forecast.language.smetimes import ExpertHead, ExpertSettings, SMETimes
from manyheads.forecast.language.time_llm import TimeLLM, strongest_lags

SIZES = {"horizon": 16, "context": 32, "patch": 8, "steps": 4, "rows": 8, "rate": 1e-2}
WORDS = {
    "horizon": 16,
    "context": 32,
    "patch": 8,
    "patch_stride": 4,
    "steps": 3,
    "rows": 4,
    "prototypes": 50,
    "kept": 6,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny language model of random weights, with ladon's tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2, max_position_embeddings=512)
    where = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(where)
    mh.open_model().tokenizer.save_pretrained(where)
    return str(where)


def frame(n=160, freq="h", seed=0, **more):
    t = np.arange(n)
    y = np.sin(2 * np.pi * t / 12) + 0.1 * np.random.default_rng(seed).normal(size=n)
    return pd.DataFrame({"timestamp": pd.date_range("2024-01-01", periods=n, freq=freq), "target": y}).assign(**more)


def panel(df, **how):
    return panel_of(df, columns_of(df, **how))


@pytest.fixture(scope="module")
def auto(folder):
    return AutoTimes(model=folder, **SIZES).fit(frame(), validation=0)


@pytest.fixture(scope="module")
def sme(folder):
    two = frame(second=np.cos(np.arange(160)))
    return SMETimes(model=folder, **SIZES).fit(two, target=["target", "second"], validation=0)


@pytest.fixture(scope="module")
def words(folder):
    return TimeLLM(model=folder, **WORDS).fit(frame(), validation=0)


@pytest.mark.parametrize("body", ["language", "random", "attention", "none"])
def test_a_segment_affects_no_output_before_it(folder, body):
    trunk = AutoTimes(model=folder, body=body, **SIZES).trunk(None)
    x = torch.randn(2, 32, 3)
    with torch.no_grad():
        before = trunk(x)
        for j in range(4):
            other = x.clone()
            other[:, 8 * j : 8 * j + 8] += 1.0
            after = trunk(other)
            assert torch.equal(after[:, :, :j], before[:, :, :j])
            assert (after[:, :, j] - before[:, :, j]).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [AutoTimes, SMETimes])
def test_rolling_two_segments_is_two_calls_bit_for_bit(auto, folder, cls):
    model = auto if cls is AutoTimes else SMETimes(model=folder, **SIZES).fit(frame(), validation=0)
    whole = model.predict(16)["predictions"].to_numpy()
    first = model.forecast_panel(model.panel_, 8, ())
    second = model.forecast_panel(extended(model.panel_, first.point), 8, ())
    assert (whole == np.concatenate([first.point[0][0], second.point[0][0]])).all()


def test_the_language_model_stays_as_it_was_and_all_else_learns(folder, auto):
    new = auto.fresh()
    before = new.language.model.fingerprint
    start = new.built(auto.shape_).state_dict()
    assert before == mh.open_model(folder).fingerprint == auto.language.model.fingerprint
    learned = auto.heads_.state_dict()
    assert set(start) == set(learned) and not any("layers" in name for name in learned)
    assert all(not torch.equal(start[name], learned[name]) for name in learned if "levels" not in name)
    assert not any(p.requires_grad for p in auto.language.model.plain.parameters())


def test_stamps_say_when_a_segment_is_and_move_on_with_the_forecast():
    series = panel(frame(24, "MS"))
    place = np.array([[0, 24]])
    texts = [text for _, text in spans(series, place, 24, 12)]
    assert texts[1] == "from 2025-01-01 00:00:00 to 2025-12-01 00:00:00"
    longer = extended(series, [np.full((1, 12), 9.0)])
    moved = [text for _, text in spans(longer, np.array([[0, 36]]), 24, 12)]
    assert moved == [texts[1], "from 2026-01-01 00:00:00 to 2026-12-01 00:00:00"]
    other = [text for _, text in spans(panel(frame(24, "MS", seed=3)), place, 24, 12)]
    assert other == texts
    early = next(iter(spans(series, np.array([[0, 6]]), 12, 12)))
    assert early == (-6, "from 2023-07-01 00:00:00 to 2024-06-01 00:00:00")
    numbers = frame(24).assign(timestamp=np.arange(0, 48, 2))
    assert next(iter(spans(panel(numbers), np.array([[0, 6]]), 12, 12)))[1] == "from -12 to 10"


def test_stamps_matter_and_a_text_is_read_once_whatever_is_edited(auto):
    model = auto.language.model
    texts = ["from a to b", "from b to c"]
    read = auto.language.read(texts)
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer(texts[1])["input_ids"]])
        torch.testing.assert_close(read[1], model.plain.base_model(input_ids=ids).last_hidden_state[0, -1])
    with model.editing(mh.Ablate(model.heads)):
        assert torch.equal(auto.language.read([texts[1], "from x to y"])[0], read[1])
    fresh = auto.language.read(["from x to y"])[0]
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer("from x to y")["input_ids"]])
        torch.testing.assert_close(fresh, model.plain.base_model(input_ids=ids).last_hidden_state[0, -1])
    later = frame().assign(timestamp=pd.date_range("2031-05-01", periods=160, freq="h"))
    assert np.abs(auto.predict_df(later)["predictions"].to_numpy() - auto.predict()["predictions"].to_numpy()).max() > 0


def no_leak(model, leaky):
    """How far the forecast of three segments moves when the true future is replaced."""
    whole = panel(frame(second=np.cos(np.arange(160))), target=["target", "second"])
    one = whole.series[0]
    values = one.values.copy()
    values[:, -24:] = 5.0 + np.random.default_rng(1).normal(size=(2, 24))
    other = replace(whole, series=(replace(one, values=values),))
    a, b = (model.replayed(p, 24, leaky=leaky).point[0] for p in (whole, other))
    return np.abs(a - b)


def test_no_prompt_knows_the_future_and_the_leaky_way_of_the_released_code_does(sme):
    assert no_leak(sme, leaky=False).max() == 0
    leaks = no_leak(sme, leaky=True)
    assert leaks[:, :8].max() == 0  # of the first segment nothing is known yet
    assert (leaks[:, 8:].max(1) > 1e-4).all()  # in each channel
    assert sme.told_ is None


def test_prompts_are_of_each_channel_and_of_predicted_segments_beyond_the_first(sme):
    windows = sme._windows(sme.panel_)
    texts = list(sme._texts(windows, np.array([[0, 160]])))
    assert len(texts) == 4 * 2
    mean, std = sme.scales_[sme.panel_.series[0].name]
    part = (sme.panel_.series[0].values[1, 152:160] - mean[1]) / std[1]
    time = "from 2024-01-07 08:00:00 to 2024-01-07 15:00:00"
    assert texts[-1] == f"{time}, mean {part.mean():.4f}, std {part.std():.4f}, change {part[-1] - part[0]:.4f}"
    first = sme.forecast_panel(sme.panel_, 8, ())
    rolled = sme._windows(extended(sme.panel_, first.point))
    said = (first.point[0][0] - mean[0]) / std[0]
    assert f"mean {said.mean():.3f}" in list(sme._texts(rolled, np.array([[0, 168]])))[-2]


def test_with_values_alone_and_one_expert_that_changes_nothing_it_is_autotimes(folder):
    one = SMETimes(model=folder, experts=1, levels=(), **SIZES)
    other = AutoTimes(model=folder, stamps=False, levels=(), **SIZES).fit(frame(), validation=0)
    one.fit(frame(), validation=0)
    weights = other.heads_.state_dict()
    with torch.no_grad():
        one.backbone.blend.fill_(40.0)
        one.heads_.heads["point"].experts.copy_(torch.eye(32)[None])
    own = one.heads_.state_dict()
    one.heads_.load_state_dict(own | {name: weights[name] for name in own if name in weights})
    a, b = (made.predict(quantile_levels=())["predictions"] for made in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_experts_share_the_work_and_all_learn():
    torch.manual_seed(0)
    head = ExpertHead(ExpertSettings(width=6, patch=4, targets=1, experts=4))
    states = torch.randn(5, 1, 3, 6)
    torch.testing.assert_close(head.gates(states).sum(-1), torch.ones(5, 1, 3))
    target = (torch.randn(5, 12, 1), torch.ones(5, 12, 1), torch.randn(5, 1, 4), torch.ones(5, 1, 4), torch.ones(5, 1))
    head.loss(head(states), target).backward()
    assert (head.experts.grad.abs().sum((1, 2)) > 0).all() and len({float(g.sum()) for g in head.experts.grad}) == 4
    assert float(head.gate.weight.grad.abs().sum()) > 0
    plain = head.eval().loss(head(states), target)
    with torch.no_grad():
        head.train().gate.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
        uneven = head.loss(head(states), target)
    torch.testing.assert_close(uneven - plain, torch.tensor(0.01 * 3))  # all of it to one of four
    torch.testing.assert_close(head(states), torch.nn.functional.linear(states, head.linear.weight, head.linear.bias))


def test_what_time_llm_learns_is_counted(folder):
    model = TimeLLM(model=folder, **WORDS | {"patch_width": 5, "n_heads": 8, "head_dim": 3}, levels=())
    model.fit(frame(), validation=0)
    m, v, p, dp, a, dk, dl, n, d_ff, h = 50, 4096, 8, 5, 8, 3, 32, 8, 6, 16
    wanted = m * v + m + 3 * p * dp + (dp + 1) * a * dk + 2 * (dl + 1) * a * dk + (a * dk + 1) * dl + (n * d_ff + 1) * h
    learned = [part for part in model.heads_.parameters() if part.requires_grad]
    assert sum(part.numel() for part in learned) == wanted
    fresh = model.fresh()
    start = fresh.built(model.shape_).state_dict()
    moved = {name for name, value in model.heads_.state_dict().items() if not torch.equal(value, start[name])}
    assert set(start) - moved <= {"backbone.reprogram.key.bias"}  # it is the same for all keys, and softmax drops it
    assert fresh.language.model.fingerprint == mh.open_model(folder).fingerprint == model.language.model.fingerprint


def test_the_prompt_changes_the_forecast_and_its_padding_does_not(words):
    trunk, x = words.backbone, torch.randn(3, 32)
    vectors = torch.randn(3, 8, 32)
    prompts = [trunk.prompt(row) for row in x]
    with torch.no_grad():
        whole = trunk.read(vectors, prompts)[:, -8:]
        torch.testing.assert_close(trunk.read(vectors, prompts, padding=9)[:, -8:], whole, atol=1e-5, rtol=0)
        for i, prompt in enumerate(prompts):
            torch.testing.assert_close(trunk.read(vectors[i : i + 1], [prompt])[0, -8:], whole[i], atol=1e-5, rtol=0)
        assert (trunk.read(vectors, ["Another text."] * 3)[:, -8:] - whole).abs().max() > 1e-2
    before = words.predict()["predictions"]
    trunk.description = "Hourly temperature of a cellar."
    try:
        assert (words.predict()["predictions"] - before).abs().max() > 1e-4
    finally:
        trunk.description = ""


def test_a_prompt_says_what_the_window_is(words):
    t = torch.arange(32.0)
    wave = torch.sin(2 * torch.pi * t / 8)
    assert strongest_lags(wave)[:2] in ([8, 16], [16, 8])
    text = words.backbone.prompt(wave)
    assert (
        "min -1.000, max 1.000" in text
        and "trend is downward" in text
        and "next 16 steps given the previous 32" in text
    )
    assert "upward" in words.backbone.prompt(t)


@pytest.mark.parametrize("name", ["auto", "sme", "words"])
def test_it_is_saved_without_the_language_model_and_refuses_another(name, folder, request, tmp_path):
    model = request.getfixturevalue(name)
    path = model.save(tmp_path / "saved")
    assert Forecaster.load(path).predict().equals(model.predict())
    other = LlamaForCausalLM.from_pretrained(folder)
    weight = other.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1.0
        other.save_pretrained(folder)
        with pytest.raises(MismatchError, match="learned on language model"):
            Forecaster.load(path)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
        other.save_pretrained(folder)
    assert Forecaster.load(path).predict().equals(model.predict())


def test_a_random_twin_is_another_model_of_the_same_shape_and_is_saved_too(folder, tmp_path):
    twin = AutoTimes(model=folder, body="random", **SIZES | {"seed": 3}).fit(frame(), validation=0)
    assert twin.language.model.fingerprint != mh.open_model(folder).fingerprint
    assert twin.language.model.shape == mh.open_model(folder).shape
    assert twin.fresh(seed=4).language.model.fingerprint != twin.language.model.fingerprint
    twin.save(tmp_path / "twin")
    assert Forecaster.load(tmp_path / "twin").predict().equals(twin.predict())


@pytest.mark.parametrize("body", ["attention", "none"])
@pytest.mark.parametrize("cls", [AutoTimes, SMETimes, TimeLLM])
def test_bodies_without_a_language_model_forecast_and_have_no_heads_to_open(folder, cls, body):
    model = cls(model=folder, body=body, **(WORDS if cls is TimeLLM else SIZES)).fit(frame(), validation=0)
    assert np.isfinite(model.predict()["predictions"]).all()
    with pytest.raises(UnsupportedError, match="no language model"):
        model.opened()


def test_a_forecast_is_explained_by_the_language_models_heads(auto):
    found = explain_forecast(auto, auto.panel_, windows=4, n_random=19)
    heads = found.table[found.table["kind"] == "head"]
    assert len(heads) == 8 and (heads["effect"] > 0).all() and found.control is not None
    again = explain_forecast(auto, auto.panel_, windows=4, n_random=19)
    assert again.table.equals(found.table)


def test_any_frame_is_taken_and_contexts_become_whole_patches(folder):
    df = pd.concat([frame(60 + 20 * s, seed=s, item_id=f"s{s}", price=1.0) for s in range(2)])
    df.loc[df.index[10:14], "target"] = np.nan
    for name in ("autotimes", "smetimes", "time-llm", "gpht"):
        made = forecaster_named(name, panel(df, past=["price"]), 6, model=folder, steps=2, rows=4)
        out = made.fit(df, past=["price"]).predict(quantile_levels=(0.1, 0.5, 0.9))
        assert len(out) == 12 and np.isfinite(out[["predictions", "0.1", "0.9"]].to_numpy()).all()


def test_what_cannot_be_a_trunk_is_refused_by_name(folder, tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="BertModel is no causal language model"):
        AutoTimes(model=str(tmp_path / "bert"), **SIZES).fit(frame())
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "mute")
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        AutoTimes(model=str(tmp_path / "mute"), **SIZES).fit(frame())
    AutoTimes(model=str(tmp_path / "mute"), stamps=False, **SIZES).fit(frame())
    with pytest.raises(InputError, match="body is 'bert'"):
        AutoTimes(body="bert")
    with pytest.raises(InputError, match="states have 32 numbers"):
        TimeLLM(model=folder, **WORDS | {"kept": 33}).fit(frame())
    with pytest.raises(InputError, match="shorten the description"):  # on the first batch, before anything is trained
        TimeLLM(model=folder, **WORDS, description="so long " * 300).fit(frame())


@pytest.mark.slow
def test_the_experiment_runs():
    tried = experiment("forecast", "language").run(seeds=[0], quick=True)
    assert len(tried.verdicts) == 9
    assert set(tried.to_frame()["method"]) >= {"autotimes random", "smetimes random", "time-llm none", "linear"}
