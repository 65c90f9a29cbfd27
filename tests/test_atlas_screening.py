"""Surveys in a given time: screened heads, nulls, silent heads and traits, on models whose heads are known."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyheads as mh
from manyheads.atlas.core.causal import ablation_effects
from manyheads.atlas.core.judges import repeats_judge
from manyheads.atlas.core.null import NullScores, null_scores, untrained_twin
from manyheads.atlas.core.registry import sharing_passes
from manyheads.atlas.core.roles import roles_of
from manyheads.atlas.core.screening import estimated_effects, screened_effects
from manyheads.atlas.core.silent import silent_heads, write_norms
from manyheads.atlas.surveys import budget as budget_room
from manyheads.atlas.surveys.budget import Budget, _level
from manyheads.errors import UnsupportedError
from manyheads.heads import HeadScores, HeadSet
from manyheads.lab.constructed import constructed
from manyheads.model.editing.edits import Ablate, Scale
from manyheads.progress import Deadline, TimeIsUp
from manyheads.tasks import encode
from manyheads.tasks.scoring import forced_answers


@cache
def built():
    made = constructed("llama", seed=0, n_heads=8)
    return made, mh.open_model(made.module, tokenizer=made.tokenizer)


@cache
def ladon_judge():
    return mh.open_model(), repeats_judge(mh.open_model(), n=4, length=12)


def test_the_estimate_is_the_slope_of_the_effect():
    model, judge = ladon_judge()
    judge = replace(judge, reference=torch.zeros_like(judge.mean_z))
    step = 1e-2
    little = [Scale([head], 1 - step) for head in model.heads]
    values = model.sweep(judge.recording, little, judge.score, keep=judge.keep)
    slopes = ((judge.clean - values) / step).T.reshape(judge.n, *model.shape)
    assert np.allclose(estimated_effects(model, judge), slopes, atol=0.02 * np.abs(slopes).max())


def test_screening_measures_what_exact_ablation_does_and_accounts_for_every_head():
    model, judge = ladon_judge()
    exact = ablation_effects(model, "repeats", judge)
    found = screened_effects(model, "repeats", judge, most=30)
    alone = ~np.isnan(found.values)
    assert np.allclose(found.values[alone], exact.values[alone], atol=1e-5)
    report = found.meta["screening"]
    grouped = [head for group in report["groups"] for head in group["heads"]]
    assert sorted(map(str, model.heads)) == sorted(grouped + [str(h) for h in model.heads if alone[h]])
    assert report["alone"] == alone.sum() and 3 < report["ablations"] <= 30
    largest = max(exact.values.max(), -exact.values.min())
    for group in report["groups"]:
        together = model.sweep(
            judge.recording, [Ablate(group["heads"], "mean", judge.mean_z)], judge.score, keep=judge.keep
        )
        assert group["effect"] == pytest.approx((judge.clean - together[0]).mean(), abs=1e-5)
        assert not group["cleared"] or abs(group["effect"]) < max(0.02 * largest, 2 * (judge.clean - together[0]).std())


def test_heads_that_are_built_to_matter_are_among_those_ablated_alone():
    model = built()[1]
    judge = repeats_judge(model, n=6, length=16)
    exact = ablation_effects(model, "repeats", judge).values
    found = screened_effects(model, "repeats", judge)
    needed = exact > 0.1 * exact.max()
    assert needed.any() and not np.isnan(found.values[needed]).any()
    assert found.meta["screening"]["ablations"] < exact.size


def test_a_model_whose_layers_cannot_be_run_alone_is_screened_without_an_estimate(monkeypatch):
    model, judge = ladon_judge()

    def refuse(*_):
        raise UnsupportedError("its layers cannot be run one at a time.")

    monkeypatch.setattr("manyheads.atlas.core.screening.estimated_effects", refuse)
    found = screened_effects(model, "repeats", judge, most=30)
    alone = ~np.isnan(found.values)
    assert np.allclose(found.values[alone], ablation_effects(model, "repeats", judge).values[alone], atol=1e-5)
    assert len(found.meta["screening"]["groups"]) > 0


def test_a_budget_of_few_ablations_is_kept():
    model, judge = ladon_judge()
    for most in (3, 5, 12):
        report = screened_effects(model, "repeats", judge, most=most).meta["screening"]
        assert report["ablations"] <= most
        assert all(group["effect"] is not None or not group["cleared"] for group in report["groups"])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8), st.floats(0.1, 1e4))
def test_shares_of_time_use_all_of_it_unless_nobody_wants_more(wanted, total):
    level = _level(wanted, total)
    assert sum(min(want, level) for want in wanted) == pytest.approx(min(total, sum(wanted)))


def test_without_a_budget_all_heads_are_ablated_and_time_never_runs_out(monkeypatch):
    model, judge = ladon_judge()
    assert Budget().ablations(model, judge, 0.1) == len(model.heads)
    assert Budget().random_sets(model, [(HeadSet(["L0H0"], model.shape), judge)], 20) == 20
    monkeypatch.setattr("manyheads.atlas.surveys.budget.seconds_an_ablation", lambda *_: 1.0)
    minute = Budget(1.0)
    assert minute.ablations(model, judge, 0.5) in (29, 30)
    checks = [(HeadSet(["L0H0"], model.shape), judge)]
    assert minute.random_sets(model, checks, 20) == 20  # 36 s of ablations that cost 2 s each: fewer than the least
    assert minute.rows(model, checks, 20, 32) in (26, 27)
    assert Budget(10.0).random_sets(model, checks, 20) in (178, 179)
    assert Budget(100.0).random_sets(model, checks, 20) == 199


def test_a_survey_with_little_time_says_what_it_did(monkeypatch):
    monkeypatch.setattr("manyheads.atlas.surveys.budget.seconds_an_ablation", lambda *_: 1.0)
    made, model = built()
    atlas = mh.atlas.survey(model, ["induction", "previous_token"], n=8, budget=0.1)
    assert atlas.card["settings"]["budget"] == 0.1
    report = atlas.effects["repeats"].meta["screening"]
    assert report["ablations"] < len(model.heads)
    assert atlas.found("induction") == made.known["induction"]
    assert roles_of(atlas, next(iter(made.known["induction"]))).roles[0].behaviour == "induction"


def scores(values):
    return HeadScores("x", np.array(values), np.zeros((1, len(values[0]))), 4)


def test_a_null_raises_a_threshold_that_it_reaches_and_counts_what_did():
    null = NullScores.of([scores([[0.1, 0.3, np.nan]]), scores([[0.5, 0.2, 0.1]])], threshold=0.3)
    assert (null.highest, null.heads, null.reached) == (0.5, 5, 2)
    assert null.threshold(0.3) > 0.5 and null.threshold(0.7) == 0.7


def test_an_untrained_twin_has_other_weights_and_leaves_chance_alone():
    _, model = built()
    before = torch.random.get_rng_state()
    twin = untrained_twin(model, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert twin.shape == model.shape and twin.fingerprint != model.fingerprint
    nulls = null_scores(model, ["induction", "previous_token"])
    # The twin attends alike to all; on tokens that do not repeat the induction head finds nothing either.
    assert nulls["induction"].heads == 2 * len(model.heads) and nulls["previous_token"].heads == len(model.heads)
    assert all(null.highest < 0.3 and null.reached == 0 for null in nulls.values())


def test_a_twin_that_answers_nothing_is_no_null():
    model = mh.open_model()
    nulls = null_scores(model, ["topic_effect", "retrieval", "successor", "previous_token"])
    assert set(nulls) == {"successor", "previous_token"}  # read off weights and patterns, whatever the twin answers


def test_nulls_that_are_not_reached_in_time_are_left_out():
    _, model = built()
    nulls = null_scores(model, ["induction", "ngram_2"], bar=Deadline(0.0))
    assert set(nulls) == {"induction"} and nulls["induction"].heads == len(model.heads)  # on unrepeated tokens alone


def test_a_deadline_ends_a_job_and_says_how_long_all_of_it_would_take(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr("manyheads.progress.time.monotonic", lambda: next(now))
    bar = Deadline(2.0)
    bar.step("a part", 10)(2)
    with pytest.raises(TimeIsUp):
        bar(2)
    assert bar.whole(10) == 10.0  # four of ten units in four seconds


def test_a_head_that_writes_nothing_has_no_role_and_is_not_found():
    made, model = built()
    head = next(iter(made.known["induction"]))
    silenced = model.bake(Scale([head], 0.0))
    assert silent_heads(write_norms(silenced)) >= {head} and head not in silent_heads(write_norms(model))
    atlas = mh.atlas.survey(silenced, ["induction", "first_token"], n=8, checks=False)
    assert atlas["induction"][head] > 0.9  # it still looks there
    assert head not in atlas.found("induction") and "silent" in str(roles_of(atlas, head))


def test_resting_on_the_first_token_is_a_trait_not_a_role():
    model = built()[1]
    atlas = mh.atlas.survey(model, ["induction", "first_token"], n=8, checks=False)
    resting = next(iter(atlas.found("first_token") - atlas.found("induction")))
    held = roles_of(atlas, resting)
    assert not held.roles and held.traits[0].behaviour == "first_token"
    assert "no role found; first token" in str(held)


def test_patterns_weighted_by_what_is_behind_them_stand_beside_the_raw_ones():
    made, model = built()
    found = mh.atlas.induction(model, n=4)
    weighted = np.array(found.meta["norm_weighted"])
    assert weighted.shape == model.shape and ((weighted >= 0) & (weighted <= 1 + 1e-4)).all()
    head = next(iter(made.known["induction"]))
    assert weighted[head] > 0.9  # what it copies is what it writes
    silenced = np.array(mh.atlas.induction(model.bake(Scale([head], 0.0)), n=4).meta["norm_weighted"])
    assert silenced[head] == 0


def test_a_judge_of_answers_of_several_tokens_adds_up_the_whole_answer():
    model = mh.open_model()
    words = model.tokenizer.decode(model.tokenizer("red green blue").input_ids, skip_special_tokens=True).split()
    examples = [
        mh.tasks.Example("red green red", f" {words[1]} {words[0]}", foil=f" {words[1]} {words[2]}"),
        mh.tasks.Example("green red green", f" {words[0]}", foil=f" {words[2]}"),
    ]
    batch = encode(examples, model.tokenizer, 2)
    assert batch.whole is not None  # the first answer has two tokens, of which the foil shares one
    inputs, wanted = forced_answers(batch)
    logits = model.read(inputs, keep=wanted.shape[1]).log_softmax(-1)
    by_judge = [
        sum(float(row[k, t]) for k, t in enumerate(ids) if t >= 0) for row, ids in zip(logits, wanted, strict=True)
    ]
    alone = []
    for example in examples:
        ids = model.tokenizer(example.prompt + example.answer).input_ids
        start = len(ids) - 1  # all but the last token is prompt: in the first example the foil shares the token before
        log_p = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
        alone.append(float(log_p[start - 1, ids[start]]))
    assert by_judge == pytest.approx(alone, abs=1e-4)


def test_a_family_that_takes_far_more_than_its_share_reads_four_examples_and_others_eight(monkeypatch):
    model, _ = ladon_judge()
    seconds = {"induction": 1000.0, "retrieval": 60.0, "copying": 0.0}
    names = list(seconds)

    def never(*args, **kwargs):
        raise TimeIsUp

    monkeypatch.setattr(budget_room, "score_all", never)
    families = {family[0].about.name: family for family in sharing_passes(names)}
    wholes = iter(
        [next(seconds[one.about.name] for one in family if one.about.name in seconds) for family in families.values()]
    )
    monkeypatch.setattr(Deadline, "whole", lambda self, units: next(wholes))
    found = Budget(1.0).examples(model, names, 32, seed=0)
    assert {name: found[families[name][0].about.name] for name in families} == {
        name: 4 if seconds.get(name, 0) == 1000.0 else 8 if seconds.get(name, 0) == 60.0 else 32 for name in families
    }


def test_without_time_for_all_checks_every_behaviour_gets_one(monkeypatch):
    _, model = built()
    monkeypatch.setattr(Budget, "holds", lambda self, *_: False)
    monkeypatch.setattr("manyheads.atlas.surveys.budget.MOST_SETS", 24)
    found = mh.atlas.survey(model, ["induction", "previous_token"], n=8, budget=1.0)
    assert sorted((check.behaviour, check.mode) for check in found.checks) == [
        ("induction", "mean"),
        ("previous_token", "mean"),
    ]
