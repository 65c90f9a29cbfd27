"""A task's own mask of heads and MLP units and its low-rank change, over weights that many tasks share.

    W' = (W + C R) masked        W [F_out, F_in] of the model,  C [F_out, r],  R [r, F_in]

`on` switches it on for a block, `convert` adds C R to a copy and cuts out what is masked: the same logits. `weights.splora`
learns one. What is masked is what a head or a unit writes, which masks the rows of q, k, v, gate and up that make it, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_folder_atomically
from manyheads.heads import HeadSet
from manyheads.inputs import read_object, read_tensors
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import entering
from manyheads.model.linear import output_dim
from manyheads.model.offloading import own_copy
from manyheads.model.reading.attention import replaced_forward
from manyheads.model.weights.copies import layout_in
from manyheads.model.weights.units import mlp_of, with_units
from manyheads.provenance import Provenance
from manyheads.shrink.recovery import linear_maps

Change = tuple[Tensor, Tensor]  # C and R


@dataclass(frozen=True, eq=False)
class PruningAdapter:
    """What a task has of its own: the heads that go, the units that stay in each layer, and C and R of each map by its path."""

    heads: HeadSet
    units: tuple[Int[Tensor, "N"], ...]
    changes: Mapping[str, Change]
    fingerprint: str

    @property
    def learned(self) -> int:
        """How many numbers C and R hold."""
        return sum(C.numel() + R.numel() for C, R in self.changes.values())

    @contextmanager
    def on(self, model: HeadModel) -> Iterator[None]:
        """While this lasts `model` computes what `convert` makes of it; its weights stay. `MismatchError` for another model."""
        self._check(model)
        with adapted(model, self, {"value": 0.0}):
            yield

    def convert(self, model: HeadModel) -> HeadModel:
        """The small model: C R added to a copy, heads and units cut out. `MismatchError` for another model."""
        self._check(model)
        module: Any = own_copy(model.plain)
        with torch.no_grad():
            for path, (C, R) in self.changes.items():
                linear = module.get_submodule(path)
                linear.weight += (C @ R if output_dim(linear) == 0 else (C @ R).T).to(linear.weight)
        whole = HeadModel(module, model.tokenizer, layout_in(module, model))
        small = whole.prune(self.heads) if len(self.heads) else whole
        return HeadModel(*with_units(small, self.units))

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the mask and C and R: a card and a safetensors file."""
        tensors = {f"units.{layer}": units for layer, units in enumerate(self.units)}
        for path, change in self.changes.items():
            tensors |= {f"{name}.{path}": t.detach().contiguous() for name, t in zip("CR", change, strict=True)}
        card = Provenance("SPLoRA", "arXiv:2211.10155", fingerprint=self.fingerprint).to_json()
        card["heads"] = [str(head) for head in self.heads]

        def write(into: Path) -> None:
            save_file(tensors, into / "adapter.safetensors")
            (into / "card.json").write_text(json.dumps(card, indent=1), "utf-8")

        return write_folder_atomically(folder, write, force=force)

    @classmethod
    def load(cls, folder: str | Path, model: HeadModel) -> PruningAdapter:
        """What `save` wrote, for the same model. `MismatchError` for another, `InputError` for a folder that holds none."""
        folder = Path(folder)
        if not (folder / "adapter.safetensors").is_file():
            raise InputError(f"{folder} holds no pruning adapter: there is no adapter.safetensors in it.")
        card, found = read_object(folder / "card.json"), read_tensors(folder / "adapter.safetensors")
        try:
            heads = model.head_set(card["heads"])
            units = tuple(found[f"units.{layer}"] for layer in range(model.n_layers))
            changes = {path: (found[f"C.{path}"], found[f"R.{path}"]) for path in linear_maps(model)}
        except (KeyError, TypeError) as error:
            raise InputError(f"the adapter in {folder} does not fit this model: it lacks {error}.") from None
        adapter = cls(
            heads, units, {path: _placed(change, model) for path, change in changes.items()}, card["fingerprint"]
        )
        adapter._check(model)
        return adapter

    def _check(self, model: HeadModel) -> None:
        if model.fingerprint != self.fingerprint:
            raise MismatchError(
                f"this adapter was learned on model {self.fingerprint}, not on this one, {model.fingerprint}."
            )


def _placed(change: Change, model: HeadModel) -> Change:
    return change[0].to(model.device), change[1].to(model.device)


@contextmanager
def adapted(model: HeadModel, adapter: PruningAdapter, gate: Mapping[str, float]) -> Iterator[None]:
    """While this lasts every map of `model` has its C R beside it, and what goes is multiplied by the gate's value."""
    gone = adapter.heads.by_layer()
    with ExitStack() as stack:
        for layer, units in enumerate(adapter.units):
            mlp, projection = mlp_of(model, layer), model.layout.blocks[layer].projection
            heads = torch.tensor(gone.get(layer, []), dtype=torch.long)
            of_heads = (heads[:, None] * model.head_dim + torch.arange(model.head_dim)).flatten()
            of_units = torch.ones(mlp.units, dtype=torch.bool).index_fill(0, units.cpu(), False).nonzero()[:, 0]
            stack.enter_context(entering(projection, partial(_gated, of_heads, gate)))
            stack.enter_context(entering(mlp.down, partial(_gated, of_units, gate)))
        for path, (C, R) in adapter.changes.items():
            stack.enter_context(replaced_forward(model.plain.get_submodule(path), partial(_with_change, C, R)))
        yield


def _gated(features: Int[Tensor, "N"], gate: Mapping[str, float], x: Tensor) -> Tensor:
    return x * torch.ones(x.shape[-1], dtype=x.dtype, device=x.device).index_fill_(
        0, features.to(x.device), gate["value"]
    )


def _with_change(C: Float[Tensor, "O r"], R: Float[Tensor, "r I"], forward: Any) -> Any:
    return lambda x: forward(x) + x @ R.T.to(x) @ C.T.to(x)
