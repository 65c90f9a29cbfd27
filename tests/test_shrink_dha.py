import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import VOCAB, inputs_for, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.lab.small_llama import llama_config
from manyheads.model.offloading import own_copy
from manyheads.shrink.shrinking import shrink_way
from manyheads.shrink.weights import fusion
from manyheads.shrink.weights.dha import DHA, allotted, grouped, redundancy
from manyheads.shrink.weights.fusion import FUSION, fused
from manyheads.shrink.weights.shared_heads import Grouping, Source, adjacent, install, mean_pooled

KEYS = (((0, 5), (1, 3), (2, 7), (4, 6)), ((0, 1), (2, 6), (3, 4), (5, 7)))
VALUES = (((0, 2), (1, 7), (3, 6), (4, 5)), ((0, 6), (1, 4), (2, 3), (5, 7)))
SHARING = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "mixtral", "opt", "stablelm"]


def small(layers=2, heads=8, seed=0, width=64, **more):
    torch.manual_seed(seed)
    module = LlamaForCausalLM(llama_config(VOCAB, width, layers, heads, **more)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return module


def planted(keys=KEYS, values=VALUES):
    """A model of 8 heads whose keys are the same in hidden pairs, and its values in others."""
    module = small()
    with torch.no_grad():
        for layer, k, v in zip(module.model.layers, keys, values, strict=True):
            for projection, pairs in ((layer.self_attn.k_proj, k), (layer.self_attn.v_proj, v)):
                heads = projection.weight.unflatten(0, (8, -1))
                for first, second in pairs:
                    heads[second] = heads[first]
    return mh.open_model(module)


def uneven(model, seed=0):
    """Groups of any sizes that fit, other ones for keys and for values and for every layer."""
    rng = np.random.default_rng(seed)
    H = model.n_kv_heads
    sizes = itertools.cycle([d for d in range(1, H + 1) if H % d == 0][::-1])

    def groups():
        rows = rng.permutation(H).reshape(-1, next(sizes)).tolist()
        return tuple(sorted(tuple(sorted(row)) for row in rows))

    both = [tuple(groups() for _ in range(model.n_layers)) for _ in range(2)]
    return Grouping(*both)


def logits(module, **inputs):
    with torch.no_grad():
        return module(**inputs).logits


@pytest.mark.parametrize("name", [*SHARING, "bert"])
def test_before_fusion_the_blended_model_is_the_model_for_any_grouping(name):
    model, given = opened(name), inputs_for(name)
    module, _ = fusion.blended(Source.of(model), uneven(model))
    assert (logits(module.eval(), **given) - logits(model.plain, **given)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_members_that_coincide_collapse_to_one_head_with_the_same_logits(name):
    # Keys are blended before their rotation and their norm, so w may differ from channel to channel.
    model = opened(name)
    source, grouping = Source.of(model), uneven(model, 3)
    module, blends = fusion.blended(source, grouping)
    for blend in blends.values():
        w = torch.randn_like(blend.w[:, :1]).expand_as(blend.w)
        with torch.no_grad():
            blend.drift += (w - blend.w) / fusion.SPEED
        assert float(blend.apart().detach()) < 1e-8
    given = inputs_for(name)
    wanted = logits(module.eval(), **given)
    heads = {path: blend.fused() for path, blend in blends.items()}
    found = fusion.collapsed(model, grouping, heads)
    assert (logits(found.plain, **given) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_plan_finds_hidden_duplicates_and_the_half_of_the_heads_computes_the_same():
    model = planted()
    plan = DHA(share=0.5).plan(model)
    assert (plan.key, plan.value) == (KEYS, VALUES) and plan.share == 0.5
    given = inputs_for("llama")
    wanted = model.logits(given)
    off = (mean_pooled(model, plan).logits(given) - wanted).abs().max()
    usual = (mean_pooled(model, adjacent(model, 4)).logits(given) - wanted).abs().max()
    assert off < 1e-4 and usual > 10 * off and usual > 0.1


def test_redundancy_is_one_for_equal_heads():
    everyone = tuple((0, h) for h in range(1, 8))
    model = planted((everyone,) * 2, VALUES)
    found = redundancy(model)
    assert np.allclose(found["key"], 1, atol=1e-5) and (found["value"] < 0.5).all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "opt", "stablelm"])
def test_with_shared_heads_cached_generation_is_uncached_and_the_cache_has_their_share(name):
    model = opened(name)
    grouping = uneven(model)
    shared = mean_pooled(model, grouping)
    ids = inputs_for(name, batch=1, length=9)["input_ids"]
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(shared.plain.generate(ids, **how), shared.plain.generate(ids, use_cache=False, **how))
    sizes = []
    for module in (model.plain, shared.plain):
        cache = DynamicCache()
        logits(module, input_ids=ids, past_key_values=cache)
        sizes.append(sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)))
    assert sizes[1] / sizes[0] == grouping.share < 1


def test_an_encoder_has_fewer_weights():
    model = opened("bert")
    shared = mean_pooled(model, uneven(model))
    shared.logits(inputs_for("bert"))
    assert shared.plain.num_parameters() < model.plain.num_parameters()


def test_padded_rows_and_beams_generate_what_they_would_without_a_cache():
    shared = mean_pooled(opened("llama"), uneven(opened("llama")))
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids > 0).long()
    for beams in (1, 3):
        how = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=beams, pad_token_id=0)
        assert torch.equal(shared.plain.generate(ids, **how), shared.plain.generate(ids, use_cache=False, **how))


def test_a_static_cache_serves_where_keys_are_as_many_as_values_and_is_refused_elsewhere():
    model = planted()
    shared = mean_pooled(model, Grouping(KEYS, VALUES))
    ids = inputs_for("llama", batch=1)["input_ids"]
    cache = StaticCache(model.config, max_cache_len=16)
    assert torch.allclose(
        logits(shared.plain, input_ids=ids, past_key_values=cache), logits(shared.plain, input_ids=ids), atol=1e-4
    )
    assert cache.layers[0].keys.shape[1] == 4
    lopsided = mean_pooled(model, Grouping(KEYS, adjacent(model, 2).value))
    with pytest.raises(UnsupportedError, match="static cache"):
        logits(lopsided.plain, input_ids=ids, past_key_values=StaticCache(model.config, max_cache_len=16))


def test_one_grouping_for_keys_and_values_gives_an_ordinary_grouped_query_checkpoint(tmp_path):
    model = planted(KEYS[:1] * 2, KEYS[:1] * 2)
    made = mean_pooled(model, DHA(share=0.5, plain=True).plan(model))
    assert type(made.plain) is LlamaForCausalLM and made.config.num_key_value_heads == made.n_kv_heads == 4
    given = inputs_for("llama")
    made.save_pretrained(tmp_path / "made")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert (logits(again, **given) - model.logits(given)).abs().max() < 1e-4
    assert again.num_parameters() < model.plain.num_parameters()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss", "qwen2"])
def test_an_ordinary_checkpoint_has_the_logits_of_the_shared_form(name):
    # Sinks, biases and norms of single heads move with their query heads.
    model = opened(name)
    grouping = adjacent(model, 1)
    plain = mean_pooled(model, grouping)
    form = own_copy(model.plain)
    install(form, Source.of(model).settings(grouping))
    given = inputs_for(name)
    assert plain.config.num_key_value_heads == 1
    assert (plain.logits(given) - logits(form, **given)).abs().max() < 1e-4


def test_query_heads_follow_their_group_into_the_ordinary_checkpoint():
    module = small(heads=6, width=96, attention_bias=True)
    model = mh.open_model(module)
    groups = (((0, 4), (1, 2), (3, 5)),) * 2
    grouping = Grouping(groups, groups)
    plain = mean_pooled(model, grouping)
    form = own_copy(model.plain)
    install(form, Source.of(model).settings(grouping))
    given = inputs_for("llama")
    assert plain.config.num_key_value_heads == 3 and type(plain.plain) is LlamaForCausalLM
    assert (plain.logits(given) - logits(form, **given)).abs().max() < 1e-4


def test_fusion_ends_with_coinciding_heads_and_a_lower_loss_than_means_and_leaves_the_model_alone():
    model = mh.open_model(small(layers=1, heads=4))
    before = {name: value.clone() for name, value in model.plain.state_dict().items()}
    ids = torch.arange(6 * 24).reshape(6, 24) * 7 % 50 + 3
    how = replace(FUSION, steps=120, rows=6, rate=3e-4)
    plan = DHA(share=0.5).plan(model)
    made, left = fused(model, plan, ids, how)
    assert left < 0.05
    assert text_loss(made, ids) < text_loss(mean_pooled(model, plan), ids) - 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.plain.state_dict().items())


def text_loss(model, ids):
    logits = model.logits(ids)[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_convert_searches_fuses_and_trains_on_and_goes_on_where_it_was(tmp_path):
    model = mh.open_model(small(layers=2, heads=4))
    ids = torch.arange(6 * 24).reshape(6, 24) * 7 % 50 + 3
    short = replace(FUSION, steps=4, rows=2)
    method = DHA(share=0.5, texts=ids, search=short, fusion=replace(FUSION, steps=30, rows=6, rate=3e-4), tuning=short)
    made = method.convert(model, folder=tmp_path)
    again = method.convert(model, folder=tmp_path)
    assert torch.equal(again.logits(ids), made.logits(ids)) and (tmp_path / "tuning").is_dir()
    cache = DynamicCache()
    logits(made.plain, input_ids=ids[:1], past_key_values=cache)
    kept = sum(layer.keys.shape[1] + layer.values.shape[1] for layer in cache.layers)
    assert kept == 8 and not made.plain.training


@given(st.integers(0, 50), st.sampled_from([2, 3]))
@settings(max_examples=10, deadline=None)
def test_grouped_finds_the_best_groups_of_six(seed, n):
    points = np.random.default_rng(seed).normal(size=(6, 3))
    distance = ((points[:, None] - points) ** 2).sum(-1)

    def inside(groups):
        return sum(distance[a, b] for group in groups for a, b in itertools.combinations(group, 2))

    orders = itertools.permutations(range(6))
    best = min(inside([order[i : i + 6 // n] for i in range(0, 6, 6 // n)]) for order in orders)
    assert inside(grouped(distance, n, seed)) == pytest.approx(best)


def test_the_budget_goes_where_a_head_saves_most_and_is_not_exceeded():
    costs = {"a": {1: 0.9, 2: 0.1, 4: 0.0}, "b": {1: 0.3, 2: 0.2, 4: 0.0}, "c": {1: 0.0, 2: 0.0, 4: 0.0}}
    assert allotted(costs, 3) == {"a": 1, "b": 1, "c": 1}
    assert allotted(costs, 4) == {"a": 2, "b": 1, "c": 1}
    assert allotted(costs, 12) == {"a": 4, "b": 4, "c": 1}


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "bloom"])
def test_a_common_map_of_q_k_and_v_is_refused(name):
    with pytest.raises(UnsupportedError, match=r"nn\.Linear of their own"):
        DHA().convert(opened(name))


def test_norms_over_heads_single_kv_heads_and_small_shares_are_refused():
    with pytest.raises(UnsupportedError, match="norm over all"):
        DHA(share=0.5).convert(opened("olmo2"))
    one = mh.open_model(small(num_key_value_heads=1))
    with pytest.raises(UnsupportedError, match="one KV head"):
        DHA().convert(one)
    with pytest.raises(InputError, match="less than one a layer"):
        DHA(share=0.1).plan(opened("llama"))
    with pytest.raises(InputError):
        DHA(share=1.5)
    with pytest.raises(InputError, match="equal size"):
        Grouping((((0, 1), (2,)),), (((0, 1, 2),),))


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize("damage", [{}, {"head_dim": 8}, {"head_dim": 8, "layers": [{"key": 1}]}])
def test_damaged_settings_are_one_sentence(damage):
    with pytest.raises(InputError, match="do not fit LlamaForCausalLM"):
        install(small(), damage)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_saved_model_opens_again_and_generates_with_its_small_cache(tmp_path, name):
    shared = mean_pooled(opened(name), uneven(opened(name)))
    given = inputs_for(name, batch=1)
    shared.save_pretrained(tmp_path / "shared")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "shared")
    again = mh.open_model(tmp_path / "shared")
    assert torch.equal(logits(plain, **given), shared.logits(given))
    assert torch.equal(again.logits(given), shared.logits(given))
    cache = DynamicCache()
    logits(plain, **given, past_key_values=cache)
    kept = sum(layer.keys.shape[1] + layer.values.shape[1] for layer in cache.layers)
    assert kept == 3 * 2 * shared.n_kv_heads * uneven(opened(name)).share


def test_it_is_a_method_of_manyheads_shrink():
    assert shrink_way("dha")(0.75) == DHA(share=0.25)
