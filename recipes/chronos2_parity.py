"""What the package `chronos-forecasting` (2.3.2, its own code) answers with random weights: the fixture of our test of parity.

pip install chronos-forecasting
python recipes/chronos2_parity.py tests/chronos2_parity.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model, Chronos2Pipeline
from chronos.chronos2.config import Chronos2CoreConfig
from safetensors.torch import save_file
from torch import Tensor

PATCH, CONTEXT, PASSES = 4, 64, 3
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def random_model() -> Chronos2Model:
    config = Chronos2CoreConfig(
        d_model=16,
        d_kv=4,
        num_heads=2,
        d_ff=24,
        num_layers=2,
        chronos_config={
            "context_length": CONTEXT,
            "input_patch_size": PATCH,
            "input_patch_stride": PATCH,
            "output_patch_size": PATCH,
            "quantiles": list(LEVELS),
            "use_reg_token": True,
            "use_arcsinh": True,
            "max_output_patches": PASSES,
            "time_encoding_scale": 32,
        },
    )
    model = Chronos2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            size = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.1
            weight.copy_(1 + 0.2 * drawn if "layer_norm" in name else size * drawn)
        # Quantiles within a few standard deviations, which do not cross: crossing ones are not treated alike everywhere.
        for weight in model.output_patch_embedding.parameters():
            weight.mul_(0.1)
        model.output_patch_embedding.output_layer.bias.add_(torch.linspace(-2, 2, len(LEVELS)).repeat_interleave(PATCH))
    return model


def cases(generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """What goes into `forward`, by name."""
    walk = 3 * torch.randn(7, 50, generator=generator).cumsum(1) + 10
    missing = walk.clone()
    missing[torch.rand(walk.shape, generator=generator) < 0.2] = torch.nan
    missing[0, :30] = missing[3, 22:30] = missing[5, -9:] = torch.nan
    constant = walk.clone()
    constant[2], constant[4] = 4.0, torch.nan
    ahead = torch.full((7, 12), torch.nan)
    ahead[1], ahead[3, :5] = 3 * torch.randn(12, generator=generator), 5.0
    target = 3 * torch.randn(7, 12, generator=generator) + 10
    target[0, 5:9] = torch.nan
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    return {
        "single": {"context": walk},
        "several patches": {"context": walk, "num_output_patches": 3},
        "groups": {"context": walk, "group_ids": groups, "num_output_patches": 2},
        "missing": {"context": missing, "group_ids": groups, "num_output_patches": 2},
        "constant": {"context": constant, "group_ids": groups},
        "covariates": {
            "context": missing,
            "group_ids": groups,
            "future_covariates": ahead,
            "num_output_patches": 3,
            "future_target": target,
        },
        "long": {"context": torch.randn(2, 90, generator=generator).cumsum(1)},
    }


def paths(model: Chronos2Model, generator: torch.Generator) -> dict[str, Tensor]:
    """A forecast of three passes: two targets, a past-only covariate and one known ahead."""
    values = torch.randn(4, 76, generator=generator).cumsum(1)
    target, past, known = values[:2, :46], values[2, :46], values[3]
    given = {
        "target": target,
        "past_covariates": {"past": past, "known": known[:46]},
        "future_covariates": {"known": known[46:]},
    }
    (found,) = Chronos2Pipeline(model).predict([given], prediction_length=30)
    return {"target": target, "past": past, "known": known, "expected": found}


def main(path: str) -> None:
    torch.set_num_threads(1)
    model, generator = random_model(), torch.Generator().manual_seed(1)
    tensors = {f"weights.{name}": tensor for name, tensor in model.state_dict().items() if name != "quantiles"}
    for name, given in cases(generator).items():
        with torch.no_grad():
            out = model(**given)
        tensors |= {f"{name}.{key}": value for key, value in given.items() if isinstance(value, Tensor)}
        tensors[f"{name}.expected"] = out.quantile_preds.transpose(1, 2)
        if out.loss is not None:
            tensors[f"{name}.loss"] = out.loss
    tensors |= {f"paths.{name}": value for name, value in paths(model, generator).items()}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        path,
        {"config": json.dumps(config)},
    )


if __name__ == "__main__":
    main(sys.argv[1])
