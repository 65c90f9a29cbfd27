"""Whole training states in safetensors: weights, optimiser moments, random state, progress; written atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from manyheads.errors import InputError


def save_state(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> Path:
    """Write `folder/step-00000123` (complete or not at all) and remove the state before it."""
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / "model.safetensors"))
    moments = {
        f"{index}.{name}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, str(partial / "optimizer.safetensors"))
    save_file({"cpu": torch.get_rng_state()}, str(partial / "random.safetensors"))
    (partial / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for older in states(folder):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)
    return target


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a saved state back into `model`, `optimizer` and torch's random state; returns its progress."""
    try:
        load_model(model, str(path / "model.safetensors"))
        moments = load_file(str(path / "optimizer.safetensors"))
        torch.set_rng_state(load_file(str(path / "random.safetensors"))["cpu"])
        progress: dict[str, Any] = json.loads((path / "progress.json").read_text())
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a training state of this model ({error}); remove it or give another folder."
        ) from error
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def states(folder: Path) -> list[Path]:
    """The complete states in `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []
