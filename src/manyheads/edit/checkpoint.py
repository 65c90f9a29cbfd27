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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.files import write_folder_atomically
from manyheads.heads import HeadSet
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.fingerprint import fingerprint
from manyheads.model.headmodel import HeadModel
from manyheads.model.linear import projection_matrix
from manyheads.model.opening import open_model
from manyheads.model.weights.baking import write_checkpoint
from manyheads.model.weights.copies import rebuilt, settled

INSIDE = "manyheads_edit"
_LARGEST = 1 << 24  # bytes of undo.json, most of which are the model's config


def save_baked(model: HeadModel, edit: HeadEdit, folder: str | Path, *, force: bool = False) -> Path:
    """Bake `edit` into a copy of `model` and write it as a checkpoint that can be undone.

    The checkpoint has the type of the weights, also where the edit was made in another one. Adapters are merged into it,
    and undoing leads back to the merged model. `MismatchError` if the edit is another model's; `InputError` if `folder` exists
    and `force` is not set; `UnsupportedError` for what cannot be baked.
    """
    baked = edit.bake(model)
    base = settled(model)
    replaced = _replaced(base, edit.heads)

    def write(into: Path) -> None:
        write_checkpoint(baked, into)
        edit.save(into / INSIDE)
        save_file(replaced, into / INSIDE / "undo.safetensors")
        names = {id(part): name for name, part in base.plain.named_modules()}
        about = {
            "fingerprint": base.fingerprint,
            "baked": baked.fingerprint,
            "config": base.config.to_dict(),
            "projections": [names[id(block.projection)] for block in base.layout.blocks],
        }
        (into / INSIDE / "undo.json").write_text(json.dumps(about, indent=1, default=str), "utf-8")

    return write_folder_atomically(folder, write, force=force)


def undo(folder: str | Path) -> HeadModel:
    """The model as it was before its edit was baked. `InputError` if `folder` holds no baked edit, `MismatchError` if its weights
    have changed since."""
    folder = Path(folder)
    if not (folder / INSIDE / "undo.json").is_file():
        raise InputError(f"{folder} holds no baked edit: there is no {INSIDE}/undo.json in it.")
    about, replaced = _read(folder / INSIDE)
    edit = HeadEdit.load(folder / INSIDE)
    baked = open_model(folder, dtype="auto")
    if baked.fingerprint != about["baked"]:
        raise MismatchError(
            f"the weights in {folder} have changed since the edit was baked; it cannot be undone exactly."
        )
    module = _with_config(baked, about["config"])
    names = {id(part): name for name, part in baked.plain.named_modules()}
    places = about.get("projections") or [names[id(block.projection)] for block in baked.layout.blocks]
    try:
        _put_back(module, places, edit, replaced)
    except (KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"what {folder / INSIDE} holds does not fit the model ({error}); bake the edit anew."
        ) from None
    if fingerprint(module) != about["fingerprint"]:
        raise MismatchError(f"undoing the edit in {folder} did not give back model {about['fingerprint']}.")
    return open_model(module, tokenizer=baked.tokenizer)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`undo.json` and `undo.safetensors`."""
    try:
        if (folder / "undo.json").stat().st_size > _LARGEST:
            raise ValueError("undo.json is longer than any config")
        about = json.loads((folder / "undo.json").read_text("utf-8"))
        if not isinstance(about, dict) or not isinstance(about["config"], dict):
            raise ValueError("undo.json is damaged")
        for name in ("fingerprint", "baked"):
            if not isinstance(about[name], str):
                raise ValueError(f"{name} is no fingerprint")
        return about, load_file(folder / "undo.safetensors")
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder} holds no baked edit that can be undone ({error}); bake the edit anew.") from None


def _replaced(model: Any, heads: HeadSet) -> dict[str, Tensor]:
    """What baking writes over: the heads' rows of each output projection, and its bias."""
    kept: dict[str, Tensor] = {}
    for layer, indices in heads.by_layer().items():
        kept[f"rows.{layer}"] = model.W_O(layer).detach()[indices].clone().contiguous().cpu()
        bias = model.bias_O(layer)
        if bias is not None:
            kept[f"bias.{layer}"] = bias.detach().clone().cpu()
    return kept


def _put_back(module: nn.Module, places: list[str], edit: HeadEdit, kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for layer, indices in edit.heads.by_layer().items():
            projection = module.get_submodule(places[layer])
            rows = projection_matrix(projection).unflatten(0, (-1, edit.shift.shape[1]))
            rows[indices] = kept[f"rows.{layer}"].to(rows)
            if f"bias.{layer}" in kept:
                projection.bias.copy_(kept[f"bias.{layer}"])  # type: ignore[operator, union-attr]


def _with_config(baked: HeadModel, config: dict[str, Any]) -> Any:
    """The baked module under its former config: without the biases that baking had to add, if it had to."""
    try:
        before = type(baked.config).from_dict(config)
    except Exception as error:  # whatever a config makes of values that are not its own
        raise InputError(f"the config in undo.json is none of this model: {' '.join(str(error).split())}") from None
    if getattr(before, "attention_bias", None) == getattr(baked.config, "attention_bias", None):
        return baked.plain
    with torch.device("meta"):
        wanted = type(baked.plain)(before).state_dict()
    state = baked.plain.state_dict()
    module, missing = rebuilt(baked.plain, before, {key: state[key] for key in state if key in wanted})
    if missing:
        raise UnsupportedError(f"the config in undo.json asks for weights that the checkpoint has not: {missing[0]}.")
    return module
