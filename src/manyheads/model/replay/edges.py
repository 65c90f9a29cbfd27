"""Edges of the residual computation graph: which component feeds which. Scored by gradients, or patched exactly.

    senders     "embedding" (the residual stream entering layer 0), each head's write, each MLP's write
    receivers   each head's query, key and value, each MLP's input, "logits" (the final residual stream)

There is an edge u -> v where v reads a residual stream that u has written to. With `w_u` `[T, D]` what u writes in the clean run,
`w'_u` in the corrupted one, `grad_v L` the gradient of a metric L with respect to what v reads, `x_0` the embedding's write,

    EAP     score(u -> v) = <w_u - w'_u, grad_v L(x_0)>                                        arXiv:2310.10348
    EAP-IG  score(u -> v) = <w_u - w'_u, mean_{k=1..m} grad_v L(x'_0 + k/m (x_0 - x'_0))>      arXiv:2403.17806
    exact   score(u -> v) = L(clean) - L(clean, but v reads w'_u instead of w_u)

all in L's unit, positive where the edge raises L; EAP is EAP-IG with m = 1, and the first-order estimate of the exact score.

`grad_v` is exact at every granularity. The graph of one pass is cut before each block and after each attention. Autograd pulls
dL/dq (k, v) back, a head at a time, through projection, rotary embedding, query norm and input norm to the residual stream, and
dL/d(MLP's write) to the block's input and the attention's write. So no norm's denominator is held fixed and nothing
needs to know where an architecture keeps its norms. Under grouped-query attention key and value are as one query head reads them.
A norm inside the branch (Gemma, OLMo 2) makes a head's write depend on the others'; each write is taken with its own run's
denominator, so an edge carries this head's share alone, where patching its z would rescale the other heads too. One layer's
gradients are in memory at a time; scores `[B, S, R]` are all that is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import grad

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, mean_stderr
from manyheads.model.editing.edits import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import entering, leaving
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.attention import PARTS, Part
from manyheads.model.reading.readers import Activation, Keep, KeepGraph, Reader
from manyheads.model.replay.patching import Mlp, Receiver
from manyheads.model.replay.recording import Recording, first_logits, no_cache, only_last, replay, starting_at
from manyheads.model.replay.streaming import RowMetric, checked_rows
from manyheads.model.replay.sweeping import variants_at_once
from manyheads.progress import Bar

Sender = Literal["embedding"] | Head | Mlp
End = Receiver | Mlp | Literal["logits"]
Edge = tuple[Sender, End]


@dataclass(frozen=True)
class EdgeScores:
    """Scores of edges, one a row of the batch, in the metric's unit. NaN where there is no edge, or none was asked for."""

    senders: tuple[Sender, ...]
    receivers: tuple[End, ...]
    values: Float[np.ndarray, "B S R"]

    @property
    def mean(self) -> Float[np.ndarray, "S R"]:
        return np.asarray(self.values.mean(0))

    @property
    def exists(self) -> Bool[np.ndarray, "S R"]:
        """Which pairs are edges that were scored, boolean."""
        return ~np.isnan(self.values[0])

    def __getitem__(self, edge: Edge) -> Float[np.ndarray, "B"]:
        try:
            return np.asarray(self.values[:, self.senders.index(edge[0]), self.receivers.index(edge[1])])
        except ValueError:
            raise InputError(f"{edge[0]!r} -> {edge[1]!r} joins no sender and receiver of these scores.") from None

    def to_frame(self) -> pd.DataFrame:
        """A row an edge, largest mean magnitude first: sender, receiver, score, stderr, magnitude (mean of |score|), n."""
        s, r = np.nonzero(self.exists)
        values, n = self.values[:, s, r], len(self.values)
        frame = pd.DataFrame(
            {
                "sender": [name_of(self.senders[i]) for i in s],
                "receiver": [name_of(self.receivers[i]) for i in r],
                "score": values.mean(0),
                "stderr": mean_stderr(values)[1],
                "magnitude": np.abs(values).mean(0),
                "n": n,
            }
        )
        return frame.sort_values("magnitude", ascending=False, kind="stable", ignore_index=True)


def name_of(node: Sender | End) -> str:
    """How a sender or a receiver is written: `embedding`, `L0H3`, `M2`, `L1H0.query`, `logits`."""
    if isinstance(node, Receiver):
        return f"{node.head}.{node.part}"
    return f"M{node.layer}" if isinstance(node, Mlp) else str(node)


def node_named(name: str) -> Sender | End:
    """The sender or receiver that `name_of` writes so. `InputError` for anything else."""
    if name in ("embedding", "logits"):
        return name  # type: ignore[return-value]
    if name[:1] == "M" and name[1:].isdigit():
        return Mlp(int(name[1:]))
    head, _, part = name.partition(".")
    if not part:
        return Head.parse(head)
    if part not in PARTS:
        raise InputError(f"{name!r} names no part of a head; write query, key or value after the dot.")
    return Receiver(Head.parse(head), part)  # type: ignore[arg-type]


def senders(model: HeadModel) -> tuple[Sender, ...]:
    """Every sender, in the order of the pass: the embedding, then each layer's heads and its MLP."""
    found: list[Sender] = ["embedding"]
    for layer in range(model.n_layers):
        found += [*(Head(layer, h) for h in range(model.n_heads)), Mlp(layer)]
    return tuple(found)


def receivers(model: HeadModel) -> tuple[End, ...]:
    """Every receiver, in the order of the pass: each layer's queries, keys, values and its MLP, then the logits."""
    return (*(end for i in range(model.n_layers) for end in _receivers_in(model, i)), "logits")


def edges(model: HeadModel) -> list[Edge]:
    """Every edge. Where a block computes attention and MLP side by side, a head's edge to its own layer's MLP carries nothing."""
    return [(s, end) for end in receivers(model) for s in senders(model) if _feeds(s, end)]


def edge_attribution(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    metric: RowMetric,
    *,
    steps: int = 5,
    keep: int | None = None,
    bar: Bar = Bar(),
) -> EdgeScores:
    """Score every edge by EAP-IG with `steps` points on the path, or by EAP with `steps=1` (formulas above).

    `metric` gets the logits, of the last `keep` positions if that is given, and returns one differentiable number a row. A
    divergence from the clean run is flat at the clean run itself: EAP scores it zero, EAP-IG does not. `bar` gets the number
    of steps done. `InputError` if clean and corrupted inputs differ in shape, or for a metric of another form; `UnsupportedError`
    where heads, MLPs and embedding are not all that a residual stream is the sum of (BERT normalises it after each addition).
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; give 1 (EAP) or more.")
    batch = model.inputs(clean)
    here, there = _Writes.of(model, batch), _Writes.of(model, corrupted)
    apart = here.minus(there)
    ends = receivers(model)
    values = np.zeros((len(here.embedding), len(senders(model)), len(ends)))
    for k in range(1, steps + 1):
        start = there.embedding + (k / steps) * (here.embedding - there.embedding)
        column = len(ends)
        for layer, given in _CutPass(model, batch, start, metric, keep).gradients():
            first = column - len(given.before)
            values[:, : 1 + layer * (model.n_heads + 1), first:column] += apart.dot(given.before, range(layer))
            if given.beside is not None:
                own = 1 + layer * (model.n_heads + 1)
                values[:, own : own + model.n_heads, column - 1] += apart.heads_dot(given.beside[None], layer)[..., 0]
            column = first
        bar(1)
    absent = np.array([[not _feeds(s, end) for end in ends] for s in senders(model)])
    return EdgeScores(senders(model), ends, np.where(absent, np.nan, values / steps))


def edge_patching(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    metric: RowMetric,
    *,
    edges: Sequence[Edge] | None = None,
    keep: int | None = None,
    max_tokens: int | None = None,
    bar: Bar = Bar(),
) -> EdgeScores:
    """The exact score of every edge, or of `edges`, each patched by itself (formula above).

    Replayed from the receiver's layer, the edges of one layer batched (`max_tokens` bounds a batch, see `HeadModel.sweep`).
    `bar` gets the number of edges done. Errors as in `edge_attribution`.
    """
    run = _PatchRun.of(model, clean, corrupted, keep)
    ends, who = receivers(model), senders(model)
    chosen = _checked(model, [(s, end) for end in ends for s in who if _feeds(s, end)] if edges is None else edges)
    logits = run.recording.logits if keep is None else run.recording.logits[:, -keep:]
    plain = _rows(metric, logits)
    values = np.full((len(plain), len(who), len(ends)), np.nan)
    by_layer: dict[int, list[Edge]] = {}
    for edge in chosen:
        by_layer.setdefault(_layer_of(edge[1], model.n_layers), []).append(edge)
    at_once = max(1, variants_at_once(run.recording, max_tokens) // 2)
    for layer in sorted(by_layer):
        for first in range(0, len(by_layer[layer]), at_once):
            chunk = by_layer[layer][first : first + at_once]
            patched = run.logits([[edge] for edge in chunk]).split(run.recording.batch)
            for (s, end), rows in zip(chunk, patched, strict=True):
                values[:, who.index(s), ends.index(end)] = plain - _rows(metric, rows)
            bar(len(chunk))
    return EdgeScores(who, ends, values)


def patch_edges(
    model: HeadModel, clean: Any, corrupted: Any, edges: Iterable[Edge | tuple[str, str]], *, keep: int | None = None
) -> Float[Tensor, "B *T V"]:
    """Logits of the clean run with all of `edges` patched together: what is left of the model outside them.

    What a sender writes is recomputed from what it now reads; only along `edges` its corrupted write is read instead. Beside
    the batch run as many copies of it as one layer's receivers have different sets of patched senders. Errors as in
    `edge_attribution`.
    """
    return next(patch_edge_sets(model, clean, corrupted, [edges], keep=keep))


def patch_edge_sets(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    sets: Iterable[Iterable[Edge | tuple[str, str]]],
    *,
    mean: bool = False,
    keep: int | None = None,
) -> Iterator[Float[Tensor, "B *T V"]]:
    """`patch_edges` for each of `sets`, over one recording. With `mean`, what is read along patched edges is the corrupted
    writes' mean over rows, position by position (arXiv:2211.00593); rows must then be of one template."""
    run = _PatchRun.of(model, clean, corrupted, keep, mean=mean)
    for some in sets:
        yield run.logits([_checked(model, list(some))])


# The graph


def _receivers_in(model: HeadModel, layer: int) -> list[End]:
    return [*(Receiver(Head(layer, h), part) for part in PARTS for h in range(model.n_heads)), Mlp(layer)]


def _layer_of(node: Sender | End, n_layers: int) -> int:
    if isinstance(node, str):
        return -1 if node == "embedding" else n_layers
    return node.head.layer if isinstance(node, Receiver) else node.layer


def _feeds(sender: Sender, end: End) -> bool:
    if sender == "embedding" or end == "logits":
        return True
    assert not isinstance(sender, str) and not isinstance(end, str)
    layer = _layer_of(end, 0)
    return sender.layer < layer or (isinstance(end, Mlp) and isinstance(sender, Head) and sender.layer == layer)


def _checked(model: HeadModel, edges: Sequence[Edge | tuple[str, str]]) -> list[Edge]:
    who: set[Any] = set(senders(model))
    ends: set[Any] = set(receivers(model))
    for edge in edges:
        if len(edge) != 2 or edge[0] not in who or edge[1] not in ends or not _feeds(*edge):
            raise InputError(f"{edge!r} is no edge of this model; see edges(model) for those it has.")
    return cast(list[Edge], list(edges))


def _rows(metric: RowMetric, logits: Tensor) -> Float[np.ndarray, "B"]:
    return np.asarray(checked_rows(metric(logits), len(logits)).detach().double().cpu())


# What senders write


@dataclass(frozen=True)
class _Writes:
    """What every sender of one run writes. A head's is kept as its z, divided by the denominator of a norm inside the branch."""

    model: HeadModel
    after: tuple[FoldedNorm | Tensor | None, ...]
    embedding: Float[Tensor, "B T D"]
    z: dict[int, Float[Tensor, "B T H Dh"]]
    mlp: dict[int, Float[Tensor, "B T D"]]

    @classmethod
    def of(cls, model: HeadModel, inputs: Any) -> _Writes:
        """Read one pass, and check that the writes sum to its final residual stream."""
        model.require_alike("edges between components")
        if model.layout.blocks[0].post_norms is not None:
            raise UnsupportedError(
                f"{type(model.plain).__name__} normalises the residual stream after each addition, so it is no sum of "
                "writes with edges between them; use path_patching."
            )
        z, mlp, attention = Keep("z"), Keep("mlp_write"), Keep("attention_write")
        resid = Keep("resid", layers=[0, model.n_layers])
        model.read(inputs, z, mlp, attention, resid)
        after = tuple(_after_projection(model, layer) for layer in range(model.n_layers))
        writes = cls(model, after, resid.values[0], z.values, mlp.values)
        terms = torch.stack([resid.values[0], *attention.values.values(), *mlp.values.values()])
        sums = _close(terms.sum(0), resid.values[model.n_layers], terms)
        for layer, value in z.values.items():
            z.values[layer] = writes.unit(layer, value)
            bias = attention.values[layer] - writes.of_heads(layer, z.values[layer]).sum(2)
            sums = sums and _close(bias, bias.mean((0, 1), keepdim=True), terms)
        if not sums:
            raise UnsupportedError(
                f"{type(model.plain).__name__} adds more to its residual stream than what its heads and MLPs write and a "
                "constant, so its edges cannot be separated; use path_patching."
            )
        return writes

    def minus(self, other: _Writes) -> _Writes:
        if self.embedding.shape != other.embedding.shape:
            a, b = (list(run.embedding.shape[:2]) for run in (self, other))
            raise InputError(f"clean and corrupted inputs must have one shape; got {a} and {b} rows and tokens.")
        z = {layer: self.z[layer] - other.z[layer] for layer in self.z}
        mlp = {layer: self.mlp[layer] - other.mlp[layer] for layer in self.mlp}
        return _Writes(self.model, self.after, self.embedding - other.embedding, z, mlp)

    def averaged(self) -> _Writes:
        """Each sender's mean over rows, in every row."""
        z, mlp = ({layer: _averaged(of) for layer, of in some.items()} for some in (self.z, self.mlp))
        return _Writes(self.model, self.after, _averaged(self.embedding), z, mlp)

    def unit(self, layer: int, z: Float[Tensor, "B T H Dh"]) -> Float[Tensor, "B T H Dh"]:
        """Z over the denominator of the norm after the output projection, where there is one."""
        norm = self.after[layer]
        if not isinstance(norm, FoldedNorm):
            return z
        projected = z.flatten(-2).double() @ self.model.W_O(layer).detach().flatten(0, 1).double()
        bias = self.model.bias_O(layer)
        projected = projected if bias is None else projected + bias.detach().double()
        return (z / norm.sigma(projected)[..., None]).to(z)

    def of_heads(
        self, layer: int, unit: Float[Tensor, "B T h Dh"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "B T h D"]:
        """What heads (None: all) with such z add to the residual stream."""
        W_O = self.model.W_O(layer).detach()
        written = torch.einsum("bthe,hed->bthd", unit, (W_O if heads is None else W_O[list(heads)]).to(unit))
        after = self.after[layer]
        if after is not None:
            written = after.direction(written).to(unit) if isinstance(after, FoldedNorm) else written * after
        return written * self.model.layout.residual_scale

    def dot(self, given: Float[Tensor, "R B T D"], layers: Iterable[int]) -> Float[np.ndarray, "B S R"]:
        """Inner products of gradients with the writes of the embedding and of `layers`, in the order of `senders`."""
        parts = [_dot(self.embedding[:, :, None], given)]
        for layer in layers:
            parts += [_dot(self.of_heads(layer, self.z[layer]), given), _dot(self.mlp[layer][:, :, None], given)]
        return np.asarray(torch.cat(parts, 1))

    def heads_dot(self, given: Float[Tensor, "R B T D"], layer: int) -> Float[np.ndarray, "B H R"]:
        """Inner products of gradients with the writes of one layer's heads."""
        return np.asarray(_dot(self.of_heads(layer, self.z[layer]), given))


def _averaged(written: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    return written.mean(0, keepdim=True).expand_as(written)


def _dot(writes: Float[Tensor, "B T S D"], given: Float[Tensor, "R B T D"]) -> Float[Tensor, "B S R"]:
    dtype = torch.promote_types(given.dtype, torch.float32)
    return torch.einsum("btsd,rbtd->bsr", writes.to(given.device, dtype), given.to(dtype)).double().cpu()


def _after_projection(model: HeadModel, layer: int) -> FoldedNorm | Tensor | None:
    """The norm, or the gain of the layer scale `[D]`, between the output projection and the residual stream."""
    block = model.layout.blocks[layer]
    if block.attention_write is block.projection:
        return None
    try:
        return FoldedNorm.of(block.attention_write, model.layout.hidden_size)
    except UnsupportedError:
        with torch.no_grad():
            gain: Tensor = block.attention_write(model.W_O(layer).new_ones(model.layout.hidden_size))
        return gain


def _close(a: Tensor, b: Tensor, terms: Tensor) -> bool:
    exact = {torch.float32: 1e-3, torch.float64: 1e-6}.get(a.dtype, 0.05)
    return bool((a - b).abs().max() <= exact * terms.abs().max())


# Gradients of what receivers read


@dataclass(frozen=True)
class _Given:
    """One layer's gradients: with respect to the block's input through each receiver alone, and to the attention's write (in the
    unit of the residual stream) through the MLP."""

    before: Float[Tensor, "R B T D"]
    beside: Float[Tensor, "B T D"] | None


@dataclass
class _CutPass:
    """One pass with gradients from a given `x_0`, the graph cut before each block, after each attention, before the head."""

    model: HeadModel
    batch: dict[str, Any]
    start: Tensor
    metric: RowMetric
    keep: int | None
    entering: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    cut: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)

    def gradients(self) -> Iterator[tuple[int, _Given]]:
        """From the logits down: each receiving layer (the logits count as layer `n_layers`) with its gradients."""
        model = self.model
        parts = [KeepGraph("q"), KeepGraph("k"), KeepGraph("v")]
        with torch.enable_grad(), self._hooked(), model.reading(*parts):
            logits = first_logits(
                model.plain(**self.batch, **no_cache(model.plain), **only_last(model.plain, self.keep))
            )
            logits = logits if self.keep is None else logits[:, -self.keep :]
            rows = checked_rows(self.metric(logits), len(self.start))
            if not rows.requires_grad:
                raise InputError("the metric does not depend on the logits by operations that have a gradient.")
            (above,) = grad(rows.sum(), self.entering[-1])
        yield model.n_layers, _Given(above[None], None)
        for layer in reversed(range(model.n_layers)):
            given, above = self._through(layer, [part.values.pop(layer) for part in parts], above)
            yield layer, given

    def _through(self, layer: int, parts: list[Tensor], above: Tensor) -> tuple[_Given, Tensor]:
        x, attention, cut, mlp = self.entering[layer], self.attention[layer], self.cut[layer], self.mlp[layer]
        # The first gives total derivatives, for the stream below; the next two the MLP's and the attention's part, for the edges.
        to_mlp, to_attention, to_x = grad(self.leaving[layer], [mlp, cut, x], above, retain_graph=True)
        # Unused where a block runs attention and MLP side by side: its MLP does not read its attention.
        mlp_to_x, beside = grad(mlp, [x, cut], to_mlp, retain_graph=True, allow_unused=True)
        attention_to_x, *to_parts = grad(attention, [x, *parts], to_attention, retain_graph=True)
        mlp_to_x = torch.zeros_like(x) if mlp_to_x is None else mlp_to_x
        before = torch.stack([*self._by_head(x, parts, to_parts), mlp_to_x])
        # q, k and v must carry all of the attention's gradient; what else reached x would be an edge nobody scores.
        if not _close(before[:-1].sum(0), attention_to_x, before):
            raise UnsupportedError(
                f"{type(self.model.plain).__name__}'s attention reads more of the residual stream than its query, key and value, "
                "so edges into its heads cannot be separated; use path_patching."
            )
        scale = self.model.layout.residual_scale
        return _Given(before, None if beside is None else beside / scale), to_x + attention_to_x

    @staticmethod
    def _by_head(x: Tensor, parts: Sequence[Tensor], to_parts: Sequence[Tensor]) -> Iterator[Tensor]:
        for part, to_part in zip(parts, to_parts, strict=True):
            for h in range(part.shape[2]):
                only = torch.zeros_like(to_part)  # each head is a receiver of its own; one pull would give their sum
                only[:, :, h] = to_part[:, :, h]
                yield grad(part, x, only, retain_graph=True)[0]

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer, block in enumerate(self.model.layout.blocks):
                for hook in (
                    entering(block.module, self._before_first if layer == 0 else self._before_block),
                    leaving(block.attention_write, self._after_attention),
                    leaving(block.mlp_write, self._after_mlp),
                    leaving(block.module, self._after_last if layer == self.model.n_layers - 1 else self._after_block),
                ):
                    stack.enter_context(hook)
            yield

    def _before_first(self, _: Tensor) -> Tensor:
        return _leaf(self.start, self.entering)

    def _before_block(self, hidden: Tensor) -> Tensor:
        return _leaf(hidden, self.entering)

    def _after_attention(self, written: Tensor) -> Tensor:
        self.attention.append(written)
        return _leaf(written, self.cut)

    def _after_mlp(self, written: Tensor) -> Tensor:
        self.mlp.append(written)
        return written.clone()  # Falcon adds to it in place

    def _after_block(self, hidden: Tensor) -> None:
        self.leaving.append(hidden)

    def _after_last(self, hidden: Tensor) -> Tensor:
        self.leaving.append(hidden)
        return _leaf(hidden, self.entering)


def _leaf(value: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(value.detach().requires_grad_())
    return kept[-1].clone()  # a layer may add in place


# Patching


@dataclass(frozen=True)
class _Group:
    """Receivers of one layer and one variant that read alike: not the clean writes of `senders` but their corrupted ones."""

    variant: int
    senders: frozenset[Sender]
    ends: tuple[End, ...]


@dataclass
class _PatchRun:
    """Clean runs with edges patched.

    Each variant's rows come first, then scratch rows, one batch a group. A group's scratch rows enter a layer with the stream
    that its receivers read, and hand q, k, v or the MLP's write to the variant's rows.
    """

    model: HeadModel
    recording: Recording
    clean: _Writes
    corrupted: _Writes
    keep: int | None

    @classmethod
    def of(cls, model: HeadModel, clean: Any, corrupted: Any, keep: int | None, *, mean: bool = False) -> _PatchRun:
        batch = model.inputs(clean)
        here, there = _Writes.of(model, batch), _Writes.of(model, corrupted)
        here.minus(there)  # only for its check of the shapes
        return cls(model, model.record(batch), here, there.averaged() if mean else there, keep)

    def logits(self, variants: Sequence[Sequence[Edge]]) -> Float[Tensor, "nB *T V"]:
        """Logits with each variant's edges patched."""
        model, n_layers = self.model, self.model.n_layers
        groups = self._groups(variants)
        start = min(groups, default=n_layers)
        # Scratch rows are used again in each layer, so the layer with the most groups sets their number.
        n = len(variants) + max((len(some) for layer, some in groups.items() if layer < n_layers), default=0)
        pass_ = _Patching(self, groups, start, len(variants))
        redirect = _Redirect(
            [end.head for some in groups.values() for g in some for end in g.ends if isinstance(end, Receiver)],
            groups=groups,
            rows=None,
            at=pass_.rows,
            scratch=pass_.scratch,
        )
        with contextlib.ExitStack() as stack:
            for context in (model.editing(redirect), model.reading(pass_), pass_.hooked()):
                stack.enter_context(context)
            with starting_at(model.layout, self.recording, start, n):
                logits = replay(model.plain, self.recording, n, **only_last(model.plain, self.keep))
        logits = logits[: len(variants) * self.recording.batch]
        return logits if self.keep is None else logits[:, -self.keep :]

    def _groups(self, variants: Sequence[Sequence[Edge]]) -> dict[int, list[_Group]]:
        """Receivers with the same patched senders, by layer: they share one scratch batch, which is what a pass costs."""
        reads: dict[tuple[int, End], set[Sender]] = {}
        for i, some in enumerate(variants):
            for sender, end in some:
                reads.setdefault((i, end), set()).add(sender)
        alike: dict[tuple[int, int, frozenset[Sender]], list[End]] = {}
        for (i, end), of in reads.items():
            alike.setdefault((_layer_of(end, self.model.n_layers), i, frozenset(of)), []).append(end)
        groups: dict[int, list[_Group]] = {}
        for (layer, i, of_group), ends in alike.items():
            groups.setdefault(layer, []).append(_Group(i, of_group, tuple(ends)))
        return groups


@dataclass(eq=False)
class _Patching(Reader):
    """The hooks that fill the scratch rows of one patched pass, and the live z they need."""

    run: _PatchRun
    groups: dict[int, list[_Group]]
    start: int
    n_variants: int
    z: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    site = "z"

    def rows(self, i: int) -> slice:
        """Rows of variant or scratch copy i."""
        batch = self.run.recording.batch
        return slice(i * batch, (i + 1) * batch)

    def scratch(self, g: int) -> slice:
        """Scratch rows of a layer's group g."""
        return self.rows(self.n_variants + g)

    def read(self, call: Activation) -> None:
        """Note z, of which heads' live writes are made."""
        if call.layer >= self.start:
            self.z[call.layer] = call.value

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer, block in enumerate(self.run.model.layout.blocks):
                if layer >= self.start:
                    for hook in (
                        entering(block.module, partial(self._before_block, layer)),
                        leaving(block.attention_write, partial(self._after_attention, layer)),
                        leaving(block.mlp_write, partial(self._after_mlp, layer)),
                    ):
                        stack.enter_context(hook)
            stack.enter_context(leaving(self.run.model.layout.blocks[-1].module, self._before_head))
            yield

    def _before_block(self, layer: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        # Only the stream that this group's receivers read is changed: the variant's own rows go on with what they had.
        for g, group in enumerate(self.groups.get(layer, ())):
            earlier = [s for s in group.senders if _layer_of(s, 0) < layer]
            hidden[self.scratch(g)] = hidden[self.rows(group.variant)] - self._apart(group.variant, earlier)
        return hidden

    def _after_attention(self, layer: int, written: Tensor) -> Tensor:
        new = self._by_rows(written)
        # A group's MLP reads what the variant's own attention wrote, not what the scratch rows' q, k and v made, and without its
        # patched heads of this layer.
        for g, group in enumerate(self.groups.get(layer, ())):
            beside = [s for s in group.senders if _layer_of(s, 0) == layer]
            apart = self._apart(group.variant, beside) / self.run.model.layout.residual_scale
            new[self.scratch(g)] = new[self.rows(group.variant)] - apart
        return new.reshape(written.shape)

    def _after_mlp(self, layer: int, written: Tensor) -> Tensor:
        new = self._by_rows(written)
        for g, group in enumerate(self.groups.get(layer, ())):
            if Mlp(layer) in group.ends:
                new[self.rows(group.variant)] = new[self.scratch(g)]
        self.mlp[layer] = new * self.run.model.layout.residual_scale
        return new.reshape(written.shape)

    def _before_head(self, output: Tensor) -> Tensor:
        hidden = output.clone()
        for group in self.groups.get(self.run.model.n_layers, ()):
            hidden[self.rows(group.variant)] -= self._apart(group.variant, group.senders)
        return hidden

    def _by_rows(self, written: Tensor) -> Float[Tensor, "nB T D"]:
        """A copy, with rows and positions apart (OPT flattens them)."""
        return written.clone().reshape(-1, self.run.recording.length, written.shape[-1])

    def _apart(self, variant: int, of: Iterable[Sender]) -> Tensor | float:
        """What these senders write in the variant's rows, less what they write in the corrupted run."""
        clean, corrupted, rows = self.run.clean, self.run.corrupted, self.rows(variant)
        apart: Tensor | float = 0.0
        heads: dict[int, list[int]] = {}
        for sender in of:
            if isinstance(sender, Head):
                heads.setdefault(sender.layer, []).append(sender.index)
            elif isinstance(sender, Mlp):
                # Below the replay's first layer nothing has changed: what the clean run wrote is still what is written.
                live = self.mlp[sender.layer][rows] if sender.layer in self.mlp else clean.mlp[sender.layer]
                apart = apart + live - corrupted.mlp[sender.layer]
            else:
                apart = apart + clean.embedding - corrupted.embedding
        for layer, indices in heads.items():
            live = clean.unit(layer, self.z[layer][rows]) if layer in self.z else clean.z[layer]
            z = (live - corrupted.z[layer])[:, :, indices]
            apart = apart + clean.of_heads(layer, z, indices).sum(2)
        return apart


@dataclass(frozen=True, eq=False)
class _Redirect(Edit):
    """Takes receivers' q, k and v from their group's scratch rows."""

    groups: dict[int, list[_Group]] = field(default_factory=dict)
    at: Callable[[int], slice] = slice
    scratch: Callable[[int], slice] = slice

    @property
    def acts_in_attention(self) -> bool:
        return True

    def parts(self) -> frozenset[Part]:
        return frozenset(PARTS)

    def change(self, layer: int, part: Part, tensor: Tensor) -> Tensor:
        new = tensor.clone()
        for g, group in enumerate(self.groups.get(layer, ())):
            heads = [end.head.index for end in group.ends if isinstance(end, Receiver) and end.part == part]
            new[self.at(group.variant), heads] = tensor[self.scratch(g)][:, heads]
        return new
