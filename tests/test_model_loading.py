"""A checkpoint opens whole and as it is, or is refused in one sentence that names what is wrong with it."""

from __future__ import annotations

import json
import logging
import re
import resource
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers as tf
from architectures import COMMON
from safetensors.torch import load_file, save_file

import manyheads as mh
from manyheads.errors import InputError
from manyheads.model.loading.module import load_module
from manyheads.reference import ladon_path

WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = tf.LlamaConfig(
        **COMMON | {"vocab_size": 4096}, **sizes, num_key_value_heads=2, max_position_embeddings=128
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ladon_path() / file, folder / file)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def changed(folder, **config):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(source, *words, **how):
    with pytest.raises(InputError) as caught:
        mh.open_model(source, **how)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 700, said
    for word in words:
        assert word in said, said
    return said


def test_a_tensor_that_is_missing_is_named_and_not_made_up(folder):
    refused(with_tensors(folder, lambda t: t.pop(WEIGHT)), f"no tensor {WEIGHT}", "at random")


def test_a_missing_embedding_that_the_output_shares_is_missing(tmp_path):
    config = tf.LlamaConfig(
        **COMMON,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    mh.open_model(tmp_path / "tied")
    refused(with_tensors(tmp_path / "tied", lambda t: t.pop("model.embed_tokens.weight")), "embed_tokens.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_enough(folder, value):
    def spoil(tensors):
        tensors[WEIGHT][-1, -1] = value

    refused(with_tensors(folder, spoil), WEIGHT, "NaN or infinity")


def test_a_number_that_overflows_in_half_precision_is_said(folder):
    def raise_one(tensors):
        tensors[WEIGHT][0, 0] = 1e6

    with_tensors(folder, raise_one)
    mh.open_model(folder)
    refused(folder, WEIGHT, "as float16", dtype="float16")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    with_tensors(folder, lambda t: t.update({WEIGHT: t[WEIGHT][:, :-2].contiguous()}))
    refused(folder, WEIGHT, "has shape")


def test_a_weight_that_the_config_leaves_out_is_named(tmp_path):
    """A projection with a bias in the file and none in the config would give other numbers without a word."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON, **sizes, attention_bias=True))
    model.save_pretrained(tmp_path / "biased")
    mh.open_model(tmp_path / "biased")
    refused(changed(tmp_path / "biased", attention_bias=False), "self_attn", "bias", "leave out")


def test_a_layer_beyond_those_of_the_config_is_named_and_buffers_of_old_checkpoints_are_not(folder):
    old = "model.layers.1.self_attn.rotary_emb.inv_freq"
    mh.open_model(
        with_tensors(folder, lambda t: t.update({old: torch.ones(4), "model.layers.0.self_attn.masked": torch.ones(1)}))
    )
    refused(changed(folder, num_hidden_layers=2), "model.layers.2.", "leave out")


def test_a_config_larger_than_its_files_is_refused_by_their_headers(folder):
    for config in (
        {"hidden_size": 10**9},
        {"vocab_size": 10**8},
        {"hidden_size": 32, "vocab_size": 4096, "head_dim": 10**7},
    ):
        refused(changed(folder, **config), "describes", "files hold")


def test_what_no_head_needs_may_be_missing(tmp_path):
    """Vision models are saved without a pooler; one made up at random would give another fingerprint each time."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.ViTConfig(**sizes, image_size=8, patch_size=4)
    tf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    first, second = (mh.open_model(tmp_path / "vit") for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_what_acts_in_training_only_may_be_missing_and_becomes_zero(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    embeddings = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    tf.Wav2Vec2Model(tf.Wav2Vec2Config(**sizes, **convolutions, **embeddings)).save_pretrained(tmp_path / "speech")
    with_tensors(tmp_path / "speech", lambda t: t.pop("masked_spec_embed"))
    module, _ = load_module(tmp_path / "speech", "float32", None, False)
    assert not module.masked_spec_embed.any()
    with_tensors(tmp_path / "speech", lambda t: t.pop("encoder.layers.0.attention.q_proj.weight"))
    with pytest.raises(InputError, match=r"no tensor encoder.layers.0.attention.q_proj.weight"):
        load_module(tmp_path / "speech", "float32", None, False)


def test_what_was_moved_to_the_disk_is_looked_at_where_it_lies(folder):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "cpu"}
    mh.open_model(folder, device_map=places)

    def spoil(tensors):
        tensors[WEIGHT][0, 0] = float("nan")

    refused(with_tensors(folder, spoil), WEIGHT, "NaN or infinity", device_map=places)


@pytest.mark.parametrize("cut", [0, 3, 200, -10])
def test_truncated_weights_are_named(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(folder, "model.safetensors is no whole safetensors file")


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": "six"},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**9},
        {"hidden_size": -4},
        {"vocab_size": 10**12},
        {"head_dim": 10**10},
        {"num_key_value_heads": 10**9},
        {"intermediate_size": 10**9},
        {"max_position_embeddings": "many"},
        {"hidden_act": "os.system"},
        {"id2label": 7},
        {"dtype": "os.system"},
        {"model_type": ["llama"]},
        {"model_type": "nothing of the kind"},
        {"architectures": [3]},
        {"architectures": 0},
        {"architectures": "LlamaForCausalLM"},
        {"rope_parameters": []},
        {"quantization_config": "four bits"},
        {"transformers_weights": "../../elsewhere.safetensors"},
    ],
    ids=str,
)
def test_hostile_configs_are_one_sentence_and_no_memory(folder, config):
    changed(folder, **config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB, so half a GiB


@pytest.mark.parametrize("name", ["logging", "Trainer", "pipeline", "AutoConfig", "PreTrainedConfig", "nothing"])
def test_an_architecture_is_a_model_or_is_passed_over(folder, name):
    assert type(mh.open_model(changed(folder, architectures=[name])).plain).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_may_not_ask_for_foreign_kernels(folder, key):
    refused(changed(folder, **{key: "somebody/kernel"}), "somebody/kernel", "trust")
    refused(changed(folder, **{key: {"": "somebody/kernel@main"}}), "somebody/kernel@main", "trust")
    refused(changed(folder, **{key: None}, text_config={key: "somebody/kernel"}), "somebody/kernel", "trust")
    plain = json.loads((folder / "config.json").read_text())
    del plain["text_config"], plain[key]
    (folder / "config.json").write_text(json.dumps(plain))
    mh.open_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a":' * 100_000, "1" * 6000, '{"x": 1e400}', "\udc80"])
def test_configs_that_are_no_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": 3}, {"weight_map": {WEIGHT: "gone.safetensors"}}, {"weight_map": {WEIGHT: "../x"}}]
)
def test_an_index_that_names_no_files_is_refused(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_an_error_and_no_silent_none(folder, text):
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "tokenizer of", "pass tokenizer=")
    assert mh.open_model(folder, tokenizer="mine").tokenizer == "mine"


def test_weights_without_a_tokenizer_get_none(folder):
    assert mh.open_model(folder).tokenizer is not None
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert mh.open_model(folder).tokenizer is None


@pytest.mark.parametrize(
    "how",
    [
        {"dtype": "float8_e4m3fn"},
        {"dtype": "int8"},
        {"dtype": "bool"},
        {"dtype": "float"} | {"dtype": "os.system"},
        {"dtype": torch.int32},
        {"dtype": 3},
        {"device_map": "nowhere"},
        {"device_map": "meta"},
        {"device_map": {"": "xla:3"}},
        {"device_map": 3.5},
    ],
    ids=str,
)
def test_types_and_devices_that_are_none(how):
    refused("ladon", str(next(iter(how)))[:5], **how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is one")
def test_a_device_that_is_not_there(whole):
    refused(whole, "no device 'cuda'", device_map="cuda")


def test_a_missing_folder_may_be_a_hub_id_and_both_are_said():
    refused("no-such/model-of-ours", "there is no such folder, and the hub")
    refused("no such model", "cannot open a model at no such model")
    refused("a\0b")
    refused("caf\udc80")


@pytest.fixture
def hub(whole, tmp_path, monkeypatch):
    """The cache of the hub as it is after a model of it was fetched, and no network."""
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / "abc"
    shutil.copytree(whole, snapshot)
    refs = tmp_path / "models--somebody--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_model_of_the_hub_is_checked_as_a_folder_is(hub, whole):
    model = mh.open_model("somebody/model")
    assert model.fingerprint == mh.open_model(whole).fingerprint and model.tokenizer is not None
    refused(changed(hub, attn_implementation="somebody/kernel") and "somebody/model", "somebody/kernel", "trust")
    refused(changed(hub, attn_implementation=None, hidden_size=10**9) and "somebody/model", "describes")
    refused(changed(hub, hidden_size=32) and with_tensors(hub, lambda t: t.pop(WEIGHT)) and "somebody/model", WEIGHT)


def test_a_revision_of_the_hub_is_opened_and_no_other(hub, whole):
    other = hub.parent / "def"
    shutil.copytree(hub, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    (hub.parent.parent / "refs" / "step512").write_text("def")
    first, second = mh.open_model("somebody/model"), mh.open_model("somebody/model@step512")
    apart = second.plain.state_dict()[name] - first.plain.state_dict()[name]
    assert torch.allclose(apart, torch.ones_like(apart))
    for wrong in ("somebody/model@", "@step512", "somebody/model@step9"):
        with pytest.raises(InputError, match=re.escape(wrong)):
            mh.open_model(wrong)


def test_a_model_of_the_hub_without_a_tokenizer_gets_none(hub):
    for file in hub.glob("tokenizer*"):
        file.unlink()
    assert mh.open_model("somebody/model").tokenizer is None


def test_opening_prints_and_logs_nothing_and_leaves_logging_as_it_was(folder, capfd, caplog):
    before = tf.utils.logging.get_verbosity(), tf.utils.logging.is_progress_bar_enabled()
    with caplog.at_level(logging.WARNING):
        mh.open_model(folder)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert (tf.utils.logging.get_verbosity(), tf.utils.logging.is_progress_bar_enabled()) == before


# GGUF


def as_gguf(model, path):
    """`model` (a Llama without grouped heads) as llama.cpp writes it: q and k with the two halves of rotary dims interleaved."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))][: config.vocab_size]
    pieces += [f"p{i}" for i in range(config.vocab_size - len(pieces))]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([2, 3, 3, *[1] * (len(pieces) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, *rest, _ = name.split(".")
            part = names[".".join(rest)]
            if part in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ascontiguousarray(values))
        else:
            outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            writer.add_tensor(f"{outer[name.removesuffix('.weight')]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is optional")
def test_a_gguf_file_and_a_folder_that_holds_one_open_as_the_model_that_they_hold(tmp_path, capfd):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON | {"vocab_size": 300}, **sizes, num_key_value_heads=2)).eval()
    file = as_gguf(model, tmp_path / "x.gguf")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    for source in (file, str(tmp_path)):
        torch.testing.assert_close(mh.open_model(source).logits(ids), wanted, atol=1e-4, rtol=1e-4)
    assert capfd.readouterr() == ("", "")
    file.write_bytes(file.read_bytes()[:300])
    refused(file)


def test_without_gguf_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("manyheads.model.loading.module.find_spec", lambda name: None)
    refused(tmp_path / "x.gguf", "pip install 'manyheads[gguf]'")
    (tmp_path / "y.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "2 .gguf files")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a/" * 200, "a\0b", "\udc80"])
def test_what_can_be_no_name_is_one_sentence(name):
    with pytest.raises(InputError):
        mh.open_model(name)
