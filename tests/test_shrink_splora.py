"""Pruning adapters begin at the model, end at what is cut, and leave the weights alone."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as tf
from architectures import GEMMA, LLAMA, opened

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.shrink import recovery
from manyheads.shrink.shrinking import shrink_way
from manyheads.shrink.weights.amp import AMP
from manyheads.shrink.weights.pruning_adapter import PruningAdapter, adapted
from manyheads.shrink.weights.splora import ADAPTING, SPLoRA
from manyheads.training import next_token_loss

RATIO = 0.03  # of all parameters, most of which are embeddings in these models
KINDS = {
    "Llama-MHA": ("Llama", {"num_key_value_heads": 4}),
    "Llama-GQA": ("Llama", {"num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True}),
    "Qwen3-GQA": ("Qwen3", {"head_dim": 16}),
    "Gemma2-GQA": ("Gemma2", GEMMA),
    "GPTNeoX": ("GPTNeoX", {}),
}
TEXTS = ["the cat sat on the mat and the dog sat on the rug. " * 60]
IDS = torch.randint(5, 4000, (3, 9), generator=torch.Generator().manual_seed(0))


@cache
def made(kind="Llama-GQA"):
    """A small random model that reads what ladon's tokenizer writes."""
    torch.manual_seed(0)
    name, own = KINDS[kind]
    config = {**LLAMA, **own, "vocab_size": 4096, "intermediate_size": 50}
    if name == "GPTNeoX":
        config.pop("num_key_value_heads")
    module = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**config)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return mh.open_model(module, tokenizer=mh.open_model().tokenizer)


def method(steps=4, **changes):
    return SPLoRA(
        RATIO, rank=4, texts=TEXTS, length=16, settings=replace(ADAPTING, steps=steps, rows=4, warmup=1), **changes
    )


@cache
def learned(kind="Llama-GQA"):
    return method().learn(made(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_has_learned_nothing_leaves_the_logits_bit_for_bit(kind):
    model = made(kind)
    start = method()._start(model)
    plain = model.logits(IDS)
    with adapted(model, start, {"value": 1.0}):
        assert torch.equal(model.logits(IDS), plain)
    with start.on(model):  # the mask alone acts
        assert not torch.allclose(model.logits(IDS), plain, atol=1e-2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "GPTNeoX"])
def test_what_is_cut_out_computes_what_is_masked(kind):
    model, adapter = made(kind), learned(kind)
    small = adapter.convert(model)
    with adapter.on(model):
        masked = model.logits(IDS)
    assert (small.logits(IDS) - masked).abs().max() < 1e-5 * masked.abs().max()
    assert (len(adapter.heads) or kind == "Gemma2-GQA") and min(
        map(len, adapter.units)
    ) < 50  # its units are most of it
    sizes = [sum(p.numel() for p in one.plain.parameters()) for one in (model, small)]
    assert sizes[0] - sizes[1] == AMP(RATIO, prompts=TEXTS).plan(model).removed


def test_sliced_is_masked_within_a_millionth_in_double_precision():
    model = made()
    double = mh.open_model(recovery.own_copy(model.plain).double(), tokenizer=model.tokenizer)
    adapter = replace(learned(), fingerprint=double.fingerprint)
    with adapter.on(double):
        masked = double.logits(IDS)
    assert masked.dtype == torch.float64
    assert (adapter.convert(double).logits(IDS) - masked).abs().max() < 1e-6


def test_adapters_of_several_tasks_share_weights_that_never_change():
    model = made()
    before = {name: p.clone() for name, p in model.plain.named_parameters()}
    plain = model.logits(IDS)
    one, other = learned(), method(seed=1).learn(model)
    with one.on(model):
        first = model.logits(IDS)
    with other.on(model):
        assert not torch.equal(model.logits(IDS), first)
    with one.on(model):
        assert torch.equal(model.logits(IDS), first)
    assert torch.equal(model.logits(IDS), plain)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.plain.named_parameters())
    assert one.learned == sum(4 * sum(m.weight.shape) for m in recovery.linear_maps(model).values())


def test_learning_lowers_the_loss_of_what_is_cut():
    model = made()
    held = mh.tasks.texts.passages(model, TEXTS, n=8, length=16, seed=3)

    def loss(one):
        with torch.no_grad():
            return float(next_token_loss(one.plain, {"input_ids": held}))

    cut = AMP(RATIO, prompts=TEXTS).convert(model)
    small = replace(method(40), settings=replace(ADAPTING, steps=40, rows=4, rate=1e-2)).convert(model)
    assert loss(small) < loss(cut) - 0.5


def test_a_file_holds_the_task_alone_and_knows_its_model(tmp_path):
    model, adapter = made(), learned()
    adapter.save(tmp_path / "task")
    again = PruningAdapter.load(tmp_path / "task", model)
    assert again.heads == adapter.heads and again.learned == adapter.learned
    assert torch.equal(again.convert(model).logits(IDS), adapter.convert(model).logits(IDS))
    with pytest.raises(MismatchError, match="was learned on model"):
        PruningAdapter.load(tmp_path / "task", made("Llama-MHA"))
    with pytest.raises(MismatchError), adapter.on(made("Llama-MHA")):
        pass
    with pytest.raises(InputError, match="holds no pruning adapter"):
        PruningAdapter.load(tmp_path, model)
    with pytest.raises(InputError, match="does not fit this model"):
        PruningAdapter.load(tmp_path / "task", opened("gpt2"))


def test_the_small_model_is_an_ordinary_checkpoint(tmp_path):
    small = learned().convert(made())
    small.save_pretrained(tmp_path / "small")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.allclose(again(input_ids=IDS).logits, small.logits(IDS), atol=1e-6)


def test_an_interrupted_run_goes_on_to_the_same_adapter(tmp_path):
    model, steps = made(), []

    def bar(*_, **__):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    how = replace(method(), settings=replace(method().settings, save_minutes=1e-9))
    with pytest.raises(KeyboardInterrupt):
        how.learn(model, folder=tmp_path / "run", bar=bar)
    again = how.learn(model, folder=tmp_path / "run")
    for path, (C, R) in learned().changes.items():
        assert torch.allclose(again.changes[path][0], C, atol=1e-6) and torch.allclose(
            again.changes[path][1], R, atol=1e-6
        )


def test_what_cannot_be_adapted_is_refused_by_name():
    with pytest.raises(InputError, match="rank is 0"):
        SPLoRA(rank=0)
    with pytest.raises(InputError, match="closing is 2"):
        SPLoRA(closing=2)
    import peft

    module = tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "vocab_size": 4096}))
    wrapped = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.raises(UnsupportedError, match="adapters already"):
        SPLoRA(RATIO).learn(mh.open_model(wrapped, tokenizer=made().tokenizer))
    untouched = []
    with pytest.raises(UnsupportedError, match="has no head_dim of its own"):  # before a step is made
        method().convert(made("GPTNeoX"), bar=lambda *_, **__: untouched.append(1))
    assert not untouched
    with pytest.raises(UnsupportedError, match="units of MixtralForCausalLM"):
        SPLoRA(RATIO).learn(opened("mixtral"))


def test_the_command_line_knows_it():
    assert shrink_way("splora")(0.25) == SPLoRA(ratio=0.25)
