"""Hooks see and change what a module is given and returns, by position or keyword, and leave nothing behind."""

import pytest
import torch
from architectures import build
from torch import nn

from manyheads.model.hooks import caught, entering, frozen, hidden_of, hooked, leaving, stoppable, with_hidden


class Pair(nn.Module):
    """Twice its hidden states, and how often it was called, as blocks return a tuple."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states, scale=2.0):
        self.calls += 1
        return hidden_states * scale, self.calls


X = torch.arange(6.0).reshape(1, 2, 3)


def hooks_of(module):
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def calls(module):
    """The module called in each way in which architectures call theirs."""
    return [module(X), module(hidden_states=X), module(X, scale=2.0), module(scale=2.0, hidden_states=X)]


def test_hidden_states_are_replaced_however_they_were_given():
    module = Pair()
    with entering(module, lambda hidden: hidden + 1):
        assert all(torch.equal(out[0], (X + 1) * 2) for out in calls(module))
    assert all(torch.equal(out[0], X * 2) for out in calls(module)) and hooks_of(module) == 0
    args, kwargs = with_hidden((), {"hidden_states": X, "scale": 3.0}, X + 1)
    assert torch.equal(hidden_of(args, kwargs), X + 1) and kwargs["scale"] == 3.0


def test_the_first_tensor_is_replaced_and_what_comes_with_it_stays():
    module, plain = Pair(), nn.Identity()
    with leaving(module, lambda first: first - 1), leaving(plain, lambda first: first - 1):
        out = module(X)
        assert torch.equal(out[0], X * 2 - 1) and out[1] == 1 and torch.equal(plain(X), X - 1)


def test_a_change_that_is_none_leaves_everything_as_it_is():
    module, seen = Pair(), []
    with entering(module, lambda hidden: seen.append(hidden)), leaving(module, lambda first: seen.append(first)):
        out = module(X)
    assert torch.equal(out[0], X * 2) and seen[0] is X and torch.equal(seen[1], X * 2)


def test_hooks_are_gone_after_an_exception():
    module = Pair()
    blocks = [
        lambda: hooked(module, before=lambda *_: None, after=lambda *_: None),
        lambda: caught(module),
        lambda: entering(module, lambda hidden: hidden),
        lambda: leaving(module, lambda first: first),
    ]
    for block in blocks:
        with pytest.raises(KeyError), block():
            assert hooks_of(module) > 0
            raise KeyError
        assert hooks_of(module) == 0


def test_what_modules_gave_and_were_given_is_caught_in_the_order_of_their_calls():
    first, second = Pair(), Pair()
    with caught(first, second) as outputs, caught(second, first, side="input", keep=torch.Tensor.clone) as inputs:
        for module in (second, first, second):
            module(hidden_states=X + module.calls)
    assert [float(out[0, 0, 0]) for out in outputs] == [0.0, 0.0, 2.0]
    assert all(torch.equal(a * 2, b) for a, b in zip(inputs, outputs, strict=True))
    with caught(first, keep=lambda output: output) as whole:
        first(X)
    assert whole[0][1] == 2
    first(X)
    assert len(whole) == 1 and len(outputs) == 3


def test_a_pass_ends_where_it_is_stopped_and_other_errors_go_on():
    body, last = nn.Sequential(first := Pair(), nn.Identity()), nn.Identity()
    with caught(last) as reached, stoppable() as stop, hooked(first, after=stop):
        last(body(X))
    assert not reached and first.calls == 1 and hooks_of(first) == 0
    with pytest.raises(ZeroDivisionError), stoppable():
        raise ZeroDivisionError
    with stoppable():
        pass


def test_an_inner_block_does_not_swallow_what_an_outer_one_stopped_for():
    after_inner = []
    with stoppable() as outer:
        with stoppable():
            outer()
        after_inner.append("inner block went on")
    assert not after_inner
    with stoppable():
        with stoppable() as inner:
            inner()
        after_inner.append("outer block went on")
    assert after_inner == ["outer block went on"]


def test_a_stopped_pass_keeps_none_of_its_tensors_alive():
    import gc
    import weakref

    module, alive = Pair(), []
    gc.disable()
    try:
        with (
            stoppable() as stop,
            hooked(module, after=lambda m, args, out: (alive.append(weakref.ref(out[0])), stop())),
        ):
            module(X)
        assert alive[0]() is None
    finally:
        gc.enable()


def test_frozen_gives_every_requires_grad_back_as_it_was():
    model = build("gpt2")
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 3 != 0)
    before = [parameter.requires_grad for parameter in parameters]
    with pytest.raises(KeyError), frozen(model, but=[parameters[1], parameters[3]]):
        assert [i for i, p in enumerate(parameters) if p.requires_grad] == [1]
        parameters[0].requires_grad_(True)
        raise KeyError
    assert [parameter.requires_grad for parameter in parameters] == before
