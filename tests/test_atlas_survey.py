"""The survey: all behaviours in one sweep, saved, loaded, and honest about what it could not do."""

from dataclasses import replace
from functools import cache
from importlib import import_module

import numpy as np
import pytest
import torch
from architectures import opened
from hypothesis import given
from hypothesis import strategies as st

import manyheads as mh
from manyheads.errors import InputError, MismatchError
from manyheads.heads import HeadScores
from manyheads.lab.constructed import constructed
from manyheads.progress import Bar


@cache
def built():
    made = constructed("llama", seed=0, n_heads=8)
    return made, mh.open_model(made.module, tokenizer=made.tokenizer)


@cache
def surveyed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("manyheads.atlas.surveys.run"), "LEAST", 2)  # rows of a check
        return mh.atlas.survey(built()[1], n=4)


def test_a_survey_gives_the_scores_that_each_behaviour_gives_alone():
    made, model = built()
    for name in ("previous_token", "duplicate_token", "induction"):
        alone = getattr(mh.atlas, name)(model, n=4)
        assert np.allclose(surveyed()[name].values, alone.values, atol=1e-6)
        assert surveyed().found(name) == made.known[name]
    assert np.array_equal(surveyed()["successor"].values, mh.atlas.successor(model).values)
    assert np.allclose(surveyed()["copying"].values, mh.atlas.copying(model).values, atol=1e-9)


def test_behaviours_that_share_inputs_share_forward_passes():
    _, model = built()

    def passes(behaviours):
        calls = []
        handle = model.plain.register_forward_hook(lambda *_: calls.append(1))
        mh.atlas.survey(model, behaviours, n=8, checks=False)
        handle.remove()
        return len(calls)

    assert passes(["previous_token", "duplicate_token", "induction"]) == passes(["induction"])


def test_every_claim_has_a_check_against_different_random_sets_of_the_same_layers():
    atlas = surveyed()
    assert {(c.behaviour, c.mode) for c in atlas.checks} >= {
        (b, m) for b in ("previous_token", "induction", "copying") for m in ("mean", "zero")
    }
    # This model knows no ordinals: there is nothing to lose, and no check of successor heads.
    assert atlas.card["families"]["successor"]["verdict"] == "at chance"
    assert "successor" in atlas.scores and not [c for c in atlas.checks if c.behaviour == "successor"]
    assert "blind" in atlas.skipped["ioi_name_mover"]
    for check in atlas.checks:
        assert 3 <= len(check.random_effects) <= 20
        assert 1 / (1 + len(check.random_effects)) - 1e-9 <= check.p_value <= 1
        assert check.effect == pytest.approx(check.clean - check.ablated, abs=1e-6)
    by = {(c.behaviour, c.mode): c for c in atlas.checks}
    found = by["induction", "zero"]
    assert found.effect > 3
    assert abs(np.median(found.random_effects)) < 0.1  # a random set may hold the previous-token head, so not the mean
    assert found.p_value == 1 / (1 + len(found.random_effects))


def test_what_cannot_be_scored_is_left_out_with_the_reason():
    atlas = mh.atlas.survey(opened("llama"), n=4)
    by_position = {"previous_token", "duplicate_token", "induction", "positional", "first_token"}
    assert set(atlas.scores) == {*by_position, "copying", "ngram_2", "ngram_3"}
    assert "need a tokenizer" in atlas.skipped["retrieval"] and "tokenizer" in atlas.skipped["successor"]
    assert atlas.patterns and atlas.patterns[0].tokens[0].isdigit()


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "bloom", "gpt_oss", "gemma2", "mpt"])
def test_a_survey_runs_on_other_architectures(name):
    atlas = mh.atlas.survey(opened(name), n=4)
    assert "previous_token" in atlas.scores and atlas.checks
    assert all(np.isfinite(scores.values).all() for scores in atlas.scores.values())


def test_a_survey_leaves_no_trace():
    _, model = built()
    ids = torch.arange(12)[None]
    before = model.logits(ids)
    mh.atlas.survey(model, ["induction"], n=4)
    assert torch.equal(model.logits(ids), before)


def test_an_atlas_survives_saving_and_knows_its_model(tmp_path):
    _, model = built()
    atlas = surveyed()
    again = mh.Atlas.load(atlas.save(tmp_path / "atlas"), model)
    assert again.checks == atlas.checks and again.card == atlas.card and again.about == atlas.about
    assert again.agreement == atlas.agreement and list(again.effects) == list(atlas.effects) != []
    assert all(np.array_equal(again.effects[name].values, one.values) for name, one in atlas.effects.items())
    for name, scores in atlas.scores.items():
        assert np.array_equal(again[name].values, scores.values)
        assert np.array_equal(again[name].stderr, scores.stderr, equal_nan=True)
        assert again[name].meta == scores.meta
    assert all(np.array_equal(a.pattern, b.pattern) for a, b in zip(again.patterns, atlas.patterns, strict=True))
    assert sorted(p.name for p in (tmp_path / "atlas").iterdir()) == [
        "atlas.json",
        "effects.parquet",
        "patterns.safetensors",
        "scores.parquet",
    ]
    with pytest.raises(InputError, match="already exists"):
        atlas.save(tmp_path / "atlas")
    other = model.bake(mh.Scale(["L0H0"], 0.5))
    with pytest.raises(MismatchError, match="not of this model"):
        mh.Atlas.load(tmp_path / "atlas", other)


def test_every_score_says_how_it_was_made():
    _, model = built()
    for scores in surveyed().scores.values():
        assert scores.meta["fingerprint"] == model.fingerprint
        assert {"method", "paper", "settings", "seed", "version"} <= set(scores.meta)


def test_bad_requests_get_one_sentence(tmp_path):
    _, model = built()
    with pytest.raises(InputError, match="unknown behaviour telepathy; choose from positional, previous_token"):
        mh.atlas.survey(model, ["telepathy"])
    with pytest.raises(InputError, match="unknown behaviour"):
        mh.atlas.survey(model, [])
    with pytest.raises(InputError, match="it has positional"):
        surveyed()["telepathy"]
    with pytest.raises(InputError, match=r"there is no atlas\.json"):
        mh.Atlas.load(tmp_path)


@given(st.text(max_size=60))
def test_a_damaged_atlas_gets_one_sentence(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("atlas")
    (folder / "atlas.json").write_text(text)
    with pytest.raises(InputError, match="damaged or not an atlas"):
        mh.Atlas.load(folder)


def test_an_interrupted_survey_writes_nothing_and_leaves_the_model_whole(tmp_path, monkeypatch):
    _, model = built()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("manyheads.atlas.surveys.run"), "causal_check", stop)
    with pytest.raises(KeyboardInterrupt):
        mh.atlas.survey(model, n=4).save(tmp_path / "atlas")
    assert not list(tmp_path.iterdir())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.plain.modules())


def test_the_survey_finds_what_registers_itself_and_scores_what_shares_passes_at_once(monkeypatch):
    registry = import_module("manyheads.atlas.core.registry")
    found = mh.atlas.behaviours()
    assert {"induction", "retrieval", "ioi_name_mover", "ships_direction"} < set(found)
    assert list(found)[:2] == ["positional", "previous_token"]
    calls = []

    def two(model, *, n, seed, bar):
        calls.append((n, seed))
        return {name: HeadScores(name, np.eye(2), np.zeros((2, 2)), n) for name in ("one", "two")}

    abouts = [replace(found["induction"].about, name=name) for name in ("one", "two")]
    monkeypatch.setattr(registry, "_FOUND", dict(registry._FOUND))
    registry.register(*abouts, score=two, judge=found["induction"].judge)
    scores, skipped = registry.score_all(built()[1], ["one", "two", "induction", "previous_token"], n=4, seed=7)
    assert set(scores) == {"one", "two", "induction", "previous_token"}
    assert not skipped
    assert calls == [(4, 7)]


def test_the_survey_tells_how_far_it_is_and_never_more_than_there_is():
    done: dict[str, list[int]] = {}

    class Counting(Bar):
        def __init__(self, name=""):
            self.name = name

        def __call__(self, more=1, /, note=""):
            done[self.name][0] += more

        def step(self, name, total=None, *, done_before=0):
            done[name] = [0, total]
            return Counting(name)

    names = ["induction", "copying", "choice_direct", "ships_direction"]
    mh.atlas.survey(mh.open_model(), names, checks=False, n=4, bar=Counting())
    assert set(names) <= set(done)
    assert all(0 < done[name][0] <= done[name][1] for name in names)
    assert done["choice_direct"] == [54, 54]
