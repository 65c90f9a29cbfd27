"""Draft heads in the layouts of other programs, written and read as safetensors.

**Medusa for vLLM** (`config.json` with `model_type` "medusa", `model.safetensors`): `blocks.<head>.layers.<block>.weight` and
`.bias`, `lm_heads.<head>.weight`; with a reduced vocabulary also `token_map`, its token ids.

**Hydra as published** (`config.json` with the `hydra_*` settings, `hydra_lm_head.safetensors`): `hydra_mlp.<head>.<place>.linear`
and `.res_connection`, `hydra_lm_head.<head>`, and with a prefix layer `prefix_embeding_layer.layers.0.*` and `.norm`, places
counting the dropouts between blocks. The published files are pickles, which are not read here; save them as safetensors
first. In them all blocks of a head after the first are one module under several names; here they become separate blocks with
equal weights.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads.draft.core.drafter import ResidualBlock
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.hydra import Hydra
from manyheads.draft.drafters.medusa import Medusa
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.files import write_folder_atomically

_HYDRA_FILE = "hydra_lm_head.safetensors"


def export_medusa(drafter: Medusa, trunk: DraftTrunk, folder: str | Path, *, force: bool = False) -> Path:
    """Write Medusa heads in vLLM's layout. `UnsupportedError` for an output matrix with a bias, which that layout lacks."""
    if len(drafter.readouts.biases):
        raise UnsupportedError(
            "these heads' output matrices have biases, which vLLM's Medusa layout cannot hold; use save_drafter instead."
        )
    shared = not len(drafter.readouts.weights)
    tensors: dict[str, Tensor] = {}
    for head, blocks in enumerate(drafter.blocks):
        for place, block in enumerate(cast(Iterable[ResidualBlock], blocks)):
            tensors[f"blocks.{head}.layers.{place}.weight"] = block.linear.weight
            tensors[f"blocks.{head}.layers.{place}.bias"] = block.linear.bias
        if not shared or head == 0:
            tensors[f"lm_heads.{head}.weight"] = trunk.readout if shared else drafter.readouts.weights[head]
    if drafter.vocabulary is not None:
        tensors["token_map"] = drafter.vocabulary
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": trunk.width,
        "vocab_size": trunk.vocab_size,
        "truncated_vocab_size": trunk.vocab_size if drafter.vocabulary is None else len(drafter.vocabulary),
        "num_heads": drafter.depth,
        "num_hidden_layers": drafter.settings["layers"],
        "medusa_fc_bias": True,
        "original_lm_head": shared,
        "max_paths": 64,
        "topk": 10,
        "torch_dtype": str(trunk.dtype).removeprefix("torch."),
    }
    return _write(folder, config, "model.safetensors", tensors, force)


def import_medusa(folder: str | Path, trunk: DraftTrunk) -> Medusa:
    """Read Medusa heads from vLLM's layout."""
    config, tensors = _read(folder, "model.safetensors")
    tensors = {name.removeprefix("medusa_heads."): tensor for name, tensor in tensors.items()}
    with _understood(folder):
        shared = bool(config.get("original_lm_head", False))
        vocabulary = tensors["token_map"].tolist() if "token_map" in tensors else None
        heads, layers = config["num_heads"], config["num_hidden_layers"]
        drafter = Medusa(trunk, heads, layers, own_readout=not shared, vocabulary=vocabulary)
        weights: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if found := re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", name):
                weights["blocks.{}.{}.linear.{}".format(*found.groups())] = tensor
            elif (found := re.fullmatch(r"lm_heads\.(\d+)\.weight", name)) and not shared:
                whole = vocabulary is not None and len(tensor) > len(vocabulary)
                weights[f"readouts.weights.{found[1]}"] = tensor[vocabulary] if whole else tensor
    return _loaded(drafter, weights, folder)


def export_hydra(drafter: Hydra, trunk: DraftTrunk, folder: str | Path, *, force: bool = False) -> Path:
    """Write Hydra heads under the names of the published checkpoints. `UnsupportedError` for shared output matrices."""
    if not len(drafter.readouts.weights) or drafter.vocabulary is not None:
        raise UnsupportedError(
            "published Hydra heads need their own output matrices over all tokens; train with own_readout=True and no vocabulary."
        )
    prefix = drafter.prefix is not None
    tensors: dict[str, Tensor] = {}
    for name, tensor in drafter.state_dict().items():
        tensors[_published(name, prefix)] = tensor
    config = {
        "model_type": "hydra",
        "hydra_num_heads": drafter.settings["heads"],
        "hydra_num_layers": drafter.settings["layers"],
        "hydra_head_arch": "prefix-mlp" if prefix else "mlp",
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "base_model_name_or_path": getattr(trunk.model.config, "_name_or_path", ""),
    }
    return _write(folder, config, _HYDRA_FILE, tensors, force)


def import_hydra(folder: str | Path, trunk: DraftTrunk) -> Hydra:
    """Read Hydra heads under the names of the published checkpoints."""
    config, tensors = _read(folder, _HYDRA_FILE)
    prefix = {"prefix-mlp": True, "mlp": False}.get(str(config.get("hydra_head_arch", "mlp")))
    if prefix is None or not config.get("grounded_heads", False):
        raise UnsupportedError(
            f"these Hydra heads ({config.get('hydra_head_arch')}) cannot be read; give grounded 'mlp' or 'prefix-mlp' heads."
        )
    with _understood(folder):
        drafter = Hydra(trunk, config["hydra_num_heads"], config["hydra_num_layers"], prefix=prefix)
    wanted = {_published(name, prefix): name for name in drafter.state_dict()}
    return _loaded(drafter, {wanted[name]: tensor for name, tensor in tensors.items() if name in wanted}, folder)


def _published(name: str, prefix: bool) -> str:
    """The published name of one of our tensors. With a prefix layer a dropout stands before every block and output matrix."""
    if found := re.fullmatch(r"entries\.(\d+)\.(skip|linear)\.(weight|bias)", name):
        part = "res_connection" if found[2] == "skip" else "linear"
        return f"hydra_mlp.{found[1]}.{1 if prefix else 0}.{part}.{found[3]}"
    if found := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.linear\.(weight|bias)", name):
        place = int(found[2]) + 1
        return f"hydra_mlp.{found[1]}.{2 * place + 1 if prefix else place}.linear.{found[3]}"
    if found := re.fullmatch(r"readouts\.(weights|biases)\.(\d+)", name):
        kind = "weight" if found[1] == "weights" else "bias"
        return f"hydra_lm_head.{found[2]}.{'1.' if prefix else ''}{kind}"
    name = name.replace("prefix.block.layer.", "prefix_embeding_layer.layers.0.")
    return name.replace("prefix.norm.", "prefix_embeding_layer.norm.")


def _write(folder: str | Path, config: dict[str, Any], file: str, tensors: dict[str, Tensor], force: bool) -> Path:
    def write(into: Path) -> None:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, into / file)
        (into / "config.json").write_text(json.dumps(config, indent=2))

    return write_folder_atomically(folder, write, force=force)


def _read(folder: str | Path, file: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = Path(folder)
    if not (folder / file).is_file() and list(folder.glob("*.pt")):
        raise InputError(
            f"{folder} holds a pickle, which can run code when loaded; save its state dict as {file} first."
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json holds no settings")
        return config, load_file(folder / file)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"there are no heads at {folder}: {error}") from None


@contextlib.contextmanager
def _understood(folder: str | Path) -> Iterator[None]:
    """`InputError` for settings and tensors that are missing, or of a kind that heads cannot have."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"the heads at {folder} cannot be read: {reason}") from None


def _loaded(drafter: Any, weights: dict[str, Tensor], folder: str | Path) -> Any:
    try:
        drafter.load_state_dict(weights)
    except RuntimeError as error:
        raise MismatchError(
            f"the heads at {folder} do not fit this model: {str(error).splitlines()[-1].strip()}"
        ) from None
    return drafter.eval()
