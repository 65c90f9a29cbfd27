"""AMP (#84): cut the attention heads and the MLP units that write least, the same share of each in every layer.

Mugnaini et al., "Efficient LLMs with AMP: Attention Heads and MLP Pruning", arXiv:2504.21174. Over the tokens t of a prompt

    head score  I_h = mean over t of  | z_{t,h} W_O[h] |_1          after the output projection, in the stream's unit
    unit score  I_i = mean over t of  | a_{t,i} |                   a: what the MLP's last map reads

averaged over prompts, each of which counts the same. Both come from the whole model, and rank heads and units within a layer
only. To remove a share `ratio` of all parameters, r = ratio * total / (attention + MLP parameters) of each layer's heads go, and
then as many units as bring what was removed nearest to `ratio * total`.

Where we depart: the paper's code rounds units by heads, which leaves the rounding of heads uncorrected; here parameters are
counted. Under grouped-query attention whole groups go (by the sum of their heads' scores), or as many query heads of each group,
whichever comes nearer to r of the attention's parameters; the paper's code cuts k and v by query heads there. Prompts
are the project's own texts; the paper takes 50 of alpaca-cleaned. LoRA afterwards is `shrink.recovery`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.heads import HeadSet
from manyheads.inputs import check_choice, check_integer, check_number, check_seed
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.reading.readers import Activation, Reader
from manyheads.model.weights.slices import HeadMap, Slices, head_map
from manyheads.model.weights.units import GatedMlp, mlp_of, with_units
from manyheads.shrink.shrinking import shrinks
from manyheads.tasks.texts import passages

Order = Literal["standard", "reversed", "random", "magnitude"]
Groups = Literal["nearest", "groups", "members"]


@dataclass(frozen=True)
class Cut:
    """What goes: heads, and the units that stay in each layer; `removed` counts the parameters that go, of `total`."""

    heads: HeadSet
    units: tuple[Int[Tensor, "N"], ...]
    removed: int
    total: int


@dataclass(frozen=True)
class AMP:
    """Prune a share `ratio` of a model's parameters, heads and MLP units alike, at once.

    `order` is what goes first: "standard" what writes least; "reversed", "random" and "magnitude" (the L1 norm of the weights)
    are the controls. `groups` says what goes under grouped-query attention: whole groups, members of each, or what comes nearest.
    `prompts` (None: the texts that come with the package) give `n_prompts` passages of `length` tokens, or are token ids.
    """

    ratio: float = 0.3
    order: Order = "standard"
    groups: Groups = "nearest"
    prompts: Sequence[str] | Int[Tensor, "N T"] | None = None
    n_prompts: int = 50
    length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.ratio, "ratio", 0, 1)
        check_choice(self.order, "order", ("standard", "reversed", "random", "magnitude"))
        check_choice(self.groups, "groups", ("nearest", "groups", "members"))
        check_integer(self.n_prompts, "n_prompts", 1)
        check_integer(self.length, "length", 2)
        check_seed(self.seed)

    def convert(self, model: HeadModel) -> HeadModel:
        """The pruned model; `model` stays as it is. `InputError` for a ratio that would leave a layer without heads or units."""
        cut = self.plan(model)
        small = model.prune(cut.heads) if len(cut.heads) else model
        return HeadModel(*with_units(small, cut.units))

    def plan(self, model: HeadModel) -> Cut:
        """What `convert` cuts. `UnsupportedError` for a model whose heads or units cannot be told apart in its weights."""
        model.require_alike("AMP", even=True)
        maps, mlps = head_map(model), [mlp_of(model, layer) for layer in range(model.n_layers)]
        sizes = _Sizes.of(model, maps[0], mlps[0])
        share = sizes.share(self.ratio)
        how = min(self._ways(sizes, share), key=lambda way: abs(way.parameters - share * sizes.attention))
        n_units = sizes.units_to_drop(self.ratio, how.parameters)
        heads: list[tuple[int, int]] = []
        units = []
        for layer, (of_heads, of_units) in enumerate(zip(*self._scores(model, maps, mlps), strict=True)):
            heads += [(layer, h) for h in how.lowest(of_heads, sizes.n_kv_heads)]
            units.append(of_units.sort(stable=True).indices[n_units:].sort().values)
        removed = model.n_layers * (how.parameters + n_units * sizes.unit)
        return Cut(HeadSet(heads, model.shape), tuple(units), removed, sizes.total)

    def _ways(self, sizes: _Sizes, share: float) -> list[_Way]:
        """How a layer's heads may go: whole groups, or members of each."""
        group = sizes.n_heads // sizes.n_kv_heads
        n_groups = min(round(share * sizes.n_kv_heads), sizes.n_kv_heads - 1)
        n_members = min(round(share * group), group - 1)
        ways = {
            "groups": _Way(True, n_groups, n_groups * (group * sizes.query + sizes.key_value)),
            "members": _Way(False, n_members, n_members * sizes.n_kv_heads * sizes.query),
        }
        return list(ways.values()) if self.groups == "nearest" else [ways[self.groups]]

    def _scores(
        self, model: HeadModel, maps: Mapping[int, HeadMap], mlps: Sequence[GatedMlp]
    ) -> tuple[list[Float[Tensor, "H"]], list[Float[Tensor, "I"]]]:
        """What is cut by, heads and units of each layer: the lowest go first."""
        if self.order == "magnitude":
            return [_head_norms(maps[layer]) for layer in range(model.n_layers)], [_unit_norms(mlp) for mlp in mlps]
        if self.order == "random":
            rng = torch.Generator().manual_seed(self.seed)
            layers = range(model.n_layers)
            heads = [torch.rand(model.n_heads, generator=rng) for _ in layers]
            return heads, [torch.rand(mlp.units, generator=rng) for mlp in mlps]
        rows = self.prompts
        if not isinstance(rows, Tensor):
            rows = passages(model, rows, n=self.n_prompts, length=self.length, seed=self.seed)
        sign = -1 if self.order == "reversed" else 1
        return tuple([sign * one for one in some] for some in projected_scores(model, rows[: self.n_prompts], mlps))  # type: ignore[return-value]


def projected_scores(
    model: HeadModel, rows: Int[Tensor, "N T"], mlps: Sequence[GatedMlp] | None = None
) -> tuple[list[Float[Tensor, "H"]], list[Float[Tensor, "I"]]]:
    """The scores of heads and units in each layer (formulas above), in float32; `rows` are prompts of one length."""
    mlps = [mlp_of(model, layer) for layer in range(model.n_layers)] if mlps is None else mlps
    writes = _Writes(model)
    units: list[Tensor] = []
    with caught(*(mlp.down for mlp in mlps), side="input", keep=_mean_size) as found:
        for row in rows:  # a prompt at a time: no more memory than a pass takes, and each counts the same
            model.read(row[None], writes, keep=1)
            units.append(torch.stack(found))
            found.clear()
    heads = [writes.sums[layer] / len(rows) for layer in range(model.n_layers)]
    return heads, list(torch.stack(units).mean(0))


class _Writes(Reader):
    """Sums over passes the mean size of what each head writes."""

    site = "z"

    def __init__(self, model: HeadModel) -> None:
        self.model = model
        self.sums: dict[int, Tensor] = {}

    def read(self, call: Activation) -> None:
        z, W_O = call.value.float(), self.model.W_O(call.layer).detach().float()
        # A head at a time: all of them together are as large as H residual streams. In half precision the sums would overflow.
        sizes = torch.stack([(z[..., h, :] @ W_O[h]).abs().sum(-1).mean() for h in range(len(W_O))])
        self.sums[call.layer] = self.sums.get(call.layer, 0) + sizes.cpu()


def _mean_size(units: Float[Tensor, "... I"]) -> Float[Tensor, "I"]:
    return units.detach().float().abs().flatten(0, -2).mean(0).cpu()


def _head_norms(one: HeadMap) -> Float[Tensor, "H"]:
    query, key, value, output = (part.matrices().detach().float().abs().sum((1, 2)).cpu() for part in one.parts)
    group = len(query) // len(key)
    return query + output + (key + value).repeat_interleave(group) / group


def _unit_norms(mlp: GatedMlp) -> Float[Tensor, "I"]:
    return sum(
        p.detach().float().abs().movedim(dim, 0).flatten(1).sum(1).cpu() for p, dim in mlp.weights() if p.ndim == 2
    )  # type: ignore[return-value]


@dataclass(frozen=True)
class _Way:
    """`n` groups of each layer, or `n` members of each of its groups, with so many parameters."""

    whole: bool
    n: int
    parameters: int

    def lowest(self, scores: Float[Tensor, "H"], n_kv_heads: int) -> list[int]:
        """The heads with the lowest scores that go this way."""
        members = torch.arange(len(scores)).unflatten(0, (n_kv_heads, -1))
        by_group = scores.unflatten(0, (n_kv_heads, -1))
        if self.whole:
            return members[by_group.sum(1).sort(stable=True).indices[: self.n]].flatten().tolist()  # type: ignore[no-any-return]
        return members.gather(1, by_group.sort(dim=1, stable=True).indices[:, : self.n]).flatten().tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Sizes:
    """How many parameters go with a query head, a KV head and a unit of a layer, and how many there are."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_units: int
    query: int
    key_value: int
    unit: int
    total: int

    @classmethod
    def of(cls, model: HeadModel, one: HeadMap, mlp: GatedMlp) -> _Sizes:
        query, key, value, output = (_each(part) for part in one.parts)
        vectors = {True: 0, False: 0}
        for vector in one.vectors:
            vectors[vector.of_query] += vector.index.shape[1]
        total = sum(parameter.numel() for parameter in model.plain.parameters())
        return cls(
            model.n_layers, model.n_heads, model.n_kv_heads, mlp.units,
            query + output + vectors[True], key + value + vectors[False], mlp.parameters_each, total,
        )  # fmt: skip

    @property
    def attention(self) -> int:
        """Parameters of a layer's heads."""
        return self.n_heads * self.query + self.n_kv_heads * self.key_value

    def share(self, ratio: float) -> float:
        """The share of a layer that goes where `ratio` of all parameters do."""
        inside = self.n_layers * (self.attention + self.n_units * self.unit)
        if ratio * self.total >= inside:
            raise InputError(
                f"heads and MLPs hold {inside / self.total:.2f} of this model's parameters, so that {ratio:g} of all cannot go; "
                "give a smaller ratio."
            )
        return ratio * self.total / inside

    def units_to_drop(self, ratio: float, per_layer: int) -> int:
        """As many as bring what goes nearest to `ratio`, beside `per_layer` parameters of heads."""
        return max(0, min(round((ratio * self.total / self.n_layers - per_layer) / self.unit), self.n_units - 1))


def _each(part: Slices) -> int:
    weight, width = part.holder.get_parameter("weight"), part.index.shape[1]
    has_bias = not part.read and getattr(part.holder, "bias", None) is not None
    return width * (weight.numel() // weight.shape[part.dim] + has_bias)


@shrinks("amp", "weights", "the heads and MLP units that write least go, and the checkpoint is an ordinary one")
def _make(ratio: float) -> AMP:
    return AMP(ratio=ratio)
