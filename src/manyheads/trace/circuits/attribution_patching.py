"""Attribution patching: an estimate of the effect of patching every component at every position, from one gradient.

With a clean run's activation `a`, the corrupted run's `a'`, and a metric L, one number a row,

    score[site, l, t] = <a'[l, t] - a[l, t], dL/da[l, t] at the clean run>                                   in L's unit
    with m steps        <a' - a, mean_{k=1..m} dL/da at x'_0 + k/m (x_0 - x'_0)>,   x_0 what enters layer 0

is the first order of `L(clean, but a' at l, t) - L(clean)` (Nanda, 2023; Syed et al., arXiv:2310.10348; the integrated-gradients
form by Hanna et al., arXiv:2403.17806). Negative: the component's clean activation raises L. Sites are `z` (a head's output),
`query`, `key`, `value` (as one query head reads them), `mlp_write`, and `resid`, the stream entering each layer and leaving them.

Gradients are streamed (`model.replay.streaming`): only the residual streams between layers are kept of each run, and one block at
a time is run again. Apart from the streams, memory is that of one layer, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.heads import Head, HeadScores, mean_stderr
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.streaming import InnerSite, LayerGradients, RowMetric, Stream, checked_rows
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.tasks import Example, Task, TaskBatch
from manyheads.tasks.pairs import twinned
from manyheads.trace.explaining import LOST, Found, components, explains
from manyheads.trace.positions.patching_map import PositionMap, token_texts

NodeSite = Literal["z", "query", "key", "value", "mlp_write", "resid"]
BY_HEAD: tuple[NodeSite, ...] = ("z", "query", "key", "value")


@dataclass(frozen=True)
class NodeScores:
    """Estimated changes of the metric, one a row, layer and position: `values[site]` is `[B, L, T, H]` at a head's sites, `[B,
    L, T]` at `mlp_write` and `[B, L + 1, T]` at `resid`. `clean` and `corrupted` are the metric of the two runs."""

    values: dict[NodeSite, Float[np.ndarray, "B L T ..."]]
    clean: Float[np.ndarray, "B"]
    corrupted: Float[np.ndarray, "B"]
    tokens: tuple[tuple[str, ...], ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> Float[np.ndarray, "B L H"]:
        """Scores of patching each head's z, summed over positions."""
        return np.asarray(self._at("z").sum(2))

    @property
    def mlps(self) -> Float[np.ndarray, "B L"]:
        """Scores of patching each MLP's write, summed over positions."""
        return np.asarray(self._at("mlp_write").sum(2))

    def scores(self, site: NodeSite = "z") -> HeadScores:
        """Scores at a head's site, summed over positions: mean over rows with standard error."""
        if site not in BY_HEAD:
            raise InputError(f"{site} belongs to no head; choose from {', '.join(BY_HEAD)}.")
        return HeadScores.from_examples("attribution_patching", self._at(site).sum(2), {**self.meta, "site": site})

    def map(self, site: NodeSite) -> PositionMap:
        """The scores of one site by layer and position."""
        return PositionMap(site, self._at(site), self.clean, self.corrupted, self.tokens, self.meta)

    def to_frame(self) -> pd.DataFrame:
        """One row a node (positions summed), largest mean magnitude first: site, node, layer, score, stderr, magnitude, n."""
        parts = [self._frame_of(site) for site in self.values]
        frame = pd.concat(parts, ignore_index=True)
        return frame.sort_values("magnitude", ascending=False, kind="stable", ignore_index=True)

    def _frame_of(self, site: NodeSite) -> pd.DataFrame:
        summed = self.values[site].sum(2)
        n = len(summed)
        places = list(np.ndindex(summed.shape[1:]))
        flat = summed.reshape(n, -1)
        return pd.DataFrame(
            {
                "site": site,
                "node": [_name(site, place) for place in places],
                "layer": [place[0] for place in places],
                "score": flat.mean(0),
                "stderr": mean_stderr(flat)[1],
                "magnitude": np.abs(flat).mean(0),
                "n": n,
            }
        )

    def _at(self, site: NodeSite) -> Float[np.ndarray, "B L T ..."]:
        if site not in self.values:
            raise InputError(f"no scores at {site}; ask for it with sites= (there are {', '.join(self.values)}).")
        return self.values[site]


def attribution_patching(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    metric: RowMetric,
    *,
    sites: Collection[NodeSite] = ("z", "mlp_write", "resid"),
    steps: int = 1,
    keep: int | None = None,
    bar: Bar = Bar(),
) -> NodeScores:
    """Score every node of `sites` at every position (formula above); `steps` above 1 integrates the gradient along the path.

    `metric` gets the logits (of the last `keep` positions, if given) and returns one differentiable number a row.
    `bar` gets the number of steps done. `InputError` for an unknown site, inputs that differ in shape, or a metric of
    another form; `UnsupportedError` if layers cannot be run one at a time.
    """
    unknown = set(sites) - set(get_args(NodeSite))
    if unknown or not sites or isinstance(sites, str):
        raise InputError(f"sites is {sites!r}; give some of {', '.join(get_args(NodeSite))}.")
    if steps < 1:
        raise InputError(f"steps is {steps}; give 1 (the gradient at the clean run) or more.")
    batch = model.inputs(clean)
    here, there = Stream.of(model, batch), Stream.of(model, corrupted)
    if here.first.shape != there.first.shape:
        a, b = (list(run.first.shape[:2]) for run in (here, there))
        raise InputError(f"clean and corrupted inputs must have one shape; got {a} and {b} rows and tokens.")
    wanted: tuple[NodeSite, ...] = tuple(site for site in get_args(NodeSite) if site in sites)
    by_layer: dict[NodeSite, dict[int, np.ndarray]] = {site: {} for site in wanted}
    for k in range(1, steps + 1):
        start = there.first + (k / steps) * (here.first - there.first)
        on_path = here if k == steps else Stream.of(model, batch, start)
        for given in on_path.gradients(metric, _inner(wanted), keep):
            for site, dots in _scored(here, there, given, wanted, at_clean=on_path is here):
                by_layer[site][given.layer] = by_layer[site].get(given.layer, 0.0) + dots / steps
        bar(1)
    values = {site: np.stack([layers[i] for i in sorted(layers)], 1) for site, layers in by_layer.items()}
    plain, other = (_metric_of(run, metric, keep) for run in (here, there))
    paper = "arXiv:2310.10348" if steps == 1 else "arXiv:2403.17806"
    meta = Provenance.of(model, "attribution patching", paper, steps=steps).to_json()
    return NodeScores(values, plain, other, token_texts(model, batch, *here.first.shape[:2]), meta)


def task_attribution(
    model: HeadModel,
    task: Task | Sequence[Example] | TaskBatch,
    *,
    n: int = 64,
    seed: int = 0,
    rows: int = 16,
    sites: Collection[NodeSite] = ("z", "mlp_write", "resid"),
    steps: int = 1,
    bar: Bar = Bar(),
) -> NodeScores:
    """`attribution_patching` of many prompts and their twins, `rows` at a time; the metric is `logit[answer] - logit[foil]`.

    Prompts are left-padded, so the answer is predicted at position -1; padded positions score 0. `bar` gets the number of
    prompts done. `InputError` if examples have no twin or no foil.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}; give at least 1 prompt a pass.")
    batch = twinned(model, task, n, seed)
    found: list[NodeScores] = []
    for first in range(0, len(batch), rows):
        some = batch.rows(first, min(len(batch), first + rows))
        metric = some.logit_difference
        part = attribution_patching(model, some.inputs, some.twins, metric, sites=sites, steps=steps, keep=1)
        found.append(part)
        bar(len(some))
    return NodeScores(
        {site: np.concatenate([part.values[site] for part in found]) for site in found[0].values},
        np.concatenate([part.clean for part in found]),
        np.concatenate([part.corrupted for part in found]),
        tuple(row for part in found for row in part.tokens),
        {**found[0].meta, "seed": seed},
    )


def _inner(sites: Sequence[NodeSite]) -> tuple[InnerSite, ...]:
    return tuple(site for site in sites if site != "resid")


def _scored(
    here: Stream, there: Stream, given: LayerGradients, sites: Sequence[NodeSite], *, at_clean: bool
) -> list[tuple[NodeSite, Float[np.ndarray, "B T ..."]]]:
    """The inner products of one layer (formula above)."""
    layer, inner = given.layer, _inner(sites)
    found: list[tuple[NodeSite, np.ndarray]] = []
    if "resid" in sites:
        found.append(("resid", _dot(there.resid(layer) - here.resid(layer), given.resid)))
    if inner and layer < here.model.n_layers:
        other = there.activations(layer, inner)
        clean = given.values if at_clean else here.activations(layer, inner)
        found += [(site, _dot(other[site] - clean[site], given.inner[site])) for site in inner]
    return found


def _dot(apart: Float[Tensor, "B T ... D"], gradient: Float[Tensor, "B T ... D"]) -> Float[np.ndarray, "B T ..."]:
    return np.asarray((apart.double() * gradient.double()).sum(-1).cpu())


def _metric_of(run: Stream, metric: RowMetric, keep: int | None) -> Float[np.ndarray, "B"]:
    with torch.no_grad():
        rows = metric(run.head(run.resid(run.model.n_layers), keep))
    return np.asarray(checked_rows(rows, len(run.first)).double().cpu())


def _name(site: NodeSite, place: tuple[int, ...]) -> str:
    if site in BY_HEAD:
        return f"{Head(*place)}" + ("" if site == "z" else f".{site}")
    return f"M{place[0]}" if site == "mlp_write" else f"resid{place[0]}"


@explains(
    "attribution", f"an estimate of {LOST} a component writes what it writes on the corrupted prompt", needs_twin=True
)
def _explain(model: HeadModel, batch: TaskBatch) -> Found:
    """By integrated gradients over 10 steps."""
    scores = attribution_patching(
        model, batch.inputs, batch.twins, batch.logit_difference, sites=("z", "mlp_write"), steps=10, keep=1
    )
    return components(model, "attribution", -scores.heads.mean(0), -scores.mlps.mean(0)), {}
