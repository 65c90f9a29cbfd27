"""Composition scores are those of the full matrices, and the planted pair composes more than any other."""

from functools import cache

import numpy as np
import pytest
import torch
from architectures import EVERY, EXTRA, VISION, inputs_for, opened

import manyheads as mh
from manyheads.atlas.core.registry import score_all
from manyheads.errors import InputError
from manyheads.heads import Head
from manyheads.lab.constructed import constructed
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import ReadAttention
from manyheads.model.weights.qkv import head_weights
from manyheads.progress import Bar
from manyheads.trace.positions.composition import KINDS, composition_scores


def own_weights(name, layer):
    """W_Q, W_K, W_V of all heads as the checkpoint has them, `[H, D, Dh]`."""
    block = opened(name).layout.blocks[layer]
    core = block.core
    if name == "gpt2":
        parts = core.c_attn.weight.split(32, 1)
    elif name == "phi3":
        parts = core.qkv_proj.weight.T.split([32, 16, 16], 1)
    elif name in ("gpt_neox", "bloom"):
        parts = core.query_key_value.weight.T.unflatten(1, (4, 3, 8)).unbind(2)
        return [part.transpose(0, 1) for part in parts]
    else:
        parts = [getattr(core, f"{part}_proj").weight.T for part in "qkv"]
    heads = [part.unflatten(1, (-1, 8)).transpose(0, 1) for part in parts]
    return [part.repeat_interleave(4 // len(part), 0) for part in heads]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "bloom", "opt", "llama_bias"])
def test_the_weights_are_the_checkpoints_own(name):
    for layer, found in enumerate(head_weights(opened(name), fold=False)):
        for part, own in zip((found.W_Q, found.W_K, found.W_V), own_weights(name, layer), strict=True):
            scale = 8**-0.5 if name == "opt" and part is found.W_Q else 1.0  # OPT scales its queries in place
            assert torch.allclose(part, own * scale, atol=1e-5)


# A bias between two norms (stablelm_parallel's input LayerNorm, then that of its queries) turns the direction with the length.
@pytest.mark.parametrize(
    ("name", "fold"), [(n, f) for n in [*EVERY, *EXTRA] for f in (True, False) if (n, f) != ("stablelm_parallel", True)]
)
def test_what_attention_reads_of_any_vector_points_where_the_weights_say(name, fold):
    """Norms' denominators only lengthen it: q(x) - q(0) is along x W_Q for every head, and so are k and v."""
    model = opened(name)
    x = torch.cat([torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 32)])[:, None]
    seen: dict[int, AttentionCall] = {}

    def enter(_, args, kwargs):
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    blocks = model.layout.blocks
    modules = [m for b in blocks for m in ((b.module,) if fold else (b.module, b.attention))]
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    try:
        inputs = inputs_for(name, batch=1) if name in VISION else torch.zeros(6, 1, dtype=torch.long)
        model.look(inputs, ReadAttention(lambda call: seen.__setitem__(call.layer, call)))
    finally:
        for handle in handles:
            handle.remove()
    for layer, weights in enumerate(head_weights(model, fold=fold)):
        call = seen[layer]
        for part, matrix in ((call.query, weights.W_Q), (call.key, weights.W_K), (call.value, weights.W_V)):
            wide = part[:, :, 0].repeat_interleave(4 // part.shape[1], 1)
            given = torch.einsum("nd,hde->nhe", x[:-1, 0], matrix)
            along = torch.cosine_similarity(wide[:-1] - wide[-1], given, dim=-1)
            assert along.min() >= 1 - 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "falcon_gqa"])
@pytest.mark.parametrize("fold", [True, False])
def test_scores_are_those_of_the_full_matrices(name, fold):
    model = opened(name)
    scores = composition_scores(model, fold=fold, draws=2)
    weights = head_weights(model, fold=fold)
    qk = [torch.einsum("hde,hfe->hdf", w.W_Q, w.W_K).double() for w in weights]
    ov = [torch.einsum("hde,hef->hdf", w.W_V, w.W_O).double() for w in weights]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for h, g in np.ndindex(4, 4):
            reads = {"Q": qk[b][g], "K": qk[b][g].T, "V": ov[b][g]}
            for kind in KINDS:
                naive = (ov[a][h] @ reads[kind]).norm() / (ov[a][h].norm() * reads[kind].norm())
                assert scores[kind, Head(a, h), Head(b, g)] == pytest.approx(naive.item(), abs=1e-5)
    assert all(np.isnan(scores.values[kind][b, :, a]).all() for kind in KINDS for a in range(3) for b in range(a, 3))


@pytest.mark.parametrize(("shape", "n_kv_heads"), [("llama", 4), ("llama", 2), ("gpt2", 4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_planted_pair_composes_by_its_key_more_than_any_other_pair_in_any_way(shape, n_kv_heads, seed):
    """Under grouped queries the heads that share the induction head's key read the same through it, and come next."""
    plant = ("previous_token", "induction", "copying", "retrieval")
    built = constructed(shape, seed=seed, n_kv_heads=n_kv_heads, plant=plant)
    (previous,), (induction,) = built.known["previous_token"], built.known["induction"]
    frame = composition_scores(mh.open_model(built.module)).to_frame()
    assert frame.loc[0, ["kind", "writer", "reader"]].tolist() == ["K", str(previous), str(induction)]
    group = 4 // n_kv_heads
    first = induction.index // group * group
    sharing = [str(Head(induction.layer, h)) for h in range(first, first + group)]
    same_key = (frame["kind"] == "K") & (frame["writer"] == str(previous)) & frame["reader"].isin(sharing)
    assert same_key.sum() == group
    assert frame["excess"][0] > 5 * frame["excess"][~same_key].max()
    assert frame["z"][0] > 50


@pytest.mark.parametrize("seed", range(3))
def test_forgetting_the_gains_hides_part_of_the_planted_pair(seed):
    built = constructed("llama", seed=seed)
    (previous,), (induction,) = built.known["previous_token"], built.known["induction"]
    model = mh.open_model(built.module)
    folded, plain = (composition_scores(model, fold=fold)["K", previous, induction] for fold in (True, False))
    assert folded > plain + 1e-3


def test_unrelated_matrices_score_the_baseline_which_is_one_over_the_root_of_the_width():
    scores = composition_scores(opened("llama"))
    for kind in KINDS:
        mean, deviation = scores.baseline[kind]
        assert mean == pytest.approx(32**-0.5, rel=0.02)
        assert abs(np.nanmean(scores.excess[kind])) < deviation
    again = composition_scores(opened("llama"))
    assert again.baseline == scores.baseline


@cache
def ladon():
    return mh.open_model()


def test_on_the_bundled_model_previous_token_heads_compose_with_induction_heads_more_than_random_pairs_do():
    found, _ = score_all(ladon(), ("previous_token", "induction"), n=16, seed=0, bar=Bar())
    previous, induction = found["previous_token"].above(0.8), found["induction"].above(0.8)
    key = composition_scores(ladon()).excess["K"]

    def mean(writers, readers):
        return np.mean([key[(*a, *b)] for a in writers for b in readers if a.layer < b.layer])

    strong = mean(previous, induction)
    draws = previous.matched_random(40, seed=0), induction.matched_random(40, seed=1)
    random = [mean(*pair) for pair in zip(*draws, strict=True)]
    assert strong > max(random)
    assert strong > np.mean(random) + 3 * np.std(random)


def test_wrong_questions_are_refused():
    with pytest.raises(InputError, match="draws is 1"):
        composition_scores(opened("llama"), draws=1)
    one = mh.open_model(constructed("llama", n_layers=1, plant=("previous_token",)).module)
    with pytest.raises(InputError, match="has one"):
        composition_scores(one)
