"""A trunk as heads see it: its states at chosen layers, by token or pooled, for text, images and series.

With states h [B, T, D] of a layer and the attention mask m [B, T] (1 for every token where there is none),

    "tokens"   h                                   [B, T, D]
    "mean"     sum_t m_t h_t / sum_t m_t           [B, D]
    "first"    h at the first t with m_t = 1       [B, D]       of a classifier trained on it: the class token
    "last"     h at the last t with m_t = 1        [B, D]

Layer 0 is what the first block reads, layer l what block l wrote, and layer L, or -1, what the model's own head reads: the last
state after the final norm. Any other module has layer -1, its output; its submodules are layers by their names.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.inputs import read_tensors
from manyheads.model.fingerprint import fingerprint
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.training.batches import on_device

Pool = Literal["tokens", "mean", "first", "last"]
WEIGHTS = "trunk.safetensors"
POOLS = ("tokens", "mean", "first", "last")
Layer = int | str


class Trunk:
    """A `HeadModel`, a Transformers model (its own head is not run) or any module, and the states in it.

    A `frozen` trunk is read without gradients and without dropout, whatever mode it is in; else gradients flow into it. It is no
    `nn.Module`, so a head that holds one does not move, train or save it; to train it, add `module`.
    """

    def __init__(self, model: HeadModel | nn.Module, *, frozen: bool = True) -> None:
        self.model, self.frozen = model, frozen
        self.module: Any = model.plain if isinstance(model, HeadModel) else model

    @overload
    def states(self, batch: Any, layers: Layer = -1, pool: Pool = "tokens") -> Float[Tensor, "B *T D"]: ...

    @overload
    def states(
        self, batch: Any, layers: Sequence[Layer], pool: Pool = "tokens"
    ) -> tuple[Float[Tensor, "B *T D"], ...]: ...

    def states(
        self, batch: Any, layers: Layer | Sequence[Layer] = -1, pool: Pool = "tokens"
    ) -> Tensor | tuple[Tensor, ...]:
        """States of one layer, or of each of several, pooled as above.

        `batch` is a tensor (ids, pixels, a series) or a mapping of what the trunk's forward takes; other entries, labels too, are
        left aside. A `HeadModel` takes text as well, alone or as the entry "text". `InputError` for a layer that is not there.
        """
        if isinstance(layers, int | str):
            return self.read(batch, [(layers, pool)])[0][0]
        return tuple(self.read(batch, [(layer, pool) for layer in layers])[0])

    def read(
        self, batch: Any, places: Sequence[tuple[Layer, Pool]]
    ) -> tuple[list[Float[Tensor, "B *T D"]], Shaped[Tensor, "B T"] | None]:
        """The states of several places, each a layer and how to pool it, by one pass; and the attention mask, if there is one."""
        if wrong := [pool for _, pool in places if pool not in POOLS]:
            raise InputError(f"pool is {wrong[0]!r}; give one of {', '.join(POOLS)}.")
        given = self._inputs(batch)
        mask = given.get("attention_mask") if isinstance(given, dict) else None
        layers = list(dict.fromkeys(layer for layer, _ in places))
        with self.without_gradients() if self.frozen else contextlib.nullcontext():
            found = dict(zip(layers, self._found(given, layers), strict=True))
        return [pooled(found[layer], mask, pool) for layer, pool in places], mask

    @property
    def backbone(self) -> Any:
        """The module without the model's own head, where Transformers knows it."""
        return getattr(self.module, "base_model", self.module)

    @property
    def embedding(self) -> Any:
        """The module that turns token ids into vectors; None where there is none."""
        if isinstance(self.model, HeadModel):
            return self.model.layout.embedding
        return _or_none(self.module, "get_input_embeddings")

    @property
    def unembedding(self) -> Any:
        """The module that turns states into logits of tokens; None where there is none."""
        if isinstance(self.model, HeadModel):
            return self.model.layout.unembedding
        return _or_none(self.module, "get_output_embeddings")

    @property
    def width(self) -> int:
        """D, by the trunk's config. `UnsupportedError` where it has none."""
        width = getattr(getattr(self.module, "config", None), "hidden_size", None)
        if not isinstance(width, int):
            raise UnsupportedError(
                f"{type(self.module).__name__} has no hidden_size in its config; take states(...).shape[-1]."
            )
        return width

    @property
    def device(self) -> torch.device:
        """Where its weights are, and batches go. A module without weights takes batches where they are, and says "cpu"."""
        return self._device or torch.device("cpu")

    @property
    def _device(self) -> torch.device | None:
        first = next(iter(self.module.parameters()), None)
        return None if first is None else first.device

    @property
    def fingerprint(self) -> str:
        """Of its weights and config: what saved heads are checked against."""
        return self.model.fingerprint if isinstance(self.model, HeadModel) else fingerprint(self.module)

    def refuse_other(self, wanted: str, what: str) -> None:
        """`MismatchError` unless its fingerprint is `wanted`; `what` names what was learned beside that."""
        if wanted != (own := self.fingerprint):
            raise MismatchError(
                f"the {what} were learned beside model {wanted}, not {own}; give that model or force it."
            )

    def save(self, folder: Path) -> None:
        """Write its weights into a new folder: a checkpoint, where it is a model of Transformers."""
        if isinstance(self.model, HeadModel):
            self.model.save_pretrained(folder)
        elif isinstance(self.module, PreTrainedModel):
            self.module.save_pretrained(folder)
        else:
            folder.mkdir()
            save_model(self.module, str(folder / WEIGHTS))

    @classmethod
    def restored(cls, folder: Path, given: Trunk | HeadModel | nn.Module | None = None) -> Trunk:
        """A trunk that `save` wrote. Without `given` a checkpoint is opened; else the weights are put into that.

        `InputError` where there is no checkpoint and nothing was given, `MismatchError` where the weights do not fit.
        """
        if given is None:
            if not (folder / "config.json").exists():
                raise InputError(f"{folder} is no checkpoint of Transformers; give the module whose weights these are.")
            return cls(open_model(folder), frozen=False)
        trunk = given if isinstance(given, Trunk) else cls(given, frozen=False)
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise InputError(f"{folder} holds no weights of a trunk; save the heads again.")
        tensors = {name: tensor for file in found for name, tensor in read_tensors(file).items()}
        loaded = trunk.module.load_state_dict(tensors, strict=False)
        tied = set(trunk.module.state_dict(keep_vars=True)) - {name for name, _ in trunk.module.named_parameters()}
        if loaded.unexpected_keys or set(loaded.missing_keys) - tied:
            raise MismatchError(f"the weights in {folder} are of another module than {type(trunk.module).__name__}.")
        return trunk

    @cached_property
    def _taken(self) -> frozenset[str]:
        """What its forward takes, by name."""
        return frozenset(inspect.signature(self.backbone.forward).parameters)

    def _inputs(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            kept = {name: value for name, value in batch.items() if name in self._taken and name != "labels"}
            if not kept and isinstance(self.model, HeadModel) and "text" in batch:
                kept = self.model.inputs(batch["text"])
            if not kept:
                raise InputError(f"nothing of the batch ({', '.join(batch)}) is read by {type(self.module).__name__}.")
            batch = kept
        elif isinstance(batch, Tensor):
            name = getattr(self.module, "main_input_name", None)
            batch = batch if name is None else {name: batch}
        if isinstance(self.model, HeadModel):
            batch = self.model.inputs(batch)
        return batch if self._device is None else on_device(batch, self._device)

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """While this lasts it is read as a frozen one is."""
        training = self.module.training
        if training:
            self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if training:
                self.module.train()

    def _found(self, given: Any, wanted: list[Layer]) -> list[Tensor]:
        transformers = hasattr(self.module, "base_model")
        numbers = [layer for layer in wanted if isinstance(layer, int)]
        more = {"output_hidden_states": True} if transformers and set(numbers) - {-1} else {}
        if transformers and "use_cache" in self._taken:
            more["use_cache"] = False
        with contextlib.ExitStack() as stack:
            named = {
                layer: stack.enter_context(_output_of(self.module, layer)) for layer in wanted if isinstance(layer, str)
            }
            out = self.backbone(**given, **more) if isinstance(given, dict) else self.backbone(given)
        last = _tensor(out)
        if not numbers or set(numbers) == {-1}:
            depths = [last]
        else:
            depths = [*out.hidden_states[:-1], last] if more.get("output_hidden_states") else [last]
        return [named[layer][-1] if isinstance(layer, str) else self._depth(depths, layer) for layer in wanted]

    def _depth(self, depths: list[Tensor], layer: int) -> Tensor:
        if not -len(depths) <= layer < len(depths):
            known = f"layers 0 to {len(depths) - 1}" if len(depths) > 1 else "its output, layer -1, and layers by name"
            raise InputError(f"there is no layer {layer}; {type(self.module).__name__} has {known}.")
        return depths[layer]


def pooled(states: Float[Tensor, "B *T D"], mask: Shaped[Tensor, "N M"] | None, pool: Pool) -> Float[Tensor, "B *P D"]:
    """One state a row, by the formulas above; states that are one a row already stay. `InputError` for other shapes."""
    if pool == "tokens" or states.ndim == 2:
        return states
    if states.ndim != 3:
        raise InputError(f"states of shape {list(states.shape)} are no tokens; expected [B, T, D] to pool.")
    real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask > 0
    if real.shape != states.shape[:2]:
        raise InputError(f"the attention mask has shape {list(real.shape)}, the states have {list(states.shape[:2])}.")
    if pool == "mean":
        weight = real[..., None].to(states)
        return (states * weight).sum(1) / weight.sum(1).clamp_min(1)
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    at = places.where(real, -1).argmax(1) if pool == "last" else real.int().argmax(1)
    return states[torch.arange(len(states), device=states.device), at.to(states.device)]


@contextlib.contextmanager
def at_readout(
    unembedding: nn.Module | None, instead: Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Collect what the output matrix is given while this lasts, and give it something else where asked.

    `UnsupportedError` where there is no output matrix.
    """
    if unembedding is None:
        raise UnsupportedError("this model has no output matrix; give a model that predicts tokens.")
    caught: list[Tensor] = []

    def swap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        caught.append(args[0])
        return None if instead is None else (instead(args[0]), *args[1:])

    handle = unembedding.register_forward_pre_hook(swap)
    try:
        yield caught
    finally:
        handle.remove()


@contextlib.contextmanager
def _output_of(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise InputError(f"{type(module).__name__} has no layer {name!r}; `named_modules()` lists them.") from None
    caught: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: caught.append(_tensor(out)))
    try:
        yield caught
    finally:
        handle.remove()


def _tensor(out: Any) -> Tensor:
    """The states in what a module returned."""
    if isinstance(out, Tensor):
        return out
    found = out.get("last_hidden_state") if isinstance(out, Mapping) else None
    found = out[0] if found is None and isinstance(out, tuple | list) else found
    if not isinstance(found, Tensor):
        raise UnsupportedError(f"there are no states in a {type(out).__name__}; name a layer whose output is a tensor.")
    return found


def _or_none(module: Any, name: str) -> Any:
    try:
        return getattr(module, name)()
    except (AttributeError, NotImplementedError):
        return None
