import copy

import pytest
import torch
import transformers as tf
from architectures import LLAMA, build, inputs_for, opened
from transformers import AutoModelForCausalLM

import manyheads as mh
from manyheads.errors import UnsupportedError
from manyheads.model.reading.readers import Keep, ReadAttention
from manyheads.shrink.positions.carope import CARoPE, ContextSteps, start_bias
from manyheads.shrink.positions.complexformer import ComplexFormer, ContentAngles, content_angle
from manyheads.shrink.positions.long_heads import LongHeads
from manyheads.shrink.positions.rotation import Frame, Pairs
from manyheads.training import TrainSettings, fit, next_token_loss

METHODS = [CARoPE(), ComplexFormer()]
FRAME = Frame(Pairs(8), "q_proj", "k_proj", heads=4, groups=2, hidden=32)


def stirred(model, seed=0, by=0.3):
    """A converted model whose new parameters are far from RoPE."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.plain.named_parameters():
            if "context_steps" in name or "content_angles" in name:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def patterns(model, ids):
    """Patterns of the first layer, `[B, H, T, T]`."""
    seen = []
    model.look(ids, ReadAttention(lambda call: seen.append(call.pattern), layers=[0]))
    return seen[0]


def before_rotation(model, ids):
    """The embeddings, and the first layer's q and k before RoPE, `[B, T, H, Dh]` and `[B, T, Hkv, Dh]`, by its weights."""
    layer = model.plain.model.layers[0]
    x = model.plain.model.embed_tokens(ids)
    hidden, attention = layer.input_layernorm(x), layer.self_attn
    q = hidden @ attention.q_proj.weight.T
    k = hidden @ attention.k_proj.weight.T
    return x, q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8))


def softmax_of(scores):
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


# Both


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "olmo2", "granite", "mixtral"])
def test_a_converted_model_begins_at_its_own_rope(method, name):
    model = opened(name)
    ids = inputs_for(name, length=31)["input_ids"]
    new = method.convert(model)
    assert (new.logits(ids) - model.logits(ids)).abs().max() < 1e-4
    assert (stirred(new, by=3.0).logits(ids) - model.logits(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_an_interleaved_partial_or_scaled_rope_is_kept(method):
    config = tf.CohereConfig(**LLAMA | {"num_key_value_heads": 4})
    scaling = {"rope_type": "llama3", "factor": 4.0, "rope_theta": 5e4, "original_max_position_embeddings": 32}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    models = [tf.CohereForCausalLM(config), tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, rope_parameters=scaling))]
    for module in models:
        model = mh.open_model(module.eval())
        ids = inputs_for("llama", length=60)["input_ids"]
        assert (method.convert(model).logits(ids) - model.logits(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_generating_with_a_cache_gives_what_reading_the_whole_text_gives(method):
    model = stirred(method.convert(opened("llama")))
    ids = inputs_for("llama", length=9)["input_ids"]
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for beams in (1, 3):
        made = model.generate(ids, num_beams=beams, **kwargs)
        assert torch.equal(made, model.generate(ids, num_beams=beams, use_cache=False, **kwargs))
    with torch.no_grad():
        whole, cache = model.logits(made), tf.DynamicCache(config=model.config)
        model.plain(made[:, :12], past_key_values=cache)
        kept = copy.deepcopy(cache)
        cache.crop(-4)
        for one, start in ((cache, 8), (kept, 12)):
            assert (model.plain(made[:, start:], past_key_values=one).logits - whole[:, start:]).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_padded_rows_are_read_and_continued_as_if_alone(method):
    model = stirred(method.convert(opened("llama")))
    ids = inputs_for("llama", length=12)["input_ids"]
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 3, 7)):
        mask[row, :n] = 0
    batch = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    logits, made = model.logits(batch), model.generate(batch, **kwargs)
    for row, n in enumerate((0, 3, 7)):
        alone = ids[row : row + 1, n:]
        assert (model.logits(alone)[0] - logits[row, n:]).abs().max() < 1e-4
        assert torch.equal(model.generate(alone, **kwargs)[0, 12 - n :], made[row, 12:])


@pytest.mark.parametrize("method", METHODS)
def test_later_tokens_change_nothing(method):
    model = stirred(method.convert(opened("llama")))
    ids = inputs_for("llama", length=12)["input_ids"]
    other = torch.cat([ids[:, :8], ids[:, 8:].flip(1)], 1)
    assert (model.logits(ids)[:, :8] - model.logits(other)[:, :8]).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_saved_it_opens_again_with_the_same_logits(method, tmp_path):
    model = stirred(method.convert(opened("llama")))
    ids = inputs_for("llama")["input_ids"]
    model.save_pretrained(tmp_path / "saved")
    again = mh.open_model(str(tmp_path / "saved"))
    assert torch.equal(again.logits(ids), model.logits(ids))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.logits(ids))
    assert {p.relative_to(tmp_path / "saved").suffix for p in (tmp_path / "saved").iterdir()} <= {
        ".json",
        ".safetensors",
    }


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_new_parameters_and_a_copy_is_apart(method):
    model = method.convert(opened("llama"))
    copied = mh.open_model(copy.deepcopy(model.plain))
    ids = inputs_for("llama", batch=8, length=16)["input_ids"]
    before = copied.logits(ids)
    settings = TrainSettings(steps=12, rate=0.01, warmup=1, precision="fp32")
    done = fit(model.plain, lambda _: {"input_ids": ids}, settings, loss=next_token_loss)
    assert done.last < 0.9 * next_token_loss(copied.plain, {"input_ids": ids}).item()
    new = {n: p for n, p in model.plain.named_parameters() if "context_steps" in n or "content_angles" in n}
    assert new and all(bool((p != 0).any()) for p in new.values())
    assert torch.equal(copied.logits(ids), before)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_begins_at_rope_too(method):
    model = mh.open_model(build("llama").to(torch.bfloat16))
    ids = inputs_for("llama", length=31)["input_ids"]
    assert (method.convert(model).logits(ids) - model.logits(ids)).abs().max() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_done_is_refused_by_name(method):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    quantised = mh.open_model(build("llama"))
    quantised.plain.hf_quantizer = object()
    reasons = {
        "no rotary embedding": opened("gpt2"),
        "no rotary embedding with one table": opened("gemma3"),
        "otherwise than by q_proj and k_proj": opened("phi3"),
        "depend on the length": mh.open_model(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, rope_parameters=dynamic))),
        "changed already": method.convert(opened("llama")),
        "is quantised": quantised,
    }
    for reason, model in reasons.items():
        with pytest.raises(UnsupportedError, match=reason):
            method.convert(model)
    with pytest.raises(UnsupportedError, match="changed already"), LongHeads(16, 4)(method.convert(opened("llama"))):
        raise AssertionError


# CARoPE


def test_carope_keeps_no_sums_beside_a_sliding_cache():
    with pytest.raises(UnsupportedError, match="sliding cache"):
        CARoPE().convert(opened("mistral"))
    model = opened("stablelm")
    with pytest.raises(UnsupportedError, match="one pair"):
        CARoPE().convert(model)


@pytest.mark.parametrize("dim, bias", [(16, 2.0400), (32, 0.1636), (64, -0.9267), (128, -1.7873)])
def test_the_first_bias_makes_every_step_theta(dim, bias):
    theta = 10000 ** (-2 / dim)
    assert start_bias(theta) == pytest.approx(bias, abs=1e-4)
    steps = ContextSteps(Frame(Pairs(dim), "q_proj", "k_proj", 2, 2, 5), theta).double()
    assert torch.allclose(steps.log_f(torch.randn(1, 3, 5).double()).exp(), torch.tensor(theta).double(), atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(steps.float().log_f(torch.randn(1, 3, 5)).exp(), torch.tensor(theta), rtol=1e-6)


def test_at_512_tokens_the_start_is_rope_to_a_millionth_in_double_precision():
    config = tf.LlamaConfig(**LLAMA | {"max_position_embeddings": 512, "hidden_size": 64}, initializer_range=0.2)
    model = mh.open_model(tf.LlamaForCausalLM(config).double().eval())
    ids = inputs_for("llama", batch=1, length=512)["input_ids"]
    assert (CARoPE().convert(model).logits(ids) - model.logits(ids)).abs().max() < 1e-6
    model = mh.open_model(model.plain.float())
    assert (CARoPE().convert(model).logits(ids) - model.logits(ids)).abs().max() < 1e-3


def test_carope_attends_as_its_formula_says():
    model = stirred(CARoPE().convert(opened("llama")))
    ids = inputs_for("llama", length=14)["input_ids"]
    with torch.no_grad():
        x, q, k = before_rotation(model, ids)
        steps = model.plain.model.rotary_emb.context_steps
        f = 1 / (torch.nn.functional.softplus(x @ steps.W + steps.b) + 1)
        phi = torch.stack([f**i for i in range(4)], -1).cumsum(1)  # [B, T, G, R]
        q = Pairs(8).rotate(q, phi.repeat_interleave(2, 2))
        k = Pairs(8).rotate(k, phi).repeat_interleave(2, 2)
        wanted = softmax_of(torch.einsum("bthd,bshd->bhts", q, k) * 8**-0.5)
    assert (patterns(model, ids) - wanted).abs().max() < 1e-5


def test_marked_tokens_are_as_far_apart_as_their_content_says_whatever_stands_between():
    theta = 10000 ** (-1 / 16)
    steps = ContextSteps(Frame(Pairs(32), "q_proj", "k_proj", 1, 1, 1), theta).double()
    z = {f: torch.tensor(1 / f - 1).expm1().log() if f > 0.1 else torch.tensor(1 / f - 1) for f in (0.99, 0.001)}
    with torch.no_grad():
        steps.b_more.fill_(float(z[0.001]) - start_bias(theta))
        steps.W.fill_(float(z[0.99] - z[0.001]))
    fillers = torch.randint(0, 51, (40,)).tolist()
    is_marker = torch.cat([torch.cat([torch.zeros(n), torch.ones(1)]) for n in [3, *fillers]])
    frequencies = theta ** torch.arange(16).double()
    phase = (steps.added_steps(is_marker[None, :, None].double(), frequencies) + frequencies).cumsum(1)[0, :, 0]
    at = is_marker.nonzero()[:, 0]
    apart = phase[at].diff(dim=0)[:, 1:]  # pairs i >= 1
    assert (apart.amax(0) - apart.amin(0)).max().item() <= 0.06
    plain = (at.diff()[:, None] * frequencies)[:, 1:]
    assert float((plain.amax(0) - plain.amin(0)).max()) >= 1


# ComplexFormer


def test_complexformer_attends_as_its_formula_says():
    model = stirred(ComplexFormer().convert(opened("llama")))
    ids = inputs_for("llama", length=14)["input_ids"]
    with torch.no_grad():
        _, q, k = before_rotation(model, ids)
        layer = model.plain.model.layers[0].self_attn.content_angles
        k, delta = k.repeat_interleave(2, 2), layer.delta.repeat_interleave(2, 0)
        (a, b), (c, d) = q.chunk(2, -1), k.chunk(2, -1)
        lengths = torch.einsum("bthr,bshr->bhtsr", a.hypot(b), c.hypot(d))
        apart = torch.atan2(b, a)[:, :, None] - torch.atan2(d, c)[:, None]  # [B, T, S, H, R]
        place = (torch.arange(14)[:, None] - torch.arange(14))[None, :, :, None, None] * 10000.0 ** (
            -torch.arange(4) / 4
        )
        angle = (delta * apart + layer.b + place).permute(0, 3, 1, 2, 4)
        wanted = softmax_of((lengths * angle.cos()).sum(-1) * 8**-0.5)
    assert (patterns(model, ids) - wanted).abs().max() < 1e-5


def test_a_head_with_delta_0_ignores_the_angle_of_the_content_and_no_other_does():
    layer = ContentAngles(FRAME)
    with torch.no_grad():
        layer.delta_less_one[0] = -1.0
        layer.delta_less_one[1] = 0.3
    q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)

    def scores(by):
        turned = []
        for x, is_query in ((q, True), (k, False)):
            x = FRAME.pairs.rotate(x, by if is_query else -by)
            turned.append(FRAME.pairs.rotate(x, layer.angle(x, is_query)))
        return torch.einsum("bthd,bshd->bhts", turned[0], turned[1].repeat_interleave(2, 2))

    moved = (scores(torch.full((4,), 0.7)) - scores(torch.zeros(4))).abs().amax((0, 2, 3))
    assert (moved[:2] < 1e-5).all() and (moved[2:] > 0.1).all()


def test_gradients_are_finite_where_a_pair_is_zero():
    layer = ContentAngles(FRAME)
    with torch.no_grad():
        layer.delta_less_one.fill_(0.4)
    q = torch.randn(1, 3, 4, 8)
    q[0, 1] = 0
    q.requires_grad_()
    FRAME.pairs.rotate(q, layer.angle(q, True)).square().sum().backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(layer.delta_less_one.grad).all()
    assert content_angle(torch.zeros(2), torch.zeros(2)).tolist() == [0, 0]


def test_complexformer_adds_a_delta_and_a_b_for_each_pair_and_no_more():
    model = opened("llama")
    new = ComplexFormer().convert(model)
    added = sum(p.numel() for p in new.plain.parameters()) - sum(p.numel() for p in model.plain.parameters())
    assert added == 3 * (4 + 2) * 4  # layers, query heads and KV heads, pairs


@pytest.mark.parametrize("method", METHODS)
def test_heads_are_swept_as_they_are_edited(method):
    model = stirred(method.convert(opened("llama")))
    ids = inputs_for("llama", length=9)["input_ids"]
    edits = [mh.Scale([head], 0.0) for head in ("L0H1", "L2H0", "L2H3")]
    swept = model.sweep(ids, edits, lambda logits: logits[:, -1].max(-1).values)
    for edit, found in zip(edits, swept, strict=True):
        with model.editing(edit):
            assert torch.allclose(model.logits(ids)[:, -1].max(-1).values, torch.tensor(found).float(), atol=1e-4)


def test_readers_see_turned_queries():
    model = ComplexFormer().convert(opened("llama"))
    ids = inputs_for("llama", length=14)["input_ids"]
    plain, turned = Keep("q"), Keep("q")
    model.look(ids, plain)
    stirred(model).look(ids, turned)
    assert torch.allclose(plain.values[0].norm(dim=-1), turned.values[0].norm(dim=-1), atol=1e-4)
    assert (plain.values[0] - turned.values[0]).abs().max() > 0.1
