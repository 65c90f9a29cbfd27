"""GIM changes gradients and nothing else, by the paper's three rules, and finds what self-repair hides."""

import numpy as np
import pytest
import torch
from architectures import opened
from torch import nn

from manyheads.errors import InputError
from manyheads.trace.circuits.attribution_patching import attribution_patching
from manyheads.trace.circuits.gim import GradientRule, constant_denominators, gim


def pair(name):
    generator = torch.Generator().manual_seed(3)
    vocab = opened(name).vocab_size
    clean, corrupted = (torch.randint(5, vocab, (2, 6), generator=generator) for _ in range(2))
    return clean, corrupted


def metric(logits):
    return logits[:, -1, 7] - logits[:, -1, 3]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_the_forward_pass_stays_the_models_own(name):
    model, (clean, _) = opened(name), pair(name)
    plain = model.logits(clean)
    with model.editing(GradientRule(model.heads)), constant_denominators(model.plain):
        assert torch.allclose(model.logits(clean), plain, atol=1e-5)
    assert torch.equal(model.logits(clean), plain)


def test_the_softmax_is_differentiated_at_its_temperature_and_q_k_v_get_their_shares():
    """Against the paper's rule written out for one head, without norms or a model around it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)
    up = torch.randn(1, 4, 1, 3, generator=generator, dtype=torch.float64)

    class Call:
        pass

    rule = GradientRule([(0, 0)], temperature=2.0)
    q1, k1, v1 = (rule.change(0, part, x) for part, x in (("query", q), ("key", k), ("value", v)))
    call = Call()
    call.pattern = (q1 @ k1.transpose(-1, -2) + mask).softmax(-1)
    call.values_of = lambda heads: v1
    z = rule.attend(call, (call.pattern @ v1).transpose(1, 2))
    found = torch.autograd.grad((z * up).sum(), [q, k, v])

    with torch.no_grad():
        s = q @ k.transpose(-1, -2) + mask
        p, soft = s.softmax(-1), (s / 2).softmax(-1)
        dz = up.transpose(1, 2)
        dp = dz @ v.transpose(-1, -2)
        ds = soft * (dp - (soft * dp).sum(-1, keepdim=True))
        expected = [ds @ k / 4, ds.transpose(-1, -2) @ q / 4, p.transpose(-1, -2) @ dz / 2]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.LayerNorm(5), nn.RMSNorm(5, eps=1e-6)])
def test_a_norms_denominator_is_a_constant_on_the_way_back(norm):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nn.init.normal_(norm.weight)
    up = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    with constant_denominators(norm):
        out = norm(x)
    (found,) = torch.autograd.grad((out * up).sum(), x)
    with torch.no_grad():
        centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
        sigma = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        expected = up * norm.weight / sigma
        expected = expected - expected.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else expected
    assert torch.allclose(out, norm(x))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_head_that_another_stands_in_for_keeps_its_score():
    """Two equal keys share the weight; with the values equal too, the plain gradient to either key's score is zero."""
    scores = torch.tensor([[4.0, 4.0, 0.0]], dtype=torch.float64).requires_grad_()
    value = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    (plain,) = torch.autograd.grad((scores.softmax(-1) @ value).sum(), scores)

    class Call:
        pass

    call = Call()
    call.pattern = scores.softmax(-1)[None, None]
    call.values_of = lambda heads: value[None, None, :, None]
    z = GradientRule([(0, 0)]).attend(call, torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    (modified,) = torch.autograd.grad(z.sum(), scores)
    assert float(modified[0, 0] / plain[0, 0]) > 5


def test_without_temperature_and_shares_only_norms_differ_from_attribution_patching():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    rule = GradientRule(model.heads, temperature=1.0, shares={"query": 1.0, "key": 1.0, "value": 1.0})
    with model.editing(rule):
        same = attribution_patching(model, clean, corrupted, metric, keep=1)
    plain = attribution_patching(model, clean, corrupted, metric, keep=1)
    whole = gim(model, clean, corrupted, metric, keep=1)
    for site in plain.values:
        assert np.allclose(same.values[site], plain.values[site], atol=1e-5)
    assert not np.allclose(whole.values["z"], plain.values["z"], atol=1e-3)
    assert whole.meta["method"] == "GIM"


def test_a_temperature_below_one_is_refused():
    model, (clean, corrupted) = opened("llama"), pair("llama")
    with pytest.raises(InputError, match="temperature is"):
        gim(model, clean, corrupted, metric, temperature=0.5)
