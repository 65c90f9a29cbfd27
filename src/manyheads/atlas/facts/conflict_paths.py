"""PH3 (#82): which heads carry memory and which carry context to the logits, found by path patching and checked by pruning.

Jin et al., arXiv:2402.18154. The clean run states an answer c against the known answer m; the corrupted run is about another
subject and states another answer. With each head's z, in turn, from the corrupted run and on its direct path only (all other
heads as in the clean run, MLPs recomputed),

    dm = logit_patched[m] - logit_clean[m],    dc = logit_patched[c] - logit_clean[c]
    memory_path[l, h] = S_m = mean(dc - dm),   context_path = S_c = mean(dm - dc)        in logits, any real number

so what is lost without a head is what it carried. Heads may change sides with the wording (arXiv:2503.10996), so each
prompt comes in two forms, a bare substitution and a fluent passage. A head whose sign differs between them scores 0 and is listed
in `meta["unstable"]`.
The formula is our reading of the paper, in logits and not in probabilities.

Pruning sets z of the top heads to zero, or to its mean, at all positions (`pruning`). Information flow (`conflict_flow`) cuts the
attention of the last token to the subject, the stated answer or the relation's words in a window of layers; the fall of

    p(a) - p_cut(a),    a = m, c        in [-1, 1]

shows in which layers each enters.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.facts.memory_context import (
    NOTHING,
    Conflicts,
    Rates,
    Source,
    answer_rates,
    conflicts,
    known_phrasing,
)
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets, p_value
from manyheads.heads import HeadLike, HeadScores, HeadSet, mean_stderr
from manyheads.model.editing.edits import Ablate, Edit, Mask
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.patching import path_patching
from manyheads.progress import Bar, Scaled
from manyheads.tasks import Counterfactual, Example, Split, Task
from manyheads.tasks.families.counterfactual import STATEMENTS

Form = Literal["bare", "passage"]
FORMS: tuple[Form, ...] = ("bare", "passage")
SOURCES = {"subject": ("subject", "resident", "query"), "context": ("context",), "relation": ("relation", "asked")}

ABOUT: dict[str, About] = {
    "memory_path": About(
        name="memory_path",
        title="Memory path",
        what="Carries the known answer to the logits: with its output from another subject, the stated answer wins.",
        formula="mean of dc - dm, the changes of the stated and the known answer's logit with the head's path patched",
        unit="logits",
        paper="arXiv:2402.18154",
        threshold=0.5,
        low=-1.0,
    ),
    "context_path": About(
        name="context_path",
        title="Context path",
        what="Carries the stated answer to the logits: with its output from another statement, the known answer wins.",
        formula="mean of dm - dc, the changes of the known and the stated answer's logit with the head's path patched",
        unit="logits",
        paper="arXiv:2402.18154",
        threshold=0.5,
        low=-1.0,
    ),
}


@dataclass(frozen=True)
class Conflict(Task):
    """`The capital of France is Rome. Q: What is the capital of France? A:`, whose twin has other subject and statement.

    `form` "passage" is a sentence with a speaker; the same seed gives both forms the same content. The answer is the
    stated one, the foil the known one; what is held out is also held out of `Counterfactual`. Spans: `subject`, `resident`
    (of a passage), `query`, `context`, and the relation's word: `relation`, and in the question `asked`.
    """

    name: ClassVar[str] = "conflict"
    form: Form = "bare"
    relation: str | None = None
    phrasing: str = "usual"

    def draw(self, rng: random.Random, split: Split) -> Example:
        relation = self.relation or rng.choice(list(STATEMENTS))
        task = Counterfactual(form="bare", relation=relation, phrasing=self.phrasing)
        clean = other = task.draw(rng, split)
        while {other.answer, other.foil} & {clean.answer, clean.foil}:
            other = task.draw(rng, split)
        text, spans = _worded(clean, relation, self.form)
        twin, _ = _worded(other, relation, self.form)
        return Example(text, clean.answer, clean.foil, twin, other.answer, spans, continuation=".")


@dataclass(frozen=True)
class Pruning:
    """Answers before and after `heads` are ablated, and after each of the random sets with as many heads in each layer."""

    heads: HeadSet
    mode: Literal["zero", "mean"]
    before: Rates
    after: Rates
    random: tuple[Rates, ...]

    def gain(self, source: Source) -> float:
        """Change of that source's rate."""
        return float(getattr(self.after, source) - getattr(self.before, source))

    def random_gains(self, source: Source) -> Float[np.ndarray, "R"]:
        """The same, for each random set."""
        return np.array([getattr(rates, source) - getattr(self.before, source) for rates in self.random])

    def p_value(self, source: Source) -> float:
        """How rarely a random set gains as much."""
        return p_value(self.gain(source), self.random_gains(source))


@dataclass(frozen=True)
class Flow:
    """Falls of the two answers' probabilities when the last token cannot attend to a source in `window` layers from each start.

    `memory[source]` and `context[source]` are `[W]`, means over `n` prompts; `stderr` holds theirs, by answer and source.
    """

    window: int
    starts: tuple[int, ...]
    memory: dict[str, Float[np.ndarray, "W"]]
    context: dict[str, Float[np.ndarray, "W"]]
    stderr: dict[Source, dict[str, Float[np.ndarray, "W"]]]
    n: int


def conflict_prompts(
    model: HeadModel, *, n: int = 64, seed: int = 0, split: Split = "test", relation: str | None = None
) -> dict[str, Conflicts]:
    """The same conflicts in each form (those whose facts the model knows, in the phrasing it knows: `memory_context`)."""
    phrasing = known_phrasing(model, seed=seed)
    return {form: conflicts(model, Conflict(form, relation, phrasing), n=n, seed=seed, split=split) for form in FORMS}


def conflict_paths(
    model: HeadModel,
    prompts: Mapping[str, Conflicts] | None = None,
    *,
    n: int = 32,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head as "memory_path" and as "context_path", its negative (formula above).

    Without `prompts` (a set for each form), `n` conflicts in both. The ranking depends on the corrupted run: `meta["corrupted"]`
    describes that run, with a checksum of its tokens. `meta["forms"]` holds S_m for each form. `InputError` for prompts
    without twins.
    """
    prompts = conflict_prompts(model, n=n, seed=seed) if prompts is None else prompts
    by_form = {form: _patched(model, some, bar) for form, some in prompts.items()}
    if not by_form:
        raise InputError("no prompts given; give a set of conflicts for each form, or none for the usual ones.")
    means = {form: S.mean(0) for form, S in by_form.items()}
    each = np.stack(list(means.values()))
    changes = (each.min(0) < 0) & (each.max(0) > 0)
    unstable = HeadSet([(int(layer), int(h)) for layer, h in np.argwhere(changes)])
    S_m = np.concatenate(list(by_form.values())) * ~changes
    more: dict[str, Any] = {
        "corrupted": {form: _corrupted(some) for form, some in prompts.items()},
        "forms": {form: mean.round(6).tolist() for form, mean in means.items()},
        "unstable": [str(head) for head in unstable],
        "rates": {form: vars(answer_rates(model, some, [NOTHING])[0]) for form, some in prompts.items()},
        "counts": {form: some.counts for form, some in prompts.items()},
    }
    return {
        name: HeadScores.from_examples(name, sign * S_m, about.provenance(model, seed, n=n) | more)
        for (name, about), sign in zip(ABOUT.items(), (1, -1), strict=True)
    }


def pruning(
    model: HeadModel,
    heads: HeadSet | Iterable[HeadLike],
    prompts: Conflicts,
    mode: Literal["zero", "mean"] = "zero",
    *,
    n_random: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Pruning:
    """Ablate `heads` at all positions, and `n_random` >= 20 random sets matched by layer, and count the answers.

    Give `prompts` that the heads were not found on. Zero is the paper's; "mean" puts the heads' mean over
    the prompts and stays nearer to what the model has seen. Sets drawn twice count once.
    """
    if n_random < 20:
        raise InputError(f"pruning is compared with at least 20 random sets, not {n_random}.")
    if mode not in ("zero", "mean"):
        raise InputError(f'mode is {mode!r}; prune by "zero" or by "mean".')
    if not (found := model.head_set(heads)):
        raise InputError("no heads given; prune at least one, such as scores.top(5).")
    mean = _mean_z(model, prompts) if mode == "mean" else None
    sets = [found, *matched_sets(found, n_random, seed, shape=model.shape)]
    rates = answer_rates(model, prompts, [NOTHING, *(Ablate(s, mode, mean) for s in sets)], bar=bar)
    return Pruning(found, mode, rates[0], rates[1], tuple(rates[2:]))


def conflict_flow(
    model: HeadModel,
    prompts: Conflicts | None = None,
    *,
    window: int | None = None,
    n: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Flow:
    """Where subject, stated answer and relation enter the last token (falls above), for every window of layers.

    Without `prompts`, `n` bare conflicts. `window` is the number of layers cut at once (None: a quarter of them). Of `prompts`
    the spans subject, resident and query (the subject), context, relation and asked (the relation) are used where there are any.
    """
    if prompts is None:
        prompts = conflicts(model, Conflict(phrasing=known_phrasing(model, seed=seed)), n=n, seed=seed)
    window = max(1, model.n_layers // 4) if window is None else window
    if not 1 <= window <= model.n_layers:
        raise InputError(f"window is {window}; this model has 1 to {model.n_layers} layers to cut.")
    starts = tuple(range(model.n_layers - window + 1))
    names = [name for name, spans in SOURCES.items() if any(span in prompts.batch.spans for span in spans)]
    if not names:
        raise InputError(f"the prompts have no span of a source; name one of {', '.join(sum(SOURCES.values(), ()))}.")
    falls = []
    for chunk in prompts.chunks():
        falls.append(_falls(model, chunk, names, starts, window))
        bar(len(chunk))
    every = np.concatenate(falls, 3)  # [source, start, answer, N]
    mean, stderr = mean_stderr(np.moveaxis(every, 3, 0))
    memory, context = ({name: mean[i, :, a] for i, name in enumerate(names)} for a in (0, 1))
    spread: dict[Source, dict[str, np.ndarray]] = {
        "memory": {name: stderr[i, :, 0] for i, name in enumerate(names)},
        "context": {name: stderr[i, :, 1] for i, name in enumerate(names)},
    }
    return Flow(window, starts, memory, context, spread, len(prompts))


def _worded(example: Example, relation: str, form: Form) -> tuple[str, dict[str, tuple[int, int]]]:
    """A bare counterfactual in `form`, with its spans and those of the relation's word."""
    text, spans = example.prompt, dict(example.spans)
    for name, start in (("relation", 0), ("asked", spans["context"][1])):
        at = text.index(relation, start)
        spans[name] = (at, at + len(relation))
    if form == "bare":
        return text, spans
    before, after = "I have lived in ", " for years, and "
    subject = text[slice(*spans["subject"])]
    lead = before + subject + after
    spans = {name: (start + len(lead), end + len(lead)) for name, (start, end) in spans.items()}
    spans["resident"] = (len(before), len(before) + len(subject))
    return lead + text[0].lower() + text[1:], spans


def _patched(model: HeadModel, prompts: Conflicts, bar: Bar) -> Float[np.ndarray, "N L H"]:
    """S_m of each prompt and head."""
    rows = []
    for chunk in prompts.chunks():
        batch = chunk.batch
        if batch.corrupted_ids is None:
            raise InputError(
                "path patching needs corrupted twins: prompts about another subject with another statement."
            )

        def difference(logits: Tensor, batch: Any = batch) -> Tensor:
            at = torch.arange(len(batch), device=logits.device)
            last = logits[:, -1].double()
            return last[at, batch.answer_ids.to(at.device)] - last[at, batch.foil_ids.to(at.device)]

        corrupted = batch.twins
        shown = Scaled(bar, len(batch), len(model.heads))
        effects = path_patching(model, chunk.inputs, corrupted, difference, keep=1, bar=shown)
        rows.append((effects.values - effects.clean).T.reshape(len(batch), *model.shape))
    return np.concatenate(rows)


def _corrupted(prompts: Conflicts) -> dict[str, Any]:
    ids, example = prompts.batch.corrupted_ids, prompts.batch.examples[0]
    assert ids is not None
    return {
        "kind": "another subject and another statement, one twin a prompt",
        "crc32": f"{zlib.crc32(ids.to(torch.int64).numpy().tobytes()):08x}",
        "first": example.corrupted,
    }


def _mean_z(model: HeadModel, prompts: Conflicts) -> Float[Tensor, "L H Dh"]:
    """Mean over all tokens of the prompts."""
    parts = [(model.mean_z(chunk.inputs), chunk.batch.attention_mask.sum()) for chunk in prompts.chunks()]
    return torch.stack([mean * count for mean, count in parts]).sum(0) / sum(int(count) for _, count in parts)


def _falls(
    model: HeadModel, prompts: Conflicts, names: Sequence[str], starts: Sequence[int], window: int
) -> Float[np.ndarray, "S W 2 N"]:
    """`p - p_cut` of the known and of the stated answer, by source and window."""
    batch = prompts.batch

    def chances(logits: Tensor) -> Tensor:
        p = logits[:, -1].double().softmax(-1)
        return torch.cat([p.gather(1, ids.to(p.device)[:, None])[:, 0] for ids in (batch.foil_ids, batch.answer_ids)])

    edits: list[Edit] = [NOTHING]
    for name in names:
        keys = _columns(batch.spans, SOURCES[name])
        for start in starts:
            cut = [head for head in model.heads if start <= head.layer < start + window]
            edits.append(Mask(cut, keys, positions=-1))
    p = model.sweep(prompts.inputs, edits, chances, keep=1).reshape(len(edits), 2, len(batch))
    return (p[0] - p[1:]).reshape(len(names), len(starts), 2, len(batch))


def _columns(spans: Mapping[str, Int[Tensor, "N 2"]], names: Sequence[str]) -> Int[Tensor, "N P"]:
    """The columns of these spans; rows with fewer name one of theirs again, rows with none a column that is not there."""
    present = [spans[name].tolist() for name in names if name in spans]
    rows = [[c for span in row for c in range(*span) if c >= 0] for row in zip(*present, strict=True)]
    most = max(map(len, rows), default=0)
    nowhere = 1 << 30
    return torch.tensor([(row or [nowhere]) + [(row or [nowhere])[0]] * (most - max(1, len(row))) for row in rows])
