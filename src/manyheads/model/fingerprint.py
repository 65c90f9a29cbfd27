"""A model's fingerprint: what a saved score or edit is checked against."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")


def fingerprint(module: Any) -> str:
    """First 16 hex digits of SHA-256 over config and every parameter's name, shape, dtype and bytes.

    Where the weights came from and how they were loaded does not count; any change of a weight does. Weights that Accelerate
    has moved away (meta device) count by name and shape only.
    """
    digest = hashlib.sha256()
    whole = module.config.to_dict() if hasattr(module, "config") else {"class": type(module).__name__}
    config = {k: v for k, v in whole.items() if k not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
