"""What is rewritten stays what it was in all else: types, generation config, buffers; or it is refused in a sentence."""

import copy
import json

import accelerate
import pytest
import torch
import transformers as tf
from architectures import EVERY, EXTRA, LLAMA, build, inputs_for, opened
from torch import nn

import manyheads as mh
from manyheads.edit.checkpoint import INSIDE, save_baked, undo
from manyheads.errors import InputError, ManyheadsError, MismatchError, UnsupportedError
from manyheads.model.editing.edits import Affine
from manyheads.model.editing.head_edit import HeadEdit

HEADS = ["L0H1", "L1H2", "L2H3"]
PAIRS = [(layer, h) for layer in range(3) for h in (0, 1)]


def llama(**changes):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model


def saved(module, dtype, folder):
    """The module as Transformers loads it in this type."""
    module.save_pretrained(folder)
    return mh.open_model(folder, dtype=dtype)


def with_own_rules(module):
    """A generation config that differs from what is made of the config."""
    if getattr(module, "generation_config", None) is not None:
        module.generation_config.update(repetition_penalty=1.25, eos_token_id=[2, 7], do_sample=True, top_p=0.9)
    return module


def rules_of(module):
    config = getattr(module, "generation_config", None)
    return None if config is None else (config.repetition_penalty, config.eos_token_id, config.do_sample, config.top_p)


def kept_as_they_were(before, after, changed):
    """Every tensor and buffer but those whose name contains one of `changed` is bit for bit the same, in its own type."""
    old = dict(before.named_parameters()) | dict(before.named_buffers())
    new = dict(after.named_parameters()) | dict(after.named_buffers())
    same = [name for name in new if name in old and not any(part in name for part in changed)]
    assert len(same) > len(old) / 3
    assert all(old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]) for name in same)


@pytest.mark.parametrize("name", [*EVERY, *EXTRA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_baked_reopens_with_every_number_as_it_should_be(name, dtype, tmp_path):
    model = saved(with_own_rules(build(name)), dtype, tmp_path / "m")
    rows = {layer: model.W_O(layer).detach().clone() for layer in range(3)}
    model.bake(mh.Scale(HEADS, 0.3), mh.Scale(["L2H3"], -1.0)).save_pretrained(tmp_path / "baked")
    again = mh.open_model(tmp_path / "baked", dtype="auto")
    assert type(again.plain) is type(model.plain) and next(again.plain.parameters()).dtype == dtype
    for layer, whole in rows.items():
        for head, old in enumerate(whole):
            scale = {(0, 1): 0.3, (1, 2): 0.3, (2, 3): -0.3}.get((layer, head), 1.0)
            assert torch.equal(again.W_O(layer)[head], (old.double() * torch.tensor(scale).double()).to(dtype)), head
    assert rules_of(again.plain) == rules_of(model.plain)
    names = {id(part): name for name, part in model.plain.named_modules()}
    written = [names[id(block.projection)] + "." for block in model.layout.blocks]
    kept_as_they_were(model.plain, again.plain, written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss", "gemma3", "gpt2"])
def test_a_constant_and_pruning_leave_types_buffers_and_rules_as_they_were(name, dtype, tmp_path):
    model = saved(with_own_rules(build(name)), dtype, tmp_path / "m")
    vectors = torch.randn(3, model.head_dim, generator=torch.Generator().manual_seed(0))
    shift = Affine(HEADS, scales=torch.tensor([0.3, 1.0, 1.0]), shifts=vectors)
    shrunk = [] if name == "gpt2" else [model.prune(PAIRS)]
    for i, changed in enumerate([model.bake(shift), *shrunk]):
        changed.save_pretrained(tmp_path / str(i))
        for one in (changed, mh.open_model(tmp_path / str(i), dtype="auto")):
            assert rules_of(one.plain) == rules_of(model.plain)
            kept_as_they_were(model.plain, one.plain, ["attn.", "sinks"])
    # The bias in float32, rounded once.
    baked = mh.open_model(tmp_path / "0", dtype="auto")
    rows = model.W_O(0).detach().float()
    old = model.bias_O(0)
    wanted = vectors[0] @ rows[1] + (0 if old is None else old.float())
    assert torch.equal(baked.bias_O(0), wanted.to(dtype)) or torch.allclose(
        baked.bias_O(0).float(), wanted, rtol=2**-7, atol=1e-6
    )


def test_an_edit_of_a_float32_opening_bakes_into_the_half_precision_checkpoint_and_out_of_it(tmp_path):
    half = saved(with_own_rules(build("llama")), torch.bfloat16, tmp_path / "f").plain
    half.save_pretrained(tmp_path / "m")
    wide, narrow = mh.open_model(tmp_path / "m"), mh.open_model(tmp_path / "m", dtype="auto")
    assert wide.fingerprint != narrow.fingerprint
    for made_with, baked_with in ((wide, narrow), (narrow, wide)):
        shift = torch.randn(3, made_with.head_dim, generator=torch.Generator().manual_seed(1))
        edit = HeadEdit.of(made_with, Affine(HEADS, scales=torch.full((3,), 0.3), shifts=shift), method="x")
        folder = save_baked(baked_with, edit, tmp_path / f"b-{made_with is wide}")
        dtype = next(baked_with.plain.parameters()).dtype
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        restored = undo(folder)
        assert restored.fingerprint == baked_with.fingerprint
        assert rules_of(restored.plain) == rules_of(half)
        kept_as_they_were(baked_with.plain, restored.plain, [])
        assert torch.equal(restored.logits(inputs_for("llama")), baked_with.logits(inputs_for("llama")))
    # One number apart, in any type, is another model.
    with torch.no_grad():
        half.lm_head.weight[3, 3] += 0.5
    with pytest.raises(MismatchError, match="made for model"):
        save_baked(mh.open_model(half), HeadEdit.of(wide, mh.Scale(HEADS, 0.0), method="x"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Weights that are elsewhere, or that adapters change


def test_offloaded_weights_bake_and_prune_as_those_in_memory(tmp_path):
    model, inputs = opened("llama"), inputs_for("llama")
    away = mh.open_model(accelerate.cpu_offload(build("llama"), execution_device="cpu"))
    assert all(parameter.is_meta for parameter in away.plain.parameters())
    for make in (
        lambda m: m.bake(mh.Scale(HEADS, 0.3)),
        lambda m: m.bake(mh.Offset(HEADS, torch.ones(3, m.head_dim))),
        lambda m: m.prune(PAIRS),
    ):
        here, there = make(model), make(away)
        assert torch.equal(there.logits(inputs), here.logits(inputs)) and there.fingerprint == here.fingerprint
    edit = HeadEdit.of(away, mh.Scale(HEADS, 0.3), method="x")
    assert undo(save_baked(away, edit, tmp_path / "b")).fingerprint == model.fingerprint
    away.save_pretrained(tmp_path / "whole")
    assert mh.open_model(tmp_path / "whole").fingerprint == model.fingerprint
    assert all(parameter.is_meta for parameter in away.plain.parameters())


class Adapted(nn.Module):
    """An adapter around a projection with the names that PEFT gives: `base_layer`, `merge`, `get_base_layer`."""

    def __init__(self, base, on=True):
        super().__init__()
        self.base_layer, self.on = base, on
        generator = torch.Generator().manual_seed(2)
        self.down = nn.Parameter(torch.randn(base.in_features, 2, generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(2, base.out_features, generator=generator) * 0.3)

    def forward(self, x):
        return self.base_layer(x) + (x @ self.down @ self.up if self.on else 0)

    def merge(self):
        with torch.no_grad():
            self.base_layer.weight += (self.down @ self.up).T

    def get_base_layer(self):
        return self.base_layer


def adapted(on=True):
    module = build("llama")
    for layer in module.model.layers:
        layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj, on)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj, on)
    return module


def test_adapters_are_merged_into_what_is_baked_and_pruned(tmp_path):
    model, inputs = mh.open_model(adapted()), inputs_for("llama")
    before = model.logits(inputs)
    with model.editing(mh.Scale(PAIRS, 0.0)):
        masked = model.logits(inputs)
    for changed in (model.bake(mh.Scale(PAIRS, 0.0)), model.prune(PAIRS)):
        assert (changed.logits(inputs) - masked).abs().max() <= 1e-4
        assert not [name for name, _ in changed.plain.named_parameters() if "base_layer" in name]
        changed.save_pretrained(tmp_path / str(changed.n_heads))
        plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / str(changed.n_heads))
        with torch.no_grad():
            assert (plain(**inputs).logits - masked).abs().max() <= 1e-4
    edit = HeadEdit.of(model, mh.Scale(PAIRS, 0.0), method="x")
    assert (undo(save_baked(model, edit, tmp_path / "c")).logits(inputs) - before).abs().max() <= 1e-4
    assert torch.equal(model.logits(inputs), before)


def test_adapters_that_are_switched_off_or_cannot_be_merged_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="merging the adapters of LlamaForCausalLM changes its logits"):
        mh.open_model(adapted(on=False)).bake(mh.Scale(HEADS, 0.0))
    module = adapted()
    module.model.layers[1].self_attn.o_proj.merge = None
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        mh.open_model(module).prune(PAIRS)


# What is refused before work


def test_layers_that_share_a_projection_share_what_is_baked():
    module = llama()
    module.model.layers[1].self_attn.o_proj.weight = module.model.layers[0].self_attn.o_proj.weight
    model, inputs = mh.open_model(module), inputs_for("llama")
    with pytest.raises(UnsupportedError, match=r"layers 0 and 1 .* share their weights"):
        model.bake(mh.Scale(["L0H0"], 0.0))
    edit = mh.Scale(["L2H1"], 0.3)
    with model.editing(edit):
        edited = model.logits(inputs)
    assert (model.bake(edit).logits(inputs) - edited).abs().max() <= 1e-5


def test_a_projection_that_does_more_than_its_weights_is_not_baked():
    """A scale on the heads' outputs that grows with them: the weights do not say what an edit of z would do."""

    class Squashing(nn.Linear):
        def forward(self, x):
            return super().forward(x.tanh())

    module = build("llama")
    for layer in module.model.layers:
        old = layer.self_attn.o_proj
        layer.self_attn.o_proj = Squashing(32, 32, bias=False)
        layer.self_attn.o_proj.load_state_dict(old.state_dict())
    try:
        model = mh.open_model(module)
    except UnsupportedError:
        return
    with pytest.raises(UnsupportedError):
        model.bake(mh.Scale(HEADS, -2.0))


def test_counts_that_a_class_does_not_allow_are_refused():
    config = tf.HeliumConfig(**LLAMA | {"num_key_value_heads": 4}, head_dim=8)
    model = mh.open_model(tf.HeliumForCausalLM(config).eval())
    with pytest.raises(UnsupportedError, match="with fewer heads"):
        model.prune([(layer, layer) for layer in range(3)])


@pytest.mark.parametrize("kind", ["Helium", "DiffLlama", "Olmo2", "Phi3", "StableLm", "Granite", "Mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pruning_is_masking_and_reopens_or_is_refused_in_a_sentence(kind, dtype, tmp_path):
    torch.manual_seed(0)
    own = {"head_dim": 8} if kind == "Helium" else {"num_local_experts": 2} if kind == "Mixtral" else {}
    config = getattr(tf, f"{kind}Config")(**LLAMA, **own)
    model, inputs = saved(getattr(tf, f"{kind}ForCausalLM")(config), dtype, tmp_path / "m"), inputs_for("llama")
    try:
        small = model.prune(PAIRS)
    except UnsupportedError as error:
        assert "head" in str(error) and "\n" not in str(error)
        return
    small.save_pretrained(tmp_path / "small")
    again = mh.open_model(tmp_path / "small", dtype="auto")
    with model.editing(mh.Scale(PAIRS, 0.0)):
        masked = model.logits(inputs).float()
    assert (again.logits(inputs).float() - masked).abs().max() <= (
        1e-4 if dtype == torch.float32 else 0.05
    ) * masked.abs().max()
    assert again.fingerprint == small.fingerprint


def test_what_transformers_cannot_save_is_one_sentence_and_leaves_nothing(tmp_path):
    module = copy.deepcopy(build("llama"))
    module.generation_config.cache_implementation = "paper"
    model = mh.open_model(module)
    with pytest.raises(UnsupportedError, match="cannot save this LlamaForCausalLM"):
        model.save_pretrained(tmp_path / "m")
    edit = HeadEdit.of(model, mh.Scale(HEADS, 0.0), method="x")
    with pytest.raises(UnsupportedError, match="cannot save this LlamaForCausalLM"):
        save_baked(model, edit, tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["undo.json", "undo.safetensors"])
def test_a_damaged_undo_is_one_sentence(name, tmp_path):
    model = opened("llama")
    folder = save_baked(model, HeadEdit.of(model, mh.Scale(HEADS, 0.0), method="x"), tmp_path / "b")
    path = folder / INSIDE / name
    whole = path.read_bytes()
    wrong = [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", whole[: len(whole) // 2]]
    if name == "undo.json":
        about = json.loads(whole)
        wrong += [
            json.dumps(about | change).encode()
            for change in (
                {"config": []},
                {"config": {"num_hidden_layers": "six"}},
                {"config": about["config"] | {"attention_bias": True}},
                {"fingerprint": 3},
                {"baked": "0" * 16},
                {"projections": ["lm_head"]},
                {"projections": 7},
            )
        ]
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(ManyheadsError):
            undo(folder)
    path.unlink()
    with pytest.raises(InputError):
        undo(folder)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda: mh.Scale(HEADS, float("nan")), "finite"),
        (lambda: mh.Scale(HEADS, float("inf")), "finite"),
        (lambda: mh.Offset(HEADS, torch.full((3, 8), torch.nan)), "finite"),
        (lambda: mh.Offset(HEADS, torch.ones(3, 7)), "as wide as a head"),
    ],
)
def test_numbers_that_weights_cannot_hold_are_not_baked(edit, sentence):
    with pytest.raises(InputError, match=sentence):
        opened("llama").bake(edit(), mh.Scale(HEADS, 20.0))


def test_a_scale_that_half_precision_cannot_hold_is_not_baked(tmp_path):
    model = saved(build("llama"), torch.float16, tmp_path / "m")
    with pytest.raises(InputError, match=r"torch.float16 cannot hold"):
        model.bake(mh.Scale(HEADS, 1e6))
