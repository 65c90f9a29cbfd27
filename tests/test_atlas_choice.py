"""The multiple-choice circuit: planted classes, a rank-3 binder, exact direct effects, and what other labels tell apart."""

from dataclasses import replace
from functools import cache

import numpy as np
import planted_choice as planted
import pytest
import torch
from bars import Counting

import manyheads as mh
from manyheads.atlas.multiple_choice.classes import choice_classes, last_attention, passed
from manyheads.atlas.multiple_choice.effects import choice, node_effects
from manyheads.atlas.multiple_choice.labels import label_mutations, mutations
from manyheads.atlas.multiple_choice.questions import margin, questions
from manyheads.atlas.multiple_choice.subspaces import compress, subspaces
from manyheads.errors import InputError
from manyheads.model.editing.edits import derangement
from manyheads.model.reading.readers import Keep
from manyheads.tasks import Example

BINDER = ["L2H0"]


@cache
def built(binds="nth", seed=0):
    return planted.choice_model(binds, seed)


@cache
def ladon():
    model = mh.open_model()
    return model, questions(model, n=12, split="train")


@cache
def ladon_effects():
    steps = []
    effects = node_effects(*ladon(), seed=3, bar=Counting(steps))
    assert sum(steps) == len(ladon()[0].heads) + ladon()[0].n_layers
    return effects


def by_rank(model, **settings):
    asked = planted.choice_questions(n=16)
    return {one.rank: one for one in compress(model, asked, model.head_set(BINDER), n_random=1, **settings)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("binds", ["nth", "labelled"])
def test_the_planted_binder_keeps_its_margin_at_rank_three_and_loses_it_at_rank_one(binds, seed):
    """#12: rank 3 keeps at least 99 % of the margin, rank 1 at most 70 %; random dimensions keep as little as none."""
    found = by_rank(built(binds, seed))
    assert found[None].accuracy == 1.0
    assert found[3].kept >= 0.99 and found[3].accuracy == 1.0
    assert found[1].kept <= 0.7 and found[2].kept < 0.99
    assert abs(found[3].random_kept - found[0].kept) < 0.05 and found[0].accuracy == 0.25


def test_an_uncentred_svd_wastes_a_rank_on_the_mean():
    found = by_rank(built(), centred=False)
    assert found[3].kept < 0.9 and found[4].kept >= 0.99


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("binds", ["nth", "labelled"])
def test_every_planted_class_is_recovered(binds, seed):
    """#12."""
    model, asked = built(binds, seed), planted.choice_questions(seed=seed)
    found = choice_classes(model, asked)
    assert {name: [str(h) for h in heads] for name, heads in found.items()} == planted.KNOWN
    few = model.head_set(["L2H3", "L0H1"])
    assert choice_classes(model, asked, few)["single_letter"] == model.head_set(["L2H3"])


def test_writers_have_direct_effects_and_gatherers_only_total_ones():
    effects = node_effects(built(), planted.choice_questions())
    heads, mlps = effects.top(3)
    assert sorted(map(str, heads)) == ["L2H0", "L2H3", "L3H1"] and not mlps
    assert abs(effects.direct["L1H2"]) < 0.01 and effects.total["L1H2"] > 5
    assert effects.total["L2H0"] > effects.direct["L2H0"] + 1, "the amplification head passes on what the binder writes"
    assert abs(effects.total["L3H1"] - effects.direct["L3H1"]) < 0.05, "nothing comes after it"
    assert np.abs(effects.direct_mlp).max() == 0 and np.abs(effects.total_mlp).max() == 0
    constant = effects.direct["L2H1"]
    assert abs(constant) < 0.05, "what is written whatever the question is nobody's effect"


def frozen_change(model, asked, order):
    """The margin's change if the whole final state were another question's, the RMS norm's denominator held: by hand."""
    keep = Keep("resid", layers=[model.n_layers])
    model.read(asked.inputs, keep)
    here = keep.values[model.n_layers][:, -1].double()
    norm, weight = model.plain.model.norm, model.plain.lm_head.weight.double()
    scale = (here.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    logits = torch.stack([(x * scale * norm.weight.double()) @ weight.T for x in (here, here[order])])
    metric = margin(asked)
    return (metric(logits[0][:, None]) - metric(logits[1][:, None])).numpy(force=True)


def test_direct_effects_sum_to_the_logit_change_when_norms_are_frozen():
    """#12: within 1e-4, on a trained model with MLPs, for every question."""
    model, asked = ladon()
    effects = ladon_effects()
    expected = frozen_change(model, asked, derangement(len(asked), 3))
    assert np.abs(effects.sum - expected).max() < 1e-4
    assert np.abs(effects.direct_mlp).mean() > 0.01


def test_the_total_effect_of_an_mlp_is_what_resampling_it_by_hand_gives():
    model, asked = ladon()
    order, effects = derangement(len(asked), 3), ladon_effects()
    keep = Keep("mlp_write")
    plain = margin(asked)(model.read(asked.inputs, keep, keep=1)).numpy(force=True)
    last, module = model.n_layers - 1, model.plain.model.layers[-1].mlp
    other = keep.values[last][order]

    def hook(_, __, output):
        return torch.cat([output[:, :-1], other[:, -1:]], 1)

    handle = module.register_forward_hook(hook)
    try:
        patched = margin(asked)(model.logits(asked.inputs)).numpy(force=True)
    finally:
        handle.remove()
    assert np.abs(effects.total_mlp[:, last] - (plain - patched)).max() < 1e-5


def mutated(binds):
    model = built(binds)
    sets = {kind: planted.choice_questions(kind) for kind in ("standard", "letters", "digits", "shuffled")}
    return mutations(model, model.head_set(BINDER), sets)


def test_a_head_that_counts_lines_keeps_to_them_whatever_their_labels():
    found = mutated("nth")
    for kind in ("letters", "digits", "shuffled"):
        assert found[kind].kept > 0.99 and found[kind].nth > 0.9 and found[kind].attention > 0.9
    assert found["shuffled"].labelled < 0.05 and np.isnan(found["letters"].labelled)


def test_a_head_that_reads_labels_follows_them_where_they_move():
    found = mutated("labelled")
    assert found["shuffled"].labelled > 0.9 and found["shuffled"].nth < 0.05 and found["shuffled"].kept > 0.99
    assert found["letters"].nth < 0.2 and found["letters"].kept < 0.2 and found["letters"].accuracy == 1.0


def test_questions_can_be_relabelled_without_touching_anything_else():
    model, standard = ladon()
    for kind in ("letters", "digits", "shuffled"):
        asked = questions(model, labels=kind, n=12, split="train")
        assert asked.right.tolist() == standard.right.tolist()
        same = asked.batch.input_ids == standard.batch.input_ids
        elsewhere = torch.ones_like(same).scatter_(1, asked.label_columns, False)
        assert same[elsewhere].all() and not same.gather(1, asked.label_columns).any()
        if kind != "shuffled":
            assert not (asked.labels[:, :, None] == standard.labels[:, None]).any()
        else:
            assert (asked.labels.sort(1).values == standard.labels.sort(1).values).all()
        answers = asked.labels.gather(1, asked.right[:, None])[:, 0]
        assert (answers == asked.batch.answer_ids).all()


def test_heads_of_large_direct_effect_matter_more_than_random_heads_of_their_layers():
    """Zeroed together: margin lost by the top heads against twenty matched random sets."""
    model, asked = ladon()
    heads = ladon_effects().direct.top(4)
    recording, metric = model.record(asked.inputs), margin(asked)
    sets = [heads, *heads.matched_random(20, shape=model.shape)]
    margins = model.sweep(recording, [mh.Ablate(one, "zero") for one in sets], metric, keep=1).mean(1)
    assert margins[0] < margins[1:].min()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("binds", ["nth", "labelled"])
def test_one_call_names_the_planted_writers_the_gatherer_and_the_binder(binds, seed):
    """#12: direct effects name exactly who writes the letter, total ones also who feeds them, attention who finds the label."""
    model = built(binds, seed)
    scores = choice(model, planted.choice_questions(seed=seed), seed=seed)
    writers = model.head_set(["L2H0", "L2H3", "L3H1"])
    assert scores["choice_direct"].top(3) == writers
    least = min(scores["choice_direct"][h] for h in writers)
    assert least > 10 * max(abs(scores["choice_direct"][h]) for h in model.heads - writers)
    assert scores["choice_total"].above(1.0) == model.head_set(["L0H0", "L1H2", "L2H0", "L3H1"])
    assert scores["correct_letter"].above(0.4) == model.head_set(BINDER)


def test_classes_are_told_of_the_heads_that_matter_and_empty_ones_are_said_to_be_empty():
    meta = choice(built(), planted.choice_questions())["correct_letter"].meta
    assert meta["classes"] == planted.KNOWN | {"constant": []}, "the constant head writes the same whatever is asked"
    assert meta["note"] == "Of 5 heads that matter, 4 have a class. Empty classes: constant."
    model, asked = ladon()
    meta = choice(model, asked)["correct_letter"].meta
    assert not any(meta["classes"].values())
    assert meta["note"].endswith(
        "Empty classes: correct letter, single letter, content gatherer, amplification, constant."
    )
    few = choice(built(), planted.choice_questions(n=3))["correct_letter"].meta
    assert few["classes"] == {} and "too few to tell classes" in few["note"]
    asked = planted.choice_questions()
    wrong = replace(asked, right=(asked.right + 1) % 4)
    assert "does not prefer the right letter" in choice(built(), wrong)["correct_letter"].meta["note"]


def test_heads_of_the_first_layer_look_at_the_last_tokens_and_amplify_nothing():
    """What stands there before any head has written is the same in every question."""
    model, asked = ladon()
    first = model.head_set((0, i) for i in range(model.n_heads))
    tail = last_attention(model, asked)["tail"].mean(0)
    assert (tail[0] >= 0.4).sum() >= 3
    margin_, parts = passed(model, asked, first)
    assert margin_ > 5 and np.abs(parts).max() < 1e-5
    assert not choice_classes(model, asked, first)["amplification"]
    clean, parts = passed(built(), planted.choice_questions(), built().head_set(["L3H1"]))
    assert parts[0] > 0.2 * clean


def test_the_scores_of_the_circuit_are_three():
    scores = choice(built(), planted.choice_questions())
    assert list(scores) == ["choice_direct", "choice_total", "correct_letter"] and scores["choice_total"].n == 32
    assert scores["correct_letter"].above(0.4) == built().head_set(BINDER)
    assert scores["choice_direct"].meta["settings"]["margin"] > 5


def test_wrong_inputs_to_the_choice_circuit_say_so():
    model, asked = ladon()
    with pytest.raises(InputError, match="no option lines"):
        questions(model, [Example("Two and two are", " four")])
    with pytest.raises(InputError, match="choose from standard"):
        questions(model, labels="greek")
    with pytest.raises(InputError, match="need a tokenizer"):
        questions(built())
    with pytest.raises(InputError, match="every label is the right one"):
        choice_classes(built(), planted.choice_questions(n=3))
    with pytest.raises(InputError, match="rank is 99"):
        subspaces(model, asked, model.head_set(["L0H0"]), 99)
    with pytest.raises(InputError, match="no heads given"):
        label_mutations(model, model.head_set([]))
    with pytest.raises(InputError, match="two questions or more"):
        node_effects(built(), planted.choice_questions(n=1))
