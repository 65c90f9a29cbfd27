"""The effect of a concept on a classifier's answers, estimated with a twin encoder that has forgotten it (#70).

Feder et al., arXiv:2005.13407. On the frozen states of an encoder a classifier pools tokens by attention,

    p(y | x) = softmax(W sum_t softmax_t(u . tanh(V h_t)) h_t + b)

where `h` is scaled to mean 0 and standard deviation 1 in each dimension. V and W could learn this map; it makes fits converge on
a twin, whose dimensions may differ much in size, as well as on the original. One classifier is fitted on the original encoder O,
one on the twin CF that forgot concept C. Distances are L1 norms of probability vectors, in [0, 2] (the paper does not name the
norm; our reading):

    TReATE(C)    mean_x ||p_O(x) - p_CF(x)||                       the estimate
    true effect  mean_x ||p_O(x) - p_O(x with C changed)||         where counterfactual texts are known
    CONEXP(C)    ||mean p_O over texts with C - without C||        the difference of means, biased by confounding

The baseline of TReATE is the same distance to a twin that only read the text: the effect of further training itself. Fresh probes
for C and for the control concept on both encoders test the erasure, since an adversary that fails does not prove it. A correlated
control concept would let a probe predict C. So probes are fitted and tested on as many texts of each pair (concept, control),
where neither predicts the other and chance is 1 / classes.

TReATE compares with a classifier without C, the true effect with one that gets the opposite C, so full erasure does not make them
equal. With two classes, if C alone decides the label and the control concept agrees with C in a share r of texts,

    true effect = 2,        TReATE = 4 r (1 - r)        since the twin's classifier can use the control concept only

    0.36 at r = 0.9, 1 at r = 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.heads import mean_stderr
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Keep
from manyheads.trace.concepts.causalm import ConceptTexts, pairs
from manyheads.training import ADAM, fit

ROWS = 256
CLASSIFIER = replace(ADAM, rate=1e-2, optimizer="adamw", weight_decay=1e-2, decayed="all")
Estimate = tuple[float, float]  # a mean and its standard error over texts


@dataclass(frozen=True)
class ConceptEffect:
    """Estimates with their standard errors over texts; probes are held-out accuracies on the original and on the twin.

    `chance` is that of the concept's probe, whose texts have every pair (concept, control) equally often.
    """

    treate: Estimate
    text_only: Estimate
    conexp: float
    true: Estimate | None
    accuracy: tuple[float, float]
    concept_probe: tuple[float, float]
    control_probe: tuple[float, float] | None
    chance: float
    n: int

    def to_frame(self) -> pd.DataFrame:
        """One row a figure: what, value, stderr."""
        rows: list[tuple[str, float, float]] = [
            ("TReATE", *self.treate),
            ("distance to a twin that only saw the text", *self.text_only),
            ("CONEXP", self.conexp, float("nan")),
        ]
        rows += [("true effect", *self.true)] if self.true is not None else []
        for name, pair in (
            ("classifier", self.accuracy),
            ("probe for the concept", self.concept_probe),
            ("probe for the control concept", self.control_probe),
        ):
            if pair is not None:
                rows += [
                    (f"{name}, {where}", value, float("nan"))
                    for where, value in zip(("original", "twin"), pair, strict=True)
                ]
        rows.append(("chance of the concept", self.chance, float("nan")))
        return pd.DataFrame(rows, columns=["what", "value", "stderr"])

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the figures as Parquet. `InputError` if `path` exists and `force` is not set."""
        return write_atomically(path, lambda file: self.to_frame().to_parquet(file, index=False), force=force)


class PooledClassifier(nn.Module):
    """Attention pooling and a linear map on frozen states (formula above)."""

    mean: Float[Tensor, "D"]
    scale: Float[Tensor, "D"]

    def __init__(self, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.key, self.query, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 1, bias=False),
            nn.Linear(width, classes),
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)

    def forward(self, states: Float[Tensor, "N T D"], mask: Int[Tensor, "N T"]) -> Float[Tensor, "N C"]:
        """Class logits; masked tokens get no attention."""
        states = (states - self.mean) / self.scale
        score = self.query(torch.tanh(self.key(states)))[..., 0].masked_fill(mask == 0, float("-inf"))
        pooled: Tensor = self.out((score.softmax(1)[..., None] * states).sum(1))
        return pooled


def estimate_effect(
    model: HeadModel,
    twin: HeadModel,
    text_only: HeadModel,
    texts: ConceptTexts,
    labels: Int[Tensor, "N"],
    *,
    changed: Int[Tensor, "N T"] | None = None,
    share: float = 0.5,
    steps: int = 300,
    seed: int = 0,
) -> ConceptEffect:
    """Estimate the effect of `texts.concept` on the classification of `labels` (formulas above).

    `twin` forgot the concept, `text_only` is a twin trained with weights 0 (see `forget`). `changed` are token ids
    of the same texts with the concept changed, if known. Classifiers and probes learn on a `share` of the texts; all figures are
    from the others. `InputError` for concepts of tokens, fewer than four texts, or a pair (concept, control) without texts on
    either side.
    """
    if texts.concept.ndim != 1 or (texts.control is not None and texts.control.ndim != 1):
        raise InputError("effects are estimated for concepts of whole texts; give one class a text, [N].")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    cut = round(share * len(texts))
    if not 2 <= cut <= len(texts) - 2:
        raise InputError(
            f"a share of {share:g} of {len(texts)} texts leaves fewer than 2 to learn on or to test; give more texts."
        )
    learn, judge = order[:cut], order[cut:]
    mask = texts.attention_mask
    states = {
        name: encode_states(one, texts.input_ids, mask) for name, one in (("O", model), ("CF", twin), ("T", text_only))
    }
    fitted = {
        name: fit_classifier(h[learn], mask[learn], labels[learn], steps=steps, seed=seed) for name, h in states.items()
    }
    p = {name: probabilities(fitted[name], h[judge], mask[judge]) for name, h in states.items()}
    true = None
    if changed is not None:
        other = encode_states(model, changed[judge], mask[judge])
        true = distance(p["O"], probabilities(fitted["O"], other, mask[judge]))

    generator = torch.Generator().manual_seed(seed)
    fresh, unseen = (even(rows, texts, generator) for rows in (learn, judge))

    def probed(target: Tensor | None) -> tuple[float, float] | None:
        if target is None:
            return None
        one, two = (
            probe(
                states[name][fresh],
                states[name][unseen],
                mask[fresh],
                mask[unseen],
                target[fresh],
                target[unseen],
                seed=seed,
            )
            for name in ("O", "CF")
        )
        return one, two

    concept = probed(texts.concept)
    assert concept is not None
    right = [float((p[name].argmax(-1) == labels[judge]).float().mean()) for name in ("O", "CF")]
    return ConceptEffect(
        treate=distance(p["O"], p["CF"]),
        text_only=distance(p["O"], p["T"]),
        conexp=conexp(p["O"], texts.concept[judge]),
        true=true,
        accuracy=(right[0], right[1]),
        concept_probe=concept,
        control_probe=probed(texts.control),
        chance=1 / (int(texts.concept.max()) + 1),
        n=len(judge),
    )


def even(rows: Int[Tensor, "N"], texts: ConceptTexts, generator: torch.Generator) -> Int[Tensor, "M"]:
    """As many of `rows` of each pair (concept, control) as the rarest pair has, drawn at random."""
    cells = pairs(texts.concept[rows], None if texts.control is None else texts.control[rows])
    each = min(map(len, cells))
    return torch.cat([rows[cell[torch.randperm(len(cell), generator=generator)[:each]]] for cell in cells])


@torch.no_grad()
def encode_states(model: HeadModel, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N T"]) -> Float[Tensor, "N T D"]:
    """The encoder's last hidden states, on the CPU."""
    parts = []
    for start in range(0, len(ids), ROWS):
        keep = Keep("resid", layers=[model.n_layers])
        rows = slice(start, start + ROWS)
        model.look({"input_ids": ids[rows], "attention_mask": mask[rows]}, keep)
        parts.append(keep.values[model.n_layers].float().cpu())
    return torch.cat(parts)


def fit_classifier(
    states: Float[Tensor, "N T D"],
    mask: Int[Tensor, "N T"],
    labels: Int[Tensor, "N"],
    *,
    steps: int = 300,
    seed: int = 0,
) -> PooledClassifier:
    """A pooled classifier fitted by AdamW, all texts at every step."""
    classes = int(labels.max()) + 1
    classifier = PooledClassifier(states.shape[-1], classes, torch.Generator().manual_seed(seed))
    seen = states[mask > 0]
    classifier.mean.copy_(seen.mean(0))
    classifier.scale.copy_(seen.std(0) + 1e-6)
    fit(
        classifier,
        lambda _: (states, mask, labels),
        replace(CLASSIFIER, steps=steps, seed=seed),
        loss=lambda module, given: F.cross_entropy(module(given[0], given[1]), given[2]),
        device=states.device,
    )
    return classifier.eval()


@torch.no_grad()
def probabilities(classifier: PooledClassifier, states: Tensor, mask: Tensor) -> Float[Tensor, "N C"]:
    """The classifier's class probabilities."""
    return classifier(states, mask).softmax(-1)


def probe(
    train: Float[Tensor, "N T D"],
    test: Float[Tensor, "M T D"],
    train_mask: Tensor,
    test_mask: Tensor,
    labels: Int[Tensor, "N"],
    test_labels: Int[Tensor, "M"],
    *,
    steps: int = 300,
    seed: int = 0,
) -> float:
    """Held-out accuracy of a fresh pooled classifier for a concept: above chance, the states still hold it."""
    found = fit_classifier(train, train_mask, labels, steps=steps, seed=seed + 1)
    return float((probabilities(found, test, test_mask).argmax(-1) == test_labels).float().mean())


def distance(p: Float[Tensor, "N C"], q: Float[Tensor, "N C"]) -> Estimate:
    """Mean L1 distance of two classifiers' answers, in [0, 2], with its standard error over texts."""
    mean, stderr = mean_stderr((p - q).abs().sum(-1).double().numpy())
    return float(mean), float(stderr)


def conexp(p: Float[Tensor, "N C"], concept: Int[Tensor, "N"]) -> float:
    """L1 distance of the mean answers with (class 1) and without (class 0) the concept. `InputError` if either is missing."""
    with_it, without = p[concept == 1], p[concept == 0]
    if not len(with_it) or not len(without):
        raise InputError(
            "CONEXP compares texts with and without the concept, and all texts here are of one kind; give both."
        )
    return float((with_it.mean(0) - without.mean(0)).abs().sum())
