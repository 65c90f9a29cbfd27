"""The five properties, on models whose retrieval head is known, then on the bundled one."""

from functools import cache

import numpy as np
import pytest
from test_atlas_constructed import needle_examples, with_bos

import manyheads as mh
from manyheads.atlas.retrieval_heads.properties import masked_recall, retrieval_properties
from manyheads.atlas.retrieval_heads.scores import answer, needle_batches, needle_tests, recall
from manyheads.errors import InputError
from manyheads.lab.constructed import constructed


@cache
def built(shape="llama", **settings):
    made = constructed(shape, **settings)
    return made, mh.open_model(made.module, tokenizer=made.tokenizer)


@cache
def ladon():
    return mh.open_model()


@cache
def planted_properties():
    made, model = built(seed=0)
    _, relative = built(seed=3, noise=0.05)
    _, mute = built(seed=0, plant=("previous_token", "duplicate_token"))
    task = with_bos(made, needle_examples(made, 16))
    return made, retrieval_properties(
        model, task=task, others={"elsewhere": relative, "mute": mute}, tasks={"more": task[:8]}, ks=(1,), n=16
    )


def row(frame, of):
    return frame[frame.of == of].iloc[0]


def test_universal_and_sparse_count_the_planted_head_and_none_where_none_is():
    made, properties = planted_properties()
    for name in ("model", "elsewhere", "model on more"):
        one = row(properties.universal, name)
        assert one.found == 1 and one.best == 1.0 and one.share_found == 1 / one.heads
    assert row(properties.universal, "model on more").tests == 8
    mute = row(properties.universal, "mute")
    assert mute.answered == mute.found == 0 and mute.share_zero == 1.0
    assert properties.scores.above(0.1) == made.known["retrieval"]


def test_intrinsic_agreement_is_none_between_heads_in_different_places():
    _, properties = planted_properties()
    elsewhere = row(properties.intrinsic, "model and elsewhere")
    assert elsewhere.pearson < 0.2 and elsewhere.overlap == 0.0
    assert np.isnan(row(properties.intrinsic, "model and mute").pearson)


def test_intrinsic_agreement_is_one_with_a_copy_and_beats_heads_shuffled_in_their_layers():
    made, model = built(seed=0)
    task = with_bos(made, needle_examples(made, 8))
    copy = retrieval_properties(model, task=task, others={"copy": model}, ks=(1,), n=8).intrinsic.iloc[0]
    assert copy.pearson == pytest.approx(1.0) and copy.spearman == pytest.approx(1.0) and copy.overlap == 1.0
    assert copy.pearson_shuffled < 0.5


def test_dynamic_the_planted_head_is_always_active_and_most_others_never():
    made, properties = planted_properties()
    active = properties.dynamic.set_index("head")
    (head,) = made.known["retrieval"]
    assert active.active[str(head)] == "always" and active.frequency[str(head)] == 1.0
    assert (active.active == "never").mean() >= 0.5


def test_causal_masking_the_planted_head_while_decoding_gives_chance_and_random_heads_do_nothing():
    made, properties = planted_properties()
    (check,) = properties.causal
    assert check.heads == tuple(map(str, made.known["retrieval"]))
    assert check.clean == 1.0 and check.ablated <= 0.1
    assert np.abs(check.random_effects).max() <= 0.05
    assert check.p_value == 1 / (1 + len(check.random_effects))


def test_all_five_make_one_table():
    _, properties = planted_properties()
    frame = properties.to_frame()
    assert frame.columns.tolist() == ["property", "of", "quantity", "value"]
    assert frame.property.unique().tolist() == ["universal", "sparse", "intrinsic", "dynamic", "causal"]
    found = frame[(frame.property == "universal") & (frame.quantity == "heads found")].set_index("of").value
    assert found.to_dict() == {"model": 1, "elsewhere": 1, "mute": 0, "model on more": 1}


def some_needles(model, shape):
    if shape == "ladon":
        return needle_batches(model, None, (32, 64), (0.0, 1.0), 8, 3)
    made, _ = built(shape, seed=1)
    return [mh.tasks.encode(with_bos(made, needle_examples(made, 6)), model.tokenizer, 6)]


@pytest.mark.parametrize("shape", ["llama", "gpt2", "ladon"])
def test_masking_while_decoding_spares_the_context_and_begins_with_the_last_prompt_token(shape):
    """One cached reading of the context equals masking those queries only, in an ordinary run."""
    model = ladon() if shape == "ladon" else built(shape, seed=1)[1]
    heads = model.head_set([h for h in model.heads if h.layer >= 1])
    for batch in some_needles(model, shape):
        width = batch.input_ids.shape[1]
        decoding = list(range(width - 1, width + 8))
        with model.editing(mh.Ablate(heads, "uniform", positions=decoding)):
            limited = recall(batch, answer(model, batch))
        clean = recall(batch, answer(model, batch))
        got = masked_recall(model, [batch], [model.head_set(()), heads])
        assert np.array_equal(got, np.stack([clean, limited])) and clean.mean() == 1.0 and limited.mean() < 0.5


def test_a_test_knows_its_length_and_depth():
    groups = needle_tests(ladon(), needle_batches(ladon(), None, (40, 80), (0.0, 0.5, 1.0), 6, 0))
    assert [len(group) for group in groups] == [3, 3]
    for group, length in zip(groups, (40, 80), strict=True):
        assert all(0.6 * length <= test.length <= 1.6 * length for test in group)
        assert [test.depth for test in group] == sorted(test.depth for test in group)
        assert group[0].depth < 0.3 and 0.5 < group[2].depth < 1


def test_prompts_that_do_not_fit_the_positions_are_left_out():
    with pytest.raises(InputError, match="fits"):
        needle_batches(ladon(), None, (2000,), (0.5,), 2, 0)
    assert len(needle_batches(ladon(), None, (32, 2000), (0.5,), 2, 0)) == 1


def test_wrong_input_is_said():
    with pytest.raises(InputError, match="20 random sets"):
        retrieval_properties(ladon(), n_random=5)
    with pytest.raises(InputError, match="sizes K from 1 on"):
        retrieval_properties(ladon(), ks=(0, 999))


def test_on_ladon_lengths_agree_and_masking_the_top_five_costs_more_than_any_random_set():
    """Five, not one or two: these heads stand in for each other, and random sets of their layers may hold some of them too."""
    properties = retrieval_properties(ladon(), ks=(5,), lengths=(32, 96), n=16, seed=4)
    assert row(properties.universal, "model").found >= 1 and row(properties.universal, "model").answered >= 12
    (agreement,) = properties.intrinsic.itertuples()
    assert agreement.pearson >= 0.8 and agreement.pearson > agreement.pearson_shuffled + 0.2
    (check,) = properties.causal
    assert check.p_value <= 0.05 and check.effect > 3 * max(0.01, check.random_mean)
