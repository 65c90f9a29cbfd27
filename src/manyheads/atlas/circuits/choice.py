"""The multiple-choice circuit (#12): which heads and MLPs turn a known answer into its letter, and by what they find the letter.

Lieberum et al., arXiv:2307.09458, on four options labelled A to D. With the labels' logits at the last position,

    margin = logit[right label] - mean of the other labels' logits                                      in logits

each node (a head's z, or an MLP's write) at the last position is resample-ablated with its value on another question:

    total[node]  = margin - margin(node resampled, all later layers react)
    direct[node] = <d, write(here) - write(other question)>,   d = the margin's readout through the final norm as it was here

both in logits, positive where the node helps. With the norm frozen the direct effects of all heads and MLPs and of the embedding
sum to `margin - margin(other question's final state)` exactly. The two differ: later layers repair, or pass on.

Heads are classed by where the last token looks (A[r, k]: its attention to label k where r is right), first rule that fits:

| class | rule |
| --- | --- |
| correct letter | A[r, r] >= floor for every r |
| single letter | A[k, k] >= floor for some k, and A[r, k] < floor for all r != k |
| content gatherer | attention to the right option's text >= floor |
| amplification | attention to what follows the last option, the last token included >= floor |
| constant | attention to all labels together >= floor, whatever is right |

**Rank.** q at the last token, and k and v at the labels, of the heads at hand: x -> mean + P_r (x - mean), with P_r the first
r directions of a centred SVD over questions.

**Labels.** The same questions with other letters, with digits, and with ABCD in another order (no letter in its place). With q
taken from the standard run of the same question, a head that still finds the right line goes by "Nth item"; one that finds the
line with the label that was right goes by "line labelled B".

Departures: q and k are compressed as attention uses them, after the rotary embedding. The paper's classes are made by eye; the
rules are ours. A head of two labels is of no class.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.circuits.ioi import Edges
from manyheads.atlas.core.behaviour import About, provenance
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.edit.edits import Edit, Patch, Swap, derangement
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor, leaving
from manyheads.model.norms import FoldedNorm
from manyheads.model.read.attention import AttentionCall, Part
from manyheads.model.read.attribution import attribute
from manyheads.model.read.readers import Keep, ReadAttention
from manyheads.model.replay.recording import Recording
from manyheads.progress import SILENT, Bar
from manyheads.tasks import Choice, Example, Task, TaskBatch, encode

Labels = Literal["standard", "letters", "digits", "shuffled"]
PARTS: tuple[Part, ...] = ("query", "key", "value")
CLASSES = ("correct_letter", "single_letter", "content_gatherer", "amplification", "constant")
PAPER = "arXiv:2307.09458"
_LINE = re.compile(r"^(\w+)\. (.+)$", re.MULTILINE)

ABOUT: dict[str, About] = {
    about.name: about
    for about in (
        About(
            "choice_direct",
            "Choice, direct",
            "Writes the right letter of a multiple-choice question itself.",
            "margin of the right letter lost when only the logits see the head's output on another question",
            "logits",
            PAPER,
            0.5,
            kind="choice",
            low=-10.0,
            high=10.0,
        ),
        About(
            "choice_total",
            "Choice, total",
            "Is needed for the right letter of a multiple-choice question, by whatever path.",
            "margin of the right letter lost when the head's last output is that on another question",
            "logits",
            PAPER,
            0.5,
            kind="choice",
            low=-10.0,
            high=10.0,
        ),
        About(
            "correct_letter",
            "Correct letter",
            "Looks from the end at the label of the right option.",
            "attention from the last token to the right option's label",
            "attention",
            PAPER,
            0.4,
            kind="choice",
        ),
    )
}


@dataclass(frozen=True)
class Questions:
    """Encoded questions. `batch` has the spans `label0`, `option0`, ...; `labels` `[N, K]` are the tokens that would answer with
    each line's label, `right` `[N]` is the right line."""

    batch: TaskBatch
    labels: Int[Tensor, "N K"]
    right: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model reads."""
        return {"input_ids": self.batch.input_ids, "attention_mask": self.batch.attention_mask}

    @property
    def label_columns(self) -> Int[Tensor, "N K"]:
        """Where the labels stand (their last token)."""
        return torch.stack([self.batch.spans[f"label{k}"][:, 1] - 1 for k in range(self.labels.shape[1])], 1)

    def span(self, kind: str, lines: Int[Tensor, "N"]) -> Int[Tensor, "N 2"]:
        """The span of one line's label or option in each row."""
        spans = torch.stack([self.batch.spans[f"{kind}{k}"] for k in range(self.labels.shape[1])], 1)
        return spans[torch.arange(len(self)), lines]


@dataclass(frozen=True)
class NodeEffects:
    """What each node does to the margin, in logits; heads as scores, MLPs and the rest `[N, L]` and `[N]` by question."""

    direct: HeadScores
    total: HeadScores
    direct_mlp: Float[np.ndarray, "N L"]
    total_mlp: Float[np.ndarray, "N L"]
    rest: Float[np.ndarray, "N"]
    sum: Float[np.ndarray, "N"]

    def top(self, k: int) -> tuple[HeadSet, list[int]]:
        """The `k` nodes of largest direct effect: heads, and layers of MLPs."""
        mlps = self.direct_mlp.mean(0)
        least = np.sort(np.concatenate([self.direct.values.ravel(), mlps]))[-k]
        return self.direct.above(float(least)), [layer for layer, effect in enumerate(mlps) if effect >= least]


@dataclass(frozen=True)
class Compressed:
    """Heads whose q, k and v keep `rank` dimensions (None: all): margin in logits, its share of the full one, loss in nats,
    accuracy, and the share that a random subspace of that rank keeps."""

    rank: int | None
    margin: float
    kept: float
    loss: float
    accuracy: float
    random_kept: float


@dataclass(frozen=True)
class Mutation:
    """What other labels do. `attention` is that of the heads to the right label; `kept` the share of the margin left when their q
    and k are held to the standard labels' subspace; `nth` and `labelled` where the standard query looks: at the right line,
    and at the line with the label that was right (NaN where no line has it)."""

    labels: Labels
    n: int
    accuracy: float
    margin: float
    kept: float
    attention: float
    nth: float
    labelled: float


@dataclass(frozen=True, eq=False)
class Subspace(Edit):
    """x -> mean + P (x - mean) for the heads' query, key or value; `means` `[h, Dh]` and `bases` `[h, r, Dh]` by layer."""

    part: Part = "query"
    means: dict[int, Tensor] = field(default_factory=dict)
    bases: dict[int, Tensor] = field(default_factory=dict)

    @property
    def acts_in_attention(self) -> bool:
        """It changes q, k or v."""
        return True

    def parts(self) -> frozenset[Part]:
        """The one part it changes."""
        return frozenset([self.part])

    def change(self, layer: int, part: Part, tensor: Tensor) -> Tensor:
        """Project the heads' slices where the edit acts."""
        heads = self.indices(layer)
        if part != self.part or not heads:
            return tensor
        mean, basis = (table[layer].to(tensor) for table in (self.means, self.bases))
        x = tensor.transpose(1, 2)
        away = x[:, :, heads] - mean
        new = mean + torch.einsum("bthr,hrd->bthd", torch.einsum("bthd,hrd->bthr", away, basis), basis)
        return self._set(x, heads, new, 0).transpose(1, 2)


def questions(
    model: HeadModel,
    task: Task | Sequence[Example] | None = None,
    *,
    labels: Labels = "standard",
    n: int = 64,
    seed: int = 0,
    split: Literal["train", "test"] = "test",
) -> Questions:
    """`n` questions whose options stand on lines `X. text`, with their labels as they are or exchanged.

    `InputError` without a tokenizer, or if a prompt has no such lines, the answer is none of their labels, or a label is not one
    token for any example.
    """
    if model.tokenizer is None:
        raise InputError("multiple-choice questions need a tokenizer; open the model with tokenizer=.")
    if labels not in get_args(Labels):
        raise InputError(f"labels is {labels!r}; choose from {', '.join(get_args(Labels))}.")
    task = Choice() if task is None else task
    examples = task.examples(n, seed, split) if isinstance(task, Task) else list(task)[:n]
    rng = random.Random(seed)
    lines = [_lines(example) for example in examples]
    rows = [_relabelled(e, _new_labels(names, labels, rng)) for e, (names, _) in zip(examples, lines, strict=True)]
    fits = [set(map(id, encode(column, model.tokenizer, n).examples)) for column in zip(*rows, strict=True)]
    usable = [i for i, row in enumerate(rows) if all(id(one) in fit for one, fit in zip(row, fits, strict=True))]
    if not usable:
        raise InputError(f"no question can be used: its {labels} labels are not one token each for this tokenizer.")
    right = [lines[i][1] for i in usable]
    batch = encode([rows[i][r] for i, r in zip(usable, right, strict=True)], model.tokenizer, n)
    columns = [encode([rows[i][k] for i in usable], model.tokenizer, n).answer_ids for k in range(len(rows[0]))]
    return Questions(batch, torch.stack(columns, 1), torch.tensor(right))


def margin(asked: Questions) -> Callable[[Tensor], Tensor]:
    """The metric (formula above), one number a row of logits `[N, T, V]`."""

    def metric(logits: Tensor) -> Tensor:
        of_labels = logits[:, -1].double().gather(1, asked.labels.to(logits.device))
        right = of_labels.gather(1, asked.right.to(logits.device)[:, None])[:, 0]
        return right - (of_labels.sum(1) - right) / (of_labels.shape[1] - 1)

    return metric


def node_effects(model: HeadModel, asked: Questions, *, seed: int = 0, bar: Bar = SILENT) -> NodeEffects:
    """Direct and total effect of every head and MLP by resample ablation at the last position (formulas above).

    The other question of each row is another row (a seeded derangement). One sweep over heads, one pass an MLP; `bar` is
    told of every node.
    """
    if len(asked) < 2:
        raise InputError("resample ablation takes another question's value; give two questions or more.")
    order = derangement(len(asked), seed)
    metric = margin(asked)
    recording = model.record(asked.inputs)
    clean = metric(recording.logits).numpy(force=True)
    source = torch.stack(recording.z)[:, order]
    last = [recording.length - 1]
    edits = [Patch([head], source, positions=last) for head in model.heads]
    resampled = model.sweep(recording, edits, metric, keep=1, bar=bar)  # [L H, N]
    total = (clean - resampled).T.reshape(len(asked), *model.shape)
    mlps = np.zeros((len(asked), model.n_layers))
    for layer in range(model.n_layers):
        mlps[:, layer] = clean - _with_other_mlp(model, asked, recording, layer, order)
        bar(1)
    heads, direct_mlp, rest = _direct(model, asked, order)
    meta = {"n": len(asked), "margin": float(clean.mean())}

    def scored(name: str, per_question: Float[np.ndarray, "N L H"]) -> HeadScores:
        return HeadScores.from_examples(name, per_question, provenance(model, ABOUT[name], seed, **meta))

    everything = heads.sum((1, 2)) + direct_mlp.sum(1) + rest
    return NodeEffects(
        scored("choice_direct", heads), scored("choice_total", total), direct_mlp, mlps, rest, everything
    )


def choice(
    model: HeadModel,
    asked: Questions | None = None,
    *,
    n: int = 48,
    seed: int = 0,
    split: Literal["train", "test"] = "test",
    bar: Bar = SILENT,
) -> dict[str, HeadScores]:
    """The three scores of the circuit's heads: direct and total effect (logits), and attention to the right label."""
    asked = questions(model, n=n, seed=seed, split=split) if asked is None else asked
    effects = node_effects(model, asked, seed=seed, bar=bar)
    seen = _looks(model, asked)["right label"].numpy()
    meta = provenance(model, ABOUT["correct_letter"], seed, n=len(asked))
    return {
        "choice_direct": effects.direct,
        "choice_total": effects.total,
        "correct_letter": HeadScores.from_examples("correct_letter", seen, meta),
    }


def choice_classes(
    model: HeadModel, asked: Questions, heads: HeadSet | None = None, *, floor: float = 0.4
) -> dict[str, HeadSet]:
    """The classes of `heads` (None: all) by the last token's attention (table above); heads of no class are left out.

    `InputError` if some label is never the right one.
    """
    k = asked.labels.shape[1]
    if len(asked.right.unique()) < k:
        raise InputError("classes need questions in which every label is the right one at times; give more of them.")
    looks = _looks(model, asked)
    by_right = torch.stack(  # A: [r, k, L, H]
        [torch.stack([looks[f"label{j}"][asked.right == r].mean(0) for j in range(k)]) for r in range(k)]
    )
    own = by_right.diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # [k, L, H]
    others = torch.stack([by_right[[r for r in range(k) if r != j], j].amax(0) for j in range(k)])
    rules = {
        "correct_letter": own.amin(0) >= floor,
        "single_letter": ((own >= floor) & (others < floor)).sum(0) == 1,
        "content_gatherer": looks["right option"].mean(0) >= floor,
        "amplification": looks["tail"].mean(0) >= floor,
        "constant": by_right.sum(1).amin(0) >= floor,
    }
    left = torch.zeros(model.shape, dtype=torch.bool)
    for head in model.heads if heads is None else heads:
        left[head] = True
    classes = {}
    for name, rule in rules.items():
        classes[name] = model.head_set((rule & left).nonzero().tolist())
        left &= ~rule
    return classes


def subspaces(
    model: HeadModel,
    asked: Questions,
    heads: HeadSet,
    rank: int,
    *,
    parts: Sequence[Part] = PARTS,
    centred: bool = True,
    where: Questions | None = None,
    random_seed: int | None = None,
) -> list[Edit]:
    """Edits that hold the heads' q at the last token, and k and v at the labels, to `rank` dimensions fitted on `asked`.

    They act on `where` (None: on the same questions). `random_seed` draws random dimensions instead; without `centred` the SVD is
    that of the plain vectors, which wastes a dimension on the mean.
    """
    if not 0 <= rank <= model.head_dim:
        raise InputError(f"rank is {rank}; give 0 to {model.head_dim}, the width of a head.")
    where = asked if where is None else where
    last = where.batch.input_ids.shape[1] - 1
    edits: list[Edit] = []
    vectors = _vectors(model, asked, heads)
    rng = torch.Generator().manual_seed(random_seed or 0)
    for part in parts:
        means, bases = {}, {}
        for layer, indices in heads.by_layer().items():
            x = vectors[part][layer].double()  # [h, samples, Dh]
            mean = x.mean(1) if centred else torch.zeros_like(x[:, 0])
            basis = torch.linalg.svd(x - mean[:, None], full_matrices=True).Vh
            if random_seed is not None:
                basis = torch.linalg.qr(torch.randn(len(indices), *basis.shape[1:], generator=rng).double()).Q
            means[layer], bases[layer] = mean, basis[:, :rank]
        positions = [last] if part == "query" else where.label_columns
        edits.append(Subspace(heads, part=part, means=means, bases=bases, positions=positions))
    return edits


def compress(
    model: HeadModel,
    asked: Questions,
    heads: HeadSet,
    *,
    ranks: Sequence[int] = (0, 1, 2, 3, 4),
    parts: Sequence[Part] = PARTS,
    centred: bool = True,
    n_random: int = 5,
    seed: int = 0,
    bar: Bar = SILENT,
) -> list[Compressed]:
    """Margin, loss and accuracy with the heads' q, k and v held to each rank; the first entry is the model as it is."""
    full = _measure(model, asked)
    results = [Compressed(None, full[0], 1.0, full[1], full[2], 1.0)]
    for rank in ranks:
        value = _measure(model, asked, subspaces(model, asked, heads, rank, parts=parts, centred=centred))
        chance = [
            _measure(model, asked, subspaces(model, asked, heads, rank, parts=parts, random_seed=seed + i))[0]
            for i in range(n_random)
        ]
        results.append(Compressed(rank, value[0], value[0] / full[0], *value[1:], float(np.mean(chance)) / full[0]))
        bar(1)
    return results


def label_mutations(
    model: HeadModel,
    heads: HeadSet,
    task: Task | Sequence[Example] | None = None,
    *,
    rank: int = 3,
    n: int = 64,
    seed: int = 0,
    split: Literal["train", "test"] = "test",
) -> dict[Labels, Mutation]:
    """The same questions under each kind of labels: what the model and its correct-letter `heads` still do (see `Mutation`)."""
    if not heads:
        raise InputError("no heads given; label_mutations looks at the correct-letter heads, see choice_classes.")
    sets = {kind: questions(model, task, labels=kind, n=n, seed=seed, split=split) for kind in get_args(Labels)}
    return mutations(model, heads, sets, rank=rank)


def mutations(
    model: HeadModel, heads: HeadSet, sets: dict[Labels, Questions], *, rank: int = 3
) -> dict[Labels, Mutation]:
    """As `label_mutations`, on questions encoded already; all must be the same questions in the same order."""
    standard = sets["standard"]
    if any(asked.right.tolist() != standard.right.tolist() for asked in sets.values()):
        raise InputError(
            "the sets do not hold the same questions; a tokenizer that drops some labels cannot be used here."
        )
    return {kind: _mutation(model, heads, kind, standard, asked, rank) for kind, asked in sets.items()}


def _mutation(
    model: HeadModel, heads: HeadSet, kind: Labels, standard: Questions, asked: Questions, rank: int
) -> Mutation:
    value, _, accuracy = _measure(model, asked)
    held = _measure(model, asked, subspaces(model, standard, heads, rank, parts=("query", "key"), where=asked))[0]
    chosen = tuple(np.array([*heads]).T)
    attention = _looks(model, asked)["right label"].mean(0).numpy()[chosen].mean()
    before = standard.labels.gather(1, standard.right[:, None])
    has = asked.labels == before  # the line that bears the label that was right
    labelled = torch.where(has.any(1), has.int().argmax(1), -1)
    swaps = _standard_query(model, heads, standard)
    with model.editing(swaps):
        looks = _looks(model, asked, labelled.clamp(min=0))
    there = looks["line"][labelled >= 0]
    return Mutation(
        labels=kind,
        n=len(asked),
        accuracy=accuracy,
        margin=value,
        kept=held / value,
        attention=float(attention),
        nth=float(looks["right label"].mean(0).numpy()[chosen].mean()),
        labelled=float(there.mean(0).numpy()[chosen].mean()) if len(there) else float("nan"),
    )


def _standard_query(model: HeadModel, heads: HeadSet, standard: Questions) -> Swap:
    tensors: dict[int, Tensor] = {}
    layers = set(heads.by_layer())
    model.read(standard.inputs, ReadAttention(lambda call: tensors.update({call.layer: call.query}), layers), keep=1)
    return Swap(heads, "query", tensors, positions=[standard.inputs["input_ids"].shape[1] - 1])


def _lines(example: Example) -> tuple[list[str], int]:
    """The labels of an example's lines, and which one is the answer."""
    names = [match[1] for match in _LINE.finditer(example.prompt)]
    if len(names) < 2 or example.answer.strip() not in names:
        raise InputError(
            f"the prompt {example.prompt[:40]!r}... has no option lines 'X. text', or the answer {example.answer!r} is none of "
            "their labels."
        )
    return names, names.index(example.answer.strip())


def _new_labels(names: list[str], labels: Labels, rng: random.Random) -> list[str]:
    if labels == "letters":
        return rng.sample([c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in names], len(names))
    if labels == "digits":
        return rng.sample("123456789", len(names))
    if labels == "shuffled":
        order = derangement(len(names), rng.randrange(2**31)).tolist()
        return [names[i] for i in order]
    return names


def _relabelled(example: Example, labels: list[str]) -> list[Example]:
    """The example with these labels, once for each label as its answer, with the spans of labels and options."""
    text, at, spans = "", 0, {}
    for k, (match, label) in enumerate(zip(_LINE.finditer(example.prompt), labels, strict=True)):
        text += example.prompt[at : match.start()]
        spans[f"label{k}"] = (len(text), len(text) + len(label))
        text += f"{label}. "
        spans[f"option{k}"] = (len(text), len(text) + len(match[2]))
        text += match[2]
        at = match.end()
    text += example.prompt[at:]
    plain = replace(example, prompt=text, foil=None, corrupted=None, corrupted_answer=None, spans=spans, accepted=())
    return [replace(plain, answer=f" {label}") for label in labels]


def _measure(model: HeadModel, asked: Questions, edits: Sequence[Edit] = ()) -> tuple[float, float, float]:
    """Mean margin, mean loss over the labels (nats), accuracy among them."""
    with model.editing(*edits):
        logits = model.read(asked.inputs, keep=1)
    of_labels = logits[:, -1].double().gather(1, asked.labels.to(logits.device))
    right = asked.right.to(logits.device)
    loss = torch.nn.functional.cross_entropy(of_labels, right)
    return float(margin(asked)(logits).mean()), float(loss), float((of_labels.argmax(1) == right).double().mean())


def _looks(
    model: HeadModel, asked: Questions, line: Int[Tensor, "N"] | None = None
) -> dict[str, Float[Tensor, "N L H"]]:
    """The last token's attention to the labels, to the right line's label and option, to the tail, and to `line`'s label."""
    k, length = asked.labels.shape[1], asked.batch.input_ids.shape[1]
    end = torch.full((len(asked),), length - 1)
    options_end = torch.stack([asked.batch.spans[f"option{j}"][:, 1] for j in range(k)]).amax(0)
    edges = {f"label{j}": (end, asked.batch.spans[f"label{j}"]) for j in range(k)}
    edges |= {
        "right label": (end, asked.span("label", asked.right)),
        "right option": (end, asked.span("option", asked.right)),
        "tail": (end, torch.stack([options_end, end + 1], 1)),
        "line": (end, asked.span("label", asked.right if line is None else line)),
    }
    reader = Edges(edges)
    model.read(asked.inputs, reader, keep=1)
    return reader.values


def _direct(
    model: HeadModel, asked: Questions, order: Tensor
) -> tuple[Float[np.ndarray, "N L H"], Float[np.ndarray, "N L"], Float[np.ndarray, "N"]]:
    """Direct effects of heads and MLPs, and of the rest (embedding, biases inside branches)."""
    head = model.layout.unembedding
    if head is None:
        raise UnsupportedError(f"{type(model.plain).__name__} has no unembedding to read labels with.")
    weight: Tensor = head.weight  # type: ignore[assignment]
    rows = weight[asked.labels.to(weight.device)].detach().double()  # [N, K, D]
    right = rows[torch.arange(len(asked)), asked.right]
    readout = right - (rows.sum(1) - right) / (rows.shape[1] - 1)
    readout = readout / float(getattr(model.config, "logits_scaling", 1.0) or 1.0)
    others = {name: tensor[order] for name, tensor in asked.inputs.items()}
    ratio = _sigma(model, others) / _sigma(model, asked.inputs)
    here, there = attribute(model, asked.inputs, readout), attribute(model, others, readout * ratio)
    rest = here.embedding - there.embedding + (here.attention_bias - there.attention_bias).sum(1)
    return tuple(part.numpy(force=True) for part in (here.heads - there.heads, here.mlp - there.mlp, rest))  # type: ignore[return-value]


def _sigma(model: HeadModel, inputs: dict[str, Tensor]) -> Float[Tensor, "N 1"]:
    """The final norm's denominator at the last position."""
    keep = Keep("resid", layers=[model.n_layers])
    model.read(inputs, keep, keep=1)
    final = keep.values[model.n_layers][:, -1].double()
    norm = model.layout.final_norm
    return torch.ones_like(final[:, :1]) if norm is None else FoldedNorm.of(norm, final.shape[-1]).sigma(final)


def _with_other_mlp(
    model: HeadModel, asked: Questions, recording: Recording, layer: int, order: Tensor
) -> Float[np.ndarray, "N"]:
    """The margin with one MLP's last write taken from another question."""
    with _other_mlp(model, recording, layer, order):
        return margin(asked)(model.logits(asked.inputs)).numpy(force=True)


def _other_mlp(
    model: HeadModel, recording: Recording, layer: int, order: Tensor
) -> contextlib.AbstractContextManager[None]:
    shape = (recording.batch, recording.length, -1)
    other = first_tensor(recording.mlp[layer]).reshape(shape)[order, -1]

    def last(plain: Tensor) -> Tensor:
        new = plain.reshape(shape).clone()
        new[:, -1] = other
        return new.reshape(plain.shape)

    return leaving(model.layout.blocks[layer].mlp_write, last)


def _vectors(model: HeadModel, asked: Questions, heads: HeadSet) -> dict[Part, dict[int, Float[Tensor, "h S Dh"]]]:
    """The heads' queries at the last token, and keys and values at the labels, one row a sample."""
    kept: dict[Part, dict[int, Tensor]] = {part: {} for part in PARTS}
    rows, columns = torch.arange(len(asked))[:, None], asked.label_columns
    by_layer = heads.by_layer()

    def note(call: AttentionCall) -> None:
        indices = by_layer[call.layer]
        group = call.query.shape[1] // call.key.shape[1]
        kept["query"][call.layer] = call.query[:, indices, -1].transpose(0, 1).cpu()
        for part, tensor in (("key", call.key[:, [h // group for h in indices]]), ("value", call.values_of(indices))):
            at_labels = tensor.transpose(1, 2)[rows, columns]  # [N, K, h, Dh]
            kept[part][call.layer] = at_labels.flatten(0, 1).transpose(0, 1).cpu()  # type: ignore[index]

    model.read(asked.inputs, ReadAttention(note, layers=set(by_layer)), keep=1)
    return kept
