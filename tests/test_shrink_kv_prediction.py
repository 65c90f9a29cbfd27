"""KV prediction: with the base as its own helper it is the base; and what it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.lab.permutations import CUE, VOCABULARY, permutation_prompts
from manyheads.lab.small_llama import llama_config
from manyheads.shrink.online.kv_prediction import LEARNING, KVPrediction, KVPredictor, layer_pruned, sources
from manyheads.training import Batch, fit

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def opened(kind: str = "llama", **changes: int) -> mh.HeadModel:
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    return mh.open_model(model(config(**SMALL | changes)).eval(), tokenizer=None)


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_base_that_predicts_its_own_cache_generates_as_ever(kind: str) -> None:
    base = opened(kind)
    predictor = KVPredictor.new(base, opened(kind)).eval()
    inputs = prompts()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wanted = base.logits(inputs)[:, -1]
    with torch.no_grad():
        cache = predictor.cache(ids[:, :-1], mask[:, :-1])
        positions = (mask.cumsum(1) - 1)[:, -1:]
        found = base.plain(ids[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(found[:, -1], wanted, atol=1e-4, rtol=1e-4)
    plain = base.generate(inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(predictor.generate(inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False), plain)


def test_early_layers_of_the_helper_serve_most() -> None:
    assert sources(28, 14) == [i // 2 for i in range(28)]
    assert sources(28, 20) == [i // 2 for i in range(16)] + list(range(8, 20))
    with pytest.raises(InputError, match="more than the 4"):
        sources(4, 5)


def test_a_helper_made_of_the_base_has_its_layers() -> None:
    base = opened()
    half = layer_pruned(base, 0.5)
    assert half.n_layers == 2
    for new, old in ((0, 0), (1, 3)):
        ours, its = (m.layout.blocks[i].module.state_dict() for m, i in ((half, new), (base, old)))
        assert all(torch.equal(ours[key], its[key]) for key in its)
    ids = prompts()["input_ids"]
    torch.testing.assert_close(layer_pruned(base, 1.0).logits(ids), base.logits(ids))


def test_it_learns_and_the_base_stays_as_it_is(tmp_path: Path) -> None:
    base = opened(num_key_value_heads=3)
    ids = torch.arange(24).repeat(2)[None] + torch.arange(30)[:, None]  # counting, from anywhere on
    before = base.fingerprint
    settings = replace(LEARNING, steps=80, rows=8, rate=1e-2, warmup=2)
    method = KVPrediction(texts=ids % 61, settings=settings)
    predictor = method.learn(base, opened(hidden_size=24, num_attention_heads=3, num_key_value_heads=1))
    assert base.fingerprint == before
    assert all(parameter.requires_grad for parameter in base.plain.parameters())
    untrained = KVPredictor.new(base, opened(hidden_size=24, num_attention_heads=3, num_key_value_heads=1))

    def apart(one: KVPredictor) -> float:
        row = ids[:2] % 61
        whole = base.plain(row, use_cache=True).past_key_values
        made = one.cache(row)
        return sum(float((a.keys - b.keys).abs().mean()) for a, b in zip(made.layers, whole.layers, strict=True))

    with torch.no_grad():
        assert apart(predictor) < 0.7 * apart(untrained)
    predictor.save(tmp_path / "predictor")
    again = KVPredictor.load(tmp_path / "predictor", base)
    row = ids[:1, :20] % 61
    for one, other in zip(again.cache(row).layers, predictor.cache(row).layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
    with pytest.raises(MismatchError, match="not of this one"):
        KVPredictor.load(tmp_path / "predictor", opened(num_key_value_heads=6))
    with pytest.raises(InputError, match="no KV predictor"):
        KVPredictor.load(tmp_path, base)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    base = opened()
    ids = torch.randint(61, (16, 12), generator=torch.Generator().manual_seed(0))
    settings = replace(LEARNING, steps=6, rows=4, warmup=1)
    whole = KVPrediction(texts=ids, settings=settings).learn(base)
    again = KVPrediction(texts=ids, settings=settings).learn(base, folder=tmp_path)
    resumed = KVPrediction(texts=ids, settings=settings).learn(base, folder=tmp_path)
    for name, tensor in whole.maps.state_dict().items():
        torch.testing.assert_close(again.maps.state_dict()[name], tensor)
        torch.testing.assert_close(resumed.maps.state_dict()[name], tensor)


def test_what_cannot_be_predicted_is_refused_by_name() -> None:
    base = opened()
    gpt2 = mh.open_model(
        GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=4)).eval(), tokenizer=None
    )
    with pytest.raises(UnsupportedError, match="rotary"):
        KVPredictor.new(gpt2, gpt2)
    sliding = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    gemma = mh.open_model(Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **sliding)).eval(), tokenizer=None)
    with pytest.raises(UnsupportedError, match="forget"):
        KVPredictor.new(gemma, gemma)
    with pytest.raises(InputError, match="must be the same"):
        KVPredictor.new(base, opened(vocab_size=60))
    with pytest.raises(InputError, match="layers"):
        KVPrediction(layers=0.0)


# The trained toy: which of four permutations do these examples show? (slow)


def _asked(n: int, seed: int) -> torch.Tensor:
    given = permutation_prompts(n, seed=seed)
    return torch.cat([given.tokens, given.answers[:, None]], 1)


def _learner(width: int, layers: int, heads: int, hidden: int) -> mh.HeadModel:
    torch.manual_seed(0)
    config = llama_config(VOCABULARY, width, layers, heads, intermediate_size=hidden)
    return mh.open_model(LlamaForCausalLM(config).eval(), tokenizer=None)


def _loss_at_cues(model: Any, batch: Batch) -> torch.Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    cues = ids[:, :-1] == CUE
    return torch.nn.functional.cross_entropy(logits[cues], ids[:, 1:][cues])


def _trained(model: mh.HeadModel, steps: int, rate: float) -> mh.HeadModel:
    settings = replace(LEARNING, steps=steps, rows=64, rate=rate)
    fit(model.plain.requires_grad_(True), lambda i: {"input_ids": _asked(64, i + 1)}, settings, loss=_loss_at_cues)
    model.plain.eval()
    return model


@pytest.mark.slow
def test_on_the_toy_a_small_helper_reads_the_examples_and_the_base_answers_from_its_cache() -> None:
    base, helper = _trained(_learner(64, 3, 8, 128), 600, 1e-3), _trained(_learner(24, 2, 4, 96), 2000, 4e-3)
    method = KVPrediction(texts=_asked(20_000, 10**6), settings=replace(LEARNING, steps=1200, rows=64, rate=4e-3))
    untrained, predictor = KVPredictor.new(base, helper), method.learn(base, helper)
    test = _asked(1000, 10**7)

    def share(logits: torch.Tensor) -> float:
        return float((logits[:, -1].argmax(-1) == test[:, -1]).float().mean())

    def answered(one: KVPredictor) -> float:
        return share(base.plain(test[:, -2:-1], past_key_values=one.cache(test[:, :-2])).logits)

    with torch.no_grad():
        shares = {"base": share(base.logits(test[:, :-1])), "helper": share(helper.logits(test[:, :-1]))}
        shares |= {"untrained": answered(untrained), "predicted": answered(predictor)}
    print(", ".join(f"{name} {value:.3f}" for name, value in shares.items()))
    assert shares["base"] >= 0.97 and shares["untrained"] <= 0.2
    assert shares["predicted"] >= 0.97
