"""Circuits and what they share: path patching is its formula, planted circuits come out exactly, rows repair a weak head."""

from functools import cache
from importlib import import_module

import numpy as np
import planted_ioi as planted
import pytest
import torch
from architectures import DECODERS, inputs_for, opened
from transformers import LlamaConfig, LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.circuits.repair import repair, span_columns, with_wrong_colours
from manyheads.errors import InputError
from manyheads.model.editing.rows import Rows
from manyheads.model.reading.readers import ReadAttention
from manyheads.model.replay.patching import path_patching
from manyheads.tasks import IOI, ColouredObjects, Facts, GreaterThan, encode

reuse = import_module("manyheads.atlas.circuits.reuse")


def plain_llama():
    """Grouped-query Llama whose MLPs write nothing and whose norms do nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    module = LlamaForCausalLM(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for block in module.model.layers:
        block.input_layernorm = block.post_attention_layernorm = torch.nn.Identity()
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    module.model.norm = torch.nn.Identity()
    return mh.open_model(module)


def test_patching_to_the_logits_is_the_algebra_of_a_model_without_norms_and_mlps():
    """#34 (a): the logits move by (z_cf - z_clean) @ W_O[h] @ W_U, for every head, within 1e-5."""
    model = plain_llama()
    clean, other = torch.randint(50, (2, 5, 9), generator=torch.Generator().manual_seed(1))
    z, z_other = model.read_z(clean)[:, :, -1], model.read_z(other)[:, :, -1]  # [L, B, H, Dh]
    plain = model.logits(clean)[:, -1]
    for token in (0, 7, 23):
        found = path_patching(model, clean, other, lambda logits, token=token: logits[:, -1, token], keep=1)
        for head, values in zip(found.senders, found.values, strict=True):
            write = (z_other - z)[head.layer, :, head.index] @ model.W_O(head.layer)[head.index]
            expected = write @ model.layout.unembedding.weight[token]
            assert np.abs(values - (plain[:, token] + expected).numpy(force=True)).max() < 1e-5


@cache
def shared(n_shared):
    model, planted_circuits = planted.shared_model(n_shared)
    found = [reuse.task_circuit(model, planted.shared_batch(t), share=0.1, n=8) for t in (0, 1)]
    return model, planted_circuits, found


@pytest.mark.parametrize("n_shared", [0, 6])
def test_planted_circuits_are_found_exactly(n_shared):
    """#34 (b)."""
    _, known, found = shared(n_shared)
    assert [one.heads for one in found] == known
    assert [stage.receiver for stage in found[0].stages] == ["logits", "query", "key", "value"]
    assert found[0].stages[1].found == known[0] - found[0].stages[0].found
    for one, heads in zip(found, known, strict=True):
        assert np.abs(one.importance.values[tuple(zip(*heads, strict=True))]).min() > 10 * max(
            abs(one.importance[h]) for h in one.importance.top(48) - heads
        )


def test_planted_overlap_is_exact_and_beats_both_nulls():
    """#34 (b): k of n shared heads; p < 0.01 against free and against layer-matched draws."""
    _, _, found = shared(6)
    result = reuse.reuse({"one": found[0], "two": found[1]})["one", "two"]
    assert result.overlap == 6 / 8 and len(result.shared) == 6 and result.sizes == (8, 8)
    known = shared(6)[1]
    assert result.shared == known[0] & known[1]
    assert result.p_value < 0.01 and result.p_by_layer < 0.01
    assert abs(result.chance - 8 / 48) < 0.02 and abs(result.chance_by_layer - 4 / 16) < 0.02


def test_disjoint_circuits_do_not_beat_the_null():
    """#34 (b)."""
    _, _, found = shared(0)
    result = reuse.reuse({"one": found[0], "two": found[1]})["one", "two"]
    assert result.overlap == 0 and not result.shared
    assert result.p_value > 0.05 and result.p_by_layer > 0.05


def test_the_null_is_that_of_drawing_without_replacement():
    a, b = (mh.heads.HeadSet(heads, (3, 8)) for heads in ([(0, 0), (0, 1), (1, 2)], [(0, 1), (1, 2), (2, 0)]))
    result = reuse.overlap(a, b, draws=20_000)
    free = (3 * 21 + 1) / 2024  # two or three of three among 24
    by_layer = 2 / 8 * 1 / 8  # layer 0 hits one of two with 2/8, layer 1 its one with 1/8
    assert abs(result.p_value - free) < 0.005 and abs(result.p_by_layer - by_layer) < 0.005


@pytest.mark.parametrize("seed", [0, 1])
def test_overwriting_the_rows_of_a_weak_inhibition_repairs_the_task_and_random_heads_do_not(seed):
    """#34 (c): from at most 0.6 to at least 0.9 without new errors; ten random quadruples gain at most 5 points."""
    model = planted.weak_model(seed)
    batch, wrong = planted.weak_batch(100, seed)
    heads = model.head_set(planted.INHIBITORS)
    result = repair(model, batch, heads, wrong, n_random=10, matched=False)
    assert result.before <= 0.6 and result.after >= 0.9 and result.new_errors == 0
    assert len(result.random) == 10 and max(result.random) - result.before <= 0.05
    assert result.p_value == 1 / 11
    matched = repair(model, batch, heads, wrong, n_random=10)
    assert max(matched.random) - matched.before <= 0.05


@pytest.mark.parametrize("name", DECODERS)
def test_a_row_overwritten_with_the_pattern_it_had_changes_nothing(name):
    model, inputs, rows = opened(name), inputs_for(name), {}
    plain = model.read(
        inputs, ReadAttention(lambda call: rows.setdefault(call.layer, call.pattern_rows(slice(-1, None))))
    )
    batch, length = plain.shape[:2]
    for layer, head in ((0, 1), (1, 3)):
        row = rows[layer][:, head, 0]
        edit = Rows([(layer, head)], torch.arange(row.shape[1]).expand(batch, -1), row, positions=[length - 1])
        with model.editing(edit):
            assert torch.allclose(model.logits(inputs), plain, atol=1e-4)
        turned = Rows([(layer, head)], [length - 4, length - 2], positions=[length - 1])
        with model.editing(turned):
            assert not torch.allclose(model.logits(inputs)[:, -1], plain[:, -1], atol=1e-6)
            assert torch.allclose(model.logits(inputs)[:, :-1], plain[:, :-1], atol=1e-5)


def test_rows_refuses_what_a_query_cannot_see_and_weights_that_do_not_fit():
    model, inputs = opened("llama"), inputs_for("llama")
    with model.editing(Rows([(1, 0)], [7], positions=[4])), pytest.raises(InputError, match="may not attend"):
        model.logits(inputs)
    with model.editing(Rows([(1, 0)], [99], positions=[4])), pytest.raises(InputError, match="outside of the 11"):
        model.logits(inputs)
    with pytest.raises(InputError, match="one weight a key"):
        Rows([(1, 0)], [1, 2], torch.tensor([1.0]))


def test_rows_act_while_decoding_with_a_cache_as_they_do_without():
    model, ids = opened("llama"), inputs_for("llama")["input_ids"]
    edit = Rows([(0, 0), (1, 2)], [2, 5], torch.tensor([0.25, 0.75]))
    late = Rows(edit.heads, edit.keys, edit.weights, positions=[8, 9, 10])
    with model.editing(late):
        whole = model.logits(ids)
        cache = model.plain(input_ids=ids[:, :8], use_cache=True).past_key_values
        rest = model.plain(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(rest, whole[:, 8:], atol=1e-5)


def test_wrong_inputs_to_reuse_say_so():
    model = planted.weak_model()
    batch, wrong = planted.weak_batch(4)
    with pytest.raises(InputError, match=r"give \[4, K\]"):
        repair(model, batch, model.head_set(["L0H0"]), wrong[:2])
    with pytest.raises(InputError, match="no heads given"):
        repair(model, batch, model.head_set([]), wrong)
    with pytest.raises(InputError, match="no heads; lower least"):
        reuse.overlap(model.head_set([]), model.head_set(["L0H0"]))
    with pytest.raises(InputError, match="in \\(0, 1\\]"):
        reuse.task_circuit(model, batch, share=2.0)
    with pytest.raises(InputError, match="no spans wrong0"):
        span_columns(batch, "wrong")


@cache
def ladon():
    return mh.open_model()


def test_wrong_colours_are_the_two_colours_that_are_not_the_answer():
    examples = with_wrong_colours(ColouredObjects().examples(40, seed=3))
    for example in examples:
        words = {example.prompt[slice(*span)] for name, span in example.spans.items() if name.startswith("wrong")}
        assert len(words) == 2 and example.answer.strip() not in words and example.foil.strip() in words
    batch = encode(examples, ladon().tokenizer, 40)
    columns = span_columns(batch, "wrong")
    tokens = batch.input_ids.gather(1, columns)
    assert columns.shape == (40, 2) and not (tokens == batch.answer_ids[:, None]).any()
    assert (tokens == batch.foil_ids[:, None]).any(1).all()


def test_the_heads_that_tell_ladon_a_fact_matter_more_than_random_heads_of_their_layers():
    model = ladon()
    heads = reuse.task_circuit(model, Facts(), share=0.1, depth=0, n=6).heads
    check = mh.atlas.causal_check(model, "circuit", heads, mh.atlas.task_judge(model, Facts(), n=16), "mean")
    assert check.effect > max(check.random_effects)


@pytest.mark.slow
def test_ladon_finds_receivers_and_colours_with_more_of_the_same_heads_than_chance():
    """#34 on a trained model; every circuit against 20 random sets of its layers, every pair against both nulls."""
    model, tasks = ladon(), (IOI(), ColouredObjects(), GreaterThan(), Facts())
    circuits = {task.name: reuse.task_circuit(model, task, share=0.1, depth=1, n=12) for task in tasks}
    for task in tasks:
        judge = mh.atlas.task_judge(model, task, n=24)
        check = mh.atlas.causal_check(model, "circuit", circuits[task.name].heads, judge, "mean")
        print(task.name, circuits[task.name].heads, check.effect, max(check.random_effects), check.p_value)
        assert check.p_value <= 1 / 20
    found = reuse.reuse(circuits)
    for pair, one in found.items():
        print(pair, one)
    related = found["ioi", "coloured_objects"]
    assert related.p_value < 0.05 and related.p_by_layer < 0.05
    assert related.overlap > max(found["ioi", other].overlap for other in ("greater_than", "facts"))
