import copy
from dataclasses import replace

import pytest
import torch
from architectures import VOCAB, inputs_for, opened, shared
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.lab.small_llama import llama_config
from manyheads.shrink.shrinking import shrink_way
from manyheads.shrink.weights.moh import TUNING, MoH, install, loads, moh_loss, routers, train_routed
from manyheads.shrink.weights.skipping import skipping

EVERY = ["llama", "gpt2", "qwen3", "gemma2", "opt", "gpt_neox", "mixtral", "bloom", "bert"]
SKIPPED = ["llama", "qwen3", "gemma2", "opt", "mistral", "mixtral"]


def small(seed=0, layers=2, heads=8):
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(VOCAB, 64, layers, heads)).eval()


@pytest.mark.parametrize(
    ("name", "router"), [*((n, "learned") for n in EVERY), ("llama", "queries"), ("bloom", "queries")]
)
def test_routers_of_zero_that_choose_all_heads_change_nothing(name, router):
    model = opened(name)
    same = MoH(share=1.0, router=router, spread=0).convert(model)
    given = inputs_for(name)
    assert (same.logits(given) - model.logits(given)).abs().max() < 1e-5


def gates_of(model, given):
    """What each layer's gates are in a pass."""
    found = []
    with torch.no_grad():
        handles = [
            part.register_forward_pre_hook(
                lambda _, args, kwargs, r=router: found.append(r.gates), with_kwargs=True, prepend=True
            )
            for router, part in zip(
                routers(model.plain), (block.projection for block in model.layout.blocks), strict=True
            )
        ]
        model.plain(**given)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_every_chosen_gate_is_one_at_first_and_unchosen_ones_are_zero():
    for router in ("learned", "queries"):
        model = MoH(share=0.5, shared=1, router=router, spread=0).convert(opened("llama"))
        gates = gates_of(model, inputs_for("llama"))
        assert torch.equal(gates.unique(), torch.tensor([0.0, 1.0])) and (gates.sum(-1) == 2).all()
        assert (gates[..., 0] == 1).all()


def test_learned_gates_are_the_formula():
    model = MoH(share=0.75, shared=4, router="learned", spread=1.0).convert(mh.open_model(small()))
    given = inputs_for("llama")
    seen = []
    attention = model.layout.blocks[0].attention
    handle = attention.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["hidden_states"]), with_kwargs=True)
    gates = gates_of(model, given)[0]
    handle.remove()
    router, x = routers(model.plain)[0], seen[0]
    p = F.softmax(x @ router.W_r.weight.T, -1)
    a = 2 * F.softmax(x @ router.W_h.weight.T, -1)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            best = p[b, t].argsort(descending=True)[:2]
            wanted = torch.zeros(8)
            wanted[:4] = a[b, t, 0] * 4 * F.softmax(x[b, t] @ router.W_s.weight.T, -1)
            wanted[4 + best] = a[b, t, 1] * 2 * p[b, t, best] / p[b, t, best].sum()
            assert torch.allclose(gates[b, t], wanted, atol=1e-5)


def test_queries_choose_the_heads_with_the_longest_queries():
    model = mh.open_model(small())
    routed = MoH(share=0.75).convert(model)
    given = inputs_for("llama")
    gates = gates_of(routed, given)[0]
    x = model.plain.model.layers[0].input_layernorm(model.plain.model.embed_tokens(given["input_ids"]))
    norms = model.plain.model.layers[0].self_attn.q_proj(x).unflatten(-1, (8, -1))[..., 4:, :].norm(dim=-1)
    chosen = torch.zeros_like(norms).scatter(-1, norms.topk(2, -1).indices, 1.0)
    assert torch.equal(gates[..., 4:], chosen) and (gates[..., :4] == 1).all()


def test_gradients_pass_straight_through_hard_gates():
    routed = MoH(share=0.75).convert(mh.open_model(small()))
    router = routers(routed.plain)[0]
    output = torch.randn(2, 5, 64, requires_grad=True)
    router.see_queries(nn.Identity(), (), output)
    router.gates[..., 4:].square().sum().backward()
    assert output.grad.abs().sum() > 0
    norms = output.detach().unflatten(-1, (8, 8))[..., 4:, :].norm(dim=-1)
    p = F.softmax(norms / norms.std(-1, keepdim=True), -1)
    assert torch.equal(router.gates.detach()[..., 4:] > 0, p >= p.topk(2, -1).values[..., -1:])


@pytest.mark.parametrize(
    ("name", "router"), [*((n, "learned") for n in SKIPPED), ("llama", "queries"), ("gemma2", "queries")]
)
def test_skipping_unchosen_heads_is_masking_them(name, router):
    model = MoH(share=0.75, shared=1, router=router, spread=0.5).convert(opened(name))
    given = inputs_for(name)
    padded = torch.ones_like(given["input_ids"])
    padded[0, :3] = 0
    for inputs in (given, given | {"attention_mask": padded}):
        masked = model.logits(inputs)
        real = inputs.get("attention_mask", padded * 0 + 1).bool()
        with skipping(model):
            off = (model.logits(inputs) - masked)[real].abs().max()
        assert off < 1e-5 * max(1, float(masked.abs().max()))
    share = torch.cat([router.selected.float().mean((0, 1)) for router in routers(model.plain)]).mean()
    assert (1 + 3 * float(share)) / 4 == pytest.approx(0.75)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_skipped_heads_are_not_computed(name):
    # What is no number in the weights of unchosen heads comes through only where they are computed.
    model = MoH(share=0.5, shared=1, router="learned", spread=0).convert(mh.open_model(small()))
    model.plain.set_attn_implementation("eager")  # SDPA makes zeros of it
    given = inputs_for("llama")
    wanted = model.logits(given)
    unchosen = [1 + int(h) for h in (~routers(model.plain)[0].selected).flatten(0, 1).all(0).nonzero()[:, 0]]
    assert len(unchosen) == 4
    with torch.no_grad():
        for layer in model.plain.model.layers:
            weight = getattr(layer.self_attn, name).weight
            features = (
                weight.unflatten(0, (8, -1)) if name == "q_proj" else weight.unflatten(1, (8, -1)).transpose(0, 1)
            )
            features[unchosen] = torch.nan
    assert model.logits(given).isnan().any()
    with skipping(model):
        assert torch.allclose(model.logits(given), wanted, atol=1e-5)


def test_generation_with_a_cache_is_that_without_masked_and_skipping():
    model = MoH(share=0.75, router="learned", spread=0.5).convert(mh.open_model(small()))
    ids = inputs_for("llama", batch=2)["input_ids"]
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    wanted = model.plain.generate(ids, use_cache=False, **how)
    assert torch.equal(model.plain.generate(ids, **how), wanted)
    with skipping(model):
        assert torch.equal(model.plain.generate(ids, **how), wanted)


def test_budgets_may_differ_by_layer_and_the_source_stays():
    model = opened("llama")
    given = inputs_for("llama")
    before = model.logits(given)
    routed = MoH(share=[0.5, 0.75, 1.0], shared=1).convert(model)
    assert [router.active for router in routers(routed.plain)] == [1, 2, 3]
    assert torch.equal(model.logits(given), before) and not routers(model.plain)
    assert copy.deepcopy(routed.plain) is not None


def test_reads_and_edits_see_gated_heads():
    model = MoH(share=0.5, shared=1, router="learned", spread=0.5).convert(opened("llama"))
    given = inputs_for("llama")
    z = model.read_z(given)
    dead = torch.stack([~router.selected for router in routers(model.plain)])
    assert (z[..., 1:, :][dead] == 0).all() and model.proof.errors["projection"] < 1e-4
    plain = model.logits(given)
    with model.editing(mh.Scale(["L0H0"], 0.0)):
        assert (model.logits(given) - plain).abs().max() > 1e-3


def test_balance_is_the_formula_and_training_uses_it():
    model = MoH(share=0.75, shared=4, router="learned", spread=1.0).convert(mh.open_model(small()))
    ids = inputs_for("llama", batch=4)["input_ids"]
    model.plain.train()
    without, with_balance = (moh_loss(model.plain, {"input_ids": ids}, balance=b).item() for b in (0.0, 1.0))
    model.plain.eval()
    x = []
    handles = [
        block.attention.register_forward_pre_hook(lambda _, args, kw: x.append(kw["hidden_states"]), with_kwargs=True)
        for block in model.layout.blocks
    ]
    model.logits(ids)
    for handle in handles:
        handle.remove()
    wanted = []
    for router, seen in zip(routers(model.plain), x, strict=True):
        p = F.softmax(seen @ router.W_r.weight.T, -1).flatten(0, 1)
        f = torch.zeros_like(p).scatter(-1, p.topk(2, -1).indices, 1).mean(0)
        wanted.append(4 * (p.mean(0) * f).sum().item())
    assert with_balance - without == pytest.approx(sum(wanted) / 2, abs=1e-4)


def test_training_lowers_the_loss_and_loads_count_tokens():
    model = MoH(share=0.75, router="learned").convert(mh.open_model(small()))
    ids = torch.arange(8 * 16).reshape(8, 16) * 7 % 50 + 3
    before = float(moh_loss(model.plain, {"input_ids": ids}))
    train_routed(model, ids, replace(TUNING, steps=20, rate=3e-3))
    assert float(moh_loss(model.plain, {"input_ids": ids})) < before - 0.3
    found = loads(model, ids)
    assert all(float(each.sum()) == pytest.approx(2) for each in found)


def test_wrong_settings_are_refused():
    model = opened("llama")
    with pytest.raises(InputError, match="leaves none to choose"):
        MoH(share=0.5, shared=3).convert(model)
    with pytest.raises(InputError, match="3 layers"):
        MoH(share=[0.75]).convert(model)
    with pytest.raises(InputError, match="two heads"):
        MoH(share=1.0, shared=3).convert(model)
    with pytest.raises(InputError):
        MoH(router="best")
    with pytest.raises(UnsupportedError, match="routed already"):
        MoH().convert(MoH().convert(model))
    with pytest.raises(UnsupportedError, match="no routed heads"), skipping(model):
        pass


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize("damage", [{}, {"layers": [{"attention": "nowhere"}]}])
def test_damaged_settings_are_one_sentence(damage):
    with pytest.raises(InputError, match="do not fit LlamaForCausalLM"):
        install(copy.deepcopy(shared("llama")), damage)


@pytest.mark.parametrize(("name", "router"), [("llama", "learned"), ("gpt2", "queries")])
def test_a_saved_model_opens_again(tmp_path, name, router):
    model = MoH(share=0.75, shared=1, router=router, spread=0.5).convert(opened(name))
    given = inputs_for(name)
    model.save_pretrained(tmp_path / "routed")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "routed")
    again = mh.open_model(tmp_path / "routed")
    with torch.no_grad():
        assert torch.equal(plain(**given).logits, model.logits(given)) and torch.equal(
            again.logits(given), model.logits(given)
        )


def test_it_is_a_method_of_manyheads_shrink():
    assert shrink_way("moh")(0.25) == MoH(share=0.75)
