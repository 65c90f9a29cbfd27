"""Precise tuning of heads: exactly the slices move, by exactly the scaled gradient, in every layout of q, k and v."""

import copy

import pytest
import torch
from architectures import DECODERS, ENCODERS, EXTRA, build, inputs_for

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.training import TrainSettings, fit, next_token_loss
from manyheads.training.head_slices import head_slices, only_heads, sharing

HEADS = ["L0H1", "L1H0", "L1H1", "L2H3"]
CHOSEN = {0: [1], 1: [0, 1], 2: [3]}
SEPARATE = {
    "llama": "model.layers.{}.self_attn.{}_proj.weight",
    "qwen3": "model.layers.{}.self_attn.{}_proj.weight",
    "olmo2": "model.layers.{}.self_attn.{}_proj.weight",
}


def rows(blocks, width):
    return [b * width + i for b in blocks for i in range(width)]


def masks(name, model):
    """Parameter name -> mask, written down by hand for each layout: rows of the separate ones, by hand for the fused ones."""
    found = {}
    width, n_heads, n_groups = model.head_dim, model.n_heads, model.n_kv_heads
    parameters = dict(model.plain.named_parameters())

    def mark(key, dim, features, ratio):
        mask = torch.zeros_like(parameters[key])
        mask.index_fill_(dim, torch.tensor(features), ratio)
        found[key] = mask

    for layer, heads in CHOSEN.items():
        ratio = n_heads / len(heads)
        groups = sorted({h // (n_heads // n_groups) for h in heads})
        if name in SEPARATE:
            for part, blocks in (("q", heads), ("k", groups), ("v", groups)):
                mark(SEPARATE[name].format(layer, part), 0, rows(blocks, width), ratio)
            mark(SEPARATE[name].format(layer, "o"), 1, rows(heads, width), ratio)
        elif name == "gpt2":
            blocks = [p * n_heads + h for p in range(3) for h in heads]
            mark(f"transformer.h.{layer}.attn.c_attn.weight", 1, rows(blocks, width), ratio)
            mark(f"transformer.h.{layer}.attn.c_proj.weight", 0, rows(heads, width), ratio)
        elif name == "gpt_neox":
            blocks = [3 * h + p for h in heads for p in range(3)]
            mark(f"gpt_neox.layers.{layer}.attention.query_key_value.weight", 0, rows(blocks, width), ratio)
            mark(f"gpt_neox.layers.{layer}.attention.dense.weight", 1, rows(heads, width), ratio)
        elif name == "phi3":
            blocks = [*heads, *(n_heads + g for g in groups), *(n_heads + n_groups + g for g in groups)]
            mark(f"model.layers.{layer}.self_attn.qkv_proj.weight", 0, rows(blocks, width), ratio)
            mark(f"model.layers.{layer}.self_attn.o_proj.weight", 1, rows(heads, width), ratio)
        elif name == "falcon_gqa":
            size = n_heads // n_groups
            blocks = [h // size * (size + 2) + h % size for h in heads]
            blocks += [g * (size + 2) + size + p for g in groups for p in range(2)]
            mark(f"transformer.h.{layer}.self_attention.query_key_value.weight", 0, rows(blocks, width), ratio)
            mark(f"transformer.h.{layer}.self_attention.dense.weight", 1, rows(heads, width), ratio)
    return found


BY_HAND = [*SEPARATE, "gpt2", "gpt_neox", "phi3", "falcon_gqa"]


def loss_of(module, inputs):
    return module(**inputs, labels=inputs["input_ids"], use_cache=False).loss


def state(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", BY_HAND)
def test_one_sgd_step_is_the_full_gradient_times_mask_times_ratio(name):
    """#14 (a), second half: to 1e-6."""
    model, inputs = mh.open_model(build(name)), inputs_for(name)
    whole = copy.deepcopy(model.plain)
    loss_of(whole, inputs).backward()
    gradient = {key: p.grad for key, p in whole.named_parameters()}
    before, wanted, rate = state(model.plain), masks(name, model), 0.01
    with only_heads(model, HEADS) as parameters:
        loss_of(model.plain, inputs).backward()
        torch.optim.SGD(parameters, lr=rate).step()
    for key, after in state(model.plain).items():
        step = rate * wanted[key] * gradient[key] if key in wanted else torch.zeros_like(after)
        assert (after - (before[key] - step)).abs().max() <= 1e-6, key
        untouched = wanted.get(key, torch.zeros_like(after)) == 0
        assert torch.equal(after[untouched], before[key][untouched]), key
        assert key not in wanted or (after != before[key])[~untouched].float().mean() > 0.9


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_not_tuned_stays_bit_identical_under_adamw_with_weight_decay(name):
    """#14 (a), first half: the optimiser is given every parameter that trains, with decay and momentum."""
    model, inputs = mh.open_model(build(name)), inputs_for(name)
    before, wanted = state(model.plain), masks(name, model)
    with only_heads(model, HEADS) as parameters:
        trained = [p for p in model.plain.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in parameters}
        assert sum(p.numel() for p in trained) == sum(int((mask > 0).sum()) for mask in wanted.values())
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model.plain, inputs).backward()
            optimizer.step()
    for key, after in state(model.plain).items():
        untouched = wanted.get(key, torch.zeros_like(after)) == 0
        assert torch.equal(after[untouched], before[key][untouched]), key
        assert key not in wanted or (after != before[key])[~untouched].all(), key


def test_the_projects_own_loop_trains_the_slices_and_leaves_the_rest():
    model, inputs = mh.open_model(build("llama")), inputs_for("llama")
    before, wanted, loss = state(model.plain), masks("llama", model), loss_of(model.plain, inputs).item()
    settings = TrainSettings(steps=20, rate=1e-2, warmup=1, weight_decay=0.5, precision="fp32")
    with only_heads(model, HEADS):
        fit(model.plain, lambda i: inputs, settings, loss=next_token_loss)
    assert loss_of(model.plain.eval(), inputs).item() < loss - 0.1
    for key, after in state(model.plain).items():
        untouched = wanted.get(key, torch.zeros_like(after)) == 0
        assert torch.equal(after[untouched], before[key][untouched]), key


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *EXTRA])
def test_in_every_architecture_zeroing_the_slices_silences_just_those_heads(name):
    """W_V and W_O of a head are what it writes: without them its z is its bias, and no other head's z moves.

    Only layer 0 is looked at, whose inputs stay the same; heads that share keys and values with a chosen one may move.
    """
    model, inputs = mh.open_model(build(name)), inputs_for(name)
    heads = ["L0H2", "L0H3"]
    before = model.read_z(inputs)[0]
    pieces = head_slices(model, heads)
    assert sum(piece.index.numel() for piece in pieces) >= 4 * model.head_dim
    with only_heads(model, heads) as parameters, torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    after = model.read_z(inputs)[0]
    moved = {h for h in range(4) if not torch.allclose(before[:, :, h], after[:, :, h], atol=1e-5)}
    allowed = {2, 3} | {h.index for h in sharing(model, heads)}
    assert {2, 3} <= moved <= allowed or name == "olmo2", "a norm over all heads is the exception"
    constant = after[:, :, 2:] - after[:1, :1, 2:]
    assert name == "gpt_oss" or constant.abs().max() <= 1e-5, "what is left of their z is a bias"
    assert model.W_O(0)[2:].abs().max() == 0 and model.W_O(0)[:2].abs().min(-1).values.max() > 0


def test_afterwards_the_module_is_the_ordinary_one_it_was(tmp_path):
    model, inputs = mh.open_model(build("gpt2")), inputs_for("gpt2")
    identities = {name: id(p) for name, p in model.plain.named_parameters()}
    model.plain.transformer.wte.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.plain.named_parameters()}
    logits, fingerprint = model.logits(inputs), model.fingerprint
    with only_heads(model, HEADS):
        assert torch.equal(model.logits(inputs), logits)
    assert {name: id(p) for name, p in model.plain.named_parameters()} == identities
    assert {name: p.requires_grad for name, p in model.plain.named_parameters()} == flags
    assert torch.equal(model.logits(inputs), logits) and model.fingerprint == fingerprint
    with pytest.raises(RuntimeError, match="stop"), only_heads(model, HEADS) as parameters:
        torch.nn.init.zeros_(parameters[0])
        raise RuntimeError("stop")
    assert {name: id(p) for name, p in model.plain.named_parameters()} == identities
    assert model.fingerprint != fingerprint, "what was trained until then is kept, and told"
    model.save_pretrained(tmp_path / "saved")
    assert (mh.open_model(tmp_path / "saved").logits(inputs) - model.logits(inputs)).abs().max() <= 1e-5


def test_a_tuned_head_shares_its_keys_and_values_with_its_group():
    model = mh.open_model(build("llama"))
    assert sharing(model, HEADS) == model.head_set(["L0H0", "L2H2"])
    assert not sharing(mh.open_model(build("gpt2")), HEADS)


def test_wrong_heads_and_unknown_layouts_are_refused_with_the_reason():
    model = mh.open_model(build("llama"))
    with pytest.raises(InputError, match="name at least one head"):
        head_slices(model, [])
    with pytest.raises(InputError, match="out of range"):
        head_slices(model, ["L9H0"])
    model.plain.model.layers[0].self_attn.extra = torch.nn.Linear(32, 7)
    with pytest.raises(UnsupportedError, match="expected projections of 32, 16 and 16 features"):
        head_slices(model, ["L0H0"])
