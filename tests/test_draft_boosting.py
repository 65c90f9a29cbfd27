"""A chain of models: at first its last model is itself; pipelined it is what it is in turns; and what it learns."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
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
from manyheads.draft.boosting.chain import BoostedChain
from manyheads.draft.boosting.claims import _Asked, _given
from manyheads.draft.boosting.cross_attention import StateReader
from manyheads.draft.boosting.decoding import fused_logits
from manyheads.draft.boosting.objective import BOOSTING, boosting_loss
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.evaluation import experiment

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, SMALL),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, SMALL),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**SMALL, "sliding_window": 4}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2),
}


@lru_cache  # opening proves a layout, which costs more than most of what is done here
def opened(kind: str = "llama", seed: int = 0, **changes: Any) -> mh.HeadModel:
    torch.manual_seed(seed)
    config, model, settings = KINDS[kind]
    return mh.open_model(model(config(**settings | changes)).eval())


def chain_of(kind: str = "llama", n: int = 2, **settings: Any) -> BoostedChain:
    """Different models, and correctors that have learned something."""
    chain = BoostedChain([opened(kind, seed) for seed in range(n)], **settings)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in chain.named_parameters():
        if name.endswith(("out.weight", ".B.weight")):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return chain


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_every_model_gives_its_own_logits(kind: str) -> None:
    models = [opened(kind, seed) for seed in range(3)]
    inputs = prompts()
    real = inputs["attention_mask"].bool()
    for own, model in zip(BoostedChain(models).each_logits(inputs), models, strict=True):
        assert torch.equal(own[real], model.logits(inputs)[real])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pipelined_and_in_turns_are_equal(kind: str) -> None:
    chain = chain_of(kind, 3)
    plain = [model.logits(prompts()) for model in chain._given]
    turns, beside = (chain.each_logits(prompts(), pipelined=pipelined) for pipelined in (False, True))
    assert all(map(torch.equal, turns, beside))
    assert torch.equal(turns[0], plain[0]) and all((turns[j] - plain[j]).abs().max() > 0.01 for j in (1, 2))


def test_a_layer_runs_as_soon_as_the_same_layer_of_the_model_before_has() -> None:
    chain, reached = chain_of(n=3), [threading.Event(), threading.Event()]
    first, second, third = (model.layout.blocks for model in chain._models)

    def holds_until(event: threading.Event) -> Any:
        def wait(*_: Any) -> None:
            assert event.wait(20), "the model behind waits for more than it needs"

        return wait

    # Each model waits, before its second layer, until the model behind it is through its first.
    for blocks, behind, event in ((first, second, reached[0]), (second, third, reached[1])):
        blocks[1].module.register_forward_pre_hook(holds_until(event))
        behind[0].module.register_forward_hook(lambda *_, event=event: event.set())
    beside = chain.each_logits(prompts(), pipelined=True)
    assert all(map(torch.equal, beside, chain.each_logits(prompts())))


@pytest.mark.parametrize(("where", "pipelined"), [(0, False), (0, True), (1, True), (2, True)])
def test_an_error_in_one_model_ends_the_pass_and_nothing_waits(where: int, pipelined: bool) -> None:
    chain = chain_of(n=3)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken layer")

    handle = chain._models[where].layout.blocks[1].module.register_forward_hook(fail)
    for call in (chain.each_logits, lambda inputs, **how: chain.generate(inputs, max_new_tokens=2, **how)):
        with pytest.raises(RuntimeError, match="broken layer"):
            call(prompts(), pipelined=pipelined)
    handle.remove()
    assert chain._now is None and len(chain.each_logits(prompts(), pipelined=pipelined)) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_padded_row_gets_the_logits_it_has_alone(kind: str) -> None:
    chain, inputs = chain_of(kind), prompts()
    alone = chain.each_logits(inputs["input_ids"][1:2, 5:])
    for beside, own in zip(chain.each_logits(inputs), alone, strict=True):
        torch.testing.assert_close(beside[1:2, 5:], own, atol=1e-5, rtol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    chain, ids = chain_of(), prompts()["input_ids"]
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    before, after = (chain.each_logits(given)[1] for given in (ids, changed))
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.allclose(before[:, 7], after[:, 7])


def test_a_reader_computes_its_formula() -> None:
    torch.manual_seed(3)
    reader = StateReader(8, 2, 3).double()
    nn.init.normal_(reader.out.weight)
    nn.init.normal_(reader.own_norm.weight)
    hidden, states = torch.randn(2, 1, 4, 8, dtype=torch.double)
    apart = torch.arange(4)[:, None] - torch.arange(4)
    found = reader(hidden, reader.keys_values(states), apart[None], apart[None] >= 0)
    for t in range(4):
        z = []
        for h in range(2):
            rows = slice(3 * h, 3 * h + 3)
            q = reader.query.weight[rows] @ reader.own_norm(hidden[0, t])
            keys = [reader.key.weight[rows] @ reader.read_norm(states[0, u]) for u in range(t + 1)]
            values = torch.stack([reader.value.weight[rows] @ reader.read_norm(states[0, u]) for u in range(t + 1)])
            slope = 2.0 ** (-8 * (h + 1) / 2)
            scores = torch.stack([q @ key / 3**0.5 - slope * (t - u) for u, key in enumerate(keys)])
            z.append(scores.softmax(0) @ values)
        assert torch.allclose(found[0, t], reader.out.weight @ torch.cat(z), atol=1e-6)


def test_lora_is_added_to_each_linear_map() -> None:
    """With readers that add nothing, the last model is the model whose weights are W + 2 B A."""
    chain = BoostedChain([opened(), opened(seed=1)], rank=2)
    merged = opened(seed=7)
    merged.plain.load_state_dict(opened(seed=1).plain.state_dict())
    parts = [part for block in merged.layout.blocks for part in block.module.modules() if isinstance(part, nn.Linear)]
    assert len(parts) == len(chain.correctors[0].low_rank) == 21
    with torch.no_grad():
        for part, low_rank in zip(parts, chain.correctors[0].low_rank, strict=True):
            nn.init.normal_(low_rank.B.weight, std=0.3)
            part.weight += 2 * low_rank.B.weight @ low_rank.A.weight
    torch.testing.assert_close(chain.each_logits(prompts())[1], merged.logits(prompts()), atol=1e-5, rtol=1e-4)
    assert len(BoostedChain([opened(), opened()], rank=0).correctors[0].low_rank) == 0


def test_the_loss_punishes_the_mistake_of_the_model_before_and_nothing_else() -> None:
    logits = torch.tensor([[[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]]])
    before = torch.tensor([[[5.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])  # it says 0, then 2
    targets, weights = torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.5]])
    cross = -logits.log_softmax(-1)[0, [0, 1], [1, 2]]
    suppressed = -torch.tensor(2.0 - 1.0).sigmoid().log()
    wanted = (cross[0] + 0.3 * suppressed + 0.5 * cross[1]) / 1.5
    assert torch.allclose(boosting_loss(logits, before, targets, weights, 0.3), wanted)
    assert torch.allclose(boosting_loss(logits, before, targets, weights, 0.0), (cross[0] + 0.5 * cross[1]) / 1.5)


def test_answers_are_fused_over_likely_tokens() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = fused_logits([own.log() for own in p], 1, (3.0, 1.0))
    assert torch.allclose(found[0, [0, 3]], 0.75 * p[0][0, [0, 3]].log() + 0.25 * p[1][0, [0, 3]].log())
    assert found[0, [1, 2]].tolist() == [-torch.inf, -torch.inf]
    assert torch.allclose(fused_logits([p[0].log(), p[1].log()], 9, (0.0, 1.0)), p[1].log())


# Decoding


@pytest.mark.parametrize(("kind", "pipelined"), [("llama", False), ("llama", True), ("gemma3", True), ("gpt2", False)])
def test_cached_decoding_is_what_whole_passes_give_also_in_padded_rows(kind: str, pipelined: bool) -> None:
    chain, inputs = chain_of(kind, 3), prompts()
    found = chain.generate(inputs, pipelined=pipelined, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        text = ids[mask.bool()][None]
        for _ in range(6):
            text = torch.cat([text, chain.logits(text)[:, -1:].argmax(-1)], 1)
        assert found[row, -6:].tolist() == text[0, -6:].tolist()
    slow = chain.generate(inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(found, slow)


def test_without_corrections_the_chain_of_one_model_decodes_as_the_model() -> None:
    model = mh.open_model()
    chain = BoostedChain([model, model])
    text = "Alice has 3 apples. The sum of 3 and 4 is"
    assert chain.generate(text, max_new_tokens=5, do_sample=False) == model.generate(
        text, max_new_tokens=5, do_sample=False
    )


def test_sampled_tokens_have_the_fused_distribution_and_follow_the_seed() -> None:
    chain, ids = chain_of(top_k=3), prompts()["input_ids"][:1]

    def drawn(n: int) -> torch.Tensor:
        torch.manual_seed(5)
        return chain.generate(ids, max_new_tokens=2, do_sample=True, num_return_sequences=n, top_k=0)[:, -2:]

    first, again = drawn(1000), drawn(1000)
    assert torch.equal(first, again)
    wanted = chain.logits(ids)[0, -1].softmax(-1)
    share = torch.bincount(first[:, 0], minlength=61) / 1000
    assert (share - wanted).abs().max() < 0.05 and set(first[:, 0].tolist()) <= set(wanted.nonzero()[:, 0].tolist())
    follows = first[first[:, 0] == share.argmax()][:, 1]
    wanted = chain.logits(torch.cat([ids, share.argmax()[None, None]], 1))[0, -1].softmax(-1)
    assert (torch.bincount(follows, minlength=61) / len(follows) - wanted).abs().max() < 0.08


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"cache_implementation": "static"}, "static"),
        ({"past_key_values": object()}, "cache that is given"),
    ],
)
def test_ways_to_decode_that_a_chain_has_not_are_refused(how: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        chain_of().generate(prompts(), max_new_tokens=2, **how)


# Learning


def counting(n: int = 64) -> torch.Tensor:
    """Rows that count on from anywhere."""
    return (torch.arange(8) + torch.arange(n)[:, None]) % 61


def test_only_correctors_learn_and_the_models_stay_bit_for_bit() -> None:
    models = [opened(seed=seed) for seed in range(3)]
    weights = [{name: tensor.clone() for name, tensor in model.plain.state_dict().items()} for model in models]
    chain, rows = BoostedChain(models), counting()
    first = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    loss = [-own[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None]).mean() for own in chain.each_logits(rows)]
    done = chain.fit(rows, replace(BOOSTING, steps=20, rate=1e-2))
    after = [-own[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None]).mean() for own in chain.each_logits(rows)]
    assert after[0] == loss[0] and all(after[j] < loss[j] - 0.2 for j in (1, 2)) and [p.step for p in done] == [20, 20]
    for model, before in zip(models, weights, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.plain.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.plain.parameters())
    moved = {name.split(".")[2] for name, tensor in chain.state_dict().items() if not torch.equal(tensor, first[name])}
    assert moved == {"readers", "low_rank"}


def test_a_model_that_knows_nothing_learns_to_say_what_it_reads() -> None:
    """Model 1 counts. Model 2 is blind to order, has no LoRA, and never saw a counted row but through its readers."""
    teacher = opened(seed=9)
    teacher.plain.requires_grad_(True)
    rows = counting()
    optimizer = torch.optim.Adam(teacher.plain.parameters(), 1e-2)
    for _ in range(60):
        loss = teacher.plain(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    blind = opened(seed=8)
    nn.init.zeros_(blind.plain.model.embed_tokens.weight)
    chain = BoostedChain([teacher, blind], rank=0)
    chain.fit(rows, replace(BOOSTING, steps=40, rate=5e-3))
    said = [own[:, :-1].argmax(-1) for own in chain.each_logits(rows)]
    right = [(own == rows[:, 1:]).float().mean() for own in said]
    assert (
        right[0] > 0.95
        and right[1] > 0.8
        and (blind.logits(rows)[:, :-1].argmax(-1) == rows[:, 1:]).float().mean() < 0.1
    )


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    how, models = replace(BOOSTING, steps=6, rows=8), [opened(seed=seed) for seed in range(3)]
    whole, parted = (BoostedChain(models) for _ in range(2))
    whole.fit(counting(), how)
    calls = iter(range(100))

    def interrupt(*_: Any) -> None:
        if next(calls) == 3:  # in the run of the third model
            raise KeyboardInterrupt

    handle = parted.correctors[1].readers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        parted.fit(counting(), replace(how, save_minutes=0.0), tmp_path)
    handle.remove()
    resumed = BoostedChain(models)
    resumed.fit(counting(), how, tmp_path)
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_texts_are_learned_from_padded_or_cut() -> None:
    model = mh.open_model()
    chain = BoostedChain([model, model], rank=2, heads=2, head_dim=8)
    done = chain.fit(["One two three.", "four " * 30], replace(BOOSTING, steps=None, epochs=2, rows=2), length=16)
    assert done[0].step == 2 * (3 // 2) and done[0].loss > 0


# Files


def test_a_chain_reloads_bit_for_bit_beside_its_own_models_only(tmp_path: Path) -> None:
    chain = chain_of(n=3, shares=(0.2, 0.3, 0.5), top_k=4)
    chain.save(tmp_path / "chain")
    again = BoostedChain.load(tmp_path / "chain", [opened(seed=seed) for seed in range(3)])
    assert torch.equal(chain.logits(prompts()), again.logits(prompts()))
    with pytest.raises(InputError, match="exists"):
        chain.save(tmp_path / "chain")
    with pytest.raises(MismatchError, match="learned beside model"):
        BoostedChain.load(tmp_path / "chain", [opened(seed=seed) for seed in (0, 2, 1)])
    with pytest.raises(InputError, match="holds no chain"):
        BoostedChain.load(tmp_path, [opened(), opened()])


# Refusals


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([], "two models or more"),
        ([lambda: opened("qwen3")], "class Qwen3ForCausalLM, and model 1 LlamaForCausalLM"),
        ([lambda: opened(num_hidden_layers=2)], "layers: 2, and model 1 3"),
        ([lambda: opened(hidden_size=16)], "width 16, and model 1 32"),
        ([opened, lambda: opened(vocab_size=62)], "model 3, .* tokens: 62, and model 1 61"),
    ],
)
def test_models_of_different_kinds_are_refused(others: list[Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        BoostedChain([opened(), *(make() for make in others)])


def test_what_cannot_be_done_is_refused_before_work() -> None:
    from transformers import BertConfig, BertForMaskedLM

    settings = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    bert = mh.open_model(BertForMaskedLM(BertConfig(**settings, num_attention_heads=4)).eval())
    with pytest.raises(UnsupportedError, match="BertForMaskedLM, is no decoder"):
        BoostedChain([bert, bert])
    model = opened()
    with model.editing(mh.Scale(["L0H0"], 0.0)), pytest.raises(InputError, match="being edited"):
        BoostedChain([model, model])
    for wrong in ({"rank": -1}, {"heads": 0}, {"strength": float("nan")}, {"shares": (1, 2, 3)}, {"shares": (0, 0)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            BoostedChain([model, model], **wrong)
    chain = BoostedChain([model, model])
    with pytest.raises(InputError, match="needs a tokenizer"):
        chain.fit(["a text"])
    with pytest.raises(InputError, match="weights has shape"):
        chain.fit({"input_ids": counting(), "weights": torch.ones(64, 7)})
    with pytest.raises(InputError, match="not from labels"):
        chain.fit({"input_ids": counting(), "labels": counting()})
    with pytest.raises(InputError, match="nothing follows"):
        chain.fit(counting()[:, :1])
    with pytest.raises(InputError, match="out of range"):
        chain.fit(counting() + 61)


# The experiment


def test_the_experiment_is_found_by_its_room() -> None:
    found = experiment("draft", "llm-boost")
    assert found.numbers == (13,) and found.baseline == "model 1" and len(found.claims) == 10


def test_a_question_is_right_if_all_that_is_asked_for_is() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 4, 5]])
    scores = torch.nn.functional.one_hot(torch.tensor([[0, 3], [4, 0]]), 6).float()
    given, start = _given(ids, 1), lambda *_: opened()
    assert _Asked(given, given, start, BOOSTING).right(scores).tolist() == [True, False]
    both = _given(ids, 2)
    assert _Asked(both, both, start, BOOSTING).right(scores).tolist() == [False, False]


@pytest.mark.slow
def test_a_chain_and_what_stands_beside_it_cost_the_same(tmp_path: Path) -> None:
    tried = experiment("draft", "llm-boost").run(seeds=(0,), quick=True, folder=tmp_path)
    table = tried.comparison.table.set_index(["dataset", "method", "metric"])["value"]
    for dataset in ("sums", "colours"):
        twice = table[dataset, "twice as long", "TFLOP"]
        assert table[dataset, "average of the two", "TFLOP"] == pytest.approx(twice)
        assert 0.6 * twice < table[dataset, "chain", "TFLOP"] <= twice
    assert table["sums", "twice as deep", "TFLOP"] == pytest.approx(table["sums", "twice as long", "TFLOP"], rel=0.1)
    assert len(tried.verdicts) == 9
