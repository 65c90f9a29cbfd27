"""PEFT's adapters on any projection: read as what they compute, edited alike, merged when baked."""

import pytest
import torch
import transformers as tf
from architectures import build, inputs_for

import manyheads as mh
from manyheads.errors import InputError
from manyheads.model.proving.certificate import certify
from manyheads.model.reading import ReadAttention

peft = pytest.importorskip("peft")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value", "dense"],
    "gpt_neox": ["query_key_value", "dense", "embed_out"],
}


def adapted(name, seed=0, **kwargs):
    module = build(name)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=3, init_lora_weights=False, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", **kwargs
    )
    return peft.get_peft_model(module, config).eval()


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapted_model_is_read_right_under_every_condition(name):
    model = mh.open_model(adapted(name))
    assert not model.proof.failed and certify(model, n_tokens=8, every_dtype=False).ok
    z, writes = model.read_z(inputs_for(name)), model.read_site(inputs_for(name), "attention_write")
    bias = model.bias_O(1)
    made = torch.einsum("bthd,hde->bte", z[1], model.W_O(1)) + (0 if bias is None else bias)
    assert torch.allclose(made, writes[1], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("edit", [lambda: mh.Scale(["L1H2"], -1.0), lambda: mh.Ablate(["L0H1"], "uniform")])
def test_an_edit_does_the_same_before_and_after_merging(name, edit):
    ids = inputs_for(name)["input_ids"]
    model, merged = mh.open_model(adapted(name)), mh.open_model(adapted(name).merge_and_unload())
    kwargs = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with model.editing(edit()), merged.editing(edit()):
        assert torch.allclose(model.logits(ids), merged.logits(ids), atol=1e-4)
        cached = model.generate(ids, use_cache=True, **kwargs)
        assert torch.equal(cached, merged.generate(ids, **kwargs))
        assert torch.equal(cached, model.generate(ids, use_cache=False, **kwargs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padded_row_behind_an_adapter_is_what_it_is_alone(name):
    model, ids = mh.open_model(adapted(name)), inputs_for(name)["input_ids"]
    none = torch.zeros(3, 4, dtype=torch.long)
    batch = {"input_ids": torch.cat([none, ids], 1), "attention_mask": torch.cat([none, torch.ones_like(ids)], 1)}
    assert torch.allclose(model.logits(batch)[:, 4:], model.logits(ids), atol=1e-4)
    seen = []
    model.read(batch, ReadAttention(lambda call: seen.append(float(call.pattern[:, :, 4:, :4].abs().max()))))
    assert max(seen) < 1e-6


def test_what_was_baked_from_an_adapted_model_opens_without_adapters(tmp_path):
    model, ids = mh.open_model(adapted("llama")), inputs_for("llama")["input_ids"]
    edit = mh.Scale(["L1H2"], 0.5)
    with model.editing(edit):
        wanted = model.logits(ids)
    model.bake(edit).save_pretrained(tmp_path / "baked")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    assert type(plain) is tf.LlamaForCausalLM and not (tmp_path / "baked" / "adapter_config.json").exists()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, wanted, atol=1e-4)
    assert type(model.plain) is peft.PeftModel  # the opened model stays as it was
    with model.editing(edit):
        assert torch.equal(model.logits(ids), wanted)


def test_switching_an_adapter_off_changes_logits_and_the_fingerprint_of_other_adapters_differs():
    one, two = mh.open_model(adapted("llama", seed=0)), mh.open_model(adapted("llama", seed=1))
    assert one.fingerprint != two.fingerprint
    ids = inputs_for("llama")["input_ids"]
    with one.plain.disable_adapter():
        assert torch.allclose(one.logits(ids), mh.open_model(build("llama")).logits(ids), atol=1e-5)


def test_an_adapter_folder_opens_on_its_base(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    module = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, init_lora_weights=False, target_modules=TARGETS["llama"])
    adapted_model = peft.get_peft_model(module, config).eval()
    adapted_model.save_pretrained(tmp_path / "adapter")
    model, ids = mh.open_model(tmp_path / "adapter"), inputs_for("llama")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(model.logits(ids), adapted_model(ids).logits, atol=1e-5)
    assert not torch.allclose(model.logits(ids), mh.open_model(tmp_path / "base").logits(ids), atol=1e-2)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p / "adapter_model.safetensors").unlink(), "without adapter_model.safetensors"),
        (lambda p: (p / "adapter_config.json").write_text("[1]"), "does not name the model that it adapts"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"1234"), r"adapter_model\.safetensors is"),
    ],
)
def test_a_damaged_adapter_is_refused_in_a_sentence(tmp_path, break_it, message):
    build("llama").save_pretrained(tmp_path / "base")
    module = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(module, peft.LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    break_it(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        mh.open_model(tmp_path / "adapter")
