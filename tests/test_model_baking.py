"""What was edited can be kept: baked and pruned models are ordinary checkpoints with the edited model's logits."""

import pytest
import torch
import transformers
from architectures import DECODERS, ENCODERS, EVERY, EXTRA, build, inputs_for, opened
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError

HEADS = ["L0H1", "L1H2", "L2H3"]
BIASED = (
    "gpt2",
    "gpt_neox",
    "opt",
    "gpt_oss",
    "falcon",
    "bloom",
    "falcon_alibi",
    "falcon_gqa",
    "llama_bias",
    *ENCODERS,
    "vit",
    "dinov2",
)
CAN_HAVE_A_BIAS = ("llama", "qwen3", "gemma2", "gemma3", "granite", "olmo2", "qwen3_moe", "gpt_oss", "modernbert")


def reopened(name, folder):
    auto = (
        AutoModelForMaskedLM
        if name in ENCODERS
        else AutoModelForCausalLM
        if name in (*DECODERS, *EXTRA)
        else AutoModelForImageClassification
    )
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", [*EVERY, *EXTRA])
def test_a_baked_scale_reopened_by_plain_transformers_gives_the_edited_logits(name, tmp_path):
    model, inputs = opened(name), inputs_for(name)
    before = model.logits(inputs)
    edits = (mh.Scale(HEADS, 0.0), mh.Scale(["L2H0", "L2H3"], -1.5))
    with model.editing(*edits):
        edited = model.logits(inputs)
    model.bake(*edits).save_pretrained(tmp_path / "baked")
    with torch.no_grad():
        assert (reopened(name, tmp_path / "baked")(**inputs).logits - edited).abs().max() <= 1e-5
    assert torch.equal(model.logits(inputs), before)


@pytest.mark.parametrize("name", [*EVERY, *EXTRA])
def test_constants_bake_into_a_bias_or_are_refused_with_the_reason(name, tmp_path):
    model, inputs = opened(name), inputs_for(name)
    vectors = torch.randn(3, model.head_dim, generator=torch.Generator().manual_seed(0))
    edits = (mh.Ablate(HEADS, "mean", model.mean_z(inputs)), mh.Offset(HEADS, vectors), mh.Scale(["L1H2"], 0.5))
    if name not in (*BIASED, *CAN_HAVE_A_BIAS):
        with pytest.raises(UnsupportedError, match="bias"):
            model.bake(*edits)
        return
    with model.editing(*edits):
        edited = model.logits(inputs)
    model.bake(*edits).save_pretrained(tmp_path / "baked")
    with torch.no_grad():
        assert (reopened(name, tmp_path / "baked")(**inputs).logits - edited).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: mh.Ablate(HEADS, "uniform"), "depends on the input"),
        (lambda m: mh.Ablate(HEADS, "resample"), "depends on the input"),
        (lambda m: mh.Ablate(HEADS, "mean"), r"without a fixed \[L, H, Dh\] reference"),
        (lambda m: mh.Mask(HEADS, 0), "Mask is not linear in z"),
        (lambda m: mh.Patch(HEADS, torch.zeros(3, 1, 11, 4, 8)), "Patch is not linear in z"),
        (lambda m: mh.Scale(HEADS, 0.0, positions=[1]), "some rows or positions"),
    ],
)
def test_what_depends_on_the_input_cannot_be_baked_and_says_so(edit, reason):
    with pytest.raises(UnsupportedError, match=reason):
        opened("llama").bake(edit(opened("llama")))


PRUNABLE = {  # one whole group in each layer
    "llama": [(layer, h) for layer in range(3) for h in (2, 3)],
    "mistral": [(layer, h) for layer, g in enumerate((0, 1, 0)) for h in (2 * g, 2 * g + 1)],
    "qwen3": [(layer, h) for layer in range(3) for h in (0, 1)],
    "gemma2": [(layer, h) for layer in range(3) for h in (2, 3)],
    "gemma3": [(layer, h) for layer in range(3) for h in (0, 1)],
    "gpt_oss": [(layer, h) for layer, g in enumerate((1, 1, 0)) for h in (2 * g, 2 * g + 1)],
    "mixtral": [(layer, h) for layer in range(3) for h in (2, 3)],
    "qwen3_moe": [(layer, h) for layer in range(3) for h in (0, 1)],
    "llama_bias": [(layer, h) for layer in range(3) for h in (0, 1)],
}


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruning_equals_masking_and_is_smaller_on_disk(name, tmp_path):
    model, inputs = opened(name), inputs_for(name)
    with model.editing(mh.Scale(PRUNABLE[name], 0.0)):
        masked = model.logits(inputs)
    small = model.prune(PRUNABLE[name])
    assert (small.n_heads, small.n_kv_heads, small.head_dim) == (2, 1, model.head_dim)
    assert (small.logits(inputs) - masked).abs().max() <= 1e-5
    small.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert (reopened(name, tmp_path / "small")(**inputs).logits - masked).abs().max() <= 1e-5
    size = {k: (tmp_path / k / "model.safetensors").stat().st_size for k in ("small", "whole")}
    assert size["small"] < size["whole"]


@pytest.mark.parametrize(
    ("name", "heads", "reason"),
    [
        ("llama", ["L0H0", "L1H0", "L2H0"], "1 on KV head 0 and 2 on KV head 1 are left in layer 0"),
        ("llama", [(layer, h) for layer in range(3) for h in range(4)], "leaves no head"),
        ("gpt2", ["L0H0", "L1H0", "L2H0"], "no head_dim of its own"),
        ("olmo2", [(layer, h) for layer in range(3) for h in (0, 1)], "computes across heads|no head_dim"),
        ("opt", ["L0H0", "L1H0", "L2H0"], "no head_dim"),
    ],
)
def test_what_a_config_cannot_say_is_not_pruned_and_the_reason_is_given(name, heads, reason):
    with pytest.raises(UnsupportedError, match=reason):
        opened(name).prune(heads)


def test_as_many_query_heads_of_each_group_go_and_their_kv_heads_stay(tmp_path):
    # As 6 query heads on 3 KV heads come of 9 on 3.
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = mh.open_model(transformers.LlamaForCausalLM(config).eval())
    gone = ["L0H0", "L0H5", "L1H2", "L1H3"]
    ids = torch.randint(64, (2, 7))
    with model.editing(mh.Scale(gone, 0.0)):
        masked = model.logits(ids)
    small = model.prune(gone)
    assert (small.n_heads, small.n_kv_heads, small.head_dim) == (4, 2, 8)
    small.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert (again(ids).logits - masked).abs().max() <= 1e-5
    with pytest.raises(UnsupportedError, match="1 on KV head 0 and 3 on KV head 1 are left in layer 0"):
        model.prune(["L0H0", "L0H1", "L1H0", "L1H1"])


def test_saving_does_not_overwrite_unless_told_to(tmp_path):
    model = opened("llama")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        model.save_pretrained(tmp_path / "there")
    assert (tmp_path / "there" / "precious").read_text() == "x"
    model.save_pretrained(tmp_path / "there", force=True)
    assert not (tmp_path / "there" / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_fingerprint_follows_the_weights_and_nothing_else(tmp_path):
    model = mh.open_model(build("llama"))
    assert model.fingerprint == opened("llama").fingerprint
    model.save_pretrained(tmp_path / "copy")
    assert mh.open_model(tmp_path / "copy").fingerprint == model.fingerprint
    assert model.bake(mh.Scale(["L0H0"], 1.0)).fingerprint == model.fingerprint
    assert model.bake(mh.Scale(["L0H0"], 0.999)).fingerprint != model.fingerprint
    assert mh.open_model(build("llama", seed=1)).fingerprint != model.fingerprint
