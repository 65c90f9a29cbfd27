"""Split passes: the parts sum to the model's own logits, and are those of the rules written out by hand for b and g."""

from functools import cache

import pytest
import torch
import transformers as tf
from architectures import build, inputs_for, opened, padded
from torch import nn

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.trace.contextual.splitting import Parts, Split, Splitter, signed

READABLE = [
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "opt",
    "olmo2",
    "granite",
]
READABLE += ["stablelm", "stablelm_parallel", "llama_bias", "bert", "roberta", "modernbert"]
VARIANTS = [(attention, signs) for attention in ("own", "total") for signs in (True, False)]
BY_HAND = ("llama", "gpt2", "bert")


@cache
def precise(name):
    return mh.open_model(build(name).double())


def choices(ids):
    """Nothing, one column, half of the columns, everything."""
    chosen = torch.zeros(4, *ids.shape, dtype=torch.bool)
    chosen[1, :, 3], chosen[2, :, ::2], chosen[3] = True, True, True
    return chosen


def sources(model, ids):
    recording = model.record(ids)
    mean = model.mean_z(inputs_for("llama", seed=9), by_position=True)
    return recording, [(0, 1), (0, 3), (1, 0), (2, 2)], mean


# The whole: total, nothing, everything


@pytest.mark.parametrize(("attention", "signs"), VARIANTS)
@pytest.mark.parametrize("name", READABLE)
def test_the_parts_sum_to_the_models_own_logits(name, attention, signs):
    model, inputs = opened(name), inputs_for(name)
    splitter, wanted = Splitter(model, attention, signs), model.logits(inputs)
    by_tokens = splitter.tokens(inputs, choices(inputs["input_ids"]))
    by_heads = splitter.heads(*sources(model, inputs))
    for split in (by_tokens, by_heads):
        assert (split.relevant + split.irrelevant - wanted).abs().max() <= 1e-4
        assert split.relevant[1].abs().max() > 1e-2
    assert by_tokens.relevant[0].abs().max() <= 1e-5
    assert (
        by_tokens.relevant[3] - wanted
    ).abs().max() <= 3e-2  # rounding shares out biases too; sharp in double, below


@pytest.mark.parametrize("name", BY_HAND)
def test_in_double_precision_to_1e_9(name):
    model, inputs = precise(name), inputs_for(name)
    wanted = model.logits(inputs)
    for attention, signs in VARIANTS:
        splitter = Splitter(model, attention, signs)
        for split in (splitter.tokens(inputs, choices(inputs["input_ids"])), splitter.heads(*sources(model, inputs))):
            assert (split.relevant + split.irrelevant - wanted).abs().max() <= 1e-9
        everything = splitter.tokens(inputs, choices(inputs["input_ids"])).relevant[3]
        assert (everything - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_part(side):
    model, batch = opened("llama"), padded("llama", side)
    splitter, n = Splitter(model), batch["input_ids"].shape[1]
    row = slice(5, n) if side == "left" else slice(0, n - 5)
    chosen = torch.zeros(1, 3, n, dtype=torch.bool)
    chosen[0, :, row.start + 1] = True
    alone = splitter.tokens(batch["input_ids"][2:, row], chosen[:, 2:, row])
    together = splitter.tokens(batch, chosen)
    assert torch.allclose(together.relevant[:, 2:, row], alone.relevant, atol=1e-4)


# The parts: against b and g written out


class ByHand:
    """The rules on pairs (b, g), for the weights of a tiny Llama, GPT-2 or BERT. Nothing is shared with what is tested."""

    def __init__(self, model, attention, signs, mask):
        self.model, self.attention, self.signs, self.mask, self.heads = model, attention, signs, mask, 4

    def shared(self, b, g, c):
        size = b.abs() + g.abs() + 1e-300
        return c * b.abs() / size, c * g.abs() / size

    def linear(self, b, g, weight, bias=None):
        b, g = b @ weight, g @ weight
        if bias is None:
            return b, g
        to_b, to_g = self.shared(b, g, bias)
        return b + to_b, g + to_g

    def dense(self, b, g, module):
        return self.linear(b, g, module.weight.T if isinstance(module, nn.Linear) else module.weight, module.bias)

    def norm(self, b, g, module):
        if isinstance(module, nn.LayerNorm):
            sigma = ((b + g).var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
            to_b, to_g = self.shared(b, g, module.bias)
            b, g = b - b.mean(-1, keepdim=True), g - g.mean(-1, keepdim=True)
            return b / sigma * module.weight + to_b, g / sigma * module.weight + to_g
        sigma = ((b + g).square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return b / sigma * module.weight, g / sigma * module.weight

    def act(self, b, g, act):
        return act(b + g) - act(g), act(g)

    def sign(self, b, g):
        if not self.signs:
            return b, g
        fight, b_wins = b * g < 0, b.abs() > g.abs()
        return torch.where(fight, (b + g) * b_wins, b), torch.where(fight, (b + g) * ~b_wins, g)

    def attend(self, q, k, v):
        def pattern(query, key):
            return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + self.mask).softmax(-1)

        whole = pattern(q[0] + q[1], k[0] + k[1])
        b = (pattern(q[0], k[0]) if self.attention == "own" else whole) @ v[0]
        g = whole @ (v[0] + v[1]) - b
        return tuple(part.transpose(1, 2).flatten(-2) for part in (b, g))

    def split_heads(self, parts, n=4):
        return tuple(part.unflatten(-1, (n, -1)).transpose(1, 2) for part in parts)

    def llama(self, b, g):
        trunk = self.model.model
        cos, sin = trunk.rotary_emb(b, torch.arange(b.shape[1])[None])

        def rotated(parts):
            return tuple(p * cos + torch.cat((-p[..., 4:], p[..., :4]), -1) * sin for p in parts)

        for block in trunk.layers:
            x, attn = self.norm(b, g, block.input_layernorm), block.self_attn
            q = rotated(self.split_heads(self.dense(*x, attn.q_proj)))
            k, v = (self.split_heads(self.dense(*x, m), 2) for m in (attn.k_proj, attn.v_proj))
            k, v = (tuple(p.repeat_interleave(2, 1) for p in parts) for parts in (rotated(k), v))
            z = self.dense(*self.attend(q, k, v), attn.o_proj)
            b, g = b + z[0], g + z[1]
            x = self.norm(b, g, block.post_attention_layernorm)
            gate = self.act(*self.sign(*self.dense(*x, block.mlp.gate_proj)), nn.functional.silu)
            up = self.sign(*self.dense(*x, block.mlp.up_proj))
            total = sum(gate) * sum(up)
            x = self.sign(*self.dense(total - gate[1] * up[1], gate[1] * up[1], block.mlp.down_proj))
            b, g = self.sign(b + x[0], g + x[1])
        return self.dense(*self.norm(b, g, trunk.norm), self.model.lm_head)

    def gpt2(self, b, g):
        trunk = self.model.transformer
        for block in trunk.h:
            qkv = self.dense(*self.norm(b, g, block.ln_1), block.attn.c_attn)
            q, k, v = (self.split_heads([part[..., i : i + 32] for part in qkv]) for i in (0, 32, 64))
            z = self.dense(*self.attend(q, k, v), block.attn.c_proj)
            b, g = b + z[0], g + z[1]
            x = self.sign(*self.dense(*self.norm(b, g, block.ln_2), block.mlp.c_fc))
            x = self.sign(*self.dense(*self.act(*x, block.mlp.act), block.mlp.c_proj))
            b, g = self.sign(b + x[0], g + x[1])
        return self.linear(*self.norm(b, g, trunk.ln_f), self.model.lm_head.weight.T)

    def bert(self, b, g):
        for block in self.model.bert.encoder.layer:
            attn = block.attention
            q, k, v = (self.split_heads(self.dense(b, g, m)) for m in (attn.self.query, attn.self.key, attn.self.value))
            z = self.dense(*self.attend(q, k, v), attn.output.dense)
            b, g = self.norm(b + z[0], g + z[1], attn.output.LayerNorm)
            x = self.act(*self.sign(*self.dense(b, g, block.intermediate.dense)), nn.functional.gelu)
            x = self.sign(*self.dense(*x, block.output.dense))
            b, g = self.sign(*self.norm(b + x[0], g + x[1], block.output.LayerNorm))
        head = self.model.cls.predictions
        x = self.act(*self.dense(b, g, head.transform.dense), nn.functional.gelu)
        return self.dense(*self.norm(*x, head.transform.LayerNorm), head.decoder)


@pytest.mark.parametrize(("attention", "signs"), VARIANTS)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_parts_are_those_of_the_rules_written_out_for_b_and_g(name, attention, signs):
    model, inputs = precise(name), inputs_for(name)
    chosen = choices(inputs["input_ids"])[1:3]
    split = Splitter(model, attention, signs).tokens(inputs, chosen)
    embedded = model.read_site(inputs, "resid")[0]
    mask = torch.full((11, 11), -torch.inf, dtype=torch.float64).triu(1) if name != "bert" else torch.zeros(11, 11)
    by_hand = ByHand(model.plain, attention, signs, mask)
    for i, some in enumerate(chosen):
        with torch.no_grad():
            b, g = getattr(by_hand, name)(embedded * some[..., None], embedded * ~some[..., None])
        assert (b - split.relevant[i]).abs().max() <= 1e-6 and (g - split.irrelevant[i]).abs().max() <= 1e-6
        assert (b + g - model.logits(inputs)).abs().max() <= 1e-6
        assert b.abs().max() > 0.1 and g.abs().max() > 0.1


# Each rule by itself


def both(x, b):
    return Split.joined(x, b)


def test_a_matrix_shares_its_bias_by_the_sizes_of_the_parts():
    torch.manual_seed(0)
    layer, t, b = (
        nn.Linear(5, 7).double().requires_grad_(False),
        torch.randn(3, 5).double(),
        torch.randn(2, 3, 5).double(),
    )
    split = layer(both(t, b)).parts
    bw, gw = b @ layer.weight.T, (t - b) @ layer.weight.T
    assert torch.allclose(split.relevant, bw + layer.bias * bw.abs() / (bw.abs() + gw.abs()), atol=1e-6)
    assert torch.allclose(split.total, layer(t))
    conv = tf.pytorch_utils.Conv1D(7, 5).double().requires_grad_(False)
    conv.weight.data, conv.bias.data = layer.weight.data.T, layer.bias.data
    assert torch.allclose(conv(both(t, b)).parts.relevant, split.relevant)


def test_products_activations_and_constants_follow_their_rules():
    torch.manual_seed(0)
    t, u, b, c = torch.randn(3, 5), torch.randn(3, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.allclose((both(t, b) * both(u, c)).parts.relevant, t * u - (t - b) * (u - c))
    assert torch.allclose((both(t, b) + both(u, c)).parts.relevant, b + c)
    assert torch.allclose((both(t, b) - both(u, c)).parts.relevant, b - c)
    assert torch.allclose((both(t, b) * u.repeat(3, 1)).parts.relevant, b * u)
    assert torch.allclose(
        nn.functional.gelu(both(t, b)).parts.relevant, nn.functional.gelu(t) - nn.functional.gelu(t - b)
    )
    moved = (both(t, b) + 2.0).parts
    assert torch.allclose(moved.relevant, b + 2 * b.abs() / (b.abs() + (t - b).abs())) and torch.allclose(
        moved.total, t + 2
    )
    assert torch.allclose((1 - both(t, b)).parts.total, 1 - t)


def test_where_signs_differ_the_larger_part_takes_all():
    torch.manual_seed(0)
    b, g = torch.randn(2, 200, 5).double(), torch.randn(200, 5).double()
    for i in range(2):
        split = signed(both(b[i] + g, b[i][None])).parts
        wanted = torch.where(b[i] * g >= 0, b[i], torch.where(b[i].abs() > g.abs(), b[i] + g, 0))
        assert torch.allclose(split.relevant[0], wanted) and torch.equal(split.total, b[i] + g)


def test_parts_sum_to_the_total():
    assert torch.equal(Parts(torch.ones(2), torch.full((3, 2), 0.25)).irrelevant, torch.full((3, 2), 0.75))


# Heads


def test_a_head_of_the_last_layer_reaches_the_logits_through_matrix_norm_and_unembedding_alone():
    module = build("llama").double()
    with torch.no_grad():
        module.model.layers[-1].mlp.down_proj.weight.zero_()
    model = mh.open_model(module)
    ids = inputs_for("llama")["input_ids"]
    recording, _, mean = sources(model, ids)
    split = Splitter(model).heads(recording, [(2, 1), (2, 3)], mean)
    final = model.plain.model.norm
    sigma = (recording.outputs[-1].square().mean(-1, keepdim=True) + final.variance_epsilon).sqrt()
    for i, h in enumerate((1, 3)):
        write = (recording.z[2][:, :, h] - mean[2, :, h]) @ model.W_O(2)[h]
        direct = write / sigma * final.weight @ model.plain.lm_head.weight.T
        assert torch.allclose(split.relevant[i], direct, atol=1e-5)  # a Llama norms in single precision


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_sources_do_not_touch_each_other_and_layers_below_may_be_replayed(name):
    model, inputs = precise(name), inputs_for(name)
    recording, heads, mean = sources(model, inputs)
    splitter = Splitter(model)
    together = splitter.heads(recording, heads, mean)
    for i, head in enumerate(heads):
        assert torch.allclose(splitter.heads(recording, [head], mean).relevant[0], together.relevant[i], atol=1e-6)
    last = splitter.heads(recording, heads, mean, keep=1)
    assert torch.allclose(last.relevant, together.relevant[:, :, -1:], atol=1e-6)
    assert torch.allclose(last.total, together.total[:, -1:], atol=1e-6)


def test_a_source_at_its_mean_does_nothing_and_readers_see_its_part():
    model, inputs = opened("gpt2"), inputs_for("gpt2", batch=1)
    recording, seen = model.record(inputs), {}
    z = torch.stack(recording.z)
    nothing = Splitter(model).heads(recording, [(1, 2)], z[:, 0], read=lambda layer, parts: seen.update({layer: parts}))
    assert nothing.relevant.abs().max() <= 1e-5 and sorted(seen) == [1, 2]
    assert all((parts.total - z[layer]).abs().max() < 1e-5 for layer, parts in seen.items())
    Splitter(model).heads(recording, [(1, 2)], 0 * z[:, 0], read=lambda layer, parts: seen.update({layer: parts}))
    assert (
        torch.allclose(seen[1].relevant[0, :, :, 2], z[1][:, :, 2])
        and seen[1].relevant[0, :, :, [0, 1, 3]].abs().max() == 0
    )
    assert seen[2].relevant.abs().max() > 1e-3


def test_classifiers_and_vision_models_are_split_too():
    config = tf.BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    torch.manual_seed(0)
    module = tf.BertForSequenceClassification(config).eval()
    for parameter in module.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model = mh.open_model(module)
    ids = inputs_for("bert")["input_ids"]
    split = Splitter(model).tokens(ids, choices(ids))
    assert split.total.shape == (3, 3) and (split.total - model.logits(ids)).abs().max() <= 1e-5
    assert split.relevant[0].abs().max() == 0 and split.relevant[1].abs().max() > 1e-3
    model, pixels = opened("vit"), inputs_for("vit")
    patches = torch.zeros(1, 3, 17, dtype=torch.bool)
    patches[..., 5] = True
    split = Splitter(model).tokens(pixels, patches)
    assert (split.total - model.logits(pixels)).abs().max() <= 1e-4 and split.relevant.abs().max() > 1e-3


# What cannot be split


@pytest.mark.parametrize(
    ("name", "what"), [("mixtral", "softmax"), ("gpt_oss", "topk"), ("bloom", "attention by itself")]
)
def test_what_has_no_rule_is_refused_by_name(name, what):
    model = opened(name)
    ids = inputs_for(name)["input_ids"]
    with pytest.raises(UnsupportedError, match=what):
        Splitter(model).tokens(ids, choices(ids))
    assert torch.isfinite(model.logits(ids)).all()


def test_a_split_tensor_keeps_its_parts_together():
    x = both(torch.randn(3, 4, 5), torch.randn(2, 3, 4, 5))
    assert x.shape == (9, 4, 5) and x.transpose(1, 2).parts.relevant.shape == (2, 3, 5, 4)
    refused = {
        "torn": lambda: x[0],
        "permute": lambda: x.permute(1, 0, 2),
        "transpose": lambda: x.transpose(0, 1),
        "cat": lambda: torch.cat([x, x]),
        "dividing": lambda: 1 / x,
        "product of two": lambda: x @ x.transpose(1, 2),
        "training": lambda: nn.functional.dropout(x, 0.1, training=True),
        "max": lambda: x.max(),
        "attribute": lambda: x.mT,
    }
    for _, function in refused.items():
        with pytest.raises(UnsupportedError):
            function()
    assert torch.cat([x, x], -1).parts.total.shape == (3, 4, 10) and len(x.chunk(2, dim=1)) == 2


def test_what_does_not_fit_is_refused():
    model, ids = opened("llama"), inputs_for("llama")["input_ids"]
    recording, _, mean = sources(model, ids)
    with pytest.raises(InputError, match="attention is"):
        Splitter(model, attention="mixed")
    with pytest.raises(InputError, match=r"\[n, 3, T\]"):
        Splitter(model).tokens(ids, torch.ones(1, 2, 11, dtype=torch.bool))
    with pytest.raises(InputError, match="9 columns"):
        Splitter(model).tokens(ids, torch.ones(1, 3, 9, dtype=torch.bool))
    with pytest.raises(InputError, match="mean of shape"):
        Splitter(model).heads(recording, [(0, 0)], mean[:, :4])
    with pytest.raises(InputError, match="out of range"):
        Splitter(model).heads(recording, [(7, 0)], mean)
    with model.editing(mh.Scale([(1, 1)], 0.5)), pytest.raises(UnsupportedError):
        Splitter(model).tokens(ids, choices(ids))
    assert torch.equal(model.logits(ids), recording.logits)
