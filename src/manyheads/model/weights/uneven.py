"""Layers of different sizes: each with its own numbers of heads, KV heads and MLP units, as an ordinary checkpoint.

The settings of the conversion `uneven` have the form of Transformers' `per_layer_config`, beside the paths of what is rebuilt:

    {"attention": "model.layers.{}.self_attn", "projection": "model.layers.{}.self_attn.o_proj", "mlp": "model.layers.{}.mlp",
     "per_layer_config": {"3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}, ...}}

A layer's attention, or MLP, is made anew by its own class from a config in which these counts are changed. They are kept here
and not in `per_layer_config` itself, where Transformers refuses counts that do not divide the width, and then hides the
global ones from its own models. A layer without heads adds the bias of its output projection, or nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_integer, clause
from manyheads.model.opened import OpenedModel
from manyheads.model.weights.converted import conversion, submodule

NAME = "uneven"
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_UNITS = "intermediate_size"


@conversion(NAME)
def install(module: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Make the attention and the MLP of each layer of `per_layer_config` anew, with its counts."""
    for layer, counts in settings["per_layer_config"].items():
        for name, value in counts.items():
            if name not in (*_HEADS, _UNITS):
                raise InputError(f"{name[:40]!r} is no count of a layer that can differ from the others'.")
            check_integer(value, f"{name} of layer {layer}", 0)
        heads = {name: counts[name] for name in _HEADS if name in counts}
        if heads.get("num_attention_heads") == 0:
            projection = submodule(module, settings["projection"].replace("{}", layer))
            _put(module, settings["attention"].replace("{}", layer), NoHeads(int(layer), projection))
        elif heads:
            _remake(module, settings["attention"].replace("{}", layer), heads, int(layer))
        if _UNITS in counts:
            _remake(module, settings["mlp"].replace("{}", layer), {_UNITS: counts[_UNITS]}, int(layer))


class NoHeads(nn.Module):
    """The attention of a layer that has lost all its heads: the bias of its output projection, or zeros.

    It keeps keys and values of no width, because a cache counts its tokens in a layer's keys.
    """

    def __init__(self, layer_idx: int, projection: nn.Module) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        bias = getattr(projection, "bias", None)
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(
        self, hidden_states: Float[Tensor, "B T D"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "B T D"], None]:
        """What the attention of the other layers returns: what it adds, and no pattern."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            none = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 0)
            cache.update(none, none, self.layer_idx)
        written = torch.zeros_like(hidden_states)
        return written if self.bias is None else written + self.bias, None


def _remake(module: PreTrainedModel, path: str, counts: Mapping[str, int], layer: int) -> None:
    old = submodule(module, path)
    shared = getattr(old, "config", module.config)
    config = copy.copy(shared)
    kind = type(old)
    try:
        for name, value in counts.items():
            setattr(config, name, value)
        new = kind(config, layer) if _UNITS not in counts else kind(config)
    except Exception as error:  # whatever a modelling file raises for counts or arguments that it did not expect
        raise UnsupportedError(f"{kind.__name__} cannot be made with {_said(counts)} ({clause(error)}).") from error
    for part in new.modules():
        if getattr(part, "config", None) is config:
            part.config = shared  # which kernel attention uses is switched there, for all layers at once
    _put(module, path, new.train(old.training))


def _put(module: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(submodule(module, owner), name, new)


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in counts.items())


# For whoever makes the settings


def paths(model: OpenedModel) -> dict[str, str]:
    """Where each layer's attention and its output projection are, with `{}` for the layer.

    `UnsupportedError` where no one class holds both.
    """
    names = {id(part): name for name, part in model.plain.named_modules()}
    found: dict[str, set[str]] = {"attention": set(), "projection": set()}
    for layer, block in enumerate(model.layout.blocks):
        whole, attention, projection = (names[id(part)] for part in (block.module, block.core, block.projection))
        if not projection.startswith(f"{attention}."):
            raise UnsupportedError(
                f"{type(model.plain).__name__} keeps its output projections outside of {type(block.core).__name__}, so that one "
                "layer cannot be made with other heads than the rest; prune as many in each, or mask them."
            )
        stem = whole.removesuffix(str(layer))
        for kind, path in (("attention", attention), ("projection", projection)):
            found[kind].add(f"{stem}{{}}{path.removeprefix(whole)}")
    odd = next((sorted(some) for some in found.values() if len(some) > 1), None)
    if odd is not None:
        raise UnsupportedError(
            f"layers of {type(model.plain).__name__} keep attention in different places: {', '.join(odd)}."
        )
    return {kind: some.pop() for kind, some in found.items()}


def shapes(model: OpenedModel, settings: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shape of every tensor of the model with these settings."""
    with torch.device("meta"):
        module = type(model.plain)(model.plain.config)
        install(module, settings)
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def left_over(model: OpenedModel, wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The biases that layers without heads still add, by their new names."""
    names = {id(part): name for name, part in model.plain.named_modules()}
    found = {}
    for block in model.layout.blocks:
        name, bias = f"{names[id(block.core)]}.bias", getattr(block.projection, "bias", None)
        if name in wanted and isinstance(bias, Tensor) and name not in model.plain.state_dict():
            found[name] = bias.detach()
    return found
