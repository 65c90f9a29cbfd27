"""The circuit that finds the indirect object: movers, inhibition, duplicate, induction and previous-token heads.

Wang et al., arXiv:2211.00593. On `When Mary and John went to the store, John gave a cup to` the circuit is traced back from the
logits. With m = logit(answer) - logit(foil), and m(s -> R) the same when head s takes its z from the twin prompt on the paths to
R alone (`path_patching`, heads frozen, MLPs recomputed),

    effect[s] = (m(s -> R) - m) / (m_twin - m)        share of the logit difference; below 0: against it

| class | R | attends | further |
| --- | --- | --- | --- |
| name mover | logits | end -> answer | copies: score >= `copy` |
| negative name mover | logits (effect counted negative) | end -> answer | copies with -W_OV |
| S-inhibition | queries of the name movers, at the end | end -> S2 | |
| duplicate token | values of the S-inhibition heads, at S2 | S2 -> S1 | |
| induction | the same | S2 -> S1+1 | |
| previous token | keys of the induction heads, at S1+1 | S1+1 -> S1 | |

    score[class, l, h] = effect, where attention on the class's edge is at least `attention`; else 0
    copy[l, h] = share of the task's answer tokens that are among the 5 tokens their own (E_0 W_OV W_U) raises most (or lowers)

Heads that score `least` or more are the members of a class and the receivers of the next one, so a class is empty where the one
before is. Other tasks take part through the spans that play these roles (`Roles`); coloured objects have no S1+1 and so no
induction class. Departure: the paper picks heads by eye, we by the three thresholds. The
"swap" twin of IOI leaves S1 and S1+1 as they are, so it cannot see previous-token heads: the default is the paper's "abc" twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import by_task
from manyheads.atlas.core.registry import register
from manyheads.atlas.patterns.copying import token_embedding
from manyheads.errors import InputError
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall, Part
from manyheads.model.reading.readers import Reader
from manyheads.model.replay.patching import Effects, path_patching
from manyheads.model.weights.ov import ov, readout
from manyheads.progress import Bar, Scaled
from manyheads.tasks import IOI, Example, Task, TaskBatch
from manyheads.tasks.pairs import twinned

LOGITS = 2**24  # numbers held at once for copy scores
TOP = 5  # a head copies a token that is among so many of those its write raises most
LEAST = 0.02
Array = np.ndarray


def _about(name: str, title: str, what: str, formula: str) -> About:
    return About(f"ioi_{name}", title, what, formula, "share", "arXiv:2211.00593", LEAST, kind="ioi", low=-1.0)


ABOUT: dict[str, About] = {
    about.name: about
    for about in (
        _about(
            "name_mover",
            "Name mover",
            "Attends from the end to the right name and raises its logit.",
            "share of the logit difference lost when its direct path to the logits carries the twin's z",
        ),
        _about(
            "negative_name_mover",
            "Negative name mover",
            "Attends from the end to the right name and lowers its logit.",
            "share of the logit difference won when its direct path to the logits carries the twin's z",
        ),
        _about(
            "inhibition",
            "S-inhibition",
            "Attends from the end to the repeated name and turns the name movers away from it.",
            "share of the logit difference lost through the name movers' queries",
        ),
        _about(
            "duplicate",
            "Duplicate token (in the IOI circuit)",
            "Attends from the repeated name to its first occurrence; the inhibition heads read the result.",
            "share of the logit difference lost through the inhibition heads' values",
        ),
        _about(
            "induction",
            "Induction (in the IOI circuit)",
            "Attends from the repeated name to what followed its first occurrence; the inhibition heads read the result.",
            "share of the logit difference lost through the inhibition heads' values",
        ),
        _about(
            "previous",
            "Previous token (in the IOI circuit)",
            "Attends from the token after the name's first occurrence back to it; the induction heads read the result.",
            "share of the logit difference lost through the induction heads' keys",
        ),
    )
}


@dataclass(frozen=True)
class Roles:
    """The spans of a task that play the paper's parts: IO, S2, S1, and S1+1 (None: nothing of the kind)."""

    answer: str
    cue: str
    earlier: str
    after: str | None = None
    end: str = "end"

    @property
    def names(self) -> list[str]:
        """The spans a batch must have."""
        return [name for name in (self.answer, self.cue, self.earlier, self.after, self.end) if name is not None]


ROLES = {"ioi": Roles("IO", "S2", "S1", "S1+1"), "coloured_objects": Roles("colour", "query", "object")}


class Edges(Reader):
    """Keeps each head's attention from one query column a row to some spans: `values[name]` is `[B, L, H]`.

    A span's attention is the sum over its tokens; a span of -1 (an example without it) gives 0.
    """

    site = "attention"

    def __init__(self, edges: Mapping[str, tuple[Int[Tensor, "B"], Int[Tensor, "B 2"]]]) -> None:
        self.edges = dict(edges)
        self.columns = torch.cat([query for query, _ in self.edges.values()]).unique()
        self._layers: dict[str, list[Tensor]] = {name: [] for name in self.edges}

    def read(self, call: AttentionCall) -> None:
        """Look at the queries that are asked for, no others."""
        pattern = call.pattern_rows(self.columns.to(call.query.device))
        columns = torch.arange(pattern.shape[-1], device=pattern.device)
        for name, (query, span) in self.edges.items():
            at = torch.searchsorted(self.columns, query.contiguous()).to(pattern.device)
            rows = pattern[torch.arange(len(at), device=pattern.device), :, at]  # [B, H, S]
            span = span.to(pattern.device)
            inside = (columns >= span[:, :1]) & (columns < span[:, 1:])
            self._layers[name].append((rows * inside[:, None]).sum(-1).double().cpu())

    @property
    def values(self) -> dict[str, Float[Tensor, "B L H"]]:
        """Attention by span and layer, `[B, L, H]`."""
        return {name: torch.stack(layers, 1) for name, layers in self._layers.items()}


def ioi_classes(
    model: HeadModel,
    task: Task | Sequence[Example] | TaskBatch | None = None,
    *,
    roles: Roles | None = None,
    n: int = 24,
    seed: int = 0,
    least: float = LEAST,
    attention: float = 0.2,
    copy: float = 0.5,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head for each class of the circuit (table above), `{class: scores}`; members score `least` or more.

    Without `task`, indirect-object prompts with the "abc" twin. `meta` of each score has the receivers it was traced back from
    and, by head, the attention on the class's edge and the copy score. Costs four sweeps of path patching.
    `InputError` if the examples have no twin, no foil, or not the spans of `roles` (by default those of the first of `ROLES`
    that fit), or if the twin does not move the logit difference.
    """
    batch = twinned(model, IOI(corruption="abc") if task is None else task, n, seed)
    roles = _roles(batch) if roles is None else roles
    missing = [name for name in roles.names if name not in batch.spans]
    if missing:
        raise InputError(f"the examples have no span {missing[0]!r}; they have {', '.join(batch.spans) or 'none'}.")
    edges = _edges(model, batch, roles)
    copies = copy_scores(model, torch.cat([batch.answer_ids, batch.foil_ids]).unique())
    settings = {"n": len(batch), "least": least, "attention": attention, "copy": copy, "roles": roles.names}
    scores: dict[str, HeadScores] = {}

    def add(
        name: str, effects: Array, edge: str, receivers: HeadSet, sign: int = 1, copied: Array | None = None
    ) -> None:
        seen = edges[edge].mean(0).numpy()
        passing = seen >= attention
        meta = ABOUT[name].provenance(model, seed, **settings)
        meta |= {"receivers": [str(h) for h in receivers], "attention": seen.round(4).tolist()}
        if copied is not None:
            passing &= copied >= copy
            meta["copy"] = copied.round(4).tolist()
        scores[name] = HeadScores.from_examples(name, sign * effects * passing, meta)
        scores[name].meta["effect"] = (sign * effects.mean(0)).round(6).tolist()

    def trace(name: str, part: Part, at: str) -> tuple[Array, HeadSet]:
        heads = scores[name].above(least)
        if not heads:
            return np.zeros((len(batch), *model.shape)), heads
        return path_effects(model, batch, [(h, part) for h in heads], positions=_last(batch, at), bar=bar), heads

    direct = path_effects(model, batch, bar=bar)
    add("ioi_name_mover", direct, "answer", HeadSet(), copied=copies[0])
    add("ioi_negative_name_mover", direct, "answer", HeadSet(), -1, copied=copies[1])
    through, receivers = trace("ioi_name_mover", "query", roles.end)
    add("ioi_inhibition", through, "cue", receivers)
    through, receivers = trace("ioi_inhibition", "value", roles.cue)
    add("ioi_duplicate", through, "earlier", receivers)
    if roles.after is not None:
        add("ioi_induction", through, "after", receivers)
        through, receivers = trace("ioi_induction", "key", roles.after)
        add("ioi_previous", through, "back", receivers)
    return scores


def ioi_members(scores: Mapping[str, HeadScores]) -> dict[str, HeadSet]:
    """The heads of each class: those that score at least the `least` that the classes were traced with."""
    return {name: one.above(one.meta["settings"]["least"]) for name, one in scores.items()}


def path_effects(
    model: HeadModel,
    batch: TaskBatch,
    receivers: Sequence[tuple[Head, Part]] | None = None,
    *,
    positions: Int[Tensor, "N"] | None = None,
    bar: Bar = Bar(),
) -> Float[Array, "N L H"]:
    """Each head's effect by paths to `receivers` (None: the logits), in shares of the mean difference between the runs.

    `positions` is the column of each row where the receivers' inputs are replaced (None: all columns). `bar` counts rows.
    """
    parts: list[Effects] = []
    # A thousand tokens go through the model one sender at a time; more at once would only take more memory.
    for rows in batch.chunks():
        start = sum(part.values.shape[1] for part in parts)
        where = None if positions is None else positions[start : start + len(rows), None]
        shown = Scaled(bar, len(rows), len(model.heads))
        parts.append(
            path_patching(
                model,
                rows.inputs,
                rows.twins,
                rows.logit_difference,
                receivers=receivers,
                positions=where,
                keep=1,
                bar=shown,
            )
        )
    clean, corrupted = (np.concatenate(values) for values in zip(*((p.clean, p.corrupted) for p in parts), strict=True))
    difference = float(corrupted.mean() - clean.mean())
    if abs(difference) < 1e-6:
        raise InputError("the twins give the same logit difference as the prompts; give twins that change the answer.")
    values = np.concatenate([part.values for part in parts], 1)
    return ((values - clean) / difference).T.reshape(len(batch), *model.shape)


def copy_scores(model: HeadModel, ids: Int[Tensor, "N"]) -> tuple[Float[Array, "L H"], Float[Array, "L H"]]:
    """Share of `ids` that are among the 5 tokens which each head's OV circuit raises most, and lowers most, for that token.

    What stands for a token is its embedding and the first MLP's output for it, as in the paper.
    """
    ids = ids.to(model.device)
    writes = ov(model, token_embedding(model, ids, "sum")).float()  # [L, N, H, D]
    everything = readout(model, torch.arange(model.vocab_size, device=model.device)).float()
    raises, lowers = np.zeros(model.shape), np.zeros(model.shape)
    at_once = max(1, LOGITS // (model.n_heads * model.vocab_size))
    for layer in range(model.n_layers):
        for own, some in zip(ids.split(at_once), writes[layer].split(at_once), strict=True):
            logits = some @ everything.T  # [n, H, V]
            mine = logits.gather(-1, own[:, None, None].expand(-1, model.n_heads, 1))
            raises[layer] += ((logits > mine).sum(-1) < TOP).sum(0).cpu().numpy()
            lowers[layer] += ((logits < mine).sum(-1) < TOP).sum(0).cpu().numpy()
    return raises / len(ids), lowers / len(ids)


def _roles(batch: TaskBatch) -> Roles:
    for roles in ROLES.values():
        if set(roles.names) <= set(batch.spans):
            return roles
    raise InputError(
        f"no roles are known for examples with the spans {', '.join(batch.spans) or '(none)'}; give roles=Roles(...)."
    )


def _edges(model: HeadModel, batch: TaskBatch, roles: Roles) -> dict[str, Float[Tensor, "N L H"]]:
    """Mean attention on every edge of the circuit, in the clean run."""
    end, cue = _last(batch, roles.end), _last(batch, roles.cue)
    edges = {
        "answer": (end, batch.spans[roles.answer]),
        "cue": (end, batch.spans[roles.cue]),
        "earlier": (cue, batch.spans[roles.earlier]),
    }
    if roles.after is not None:
        edges["after"] = (cue, batch.spans[roles.after])
        edges["back"] = (_last(batch, roles.after), batch.spans[roles.earlier])
    reader = Edges(edges)
    model.read(batch.inputs, reader, keep=1)
    return reader.values


def _last(batch: TaskBatch, span: str) -> Int[Tensor, "N"]:
    """The column of a span's last token."""
    return batch.spans[span][:, 1] - 1


register(*ABOUT.values(), score=ioi_classes, judge=by_task("ioi"), steps=lambda model, n: 4 * n, causal=True)
