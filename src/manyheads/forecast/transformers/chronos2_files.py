"""The released layout of Chronos-2: what `config.json` says, and what the tensors of `model.safetensors` are called.

    encoder.block.i.layer.0.self_attention.q        trunk.layers.(2 i).attention.q               over time
    encoder.block.i.layer.1.self_attention.q        trunk.layers.(2 i + 1).attention.q           over channels
    encoder.block.i.layer.2.mlp.wi                  trunk.layers.(2 i + 1).mlp.wi
    input_patch_embedding, output_patch_embedding   trunk.embed, head.block

A folder that we write is read by the package `chronos-forecasting`, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import clause, read_object, read_tensors

CONFIG_FILE, TENSORS_FILE = "config.json", "model.safetensors"
_SIZES = {
    "d_model": "hidden_size",
    "d_kv": "head_dim",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "num_layers": "blocks",
    "dropout_rate": "dropout",
    "layer_norm_epsilon": "norm_epsilon",
    "initializer_factor": "initializer_factor",
    "rope_theta": "rope_theta",
}
_FORECASTING = {
    "input_patch_size": "patch",
    "quantiles": "levels",
    "context_length": "longest_context",
    "time_encoding_scale": "time_scale",
}
_OURS = {
    "trunk.shared": "shared",
    "trunk.embed": "input_patch_embedding",
    "trunk.norm": "encoder.final_layer_norm",
    "head.block": "output_patch_embedding",
}
_PARTS = {  # of a layer: our part, and theirs
    "attention": "self_attention",
    "norm": "layer_norm",
    "mlp": "mlp",
    "mlp_norm": "layer_norm",
}


def released_name(name: str) -> str:
    """What a tensor of ours is called in the released layout."""
    words = name.split(".")
    if words[:2] != ["trunk", "layers"]:
        return ".".join([_OURS[".".join(words[:2])], *words[2:]])
    block, group = divmod(int(words[2]), 2)
    part = 2 if words[3].startswith("mlp") else group
    return ".".join(["encoder", "block", str(block), "layer", str(part), _PARTS[words[3]], *words[4:]])


def released_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of our config that a folder's own says.

    `InputError` for a folder without a model of Chronos-2, `UnsupportedError` for one that is made in another way.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, TENSORS_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"there is no {missing[0]} in {folder}; give the folder of a Chronos-2, with both its files.")
    config = read_object(folder / CONFIG_FILE)
    forecasting = config.get("chronos_config")
    if not isinstance(forecasting, Mapping) or "input_patch_size" not in forecasting:
        raise InputError(f"{folder / CONFIG_FILE} is not of a Chronos-2: it has no chronos_config with a patch size.")
    _refuse_others(config, forecasting)
    try:
        found = {ours: config[theirs] for theirs, ours in _SIZES.items() if theirs in config}
        found |= {ours: forecasting[theirs] for theirs, ours in _FORECASTING.items() if forecasting.get(theirs)}
        found.setdefault("time_scale", found["longest_context"])
        steps = int(forecasting.get("max_output_patches", 1)) * int(found["patch"])
        found |= {"longest_horizon": steps, "prediction_length": min(steps, 64), "levels": tuple(found["levels"])}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_FILE} is damaged ({clause(error)}).") from None
    return found


def _refuse_others(config: Mapping[str, Any], forecasting: Mapping[str, Any]) -> None:
    patch = forecasting["input_patch_size"]
    wanted = {"use_reg_token": True, "use_arcsinh": True, "output_patch_size": patch, "input_patch_stride": patch}
    other = [name for name, value in wanted.items() if forecasting.get(name) != value]
    if config.get("feed_forward_proj", "relu") != "relu":
        other.append("feed_forward_proj")
    if other:
        value = forecasting.get(other[0], config.get(other[0]))
        raise UnsupportedError(f"this Chronos-2 has {other[0]} {value!r}, which is not what the released ones have.")


def write_released(folder: str | Path, config: Any, state: Mapping[str, Tensor]) -> None:
    """Write both files into a folder, which may be there already."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    patch = config.patch
    forecasting = {theirs: getattr(config, ours) for theirs, ours in _FORECASTING.items()} | {
        "output_patch_size": patch,
        "input_patch_stride": patch,
        "use_reg_token": True,
        "use_arcsinh": True,
        "max_output_patches": -(-config.longest_horizon // patch),
        "quantiles": list(config.levels),
    }
    written = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()} | {
        "architectures": ["Chronos2Model"],
        "chronos_config": forecasting,
        "chronos_pipeline_class": "Chronos2Pipeline",
        "feed_forward_proj": "relu",
        "model_type": "t5",
        "reg_token_id": 1,
        "vocab_size": 2,
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    tensors = {released_name(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})


def released_tensors(folder: str | Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A folder's tensors by our names, in float32. `InputError` names one that is missing, left over or of another shape."""
    found = read_tensors(Path(folder) / TENSORS_FILE)
    theirs = {released_name(name): name for name in wanted}
    if odd := sorted(set(theirs) ^ set(found)):
        raise InputError(f"{folder} {'lacks' if odd[0] in theirs else 'has besides'} the tensor {odd[0]!r}.")
    for name, own in theirs.items():
        if found[name].shape != wanted[own].shape:
            raise InputError(
                f"{name} in {folder} has shape {list(found[name].shape)}, and its config says {list(wanted[own].shape)}."
            )
    return {own: found[name].to(torch.float32) for name, own in theirs.items()}
