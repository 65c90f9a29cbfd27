"""Opening: hub ids, folders, loaded models; what cannot be read says what was looked for."""

import json

import pytest
import torch
import transformers as tf
from architectures import COMMON, EVERY, EXTRA, build, inputs_for, opened
from hypothesis import given
from hypothesis import strategies as st

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError


@pytest.mark.parametrize("name", [*EVERY, *EXTRA])
def test_a_saved_model_opens_from_its_folder_with_the_same_logits(name, tmp_path):
    model = opened(name)
    model.save_pretrained(tmp_path / "model")
    again = mh.open_model(tmp_path / "model")
    assert type(again.module) is type(model.module)
    assert torch.equal(again.logits(inputs_for(name)), model.logits(inputs_for(name)))


def test_a_model_is_not_copied_and_not_changed():
    module = build("llama")
    model = mh.open_model(module)
    assert model.module is module and mh.open_model(model) is model
    assert (model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim) == (3, 4, 2, 8)
    assert len(model.heads) == 12 and mh.Head(2, 3) in model.heads
    assert "3 layers x 4 heads" in repr(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "bloom"])
def test_bfloat16_reads_edits_and_sweeps(name):
    model, inputs = mh.open_model(build(name).to(torch.bfloat16)), inputs_for(name)
    z = model.read_z(inputs)
    assert z.dtype == torch.bfloat16
    with model.editing(mh.Ablate(["L1H2"]), mh.Ablate(["L0H1"], "uniform")):
        edited = model.logits(inputs)
    assert (edited - model.logits(inputs)).abs().max() > 1e-2
    metric = lambda logits: logits[:, -1, :3].float().sum(-1)  # noqa: E731
    swept = model.sweep(inputs, [mh.Ablate(["L1H2"])], metric)[0]
    with model.editing(mh.Ablate(["L1H2"])):
        full = metric(model.logits(inputs)).numpy()
    assert abs(swept - full).max() < 0.1


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_read_and_edited_and_stays_compiled(in_place):
    module, inputs = build("llama"), inputs_for("llama")
    calls = []

    def backend(graph, example_inputs):
        return lambda *args: (calls.append(1), graph.forward(*args))[1]

    plain = opened("llama")
    if in_place:
        module.compile(backend=backend)
    else:
        module = torch.compile(module, backend=backend)
    model = mh.open_model(module)
    compiled = model.logits(inputs)
    assert calls, "the compiled code was not used"
    assert torch.allclose(compiled, plain.logits(inputs), atol=1e-5)
    with model.editing(mh.Ablate(["L1H2"])), plain.editing(mh.Ablate(["L1H2"])):
        assert torch.allclose(model.logits(inputs), plain.logits(inputs), atol=1e-5)
    assert torch.allclose(model.read_z(inputs), plain.read_z(inputs), atol=1e-5)
    calls.clear()
    assert torch.allclose(model.logits(inputs), compiled, atol=1e-6)
    assert calls, "the compiled code was lost"


def test_a_model_spread_by_accelerate_is_read_edited_and_swept(tmp_path):
    plain, inputs = opened("llama"), inputs_for("llama")
    plain.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    module = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    model = mh.open_model(module)
    assert torch.allclose(model.logits(inputs), plain.logits(inputs), atol=1e-5)
    assert torch.allclose(model.read_z(inputs), plain.read_z(inputs), atol=1e-5)
    for edit in (mh.Ablate(["L1H2"]), mh.Ablate(["L2H1"], "uniform")):
        with model.editing(edit), plain.editing(edit):
            assert torch.allclose(model.logits(inputs), plain.logits(inputs), atol=1e-5)
    metric = lambda logits: logits[:, -1, 0]  # noqa: E731
    edits = [mh.Ablate([head]) for head in model.heads]
    assert abs(model.sweep(inputs, edits, metric) - plain.sweep(inputs, edits, metric)).max() <= 1e-5


def test_ids_text_and_ready_inputs_are_all_taken():
    model, ids = opened("llama"), inputs_for("llama")["input_ids"]
    assert torch.equal(model.logits(ids), model.logits({"input_ids": ids}))
    assert model.logits(ids[0]).shape == (1, 11, 61)
    with pytest.raises(InputError, match="without a tokenizer"):
        model.logits("some text")


class Strange(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p / "nothing", InputError, "no such folder"),
        (lambda p: "./nothing", InputError, "no such folder"),
        (lambda p: p, InputError, "there is no config.json"),
        (lambda p: write(p / "config.json", "{}"), InputError, "is a file; give the folder"),
        (lambda p: write(p / "config.json", "{}").parent, InputError, "cannot open a model at"),
        (lambda p: write(p / "config.json", "not json").parent, InputError, "config.json is not JSON"),
        (lambda p: write(p / "config.json", '{"model_type": "llama"}').parent, InputError, "cannot open a model at"),
        (lambda p: write(p / "config.json", '{"model_type": "zzz"}').parent, InputError, "cannot open a model at"),
        (lambda p: "no-such/hub-id", InputError, "cannot open a model at no-such/hub-id"),
        (lambda p: Strange(), InputError, "Strange is not a Transformers model"),
        (
            lambda p: tf.MambaForCausalLM(tf.MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=2, state_size=4)),
            UnsupportedError,
            "Mamba",
        ),
        (
            lambda p: tf.T5ForConditionalGeneration(
                tf.T5Config(**COMMON, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
            ),
            UnsupportedError,
            "has an encoder and a decoder",
        ),
    ],
)
def test_what_cannot_be_opened_says_so_in_one_sentence(make, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        mh.open_model(make(tmp_path))
    assert "\n" not in str(caught.value)


def write(path, text):
    path.write_text(text)
    return path


def test_pickled_weights_are_not_loaded(tmp_path):
    opened("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere")
    torch.save(opened("llama").plain.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot open a model"):
        mh.open_model(tmp_path / "model")


@given(st.dictionaries(st.text(max_size=12), st.one_of(st.none(), st.integers(), st.text(max_size=8)), max_size=5))
def test_any_config_file_gives_a_sentence_or_a_model(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        mh.open_model(folder)
