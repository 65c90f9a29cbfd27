"""Streamed attribution patching is autograd's over the whole model, in one layer's memory; maps of exact patching are brute
force."""

import contextlib
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import EVERY, EXTRA, build, inputs_for, opened, padded
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.errors import InputError
from manyheads.heads import Head
from manyheads.lab.constructed import constructed
from manyheads.lab.small_llama import llama_config
from manyheads.model.editing.edits import Swap
from manyheads.model.hooks import first_tensor, hidden_of, with_first, with_hidden
from manyheads.model.reading.readers import ReadAttention
from manyheads.model.replay.patching import activation_patching
from manyheads.model.replay.streaming import Stream
from manyheads.tasks import IOI, encode
from manyheads.trace.circuits.attribution_patching import attribution_patching, task_attribution
from manyheads.trace.positions.patching_map import patching_map

ALL = [*EVERY, *EXTRA]
SITES = ("z", "mlp_write", "resid")


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 4] if logits.ndim == 3 else logits[:, 0] - logits[:, 1]


def pair(name):
    return inputs_for(name, seed=0), inputs_for(name, seed=5)


# Against autograd over the whole model


@contextlib.contextmanager
def with_leaves(model, leaves, values, start=None):
    """Adds a zero leaf to z, to the MLP's write and to the stream entering each layer, and notes the values there."""
    handles = []

    def added(key, value):
        values[key] = value.detach().clone()
        leaves[key] = torch.zeros_like(value, requires_grad=True)
        return value + leaves[key]

    def entering(layer):
        def hook(_, args, kwargs):
            hidden = start if layer == 0 and start is not None else hidden_of(args, kwargs)
            return with_hidden(args, kwargs, added(("resid", layer), hidden))

        return hook

    for layer, block in enumerate(model.layout.blocks):
        handles += [
            block.module.register_forward_pre_hook(entering(layer), with_kwargs=True),
            block.projection.register_forward_pre_hook(
                lambda m, a, layer=layer: (added(("z", layer), a[0]), *a[1:])),
            block.mlp_write.register_forward_hook(
                lambda m, a, out, layer=layer: with_first(out, added(("mlp_write", layer), first_tensor(out)))),
        ]  # fmt: skip
    last = model.layout.blocks[-1].module
    handles.append(last.register_forward_hook(
        lambda m, a, out: with_first(out, added(("resid", model.n_layers), first_tensor(out)))))  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_autograd(model, clean, corrupted, steps=1):
    """Node scores from one ordinary backward pass a step: `{site: [B, L, T, ...]}`."""
    runs = []
    for inputs in (clean, corrupted):
        values = {}
        with with_leaves(model, {}, values), torch.no_grad():
            model.plain(**inputs, use_cache=False) if "input_ids" in inputs else model.plain(**inputs)
        runs.append(values)
    here, there = runs
    total = dict.fromkeys(here, 0.0)
    for k in range(1, steps + 1):
        leaves = {}
        first = there["resid", 0] + k / steps * (here["resid", 0] - there["resid", 0])
        with with_leaves(model, leaves, {}, first):
            output = model.plain(**clean)
        grads = torch.autograd.grad(metric(output.logits).sum(), list(leaves.values()))
        for key, grad in zip(leaves, grads, strict=True):
            total[key] = total[key] + grad / steps
    rows, found = here["resid", 0].shape[0], {}
    for site in SITES:
        layers = range(model.n_layers + (site == "resid"))
        dots = torch.stack([(there[site, i] - here[site, i]) * total[site, i] for i in layers])
        dots = dots.reshape(len(layers), rows, -1, dots.shape[-1])  # OPT flattens rows and positions
        dots = dots.unflatten(-1, (model.n_heads, -1)) if site == "z" else dots
        found[site] = dots.sum(-1).transpose(0, 1).numpy()
    return found


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_streamed_scores_are_autograds_over_the_whole_model(name, steps):
    model, (clean, corrupted) = opened(name), pair(name)
    scores = attribution_patching(model, clean, corrupted, metric, sites=SITES, steps=steps)
    naive = by_autograd(model, clean, corrupted, steps)
    for site in SITES:
        largest = np.abs(naive[site]).max()
        assert scores.values[site].shape == naive[site].shape
        assert np.abs(scores.values[site] - naive[site]).max() <= 1e-4 * largest
        assert largest > 1e-3
    assert all(parameter.requires_grad for parameter in model.plain.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "falcon", "bert"])
def test_scores_of_queries_keys_and_values_are_the_slope_of_swapping_them(name):
    """By central differences, a hundredth of the way to the corrupted q, k or v of one head and as far the other way."""
    model, (clean, corrupted) = mh.open_model(build(name).double()), pair(name)
    scores = attribution_patching(model, clean, corrupted, metric, sites=("query", "key", "value"))
    parts = []
    for inputs in (clean, corrupted):
        seen = {}
        model.look(inputs, ReadAttention(lambda call, seen=seen: seen.__setitem__(call.layer, call)))
        parts.append(seen)
    for site in ("query", "key", "value"):
        for head in (Head(0, 1), Head(1, 3)):
            a, b = (wide(getattr(seen[head.layer], site)) for seen in parts)
            moved = []
            for step in (1e-2, -1e-2):
                with model.editing(Swap([head], site, {head.layer: a + step * (b - a)})):
                    moved.append(metric(model.logits(clean)))
            slope = ((moved[0] - moved[1]) / 2e-2).numpy()
            found = scores.values[site][:, head.layer, :, head.index].sum(1)
            assert np.abs(found - slope).max() <= 5e-3 * np.abs(scores.values[site].sum(2)).max()


def wide(tensor):
    return tensor.repeat_interleave(4 // tensor.shape[1], 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "granite", "gemma2", "falcon", "bert", "modernbert"])
def test_scores_are_the_first_order_of_exact_patching_at_every_position(name):
    """Twins a hair's breadth apart: the estimate equals the exact map, node by node."""
    model = mh.open_model(build(name).double())
    table = model.layout.embedding.weight.detach()
    embeds = table[inputs_for(name, batch=2, length=6)["input_ids"]] * getattr(
        model.layout.embedding, "embed_scale", 1.0
    )
    nudge = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1), dtype=embeds.dtype)
    clean, corrupted = {"inputs_embeds": embeds}, {"inputs_embeds": embeds + 3e-4 * embeds.std() * nudge}
    scores = attribution_patching(model, clean, corrupted, metric, sites=SITES)
    for site in SITES:
        exact = patching_map(model, clean, corrupted, metric, site=site)
        estimate = scores.values[site][:, : model.n_layers]
        assert np.abs(estimate - exact.values).max() <= 1e-2 * np.abs(exact.values).max()


def test_integrated_over_the_whole_path_the_embedding_makes_all_of_the_difference():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    scores = attribution_patching(model, clean, corrupted, metric, sites=("resid",), steps=200)
    difference = scores.corrupted - scores.clean
    whole = scores.values["resid"][:, 0].sum(1)
    assert np.abs(whole - difference).max() <= 0.02 * np.abs(difference).max()
    once = attribution_patching(model, clean, corrupted, metric, sites=("resid",)).values["resid"][:, 0].sum(1)
    assert np.abs(once - difference).max() > 0.2 * np.abs(difference).max()


def test_a_padded_row_scores_as_it_does_alone_and_its_padding_nothing():
    model = opened("llama")
    clean = model.inputs(padded("llama", "left"))
    other = torch.where(clean["attention_mask"].bool(), (clean["input_ids"] * 7 + 3) % 58 + 3, 0)
    corrupted = {**clean, "input_ids": other}
    together = attribution_patching(model, clean, corrupted, metric, steps=2)
    for row, n in enumerate((0, 2, 5)):
        alone = [batch["input_ids"][row : row + 1, n:] for batch in (clean, corrupted)]
        single = attribution_patching(model, *alone, metric, steps=2)
        for site in SITES:
            assert np.abs(together.values[site][row, :, n:] - single.values[site][0]).max() <= 1e-4
            assert np.abs(together.values[site][row, :, :n]).sum() == 0.0


# Memory


def deep(n_layers):
    torch.manual_seed(0)
    config = llama_config(32, 32, n_layers, 4, intermediate_size=64)  # fmt: skip
    return mh.open_model(LlamaForCausalLM(config).eval())


def peak_saved(work):
    """The most bytes that autograd kept for a backward pass at any moment."""
    state = {"now": 0, "peak": 0}

    class Held:
        def __init__(self, tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            state["now"] += self.size
            state["peak"] = max(state["peak"], state["now"])

        def __del__(self):
            state["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        work()
    return state["peak"]


def test_what_autograd_keeps_does_not_grow_with_depth():
    clean, corrupted = torch.arange(48)[None] % 32, (torch.arange(48)[None] * 5) % 32
    streamed, whole = [], []
    for n_layers in (2, 4, 8):
        model = deep(n_layers)
        streamed.append(peak_saved(lambda m=model: attribution_patching(m, clean, corrupted, metric, steps=2)))
        whole.append(peak_saved(lambda m=model: metric(m.plain(clean).logits).sum().backward()))
    assert streamed[0] == streamed[1] == streamed[2] > 0
    assert whole[2] > 3 * whole[0]
    assert streamed[2] < whole[2] / 6


def test_layers_that_are_not_chained_are_refused():
    model = mh.open_model(build("llama"))
    handle = model.layout.blocks[1].module.register_forward_pre_hook(
        lambda m, args, kwargs: with_hidden(args, kwargs, hidden_of(args, kwargs) + 1), with_kwargs=True
    )
    with pytest.raises(mh.errors.UnsupportedError, match="between layers 0 and 1"):
        Stream.of(model, inputs_for("llama"))
    handle.remove()


# Do the right heads come out?


def repeated_twins(n=8):
    """`<bos> s_1..s_20 s_1..s_10`, and twins in which s_10 and s_19 have changed places the first time."""
    half = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(i))[:20] + 20 for i in range(n)])
    other = half.clone()
    other[:, 9], other[:, 18] = half[:, 18], half[:, 9]
    return half, other


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_on_a_constructed_model_the_integrated_gradient_finds_the_saturated_head_that_one_gradient_misses(shape):
    built = constructed(shape, seed=0)
    model = mh.open_model(built.module)
    half, other = repeated_twins()
    bos = torch.full((8, 1), built.tokenizer.bos_token_id)
    clean, corrupted = torch.cat([bos, half, half[:, :10]], 1), torch.cat([bos, other, half[:, :10]], 1)
    rows = torch.arange(8)

    def answers(logits):
        return logits[rows, -1, half[:, 10]] - logits[rows, -1, half[:, 19]]

    exact = activation_patching(model, clean, corrupted, answers, keep=1).by_head(*model.shape)
    (previous,), (induction,) = built.known["previous_token"], built.known["induction"]
    known = {previous, induction}
    once, few, integrated = (
        attribution_patching(model, clean, corrupted, answers, sites=("z",), steps=steps, keep=1).scores().values
        for steps in (1, 5, 20)
    )
    lowest = np.argsort(integrated, axis=None)[:2]
    assert {Head(int(i) // 4, int(i) % 4) for i in lowest} == known  # AUC 1 for the two planted heads
    for head in known:
        assert exact[head] < -40
        assert integrated[head] == pytest.approx(exact[head], rel=0.06)
    assert once[induction] == pytest.approx(exact[induction], rel=0.02)
    assert abs(once[previous]) < 0.02 * abs(exact[previous])  # attention is certain there, and has next to no slope
    assert few[previous] < 1.8 * exact[previous]  # one of the five points lies where it tips


@cache
def ladon():
    return mh.open_model()


def spearman(a, b):
    return pd.DataFrame({"a": np.ravel(a), "b": np.ravel(b)}).corr("spearman").iloc[0, 1]


def test_on_the_bundled_model_estimates_rank_heads_as_exact_patching_does():
    batch = encode(IOI(), ladon().tokenizer, 24, 0)
    exact = activation_patching(
        ladon(), batch.inputs, batch.twins, batch.logit_difference, keep=1
    ).by_head(*ladon().shape)  # fmt: skip
    top = np.abs(exact) >= np.sort(np.abs(exact), axis=None)[-6]
    shuffled = np.random.default_rng(0).permuted(np.tile(exact.ravel(), (20, 1)), axis=1)
    for steps, agreement in ((1, 0.9), (4, 0.8)):
        scores = task_attribution(ladon(), batch, sites=("z",), steps=steps).scores()
        assert spearman(exact, scores.values) > agreement
        assert spearman(exact, scores.values) > max(spearman(row, scores.values) for row in shuffled) + 0.3
        strength = np.abs(scores.values)
        auc = np.mean(strength[top][:, None] > strength[~top][None])
        assert auc > 0.95
        assert scores.n == 24


def test_rows_may_ride_in_any_number_of_passes():
    batch = encode(IOI(), ladon().tokenizer, 10, 0)
    whole, parts = (task_attribution(ladon(), batch, rows=rows) for rows in (10, 3))
    assert np.abs(whole.heads - parts.heads).max() <= 1e-4
    assert whole.tokens == parts.tokens
    assert np.allclose(whole.clean, parts.clean, atol=1e-4)


# Maps of exact patching


@pytest.mark.parametrize("site", ["resid", "attention_write", "mlp_write"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "granite", "gemma2", "falcon", "bert", "vit"])
def test_a_map_is_brute_force(name, site):
    """One full pass for a layer and a position, the activation put in by hand."""
    model, (clean, corrupted) = opened(name), pair(name)
    found = patching_map(model, clean, corrupted, metric, site=site, positions=[0, -2], max_tokens=40)
    assert np.isnan(found.values[:, :, 1:-2]).all()
    for layer, t in [(0, 0), (1, -2), (2, 0)]:
        block, source = model.layout.blocks[layer], []

        def put(value, t=t, source=source):
            if not source:
                return value
            flat = value.clone().reshape(3, -1, value.shape[-1])
            flat[:, t] = source[0].reshape(flat.shape)[:, t]
            return flat.reshape(value.shape)

        def enter(_, args, kwargs, put=put, seen=source):
            hidden = hidden_of(args, kwargs)
            return with_hidden(args, kwargs, put(hidden)) if seen else seen_first(seen, hidden)

        def leave(_, args, out, put=put, seen=source):
            return with_first(out, put(first_tensor(out))) if seen else seen_first(seen, first_tensor(out))

        module = {"resid": block.module, "attention_write": block.attention_write, "mlp_write": block.mlp_write}[site]
        handle = (
            module.register_forward_pre_hook(enter, with_kwargs=True) if site == "resid"
            else module.register_forward_hook(leave)
        )  # fmt: skip
        model.logits(corrupted)
        patched = metric(model.logits(clean))
        handle.remove()
        expected = (patched - metric(model.logits(clean))).numpy()
        assert np.abs(found.values[:, layer, t] - expected).max() <= 1e-4
    assert np.nanmax(np.abs(found.values)) > 1e-3


def seen_first(seen, value):
    seen.append(value.detach().clone())


def test_a_map_of_heads_is_activation_patching_position_by_position():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    found = patching_map(model, clean, corrupted, metric, site="z")
    for t in (0, 5, 10):
        effects = activation_patching(model, clean, corrupted, metric, positions=t)
        assert np.abs(found.mean[:, t] - effects.by_head(3, 4)).max() <= 1e-5
    assert found.values.shape == (3, 3, 11, 4)


def test_patching_the_embedding_everywhere_that_twins_differ_is_the_corrupted_run():
    batch = encode(IOI(), ladon().tokenizer, 4, 0)
    found = patching_map(ladon(), batch.inputs, batch.twins, batch.logit_difference, keep=1)
    same = (batch.input_ids == batch.corrupted_ids).numpy()
    assert np.abs(found.values[:, 0][same]).max() <= 1e-4
    alone = (~same).sum(1) == 1
    change = found.values[:, 0].sum(1)
    assert np.allclose(change[alone], (found.corrupted - found.clean)[alone], atol=1e-3)
    assert found.normalised[-1, -1] == pytest.approx(found.mean[-1, -1] / (found.corrupted - found.clean).mean())


# What it shows


def test_tables_and_pictures(tmp_path):
    batch = encode(IOI(), ladon().tokenizer, 6, 0)
    scores = task_attribution(ladon(), batch, sites=("z", "query", "mlp_write", "resid"))
    frame = scores.to_frame()
    assert len(frame) == 48 + 48 + 6 + 7
    assert {"L0H0", "L2H1.query", "M3", "resid6"} <= set(frame["node"])
    assert frame["magnitude"].is_monotonic_decreasing
    resid = scores.map("resid")
    places = resid.to_frame()
    assert len(places) == resid.values.size
    row = places.iloc[17]
    assert row["change"] == resid.values[row["row"], row["layer"], row["position"]]
    assert row["token"] == resid.tokens[row["row"]][row["position"]]
    tokens = scores.map("z").by_token()
    assert tokens["n"].sum() == batch.input_ids.numel()
    assert (tokens["change"] * tokens["n"]).sum() == pytest.approx(scores.heads.sum(), abs=1e-3)
    text = resid.report(tmp_path / "map.html", row=0).read_text("utf-8")
    assert text.count("<tr>") == 8
    for other in (
        scores.map("z"),
        patching_map(ladon(), batch.inputs, batch.twins, batch.logit_difference, keep=1),
    ):
        assert "<table" in other.report(tmp_path / f"{other.site}-{other.meta['method']}.html").read_text("utf-8")


def test_wrong_questions_are_refused():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    short = {"input_ids": corrupted["input_ids"][:, :5]}
    for function in (attribution_patching, patching_map):
        with pytest.raises(InputError, match=r"\[3, 11\] and \[3, 5\]"):
            function(model, clean, short, metric)
        with pytest.raises(InputError, match="one number a row"):
            function(model, clean, corrupted, lambda logits: logits.sum())
    with pytest.raises(InputError, match="sites is"):
        attribution_patching(model, clean, corrupted, metric, sites=("heads",))
    with pytest.raises(InputError, match="steps is 0"):
        attribution_patching(model, clean, corrupted, metric, steps=0)
    with pytest.raises(InputError, match="have a gradient"):
        attribution_patching(model, clean, corrupted, lambda logits: logits.detach()[:, -1, 3])
    with pytest.raises(InputError, match="site is 'q'"):
        patching_map(model, clean, corrupted, metric, site="q")
    with pytest.raises(InputError, match="position 11"):
        patching_map(model, clean, corrupted, metric, positions=[11])
    scores = attribution_patching(model, clean, corrupted, metric, sites=("resid",))
    with pytest.raises(InputError, match="no scores at z"):
        scores.heads  # noqa: B018
    with pytest.raises(InputError, match="belongs to no head"):
        scores.scores("resid")
    with pytest.raises(InputError, match="rows is 0"):
        task_attribution(ladon(), IOI(), n=2, rows=0)
