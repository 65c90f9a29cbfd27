"""An edit in an ordinary checkpoint, and out of it again, bit for bit.

Beside the weights that any tool loads, a baked checkpoint has a folder `manyheads_edit`: the edit, and `undo.safetensors` with
what it wrote over (the edited heads' rows of the output projections, and their biases). Undoing puts these back and proves by
the fingerprint that the model is the one the edit was made for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_folder_atomically
from manyheads.heads import HeadSet
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.model.linear import projection_matrix
from manyheads.model.opening import open_model

INSIDE = "manyheads_edit"


def save_baked(model: HeadModel, edit: HeadEdit, folder: str | Path, *, force: bool = False) -> Path:
    """Bake `edit` into a copy of `model` and write it as a checkpoint that can be undone.

    `MismatchError` if the edit is another model's; `InputError` if `folder` exists and `force` is not set.
    """
    baked = edit.bake(model)
    replaced = _replaced(model, edit.heads)

    def write(into: Path) -> None:
        baked.plain.save_pretrained(into)
        if baked.tokenizer is not None:
            baked.tokenizer.save_pretrained(into)
        edit.save(into / INSIDE)
        save_file(replaced, into / INSIDE / "undo.safetensors")
        about = {"fingerprint": model.fingerprint, "baked": baked.fingerprint, "config": model.config.to_dict()}
        (into / INSIDE / "undo.json").write_text(json.dumps(about, indent=1, default=str), "utf-8")

    return write_folder_atomically(folder, write, force=force)


def undo(folder: str | Path) -> HeadModel:
    """The model as it was before its edit was baked. `InputError` if `folder` holds no baked edit, `MismatchError` if its weights
    have changed since."""
    folder = Path(folder)
    if not (folder / INSIDE / "undo.json").is_file():
        raise InputError(f"{folder} holds no baked edit: there is no {INSIDE}/undo.json in it.")
    about = json.loads((folder / INSIDE / "undo.json").read_text("utf-8"))
    edit = HeadEdit.load(folder / INSIDE)
    baked = open_model(folder, dtype="auto")
    if baked.fingerprint != about["baked"]:
        raise MismatchError(
            f"the weights in {folder} have changed since the edit was baked; it cannot be undone exactly."
        )
    replaced = load_file(folder / INSIDE / "undo.safetensors")
    module = _with_config(baked, about["config"])
    _put_back(open_model(module), edit.heads, replaced)
    model = open_model(module, tokenizer=baked.tokenizer)
    if model.fingerprint != about["fingerprint"]:
        raise MismatchError(f"undoing the edit in {folder} did not give back model {about['fingerprint']}.")
    return model


def _replaced(model: HeadModel, heads: HeadSet) -> dict[str, Tensor]:
    """What baking writes over: the heads' rows of each output projection, and its bias."""
    kept: dict[str, Tensor] = {}
    for layer, indices in heads.by_layer().items():
        kept[f"rows.{layer}"] = model.W_O(layer).detach()[indices].clone().contiguous().cpu()
        bias = model.bias_O(layer)
        if bias is not None:
            kept[f"bias.{layer}"] = bias.detach().clone().cpu()
    return kept


def _put_back(model: HeadModel, heads: HeadSet, kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for layer, indices in heads.by_layer().items():
            projection = model.layout.blocks[layer].projection
            rows = projection_matrix(projection).unflatten(0, (model.n_heads, model.head_dim))
            rows[indices] = kept[f"rows.{layer}"].to(rows)
            if f"bias.{layer}" in kept:
                projection.bias.copy_(kept[f"bias.{layer}"])  # type: ignore[operator, union-attr]


def _with_config(baked: HeadModel, config: dict[str, Any]) -> Any:
    """The baked module under its former config: without the biases that baking had to add, if it had to."""
    before = type(baked.config).from_dict(config)
    if getattr(before, "attention_bias", None) == getattr(baked.config, "attention_bias", None):
        return baked.plain
    module = type(baked.plain)(before).to(next(baked.plain.parameters()).dtype).eval()
    wanted = module.state_dict()
    module.load_state_dict({key: value for key, value in baked.plain.state_dict().items() if key in wanted})
    return module
