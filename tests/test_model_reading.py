"""What is read off an unmodified model, on every supported architecture."""

import pytest
import torch
from architectures import DECODERS, ENCODERS, EVERY, EXTRA, inputs_for, opened, padded, shared

from manyheads.model.layout import projection_matrix
from manyheads.model.read.readers import Keep, ReadAttention, Reader

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
    with pytest.raises(TypeError, match="does not say what it reads"):
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
@pytest.mark.parametrize("site", ["attention", "z", "resid", "mlp_write"])
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
