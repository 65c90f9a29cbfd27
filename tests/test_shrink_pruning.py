"""Layers may lose different numbers of heads, and the model is an ordinary folder all the same."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from architectures import GEMMA, LLAMA, inputs_for, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.weights.pruning import _plan

UNEVEN = ["L0H0", "L0H1", "L2H2", "L2H3"]
KINDS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 6},
    "Gemma3": {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


def made(kind, n_kv_heads, n_heads=4):
    """A small random model, with weights large enough for heads to matter, opened."""
    torch.manual_seed(0)
    config = getattr(tf, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    own = {**LLAMA, **KINDS[kind], "num_key_value_heads": n_kv_heads, "num_attention_heads": n_heads}
    module = getattr(tf, f"{kind}ForCausalLM")(config(**own)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return mh.open_model(module)


def masked_logits(model, heads, inputs):
    with model.editing(mh.Scale(heads, 0.0)):
        return model.logits(inputs)


def generated(module, ids, mask, **kwargs):
    return module.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("n_kv_heads", [4, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_pruning_is_masking_and_reopens_in_plain_transformers(kind, n_kv_heads, tmp_path):
    model, inputs = made(kind, n_kv_heads), inputs_for("llama")
    before = model.logits(inputs)
    masked = masked_logits(model, UNEVEN, inputs)
    assert (masked - before).abs().max() > 1e-2
    small = model.prune(UNEVEN)
    assert torch.equal(model.logits(inputs), before) and type(model.plain).__name__ == f"{kind}ForCausalLM"
    assert small.layout.counts == (2, 4, 2) and small.shape == (3, 4)
    small.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "whole")
    plain, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and isinstance(plain, type(model.plain))
    with torch.no_grad():
        assert (plain.eval()(**inputs).logits - masked).abs().max() <= 1e-5
    again = mh.open_model(tmp_path / "small")
    assert again.fingerprint == small.fingerprint and torch.equal(again.logits(inputs), small.logits(inputs))
    sizes = {k: (tmp_path / k / "model.safetensors").stat().st_size for k in ("small", "whole")}
    gone = (
        2 * 2 * (2 + 2 * n_kv_heads / 4) * model.head_dim * 32
    )  # q, o, k and v of two heads (or one group) in two layers
    assert sizes["whole"] - sizes["small"] >= 4 * gone - 2000  # headers differ a little


@pytest.mark.parametrize("n_kv_heads", [4, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_is_uncached_generation_and_the_cache_has_each_layers_kv_heads(kind, n_kv_heads):
    small = made(kind, n_kv_heads).prune(UNEVEN).plain
    ids, mask = inputs_for("llama")["input_ids"], torch.ones(3, 11, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0  # a shorter row, padded on the left
    whole = generated(small, ids, mask, use_cache=False)
    assert torch.equal(generated(small, ids, mask), whole)
    assert torch.equal(generated(small, ids, mask, cache_implementation="static"), whole)
    alone = generated(small, ids[1:2, 4:], mask[1:2, 4:])
    assert torch.equal(alone[0, -8:], whole[1, -8:])
    cache = small(ids[:1]).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [n_kv_heads // 2, n_kv_heads, n_kv_heads // 2]


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_without_heads_adds_its_bias_or_nothing(bias, layer, tmp_path):
    model, inputs = opened("llama_bias" if bias else "llama"), inputs_for("llama")
    gone = [*((layer, h) for h in range(4)), (2, 0), (2, 1)]
    small = model.prune(gone)
    assert layer not in small.layout.attention_layers
    small.save_pretrained(tmp_path / "m")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert (plain(**inputs).logits - masked_logits(model, gone, inputs)).abs().max() <= 1e-5
    ids, mask = inputs["input_ids"], torch.ones(3, 11, dtype=torch.long)
    whole = generated(plain, ids, mask, use_cache=False)
    assert torch.equal(generated(plain, ids, mask), whole)
    assert torch.equal(generated(plain, ids, mask, cache_implementation="static"), whole)
    assert plain(ids).past_key_values.layers[layer].keys.numel() == 0


def test_layers_that_agree_are_a_plain_config_and_need_nothing_of_ours(tmp_path):
    model = made("Qwen3", 2)
    small = model.prune([(layer, h) for layer, g in enumerate((0, 1, 0)) for h in (2 * g, 2 * g + 1)])
    small.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "qwen3" and "manyheads" not in config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)


def test_counts_that_a_plain_config_refuses_are_converted(tmp_path):
    model, inputs = made("Llama", 4), inputs_for("llama")  # 3 heads do not divide a width of 32
    gone = ["L0H1", "L1H2", "L2H0"]
    small = model.prune(gone)
    assert small.config.model_type == "manyheads_llama" and (small.n_heads, small.n_kv_heads) == (3, 3)
    assert (small.logits(inputs) - masked_logits(model, gone, inputs)).abs().max() <= 1e-5
    assert small.layout.counts is None and small.prune(["L0H0"]).layout.counts == (2, 3, 3)


def test_what_reads_heads_sees_that_some_are_not_there():
    model, inputs = made("Llama", 2), inputs_for("llama")
    small = model.prune(UNEVEN)
    kept = {0: [2, 3], 1: [0, 1, 2, 3], 2: [0, 1]}  # their numbers in the whole model
    whole, found = [], []
    with model.editing(mh.Scale(UNEVEN, 0.0)):
        for one, into in ((model, whole), (small, found)):
            one.look(inputs, reader := Patterns())
            into += [reader.patterns, one.read_z(inputs)]
    for layer, heads in kept.items():
        n = len(heads)
        assert torch.allclose(found[0][layer][:, :n], whole[0][layer][:, heads], atol=1e-6)
        assert found[0][layer][:, n:].isnan().all()
        assert torch.allclose(found[1][layer][:, :, :n], whole[1][layer][:, :, heads], atol=1e-5)
        assert not found[1][layer][:, :, n:].any()
        assert torch.equal(small.W_O(layer)[:n], model.W_O(layer)[heads]) and not small.W_O(layer)[n:].any()
    assert not small.proof.failed


class Patterns(mh.Reader):
    def __init__(self):
        self.patterns = {}

    def read(self, call):
        self.patterns[call.layer] = call.pattern


def test_heads_that_are_left_are_edited_swept_and_baked_under_their_new_numbers(tmp_path):
    model, inputs = made("Llama", 2), inputs_for("llama")
    small = model.prune(UNEVEN)
    edit, same = mh.Scale(["L0H1", "L1H2"], -1.5), mh.Scale(["L0H3", "L1H2"], -1.5)
    with model.editing(mh.Scale(UNEVEN, 0.0), same):
        wanted = model.logits(inputs)
    with small.editing(edit):
        assert (small.logits(inputs) - wanted).abs().max() <= 1e-5
    small.bake(edit).save_pretrained(tmp_path / "b")
    assert (mh.open_model(tmp_path / "b").logits(inputs) - wanted).abs().max() <= 1e-5
    swept = small.sweep(inputs, [edit, mh.Ablate(["L2H0"], "uniform")], lambda logits: logits[..., 3].sum(1))
    assert abs(swept[0] - wanted[..., 3].sum(1).numpy()).max() <= 1e-4
    with small.editing(mh.Ablate(["L2H0"], "uniform")):
        assert abs(swept[1] - small.logits(inputs)[..., 3].sum(1).numpy()).max() <= 1e-4
    with pytest.raises(UnsupportedError, match="between 2 and 4 heads, and pruning needs as many"):
        small.prune(["L1H0"])
    silent = [mh.Scale(["L0H2"], -3.0), mh.Ablate(["L2H3"], "uniform"), mh.Mask(["L0H3"], keys=0)]  # of heads not there
    with small.editing(*silent):
        nothing_changed = small.logits(inputs)
    assert torch.allclose(small.logits(inputs), nothing_changed, atol=1e-5)
    assert torch.equal(small.bake(silent[0]).logits(inputs), small.logits(inputs))


# Query heads that share KV heads


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
@settings(max_examples=200)
def test_a_plan_keeps_every_query_head_once_on_its_own_kv_head_and_no_more_kv_heads_than_there_were(left):
    members = [list(range(10 * g, 10 * g + n)) for g, n in enumerate(left)]
    plan = _plan(members)
    alive = [h for i, h in enumerate(plan.queries) if i not in plan.idle]
    assert alive == [h for some in members for h in some]
    assert len(plan.groups) <= len(left)
    if plan.queries:
        size = len(plan.queries) // len(plan.groups)
        assert [h // 10 for h in plan.queries] == [g for g in plan.groups for _ in range(size)]
        most = max(left)
        assert len(plan.queries) + len(plan.groups) <= sum(n > 0 for n in left) * (most + 1)


@pytest.mark.parametrize(
    ("gone", "counts"),
    [
        ([0, 1, 2, 3], (8, 2)),  # a whole group
        ([0, 1, 2, 3, 4, 5], (6, 3)),  # 0, 2 and 4 are left: the last group's KV head twice
        ([0, 4, 5, 8], (9, 3)),  # 3, 2 and 3 are left: one query head idles
        ([0, 5, 10], (9, 3)),
        (list(range(11)), (1, 1)),
    ],
)
def test_query_heads_are_grouped_anew_exactly(gone, counts, tmp_path):
    config = tf.LlamaConfig(
        **{**LLAMA, "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}
    )
    torch.manual_seed(0)
    model, inputs = mh.open_model(tf.LlamaForCausalLM(config).eval()), inputs_for("llama")
    with torch.no_grad():
        for parameter in model.plain.parameters():
            parameter.mul_(8)
    gone = [(1, h) for h in gone]
    small = model.prune(gone)
    attention = small.plain.model.layers[1].self_attn
    assert (attention.q_proj.out_features // 8, attention.k_proj.out_features // 8) == counts
    wanted = masked_logits(model, gone, inputs)
    assert (small.logits(inputs) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
    small.save_pretrained(tmp_path / "m")
    assert torch.equal(mh.open_model(tmp_path / "m").logits(inputs), small.logits(inputs))


# What is refused


@pytest.mark.parametrize(
    ("name", "gone", "reason"),
    [
        ("llama", ["L0H0"], "nothing would become smaller: 1 on KV head 0 and 2 on KV head 1 are left in layer 0"),
        ("llama", [(layer, h) for layer in range(3) for h in range(4)], "leaves no head"),
        ("phi3", UNEVEN, "no head_dim of its own"),
        ("gpt2", UNEVEN, "no head_dim of its own"),
        ("olmo2", UNEVEN, "computes across heads"),
        ("falcon_gqa", UNEVEN, "FalconForCausalLM cannot have other numbers of heads in some layers"),
        ("bert", UNEVEN, "keeps its output projections outside of BertSelfAttention"),
    ],
)
def test_what_cannot_be_pruned_unevenly_is_refused_in_a_sentence(name, gone, reason):
    with pytest.raises(UnsupportedError, match=reason) as caught:
        opened(name).prune(gone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"num_attention_heads": 2.5}, "num_attention_heads of layer 0"),
        ({"num_attention_heads": -1}, "num_attention_heads of layer 0"),
        ({"hidden_size": 8}, "'hidden_size' is no count of a layer"),
        ({"num_attention_heads": 3}, "has shape|do not fit"),
        ({"num_attention_heads": 1 << 30, "num_key_value_heads": 1}, "describes"),
        ([], "do not fit"),
    ],
)
def test_a_damaged_config_is_one_sentence(counts, reason, tmp_path):
    made("Llama", 2).prune(UNEVEN).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["manyheads"][0]["settings"]["per_layer_config"]["0"] = counts
    file.write_text(json.dumps(config))
    with pytest.raises((InputError, UnsupportedError), match=reason):
        mh.open_model(tmp_path / "m")


def test_the_command_line_prunes_and_says_what_is_left(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["edit", "prune", *map(str, arguments)])

    made("Llama", 2).save_pretrained(tmp_path / "m")
    done = run(tmp_path / "m", "L0H0,L0H1", "--out", tmp_path / "small")
    assert (
        done.exit_code == 0 and "12 heads are 10" in done.output and "Import manyheads" in " ".join(done.output.split())
    )
    assert mh.open_model(tmp_path / "small").layout.counts == (2, 4, 4)
    for heads in ("", "L9H0", "L0H0"):
        assert run(tmp_path / "m", heads, "--out", tmp_path / "no").exit_code != 0
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_fresh_process_needs_only_to_import_manyheads(tmp_path):
    inputs = inputs_for("llama")
    for kind in KINDS:
        model = made(kind, 2)
        model.prune(UNEVEN).save_pretrained(tmp_path / kind)
        save_file({"logits": masked_logits(model, UNEVEN, inputs).contiguous()}, tmp_path / kind / "wanted.safetensors")
    program = f"""
import manyheads
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for kind in {list(KINDS)}:
    folder = {str(tmp_path)!r} + "/" + kind
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor({inputs["input_ids"].tolist()})).logits
    wanted = load_file(folder + "/wanted.safetensors")["logits"]
    print(kind, bool((logits - wanted).abs().max() <= 1e-5))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [word for kind in KINDS for word in (kind, "True")]
