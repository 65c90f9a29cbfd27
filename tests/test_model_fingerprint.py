"""A fingerprint is that of the weights as they are, however they were changed, and is hashed again only when they were."""

import copy

import pytest
import torch
from architectures import build

import manyheads as mh
from manyheads.model import fingerprint as module_under_test
from manyheads.model.fingerprint import fingerprint


def weight_of(model):
    return model.plain.model.layers[1].self_attn.k_proj.weight


def swapped_rows(p):
    p.data[0], p.data[1] = p.data[1].clone(), p.data[0].clone()


def swapped_columns(p):
    p.data[:, 2], p.data[:, 5] = p.data[:, 5].clone(), p.data[:, 2].clone()


def swapped_eight_bytes(p):
    """Columns that lie in whole numbers of 64 bits, so that no row's sum notices."""
    p.data[:, :4], p.data[:, 4:8] = p.data[:, 4:8].clone(), p.data[:, :4].clone()


def swapped_halves_of_a_number(p):
    """Two floats that lie beside each other in eight bytes."""
    p.data[3, 4], p.data[3, 5] = p.data[3, 5].clone(), p.data[3, 4].clone()


@torch.no_grad()
def in_place(p):
    p.add_(1)


def last_bit(p):
    p.data.view(torch.int32)[-1, -1] ^= 1


CHANGES = [
    in_place,
    lambda p: p.data.mul_(2),
    lambda p: p.data.neg_(),
    last_bit,
    swapped_rows,
    swapped_columns,
    swapped_eight_bytes,
    swapped_halves_of_a_number,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_weight_is_told_at_once_and_undoing_it_too(change, dtype):
    if change is last_bit and dtype != torch.float32:
        return
    model = mh.open_model(build("llama").to(dtype))
    before, weight = model.fingerprint, weight_of(model)
    was = weight.detach().clone()
    change(weight)
    assert model.fingerprint == fingerprint(model.plain) != before
    weight.data.copy_(was)
    assert model.fingerprint == before


def test_loading_replacing_and_training_weights_are_told():
    model, other = mh.open_model(build("llama")), build("llama", seed=1)
    seen = [model.fingerprint]
    model.plain.load_state_dict(other.state_dict())
    seen.append(model.fingerprint)
    assert seen[1] == mh.open_model(other).fingerprint
    attention = model.plain.model.layers[1].self_attn
    attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight.detach() * 1.5)
    seen.append(model.fingerprint)
    optimizer = torch.optim.SGD(model.plain.parameters(), lr=0.1)
    model.plain(input_ids=torch.arange(5)[None], labels=torch.arange(5)[None], use_cache=False).loss.backward()
    optimizer.step()
    seen.append(model.fingerprint)
    with torch.no_grad():
        attention.k_proj.weight.zero_()
        attention.k_proj.weight.data = torch.zeros(64, 8)
    seen.append(model.fingerprint)
    assert len(set(seen)) == len(seen)
    assert seen[-1] == fingerprint(model.plain)


def test_a_model_that_stays_as_it_is_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(module_under_test, "fingerprint", lambda m: hashed.append(m) or fingerprint(m))
    model = mh.open_model(build("gpt2"))
    found = {model.fingerprint for _ in range(3)}
    model.logits(torch.arange(5)[None])
    with torch.no_grad():
        model.plain.lm_head.weight.mul_(1.0)  # counted as a change, but none: told by hashing again
    assert found | {model.fingerprint} == {fingerprint(copy.deepcopy(model.plain))} and len(hashed) == 2


def test_weights_that_count_no_versions_or_have_odd_shapes_are_followed_too():
    with torch.inference_mode():
        model = mh.open_model(build("llama"))
    before = model.fingerprint
    weight_of(model).data.mul_(2)
    assert model.fingerprint != before
    odd = mh.open_model(build("llama"))
    odd.plain.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.0)))
    odd.plain.register_parameter("flat", torch.nn.Parameter(torch.randn(7)[1:6]))  # begins in the middle of eight bytes
    for name in ("scale", "flat"):
        before = odd.fingerprint
        odd.plain.get_parameter(name).data.add_(1)
        assert odd.fingerprint != before
