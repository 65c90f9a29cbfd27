"""Where heads are in the weights: which features of which module are q, k, v and o of each head, proved on a forward pass.

    q_h = (x W + b)[index_q[h]]    k_g, v_g alike of KV head g    attention output = sum_h z_h W_O[index_o[h]] + b_O

Architectures keep q, k and v in three matrices or in one, that as q|k|v, head by head or group by group. Names are not
trusted: noise is added to `head_dim` features of a projection's output at a time. They belong to the one head whose query, key
or value changes. All blocks of all layers are tried in one pass of one-token sequences, a row each.
What is no linear map on the way (norms of q and k) is replaced by its linear part meanwhile.

Adapters and quantised weights are covered: features are found by what modules make, not by how they store it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.model.hooks import entering, leaving
from manyheads.model.layout import tiny_inputs
from manyheads.model.linear import base_of, features_of, output_dim, projection_matrix
from manyheads.model.norms import FoldedNorm
from manyheads.model.opened import OpenedModel
from manyheads.model.reading.attention import PARTS, Part, replaced_forward
from manyheads.model.reading.readers import SITE_OF, Keep


@dataclass(frozen=True)
class Slices:
    """q, k, v or o of one layer: row h of `index` are the features of head h (k and v: of KV head h).

    `module` is what the layer calls, an adapter where there is one. q, k and v are features that it makes, o are features that it
    reads.
    """

    module: nn.Module
    index: Int[Tensor, "H Dh"]
    read: bool = False

    @property
    def holder(self) -> nn.Module:
        """The module whose `weight` has these features."""
        return base_of(self.module)

    @property
    def dim(self) -> int:
        """The dimension of that weight along which they are."""
        return 1 - output_dim(self.module) if self.read else output_dim(self.module)

    def matrices(self) -> Float[Tensor, "H A B"]:
        """Each head's matrix: `[H, D, Dh]` of q, k and v, `[H, Dh, D]` of o; measured where weights are adapted or quantised."""
        matrix = projection_matrix(self.module)
        index = self.index.to(matrix.device)
        return matrix[index] if self.read else matrix[:, index].transpose(0, 1)


@dataclass(frozen=True)
class HeadVector:
    """A parameter with numbers for each head: an attention sink, or a norm over all heads. Row h of `index` is head h's.

    With `of_query` it counts query heads, else KV heads.
    """

    module: nn.Module
    name: str
    index: Int[Tensor, "H W"]
    of_query: bool


@dataclass(frozen=True)
class HeadMap:
    """One layer's heads in its weights."""

    query: Slices
    key: Slices
    value: Slices
    output: Slices
    vectors: tuple[HeadVector, ...] = ()

    @property
    def parts(self) -> tuple[Slices, Slices, Slices, Slices]:
        return self.query, self.key, self.value, self.output

    def groups(self, heads: Iterable[int]) -> list[int]:
        """The KV heads that these heads read, ascending."""
        n_heads, n_groups = len(self.query.index), len(self.key.index)
        return sorted({h * n_groups // n_heads for h in heads})

    def weights(self, heads: Collection[int]) -> list[tuple[nn.Module, int, Int[Tensor, "F"]]]:
        """What these heads and their KV heads have of each weight: its module, the dimension, and the features, ascending."""
        of_query, groups = sorted(heads), self.groups(heads)
        found: dict[nn.Module, tuple[int, list[Tensor]]] = {}
        for part, members in zip(self.parts, (of_query, groups, groups, of_query), strict=True):
            found.setdefault(part.holder, (part.dim, []))[1].append(part.index[members].flatten())
        return [(holder, dim, torch.cat(index).sort().values) for holder, (dim, index) in found.items()]

    def parameters(self, heads: Collection[int]) -> Iterator[tuple[nn.Parameter, int, Int[Tensor, "F"]]]:
        """`weights` as parameters, with the biases of q, k and v and the vectors that go with them."""
        for holder, dim, index in self.weights(heads):
            for name, along in (("weight", dim), ("bias", 0)):
                parameter = getattr(holder, name, None)
                if isinstance(parameter, nn.Parameter) and (name == "weight" or holder is not self.output.holder):
                    yield parameter, along, index
        for vector in self.vectors:
            members = sorted(heads) if vector.of_query else self.groups(heads)
            yield vector.module.get_parameter(vector.name), 0, vector.index[members].flatten()


def head_map(model: OpenedModel, layers: Collection[int] | None = None) -> dict[int, HeadMap]:
    """The map of each of `layers` (None: all). Costs a pass over a few one-token sequences a head.

    `UnsupportedError` where the projections are not as wide as q, k and v, or features are not a head's own.
    """
    model.require_alike("a map of heads to weights", every_layer=layers is None, even=True)
    wanted = sorted(range(model.n_layers) if layers is None else set(layers))
    probes = {layer: _Probe.of(model, layer) for layer in wanted}
    rows = max((probe.rows for probe in probes.values()), default=0)
    noise = torch.randn(model.head_dim, generator=torch.Generator().manual_seed(0))
    keeps = {part: Keep(SITE_OF[part], wanted) for part in PARTS}
    z = Keep("z", wanted)
    x = torch.randn(1, 1, model.layout.hidden_size, generator=torch.Generator().manual_seed(1)).expand(rows, -1, -1)
    with feeding(model, x, strict=False), contextlib.ExitStack() as stack:
        for probe in probes.values():
            for module, shift in probe.shifts(rows, noise):
                stack.enter_context(leaving(module, partial(_shifted, shift)))
        model.look(any_inputs(model, rows), *keeps.values(), z)
    found = {}
    for layer, probe in probes.items():
        if any(layer not in keep.values for keep in (*keeps.values(), z)):
            probe.refuse()
        moved = torch.cat([_moved(keep.values[layer]) for keep in keeps.values()], 1)
        found[layer] = probe.map(_most(moved), _moved(z.values[layer]))
    return found


@dataclass(frozen=True)
class _Probe:
    """One layer's candidates. Row 0 of the pass is plain, row 1 + b has noise on block b, those after them on one norm each."""

    model: OpenedModel
    layer: int
    projections: list[tuple[nn.Module, int]]  # and how many blocks of head_dim features each makes
    norms: list[nn.Module]

    @classmethod
    def of(cls, model: OpenedModel, layer: int) -> _Probe:
        block = model.layout.blocks[layer]
        found, norms, inside = {}, [], set(block.projection.modules())
        for name, module in block.attention.named_modules():
            if module in inside:
                continue
            counts = features_of(module)
            if counts is not None:
                found[name] = module, counts[1]
                inside |= set(module.modules())  # an adapter's own parts are no projections
            elif module not in (block.attention, block.core) and _over_heads(model, module):
                norms.append(module)
        q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        widths = sorted(width for _, width in found.values())
        if widths not in (sorted([q, kv, kv]), [q + 2 * kv]):
            raise UnsupportedError(
                f"cannot tell the heads of {type(model.plain).__name__} apart in its weights: expected projections of {q}, "
                f"{kv} and {kv} features (or one of {q + 2 * kv}), and found {', '.join(found) or 'none'} with {widths}."
            )
        return cls(model, layer, [(module, width // model.head_dim) for module, width in found.values()], norms)

    @property
    def n_blocks(self) -> int:
        return self.model.n_heads + 2 * self.model.n_kv_heads

    @property
    def rows(self) -> int:
        return 1 + self.n_blocks + len(self.norms)

    def shifts(self, rows: int, noise: Float[Tensor, "Dh"]) -> Iterator[tuple[nn.Module, Float[Tensor, "N F"]]]:
        """What is added to each module's output, by row."""
        row = 1
        for module, n in self.projections:
            shift = torch.zeros(rows, n, len(noise))
            shift[range(row, row + n), range(n)] = noise
            yield module, shift.flatten(1)
            row += n
        for module in self.norms:
            width = module.weight.numel()  # type: ignore[union-attr, operator]
            shift = torch.zeros(rows, width)
            shift[row] = noise.repeat(-(-width // len(noise)))[:width]
            yield module, shift
            row += 1

    def map(self, moved: Bool[Tensor, "N HGG"], z: Float[Tensor, "N H"]) -> HeadMap:
        """The map, proved by which heads' q, k and v each row's noise moved, and by how far it moved each z."""
        model, width = self.model, self.model.head_dim
        # This is a proof because noise on a block moves just the q, k and v made of it, however the forward reshapes them. If
        # every block moves one and every one is moved by one block, no feature is missing or shared.
        owners = moved[1 : 1 + self.n_blocks]
        if owners.shape[1] != self.n_blocks or bool((owners.sum(0) != 1).any() or (owners.sum(1) != 1).any()):
            self.refuse()
        slices: dict[Part, Slices] = {}
        block_of = owners.int().argmax(0).split(self._counts)
        for part, blocks in zip(PARTS, block_of, strict=True):
            first = 0
            for module, n in self.projections:
                local = blocks - first
                if bool(((local >= 0) & (local < n)).all()):
                    slices[part] = Slices(module, local[:, None] * width + torch.arange(width))
                first += n
        if len(slices) < len(PARTS):
            self.refuse()
        own = torch.arange(model.n_heads) * model.n_kv_heads // model.n_heads
        reads, z = own[None] == torch.arange(model.n_kv_heads)[:, None], z[1 + block_of[2]]
        # A KV head's value must reach its own query heads and no other. 10 is a wide margin: attention sinks leave little of
        # the value in some heads, rounding far less in the others.
        if bool((z.where(reads, torch.inf).amin(1) <= 10 * z.where(~reads, 0.0).amax(1)).any()):
            self.refuse()
        projection = model.layout.blocks[self.layer].projection
        output = Slices(projection, torch.arange(model.n_heads * width).unflatten(0, (-1, width)), read=True)
        return HeadMap(slices["query"], slices["key"], slices["value"], output, tuple(self._vectors(moved)))

    def _vectors(self, moved: Bool[Tensor, "N HGG"]) -> Iterator[HeadVector]:
        model, block = self.model, self.model.layout.blocks[self.layer]
        for name, parameter in block.core.named_parameters(recurse=False):
            if parameter.shape == (model.n_heads,):
                yield HeadVector(block.core, name, torch.arange(model.n_heads)[:, None], True)
        for row, norm in enumerate(self.norms, 1 + self.n_blocks):
            reached = [bool(part.any()) for part in moved[row].split(self._counts)]
            if sum(reached) == 1:
                n = self._counts[reached.index(True)]
                for name, parameter in norm.named_parameters(recurse=False):
                    yield HeadVector(norm, name, torch.arange(len(parameter)).unflatten(0, (n, -1)), reached[0])

    @property
    def _counts(self) -> list[int]:
        return [self.model.n_heads, self.model.n_kv_heads, self.model.n_kv_heads]

    def refuse(self) -> NoReturn:
        """Raise `UnsupportedError`: the noise did not prove a map."""
        raise UnsupportedError(
            f"cannot find which features of {type(self.model.plain).__name__}'s projections belong to which head: noise "
            f"on {self.model.head_dim} of them in layer {self.layer} does not reach just one head's query, key or value."
        )


def _over_heads(model: OpenedModel, module: nn.Module) -> bool:
    """Whether this is a norm with numbers for every head, and not the same for all."""
    weight = getattr(module, "weight", None)
    sizes = {n * model.head_dim for n in (model.n_heads, model.n_kv_heads)} - {model.head_dim}
    return isinstance(weight, Tensor) and weight.ndim <= 2 and weight.numel() in sizes


def _shifted(shift: Float[Tensor, "N F"], output: Tensor) -> Tensor:
    rows = output.reshape(len(shift), -1, shift.shape[1])
    return (rows + shift.to(rows)[:, None] * (1 + rows.abs().amax())).reshape(output.shape)  # larger than rounding


def _moved(value: Float[Tensor, "N T H Dh"]) -> Float[Tensor, "N H"]:
    """How far each head's vector is from that of row 0."""
    return (value - value[:1]).float().abs().amax((1, 3)).cpu()


def _most(moved: Float[Tensor, "N H"]) -> Bool[Tensor, "N H"]:
    """What a row moved by more than rounding: over a twentieth of its largest move."""
    return (moved > 0.05 * moved.amax(1, keepdim=True)) & (moved > 0)


# One-token sequences of one's own making


@contextlib.contextmanager
def feeding(
    model: OpenedModel, rows: Float[Tensor, "N 1 D"], *, behind_norm: bool = True, strict: bool = True
) -> Iterator[None]:
    """While this lasts every layer's attention reads `rows` (or its input norm does), and norms of q and k have no denominator.

    `UnsupportedError` for a norm there that is none, unless not `strict`: then it stays as it is.
    """
    with contextlib.ExitStack() as stack:
        for block in model.layout.blocks:
            for module in (block.module, block.attention) if behind_norm else (block.module,):
                stack.enter_context(entering(module, rows.to))
            for norm in block.attention.modules():
                weight = getattr(norm, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 1 and norm not in (block.post_norms or ()):
                    with contextlib.nullcontext() if strict else contextlib.suppress(UnsupportedError):
                        stack.enter_context(replaced_forward(norm, _direction_of(FoldedNorm.of(norm, len(weight)))))
        yield


def any_inputs(model: OpenedModel, rows: int) -> dict[str, Tensor]:
    """As many one-token sequences (what they hold is never read), or an image, whose patches have no masks to fit."""
    tiny = tiny_inputs(model.plain)
    return {name: value[:1, :1].expand(rows, 1) if value.ndim == 2 else value for name, value in tiny.items()}


def _direction_of(norm: FoldedNorm) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return lambda _: lambda x: norm.direction(x).to(x)
