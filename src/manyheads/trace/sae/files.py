"""Attention autoencoders on disk (#10): our folder, and that of sae-lens, which other tools read.

Ours is `sae.json` and `sae.safetensors`, with the model's fingerprint. sae-lens (version 6) keeps `cfg.json` and
`sae_weights.safetensors` with W_enc `[d_in, d_sae]`, b_enc, W_dec, b_dec, architecture "standard", and names its site in the
model by a hook, `blocks.{layer}.attn.hook_z`, whose heads are concatenated (`reshape_activations: "hook_z"`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from manyheads.errors import InputError, UnsupportedError
from manyheads.files import write_folder_atomically
from manyheads.inputs import check_integer, clause, read_object, read_tensors
from manyheads.model.headmodel import HeadModel
from manyheads.trace.sae.autoencoder import AttentionSae, with_unit_rows

FORMAT = 1
_HOOK = re.compile(r"blocks\.(\d+)\.attn\.hook_z")
_NAMES = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}


def save_sae(sae: AttentionSae, folder: str | Path, *, force: bool = False) -> Path:
    """Write our folder, with decoder rows of unit length. `InputError` if it exists and `force` is not set."""
    sae = with_unit_rows(sae)
    about = {
        "format": FORMAT,
        "layer": sae.layer,
        "n_heads": sae.n_heads,
        "fingerprint": sae.fingerprint,
        "meta": sae.meta,
    }

    def write(into: Path) -> None:
        (into / "sae.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        save_file(_tensors(sae), into / "sae.safetensors")

    return write_folder_atomically(folder, write, force=force)


def load_sae(folder: str | Path) -> AttentionSae:
    """Read what `save_sae` wrote. `InputError` for anything else."""
    folder = Path(folder)
    about = _json(folder / "sae.json")
    try:
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        tensors = read_tensors(folder / "sae.safetensors", _NAMES)
        parts = {name: tensors[name] for name in _NAMES}
        layer, n_heads = check_integer(about["layer"], "layer"), check_integer(about["n_heads"], "n_heads", 1)
        if not isinstance(about["fingerprint"], str) or not isinstance(about["meta"], dict):
            raise ValueError("its fingerprint is a text and its meta an object")
        return AttentionSae(layer, n_heads, **parts, fingerprint=about["fingerprint"], meta=about["meta"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{folder} is not an autoencoder ({clause(error)}); give a folder that save_sae wrote."
        ) from None


def export_sae_lens(
    sae: AttentionSae, folder: str | Path, *, model_name: str = "", context_size: int | None = None, force: bool = False
) -> Path:
    """Write the folder that `sae_lens.SAE.load_from_disk` reads."""
    sae = with_unit_rows(sae)
    metadata: dict[str, Any] = {
        "model_name": model_name,
        "hook_name": f"blocks.{sae.layer}.attn.hook_z",
        "hook_head_index": None,
        "context_size": context_size,
        "manyheads_fingerprint": sae.fingerprint,
    }
    about = {
        "architecture": "standard",
        "d_in": sae.W_enc.shape[0],
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z",
        "metadata": metadata,
    }

    def write(into: Path) -> None:
        (into / "cfg.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        save_file(_tensors(sae), into / "sae_weights.safetensors")

    return write_folder_atomically(folder, write, force=force)


def import_sae_lens(folder: str | Path, model: HeadModel) -> AttentionSae:
    """Read a standard autoencoder of `hook_z` that sae-lens saved, for `model`.

    `UnsupportedError` for another architecture, another hook or normalised inputs; `InputError` if the widths do not fit.
    """
    folder = Path(folder)
    about = _json(folder / "cfg.json")
    given = about.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    place = str(metadata.get("hook_name") or about.get("hook_name") or "")
    match = _HOOK.fullmatch(place)
    if about.get("architecture", "standard") != "standard" or about.get("normalize_activations", "none") != "none":
        raise UnsupportedError(
            f"{folder} is a {about.get('architecture')} autoencoder with inputs normalised by "
            f"{about.get('normalize_activations')!r}; standard ones without normalisation can be read."
        )
    if match is None:
        raise UnsupportedError(
            f"{folder} is of {place or 'an unnamed hook'}, not of heads' outputs; give one of blocks.N.attn.hook_z."
        )
    tensors = read_tensors(folder / "sae_weights.safetensors", _NAMES)
    parts: dict[str, Any] = {name: tensors[name].float() for name in _NAMES}
    if not about.get("apply_b_dec_to_input", True):  # fold: (x - 0) W + b = (x - b_dec) W + (b + b_dec W)
        parts["b_enc"] = parts["b_enc"] + parts["b_dec"] @ parts["W_enc"]
    width = model.n_heads * model.head_dim
    if parts["W_enc"].shape[0] != width:
        raise InputError(
            f"{folder} reads {parts['W_enc'].shape[0]} numbers and this model's heads give {width}; give its own model."
        )
    meta: dict[str, Any] = {"imported from": "sae-lens", "config": about}
    made_for = str(metadata.get("manyheads_fingerprint") or "")
    sae = AttentionSae(layer=int(match[1]), n_heads=model.n_heads, meta=meta, fingerprint=made_for, **parts)
    sae.check(model)
    return sae


def _tensors(sae: AttentionSae) -> dict[str, Any]:
    return {name: getattr(sae, name).detach().float().contiguous().cpu() for name in _NAMES}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no autoencoder at {path.parent}: there is no {path.name} in it; give another folder.")
    return read_object(path)
