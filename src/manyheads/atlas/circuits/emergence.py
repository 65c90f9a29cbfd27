"""Emergent heads (#21): which heads a model's circuit for a task gained in training, and how sure that is.

Park et al., arXiv:2509.25758. Each checkpoint's circuit is cut from edges scored by EAP-IG (see `model/edges.py`) with L the
divergence `KL(p(clean) || p)` of the next token, in nats, between a prompt and its corrupted twin:

    E[u -> v] = mean over examples of |score(u -> v)|                                                   nats
    circuit   = the `top` edges with E >= `threshold`, less every node off the paths from embedding to logits
    I[h]      = sum of E over h's outgoing edges / the same over all heads                              in [0, 1], a share
    emergent  = heads(post) - heads(base),  vanished = heads(base) - heads(post)
    change[h] = (I_post - I_base) / (I_post + I_base + 1e-9)                                            in [-1, 1]

Heads near the threshold come and go with the examples, so examples are resampled before differencing, the same ones for both:

    confidence[h] = share of resamples in which h is in one circuit and not in the other;   called from `level` on

The paper differences once. Its threshold, 0.1, comes without a unit; ours is in nats, the same for both checkpoints, so that one
that cannot do the task has a small circuit and not a circuit of noise. Emergence is membership, not change, and not importance:
a head whose weights never moved crosses the threshold when a new head makes the answer depend on what it writes (planted models
show it). The paper's own 7B model improves without its emergent heads; `scaling_check` compares them with random heads. What
emerges depends on the twin: a head that reads and writes the same on prompt and twin has no edge that differs. Where attention is
sharp, fewer than 5 steps can step over the switch, and 1 finds nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import Judge
from manyheads.atlas.core.result import CausalCheck
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.editing.edits import Edit, Scale
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.edges import Edge, End, Sender, edge_attribution, name_of
from manyheads.model.replay.patching import Mlp, Receiver
from manyheads.progress import Bar
from manyheads.tasks import Example, Task, encode

ABOUT = About(
    name="circuit",
    title="In the circuit",
    what="It carries a task's answer along edges of the residual stream, by integrated gradients.",
    formula="share of all heads' outgoing edges, mean |EAP-IG score| of the divergence from the clean run",
    unit="share",
    paper="arXiv:2509.25758",
    threshold=0.05,
)


@dataclass(frozen=True)
class EmergentCircuit:
    """What is left of a model after cutting: its edges, strongest first, and the heads on them."""

    edges: tuple[Edge, ...]
    heads: HeadSet

    def __str__(self) -> str:
        return f"{len(self.edges)} edges through {self.heads}"


@dataclass(frozen=True)
class CircuitTrace:
    """One checkpoint's edges on one task: `magnitudes` |score| of each example, nats; 0 where there is no edge."""

    shape: tuple[int, int]
    senders: tuple[Sender, ...]
    receivers: tuple[End, ...]
    magnitudes: Float[np.ndarray, "N S R"]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.magnitudes)

    def circuit(self, *, top: int = 5000, threshold: float = 0.1) -> EmergentCircuit:
        """The circuit (formula above)."""
        mean = self.magnitudes.mean(0)
        kept = _Graph.of(self).pruned(_cut(mean, top, threshold))
        s, r = np.nonzero(kept)
        order = np.argsort(-mean[s, r], kind="stable")
        edges = tuple((self.senders[s[i]], self.receivers[r[i]]) for i in order)
        return EmergentCircuit(edges, HeadSet([u for u, _ in edges if isinstance(u, Head)], self.shape))

    def importance(self) -> HeadScores:
        """I of every head."""
        sent = self.magnitudes.sum(-1)[:, _Graph.of(self).heads]  # [N, L * H]
        shares = sent / max(float(sent.mean(0).sum()), 1e-12)
        return HeadScores.from_examples(ABOUT.name, shares.reshape(-1, *self.shape), self.meta)

    def to_frame(self) -> pd.DataFrame:
        """A row an edge, strongest first: sender, receiver, nats."""
        mean = self.magnitudes.mean(0)
        s, r = np.nonzero(mean)
        frame = pd.DataFrame(
            {
                "sender": [name_of(self.senders[i]) for i in s],
                "receiver": [name_of(self.receivers[i]) for i in r],
                "nats": mean[s, r],
            }
        )
        return frame.sort_values("nats", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True)
class Emergence:
    """Two checkpoints compared, head by head; all arrays are `[L, H]`.

    `before` and `after` are importances (or scores), `in_base` and `in_post` the share of resamples in which the head counts as
    found, `appeared` and `left` that in which it does in one and not in the other. `differenced` is the paper's plain
    `heads(post) - heads(base)`, without resampling.
    """

    before: Float[np.ndarray, "L H"]
    after: Float[np.ndarray, "L H"]
    change: Float[np.ndarray, "L H"]
    change_stderr: Float[np.ndarray, "L H"]
    in_base: Float[np.ndarray, "L H"]
    in_post: Float[np.ndarray, "L H"]
    appeared: Float[np.ndarray, "L H"]
    left: Float[np.ndarray, "L H"]
    differenced: HeadSet
    level: float
    n: int

    @property
    def emergent(self) -> HeadSet:
        """The heads that appeared with a confidence of at least `level`."""
        return self._from(self.appeared >= self.level)

    @property
    def vanished(self) -> HeadSet:
        """The heads that left with a confidence of at least `level`."""
        return self._from(self.left >= self.level)

    @property
    def kept(self) -> HeadSet:
        """The heads found in both with a confidence of at least `level`."""
        return self._from(np.minimum(self.in_base, self.in_post) >= self.level)

    def strengthened(self, sigmas: float = 2.0) -> HeadSet:
        """The heads whose importance grew by more than `sigmas` standard errors; read it only where both have a circuit."""
        return self._from(self.change > sigmas * self.change_stderr + 1e-9)

    def to_frame(self) -> pd.DataFrame:
        """A row a head: layer, index, head, before, after, change, change_stderr, in_base, in_post, appeared, left, call."""
        layers, indices = (axis.ravel() for axis in np.indices(self.before.shape))
        heads = [Head(int(layer), int(i)) for layer, i in zip(layers, indices, strict=True)]
        names = ("before", "after", "change", "change_stderr", "in_base", "in_post", "appeared", "left")
        sets = {"emergent": self.emergent, "vanished": self.vanished, "kept": self.kept}
        columns: dict[str, Any] = {"layer": layers, "index": indices, "head": [str(h) for h in heads]}
        columns |= {name: getattr(self, name).ravel() for name in names}
        columns["call"] = [next((name for name, some in sets.items() if h in some), "") for h in heads]
        return pd.DataFrame(columns)

    def _from(self, where: Bool[np.ndarray, "L H"]) -> HeadSet:
        return HeadSet([(int(layer), int(h)) for layer, h in np.argwhere(where)], self.before.shape)


def trace_circuit(
    model: HeadModel,
    task: Task | Sequence[Example],
    *,
    n: int = 48,
    steps: int = 5,
    batch: int = 16,
    seed: int = 0,
    bar: Bar = Bar(),
) -> CircuitTrace:
    """Score every edge of `model` on `n` prompts of a task and their corrupted twins; examples may be given instead.

    For the paper's own use, give each checkpoint examples whose prompt ends in its own opening and whose twin in the other's.
    `bar` gets the number of examples done. `InputError` if the model has no tokenizer or the task no twins.
    """
    name = task.name if isinstance(task, Task) else "given"
    if model.tokenizer is None:
        raise InputError(f"the task {name} needs a tokenizer; open the model with tokenizer=.")
    rows = encode(task, model.tokenizer, n, seed)
    if rows.corrupted_ids is None or any(example.corrupted is None for example in rows.examples):
        raise InputError(
            f"{name} examples have no corrupted twin to compare with; give a task whose examples all have one."
        )
    found = []
    for start in range(0, len(rows), batch):
        some = rows.rows(start, start + batch)
        clean = some.inputs
        metric = _divergence(model.logits(clean)[:, -1])
        twin = some.twins
        scores = edge_attribution(model, clean, twin, metric, steps=steps, keep=1)
        found.append(np.abs(np.nan_to_num(scores.values)))
        bar(len(some))
    meta = ABOUT.provenance(model, seed, task=name, n=len(rows), steps=steps)
    return CircuitTrace(model.shape, scores.senders, scores.receivers, np.concatenate(found), meta)


def emergence(
    base: CircuitTrace,
    post: CircuitTrace,
    *,
    top: int = 5000,
    threshold: float = 0.1,
    level: float = 0.9,
    n_boot: int = 200,
    seed: int = 0,
) -> Emergence:
    """What the later checkpoint's circuit has that the earlier one's has not, and the reverse (formulas above).

    `InputError` if the two are not of one architecture and as many examples.
    """
    if (base.senders, base.n) != (post.senders, post.n):
        a, b = (f"{list(trace.shape)} heads and {trace.n} examples" for trace in (base, post))
        raise InputError(f"both checkpoints need one shape and as many examples; got {a}, and {b}.")
    if n_boot < 2 or top < 1 or not 0 < level <= 1:
        raise InputError(
            f"got n_boot={n_boot}, top={top}, level={level}; give n_boot >= 2, top >= 1 and 0 < level <= 1."
        )
    weights = np.random.default_rng(seed).multinomial(base.n, np.full(base.n, 1 / base.n), size=n_boot) / base.n
    found, importance = {}, {}
    for name, trace in (("base", base), ("post", post)):
        graph, means = _Graph.of(trace), (w @ trace.magnitudes.reshape(trace.n, -1) for w in weights)
        drawn = [mean.reshape(trace.magnitudes.shape[1:]) for mean in means]
        found[name] = np.array([graph.found(_cut(mean, top, threshold)) for mean in drawn])
        importance[name] = np.array([_shares(mean, graph) for mean in drawn])
    plain = {"base": base.importance().values, "post": post.importance().values}
    cut = {name: trace.circuit(top=top, threshold=threshold).heads for name, trace in (("base", base), ("post", post))}
    return Emergence(
        before=plain["base"],
        after=plain["post"],
        change=_change(plain["base"], plain["post"]),
        change_stderr=_change(importance["base"], importance["post"]).std(0, ddof=1).reshape(base.shape),
        in_base=found["base"].mean(0).reshape(base.shape),
        in_post=found["post"].mean(0).reshape(base.shape),
        appeared=(found["post"] & ~found["base"]).mean(0).reshape(base.shape),
        left=(found["base"] & ~found["post"]).mean(0).reshape(base.shape),
        differenced=cut["post"] - cut["base"],
        level=level,
        n=base.n,
    )


def emergence_of_scores(base: HeadScores, post: HeadScores, threshold: float, *, level: float = 0.9) -> Emergence:
    """The same comparison by any score of both checkpoints: a head is found from `threshold` on.

    Scores are taken as normal with their standard errors, and independent: `P(found) = Phi((score - threshold) / stderr)`; NaN,
    and so not called, where a score has none because it is of a single example.
    """
    if base.shape != post.shape or base.name != post.name:
        raise InputError(
            f"compare one score of one architecture; got {base.name} {base.shape} and {post.name} {post.shape}."
        )
    p, q = (_found_by_score(scores, threshold) for scores in (base, post))
    a, b = np.abs(base.values), np.abs(post.values)
    spread = 2 * np.hypot(b * base.stderr, a * post.stderr) / ((a + b) ** 2 + 1e-9)
    return Emergence(
        before=base.values,
        after=post.values,
        change=_change(a, b),
        change_stderr=spread,
        in_base=p,
        in_post=q,
        appeared=q * (1 - p),
        left=p * (1 - q),
        differenced=post.above(threshold) - base.above(threshold),
        level=level,
        n=min(base.n, post.n),
    )


def emergence_series(checkpoints: Mapping[str, CircuitTrace], **settings: Any) -> pd.DataFrame:
    """Every checkpoint against the first: `Emergence.to_frame` of each, by `checkpoint`; `settings` are those of `emergence`."""
    names = list(checkpoints)
    if len(names) < 2:
        raise InputError(f"a series needs two checkpoints or more, not {len(names)}.")
    first = checkpoints[names[0]]
    frames = [emergence(first, checkpoints[name], **settings).to_frame().assign(checkpoint=name) for name in names[1:]]
    return pd.concat(frames, ignore_index=True)


def scaling_check(
    model: HeadModel, heads: HeadSet, judge: Judge, factor: float = 0.0, *, n_random: int = 20, seed: int = 0
) -> CausalCheck:
    """Scale `heads` and random sets matched by layer by `factor`: 0 takes them away, the paper also has 0.5 and 1.3.

    `effect` is `clean - scaled` as in `causal_check`. For a factor above 1, heads that help have a negative effect, and p counts
    the random sets that help at least as much.
    """
    if n_random < 20:
        raise InputError(f"a causal check needs at least 20 random sets, not {n_random}.")
    if not heads:
        raise InputError("a causal check needs at least one head, and none was given; nothing emerged.")
    sets = [heads, *matched_sets(heads, n_random, seed, shape=model.shape)]
    edits: list[Edit] = [Scale(some, factor=factor) for some in sets]
    values = model.sweep(judge.recording, edits, judge.score, keep=judge.keep)
    mode, clean = f"scale {factor:g}", judge.clean
    return CausalCheck.of("emergent", mode, heads, judge.metric, clean, values, sign=1 if factor < 1 else -1)


@dataclass(frozen=True)
class _Graph:
    """Nodes in the order of the pass, the senders and then the logits: `into[r]` is the node that receiver r belongs to."""

    into: np.ndarray
    heads: np.ndarray

    @classmethod
    def of(cls, trace: CircuitTrace) -> _Graph:
        at: dict[Sender | End, int] = {sender: i for i, sender in enumerate(trace.senders)}
        at["logits"] = len(trace.senders)
        into = [at[end.head if isinstance(end, Receiver) else end] for end in trace.receivers]
        heads = [i for i, s in enumerate(trace.senders) if s != "embedding" and not isinstance(s, Mlp)]
        return cls(np.array(into), np.array(heads))

    def pruned(self, kept: Bool[np.ndarray, "S R"]) -> Bool[np.ndarray, "S R"]:
        """The edges on a path from the embedding to the logits."""
        alive = self._alive(kept)
        return kept & alive[:-1, None] & alive[self.into][None]

    def found(self, kept: Bool[np.ndarray, "S R"]) -> Bool[np.ndarray, "{len(self.heads)}"]:
        """Which heads are on such a path."""
        return self._alive(kept)[self.heads]

    def _alive(self, kept: Bool[np.ndarray, "S R"]) -> Bool[np.ndarray, "S+1"]:
        n = len(kept)
        feeds = np.zeros((n, n + 1), bool)
        for r in np.nonzero(kept.any(0))[0]:
            feeds[:, self.into[r]] |= kept[:, r]
        reached, needed = np.zeros(n + 1, bool), np.zeros(n + 1, bool)
        reached[0], needed[n] = True, True
        for node in range(1, n + 1):
            reached[node] = (feeds[:, node] & reached[:n]).any()
        for node in reversed(range(n)):
            needed[node] = (feeds[node] & needed).any()
        return reached & needed


def _cut(mean: Float[np.ndarray, "S R"], top: int, threshold: float) -> Bool[np.ndarray, "S R"]:
    kept = (mean >= threshold) & (mean > 0)
    if kept.sum() > top:
        kept &= mean >= np.sort(mean[kept])[-top]
    return kept


def _shares(mean: Float[np.ndarray, "S R"], graph: _Graph) -> Float[np.ndarray, "{len(graph.heads)}"]:
    sent = mean.sum(-1)[graph.heads]
    return np.asarray(sent / max(float(sent.sum()), 1e-12))


def _change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return np.asarray((after - before) / (after + before + 1e-9))


def _found_by_score(scores: HeadScores, threshold: float) -> Float[np.ndarray, "L H"]:
    sure = (scores.values >= threshold).astype(float)
    spread = scores.stderr
    return np.asarray(np.where(spread == 0, sure, _normal_cdf((scores.values - threshold) / np.maximum(spread, 1e-12))))


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return np.asarray(torch.special.ndtr(torch.from_numpy(z)))


def _divergence(clean: Float[Tensor, "B V"]) -> Callable[[Tensor], Tensor]:
    log_p = clean.float().log_softmax(-1)

    def metric(logits: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - logits[:, -1].float().log_softmax(-1))).sum(-1)

    return metric
