"""The certificate: every site under every way to run a model, beside the plain model."""

import json

import pytest
import torch
import transformers as tf
from architectures import LLAMA, build, opened
from test_model_inputs import strong
from transformers.models.llama.modeling_llama import LlamaAttention
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.model.proving.certificate import SITES, certify


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "bloom", "falcon_alibi", "vit", "gpt_oss"])
def test_every_site_is_right_under_every_condition(name):
    found = certify(opened(name), n_tokens=10)
    assert found.ok and not found.refused
    runs = {condition.run for condition in found.conditions}
    assert runs == (
        {"plain"}
        if name == "vit"
        else {"plain", "padded left", "padded right"} | ({"cached"} if name != "bert" else set())
    )
    assert {condition.dtype for condition in found.conditions} == {"float32", "bfloat16"}
    plain = next(condition for condition in found.conditions if condition.run == "plain")
    missing = {site for site in SITES if plain.errors[site] is None}
    # BERT has norms after each addition; Falcon with ALiBi computes something else once it is asked for patterns.
    assert missing == {"bert": {"writes"}, "falcon_alibi": {"patterns"}}.get(name, set())


class Uneven(LlamaAttention):
    """Scores that depend on the kernel: what is read by one is not what the other computes."""

    scaling = property(lambda self: 0.35 if self.config._attn_implementation == "sdpa" else 0.5)


def test_what_differs_between_kernels_is_found_by_name():
    module = build("llama")
    for layer in module.model.layers:
        del layer.self_attn.scaling
        layer.self_attn.__class__ = Uneven
    module.set_attn_implementation("eager")
    model = mh.open_model(module)
    assert not model.proof.failed
    found = certify(model, n_tokens=10)
    assert not found.ok
    wrong = {(c.kernel, c.run): c.wrong for c in found.conditions if c.dtype == "float32"}
    assert wrong["eager", "plain"] == [] and "logits" in wrong["sdpa", "plain"]
    assert module.config._attn_implementation == "eager"


def test_a_certificate_is_written_once_and_says_what_it_is_of(tmp_path):
    model = opened("llama")
    found = certify(model, n_tokens=6, every_dtype=False)
    found.save(tmp_path / "c.json")
    saved = json.loads((tmp_path / "c.json").read_text())
    assert (
        saved["ok"] and saved["fingerprint"] == model.fingerprint and len(saved["conditions"]) == len(found.conditions)
    )
    assert found.to_frame().shape == (8, 3 + len(SITES))
    with pytest.raises(InputError, match="already exists"):
        found.save(tmp_path / "c.json")


def test_the_command_prints_the_certificate_and_fails_with_a_wrong_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    ran = CliRunner().invoke(app, ["check", "ladon", "--tokens", "6", "--out", str(tmp_path / "c.json")])
    assert ran.exit_code == 0, ran.output
    assert "All sites are right" in ran.stdout and "padded left" in ran.stdout
    monkeypatch.setattr("manyheads.model.proving.certificate.COARSE", -1.0)
    ran = CliRunner().invoke(app, ["check", "ladon", "--tokens", "6"])
    assert ran.exit_code == 3 and "WRONG: " in ran.stdout


PAIRS = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
PAIRS |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=61, max_position_embeddings=64, pad_token_id=0)
SEQ2SEQ = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIRS, bos_token_id=1, eos_token_id=2)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**PAIRS, decoder_start_token_id=0)),
}


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_each_kind_of_heads_of_an_encoder_decoder_is_right(name, part):
    found = certify(mh.open_model(strong(SEQ2SEQ[name]()), part=part), n_tokens=8)
    assert found.ok
    plain = found.conditions[0].errors
    assert plain["resid"] is not None and plain["patterns"] is not None
    assert any(condition.run == "cached" for condition in found.conditions) is (part != "encoder")


def test_a_hybrid_is_right_in_the_layers_that_have_heads():
    config = tf.JambaConfig(
        **LLAMA, attn_layer_period=3, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False
    )
    model = mh.open_model(strong(tf.JambaForCausalLM(config)))
    assert {head.layer for head in model.heads} == {1}
    found = certify(model, n_tokens=8, every_dtype=False)
    assert found.ok
    # Jamba reads several tokens after a cache as if there were none before: its own fault, and told of.
    assert {condition.run for condition in found.conditions if condition.differs} == {"cached"}


def test_the_command_takes_a_part(tmp_path):
    strong(SEQ2SEQ["t5"]()).save_pretrained(tmp_path / "t5")
    ran = CliRunner().invoke(app, ["check", str(tmp_path / "t5"), "--tokens", "6", "--part", "cross"])
    assert ran.exit_code == 0 and "All sites are right" in ran.stdout
    ran = CliRunner().invoke(app, ["check", str(tmp_path / "t5")])
    assert ran.exit_code == 2 and "part='encoder' or 'decoder' or 'cross'" in ran.stderr
