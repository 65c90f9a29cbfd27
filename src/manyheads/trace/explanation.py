"""Explanation of one answer: how much every component adds to the logit difference of answer and comparison.

All scores are in logits of `logit[answer] - logit[against]` at the last token, positive where a component favours the answer:

    direct         the component's own write to the logits, all else fixed; parts sum to the difference (attribution, exact)
    ablation       difference lost when a head's z is replaced by its mean over the prompt; later layers are recomputed
    patching       difference lost when a head's z is taken from the corrupted prompt
    attribution    the first-order estimate of patching, for heads and MLPs, by integrated gradients (arXiv:2403.17806)
    decomposition  the part of the difference that contextual decomposition assigns to a head (#9, arXiv:2407.00886)
    edges          which component reads which: integrated gradients on edges (arXiv:2403.17806), the strongest kept
    gim            the first-order estimate of patching by a gradient that self-repair does not hide (arXiv:2505.17630)

Without `against`, the comparison is the model's next best token; without `answer`, the answer is its best token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.files import write_folder_atomically
from manyheads.heads import Head, HeadScores
from manyheads.model.editing.edits import Ablate
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attribution import logit_attribution, source_attribution
from manyheads.model.replay.edges import edge_attribution
from manyheads.model.replay.patching import activation_patching
from manyheads.report import Reported
from manyheads.tasks import Example, TaskBatch, encode
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.explaining import LOST, Found, components, explains, way

EDGES = 60
STEPS = 10


@dataclass(frozen=True)
class Explanation(Reported):
    """Scores of one answer. `circuit` holds every component's score (or those of the strongest edges). `sources` splits the
    largest direct parts of heads by source token. `logits` are those of answer and comparison."""

    prompt: str
    tokens: list[str]
    answer: str
    against: str
    method: str
    circuit: Circuit
    logits: tuple[float, float]
    probability: float
    constants: dict[str, float] = field(default_factory=dict)
    sources: dict[str, Float[np.ndarray, "T"]] = field(default_factory=dict)
    corrupted: str | None = None

    @property
    def difference(self) -> float:
        """`logit[answer] - logit[against]`."""
        return self.logits[0] - self.logits[1]

    @property
    def heads(self) -> HeadScores:
        """The heads' scores as a table; for edges, the sum over all kept edges out of a head."""
        values = np.zeros(self.circuit.shape)
        for name, score in self.circuit.nodes.items():
            if name[0] == "L":
                values[Head.parse(name)] = score
        for (sender, _), score in self.circuit.edges.items():
            if sender[0] == "L":
                values[Head.parse(sender)] += score
        return HeadScores(self.method, values, np.full_like(values, np.nan), 1, self.circuit.meta)

    def to_frame(self) -> pd.DataFrame:
        """One row a component or edge, largest magnitude first."""
        return self.circuit.to_frame()

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write `trace.html`, `circuit.json` and, for method "direct", `sources.parquet` into `folder`."""

        def write(into: Path) -> None:
            self.report(into / "trace.html")
            self.circuit.save(into / "circuit.json")
            if self.sources:
                rows = [
                    (head, i, token, float(value))
                    for head, values in self.sources.items()
                    for i, (token, value) in enumerate(zip(self.tokens, values, strict=True))
                ]
                frame = pd.DataFrame(rows, columns=["head", "position", "token", "score"])
                frame.to_parquet(into / "sources.parquet", index=False)

        return write_folder_atomically(folder, write, force=force)


def explain(
    model: HeadModel,
    prompt: str,
    answer: str | None = None,
    against: str | None = None,
    *,
    method: str = "direct",
    corrupted: str | None = None,
) -> Explanation:
    """Explain one answer by its components (methods above).

    `corrupted` is a prompt with as many tokens and another answer. Some methods need it (`needs_twin` in `explaining.ways`);
    "decomposition" takes a head's mean from it (else from the prompt itself). `InputError` if answer or comparison is not one
    token after the prompt, or if a prompt is missing or of another length.
    """
    chosen = way(method)
    batch = _encoded(model, prompt, answer, against, corrupted)
    if batch.corrupted_ids is None and chosen.needs_twin:
        raise InputError(
            f"method {method!r} compares with another prompt; give corrupted=, with as many tokens (--corrupted)."
        )
    logits = model.logits(batch.inputs)[0, -1].double()
    pair = float(logits[batch.answer_ids[0]]), float(logits[batch.foil_ids[0]])
    found, constants = chosen.score(model, batch)
    example = batch.examples[0]
    assert example.foil is not None
    return Explanation(
        prompt=prompt,
        tokens=[model.tokenizer.decode([i]) for i in batch.input_ids[0].tolist()],
        answer=example.answer,
        against=example.foil,
        method=method,
        circuit=found,
        logits=pair,
        probability=float(logits.softmax(-1)[batch.answer_ids[0]]),
        constants=constants,
        sources=_sources(model, batch) if method == "direct" else {},
        corrupted=corrupted,
    )


def _encoded(
    model: HeadModel, prompt: str, answer: str | None, against: str | None, corrupted: str | None
) -> TaskBatch:
    if model.tokenizer is None:
        raise InputError("this model was opened without a tokenizer; open it with tokenizer= to explain text.")
    if not prompt.strip():
        raise InputError("the prompt is empty; give a text to continue.")
    best = _best(model, prompt)
    answer = best[0] if answer is None else _as_token(model, prompt, answer)
    if against is None:
        against = next((token for token in best if token != answer), None)
        if against is None:
            raise InputError(f"all that this model puts first reads {answer!r}; say what to compare with (--against).")
    else:
        against = _as_token(model, prompt, against)
    if answer == against:
        raise InputError(f"answer and comparison are both {answer!r}; give two different tokens.")
    if corrupted is not None:
        lengths = [len(model.tokenizer(text)["input_ids"]) for text in (prompt, corrupted)]
        if lengths[0] != lengths[1]:
            raise InputError(
                f"the corrupted prompt has {lengths[1]} tokens and the prompt {lengths[0]}; use words with as many tokens."
            )
    return encode([Example(prompt, answer, foil=against, corrupted=corrupted)], model.tokenizer, 1)


def _best(model: HeadModel, prompt: str) -> list[str]:
    """The most likely next tokens that can stand as text after the prompt, best first."""
    order = model.logits(prompt)[0, -1].argsort(descending=True)[:50].tolist()
    texts = [model.tokenizer.decode([i]) for i in order]
    return [text for text in texts if text and _fits(model, prompt, text)]


def _as_token(model: HeadModel, prompt: str, text: str) -> str:
    """`text`, or `text` after a space, whichever is one token after the prompt."""
    for form in (text, f" {text}"):
        if text and _fits(model, prompt, form):
            return form
    raise InputError(f"{text!r} is not one token after this prompt; give the first token of the answer.")


def _fits(model: HeadModel, prompt: str, text: str) -> bool:
    try:
        return encode([Example(prompt, text)], model.tokenizer, 1).whole is None
    except InputError:
        return False


# Methods without a file of their own


@explains("direct", "what each component writes to the difference of the two logits by itself, all else held fixed")
def _direct(model: HeadModel, batch: TaskBatch) -> Found:
    parts = logit_attribution(model, batch.inputs, batch.answer_ids, batch.foil_ids)
    bias = float(parts.attention_bias.sum() + parts.constant.sum())
    circuit = components(model, "direct", parts.heads[0].cpu().numpy(), parts.mlp[0].cpu().numpy())
    return circuit, {"embedding": float(parts.embedding.sum()), "biases": bias}


@explains("ablation", f"{LOST} a head writes its mean over the prompt")
def _ablation(model: HeadModel, batch: TaskBatch) -> Found:
    metric = batch.logit_difference
    edits = [Ablate([head], "mean") for head in model.heads]
    values = model.sweep(batch.inputs, edits, metric, keep=1)[:, 0]
    plain = float(metric(model.logits(batch.inputs)))
    return components(model, "ablation", (plain - values).reshape(model.shape)), {}


@explains("patching", f"{LOST} a head writes what it writes on the corrupted prompt", needs_twin=True)
def _patching(model: HeadModel, batch: TaskBatch) -> Found:
    effects = activation_patching(model, batch.inputs, batch.twins, batch.logit_difference, keep=1)
    return components(model, "patching", -effects.by_head(*model.shape)), {}


@explains(
    "edges", f"an estimate of {LOST} a reader gets what the writer writes on the corrupted prompt", needs_twin=True
)
def _edges(model: HeadModel, batch: TaskBatch) -> Found:
    scores = edge_attribution(model, batch.inputs, batch.twins, batch.logit_difference, steps=STEPS, keep=1)
    return Circuit.of_edges(scores, model, EDGES, method="edges").connected(), {}


def _sources(model: HeadModel, batch: TaskBatch, n: int = 8) -> dict[str, Float[np.ndarray, "T"]]:
    """The largest direct parts of heads, split by source token."""
    by_source = source_attribution(model, batch.inputs, batch.answer_ids, batch.foil_ids)[0]
    strength = by_source.sum(-1).abs()
    order = torch.argsort(strength.flatten(), descending=True)[:n].tolist()
    heads = [Head(i // model.n_heads, i % model.n_heads) for i in order]
    return {str(head): by_source[head].cpu().numpy() for head in heads}
