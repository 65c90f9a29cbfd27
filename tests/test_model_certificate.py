"""The certificate: every site under every way to run a model, beside the plain model."""

import json

import pytest
import torch
from architectures import build, opened
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
