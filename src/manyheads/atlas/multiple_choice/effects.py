"""The multiple-choice circuit (#12): which heads and MLPs turn a known answer into its letter.

Lieberum et al., arXiv:2307.09458, on four options labelled A to D. With the margin of the right label's logit over the others'
(see `questions`), each node (a head's z, or an MLP's write) at the last position gets its value on another question:

    total[node]  = margin - margin(node resampled, all later layers react)
    direct[node] = <d, write(here) - write(other question)>,   d = the margin's readout through the final norm as it was here

both in logits, positive where the node helps. With the norm frozen the direct effects of all heads and MLPs and of the embedding
sum to `margin - margin(other question's final state)` exactly. The two differ: later layers repair, or pass on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import by_task
from manyheads.atlas.core.registry import register
from manyheads.atlas.multiple_choice.classes import PASSED, choice_classes, last_attention
from manyheads.atlas.multiple_choice.questions import Questions, margin, questions
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadScores, HeadSet, mean_stderr
from manyheads.model.editing.edits import Patch, derangement
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor, leaving
from manyheads.model.linear import output_rows
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.attribution import attribute
from manyheads.model.reading.readers import Keep
from manyheads.model.replay.recording import Recording
from manyheads.progress import Bar

PAPER = "arXiv:2307.09458"


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
class NodeEffects:
    """What each node does to the margin, in logits; heads as scores, MLPs and the rest `[N, L]` and `[N]` by question."""

    direct: HeadScores
    total: HeadScores
    direct_mlp: Float[np.ndarray, "N L"]
    total_mlp: Float[np.ndarray, "N L"]
    rest: Float[np.ndarray, "N"]
    sum: Float[np.ndarray, "N"]

    @property
    def margin(self) -> tuple[float, float]:
        """The mean margin of the questions as they are, in logits, and its standard error."""
        settings = self.direct.meta["settings"]
        return float(settings["margin"]), float(settings["margin_stderr"])

    def top(self, k: int) -> tuple[HeadSet, list[int]]:
        """The `k` nodes of largest direct effect: heads, and layers of MLPs."""
        mlps = self.direct_mlp.mean(0)
        least = np.sort(np.concatenate([self.direct.values.ravel(), mlps]))[-k]
        return self.direct.above(float(least)), [layer for layer, effect in enumerate(mlps) if effect >= least]


def node_effects(model: HeadModel, asked: Questions, *, seed: int = 0, bar: Bar = Bar()) -> NodeEffects:
    """Direct and total effect of every head and MLP by resample ablation at the last position (formulas above).

    The other question of each row is another row (a seeded derangement). One sweep over heads, one pass an MLP; `bar`
    counts nodes.
    """
    if len(asked) < 2:
        raise InputError("resample ablation takes another question's value; give two questions or more.")
    order = derangement(len(asked), seed)
    metric = margin(asked)
    recording = model.record(asked.inputs, keep=1)
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
    mean, error = mean_stderr(clean)
    meta = {"n": len(asked), "margin": float(mean), "margin_stderr": float(error)}

    def scored(name: str, per_question: Float[np.ndarray, "N L H"]) -> HeadScores:
        return HeadScores.from_examples(name, per_question, ABOUT[name].provenance(model, seed, **meta))

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
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """The three scores of the circuit's heads: direct and total effect (logits), and attention to the right label.

    `meta["classes"]` of "correct_letter" names the heads of each class (see `choice_classes`) among those that matter, whose
    direct or total effect is at least 0.05 of the margin, and `meta["note"]` says which classes are empty. Where the margin is
    not two standard errors above 0 no head matters, and the note says so.
    """
    asked = questions(model, n=n, seed=seed, split=split) if asked is None else asked
    effects = node_effects(model, asked, seed=seed, bar=bar)
    seen = last_attention(model, asked)["right label"].numpy()
    classes, note = _classes(model, asked, effects)
    meta = ABOUT["correct_letter"].provenance(model, seed, n=len(asked)) | {"classes": classes, "note": note}
    return {
        "choice_direct": effects.direct,
        "choice_total": effects.total,
        "correct_letter": HeadScores.from_examples("correct_letter", seen, meta),
    }


def _classes(model: HeadModel, asked: Questions, effects: NodeEffects) -> tuple[dict[str, list[str]], str]:
    """The classes of the heads that matter, by name, and a sentence on which are empty."""
    mean, error = effects.margin
    if mean <= 2 * error:
        margin = f"margin {mean:.2f} logits, standard error {error:.2f}"
        return {}, f"The model does not prefer the right letter ({margin}), so no head has a class."
    if len(asked.right.unique()) < asked.labels.shape[1]:
        return {}, f"{len(asked)} questions are too few to tell classes: not every label is the right one at times."
    matter = effects.direct.above(PASSED * mean) | effects.total.above(PASSED * mean)
    found = {name: [str(h) for h in heads] for name, heads in choice_classes(model, asked, matter).items()}
    empty = ", ".join(name.replace("_", " ") for name, heads in found.items() if not heads)
    said = f"Empty classes: {empty}." if empty else "No class is empty."
    return found, f"Of {len(matter)} heads that matter, {sum(map(len, found.values()))} have a class. {said}"


def _direct(
    model: HeadModel, asked: Questions, order: Tensor
) -> tuple[Float[np.ndarray, "N L H"], Float[np.ndarray, "N L"], Float[np.ndarray, "N"]]:
    """Direct effects of heads and MLPs, and of the rest (embedding, biases inside branches)."""
    head = model.layout.unembedding
    if head is None:
        raise UnsupportedError(f"{type(model.plain).__name__} has no unembedding to read labels with.")
    labels = asked.labels.to(model.device)
    rows = output_rows(head, labels.flatten()).detach().double().unflatten(0, labels.shape)  # [N, K, D]
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
        return margin(asked)(model.read(asked.inputs, keep=1)).numpy(force=True)


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


register(
    ABOUT["choice_direct"],
    score=choice,
    judge=by_task("choice"),
    steps=lambda model, n: len(model.heads) + model.n_layers,  # every node, whatever the number of questions
    causal=True,
)
