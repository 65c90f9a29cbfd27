"""Whole training states in safetensors: weights (newest and best), moments, random state, progress; written atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file, save_model
from torch import nn

from manyheads.errors import InputError
from manyheads.files import disk_errors
from manyheads.inputs import clause, read_object, read_tensors


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    best: dict[str, torch.Tensor],
) -> Path:
    """Write `folder/step-00000123` (complete or not at all) and remove the state before it. `best` may be empty."""
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with disk_errors(target):
        _write(partial, model, optimizer, progress, best)
    # A rename is one step for the file system, so a state is there whole or not at all.
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for older in states(folder):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)
    return target


def _write(
    partial: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    best: dict[str, torch.Tensor],
) -> None:
    save_model(model, str(partial / "model.safetensors"))
    moments = {
        f"{index}.{name}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, str(partial / "optimizer.safetensors"))
    if best:
        save_file(best, str(partial / "best.safetensors"))
    random = {"cpu": torch.get_rng_state()}
    if (device := next(model.parameters()).device).type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    save_file(random, str(partial / "random.safetensors"))
    (partial / "progress.json").write_text(json.dumps(progress, indent=1) + "\n", "utf-8")


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Put a saved state back into `model`, `optimizer` and torch's random state; returns its progress and best weights."""
    try:
        progress = read_object(path / "progress.json")
        moments = read_tensors(path / "optimizer.safetensors")
        best = read_tensors(path / "best.safetensors") if (path / "best.safetensors").is_file() else {}
        random = read_tensors(path / "random.safetensors")
        load_model(model, str(path / "model.safetensors"))
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and (device := next(model.parameters()).device).type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], device)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in moments.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a training state of this model ({clause(error)}); remove it or give another folder."
        ) from error
    return progress, best


def states(folder: Path) -> list[Path]:
    """The complete states in `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []
