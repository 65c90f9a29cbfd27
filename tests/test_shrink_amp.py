"""AMP cuts what writes least, physically, and as many parameters as it says."""

import contextlib
from functools import cache

import pytest
import torch
import transformers as tf
from architectures import GEMMA, LLAMA, opened

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught, entering
from manyheads.model.weights.units import mlp_of, with_units
from manyheads.shrink.weights.amp import AMP, projected_scores
from manyheads.tasks.texts import passages

RATIO = 0.03  # of all parameters, most of which are embeddings in these models
KINDS = {
    "Llama-MHA": ("Llama", {"num_key_value_heads": 4}),
    "Llama-GQA": ("Llama", {"num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True}),
    "Qwen3-GQA": ("Qwen3", {"head_dim": 16}),
    "Gemma2-GQA": ("Gemma2", GEMMA),
    "GPTNeoX": ("GPTNeoX", {}),
}


@cache
def ladon():
    return mh.open_model()


def made(kind, **changes):
    """A small random model that reads what ladon's tokenizer writes."""
    torch.manual_seed(0)
    name, own = KINDS[kind]
    config = {**LLAMA, **own, "vocab_size": 4096, "intermediate_size": 50, **changes}
    if name == "GPTNeoX":
        config.pop("num_key_value_heads")
    module = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**config)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return mh.open_model(module, tokenizer=ladon().tokenizer)


def size(model):
    return sum(parameter.numel() for parameter in model.plain.parameters())


def zeroed_logits(model, cut, ids):
    """The whole model's logits with the heads and units of a cut zeroed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.editing(mh.Scale(cut.heads, 0.0)))
        for layer, units in enumerate(cut.units):
            mlp = mlp_of(model, layer)
            mask = torch.zeros(mlp.units)
            mask[units] = 1
            stack.enter_context(entering(mlp.down, lambda hidden, mask=mask: hidden * mask))
        return model.logits(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_what_heads_and_units_write(kind):
    model = made(kind)
    rows = torch.randint(3, 4096, (3, 7))
    heads, units = projected_scores(model, rows)
    z = model.read_z(rows)
    for layer in range(3):
        mlp = mlp_of(model, layer)
        with caught(mlp.down, side="input") as given:
            model.logits(rows)
        for head in range(4):
            written = z[layer, :, :, head] @ model.W_O(layer)[head]
            assert abs(written.abs().sum(-1).mean() - heads[layer][head]) <= 1e-5 * max(1, heads[layer][head])
        assert torch.allclose(given[0].abs().mean((0, 1)), units[layer], atol=1e-6)


@pytest.mark.parametrize("order", ["standard", "reversed", "random", "magnitude"])
@pytest.mark.parametrize("kind", ["Llama-MHA", "Llama-GQA", "Qwen3-GQA", "Gemma2-GQA"])
def test_what_is_cut_is_what_zeroing_takes_away_and_as_many_parameters_as_it_says(kind, order, tmp_path):
    model = made(kind)
    amp = AMP(RATIO, order=order, n_prompts=4, length=16)
    cut = amp.plan(model)
    ids = torch.randint(3, 4096, (2, 9))
    before, whole = model.logits(ids), zeroed_logits(model, cut, ids)
    small = amp.convert(model)
    assert (small.logits(ids) - whole).abs().max() <= 1e-4 * max(1, whole.abs().max())
    assert torch.equal(model.logits(ids), before)
    assert size(model) - size(small) == cut.removed and cut.total == size(model)
    unit = mlp_of(model, 0).parameters_each
    assert abs(cut.removed - RATIO * cut.total) <= 3 * unit / 2  # half a unit in each layer
    assert {len(units) for units in cut.units} == {mlp_of(small, 0).units}
    small.save_pretrained(tmp_path / "m")
    assert torch.equal(mh.open_model(tmp_path / "m").logits(ids), small.logits(ids))


@pytest.mark.parametrize("groups", ["groups", "members"])
def test_grouped_heads_go_by_whole_groups_or_as_many_of_each(groups):
    model = made("Qwen3-GQA", num_attention_heads=12, num_key_value_heads=4)
    cut = AMP(0.06, groups=groups, n_prompts=4, length=16).plan(model)
    heads, _ = projected_scores(model, passages(model, None, n=4, length=16, seed=0))
    for layer, gone in cut.heads.by_layer().items():
        scores = heads[layer].unflatten(0, (4, 3))
        by_group = [[h % 3 for h in gone if h // 3 == g] for g in range(4)]
        if groups == "groups":
            lowest = set(scores.sum(1).sort().indices[: len(gone) // 3].tolist())
            assert {g for g, some in enumerate(by_group) if len(some) == 3} == lowest
            assert not [g for g, some in enumerate(by_group) if len(some) not in (0, 3)]
        else:
            n = len(gone) // 4
            assert all(set(some) == set(scores[g].sort().indices[:n].tolist()) for g, some in enumerate(by_group))
    assert cut.heads


def test_a_head_or_unit_that_writes_nothing_scores_zero_and_goes_first():
    model = made("Llama-MHA")
    with torch.no_grad():
        for layer, h in ((0, 2), (1, 0), (2, 3)):
            model.W_O(layer)[h].zero_()
            mlp_of(model, layer).up[1].weight[5].zero_()
    heads, units = projected_scores(model, torch.randint(3, 4096, (2, 7)))
    assert heads[0][2] == heads[1][0] == heads[2][3] == 0 and all(one[5] == 0 for one in units)
    cut = AMP(RATIO, n_prompts=4, length=16).plan(model)
    assert {(0, 2), (1, 0), (2, 3)} <= {(head.layer, head.index) for head in cut.heads}
    assert not any(5 in one for one in cut.units)


def test_reversed_keeps_what_standard_cuts_and_random_follows_its_seed():
    model = made("Llama-MHA")

    def heads(order, seed=0):
        return AMP(RATIO, order=order, n_prompts=4, length=16, seed=seed).plan(model).heads

    assert not set(heads("standard")) & set(heads("reversed"))
    assert heads("random") == heads("random") != heads("random", 1)


def test_mlps_of_different_sizes_reopen(tmp_path):
    model = made("Llama-GQA")
    kept = [torch.arange(0, 50, 2), torch.arange(50), torch.tensor([7, 3])]
    ids = torch.randint(3, 4096, (2, 9))
    small = HeadModel(*with_units(model, kept))
    assert [mlp_of(small, layer).units for layer in range(3)] == [25, 50, 2]
    empty = mh.heads.HeadSet([], model.shape)
    cut = type("Cut", (), {"heads": empty, "units": kept})
    assert (small.logits(ids) - zeroed_logits(model, cut, ids)).abs().max() <= 1e-4
    small.save_pretrained(tmp_path / "m")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small.logits(ids))


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AMP(1.5), "ratio is 1.5"),
        (lambda: AMP(order="sideways"), "order is 'sideways'"),
        (lambda: AMP(n_prompts=0), "n_prompts is 0"),
        (
            lambda: AMP(0.95).plan(made("Llama-MHA")),
            r"hold 0\.\d+ of this model's parameters, so that 0.95 of all cannot go",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, reason):
    with pytest.raises(InputError, match=reason):
        make()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "phi3", "gpt_oss"])
def test_mixtures_of_experts_and_fused_maps_are_refused_by_name(name):
    with pytest.raises(UnsupportedError, match=r"cannot tell the units of .* apart in layer 0"):
        AMP(0.1).plan(opened(name))


@pytest.mark.slow
def test_on_a_trained_model_standard_costs_less_than_random_and_random_less_than_reversed():
    model = ladon()
    held_out = passages(model, None, n=24, length=128, seed=99)

    def loss(some):
        logits = some.logits(held_out)[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, held_out[:, 1:].flatten()))

    standard, reverse = (loss(AMP(0.3, order=order).convert(model)) for order in ("standard", "reversed"))
    chance = [loss(AMP(0.3, order="random", seed=seed).convert(model)) for seed in range(3)]
    assert standard < min(chance) and max(chance) < reverse
