"""The proof at the door: what is read is what the model computes, or it is not read."""

import copy

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from architectures import COMMON, DECODERS, EVERY, LLAMA, build, inputs_for, opened
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.linear import is_plain
from manyheads.model.offloading import own_copy
from manyheads.model.proving.certificate import certify
from manyheads.model.reading import ReadAttention


@pytest.mark.parametrize("name", EVERY)
def test_every_site_of_every_known_architecture_is_proved(name):
    proof = opened(name).proof
    assert not proof.failed and not proof.gated
    sites = {"projection", "attention_write", "mlp_write", "attention"}
    padded = set() if "pixel_values" in inputs_for(name) else {"padding on the left", "padding on the right"}
    assert set(proof.errors) == sites | padded
    assert max(proof.errors.values()) < 1e-4


class Twice(nn.Module):
    """Puts out twice what a linear map would."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, None
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x):
        return 2 * self.inner(x)


def test_a_projection_that_is_not_its_weight_is_refused_by_layer():
    module = build("llama")
    module.model.layers[1].self_attn.o_proj = Twice(module.model.layers[1].self_attn.o_proj)
    with pytest.raises(UnsupportedError, match=r"in layer 1 sum_h z_h W_O\[h\] \+ b_O is not what its output"):
        mh.open_model(module)


class Louder(LlamaDecoderLayer):
    """Adds half of its input once more: neither attention nor MLP wrote that."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) + 0.5 * hidden_states


def test_a_layer_that_adds_more_than_attention_and_mlp_has_no_writes_and_says_so():
    module, ids = build("llama"), inputs_for("llama")["input_ids"]
    module.model.layers[2].__class__ = Louder
    model = mh.open_model(module)
    assert set(model.proof.failed) == {"attention_write", "mlp_write"}
    assert model.read_z(ids).shape[0] == 3 and model.read_site(ids, "resid").shape[0] == 4
    for site in ("attention_write", "mlp_write"):
        with pytest.raises(UnsupportedError, match=f"{site} cannot be read right here: in layer 2 resid"):
            model.read_site(ids, site)


class Own(LlamaAttention):
    """A user's own class, as in a notebook."""


def test_an_attention_class_of_ones_own_is_read_as_the_class_it_was_made_from():
    module, ids = build("llama"), inputs_for("llama")["input_ids"]
    for layer in module.model.layers:
        layer.self_attn.__class__ = Own
    model = mh.open_model(module)
    with model.editing(mh.Ablate(["L1H2"], "uniform")), opened("llama").editing(mh.Ablate(["L1H2"], "uniform")):
        assert torch.allclose(model.logits(ids), opened("llama").logits(ids), atol=1e-5)


class Unwatched(LlamaAttention):
    """Attention by a convolution of its own: there is no pattern to be seen."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.o_proj(self.q_proj(hidden_states).cumsum(1)), None


def test_attention_without_a_pattern_is_refused_and_z_is_still_read():
    module, ids = build("llama"), inputs_for("llama")["input_ids"]
    module.model.layers[0].self_attn.__class__ = Unwatched
    model = mh.open_model(module)
    assert {"attention", "q", "k", "v"} <= set(model.proof.failed)
    assert model.read_z(ids).shape[0] == 3
    with pytest.raises(
        UnsupportedError, match="attention cannot be read right here: layer 0 does not compute attention"
    ):
        model.look(ids, ReadAttention(lambda call: None))
    with (
        pytest.raises(UnsupportedError, match="attention cannot be read"),
        model.editing(mh.Ablate(["L0H0"], "uniform")),
    ):
        pass


class Gated(LlamaAttention):
    """Gates the heads' outputs between attention and projection, as Qwen3-Next does."""

    def forward(self, hidden_states, *args, **kwargs):
        gate = torch.sigmoid(self.q_proj(hidden_states))
        projection, self.o_proj = self.o_proj, nn.Identity()
        try:
            z, weights = super().forward(hidden_states, *args, **kwargs)
        finally:
            self.o_proj = projection
        return self.o_proj(z * gate), weights


def test_behind_a_gate_z_is_what_the_projection_reads_and_is_edited_there():
    module, ids = build("llama"), inputs_for("llama")["input_ids"]
    for layer in module.model.layers:
        layer.self_attn.__class__ = Gated
    model = mh.open_model(module)
    assert model.proof.gated and not model.proof.failed
    other = model.read_z(ids.flip(0))
    with model.editing(mh.Ablate(["L1H0"], "uniform"), mh.Patch(["L1H3"], other)):
        z = model.read_z(ids)
        assert torch.allclose(z[1, :, :, 3], other[1, :, :, 3], atol=1e-6)
    with model.editing(mh.Ablate(["L1H0"], "uniform")):
        assert torch.allclose(model.read_z(ids)[1, :, :, 1], z[1, :, :, 1], atol=1e-6)
        assert not torch.allclose(z[1, :, :, 0], opened("llama").read_z(ids)[1, :, :, 0], atol=1e-3)


def test_a_model_in_training_mode_with_dropout_is_refused_and_one_without_opens():
    config = tf.LlamaConfig(**LLAMA, attention_dropout=0.3)
    with pytest.raises(InputError, match=r"in training mode, and two passes of it differ; call model\.eval\(\)"):
        mh.open_model(tf.LlamaForCausalLM(config).train())
    assert mh.open_model(tf.LlamaForCausalLM(config).eval())
    assert mh.open_model(build("llama").train())


def test_padding_that_changes_logits_is_refused_where_it_is_given():
    class Forgets(LlamaDecoderLayer):
        """Mixes all positions, whatever the mask says."""

        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) + hidden_states.cumsum(1)

    module, ids = build("llama"), inputs_for("llama")["input_ids"]
    module.model.layers[0].__class__ = Forgets
    model = mh.open_model(module)
    assert "padding on the left" in model.proof.failed and "padding on the right" not in model.proof.failed
    mask = torch.ones_like(ids)
    assert model.logits({"input_ids": ids, "attention_mask": mask}).shape[0] == 3
    mask[1, :3] = 0
    with pytest.raises(UnsupportedError, match="padding on the left cannot be read right here"):
        model.logits({"input_ids": ids, "attention_mask": mask})
    right = model.logits({"input_ids": ids, "attention_mask": mask.flip(1)})
    assert torch.allclose(right[1, :-3], model.logits(ids[1:2, :-3])[0], atol=1e-4)


def test_what_fails_on_plain_tokens_is_refused_in_a_sentence():
    module = build("llama")
    module.model.layers[1].forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(UnsupportedError, match="a pass over input_ids fails with ZeroDivisionError"):
        mh.open_model(module)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_weights_that_were_moved_away_are_read_as_if_they_were_there(name):
    plain, ids = opened(name), inputs_for(name)["input_ids"]
    model = mh.open_model(cpu_offload(copy.deepcopy(plain.module), execution_device=torch.device("cpu")))
    answers = torch.tensor([5, 6, 7])
    for foils in (None, torch.tensor([8, 9, 10])):
        here, there = (mh.logit_attribution(m, ids, answers, foils).heads for m in (model, plain))
        assert torch.allclose(here, there, atol=1e-5)
    resid = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.ov(resid), plain.ov(resid), atol=1e-5)
    assert model.fingerprint == plain.fingerprint
    other = mh.open_model(cpu_offload(build(name, seed=1), execution_device=torch.device("cpu")))
    assert other.fingerprint != model.fingerprint


def test_a_change_of_the_config_in_place_changes_the_fingerprint():
    model = mh.open_model(build("llama"))
    before = model.fingerprint
    model.config.rms_norm_eps = 0.1
    assert model.fingerprint != before
    model.config.rms_norm_eps = opened("llama").config.rms_norm_eps
    assert model.fingerprint == before


def test_a_decoder_without_biases_of_position_opens_in_half_precision():
    for name in ("gpt2", "llama"):
        model = mh.open_model(DECODERS[name]().to(torch.bfloat16).eval())
        assert not model.proof.failed
    assert COMMON["pad_token_id"] == 0


class Int8(nn.Module):
    """Weights as eight-bit numbers and a scale, as quantisers keep them; the bias is a method, as in PyTorch's own."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / self.scale).round().to(torch.int8))
        self._bias = None if linear.bias is None else linear.bias.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def bias(self):
        return self._bias

    def forward(self, x):
        made = x @ (self.packed.float() * self.scale).T
        return made if self._bias is None else made + self._bias


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_quantised_weights_are_read_as_what_they_compute(name):
    module, ids = build(name), inputs_for(name)["input_ids"]
    plain = mh.open_model(copy.deepcopy(module))
    for part in list(module.modules()):
        for child, linear in list(part.named_children()):
            if isinstance(linear, nn.Linear) and linear is not module.get_output_embeddings():
                setattr(part, child, Int8(linear))
    model = mh.open_model(module)
    assert not model.proof.failed
    for layer in range(3):
        z = model.read_site(ids, "z")[layer]
        written = torch.einsum("bthd,hde->bte", z, model.W_O(layer))
        bias = model.bias_O(layer)
        assert (bias is None) == (plain.bias_O(layer) is None)
        written = written if bias is None else written + bias
        assert torch.allclose(written, model.read_site(ids, "attention_write")[layer], atol=1e-4)
    answers = torch.tensor([5, 6, 7])
    assert torch.allclose(
        mh.logit_attribution(model, ids, answers).total,
        model.logits(ids)[:, -1].gather(1, answers[:, None])[:, 0].double(),
        atol=1e-3,
    )
    with pytest.raises(UnsupportedError, match="cannot be rewritten head by head"):
        model.bake(mh.Scale(["L0H1"], 0.0))


def test_rotary_frequencies_in_half_precision_are_told_of():
    with pytest.warns(UserWarning, match=r"inv_freq is in half precision, which moves far positions"):
        mh.open_model(build("llama").to(torch.bfloat16))


class Words:
    """A tokenizer of so many words."""

    pad_token_id, eos_token_id = 0, 0

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def __call__(self, texts):
        return {"input_ids": [[min(len(word), 99) for word in text.split()] for text in texts]}


def test_a_tokenizer_of_another_model_is_refused_and_a_token_that_the_model_lacks_where_it_is_used():
    with pytest.raises(
        InputError, match="makes 62 kinds of tokens and LlamaForCausalLM knows 61: it is another model's"
    ):
        mh.open_model(build("llama"), tokenizer=Words(62))
    model = mh.open_model(build("llama"), tokenizer=Words(61))
    assert model.logits("a bb").shape == (1, 2, 61)
    with pytest.raises(InputError, match="token id 80 is out of range"):
        model.logits("a " + "b" * 80)


class FromTwo(tf.GPT2LMHeadModel):
    """Right only where tokens stand from 0 on, and on the right alone: padding on the left leaks into its logits."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        output = super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            output.logits = output.logits + 1 + (0 if position_ids is None else 3)
        return output


def test_the_rule_of_positions_is_that_of_the_side_that_is_right():
    """On the left, leaving positions to the model is the lesser evil; on the right only counting is right."""
    config = tf.GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    module = FromTwo(config).eval()
    model, ids = mh.open_model(module), inputs_for("llama")["input_ids"]
    assert set(model.proof.failed) == {"padding on the left"} and model.proof.first_position == 0
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    padded = model.logits({"input_ids": ids, "attention_mask": mask})
    assert torch.allclose(padded[1, :-3], model.logits(ids[1:2, :-3])[0], atol=1e-4)


def test_a_copy_of_weights_that_were_moved_away_is_tied_as_they_are():
    moved = cpu_offload(build("gpt2"), execution_device=torch.device("cpu"))
    copied, ids = own_copy(moved), inputs_for("gpt2")["input_ids"]
    assert copied.lm_head.weight is copied.transformer.wte.weight and not copied.lm_head.weight.is_meta
    with torch.no_grad():
        assert torch.allclose(copied(ids).logits, opened("gpt2").logits(ids), atol=1e-5)


class Packed(torch.Tensor):
    """A tensor of another kind that gives float32 as its type, as torchao's do."""


def test_a_weight_of_another_kind_of_tensor_is_not_taken_for_its_numbers():
    linear = nn.Linear(4, 6, bias=False)
    assert is_plain(linear)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))
    assert linear.weight.dtype == torch.float32 and not is_plain(linear)


def test_quantised_weights_that_round_no_activations_leave_a_certificate_little_room():
    module = build("llama")
    for layer in module.model.layers:
        layer.self_attn.o_proj = Int8(layer.self_attn.o_proj)
    found = certify(mh.open_model(module), n_tokens=8)
    assert found.ok and {condition.tolerance for condition in found.conditions} == {0.1}
    assert {condition.dtype for condition in found.conditions} == {"float32, Int8 weights"}


class AttentionAlone(nn.Module):
    """A layer of attention and its dropout, without an MLP."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        super().__init__()
        self.self_attn, self.norm, self.dropout = layer.self_attn, layer.input_layernorm, nn.Dropout(0.1)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.dropout(self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)[0])


def test_the_dropout_of_a_layer_without_an_mlp_is_not_taken_for_one():
    """Attention and dropout are the same numbers, so half of both fits, too."""
    module = build("llama")
    for i, layer in enumerate(module.model.layers):
        module.model.layers[i] = AttentionAlone(layer)
    model = mh.open_model(module.eval())
    assert model.layout.residual_scale == 1.0
    assert {type(block.mlp_write).__name__ for block in model.layout.blocks} == {"Absent"}
