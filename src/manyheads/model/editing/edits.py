"""Edits: what changes a forward pass of some heads, and can be undone exactly.

Most edits act on z, a head's output before the output projection; `Ablate(..., "uniform")` and `Mask` act in the attention
itself. Every edit may be limited to batch rows (`rows`) and to token columns (`positions`). Columns count from the
start of the sequence, padding included, so that one is the same token with and without a KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadLike, HeadSet
from manyheads.inputs import check_number
from manyheads.model.reading.attention import AttentionCall, Part
from manyheads.model.reading.readers import Activation

Positions = int | Sequence[int] | Int[Tensor, "P"] | Int[Tensor, "B P"]
ScaleAndShift = tuple[Float[Tensor, "h"], Float[Tensor, "h Dh"]]


@dataclass(frozen=True, eq=False)
class Edit:
    """Base of all edits: the heads they change, and where. Subclasses fill in one of the methods below."""

    heads: HeadSet | Iterable[HeadLike]
    rows: Sequence[int] | None = field(default=None, kw_only=True)
    positions: Positions | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", HeadSet(self.heads))

    @property
    def head_set(self) -> HeadSet:
        """The heads this edit changes."""
        assert isinstance(self.heads, HeadSet)
        return self.heads

    def indices(self, layer: int) -> list[int]:
        """The head indices it changes in `layer`, ascending."""
        return [head.index for head in self.head_set if head.layer == layer]

    @property
    def acts_in_attention(self) -> bool:
        """Whether the edit needs to see the attention itself, not only z."""
        return False

    def parts(self) -> frozenset[Part]:
        """Which of q, k, v `change` edits."""
        return frozenset()

    def edit_z(self, z: Activation) -> Tensor:
        """The new z `[B, T, H, Dh]` of a layer that has some of the heads."""
        return z.value

    def attend(self, call: AttentionCall, z: Tensor) -> Tensor:
        """The new z, given the whole attention call."""
        return z

    def block(self, layer: int, shape: tuple[int, int, int, int], offset: int, device: torch.device) -> Tensor | None:
        """Attention edges to cut, boolean, broadcastable to `[B, H, T, S]`."""
        return None

    def change(self, layer: int, part: Part, tensor: Tensor) -> Tensor:
        """The new query, key or value, `[B, H, ., Dh]`."""
        return tensor

    def affine(self, layer: int) -> ScaleAndShift:
        """The edit as `z_h -> scale_h z_h + shift_h` for the heads of `layer`; `UnsupportedError` if it is not of that form."""
        raise UnsupportedError(f"{type(self).__name__} is not linear in z, so it cannot be baked into weights.")

    def check(self, n_layers: int, n_heads: int) -> None:
        """`InputError` if the edit does not fit a model of this size."""
        self.head_set.check(n_layers, n_heads)

    def _everywhere(self) -> None:
        if self.rows is not None or self.positions is not None:
            raise UnsupportedError(
                f"this {type(self).__name__} is limited to some rows or positions; weights act on all of them, "
                "so it cannot be baked."
            )

    def _where(self, batch: int, length: int, offset: int, device: torch.device) -> Bool[Tensor, "B T"] | None:
        """Where the edit acts, `[B, T]`; None for everywhere."""
        if self.rows is None and self.positions is None:
            return None
        where = torch.ones(batch, length, dtype=torch.bool, device=device)
        if self.rows is not None:
            rows = torch.zeros(batch, 1, dtype=torch.bool, device=device)
            try:
                rows[list(self.rows)] = True
            except IndexError:
                raise InputError(f"rows {list(self.rows)} do not fit a batch of {batch}.") from None
            where = where & rows
        if self.positions is not None:
            wanted = torch.as_tensor(self.positions, device=device)
            wanted = wanted.reshape(1, -1) if wanted.ndim < 2 else wanted
            if (wanted < 0).any():
                if offset:
                    raise InputError(
                        "positions= has a negative number, which is another token at every decoding step; count from the start."
                    )
                wanted = torch.where(wanted < 0, wanted + length, wanted)
            columns = torch.arange(offset, offset + length, device=device)
            where = where & (columns[None, :, None] == wanted[:, None, :]).any(-1)
        return where

    def _set(self, z: Tensor, heads: list[int], new: Tensor, offset: int) -> Tensor:
        """`z` with the heads' slices replaced by `new` `[B, T, h, Dh]` where the edit acts."""
        where = self._where(z.shape[0], z.shape[1], offset, z.device)
        if where is not None:
            new = torch.where(where[:, :, None, None], new, z[:, :, heads])
        edited = z.clone()
        edited[:, :, heads] = new.to(z.dtype)
        return edited


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """`z_h -> factor * z_h`. Factor 0 ablates, 1 changes nothing, others strengthen, weaken or reverse."""

    factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.factor, "factor")

    def edit_z(self, z: Activation) -> Tensor:
        heads = self.indices(z.layer)
        return self._set(z.value, heads, z.value[:, :, heads] * self.factor, z.offset)

    def affine(self, layer: int) -> ScaleAndShift:
        self._everywhere()
        n = len(self.indices(layer))
        return torch.full((n,), float(self.factor)), torch.zeros(n, 1)


Mode = Literal["zero", "mean", "resample", "uniform"]


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """Take away what heads compute, in one of four ways.

    zero      z_h = 0
    mean      z_h = `reference` `[L, H, Dh]` (or `[L, T, H, Dh]`, a mean for each position); see `HeadModel.mean_z`. Without a
              reference: the mean over all rows and positions of the forward pass at hand.
    resample  z_h = the z_h of another example: `reference` `[L, B, T, H, Dh]` of other inputs, or, without one, that of another
              row of the batch (a seeded derangement)
    uniform   the pattern becomes uniform over the keys each query may attend to, 1/i in row i: what several papers mean by
              masking a head (arXiv:2404.15574, 2505.07293, 2410.13708)
    """

    mode: Mode | str = "zero"
    reference: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("zero", "mean", "resample", "uniform"):
            raise InputError(f"unknown ablation {self.mode!r}; choose zero, mean, resample or uniform.")
        if self.reference is not None:
            wanted = {"mean": (3, 4), "resample": (5,)}.get(self.mode, ())
            if self.reference.ndim not in wanted:
                raise InputError(
                    f"a {self.mode} ablation takes a reference of "
                    f"{'[L, H, Dh] or [L, T, H, Dh]' if self.mode == 'mean' else '[L, B, T, H, Dh]' if wanted else 'nothing'}"
                    f", not {list(self.reference.shape)}."
                )

    @property
    def acts_in_attention(self) -> bool:
        """Uniform attention needs the values and the mask."""
        return self.mode == "uniform"

    def edit_z(self, z: Activation) -> Tensor:
        heads = self.indices(z.layer)
        if self.mode == "uniform":
            return z.value
        old = z.value[:, :, heads]
        new = torch.zeros_like(old) if self.mode == "zero" else self._reference(z, heads).to(old).expand_as(old)
        return self._set(z.value, heads, new, z.offset)

    def attend(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Average the values over the allowed keys (`uniform` only)."""
        if self.mode != "uniform":
            return z
        heads = self.indices(call.layer)
        allowed = call.allowed[:, heads].to(z.dtype)
        new = (allowed / allowed.sum(-1, keepdim=True)) @ call.values_of(heads)
        return self._set(z, heads, new.transpose(1, 2), call.offset)

    def _reference(self, z: Activation, heads: list[int]) -> Tensor:
        batch, length = z.value.shape[:2]
        if self.reference is None:
            if z.offset:
                raise InputError(
                    f"a {self.mode} ablation needs reference= while decoding with a cache; see HeadModel.mean_z."
                )
            if self.mode == "mean":
                return z.value[:, :, heads].mean((0, 1), keepdim=True)
            if batch < 2:
                raise InputError(
                    "a resample ablation takes another row of the batch; give two rows or more, or reference=."
                )
            return z.value[derangement(batch, self.seed).to(z.value.device)][:, :, heads]
        reference = self.reference[z.layer][..., heads, :]
        if reference.ndim == 2:
            return reference[None, None]
        reference = reference[None] if reference.ndim == 3 else reference
        if reference.shape[1] < z.offset + length:
            raise InputError(
                f"the reference covers {reference.shape[1]} positions, this pass reaches position {z.offset + length - 1}."
            )
        return reference[:, z.offset : z.offset + length]

    def affine(self, layer: int) -> ScaleAndShift:
        """Zero and a position-free mean are affine; the others depend on the input."""
        self._everywhere()
        heads = self.indices(layer)
        if self.mode == "zero":
            return torch.zeros(len(heads)), torch.zeros(len(heads), 1)
        if self.mode == "mean" and self.reference is not None and self.reference.ndim == 3:
            return torch.zeros(len(heads)), self.reference[layer, heads].float()
        raise UnsupportedError(
            f"a {self.mode} ablation{'' if self.mode == 'uniform' else ' without a fixed [L, H, Dh] reference'} depends on "
            "the input, so it cannot be baked into weights."
        )


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """`z_h -> source_h`, the head outputs recorded on other inputs, `[L, B, T, H, Dh]` (`HeadModel.read_z`)."""

    source: Float[Tensor, "L B T H Dh"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is None or self.source.ndim != 5:
            shape = None if self.source is None else list(self.source.shape)
            raise InputError(f"Patch needs source= of shape [L, B, T, H, Dh] (see HeadModel.read_z), not {shape}.")

    def edit_z(self, z: Activation) -> Tensor:
        assert self.source is not None
        heads = self.indices(z.layer)
        length = z.value.shape[1]
        new = self.source[z.layer][:, z.offset : z.offset + length, heads].to(z.value)
        if new.shape[1] != length or new.shape[0] not in (1, z.value.shape[0]):
            raise InputError(
                f"the patch's source has {list(self.source.shape[1:3])} rows and positions, this pass needs "
                f"{list(z.value.shape[:2])} from position {z.offset}."
            )
        return self._set(z.value, heads, new.expand_as(z.value[:, :, heads]), z.offset)


@dataclass(frozen=True, eq=False)
class Offset(Edit):
    """`z_h -> z_h + v_h`, with `vectors` `[n, Dh]` in the order of the sorted heads, or `[L, H, Dh]` for all."""

    vectors: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = None if self.vectors is None else list(self.vectors.shape)
        if self.vectors is None or not (
            self.vectors.ndim == 3 or (self.vectors.ndim == 2 and len(self.vectors) == len(self.head_set))
        ):
            raise InputError(f"Offset needs vectors= of shape [{len(self.head_set)}, Dh] or [L, H, Dh], not {shape}.")

    def _of(self, layer: int) -> Float[Tensor, "h Dh"]:
        assert self.vectors is not None
        if self.vectors.ndim == 3:
            return self.vectors[layer, self.indices(layer)]
        return self.vectors[[i for i, head in enumerate(self.head_set) if head.layer == layer]]

    def edit_z(self, z: Activation) -> Tensor:
        heads = self.indices(z.layer)
        return self._set(z.value, heads, z.value[:, :, heads] + self._of(z.layer).to(z.value), z.offset)

    def affine(self, layer: int) -> ScaleAndShift:
        self._everywhere()
        return torch.ones(len(self.indices(layer))), self._of(layer).float()


@dataclass(frozen=True, eq=False)
class Affine(Edit):
    """`z_h -> scales_h z_h + shifts_h`, with `scales` `[n]` and `shifts` `[n, Dh]` in the order of the sorted heads."""

    scales: Tensor | None = None
    shifts: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.head_set)
        shapes = [None if part is None else list(part.shape) for part in (self.scales, self.shifts)]
        if shapes[0] != [n] or shapes[1] is None or len(shapes[1]) != 2 or shapes[1][0] != n:
            raise InputError(
                f"Affine needs scales= of shape [{n}] and shifts= of shape [{n}, Dh], not {shapes[0]} and {shapes[1]}."
            )

    def _of(self, layer: int) -> ScaleAndShift:
        assert self.scales is not None and self.shifts is not None
        here = [i for i, head in enumerate(self.head_set) if head.layer == layer]
        return self.scales[here], self.shifts[here]

    def edit_z(self, z: Activation) -> Tensor:
        heads = self.indices(z.layer)
        scales, shifts = (part.to(z.value) for part in self._of(z.layer))
        return self._set(z.value, heads, z.value[:, :, heads] * scales[:, None] + shifts, z.offset)

    def affine(self, layer: int) -> ScaleAndShift:
        self._everywhere()
        return self._of(layer)


@dataclass(frozen=True, eq=False)
class Mask(Edit):
    """Cut attention edges: queries at `positions` (None: all) may not attend to the columns `keys`.

    A query that would be left with no key at all keeps those it has.
    """

    keys: Positions = 0

    @property
    def acts_in_attention(self) -> bool:
        """It changes the scores."""
        return True

    def block(self, layer: int, shape: tuple[int, int, int, int], offset: int, device: torch.device) -> Tensor | None:
        heads = self.indices(layer)
        if not heads:
            return None
        batch, n_heads, length, total = shape
        keys = torch.as_tensor(self.keys, device=device)
        keys = keys.reshape(1, -1) if keys.ndim < 2 else keys
        keys = torch.where(keys < 0, keys + offset + length, keys)
        start = max(0, offset + length - total)  # a sliding window's cache has forgotten the columns before
        columns = torch.arange(start, start + total, device=device)
        columns = (columns[None, :, None] == keys[:, None, :]).any(-1)
        chosen = torch.zeros(n_heads, dtype=torch.bool, device=device)
        chosen[heads] = True
        blocked = chosen[None, :, None, None] & columns[:, None, None, :]
        where = self._where(batch, length, offset, device)
        return blocked if where is None else blocked & where[:, None, :, None]


@dataclass(frozen=True, eq=False)
class PartEdit(Edit):
    """Base of edits of the query, key or value of some heads: `changed` says what becomes of their slices."""

    part: Part = "query"

    @property
    def acts_in_attention(self) -> bool:
        """It changes q, k or v."""
        return True

    def parts(self) -> frozenset[Part]:
        return frozenset([self.part])

    def change(self, layer: int, part: Part, tensor: Tensor) -> Tensor:
        heads = self.indices(layer)
        if part != self.part or not heads:
            return tensor
        x = tensor.transpose(1, 2)
        return self._set(x, heads, self.changed(layer, heads, x[:, :, heads]), 0).transpose(1, 2)

    def changed(self, layer: int, heads: list[int], x: Float[Tensor, "B T h Dh"]) -> Float[Tensor, "#B #T h Dh"]:
        """What replaces `x`, the slices of `heads`."""
        return x


@dataclass(frozen=True, eq=False)
class Swap(PartEdit):
    """Replace some heads' query, key or value, `tensors[layer]` `[B, H, T, Dh]` as read from another pass (k, v widened to H).

    The means of path patching into a head's inputs; see `patching.py`.
    """

    tensors: dict[int, Tensor] | None = None

    def changed(self, layer: int, heads: list[int], x: Float[Tensor, "B T h Dh"]) -> Float[Tensor, "#B #T h Dh"]:
        assert self.tensors is not None
        return self.tensors[layer][:, heads].transpose(1, 2).to(x)


@dataclass(frozen=True, eq=False)
class Variants(Edit):
    """Several edits side by side in one batch: edit i sees and changes rows `i * batch : (i + 1) * batch` as if they were all."""

    edits: Sequence[Edit] = ()
    batch: int = 1

    @classmethod
    def of(cls, edits: Sequence[Edit], batch: int) -> Variants:
        """`edits`, each for `batch` rows."""
        return cls({head for edit in edits for head in edit.head_set}, edits=edits, batch=batch)

    @property
    def acts_in_attention(self) -> bool:
        return any(edit.acts_in_attention for edit in self.edits)

    def parts(self) -> frozenset[Part]:
        return frozenset[Part]().union(*(edit.parts() for edit in self.edits))

    def edit_z(self, z: Activation) -> Tensor:
        whole = z.value.clone()
        for edit, start, stop in self._here(z.layer):
            whole[start:stop] = edit.edit_z(z.rows(start, stop))
        return whole

    def attend(self, call: AttentionCall, z: Tensor) -> Tensor:
        whole = z.clone()
        for edit, start, stop in self._here(call.layer):
            rows = Activation(call.layer, z[start:stop], call.offset)
            attends = edit.acts_in_attention
            whole[start:stop] = edit.attend(call.rows(start, stop), rows.value) if attends else edit.edit_z(rows)
        return whole

    def change(self, layer: int, part: Part, tensor: Tensor) -> Tensor:
        whole = tensor.clone()
        for edit, start, stop in self._here(layer):
            whole[start:stop] = edit.change(layer, part, tensor[start:stop])
        return whole

    def block(self, layer: int, shape: tuple[int, int, int, int], offset: int, device: torch.device) -> Tensor | None:
        blocked = None
        for edit, start, stop in self._here(layer):
            inner = edit.block(layer, (stop - start, *shape[1:]), offset, device)
            if inner is not None:
                blocked = torch.zeros(shape, dtype=torch.bool, device=device) if blocked is None else blocked
                blocked[start:stop] = inner
        return blocked

    def _here(self, layer: int) -> Iterator[tuple[Edit, int, int]]:
        for i, edit in enumerate(self.edits):
            if edit.indices(layer):
                yield edit, i * self.batch, (i + 1) * self.batch


def derangement(n: int, seed: int = 0) -> Int[Tensor, "n"]:
    """A random permutation of `n` >= 2 things that leaves none in its place: a random cycle."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    result = torch.empty(n, dtype=torch.long)
    result[order] = order.roll(-1)
    return result


def compose_affine(edits: Sequence[Edit], layer: int, n_heads: int, head_dim: int) -> tuple[Any, Any]:
    """The edits, one after the other, as one `z -> scale z + shift`: scale `[H]`, shift `[H, Dh]`, float32."""
    scale, shift = torch.ones(n_heads), torch.zeros(n_heads, head_dim)
    for edit in edits:
        heads = edit.indices(layer)
        if heads:
            factor, addend = (part.to("cpu", torch.float32) for part in edit.affine(layer))
            scale[heads] *= factor
            shift[heads] = shift[heads] * factor[:, None] + addend
    return scale, shift
