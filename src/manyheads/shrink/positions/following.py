"""A layer of a KV cache that carries more than keys and values, and keeps it in step with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from manyheads.errors import InputError, UnsupportedError


class FollowingLayer(DynamicLayer):
    """Transformers' growing layer with tensors `beside` keys and values, whose first dimension counts rows as theirs does.

    They change places with the rows (beams, returned sequences, assisted decoding); a subclass says in `crop` what a shorter
    cache leaves of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.beside: dict[str, Tensor] = {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in the order of beam search."""
        super().reorder_cache(beam_idx)
        self.beside = {name: value.index_select(0, beam_idx.to(value.device)) for name, value in self.beside.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        super().batch_repeat_interleave(repeats)
        self.beside = {name: value.repeat_interleave(repeats, 0) for name, value in self.beside.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        super().batch_select_indices(indices)
        self.beside = {name: value[indices] for name, value in self.beside.items()}

    def reset(self) -> None:
        """Empty again."""
        super().reset()
        self.beside = {}

    @classmethod
    def of(cls, cache: Any, layer: int, what: str) -> Any:
        """Layer `layer` of `cache` as one of these; put there while the cache is empty. None without a cache."""
        if cache is None:
            return None
        if getattr(cache, "layer_class_to_replicate", None) is not None:
            while len(cache.layers) <= layer:
                cache.layers.append(cache.layer_class_to_replicate())
        found = cache.layers[layer]
        if isinstance(found, cls):
            return found
        if type(found) is not DynamicLayer or cache.offloading:
            raise UnsupportedError(
                f"{what} keeps its own kind of cache, and this one has layers of {type(found).__name__}; give no cache and no "
                "cache_implementation."
            )
        if found.get_seq_length():
            raise InputError(f"this cache was filled without {what}; begin with an empty one.")
        cache.layers[layer] = cls()
        return cache.layers[layer]


def some_rows(indices: list[int], value: Tensor) -> Tensor:
    """Some rows of a tensor; the tensor itself where these are all."""
    return value if len(indices) == len(value) else value[torch.tensor(indices, device=value.device)]
