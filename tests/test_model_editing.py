"""Edits do what they say, on every architecture, and can be undone exactly."""

import pytest
import torch
from architectures import DECODERS, EVERY, EXTRA, build, inputs_for, opened, padded, shared

import manyheads as mh
from manyheads.errors import InputError
from manyheads.model.editing.edits import Variants, derangement
from manyheads.model.layout import find_layout
from manyheads.model.linear import projection_matrix
from manyheads.model.reading.readers import Keep, ReadAttention

ALL = [*EVERY, *EXTRA]
GENERATING = [*DECODERS, *EXTRA]
HEADS = ["L0H1", "L1H2", "L2H3"]


def edits(model, inputs):
    """One of each kind, over several layers."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(3, model.head_dim, generator=generator)
    mean = model.mean_z(inputs)
    source = torch.randn(model.n_layers, 1, 40, model.n_heads, model.head_dim, generator=generator)
    return {
        "scale": mh.Scale(HEADS, -1.5),
        "zero": mh.Ablate(HEADS, "zero"),
        "mean": mh.Ablate(HEADS, "mean", mean),
        "resample": mh.Ablate(HEADS, "resample", source),
        "uniform": mh.Ablate(HEADS, "uniform"),
        "patch": mh.Patch(HEADS, source),
        "offset": mh.Offset(HEADS, vectors),
        "mask": mh.Mask(HEADS, keys=[0, 2]),
    }


@pytest.mark.parametrize("name", ALL)
def test_zero_ablation_equals_zeroing_the_rows_of_the_output_projection(name):
    inputs, model = inputs_for(name), opened(name)
    cut = build(name)
    with torch.no_grad():
        for head in map(mh.Head.parse, HEADS):
            weight = projection_matrix(find_layout(cut).blocks[head.layer].projection)
            weight[head.index * model.head_dim : (head.index + 1) * model.head_dim] = 0
        expected = cut(**inputs).logits
    with model.editing(mh.Ablate(HEADS)):
        edited = model.logits(inputs)
    assert (edited - expected).abs().max() <= 1e-5
    assert (edited - model.logits(inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_every_edit_changes_the_model_and_an_exception_leaves_no_trace(name):
    inputs, model = inputs_for(name), opened(name)
    before = model.logits(inputs)
    for kind, edit in edits(model, inputs).items():
        with pytest.raises(ZeroDivisionError), model.editing(edit):
            assert (model.logits(inputs) - before).abs().max() > 1e-4, kind
            1 / 0  # noqa: B018
        assert torch.equal(model.logits(inputs), before), kind


@pytest.mark.parametrize("name", ALL)
def test_uniform_ablation_averages_the_values_a_query_may_see(name):
    inputs, model, seen = inputs_for(name), opened(name), {}
    keep = Keep("z")
    with model.editing(mh.Ablate(["L0H1"], "uniform")):
        model.read(inputs, keep, ReadAttention(lambda c: seen.__setitem__(c.layer, (c.value, c.pattern > 1e-12))))
    value, visible = seen[0]
    value = value.repeat_interleave(model.n_heads // value.shape[1], 1)[:, 1]
    for t in (0, 4, keep.values[0].shape[1] - 1):
        for row in range(3):
            expected = value[row, visible[row, 1, t]].mean(0)
            assert torch.allclose(keep.values[0][row, t, 1], expected, atol=1e-5)
    plain = model.read_z(inputs)[0]
    assert torch.allclose(keep.values[0][:, :, [0, 2, 3]], plain[:, :, [0, 2, 3]], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom"])
def test_uniform_ablation_ignores_padding(name):
    model, inputs = opened(name), opened(name).inputs(padded(name, "left"))
    keep, values = Keep("z"), {}
    with model.editing(mh.Ablate(["L0H1"], "uniform")):
        model.read(inputs, keep, ReadAttention(lambda c: values.__setitem__(c.layer, c.value)))
    v = values[0].repeat_interleave(model.n_heads // values[0].shape[1], 1)[:, 1]
    assert torch.allclose(keep.values[0][2, 7, 1], v[2, 5:8].mean(0), atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_masked_keys_get_no_attention_from_the_masked_heads_only(name):
    inputs, model, seen = inputs_for(name), opened(name), {}
    edit = mh.Mask(["L1H2"], keys=[0, 2], positions=[5, 6])
    with model.editing(edit):
        model.read(inputs, ReadAttention(lambda c: seen.__setitem__(c.layer, c.pattern)))
    whole = {}
    model.read(inputs, ReadAttention(lambda c: whole.__setitem__(c.layer, c.pattern)))
    assert seen[1][:, 2, [5, 6]][..., [0, 2]].abs().max() <= 1e-6
    assert torch.allclose(seen[1][:, [0, 1, 3]], whole[1][:, [0, 1, 3]], atol=1e-5)
    assert torch.allclose(seen[1][:, 2, 7:], whole[1][:, 2, 7:], atol=1e-5)
    if not hasattr(model.layout.blocks[1].core, "sinks"):
        kept = whole[1][:, 2, 5].clone()
        kept[:, [0, 2]] = 0
        assert torch.allclose(seen[1][:, 2, 5], kept / kept.sum(-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("name", GENERATING)
def test_edits_under_generate_with_a_cache_equal_edits_without(name):
    model = opened(name)
    inputs = model.inputs(padded(name, "left"))
    inputs.pop("position_ids", None)
    some = ("uniform", "patch", "mask")
    for kind, edit in edits(model, inputs).items():
        if kind not in some and name not in ("llama", "gpt2", "mistral", "mpt", "falcon_alibi", "gpt_oss"):
            continue
        with model.editing(edit):
            runs = [
                model.plain.generate(
                    **inputs,
                    max_new_tokens=6,
                    min_new_tokens=6,
                    do_sample=False,
                    use_cache=cached,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                for cached in (True, False)
            ]
        a, b = (torch.stack(run.logits) for run in runs)
        assert torch.allclose(a, b, atol=2e-4), kind
        assert torch.equal(runs[0].sequences, runs[1].sequences), kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt"])
def test_edits_at_positions_mean_the_same_token_with_and_without_a_cache(name):
    model = opened(name)
    inputs = inputs_for(name, length=8)
    edit = mh.Scale(model.heads, -2.0, positions=[3, 9])
    options = dict(
        max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with model.editing(edit):
        a, b = (model.generate(inputs, use_cache=cached, **options) for cached in (True, False))
    assert torch.allclose(torch.stack(a.logits), torch.stack(b.logits), atol=2e-4)
    unedited = model.generate(inputs, use_cache=True, **options)
    assert (torch.stack(a.logits) - torch.stack(unedited.logits)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "bert", "falcon_alibi", "vit"])
def test_rows_and_positions_limit_an_edit(name):
    inputs, model = inputs_for(name), opened(name)
    plain = model.read_z(inputs)
    for make in (mh.Scale, lambda heads, **at: mh.Ablate(heads, "uniform", **at)):
        keep = Keep("z")
        with model.editing(make(["L0H1"], rows=[1], positions=torch.tensor([[2, 3]]))):
            model.read(inputs, keep)
        changed = (keep.values[0] - plain[0]).abs().amax((2, 3)) > 1e-6
        expected = torch.zeros_like(changed)
        expected[1, 2:4] = True
        assert torch.equal(changed, expected)


def test_positions_may_differ_from_row_to_row():
    inputs, model = inputs_for("llama"), opened("llama")
    keep = Keep("z")
    with model.editing(mh.Ablate(["L0H1"], positions=torch.tensor([[0], [4], [-1]]))):
        model.read(inputs, keep)
    zeroed = (keep.values[0][:, :, 1].abs().amax(-1) == 0).nonzero().tolist()
    assert zeroed == [[0, 0], [1, 4], [2, 10]]


def test_nested_edits_apply_in_order_and_undo_in_order():
    inputs, model = inputs_for("llama"), opened("llama")
    plain = model.logits(inputs)
    ones = torch.ones(1, model.head_dim)
    keep = Keep("z", layers=[0])
    with model.editing(mh.Scale(["L0H0"], 2.0)):
        outer = model.logits(inputs)
        with model.editing(mh.Offset(["L0H0"], ones), mh.Scale(["L0H0"], 3.0)):
            model.read(inputs, keep)
        assert torch.equal(model.logits(inputs), outer)
    assert torch.equal(model.logits(inputs), plain)
    z = model.read_z(inputs)[0][:, :, 0]
    assert torch.allclose(keep.values[0][:, :, 0], (2 * z + 1) * 3, atol=1e-5)


def test_edits_of_z_and_of_the_attention_apply_in_the_order_in_which_they_are_given():
    inputs, model = inputs_for("llama"), opened("llama")
    uniform, doubled = mh.Ablate(["L0H1"], "uniform"), mh.Scale(["L0H1"], 2.0)
    kept = []
    for order in ([uniform], [uniform, doubled], [doubled, uniform]):
        keep = Keep("z", layers=[0])
        with model.editing(*order):
            model.read(inputs, keep)
        kept.append(keep.values[0][:, :, 1])
    assert torch.allclose(kept[1], 2 * kept[0], atol=1e-6) and torch.allclose(kept[2], kept[0], atol=1e-6)


def test_resample_takes_another_row_and_mean_the_mean():
    inputs, model = inputs_for("llama"), opened("llama")
    z = model.read_z(inputs)[0]
    for edit, expected in (
        (mh.Ablate(["L0H1"], "resample", seed=4), z[derangement(3, 4)][:, :, 1]),
        (mh.Ablate(["L0H1"], "mean"), z[:, :, 1].mean((0, 1)).expand(3, 11, -1)),
        (mh.Ablate(["L0H1"], "mean", model.mean_z(inputs, by_position=True)), z[:, :, 1].mean(0).expand(3, -1, -1)),
    ):
        keep = Keep("z", layers=[0])
        with model.editing(edit):
            model.read(inputs, keep)
        assert torch.allclose(keep.values[0][:, :, 1], expected, atol=1e-6)
    with model.editing(mh.Ablate(["L0H1"], "resample")), pytest.raises(InputError, match="another row"):
        model.logits(inputs["input_ids"][:1])


@pytest.mark.parametrize("n", range(2, 9))
def test_a_derangement_leaves_nothing_in_its_place(n):
    for seed in range(20):
        order = derangement(n, seed)
        assert sorted(order.tolist()) == list(range(n)) and not (order == torch.arange(n)).any()


def test_variants_in_one_batch_see_their_rows_as_the_whole_batch():
    inputs, model = inputs_for("llama", batch=4), opened("llama")
    first = {"input_ids": inputs["input_ids"][:2]}
    for edit in (mh.Ablate(["L1H1"], "mean"), mh.Ablate(["L1H1"], "uniform"), mh.Mask(["L1H1"], 0, rows=[1])):
        with model.editing(Variants.of([edit], 2)):
            some = model.logits(inputs)
        with model.editing(edit):
            alone = model.logits(first)
        assert torch.allclose(some[:2], alone, atol=1e-5)
        assert torch.allclose(some[2:], model.logits(inputs)[2:], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: mh.Ablate(["L99H0"]), "L99H0 is out of range: this model has layers 0-2 with heads 0-3"),
        (lambda m: mh.Ablate(["L0H4"]), "L0H4 is out of range"),
        (lambda m: mh.Ablate(["third"]), "does not name a head"),
        (lambda m: mh.Ablate(["L0H0"], "median"), "unknown ablation 'median'"),
        (lambda m: mh.Ablate(["L0H0"], "mean", torch.zeros(3)), r"\[L, H, Dh\] or \[L, T, H, Dh\], not \[3\]"),
        (lambda m: mh.Patch(["L0H0"]), "Patch needs source="),
        (lambda m: mh.Offset(["L0H0"], torch.zeros(2, 8)), r"shape \[1, Dh\] or \[L, H, Dh\], not \[2, 8\]"),
        (lambda m: mh.Scale(["L0H0"], 0.0, rows=[7]), r"rows \[7\] do not fit a batch of 3"),
        (lambda m: mh.Patch(["L0H0"], torch.zeros(3, 3, 4, 4, 8)), r"\[3, 4\] rows and positions, this pass needs"),
    ],
)
def test_a_bad_edit_is_refused_in_one_sentence(make, message):
    model = opened("llama")
    with pytest.raises(InputError, match=message), model.editing(make(model)):
        model.logits(inputs_for("llama"))
    assert torch.equal(model.logits(inputs_for("llama")), shared("llama")(**inputs_for("llama")).logits)


def test_cached_decoding_refuses_what_it_cannot_mean():
    model, ids = opened("llama"), inputs_for("llama")["input_ids"]
    for edit in (mh.Ablate(["L0H0"], "mean"), mh.Scale(["L0H0"], 0.0, positions=-1)):
        with model.editing(edit), pytest.raises(InputError):
            model.generate(ids, max_new_tokens=3, do_sample=False)
