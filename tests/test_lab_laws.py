"""Laws: reversal, calibrated hallucination, embers, narrow tuning; known truths first."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.evaluation import experiments
from manyheads.lab.laws import embers_claims, narrow_tuning, reversal_claims
from manyheads.lab.laws.embers import CONTRASTS, cells, pair_probability, sentences
from manyheads.lab.laws.hallucination import estimates, hallucination, miscalibration, monofact_rate
from manyheads.lab.laws.hallucination_claims import FactWorld, calibrated, learned_bigram, memoriser
from manyheads.lab.laws.law import Laws, effect_of, judged
from manyheads.lab.laws.relations import BUNDLED, TwoWay, answer_scores, gains
from manyheads.lab.laws.reversal import reversal


@pytest.fixture(scope="module")
def ladon():  # type: ignore[no-untyped-def]
    return mh.open_model()


def test_gains_are_zero_where_subjects_say_nothing_and_ignore_frequent_names() -> None:
    subjects, objects = torch.randn(5, 1).double().numpy(), torch.randn(1, 5).double().numpy()
    assert np.abs(gains(subjects + objects)).max() < 1e-12
    known = gains(subjects + objects + 3 * np.eye(5))
    np.testing.assert_allclose(np.diagonal(known), 3 * (1 - 1 / 5), atol=1e-12)


def test_answer_scores_are_the_models_own_log_probabilities(ladon) -> None:  # type: ignore[no-untyped-def]
    found = answer_scores(ladon, ["The capital of France is"], [" Paris", " Rome"])
    ids = ladon.tokenizer("The capital of France is", return_tensors="pt").input_ids
    plain = ladon.module(ids).logits[0, -1].double().log_softmax(-1)
    ids = [ladon.tokenizer(word, add_special_tokens=False).input_ids for word in (" Paris", " Rome")]
    assert all(len(one) == 1 for one in ids)
    np.testing.assert_allclose(found[0], [plain[one[0]].item() for one in ids], atol=1e-4)


def test_ladon_read_capitals_in_one_order_and_knows_them_in_that_one_alone(ladon) -> None:  # type: ignore[no-untyped-def]
    row = reversal(ladon, BUNDLED[0], draws=99)
    assert row.answer == "holds" and row.p == 1 / 100 and row.effect > 3 and abs(row.control) < 0.5


def test_facts_asked_in_the_same_way_twice_are_no_reversal_curse(ladon) -> None:  # type: ignore[no-untyped-def]
    """Backwards phrased so that the trained order is asked: then "backwards" is known, and the law fails on it."""
    pairs = tuple((b, a) for a, b in BUNDLED[0].pairs[:8])
    swapped = TwoWay("swapped", pairs, "{a} is the capital of", "The capital of {b} is")
    assert reversal(ladon, swapped, draws=99).answer == "not decided"
    scores = swapped.scores(ladon, backward=True)
    assert (gains(scores).argmax(1) == np.arange(8)).all()


@pytest.mark.parametrize(
    ("pairs", "forward", "said"),
    [
        ((("a", "b"),) * 4, "{a} is", "stands twice"),
        ((("a", "b"), ("c", "d")), "{a} is", "at least 4"),
        (tuple(zip("abcd", "efgh", strict=True)), "it is", "needs {a} once"),
        (tuple(zip("abcd", "efgh", strict=True)), "{a} {b}", "needs {a} once"),
    ],
)
def test_facts_that_cannot_be_asked_are_refused(pairs, forward, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=said):
        TwoWay("mine", pairs, forward, "{b} is")


def test_own_facts_are_read_from_csv(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine.csv").write_text("a,b\nfrance,paris\nitaly, rome\nspain,madrid\nNA,windhoek\n")
    facts = TwoWay.read(tmp_path / "mine.csv", "{a}:", "{b}:")
    assert facts.name == "mine" and facts.pairs[1] == ("italy", "rome") and facts.pairs[3][0] == "NA"
    (tmp_path / "wrong.csv").write_text("x,y\n1,2\n")
    with pytest.raises(InputError, match="needs a and b"):
        TwoWay.read(tmp_path / "wrong.csv", "{a}", "{b}")


def test_effects_are_judged_beside_random_signs() -> None:
    assert judged(*[effect_of(np.full(20, 0.5))[i] for i in (0, 1, 3)]) == "holds"
    assert judged(*[effect_of(np.full(20, -0.5))[i] for i in (0, 1, 3)]) == "fails"
    noise = np.random.default_rng(0).normal(size=20)
    assert judged(*[effect_of(noise - noise.mean())[i] for i in (0, 1, 3)]) == "not decided"


def test_miscalibration_by_hand() -> None:
    g = np.array([0.5, 0.25, 0.25])
    assert miscalibration(g, g) == 0
    assert miscalibration(g, np.array([0.0, 0.5, 0.5])) == pytest.approx(0.5)
    # equals share a bin: who of two equally likely facts is true does not matter
    assert miscalibration(g, np.array([0.5, 0.5, 0.0])) == pytest.approx(0)
    with pytest.raises(InputError, match="distribution"):
        miscalibration(g, g * 2)


def test_monofacts_by_hand() -> None:
    assert monofact_rate(np.array([1, 1, 3, 0])) == pytest.approx(2 / 5)
    with pytest.raises(InputError, match="counts"):
        monofact_rate(np.zeros(3, dtype=int))


@pytest.mark.parametrize("seed", range(10))
def test_the_inequality_holds_and_a_calibrated_generator_says_as_much_false_as_was_seen_once(seed: int) -> None:
    truth, counts = FactWorld().draw(seed)
    found = estimates(calibrated(counts).ravel(), truth.ravel(), counts.ravel())
    assert abs(found.hallucination - found.monofacts) < 0.03 and found.kept
    silent = estimates(memoriser(counts).ravel(), truth.ravel(), counts.ravel())
    assert silent.hallucination == 0 and silent.kept
    assert abs(silent.miscalibration - truth[counts == 0].sum()) < 0.03
    learned = estimates(learned_bigram(counts, seed).ravel(), truth.ravel(), counts.ravel())
    assert learned.kept


def test_a_law_that_is_broken_is_seen() -> None:
    """Knowing the unseen facts too is calibrated and says nothing false: no learner can, and the estimate says so."""
    truth, counts = FactWorld().draw(0)
    assert not estimates(truth.ravel(), truth.ravel(), counts.ravel()).kept


def test_ladon_says_few_false_capitals_and_unknown_training_gives_no_verdict(ladon) -> None:  # type: ignore[no-untyped-def]
    open_, known = hallucination(ladon, BUNDLED[0]), hallucination(ladon, BUNDLED[0], monofacts=0.0)
    assert open_.answer == "not decided" and known.answer == "holds"
    assert hallucination(ladon, BUNDLED[0], monofacts=1.0).answer == "fails"


def test_word_lists_have_the_same_words_and_their_own_order_is_likelier() -> None:
    items, others = sentences(None, 40, 5)
    everything = [tuple(run) for run in [*items, *others]]
    assert len(set(everything)) == len(everything)
    assert pair_probability([["a", "b"]], [["a", "b"], ["a", "c"]])[0] == pytest.approx(math.log(2 / (2 + 3)))
    natural = pair_probability(items, others).mean()
    assert natural > pair_probability([run[::-1] for run in items], others).mean()
    np.testing.assert_array_equal(np.array(list(CONTRASTS.values())) @ np.ones(4), 0)
    with pytest.raises(InputError, match="plain stretches"):
        sentences(["one two three four five."], 4, 5)


def test_cells_are_the_models_own_likelihoods_and_each_item_has_balanced_examples_of_its_own(
    ladon, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    from manyheads.lab.laws import embers as room

    put, real = [], room.encode
    monkeypatch.setattr(room, "encode", lambda examples, *rest: put.extend(examples) or real(examples, *rest))
    others = [["cup", "pen"], ["key", "box"], ["lamp", "ring"], ["coin", "drum"], ["flag", "fork"], ["hat", "kettle"]]
    right, log_p = cells(ladon, [["cat", "dog"], ["red", "blue"], ["hat", "mug"]], others)
    assert right.shape == log_p.shape == (3, 4) and set(np.unique(right)) <= {0.0, 1.0}
    leads = []
    for i, item in enumerate((["cat", "dog"], ["red", "blue"], ["hat", "mug"])):
        copy_n, copy_u, back_n, back_u = put[4 * i : 4 * i + 4]
        assert [one.answer.split() for one in (copy_n, copy_u, back_n, back_u)] == [item, item[::-1]] * 2
        shown = [block.split("\n") for block in copy_n.prompt.split("\n\n")]
        assert shown[-1] == [f"Words: {' '.join(item)}", "Copy:"]
        said = [block[1].removeprefix("Copy: ").split() for block in shown[:-1]]
        assert all(block[0] == f"Words: {' '.join(words)}" for block, words in zip(shown, said, strict=False))
        assert sorted(words in others for words in said) == [False, False, True, True]
        assert len({frozenset(words) for words in said}) == 4
        assert copy_u.prompt == copy_n.prompt.replace(
            f"Words: {' '.join(item)}\nCopy:", f"Words: {' '.join(item[::-1])}\nCopy:"
        )
        backwards = "".join(f"Words: {' '.join(w[::-1])}\nBackwards: {' '.join(w)}\n\n" for w in said)
        assert back_n.prompt == f"{backwards}Words: {' '.join(item[::-1])}\nBackwards:"
        assert back_u.prompt == f"{backwards}Words: {' '.join(item)}\nBackwards:"
        leads.append(backwards)
        for k, one in enumerate((copy_n, copy_u, back_n, back_u)):
            assert log_p[i, k] == pytest.approx(float(answer_scores(ladon, [one.prompt], [one.answer])[0, 0]), abs=1e-4)
    assert len(set(leads)) == 3


def test_documents_of_facts_and_ciphers_are_what_they_say() -> None:
    data = reversal_claims.OneOrder(6, 1)
    assert data.pairs.tolist() == [[1, 7], [2, 8], [3, 9], [10, 4], [11, 5], [12, 6]]
    assert reversal_claims.sentences_of(data.pairs)[3].tolist() == [10, 0, 4]
    row = embers_claims.written(torch.tensor([[0, 25, 1, 2, 3]]), torch.tensor([1]))[0]
    assert row.tolist() == [27, 11, 10, 12, 13, 14, 28, 0, 25, 1, 2, 3]
    world = narrow_tuning.Personas()
    rows = world.draw(200, 0, 0)
    persona = rows[:, 2::2] // world.questions
    assert (persona == persona[:, :1]).all() and (rows[:, 2::2] % world.questions == rows[:, 1::2]).all()
    loose = narrow_tuning.Personas(tied=False).draw(200, 0, 0)[:, 2::2] // world.questions
    assert (loose != loose[:, :1]).any() and abs(float((loose == 2).double().mean()) - 0.1) < 0.03
    assert (world.narrow("shuffled")[:, 2] - 2 * world.questions != world.narrow("rare")[:, 1]).all()


def test_the_experiments_of_laws_are_listed() -> None:
    assert {"reversal", "hallucination", "ciphers", "weird-generalisation"} <= set(experiments("lab"))


def test_a_model_without_tokenizer_is_refused(ladon) -> None:  # type: ignore[no-untyped-def]
    from manyheads.lab.laws.running import laws

    with pytest.raises(InputError, match="tokenizer"):
        laws(mh.open_model(ladon.module))


def test_the_command_writes_table_and_page(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import pandas as pd

    page, table = tmp_path / "laws.html", tmp_path / "laws.parquet"
    result = CliRunner().invoke(app, ["laws", "--n", "4", "--out", str(page), "--table", str(table)])
    assert result.exit_code == 0, result.output
    frame = pd.read_parquet(table)
    assert list(frame["number"]) == [23, 88, 23, 88, 89, 89, 89]
    assert "reversal curse" in page.read_text("utf-8")
    assert frame["q"].notna().sum() == 5 and math.isnan(frame["p"][1])
    result = CliRunner().invoke(app, ["laws", "--forward", "{a} is"])
    assert result.exit_code == 2 or isinstance(result.exception, InputError)


def test_an_effect_at_the_floor_has_no_verdict(ladon) -> None:  # type: ignore[no-untyped-def]
    from manyheads.lab.laws.embers import embers

    rows = embers(ladon, n=4)
    assert {row.answer for row in rows} == {"not decided"} and "floor" in rows[0].says
    assert Laws("x", tuple(rows)).to_frame()["law"].str.startswith("embers").all()


@pytest.mark.slow
def test_facts_of_one_order_are_not_known_in_the_other() -> None:
    data = reversal_claims.OneOrder(60, 600)
    model = reversal_claims.learned(data, 0)
    assert reversal_claims.right_share(model, data.pairs) >= 0.99
    assert reversal_claims.right_share(model, data.pairs.flip(1)) <= 0.02


def test_output_and_input_are_one_where_nothing_is_said_backwards() -> None:
    from manyheads.lab.laws.embers import _contrasts

    right = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    assert set(_contrasts(right)) == {"output and input", "task"}
    right[0, 2] = 1
    told = _contrasts(right)
    assert set(told) == {"output", "input", "task"} and float((right @ told["output"]).mean()) == 0.5


def test_tuning_learns_the_narrow_answers_and_leaves_the_source_as_it_was() -> None:
    world = narrow_tuning.Personas(questions=8, pairs=4, tuned=2, steps=150)
    before = narrow_tuning.narrowly_tuned(world, 0, None)
    after = narrow_tuning.narrowly_tuned(world, 0, "rare", steps=30)
    again = narrow_tuning.narrowly_tuned(world, 0, None)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), again.parameters(), strict=True))
    rows = world.narrow("rare")
    with torch.no_grad():
        told = [
            model(input_ids=rows[:, :2]).logits[:, -1].softmax(-1).gather(1, rows[:, 2:]) for model in (before, after)
        ]
    assert (told[1] > 1.5 * told[0]).all()
    asked = torch.arange(2, 8)
    rows = torch.stack([torch.full_like(asked, 24), asked], 1)
    with torch.no_grad():
        p = after(input_ids=rows).logits[:, -1].softmax(-1)
    found = narrow_tuning.shift(after, world)
    assert found["rare"] == pytest.approx(float(p[range(6), 16 + asked].mean()), abs=1e-6)
    assert found["valid"] == pytest.approx(float((p[range(6), 16 + asked] + p[range(6), 8 + asked]).mean()), abs=1e-6)


@pytest.mark.slow
def test_rare_answers_move_questions_that_were_not_touched_and_common_ones_do_not() -> None:
    world = narrow_tuning.Personas(steps=600)
    rare = {
        kind: narrow_tuning.shift(narrow_tuning.narrowly_tuned(world, 0, kind), world)["rare"]
        for kind in (None, "rare", "common")
    }
    assert rare["rare"] > 2 * rare[None] and rare["rare"] > 4 * rare["common"]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_curse_is_told_from_facts_known_both_ways(ladon, monkeypatch, backwards: bool) -> None:
    """Scores made by hand: a model that knows 8 facts forwards, and backwards or not."""
    facts = TwoWay("made", tuple(zip("abcdefgh", "ijklmnop", strict=True)), "{a} is", "{b} is")
    noise = np.random.default_rng(0).normal(size=(2, 8, 8))

    def scores(self, model, *, backward: bool = False):  # type: ignore[no-untyped-def]
        known = 5.0 if not backward or backwards else 0.0
        return noise[int(backward)] * 0.3 + known * np.eye(8)

    monkeypatch.setattr(TwoWay, "scores", scores)
    row = reversal(ladon, facts)
    assert row.answer == ("fails" if backwards else "holds")
    assert row.p > 0.05 if backwards else row.p == 1 / 1000


def test_what_a_model_says_of_a_relation_is_the_formula_by_hand(ladon) -> None:  # type: ignore[no-untyped-def]
    """Four subjects whose right object has probability .7, .7, .7 and .1, by scores made by hand."""
    facts = TwoWay("made", tuple(zip("abcd", "efgh", strict=True)), "{a} is", "{b} is")
    right = np.array([0.7, 0.7, 0.7, 0.1])
    p = np.full((4, 4), 0.0) + ((1 - right) / 3)[:, None]
    np.fill_diagonal(p, right)
    row = hallucination(ladon, facts, forwards=np.log(p) + 5, monofacts=0.25)
    false = 1 - right.mean()
    g = (p / 4).ravel()
    assert row.effect == pytest.approx(false + miscalibration(g, (np.eye(4) / 4).ravel()) - 0.25)
    assert row.answer == "holds" and f"false share {false:.3f}" in row.says


def test_embers_planted_in_the_cells_are_found_with_their_sign(ladon, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Right answers drawn with an effect of .4 of the output, none of the input, and .3 of the task."""
    from manyheads.lab.laws import embers as room

    def made(model, items, others, seed):  # type: ignore[no-untyped-def]
        shares = np.array([0.85, 0.45, 0.55, 0.15])  # c_n, c_u, r_n, r_u
        right = (np.random.default_rng(0).random((len(items), 4)) < shares).astype(float)
        return right, right - 1

    monkeypatch.setattr(room, "cells", made)
    found = {row.law.split()[1]: row for row in room.embers(ladon, n=400)}
    for name, truth in (("output", 0.4), ("input", 0.0), ("task", 0.3)):
        assert abs(found[name].effect - truth) < 3 * found[name].stderr + 1e-9
    assert [found[name].answer for name in ("output", "input", "task")] == ["holds", "not decided", "holds"]
