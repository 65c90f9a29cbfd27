"""Heads that look by place: positional, first-token, delimiter; their roles, their stability, and two atlases compared."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import opened
from typer.testing import CliRunner

import manyheads as mh
from manyheads.atlas.core.repeats import Copies
from manyheads.atlas.core.roles import roles_of
from manyheads.atlas.patterns.delimiter import DelimiterMass, delimiters
from manyheads.atlas.patterns.positional import OFFSETS, OffsetProfile
from manyheads.atlas.surveys.stability import agreement, rank_agreement
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.heads import HeadScores
from manyheads.lab.constructed import constructed
from manyheads.model.reading.attention import AttentionCall
from manyheads.pages.atlas_tables import diff_table
from manyheads.tasks.texts import passages


@cache
def built(shape="llama", seed=0, plant=None):
    made = constructed(shape, seed=seed) if plant is None else constructed(shape, seed=seed, plant=plant)
    return made, mh.open_model(made.module, tokenizer=made.tokenizer)


@cache
def surveyed(plant=None):
    return mh.atlas.survey(built(plant=plant)[1], ["previous_token", "induction", "copying"], n=8, seeds=3)


def band(offset, length=60):
    """A pattern that attends `offset` back and nowhere else; where it cannot, to itself."""
    rows = torch.arange(length)
    keys = (rows - offset).where((rows >= offset) & (rows - offset < length), rows)
    return torch.nn.functional.one_hot(keys, length).float()[None, None]


@pytest.mark.parametrize("offset", [-8, -1, 0, 1, 5, 8])
def test_a_pattern_at_one_distance_has_its_whole_profile_there(offset):
    kept = OffsetProfile().reduce(band(offset), Copies(1, 40))
    assert kept[0, 0].tolist() == [float(o == offset) for o in OFFSETS]
    values, meta = OffsetProfile().score(kept[:, None].numpy())
    assert values.item() == 1.0 and meta["offsets"] == [[offset]]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_the_planted_previous_token_head_is_positional_at_one_token_back(shape):
    made, model = built(shape)
    (head,) = made.known["previous_token"]
    scores = mh.atlas.positional(model, n=4)
    assert scores[head] > 0.95 and scores.meta["offsets"][head.layer][head.index] == 1


def test_planted_heads_that_find_no_match_rest_on_the_first_token_and_the_previous_token_head_does_not():
    made, model = built()
    scores = mh.atlas.first_token(model, n=4)
    (resting,) = made.known["duplicate_token"]
    (busy,) = made.known["previous_token"]
    assert scores[resting] > 0.4 > 0.05 > scores[busy]


def test_uniform_attention_makes_no_delimiter_head_and_attention_on_delimiters_does():
    length = 12
    marked = torch.zeros(1, length, dtype=torch.bool)
    marked[0, [3, 7]] = True
    allowed = torch.ones(length, length).tril()
    uniform = allowed / allowed.sum(-1, keepdim=True)
    last = torch.eye(length)[[7 if t >= 7 else 3 if t >= 3 else 0 for t in range(length)]]
    mask = torch.zeros(1, 1, length, length).masked_fill(allowed == 0, torch.finfo(torch.float32).min)
    q = torch.zeros(1, 2, length, 4)
    call = AttentionCall(0, q, q, q, mask, 0, torch.matmul, _pattern=torch.stack([uniform, last])[None])
    reader = DelimiterMass(marked)
    reader.read(call)
    assert reader.kept[0][0, 0].abs() < 1e-6
    assert reader.kept[0][0, 1] > 0.6


def test_delimiters_are_punctuation_line_breaks_and_separators_but_never_the_first_token():
    model = mh.open_model()
    ids = torch.tensor([model.tokenizer(". A dog, and\n a cat.")["input_ids"]])
    marked = delimiters(model, ids)[0].tolist()
    words = [model.tokenizer.decode([i]) for i in ids[0].tolist()]
    assert not marked[0]
    assert {word for word, is_marked in zip(words, marked, strict=True) if is_marked} == {",", "\n", "."}


def test_passages_do_not_overlap_and_texts_too_short_are_refused():
    model = mh.open_model()
    rows = passages(model, None, n=6, length=48, seed=0)
    assert rows.shape == (6, 48) and len(rows.unique(dim=0)) == 6
    assert torch.equal(rows, passages(model, None, n=6, length=48, seed=0))
    with pytest.raises(InputError, match="no passage of 48 tokens"):
        mh.atlas.delimiter(model, texts=["too short"], length=48)
    with pytest.raises(InputError, match="needs a tokenizer"):
        mh.atlas.delimiter(opened("llama"))


def test_roles_are_the_behaviours_found_with_their_confidence_and_the_p_of_their_set():
    made, _ = built()
    atlas = surveyed()
    (head,) = made.known["induction"]
    held = roles_of(atlas, head)
    names = [role.behaviour for role in held.roles]
    assert set(names) == {"induction", "copying"} and not held.polysemantic  # shades of one kind
    induction = held.roles[names.index("induction")]
    assert induction.confidence > 0.99 and induction.effect > 1
    check = next(c for c in atlas.checks if c.behaviour == "induction" and c.mode == "mean")
    assert induction.p_value == check.p_value
    assert str(held).startswith(f"{head}: ")
    others = [h for h in mh.atlas.roles(atlas) if not any(h in known for known in made.known.values())]
    assert others and all(not roles_of(atlas, h).roles for h in others)
    frame = mh.atlas.roles_frame(atlas)
    assert set(frame["head"]) == {str(h) for kind in atlas.scores for h in atlas.found(kind)}


def test_confidence_is_the_normal_share_above_the_threshold():
    atlas = mh.Atlas(
        {"x": HeadScores("x", np.array([[0.5, 0.6]]), np.array([[0.1, 0.1]]), 9)},
        about={"x": {"threshold": 0.5, "kind": ""}},
    )
    at, above = (roles_of(atlas, (0, i)).roles[0].confidence for i in (0, 1))
    assert at == pytest.approx(0.5) and above == pytest.approx(0.8413, abs=1e-4)


def test_one_example_leaves_the_confidence_open_and_the_weights_do_not():
    def confidence(stderr, n):
        scores = HeadScores("x", np.array([[0.9]]), np.array([[stderr]]), n)
        return roles_of(mh.Atlas({"x": scores}, about={"x": {"threshold": 0.5}}), (0, 0)).roles[0].confidence

    assert np.isnan(confidence(np.nan, 1)) and np.isnan(confidence(0.0, 1))
    assert confidence(0.0, 0) == confidence(0.0, 8) == 1.0


def check(behaviour, heads, p):
    return mh.atlas.CausalCheck(behaviour, "mean", heads, "nats", 8, 1.0, 0.0, 1.0, 0.1, (0.0,) * 20, p)


def test_a_role_has_the_p_of_its_own_behaviour_and_only_if_its_head_was_ablated():
    """L0H2 is found as the others are, but no check of x ablated it, and that of y is about y."""
    scores = {name: HeadScores(name, np.array([[0.9, 0.8, 0.7]]), np.full((1, 3), 0.1), 8) for name in ("x", "y", "z")}
    checks = [check("x", ("L0H0", "L0H1"), 0.04), check("y", ("L0H2",), 0.3)]
    atlas = mh.Atlas(scores, checks, about={name: {"threshold": 0.5, "kind": name} for name in scores})
    held = {
        (head.index, role.behaviour): role.p_value for head, has in mh.atlas.roles(atlas).items() for role in has.roles
    }
    assert len(held) == 9
    assert {key: p for key, p in held.items() if p is not None} == {(0, "x"): 0.04, (1, "x"): 0.04, (2, "y"): 0.3}


def scored(*values, n=8, stderr=0.1):
    return HeadScores("induction", np.array([values]), np.full((1, len(values)), stderr), n)


def test_equal_scores_agree_with_one_and_a_constant_agrees_with_nothing_else():
    zero, some, other = scored(0.0, 0.0, 0.0), scored(0.1, 0.3, 0.2), scored(0.2, 0.3, 0.1)
    assert rank_agreement([zero, zero]) == rank_agreement([some, some]) == 1.0
    assert np.isnan(rank_agreement([zero, some]))
    assert rank_agreement([some, other]) == pytest.approx(0.5)
    assert rank_agreement([some, other, zero]) == pytest.approx(0.5), "a pair without a correlation does not count"
    assert rank_agreement([some, scored(-0.1, -0.3, -0.2)]) == pytest.approx(-1.0)


def test_the_top_heads_agree_as_far_as_they_are_shared():
    """Heads from 0.4 on are ablated, at most three: {0, 1}, {1, 2}, {0, 1, 2}; shared by pairs 1/3, 2/3 and 2/3."""
    a, b, c = scored(0.9, 0.8, 0, 0, 0), scored(0, 0.8, 0.9, 0, 0), scored(0.9, 0.8, 0.7, 0, 0)
    assert agreement("induction", [a, b]).top == pytest.approx(1 / 3)
    assert agreement("induction", [a, b, c]).top == pytest.approx(5 / 9)
    assert agreement("induction", [a, a]).top == 1.0
    assert agreement("induction", [a, scored(0, 0, 0, 0.9, 0.9)]).top == 0.0


def test_a_change_is_sure_from_two_standard_errors_on():
    about = {"induction": {"threshold": 0.3}}

    def surely(before, after):
        change = mh.atlas.diff(
            mh.Atlas({"induction": before}, about=about), mh.Atlas({"induction": after}, about=about)
        )
        return change.heads["surely"].tolist()

    base = scored(0.5, 0.5, 0.5, 0.5)  # the error of a difference is 0.14
    assert surely(base, scored(0.79, 0.77, 0.21, 0.5)) == [True, False, True, False]
    assert surely(base, scored(0.71, 0.69, 0.5, 0.5, stderr=0.0)) == [True, False, False, False]
    exact = scored(0.5, 0.5, n=0, stderr=0.0)
    assert surely(exact, scored(0.5001, 0.5, n=0, stderr=0.0)) == [True, False], "the weights have no error"
    assert surely(base, scored(9, 9, 9, 9, n=1, stderr=np.nan)) == [False] * 4, "one example has an unknown one"


def test_an_undefined_agreement_is_a_dash_and_that_of_equals_is_one():
    about = {"induction": {"threshold": 0.3}}
    zero, some = (mh.Atlas({"induction": one}, about=about) for one in (scored(0, 0, 0), scored(0.1, 0.2, 0.5)))

    def cell(change):
        return next(iter(diff_table(change).columns[1].cells))

    assert cell(mh.atlas.diff(zero, zero)) == cell(mh.atlas.diff(some, some)) == "1.00"
    assert cell(mh.atlas.diff(zero, some)) == "–"


def test_seeds_agree_on_planted_heads_and_noise_agrees_with_nothing():
    found = surveyed().agreement
    assert set(found) == {"previous_token", "induction", "copying"}
    assert all(one.seeds == 3 and one.top >= 1 / 3 for one in found.values())
    assert found["copying"].rank == 1.0
    rng = np.random.default_rng(0)
    noise = [HeadScores("induction", rng.random((8, 16)), np.zeros((8, 16)), 4) for _ in range(5)]
    assert abs(agreement("induction", noise).rank) < 0.15
    assert agreement("induction", noise[:1] * 3).rank == pytest.approx(1.0)


def test_a_diff_names_the_planted_head_that_appeared_and_nothing_between_equals():
    with_all, without = surveyed(), surveyed(plant=("previous_token",))
    made, _ = built()
    change = mh.atlas.diff(without, with_all)
    appeared = change.of("appeared")
    (head,) = made.known["induction"]
    assert set(appeared[appeared["behaviour"] == "induction"]["head"]) == {str(head)} and appeared["surely"].all()
    back = mh.atlas.diff(with_all, without)
    assert set(back.of("vanished")["head"]) == set(appeared["head"])
    same = mh.atlas.diff(with_all, with_all)
    assert not same.heads["change"].any() and not len(same.roles) and not (same.heads["call"] != "").any()
    assert all(value == pytest.approx(1.0) for value in same.agreement.values())
    fewer = mh.atlas.survey(built()[1], ["copying"], checks=False)
    assert not len(mh.atlas.diff(with_all, fewer).roles)  # what only one of them was surveyed for is no change


def test_models_of_different_shapes_and_atlases_with_nothing_in_common_are_refused():
    model = built()[1]
    one = mh.atlas.survey(model, ["copying"], checks=False)
    with pytest.raises(InputError, match="differ in shape"):
        mh.atlas.diff(one, mh.atlas.survey(mh.open_model(), ["copying"], checks=False))
    with pytest.raises(InputError, match="no behaviour in common"):
        mh.atlas.diff(one, mh.atlas.survey(model, ["induction"], checks=False, n=2))


def test_the_command_line_compares_atlases_and_prints_roles(tmp_path):
    paths = [surveyed(plant=("previous_token",)).save(tmp_path / "a"), surveyed().save(tmp_path / "b")]
    (head,) = built()[0].known["induction"]
    result = CliRunner().invoke(app, ["atlas", "diff", *map(str, paths), "--out", str(tmp_path / "diff")])
    assert result.exit_code == 0 and str(head) in result.output
    assert {p.name for p in (tmp_path / "diff").iterdir()} == {
        "heads.parquet",
        "roles.parquet",
        "checks.parquet",
        "diff.html",
    }
    assert str(head) in set(pd.read_parquet(tmp_path / "diff" / "heads.parquet")["head"])
    again = CliRunner().invoke(app, ["atlas", "diff", *map(str, paths), "--out", str(tmp_path / "diff")])
    assert again.exit_code == 2 and "already exists" in again.output
    shown = CliRunner().invoke(app, ["atlas", "roles", str(paths[1])])
    assert shown.exit_code == 0 and str(head) in shown.output and "induction" in shown.output
    assert CliRunner().invoke(app, ["atlas", "roles", str(tmp_path)]).exit_code == 2
