"""The IOI circuit: the planted classes, the edges they attend along, and what they carry in a trained model."""

from dataclasses import replace
from functools import cache
from importlib import import_module

import planted_ioi as planted
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import manyheads as mh
from manyheads.errors import InputError
from manyheads.lab.constructed import constructed
from manyheads.tasks import IOI, ColouredObjects, Example

ioi = import_module("manyheads.atlas.circuits.ioi")


@cache
def built(seed=0):
    return planted.ioi_model(seed), planted.ioi_batch(12, seed)


@cache
def ladon():
    model = mh.open_model()
    return model, ioi.ioi_classes(model, n=6)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_planted_class_is_recovered_and_nothing_else(seed):
    model, batch = built(seed)
    members = ioi.ioi_members(ioi.ioi_classes(model, batch))
    assert {name: [str(h) for h in heads] for name, heads in members.items()} == planted.IOI_KNOWN


def test_the_direct_effects_of_the_planted_movers_are_those_of_their_writes():
    """They write 1, 0.6 and -0.4 of the same name, all there is to the logit difference: shares 1/1.2, 0.6/1.2, -0.4/1.2."""
    scores = ioi.ioi_classes(*built())
    assert abs(scores["ioi_name_mover"]["L3H1"] - 1 / 1.2) < 0.01
    assert abs(scores["ioi_name_mover"]["L3H3"] - 0.6 / 1.2) < 0.01
    assert abs(scores["ioi_negative_name_mover"]["L3H0"] - 0.4 / 1.2) < 0.01
    assert scores["ioi_name_mover"].n == 12 and scores["ioi_name_mover"].meta["receivers"] == []
    assert scores["ioi_inhibition"].meta["receivers"] == ["L3H1", "L3H3"]


def test_both_sources_of_the_inhibition_carry_the_same_half():
    scores = ioi.ioi_classes(*built())
    assert abs(scores["ioi_duplicate"]["L0H3"] - scores["ioi_induction"]["L1H1"]) < 0.02
    assert scores["ioi_previous"]["L0H0"] == pytest.approx(scores["ioi_induction"]["L1H1"], abs=0.02)


def test_the_swap_twin_cannot_see_previous_token_heads():
    """S1 and what follows it are the same in both prompts, so that their path carries nothing."""
    model, batch = built()
    swapped = batch.input_ids.clone()
    receivers = batch.input_ids.gather(1, batch.spans["IO"][:, :1])[:, 0]
    swapped[torch.arange(len(batch)), batch.spans["S2"][:, 0]] = receivers
    found = ioi.ioi_members(ioi.ioi_classes(model, replace(batch, corrupted_ids=swapped)))
    assert found["ioi_induction"] and not found["ioi_previous"]


def test_without_movers_every_later_class_is_empty():
    model, batch = built()
    scores = ioi.ioi_classes(model, batch, least=10.0)
    assert not any(ioi.ioi_members(scores).values())
    assert not scores["ioi_inhibition"].values.any()


def test_edges_are_the_architectures_own_patterns():
    model, batch = built()
    module = model.module
    module.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = torch.stack(module(batch.input_ids, output_attentions=True).attentions)  # [L, B, H, T, T]
    module.set_attn_implementation("sdpa")
    query, span = batch.spans["S2"][:, 0], torch.stack([batch.spans["S1"][:, 0], batch.spans["S1"][:, 0] + 2], 1)
    reader = ioi.Edges({"x": (query, span), "end": (batch.spans["end"][:, 0], torch.full((12, 2), -1))})
    model.read(batch.inputs, reader)
    rows = torch.arange(12)
    expected = patterns[:, rows, :, query, span[:, 0]] + patterns[:, rows, :, query, span[:, 0] + 1]  # [B, L, H]
    assert torch.allclose(reader.values["x"].float(), expected.reshape(reader.values["x"].shape), atol=1e-5)
    assert not reader.values["end"].any()


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_copy_scores_are_one_for_planted_copying_heads_and_their_negatives(shape):
    made = constructed(shape, seed=0)
    model = mh.open_model(made.module, tokenizer=made.tokenizer)
    raises, lowers = ioi.copy_scores(model, torch.arange(20, 60))
    for head in model.heads:
        assert (raises[head] > 0.9) == (head in made.known["copying"])
        assert (lowers[head] > 0.9) == (head in made.known["anti_copying"])


def test_wrong_inputs_to_the_circuit_say_so():
    model, batch = built()
    with pytest.raises(InputError, match="no span 'colour'"):
        ioi.ioi_classes(model, batch, roles=ioi.ROLES["coloured_objects"])
    with pytest.raises(InputError, match="no roles are known"):
        ioi.ioi_classes(model, replace(batch, spans={"end": batch.spans["end"]}))
    with pytest.raises(InputError, match="the same logit difference"):
        ioi.ioi_classes(model, replace(batch, corrupted_ids=batch.input_ids))
    with pytest.raises(InputError, match="all have a twin"):
        ioi.ioi_classes(model, replace(batch, corrupted_ids=None))
    with pytest.raises(InputError, match="or a tokenizer"):
        ioi.ioi_classes(model, [Example("a", " b")])


def test_in_ladon_name_movers_look_at_the_name_and_copy_it():
    _, scores = ladon()
    movers = ioi.ioi_members(scores)["ioi_name_mover"]
    assert movers
    meta = scores["ioi_name_mover"].meta
    for head in movers:
        assert meta["attention"][head.layer][head.index] >= 0.2 and meta["copy"][head.layer][head.index] >= 0.5


def test_in_ladon_the_name_movers_matter_more_than_random_heads_of_their_layers():
    model, scores = ladon()
    heads = ioi.ioi_members(scores)["ioi_name_mover"]
    check = mh.atlas.causal_check(model, "ioi_name_mover", heads, mh.atlas.task_judge(model, IOI(), n=24))
    assert check.p_value <= 0.1


def test_an_untrained_model_has_no_circuit():
    torch.manual_seed(0)
    tokenizer = ladon()[0].tokenizer
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    module = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    scores = ioi.ioi_classes(mh.open_model(module, tokenizer=tokenizer), n=8)
    assert not any(ioi.ioi_members(scores).values())


def test_coloured_objects_take_part_by_their_spans():
    model, _ = ladon()
    scores = ioi.ioi_classes(model, ColouredObjects(), n=4)
    assert set(scores) == {"ioi_name_mover", "ioi_negative_name_mover", "ioi_inhibition", "ioi_duplicate"}
    assert scores["ioi_name_mover"].meta["settings"]["roles"] == ["colour", "query", "object", "end"]
