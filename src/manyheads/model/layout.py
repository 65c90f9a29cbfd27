"""Where an architecture keeps its layers, output projections, norms and unembedding.

`find_layout` watches one small pass (`layouts.watching`) and takes what it saw: which list of layers computes attention, in which
module, through which projection, and which modules' outputs are added to the residual stream. A second pass proves it when
a model is opened (`proving.door`): a wrong guess is an error there, and not a wrong number later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from manyheads.errors import UnsupportedError
from manyheads.model.layouts.inputs import tiny_inputs
from manyheads.model.layouts.watching import SeenAttention, SeenLayer, Stack, has_interface, watched
from manyheads.model.linear import features_of

__all__ = ["Block", "Layout", "Part", "embedding_of", "find_layout", "parts_of", "tiny_inputs", "tower"]


class Absent(nn.Module):
    """Stands in a `Block` for what a layer does not have, an attention or an MLP; never called."""


@dataclass(frozen=True)
class Block:
    """One layer's modules, by role.

    The outputs of `attention_write` and `mlp_write` are added to the residual stream (times `Layout.residual_scale`);
    `post_norms`, if there are any, are the norms applied to the residual stream after each addition. `additions` are all of the
    layer's, in order, each with the norm after it: those two, and the other attention of a decoder that reads an encoder.
    `direct` says that the projection reads `pattern @ v` itself; otherwise a gate or a norm stands between the two.
    """

    module: nn.Module
    attention: nn.Module
    core: nn.Module
    projection: nn.Module
    attention_write: nn.Module
    mlp_write: nn.Module
    post_norms: tuple[nn.Module, nn.Module] | None
    additions: tuple[tuple[nn.Module, nn.Module | None], ...] = ()
    direct: bool = True


@dataclass(frozen=True)
class Layout:
    """What the rest of the model room needs to know of an architecture.

    `crosses`: its heads read another sequence than their own, as a decoder's cross-attention does. `head_dim` is the widest
    head's, where layers differ (Gemma 4). `counts` are the heads of each layer where these differ; `n_heads` is the largest then,
    and `n_kv_heads` as many, for keys and values are shown a query head. The heads that a layer does not have write zeros.
    """

    blocks: tuple[Block, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    final_norm: nn.Module | None
    embedding: nn.Module
    unembedding: nn.Module | None
    residual_scale: float
    has_interface: bool
    crosses: bool = False
    counts: tuple[int, ...] | None = None

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have heads; in a hybrid not all do."""
        return tuple(i for i, block in enumerate(self.blocks) if not isinstance(block.attention, Absent))

    def heads_in(self, layer: int) -> int:
        """How many heads a layer has, if it has attention."""
        return self.n_heads if self.counts is None else self.counts[layer]

    def by_heads(self, flat: torch.Tensor, layer: int) -> torch.Tensor:
        """What a layer's projection reads, or its matrix, by heads: `[..., H Dh] -> [..., H, Dh]`."""
        heads = flat.unflatten(-1, (self.heads_in(layer), -1))
        missing = self.n_heads - heads.shape[-2]
        return nn.functional.pad(heads, (0, 0, 0, missing)) if missing else heads

    def side_by_side(self, z: torch.Tensor, layer: int) -> torch.Tensor:
        """`by_heads`, undone."""
        return z[..., : self.heads_in(layer), :].flatten(-2)


Part = Literal["text", "vision", "audio", "encoder", "decoder", "cross"]
"""A part of a model of several: one of its modalities, or the self-attention or cross-attention of an encoder-decoder."""

MODALITIES: dict[str, tuple[str, ...]] = {
    "text": ("text_config", "text_encoder", "thinker_config"),
    "vision": ("vision_config", "image_config"),
    "audio": ("audio_config", "audio_encoder", "encoder_config"),
}


def parts_of(module: Any) -> tuple[Part, ...]:
    """The parts that `find_layout` or `tower` know of a model; none where it is one whole."""
    towers = tuple(part for part in MODALITIES if _tower(module, part) is not None)
    if len(towers) > 1:
        return towers  # type: ignore[return-value]
    try:
        labels = _labelled(watched(module, tiny_inputs(module)))
    except UnsupportedError:
        return ()
    return tuple(p for p in ("encoder", "decoder", "cross") if p in labels) if len(labels) > 1 else ()  # type: ignore[return-value]


def tower(module: Any, part: Part | None) -> Any:
    """The module to open for one modality of a model of several: its tower, or the whole where that answers with text."""
    if part not in MODALITIES:
        return module
    found = _tower(module, part)
    if found is None:
        raise UnsupportedError(_no_such_part(module, part))
    return found


def _tower(module: Any, part: str) -> Any:
    configs = [c for name in MODALITIES[part] if (c := getattr(module.config, name, None)) is not None]
    if not configs:
        return None
    if part == "text" and _unembedding(module) is not None:
        return module
    parts = [m for m in module.modules() if m is not module and getattr(m, "config", None) is not None]
    return next((m for c in configs for m in parts if m.config is c and hasattr(m, "main_input_name")), None)


def _no_such_part(module: Any, part: str) -> str:
    parts = parts_of(module)
    known = f"its parts are {', '.join(parts)}" if parts else "it is one whole; leave part out"
    return f"{type(module).__name__} has no part {part!r}: {known}."


def find_layout(module: Any, part: Part | None = None) -> Layout:
    """The layout of a Transformers model, or of the heads of one part. `UnsupportedError` names what was not found."""
    name = type(module).__name__
    towers = [p for p in MODALITIES if _tower(module, p) is not None]
    if len(towers) > 1 and part is None and "text" in towers and _tower(module, "text") is not module:
        raise UnsupportedError(f"{name} has several parts; open one of them: part={' or '.join(map(repr, towers))}.")
    stacks = watched(module, tiny_inputs(module))
    if not stacks:
        raise UnsupportedError(
            f"cannot read {name}: its pass shows no attention in a list of layers whose heads one linear map reads."
        )
    stack, layers = _chosen(module, _labelled(stacks), part)
    _check(name, stack, layers)
    blocks = tuple(_block(layer, found) for layer, found in zip(stack.layers, layers, strict=True))
    first = next(found for found in layers if found is not None)
    config = _config_of(module, first)
    counts = tuple(found.heads if found is not None else 0 for found in layers)
    n_kv_heads = _n_kv_heads(config, first)
    uneven = {(a.heads, _n_kv_heads(config, a)) for a in layers if a is not None} != {(max(counts), n_kv_heads)}
    return Layout(
        blocks=blocks,
        n_heads=max(counts),
        n_kv_heads=max(counts) if uneven else n_kv_heads,
        head_dim=max(found.head_dim for found in layers if found is not None),
        hidden_size=_features(first.projection)[1],
        final_norm=stack.final_norm if stack.layers[0].post_norms is None else None,
        embedding=embedding_of(module),
        unembedding=_unembedding(module),
        residual_scale=_residual_scale(config, stack.layers),
        has_interface=has_interface(first.core),
        crosses=part == "cross",
        counts=counts if uneven else None,
    )


_Labelled = dict[str, tuple[Stack, list[SeenAttention | None]]]


def _labelled(stacks: Sequence[Stack]) -> _Labelled:
    """Each kind of heads of a model by its name: "encoder", "decoder", "cross", or the path of its list of layers."""
    found: _Labelled = {}
    for stack in stacks:
        label = next((word for word in ("encoder", "decoder") if _named(stacks, word) is stack), stack.path)
        kinds = [
            [[a for a in layer.attentions if a.crosses is crosses] for layer in stack.layers]
            for crosses in (False, True)
        ]
        alone = len(stacks) == 1 and not any(a and b for a, b in zip(*kinds, strict=True))
        if alone:  # nothing else that it could read: keys of its own, pooled or remembered
            kinds = [[layer.attentions for layer in stack.layers]]
        for name, attentions in zip((label, "cross"), kinds, strict=False):
            if any(attentions):
                found[name] = stack, [a[0] if len(a) == 1 else None for a in attentions]
    return found


def _named(stacks: Sequence[Stack], word: str) -> Stack | None:
    """The one list of layers inside a module of this name, or else of a name that ends in it."""
    for fits in (str.__eq__, str.endswith):
        some = [s for s in stacks if any(fits(step, word) for step in s.path.split("."))]
        if some:
            return some[0] if len(some) == 1 else None
    return None


def _chosen(module: Any, labelled: _Labelled, part: str | None) -> tuple[Stack, list[SeenAttention | None]]:
    name = type(module).__name__
    if part in MODALITIES and len(labelled) == 1:
        part = None
    if part is None and len(labelled) > 1:
        encodes = "an encoder and a decoder" if {"encoder", "decoder"} <= set(labelled) else "several kinds of heads"
        parts = [p for p in labelled if p in ("encoder", "decoder", "cross")]
        raise UnsupportedError(
            f"{name} has {encodes}; open one of them: part={' or '.join(map(repr, parts))}."
            if parts
            else f"cannot read {name}: attention is computed in several lists of layers ({', '.join(labelled)})."
        )
    if part is not None and part not in labelled:
        raise UnsupportedError(_no_such_part(module, part))
    return labelled[part] if part is not None else next(iter(labelled.values()))


def _block(layer: SeenLayer, found: SeenAttention | None) -> Block:
    if found is None:
        none = Absent()
        return Block(layer.module, none, none, none, none, none, None)
    norms = layer.post_norms
    which = layer.attentions.index(found)
    writes = [*(a.write for a in layer.attentions), *([layer.mlp_write] if layer.mlp_write is not None else [])]
    return Block(
        layer.module,
        found.module,
        found.core,
        found.projection,
        found.write,
        layer.mlp_write or Absent(),
        (norms[which], norms[-1]) if norms else None,
        tuple(zip(writes, norms or [None] * len(writes), strict=True)) if layer.explained else (),
        found.direct,
    )


def _check(name: str, stack: Stack, layers: Sequence[SeenAttention | None]) -> None:
    repeated = [i for i, layer in enumerate(stack.layers) if layer.calls > 1]
    if repeated:
        times = stack.layers[repeated[0]].calls
        raise UnsupportedError(
            f"cannot read {name}: its layer {stack.path}.{repeated[0]} runs {times} times in one pass."
        )
    many = [
        i for i, layer in enumerate(stack.layers) if len({a.crosses for a in layer.attentions}) < len(layer.attentions)
    ]
    if many:
        n = len(stack.layers[many[0]].attentions)
        raise UnsupportedError(f"cannot read {name}: its layer {stack.path}.{many[0]} computes {n} attentions.")
    if any(found is not None and found.core is layer.module for found, layer in zip(layers, stack.layers, strict=True)):
        raise UnsupportedError(
            f"cannot read {name}: {stack.path} is a list of attentions, each without its layer around it."
        )
    if any(found is not None and found.positions_first for found in layers):
        raise UnsupportedError(f"cannot read {name}: it keeps positions before rows, [T, B, D], in {stack.path}.")


def _features(projection: nn.Module) -> tuple[int, int]:
    features = features_of(projection)
    assert features is not None
    return features


def _config_of(module: Any, found: SeenAttention) -> Any:
    config = getattr(found.core, "config", None) or getattr(found.module, "config", None) or module.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _n_kv_heads(config: Any, found: SeenAttention) -> int:
    n_heads, group = found.heads, getattr(found.core, "num_key_value_groups", None)
    if hasattr(config, "manyheads") and isinstance(group, int) and group > 0 and n_heads % group == 0:
        return n_heads // group  # what the config states was true of the layers before they were rebuilt
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        try:
            value = getattr(config, name, None)
        except Exception:  # a config that states it layer by layer raises an error of its own
            continue
        if isinstance(value, int) and value and n_heads % value == 0:
            return value
    return n_heads


def _residual_scale(config: Any, layers: Sequence[SeenLayer]) -> float:
    scales = [layer.scale for layer in layers if layer.attentions]
    stated = float(getattr(config, "residual_multiplier", None) or 1.0)
    close = all(abs(scale - scales[0]) < 1e-3 * scales[0] for scale in scales)
    if not close:
        return 1.0
    return stated if abs(scales[0] - stated) < 1e-2 * stated else scales[0]


def embedding_of(module: Any) -> nn.Module:
    """What turns inputs into states; for a model whose class does not say, the first module with weights that is no table."""
    try:
        found = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        found = None
    if isinstance(found, nn.Module):
        return found
    weighted = (
        m for m in module.modules() if isinstance(w := getattr(m, "weight", None), torch.Tensor) and w.ndim != 2
    )
    return next(weighted, module)


def _unembedding(module: Any) -> nn.Module | None:
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return head if isinstance(getattr(head, "weight", None), torch.Tensor) else None
