"""The map of heads to weights: proved in every architecture, also under adapters and in quantised weights."""

import pytest
import torch
import transformers as tf
from architectures import EVERY, EXTRA, build, inputs_for, opened
from torch import nn

import manyheads as mh
from manyheads.errors import UnsupportedError
from manyheads.model.linear import base_of, features_of, is_plain, projection_matrix
from manyheads.model.reading.readers import ReadAttention
from manyheads.model.weights.qkv import head_weights
from manyheads.model.weights.slices import head_map
from manyheads.training.head_slices import head_slices, only_heads

NORMED = ("qwen3", "qwen3_moe", "gemma3", "olmo2", "stablelm_parallel")  # their queries and keys pass a norm
ORDERS = {  # blocks of q, k and v among the features of the one projection, written down by hand
    "gpt2": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    "modernbert": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    "mpt": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    "phi3": [[0, 1, 2, 3], [4, 5], [6, 7]],
    "falcon": [[0, 1, 2, 3], [4], [5]],
    "bloom": [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]],
    "gpt_neox": [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]],
    "falcon_alibi": [[0, 1, 2, 3], [4], [5]],
    "falcon_gqa": [[0, 1, 4, 5], [2, 6], [3, 7]],
}


@pytest.mark.parametrize("name", [*EVERY, *EXTRA])
def test_the_features_of_every_head_are_known_in_every_architecture(name):
    model = opened(name)
    for layer, found in head_map(model).items():
        parts = (found.query, found.key, found.value)
        assert found.parts == (*parts, found.output)
        if name in ORDERS:
            assert len({part.module for part in parts}) == 1
            assert [part.index[:, 0].div(model.head_dim).tolist() for part in parts] == ORDERS[name]
        else:
            names = {module: name for name, module in model.layout.blocks[layer].attention.named_modules()}
            own = [names[part.module].split(".")[-1].removesuffix("_proj")[0] for part in parts]
            assert own == ["q", "k", "v"]
            assert all(torch.equal(part.index.flatten(), torch.arange(part.index.numel())) for part in parts)
        assert found.output.module is model.layout.blocks[layer].projection
        assert torch.equal(found.output.matrices(), model.W_O(layer))


@pytest.mark.parametrize("name", [*EVERY, *EXTRA])
def test_the_matrices_are_those_that_attention_is_measured_to_read_by(name):
    """Values to the number, queries and keys up to a factor: OPT scales its queries in place, YaRN (GPT-OSS) both."""
    model = opened(name)
    measured = head_weights(model, fold=False)
    for layer, found in head_map(model).items():
        value, query, key = (
            part.matrices().repeat_interleave(model.n_heads // len(part.index), 0)
            for part in (found.value, found.query, found.key)
        )
        assert torch.allclose(value, measured[layer].W_V, atol=1e-5)
        for own, matrix in ((query, measured[layer].W_Q), (key, measured[layer].W_K)) if name not in NORMED else ():
            assert torch.allclose(own / own.norm(), matrix / matrix.norm(), atol=1e-5)


def small(name, **config):
    torch.manual_seed(0)
    common = dict(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**common, **config)).eval()


def test_orders_that_nobody_wrote_down_are_found_too():
    """CodeGen keeps q, v and k of a head beside each other, in this order."""
    model = mh.open_model(small("CodeGen", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4))
    for found in head_map(model).values():
        blocks = [part.index[:, 0].div(8).tolist() for part in (found.query, found.key, found.value)]
        assert blocks == [[0, 3, 6, 9], [2, 5, 8, 11], [1, 4, 7, 10]]


def test_attention_that_keeps_rows_and_heads_in_one_dimension_is_read_and_its_heads_are_known():
    """XGLM's products and softmax are of `[B * H, T, S]`."""
    model = mh.open_model(small("XGLM", d_model=32, num_layers=2, attention_heads=4, ffn_dim=48))
    ids, seen = inputs_for("llama")["input_ids"], {}
    model.look(ids, ReadAttention(lambda call: seen.__setitem__(call.layer, call)))
    z, keys = model.read_z(ids), model.read_site(ids, "k")
    for layer, call in seen.items():
        assert torch.allclose(call.pattern.sum(-1), torch.ones(3, 4, 11), atol=1e-5)
        assert torch.allclose((call.pattern @ call.value).transpose(1, 2), z[layer], atol=1e-5)
        assert torch.equal(keys[layer].transpose(1, 2), call.key)
        assert torch.equal(head_map(model)[layer].key.index.flatten(), torch.arange(32))
    with model.editing(mh.Mask(["L1H2"], 0)):
        pattern = {}
        model.look(ids, ReadAttention(lambda call: pattern.__setitem__(call.layer, call.pattern)))
    assert pattern[1][:, 2, 1:, 0].max() < 1e-6 < pattern[1][:, 1, 1:, 0].min()


def test_one_pass_proves_the_layers_that_are_asked_for_and_leaves_nothing_behind():
    model, inputs = opened("qwen3"), inputs_for("qwen3")
    before, calls = model.logits(inputs), []
    counting = model.layout.blocks[0].module.register_forward_hook(lambda *_: calls.append(1))
    above = model.layout.blocks[2].module.register_forward_hook(lambda *_: calls.append("above"))
    assert list(head_map(model, [1])) == [1] and calls == [1]
    counting.remove()
    above.remove()
    assert torch.equal(model.logits(inputs), before)


def test_sinks_and_norms_over_all_heads_are_vectors_of_heads():
    sinks = head_map(opened("gpt_oss"))[1].vectors
    assert [(v.name, v.of_query, v.index.tolist()) for v in sinks] == [("sinks", True, [[0], [1], [2], [3]])]
    attention = opened("olmo2").layout.blocks[1].attention
    norms = {v.module: v for v in head_map(opened("olmo2"))[1].vectors}
    assert set(norms) == {attention.q_norm, attention.k_norm}
    assert norms[attention.q_norm].of_query and norms[attention.q_norm].index.shape == (4, 8)
    assert not norms[attention.k_norm].of_query and norms[attention.k_norm].index.tolist()[1] == list(range(8, 16))
    assert all(head_map(opened(name))[0].vectors == () for name in ("llama", "qwen3", "bert", "stablelm_parallel"))


class Mixed(nn.Module):
    """Hands every head a part of its neighbour's query."""

    def forward(self, x):
        return x + 0.3 * x.roll(1, -2)


def test_features_that_are_more_than_one_heads_are_refused():
    model = mh.open_model(build("qwen3"))
    model.layout.blocks[1].attention.q_norm = Mixed()
    assert list(head_map(model, [0, 2])) == [0, 2]
    with pytest.raises(UnsupportedError, match="in layer 1 does not reach just one head's query"):
        head_map(model)


def test_queries_keys_and_values_made_by_the_wrong_modules_are_found_by_what_they_do():
    """Names are not believed: with its two projections exchanged, what is called k_proj makes the values."""
    module = build("llama")
    for layer in module.model.layers:
        attention = layer.self_attn
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    attention = mh.open_model(module).layout.blocks[0].attention
    forward = type(attention).forward

    def exchanged(*args, **kwargs):
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
        try:
            return forward(attention, *args, **kwargs)
        finally:
            attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj

    attention.forward = exchanged
    found = head_map(mh.open_model(module), [0])[0]
    assert found.key.module is attention.v_proj and found.value.module is attention.k_proj


class LowRank(nn.Module):
    """An adapter as PEFT makes them: around a projection, which it keeps as `base_layer`."""

    def __init__(self, base_layer, seed, rank=2):
        super().__init__()
        self.base_layer = base_layer
        read, made = features_of(base_layer)
        drawn = torch.randn(read + made, rank, generator=torch.Generator().manual_seed(seed)) * 0.3
        self.a, self.b = nn.Linear(read, rank, bias=False), nn.Linear(rank, made, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.a.weight.data, self.b.weight.data = drawn[:read].T.clone(), drawn[read:].clone()

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(self.dropout(x)))

    def effective(self):
        return projection_matrix(self.base_layer) + self.a.weight.T @ self.b.weight.T


class Int8(nn.Module):
    """A projection in eight bits, as quantisers make them: the weight is no matrix in floating point."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)

    def effective(self):
        return (self.weight * self.scale).T


def changed(name, make):
    """The named model with every projection of its attention replaced by `make(projection, seed)`."""
    module = build(name)
    for parent in [m for m in module.modules() if "Attention" in type(m).__name__]:
        for child, part in list(parent.named_children()):
            if features_of(part):
                setattr(parent, child, make(part, len(child)))
    return mh.open_model(module.eval())


OTHER = {"adapter": LowRank, "int8": lambda part, seed: Int8(part)}


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "opt"])
def test_under_adapters_and_in_quantised_weights_the_map_is_the_same_and_matrices_are_what_modules_do(name, kind):
    if name == "gpt2" and kind == "int8":
        return  # quantisers know nn.Linear
    model, plain = changed(name, OTHER[kind]), head_map(opened(name))
    for layer, found in head_map(model).items():
        for part, before in zip(found.parts, plain[layer].parts, strict=True):
            assert isinstance(part.module, LowRank if kind == "adapter" else Int8)
            assert torch.equal(part.index, before.index) and part.dim == before.dim
            assert part.holder is base_of(part.module)
            own = part.module.effective()
            by_head = own[part.index] if part.read else own[:, part.index].transpose(0, 1)
            assert torch.allclose(part.matrices(), by_head, atol=1e-5)
        training = [m.training for m in found.output.module.modules()]
        found.output.module.train()
        assert torch.allclose(found.output.matrices(), model.W_O(layer), atol=1e-6), "no dropout while it is measured"
        assert all(m.training for m in found.output.module.modules())
        for part, was in zip(found.output.module.modules(), training, strict=True):
            part.training = was


@pytest.mark.parametrize("kind", OTHER)
def test_heads_of_adapted_and_quantised_models_are_read_and_edited_and_their_writes_sum(kind):
    model, inputs, written = changed("llama", OTHER[kind]), inputs_for("llama"), {}
    for layer, block in enumerate(model.layout.blocks):
        block.projection.register_forward_hook(lambda m, a, out, layer=layer: written.__setitem__(layer, out))
    z = model.read_z(inputs)
    for layer, out in written.items():
        total = torch.einsum("bthd,hde->bte", z[layer], model.W_O(layer))
        assert torch.allclose(total, out, atol=1e-5)
    with model.editing(mh.Scale(["L1H2"], 0.0)):
        assert not torch.equal(model.read_z(inputs)[1], z[1])


@pytest.mark.parametrize(
    ("kind", "reason"), [("adapter", "adapters that cannot be merged"), ("int8", "with weights in torch.int8")]
)
def test_what_would_rewrite_adapted_or_quantised_weights_is_refused_by_name(kind, reason):
    model = changed("llama", OTHER[kind])
    with pytest.raises(UnsupportedError, match=reason):
        model.bake(mh.Scale(["L0H0"], 0.0))
    with pytest.raises(UnsupportedError, match=reason):
        model.prune([(layer, h) for layer in range(3) for h in (2, 3)])


def test_slices_are_trained_under_an_adapter_and_refused_in_eight_bits():
    model, inputs = changed("llama", LowRank), inputs_for("llama")
    before = {name: p.detach().clone() for name, p in model.plain.named_parameters()}
    with only_heads(model, ["L1H2"]) as parameters:
        model.plain(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    moved = {name for name, p in model.plain.named_parameters() if not torch.equal(before[name], p)}
    own = "model.layers.1.self_attn.{}_proj.base_layer.weight"
    assert moved == {own.format(part) for part in "qkvo"}
    rows = (model.plain.get_parameter(own.format("q")) != before[own.format("q")]).any(1).nonzero().flatten()
    assert rows.tolist() == list(range(16, 24))
    with pytest.raises(UnsupportedError, match="not in floating point"):
        head_slices(changed("llama", OTHER["int8"]), ["L1H2"])


def test_a_plain_matrix_is_a_view_of_the_weight_and_no_other_is():
    linear = nn.Linear(3, 3)
    assert is_plain(linear) and projection_matrix(linear).data_ptr() == linear.weight.data_ptr()
    assert not is_plain(LowRank(linear, 0)) and not is_plain(Int8(linear)) and features_of(nn.LayerNorm(3)) is None
    if hasattr(torch, "float8_e4m3fn"):
        linear.weight.data = linear.weight.data.to(torch.float8_e4m3fn)
        assert not is_plain(linear), "eight-bit floats come with scales"
