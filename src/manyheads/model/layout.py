"""Where an architecture keeps its layers, output projections, norms and unembedding.

The table `SHAPES` lists the ways in which Transformers' decoder and encoder blocks name their parts. `find_layout` takes
the first one that fits every block. A real forward pass then proves it when a model is opened (`proving.door`): a
wrong guess is an error there, and not a wrong number later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.model.linear import features_of


@dataclass(frozen=True)
class Shape:
    """Names of a block's parts, relative to the block.

    `attention_write` and `mlp_write` name the modules whose outputs are added to the residual stream (times
    `Layout.residual_scale`); `post_norms`, if there are any, the norms applied to the residual stream after each addition.
    """

    attention: str
    projection: str
    mlp_write: str
    core: str = ""
    attention_write: str | None = None
    post_norms: tuple[str, str] | None = None


_PAIRS = [
    ("self_attn", "o_proj", "mlp"),
    ("attn", "c_proj", "mlp"),
    ("attention", "o_proj", "mlp"),
    ("attention", "dense", "mlp"),
    ("self_attn", "dense", "mlp"),
    ("attn", "Wo", "mlp"),
    ("attn", "out_proj", "mlp"),
    ("self_attn", "out_proj", "mlp"),
    ("self_attention", "dense", "mlp"),
]
SHAPES: tuple[Shape, ...] = (
    # Norms after the sublayers, inside the residual branch: Gemma 2 and 3, OLMo 2.
    Shape(
        "self_attn",
        "o_proj",
        "post_feedforward_layernorm",
        attention_write="post_attention_layernorm",
    ),
    # Layer scales: DINOv2.
    Shape("attention", "o_proj", "layer_scale2", attention_write="layer_scale1"),
    # Norms after each addition: BERT, RoBERTa.
    Shape(
        "attention",
        "output.dense",
        "output.dense",
        core="self",
        post_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    # The MLP module adds the residual itself: BLOOM, MPT.
    Shape("self_attention", "dense", "mlp.dense_4h_to_h"),
    Shape("attn", "out_proj", "ffn.down_proj"),
    # No MLP module: OPT.
    Shape("self_attn", "out_proj", "fc2"),
    *(Shape(*names) for names in _PAIRS),
)
_FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "final_norm",
    "layernorm",
    "decoder.final_layer_norm",
    "decoder.norm",
)


@dataclass(frozen=True)
class Block:
    """One layer's modules, by role."""

    module: nn.Module
    attention: nn.Module
    core: nn.Module
    projection: nn.Module
    attention_write: nn.Module
    mlp_write: nn.Module
    post_norms: tuple[nn.Module, nn.Module] | None


@dataclass(frozen=True)
class Layout:
    """What the rest of the model room needs to know of an architecture."""

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

    @property
    def n_layers(self) -> int:
        return len(self.blocks)


Part = Literal["text", "vision", "audio", "encoder", "decoder", "cross"]
"""A part of a model of several: one of its modalities, or the self-attention or cross-attention of an encoder-decoder."""


def find_layout(module: Any, part: Part | None = None) -> Layout:
    """The layout of a Transformers model. `UnsupportedError` names what was looked for and not found."""
    if part is not None:
        raise UnsupportedError(f"{type(module).__name__} has no part {part!r} that can be opened.")
    config = module.config
    name = type(module).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name} has an encoder and a decoder; open one of the two (for example model.get_encoder()) by itself."
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = getattr(text, "num_hidden_layers", None)
    n_heads = getattr(text, "num_attention_heads", None)
    if not isinstance(n_layers, int) or not isinstance(n_heads, int):
        raise UnsupportedError(f"the config of {name} has no num_hidden_layers and num_attention_heads.")
    path, blocks = _find_blocks(module, n_layers)
    trunk = module.get_submodule(path.rpartition(".")[0])
    width, hidden_size = features_of(blocks[0].projection) or (0, 0)
    if width % n_heads:
        raise UnsupportedError(
            f"the output projection of {name} reads {width} features, no multiple of its {n_heads} heads."
        )
    return Layout(
        blocks=blocks,
        n_heads=n_heads,
        n_kv_heads=_n_kv_heads(text, n_heads),
        head_dim=width // n_heads,
        hidden_size=hidden_size,
        final_norm=_final_norm(module, trunk) if blocks[0].post_norms is None else None,
        embedding=module.get_input_embeddings(),
        unembedding=_unembedding(module),
        residual_scale=float(getattr(text, "residual_multiplier", 1.0)),
        has_interface=_has_interface(blocks[0].core),
    )


def _find_blocks(module: Any, n_layers: int) -> tuple[str, tuple[Block, ...]]:
    stacks = [
        (path, stack)
        for path, stack in module.named_modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == n_layers
    ]
    for shape in SHAPES:
        for path, stack in stacks:
            blocks = [_block(block, shape) for block in stack]
            if all(block is not None for block in blocks):
                return path, tuple(block for block in blocks if block is not None)
    looked = sorted({f"{s.attention}.{s.projection}" for s in SHAPES})
    raise UnsupportedError(
        f"cannot read {type(module).__name__}: looked for a list of {n_layers} layers that each hold an attention "
        f"output projection under one of the names {', '.join(looked)}, and found none."
    )


def _block(module: nn.Module, shape: Shape) -> Block | None:
    attention = _sub(module, shape.attention)
    projection = _sub(attention, shape.projection)
    core = _sub(attention, shape.core)
    mlp_write = _sub(module, shape.mlp_write)
    attention_write = projection if shape.attention_write is None else _sub(module, shape.attention_write)
    parts = [attention, projection, core, mlp_write, attention_write]
    # Names alone are not enough here: `mlp.dense_4h_to_h` also exists where `mlp` does not add the residual (GPT-NeoX).
    if shape.mlp_write == "mlp.dense_4h_to_h" and "residual" not in _arguments(_sub(module, "mlp")):
        return None
    if shape.post_norms is not None:
        norms = [_sub(module, name) for name in shape.post_norms]
        if None in norms:
            return None
        post_norms = (norms[0], norms[1])
    else:
        post_norms = None
    if any(part is None for part in parts) or features_of(projection) is None:  # type: ignore[arg-type]
        return None
    return Block(module, attention, core, projection, attention_write, mlp_write, post_norms)  # type: ignore[arg-type]


def _sub(module: nn.Module | None, path: str) -> nn.Module | None:
    if module is None or not path:
        return module
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _arguments(module: nn.Module | None) -> tuple[str, ...]:
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    return code.co_varnames[: code.co_argcount] if code else ()


def _n_kv_heads(config: Any, n_heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return n_heads


def _final_norm(module: Any, trunk: nn.Module) -> nn.Module | None:
    places = [trunk, getattr(module, "base_model", module)]
    found = (_sub(place, name) for place in places for name in _FINAL_NORMS)
    return next((norm for norm in found if norm is not None), None)


def _unembedding(module: Any) -> nn.Module | None:
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return head if isinstance(getattr(head, "weight", None), torch.Tensor) else None


def _has_interface(core: nn.Module) -> bool:
    """Whether attention of this class goes through Transformers' `AttentionInterface`."""
    code = getattr(type(core).forward, "__code__", None)
    wrapped = getattr(type(core).forward, "__wrapped__", None)
    codes = [c for c in (code, getattr(wrapped, "__code__", None)) if c is not None]
    return any("ALL_ATTENTION_FUNCTIONS" in c.co_names for c in codes)


def tiny_inputs(module: Any) -> dict[str, Tensor]:
    """Four tokens, or one image of the size the config states."""
    embedding = module.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    device = next(module.parameters()).device
    if getattr(module, "main_input_name", "input_ids") == "pixel_values":
        size = module.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        dtype = next(module.parameters()).dtype
        return {"pixel_values": torch.zeros(1, module.config.num_channels, height, width, device=device, dtype=dtype)}
    if isinstance(weight, Tensor) and weight.ndim == 2:
        device = weight.device if not weight.is_meta else torch.device("cpu")
        return {"input_ids": torch.arange(4, device=device)[None] % weight.shape[0]}
    raise UnsupportedError(
        f"{type(module).__name__} reads {module.main_input_name}; only token ids and pixels are known."
    )
