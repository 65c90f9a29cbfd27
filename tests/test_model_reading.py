"""What is read off an unmodified model, on every supported architecture."""

import pytest
import torch
from architectures import DECODERS, ENCODERS, EVERY, EXTRA, inputs_for, opened, padded, shared

from manyheads.model.editing.edits import Swap
from manyheads.model.linear import projection_matrix
from manyheads.model.reading.readers import Keep, KeepGraph, ReadAttention, Reader

ALL = [*EVERY, *EXTRA]
TEXT = [*DECODERS, *ENCODERS, *EXTRA]


def plain_logits(name, inputs):
    with torch.no_grad():
        return shared(name)(**inputs).logits


@pytest.mark.parametrize("name", ALL)
def test_with_nothing_active_logits_are_bitwise_those_of_the_plain_model(name):
    inputs = inputs_for(name)
    before, hooks = plain_logits(name, inputs), hooked(name)
    model = opened(name)
    assert torch.equal(model.logits(inputs), before)
    model.read(inputs, Keep("z"), ReadAttention(lambda call: call.pattern))
    assert torch.equal(model.logits(inputs), before)
    assert torch.equal(plain_logits(name, inputs), before)
    assert hooked(name) == hooks


def hooked(name):
    """Every module's hooks. (Transformers leaves some of its own in place.)"""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in shared(name).modules()]


@pytest.mark.parametrize("name", ALL)
def test_head_writes_sum_to_the_attention_output(name):
    model, inputs, seen = opened(name), inputs_for(name), {}
    handles = [
        block.projection.register_forward_hook(lambda m, a, out, layer=layer: seen.__setitem__(layer, out))
        for layer, block in enumerate(model.layout.blocks)
    ]
    z = model.read_z(inputs)
    for handle in handles:
        handle.remove()
    for layer in range(model.n_layers):
        by_head = torch.einsum("bthd,hde->bthe", z[layer], model.W_O(layer))
        total = by_head.sum(2) + (0 if model.bias_O(layer) is None else model.bias_O(layer))
        assert (total - seen[layer]).norm() / seen[layer].norm() <= 1e-5


def check_patterns(name, inputs):
    """Rows sum to one (with a sink: at most one), respect the mask, and `pattern @ v` is z."""
    model, calls = opened(name), {}
    model.read(inputs, ReadAttention(lambda c: calls.__setitem__(c.layer, (c.pattern, c.value, c.allowed))))
    z = model.read_z(inputs)  # in a pass of its own, with the architecture's own kernel
    real = inputs.get("attention_mask")
    for layer, (pattern, value, allowed) in calls.items():
        has_sink = hasattr(model.layout.blocks[layer].core, "sinks")
        rows = pattern.sum(-1)
        assert (rows <= 1 + 1e-5).all() if has_sink else torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
        values = value.repeat_interleave(model.n_heads // value.shape[1], 1)
        product = (pattern @ values).transpose(1, 2)
        widened = name == "falcon_gqa"  # which gives each query head its keys and values itself
        assert value.shape[1] == (model.n_heads if widened else model.n_kv_heads)
        if real is not None:
            keep = real.bool()
            assert (product - z[layer])[keep].norm() / z[layer][keep].norm() <= 1e-5
            on_padding = pattern.masked_fill(real.bool()[:, None, None, :], 0).sum(-1)
            assert on_padding.transpose(1, 2)[keep].max() <= 1e-6
            assert (pattern > 1e-9).transpose(1, 2)[keep].logical_and(~allowed.transpose(1, 2)[keep]).sum() == 0
        else:
            assert (product - z[layer]).norm() / z[layer].norm() <= 1e-5
            assert not ((pattern > 1e-9) & ~allowed).any()


@pytest.mark.parametrize("name", ALL)
def test_patterns_sum_to_one_and_give_z(name):
    check_patterns(name, inputs_for(name))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_patterns_give_z_in_padded_batches(name, side):
    check_patterns(name, opened(name).inputs(padded(name, side)))


@pytest.mark.parametrize("name", [*DECODERS, *EXTRA])
def test_left_padding_does_not_change_the_last_logits(name):
    inputs = padded(name, "left")
    batch = opened(name).logits(inputs)[:, -1]
    for row in range(3):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert torch.allclose(opened(name).logits(ids)[0, -1], batch[row], atol=2e-4)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "gpt_oss", "bloom", "mpt", "falcon", "falcon_alibi", "bert"]
)
def test_some_rows_of_a_pattern_are_those_of_the_whole(name):
    inputs, differences = inputs_for(name), []

    def compare(call):
        rows = call.pattern_rows(slice(3, 6))
        assert call._pattern is None or name in ("bloom", "mpt")
        differences.append((rows - call.pattern[:, :, 3:6]).abs().max())

    opened(name).read(inputs, ReadAttention(compare))
    assert len(differences) == 3 and max(differences) <= 1e-6


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "granite", "falcon", "opt", "gpt_neox", "gpt_oss", "vit", "dinov2"]
)
def test_residual_stream_is_the_sum_of_what_was_written(name):
    model, inputs = opened(name), inputs_for(name)
    resid = model.read_site(inputs, "resid")
    writes = model.read_site(inputs, "attention_write") + model.read_site(inputs, "mlp_write")
    assert len(resid) == model.n_layers + 1
    assert torch.allclose(resid[0] + writes.sum(0), resid[-1], atol=1e-4)


def test_no_pattern_is_computed_when_nobody_looks_at_one():
    computed = []
    opened("llama").read(inputs_for("llama"), ReadAttention(lambda call: computed.append(call._pattern)))
    assert computed == [None] * 3


def test_readers_see_what_edits_left_and_only_the_layers_they_want():
    import manyheads as mh

    keep = Keep("z", layers=[1])
    model = opened("llama")
    with model.reading(keep), model.editing(mh.Ablate(["L1H2"])):  # the edit is entered later, and still comes first
        model.logits(inputs_for("llama"))
    assert list(keep.values) == [1]
    assert keep.values[1][:, :, 2].abs().max() == 0 < keep.values[1][:, :, 1].abs().max()


def test_a_reader_that_reads_nothing_says_so():
    with pytest.raises(TypeError, match="no read method of its own"):
        opened("llama").read(inputs_for("llama"), Reader())


def test_output_projection_is_read_the_same_way_from_linear_and_conv1d():
    for name in ("gpt2", "llama"):
        projection = opened(name).layout.blocks[0].projection
        x = torch.randn(5, projection_matrix(projection).shape[0])
        bias = getattr(projection, "bias", None)
        assert torch.allclose(
            projection(x), x @ projection_matrix(projection) + (0 if bias is None else bias), atol=1e-5
        )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("site", ["attention", "q", "v", "z", "resid", "mlp_write"])
def test_looking_shows_what_reading_does_and_runs_nothing_above(name, site):
    model, inputs, above = opened(name), inputs_for(name), []
    whole, looked = {}, {}
    if site == "attention":
        reading = ReadAttention(lambda call: whole.update({call.layer: call.pattern}))
        looking = ReadAttention(lambda call: looked.update({call.layer: call.pattern}), layers=[0])
    else:
        reading, looking = Keep(site, values=whole), Keep(site, layers=[0], values=looked)
    ran = model.layout.blocks[1].module.register_forward_hook(lambda *_: above.append(1))
    model.look(inputs, looking)
    assert not above
    ran.remove()
    model.read(inputs, reading)
    assert torch.equal(looked[0], whole[0])


def test_looking_at_the_last_residual_stream_runs_every_layer():
    model, keep = opened("llama"), Keep("resid", layers=[opened("llama").n_layers])
    model.look(inputs_for("llama"), keep)
    assert list(keep.values) == [model.n_layers]


def by_hand(name, model, inputs):
    """q, k and v of layer 1 as its own modules make them: projections cut by hand, rotary embedding applied by Transformers."""
    block = model.layout.blocks[1]
    attention, width = block.attention, model.head_dim
    seen = {}
    fused = {"gpt2": "c_attn", "bloom": "query_key_value", "falcon_gqa": "query_key_value"}.get(name)
    names = [fused] if fused else ["q_proj", "k_proj", "v_proj"]
    handles = [
        getattr(attention, n).register_forward_hook(lambda m, a, out, n=n: seen.__setitem__(n, out)) for n in names
    ]
    model.logits(inputs)
    for handle in handles:
        handle.remove()
    if name == "llama":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k, v = (seen[n].unflatten(-1, (-1, width)) for n in names)
        cos, sin = model.plain.model.rotary_emb(v, torch.arange(q.shape[1])[None])
        q, k = (part.transpose(1, 2) for part in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
        return q, k, v
    blocks = seen[fused].unflatten(-1, (-1, width))
    if name == "gpt2":
        return blocks.split(model.n_heads, -2)
    if name == "bloom":  # q, k, v of a head beside each other
        return blocks[..., 0::3, :], blocks[..., 1::3, :], blocks[..., 2::3, :]
    groups = blocks.unflatten(-2, (model.n_kv_heads, -1))  # Falcon: a group's queries, its key, its value
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    q, k, v = groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :]
    cos, sin = model.plain.transformer.rotary_emb(v, torch.arange(q.shape[1])[None])
    q, k = (part.transpose(1, 2) for part in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
    return q, k, v


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon_gqa"])
def test_queries_keys_and_values_are_read_as_attention_uses_them(name):
    """With Transformers' attention interface and without it; keys and values a KV head."""
    model, inputs = opened(name), inputs_for(name)
    before = model.logits(inputs)
    wanted = by_hand(name, model, inputs)
    keeps = [Keep(site) for site in ("q", "k", "v")]
    with model.reading(*keeps):
        assert (model.logits(inputs) - before).abs().max() <= 1e-5
    for keep, part, heads in zip(keeps, wanted, (model.n_heads, model.n_kv_heads, model.n_kv_heads), strict=True):
        assert list(keep.values) == list(range(model.n_layers))
        assert keep.values[1].shape == (3, 11, heads, model.head_dim)
        assert torch.allclose(keep.values[1], part, atol=1e-6), keep.site
        assert torch.equal(model.read_site(inputs, keep.site)[1], keep.values[1])
    assert torch.equal(model.logits(inputs), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_with_a_cache_keys_and_values_of_every_token_so_far_are_read(name):
    model, ids = opened(name), inputs_for(name)["input_ids"]
    whole = {site: model.read_site(ids, site) for site in ("q", "k", "v")}
    keeps = {site: Keep(site) for site in whole}
    past = model(ids[:, :6], use_cache=True).past_key_values
    with model.reading(*keeps.values()), torch.no_grad():
        model.plain(input_ids=ids[:, 6:], past_key_values=past, use_cache=True)
    assert torch.allclose(keeps["q"].stacked(), whole["q"][:, :, 6:], atol=1e-5)
    for site in ("k", "v"):
        assert torch.allclose(keeps[site].stacked(), whole[site], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon_gqa"])
def test_the_queries_keys_and_values_read_are_the_ones_whose_gradients_flow(name):
    """A head's own key moves the output through that head alone: its gradient is found by finite differences of an edit."""

    model, inputs, layer, head = opened(name), inputs_for(name), 1, 3
    keeps = {"query": KeepGraph("q", layers=[layer]), "key": KeepGraph("k", layers=[layer])}
    keeps["value"] = KeepGraph("v", layers=[layer])

    def output():
        return model.plain(**inputs, use_cache=False).logits.double().square().mean()

    with model.reading(*keeps.values()):
        base = output()
    for part, keep in keeps.items():
        value = keep.values[layer]
        assert value.shape[2] == model.n_heads
        (gradient,) = torch.autograd.grad(base, value, retain_graph=True)
        step = 1e-2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        moved = []
        for sign in (1, -1):
            tensors = {layer: (value.detach() + sign * step).transpose(1, 2)}
            with model.editing(Swap([(layer, head)], part=part, tensors=tensors)), torch.no_grad():
                moved.append(float(output()))
        predicted = float((gradient * step)[:, :, head].sum())
        assert abs(predicted) > 1e-6 and (moved[0] - moved[1]) / 2 == pytest.approx(predicted, rel=0.03)


def test_queries_are_read_after_edits_and_by_query_head_where_an_edit_needs_it():

    model, inputs, keeps = opened("llama"), inputs_for("llama"), [Keep(site, layers=[1]) for site in ("q", "k", "v")]
    tensors = {1: torch.full((3, 4, 11, 8), 7.0)}
    with model.editing(Swap(["L1H2"], part="key", tensors=tensors)), model.reading(*keeps):
        model.logits(inputs)
    q, k, v = (keep.values[1] for keep in keeps)
    assert k.shape == v.shape == (3, 11, 4, 8) and (k[:, :, 2] == 7).all()
    assert torch.allclose(k[:, :, [0, 1, 3]], model.read_site(inputs, "k")[1][:, :, [0, 0, 1]], atol=1e-5)
    assert torch.allclose(q, model.read_site(inputs, "q")[1], atol=1e-5)


def test_a_reader_used_again_has_nothing_of_the_block_before():
    class Sums(Reader):
        site = "z"
        passes = begun = 0

        def begin(self):
            self.begun += 1

        def read(self, call):
            self.passes += call.layer == 0

    model, inputs, keep, sums = opened("llama"), inputs_for("llama"), Keep("resid", layers=[0, 1]), Sums()
    model.look(inputs, keep, sums)
    keep.layers = [2]
    with model.reading(keep, sums), model.editing():
        model.logits(inputs)
        model.logits(inputs)
    assert list(keep.values) == [2], "layers of the earlier block are gone"
    assert sums.begun == 2 and sums.passes == 3, "begin is called once a block, and what a reader sums it keeps"
