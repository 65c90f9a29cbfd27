"""From edits to weights: folding them into the output projections, and saving what that gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.files import write_folder_atomically
from manyheads.model.editing.edits import Edit, compose_affine
from manyheads.model.layout import Layout, tiny_inputs
from manyheads.model.linear import base_of, is_plain, projection_matrix
from manyheads.model.offloading import is_away, own_copy
from manyheads.model.opened import OpenedModel
from manyheads.model.weights.copies import EXACT, agree, layout_in, rebuilt, settled, tiny_logits

Parts = tuple[nn.Module, Any, Layout]
ByLayer = list[tuple[Float[Tensor, "H"], Float[Tensor, "H Dh"]]]


def baked(model: OpenedModel, edits: Sequence[Edit]) -> Parts:
    """Fold edits of the form `z -> scale z + shift` into the output projections of a copy of the model:

    W_O[h] <- scale_h W_O[h],    b_O <- b_O + sum_h shift_h W_O[h]

    computed in float32 at least, and kept in the type of the weights. Adapters are merged first. `InputError` for edits whose
    numbers are not finite or not as wide as a head. `UnsupportedError` for weights
    that cannot be rewritten, for constants where there can be no bias, and if the copy's logits are not those of the edits.
    """
    if not model.layout.crosses:  # what is baked is the output projection, whatever was read
        model.require_alike("baking", every_layer=False)
    affine = _composed(model, edits)
    base = settled(model)
    check_plain(type(model.plain).__name__, [base.layout.blocks[i].projection for i in base.layout.attention_layers])
    _check_unshared(base, affine)
    needs_bias = any(
        bool(shift.any()) and getattr(block.projection, "bias", None) is None
        for (_, shift), block in zip(affine, base.layout.blocks, strict=True)
    )
    module = _with_bias(base) if needs_bias else base.plain if base is not model else own_copy(model.plain)
    layout = layout_in(module, base)
    with torch.no_grad():
        for layer, ((scale, shift), block) in enumerate(zip(affine, layout.blocks, strict=True)):
            if bool((scale != 1).any() or shift.any()):
                own = slice(layout.heads_in(layer))
                _fold(block.projection, scale[own], shift[own])
    if next(base.plain.parameters()).dtype in EXACT:
        with model.editing(*edits):
            wanted = model.logits(tiny_inputs(model.plain))
        if not bool(wanted.isfinite().all()):
            raise InputError("under this edit the model's logits are not finite; make it weaker.")
        if not agree(wanted, tiny_logits(module)):
            raise UnsupportedError(
                f"{type(model.plain).__name__} does more with its heads' outputs than its output projections say, so that this "
                "edit cannot be baked; keep it as it is."
            )
    return module, model.tokenizer, layout


def _composed(model: OpenedModel, edits: Sequence[Edit]) -> ByLayer:
    try:
        found = [compose_affine(edits, layer, model.n_heads, model.head_dim) for layer in range(model.n_layers)]
    except RuntimeError as error:
        raise InputError(f"what these edits add is not as wide as a head, {model.head_dim}: {error}") from None
    if not all(bool(part.isfinite().all()) for parts in found for part in parts):
        raise InputError("these edits multiply by or add what is no finite number; give finite ones.")
    return found


def _fold(projection: nn.Module, scale: Float[Tensor, "H"], shift: Float[Tensor, "H Dh"]) -> None:
    weight = projection_matrix(projection)
    # In half precision a scale such as 0.3 would itself be rounded first.
    exact = torch.promote_types(weight.dtype, torch.float32)
    old = weight.to(exact)
    if bool(shift.any()):
        bias: Any = projection.bias
        bias.copy_(bias.to(exact) + shift.to(old).flatten() @ old)
    new = scale.to(old).repeat_interleave(shift.shape[1])[:, None] * old
    if bool((new.abs() > torch.finfo(weight.dtype).max).any()):
        raise InputError(f"this edit makes weights that {weight.dtype} cannot hold; make it weaker.")
    weight.copy_(new)


def _check_unshared(model: OpenedModel, affine: ByLayer) -> None:
    """Layers that share one projection (ALBERT) share what is baked into it."""
    of: dict[int, int] = {}
    for layer in model.layout.attention_layers:
        first = of.setdefault(id(model.layout.blocks[layer].projection.weight), layer)
        same = all(torch.equal(a, b) for a, b in zip(affine[first], affine[layer], strict=True))
        if first != layer and (not same or bool((affine[layer][0] != 1).any() or affine[layer][1].any())):
            raise UnsupportedError(
                f"layers {first} and {layer} of {type(model.plain).__name__} share their weights, so that an edit of one of "
                "them cannot be baked; keep it as it is."
            )


def _with_bias(model: OpenedModel) -> nn.Module:
    """A copy whose output projections have a bias, if the config allows one; the other biases that come with it are zero."""
    module = model.plain
    config = copy.deepcopy(module.config)
    name = type(module).__name__
    if not hasattr(config, "attention_bias"):
        raise UnsupportedError(
            f"this edit adds a constant to z, which needs a bias in the output projection, and the config of {name} "
            "cannot have one. Scaling and zero ablation can be baked; constants stay an edit."
        )
    config.attention_bias = True
    new, missing = rebuilt(module, config, module.state_dict())
    if any(not key.endswith("bias") for key in missing):
        raise UnsupportedError(f"the config of {name} has attention_bias, but setting it changes more than biases.")
    if any(getattr(block.projection, "bias", None) is None for block in layout_in(new, model).blocks):
        raise UnsupportedError(
            f"attention_bias gives {name} no bias in its output projection, so constants stay an edit."
        )
    return new  # type: ignore[no-any-return]


def check_plain(name: str, modules: Sequence[nn.Module]) -> None:
    """Weights can only be rewritten where they are all there is."""
    other = next((module for module in modules if not is_plain(module)), None)
    if other is not None:
        weight = getattr(base_of(other), "weight", None)
        if base_of(other) is not other or not isinstance(weight, Tensor):
            held = "an adapter"
        else:
            kind = type(weight).__name__  # torchao's tensors have a kind of their own, and give float32 as their type
            held = f"weights in {weight.dtype if kind in ('Tensor', 'Parameter') else kind}"
        raise UnsupportedError(
            f"{name} keeps heads in {type(other).__name__} modules, with {held}, which cannot be rewritten head by head; merge "
            "adapters or open the model in floating point, or keep the edit as it is."
        )


def save_pretrained(model: OpenedModel, folder: Path, *, force: bool = False) -> Path:
    """Write module and tokenizer as Transformers does, all or nothing."""
    return write_folder_atomically(folder, lambda into: write_checkpoint(model, into), force=force)


def write_checkpoint(model: OpenedModel, into: Path) -> None:
    """Write module and tokenizer into a folder. `UnsupportedError` with Transformers' reason if it cannot save this model."""
    module = own_copy(model.plain) if is_away(model.plain) else model.plain
    try:
        module.save_pretrained(into)
    except OSError:
        raise
    except Exception as error:  # of many kinds, by number format and config
        raise UnsupportedError(
            f"Transformers cannot save this {type(module).__name__}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(into)
