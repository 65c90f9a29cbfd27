"""Attention whose KV heads share keys and values. Each layer has its own groups of key heads, and others of value heads.

    z_h = softmax(q_h k_{dK(h)}^T / sqrt(Dh)) v_{dV(h)}                          dK, dV: KV head -> shared head, [Hkv] each

The attention's own forward runs, in any architecture that makes keys and values by a linear map of their own. The projections
give out every head's features, and the cache that the attention is handed keeps one head of each group (keys after rotation).
Without a cache nothing but the projections is ours. Where keys and values have the same groups, and all layers as many, this is
grouped-query attention, and `collapsed` makes an ordinary model of it: query heads are re-ordered so that groups are neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_integer
from manyheads.model.headmodel import HeadModel
from manyheads.model.layout import tiny_inputs
from manyheads.model.linear import is_plain
from manyheads.model.opened import OpenedModel
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.model.weights.converted import conversion, converted, submodule
from manyheads.model.weights.copies import agree, layout_in, rebuilt, settled, tiny_logits
from manyheads.model.weights.slices import HeadMap, Slices, head_map

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Grouping:
    """Which KV heads become one: for the keys and for the values of each layer, groups of equal size."""

    key: tuple[Groups, ...]
    value: tuple[Groups, ...]

    def __post_init__(self) -> None:
        for groups in (*self.key, *self.value):
            members = sorted(head for group in groups for head in group)
            if members != list(range(len(members))) or len({len(group) for group in groups}) != 1:
                raise InputError(f"{groups} are no groups of equal size that have each KV head once.")

    @property
    def share(self) -> float:
        """The part of the KV cache that stays."""
        both = (*self.key, *self.value)
        return sum(map(len, both)) / sum(len(group) for groups in both for group in groups)

    @property
    def is_plain(self) -> bool:
        """Whether this is grouped-query attention: keys and values share their groups, and layers have as many."""
        alike = all(set(k) == set(v) for k, v in zip(self.key, self.value, strict=True))
        return alike and len({len(groups) for groups in self.key}) == 1

    def of(self, layer: int, kind: Kind) -> Groups:
        """One layer's groups of keys or values."""
        return (self.key if kind == "key" else self.value)[layer]


def adjacent(model: HeadModel, heads: int) -> Grouping:
    """`heads` groups of neighbouring KV heads in every layer: the groups of grouped-query attention."""
    check_integer(heads, "heads", 1, model.n_kv_heads)
    if model.n_kv_heads % heads:
        raise InputError(f"{model.n_kv_heads} KV heads make no {heads} groups of equal size.")
    rows = np.arange(model.n_kv_heads).reshape(heads, -1).tolist()
    one = tuple(map(tuple, rows))
    return Grouping((one,) * model.n_layers, (one,) * model.n_layers)


# The form: projections that make shared heads, a cache that keeps one of each


class SharedHeads(nn.Module):
    """A projection whose output heads share: `y_h = x W[of h]^T + b[of h]`, and every head's features are given out.

    So an attention reads keys and values of all of its heads, as its forward expects them, whatever it does with them. It is no
    `nn.Linear`: what an adapter added to one of the heads would make it differ from those it shares with.
    """

    def __init__(self, linear: nn.Linear, of: Sequence[int], head_dim: int) -> None:
        super().__init__()
        self.of, self.head_dim = list(of), head_dim
        self.in_features, self.out_features = linear.in_features, linear.out_features
        members = [[h for h, c in enumerate(of) if c == group] for group in range(max(of) + 1)]

        def mean_pooled(tensor: Tensor) -> nn.Parameter:
            by_head = tensor.detach().unflatten(0, (-1, head_dim))
            return nn.Parameter(torch.cat([by_head[group].mean(0) for group in members]))

        self.weight = mean_pooled(linear.weight)
        self.bias = None if linear.bias is None else mean_pooled(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        heads = nn.functional.linear(x, self.weight, self.bias).unflatten(-1, (-1, self.head_dim))
        return heads[..., self.of, :].flatten(-2)


@dataclass(frozen=True)
class _Sharing:
    """A hook of an attention: the cache that it is given keeps one head of each group."""

    key: list[int]
    value: list[int]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def shared(given: Any) -> Any:
            return _SharedCache(given, self) if isinstance(given, Cache) else given

        return tuple(map(shared, args)), {name: shared(value) for name, value in kwargs.items()}


class _SharedCache:
    """A cache as one attention sees it: with keys and values of all heads, while those that are kept are the groups'."""

    def __init__(self, cache: Cache, sharing: _Sharing) -> None:
        self._cache, self._sharing = cache, sharing

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self._sharing.key, self._sharing.value
        here = self._cache.layers[layer_idx : layer_idx + 1]  # a dynamic cache makes its layers when they come
        if max(key) != max(value) and any(isinstance(layer, StaticLayer) for layer in here):
            raise UnsupportedError(
                f"a static cache has as many key heads as value heads, and layer {layer_idx} has {max(key) + 1} and "
                f"{max(value) + 1}; use a dynamic cache."
            )
        kept = (keys[:, _firsts(key)], values[:, _firsts(value)])
        all_keys, all_values = self._cache.update(*kept, layer_idx, *args, **kwargs)
        return all_keys[:, key], all_values[:, value]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _firsts(of: list[int]) -> list[int]:
    return [of.index(group) for group in range(max(of) + 1)]


@conversion("shared_heads")
def install(module: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Give the attentions named in `settings` shared key and value heads, at first the means of those that share."""
    try:
        head_dim, layers = settings["head_dim"], settings["layers"]
        for layer in layers:
            for kind in KINDS:
                path, of = layer[kind]["path"], layer[kind]["heads"]
                linear = submodule(module, path)
                if not _fits(linear, of, head_dim):
                    raise ValueError(f"{path} does not make these heads")
                owner, _, name = path.rpartition(".")
                setattr(submodule(module, owner), name, SharedHeads(linear, of, head_dim))
            sharing = _Sharing(*(list(layer[kind]["heads"]) for kind in KINDS))
            submodule(module, layer["attention"]).register_forward_pre_hook(sharing, with_kwargs=True)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"these settings of shared heads do not fit {type(module).__name__}: {reason}.") from error


def _fits(linear: Any, of: list[int], head_dim: int) -> bool:
    whole = isinstance(linear, nn.Linear) and linear.out_features == len(of) * head_dim
    return whole and sorted(set(of)) == list(range(max(of) + 1))


# The model's heads in its weights


@dataclass(frozen=True)
class Source:
    """A model whose keys and values each have a linear map of their own, and the paths of these maps."""

    model: OpenedModel
    maps: dict[int, HeadMap]
    paths: dict[nn.Module, str]

    @classmethod
    def of(cls, model: OpenedModel) -> Source:
        base = settled(model)
        name = type(base.plain).__name__
        if base.n_kv_heads == 1:
            raise UnsupportedError(f"{name} has one KV head a layer; there is nothing left to share.")
        maps = head_map(base)
        paths = {part: path for path, part in base.plain.named_modules()}
        seen: set[nn.Module] = set()
        for layer, one in maps.items():
            for part in (one.key, one.value):
                _check_projection(name, layer, part)
                if part.module in seen:
                    raise UnsupportedError(f"layers of {name} share their weights, and groups would be one layer's.")
                seen.add(part.module)
            if any(not vector.of_query for vector in one.vectors):
                raise UnsupportedError(
                    f"{name} has numbers for each KV head beside its projections (a norm over all of them), so that heads of "
                    "equal weights are not equal."
                )
        return cls(base, maps, paths)

    def slices(self) -> Iterable[tuple[int, Kind, Slices]]:
        for layer, one in self.maps.items():
            yield layer, "key", one.key
            yield layer, "value", one.value

    def path(self, part: Slices) -> str:
        return self.paths[part.module]

    def settings(self, grouping: Grouping) -> dict[str, Any]:
        """What `install` is told."""
        layers = []
        for layer, one in self.maps.items():
            parts = {"key": one.key, "value": one.value}
            heads = {kind: shared_head_of(grouping.of(layer, kind)) for kind in KINDS}
            layer_settings: dict[str, Any] = {
                kind: {"path": self.path(parts[kind]), "heads": heads[kind]} for kind in KINDS
            }
            layers.append({"attention": self.paths[self.model.layout.blocks[layer].attention], **layer_settings})
        return {"head_dim": self.model.head_dim, "layers": layers}


def _check_projection(name: str, layer: int, part: Slices) -> None:
    features = part.index.numel()
    own = isinstance(part.module, nn.Linear) and part.module.out_features == features
    if not own or not is_plain(part.module):
        raise UnsupportedError(
            f"the keys and values of layer {layer} of {name} are not made by an nn.Linear of their own (a common map of q, k and "
            "v, or quantised weights), so their heads cannot be fused."
        )
    if not torch.equal(part.index.flatten(), torch.arange(features)):
        raise UnsupportedError(f"the KV heads of layer {layer} of {name} do not follow each other in its weights.")


def shared_head_of(groups: Groups) -> list[int]:
    """The number of the group of each KV head."""
    number = {head: c for c, group in enumerate(groups) for head in group}
    return [number[head] for head in range(len(number))]


def mean_pooled(model: HeadModel, grouping: Grouping) -> HeadModel:
    """A copy whose groups have the mean of their heads, without any training: mean pooling."""
    return collapsed(model, grouping, {})


def collapsed(model: OpenedModel, grouping: Grouping, heads: Mapping[str, Mapping[str, Tensor]]) -> HeadModel:
    """A copy with shared heads: those given by the path of their projection, else means.

    An ordinary model with grouped queries where that is the same.
    """
    source = Source.of(model)
    base = source.model
    whole = base if isinstance(base, HeadModel) else HeadModel(base.plain, base.tokenizer, base.layout)
    shared = converted(whole, "shared_heads", source.settings(grouping))
    for path, parameters in heads.items():
        shared.plain.get_submodule(path).load_state_dict(dict(parameters))
    _check_cached(shared.plain)
    plain = _as_config(source, grouping, shared.plain) if grouping.is_plain else None
    return shared if plain is None else plain


def _check_cached(module: Any) -> None:
    """With a cache the logits must be those without: some attentions give theirs other things than keys and values by head."""
    if not no_cache(module) or "input_ids" not in tiny_inputs(module):
        return
    ids = tiny_inputs(module)["input_ids"]
    whole = tiny_logits(module)
    with torch.no_grad():
        cache = getattr(module(input_ids=ids[:, :-2], use_cache=True), "past_key_values", None)
        if cache is None:  # an encoder
            return
        last = module(input_ids=ids[:, -2:], past_key_values=cache, use_cache=True)
    if not agree(whole[:, -2:], first_logits(last)):
        raise UnsupportedError(
            f"the attention of {type(module).__name__} gives its cache something else than keys and values by head, so "
            "heads cannot share what is kept."
        )


def _as_config(source: Source, grouping: Grouping, shared: Any) -> HeadModel | None:
    """The model with `shared`'s logits whose config alone says how many KV heads there are; None where there is no such."""
    model = source.model
    config = copy.deepcopy(model.plain.config)
    if getattr(config, "num_key_value_heads", None) != model.n_kv_heads:
        return None
    config.num_key_value_heads = len(grouping.key[0])
    state = dict(model.plain.state_dict())
    for layer, one in source.maps.items():
        groups = grouping.of(layer, "key")
        for kind, part in (("key", one.key), ("value", one.value)):
            order = [shared_head_of(grouping.of(layer, kind))[group[0]] for group in groups]  # type: ignore[arg-type]
            state |= _by_head(shared, source.path(part), order, model.head_dim)
        size = model.n_heads // model.n_kv_heads
        heads = torch.tensor([head for group in groups for g in group for head in range(g * size, (g + 1) * size)])
        for parameter, dim, index, moved in _query_features(one, heads):
            key = next(name for name, own in model.plain.named_parameters(remove_duplicate=False) if own is parameter)
            state[key] = state[key].index_copy(dim, index, state[key].index_select(dim, moved))
    try:
        module, missing = rebuilt(model.plain, config, state)
    except UnsupportedError:
        return None
    if missing or not agree(tiny_logits(shared), tiny_logits(module)):
        return None
    layout = replace(layout_in(module, model), n_kv_heads=config.num_key_value_heads)
    return HeadModel(module, model.tokenizer, layout)


def _by_head(shared: Any, path: str, order: list[int], head_dim: int) -> dict[str, Tensor]:
    parameters = shared.get_submodule(path).named_parameters()
    return {
        f"{path}.{name}": value.detach().unflatten(0, (-1, head_dim))[order].flatten(0, 1) for name, value in parameters
    }


def _query_features(one: HeadMap, heads: Tensor) -> Iterator[tuple[nn.Parameter, int, Tensor, Tensor]]:
    """Of each parameter with numbers for query heads: the features of all heads, and those that move there."""
    for part in (one.query, one.output):
        for name, dim in (("weight", part.dim), ("bias", 0)):
            parameter = getattr(part.holder, name, None)
            if isinstance(parameter, nn.Parameter) and (name == "weight" or part is one.query):
                yield parameter, dim, part.index.flatten(), part.index[heads].flatten()
    for vector in one.vectors:
        yield (
            vector.module.get_parameter(vector.name),
            0,
            vector.index.flatten(),
            vector.index[heads].flatten(),
        )
