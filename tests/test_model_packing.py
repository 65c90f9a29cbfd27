"""Packed linear layers give the model's own numbers, and leave no trace."""

import pytest
import torch
from architectures import opened, shared
from torch import nn

from manyheads.draft.core.decode import generate
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.medusa import Medusa
from manyheads.draft.drafters.prompt_lookup import PromptLookup
from manyheads.model.packing import Packed

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch comes without oneDNN")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))


@pytest.mark.parametrize("shape", [(1, 12), (5, 12), (2, 3, 12), (0, 12)])
def test_the_products_are_those_of_the_layers_and_run_only_inside(shape):
    module, x = layers(), torch.randn(shape)
    seen = []
    module[0].register_forward_hook(lambda *_: seen.append(True))
    with torch.inference_mode():
        wanted = module(x)
        with Packed(module, wanted=True) as packing:
            assert packing.on and "forward" in vars(module[0])
            with packing:
                pass
            assert torch.allclose(module(x), wanted, atol=1e-6)
    assert "forward" not in vars(module[0]) and len(seen) == 2


def test_weights_that_changed_are_packed_again_and_gradients_are_the_layers_own():
    module, x = layers(), torch.randn(3, 12)
    with Packed(module, wanted=True), torch.inference_mode():
        before = module(x)
    with torch.no_grad():
        module[0].weight.mul_(2)
    with Packed(module, wanted=True):
        with torch.inference_mode():
            after = module(x)
        module(x).sum().backward()
    with torch.inference_mode():
        assert torch.allclose(after, module(x), atol=1e-6) and not torch.allclose(after, before, atol=1e-2)
    assert module[0].weight.grad.abs().sum() > 0


def test_matrices_that_are_no_layers_are_packed_too():
    medusa = Medusa(DraftTrunk(opened("llama")), 2, vocabulary=[3, 5, 9, 12])
    shared_rows = Medusa(DraftTrunk(opened("llama")), 2, own_readout=False, vocabulary=[3, 5, 9, 12])
    states = torch.randn(1, 3, medusa.readouts.weights[0].shape[1])
    for heads in (medusa.readouts, shared_rows.readouts):
        trunk = DraftTrunk(opened("llama"))
        with torch.inference_mode():
            wanted = heads(trunk, 1, states)
            with Packed(heads, wanted=True):
                assert heads._packed is not None and torch.allclose(heads(trunk, 1, states), wanted, atol=1e-6)
        assert heads._packed is None


def test_what_is_no_plain_layer_stays_as_it_is():
    module = layers()
    module[2] = module[2].double()
    with Packed(module, wanted=True):
        assert "forward" in vars(module[0]) and "forward" not in vars(module[2])
    with Packed(module, wanted=False) as packing:
        assert not packing.on and "forward" not in vars(module[0])


def test_generation_leaves_the_model_as_it_was_also_after_an_error():
    model = opened("llama")
    generate(model, PromptLookup(), torch.tensor([[5, 6, 7, 5, 6]]), max_new_tokens=6, packed=True)

    class Broken(PromptLookup):
        def found(self, text):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        generate(model, Broken(), torch.tensor([[5, 6, 7]]), max_new_tokens=6, packed=True)
    assert not any("forward" in vars(module) for module in shared("llama").modules() if isinstance(module, nn.Linear))
