"""CausaLM (#70): a twin of an encoder that has forgotten one concept and kept another, to measure the concept's effect.

Feder et al., arXiv:2005.13407. A copy of a pretrained masked language model is trained further to fill masks on the task's text,
with two heads on its last hidden states,

    loss = CE(masked tokens) + a CE(concept | reversed states) + k CE(control concept)          a = k = 1

where reversal leaves states unchanged and multiplies gradients by -1: the head learns to predict the concept, the encoder to hide
it. The control concept, which is correlated with the first in the data, has to stay. With a = k = 0 the twin has only read the
text: the baseline for the effect of further training itself.

Concepts are labels of whole texts, `[N]`, or of single tokens, `[N, T]`, -1 for none. `heads` are the heads that predict them:

    "mean"    the paper's: a linear head on the mean of a text's states (a token's own state, where tokens are labelled)
    "token"   a linear head on every token's state
    "exact"   beyond the paper: regressions solved again on each batch; the twin minimises
                  a mean_d R2(concept | [h_d, sqrt(2) cos(h_d w + b)] of every token) + k (1 - R2(control | mean last state))

with R2 in [0, 1] the share of a label's variance that ridge regression explains and h_d the states at depth d, from the
embeddings to the last layer's. A trained head is always a step late: the encoder hides the concept from this one head
only, or even shows it more. A regression is never late. Cosines of random projections `w ~ N(0, 1/D)`, redrawn for each batch,
also detect nonlinear traces. Depths matter: a token that carries the concept can keep it in a direction of its last state that
hardly varies, which a regression over all tokens misses; in the embeddings it cannot.

`balanced` draws as many texts of each pair (concept, control). Otherwise a correlated control concept predicts the first one, and
the two heads work against each other. A head that fails is no proof of erasure: fit a fresh probe
(`manyheads.trace.concepts.concept_effect`).

Departures: "exact" and `balanced`, neither the default. Masks fall on 15 % of tokens at random; the paper masks adjectives and as
many others where adjectives are the concept (give `maskable` for such a policy).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.learning import LinearHead, pooled
from manyheads.learning.head import LinearSettings
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.progress import Bar
from manyheads.training import Batch, TrainSettings, fit, generator_of

Heads = Literal["mean", "token", "exact"]
PAPER = "arXiv:2005.13407"
IGNORED = -100
RIDGE = {"adversary": 0.01, "control": 0.1}
COSINES = 64
TRAINING = TrainSettings(
    steps=2000,
    rows=6,
    rate=3e-5,
    warmup=100,
    decay=1.0,
    floor=0.0,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    precision="fp32",
)


@dataclass(frozen=True)
class ConceptTexts:
    """Encoded texts with a concept to forget and one to keep, class numbers `[N]` of texts or `[N, T]` of tokens (-1: none).

    `maskable` limits which tokens may be masked (None: all that are attended to).
    """

    input_ids: Int[Tensor, "N T"]
    attention_mask: Int[Tensor, "N T"]
    concept: Int[Tensor, "N"] | Int[Tensor, "N T"]
    control: Int[Tensor, "N"] | Int[Tensor, "N T"] | None = None
    maskable: Bool[Tensor, "N T"] | None = None

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        for name in ("concept", "control"):
            labels = getattr(self, name)
            if labels is not None and labels.shape not in (shape, shape[:1]):
                raise InputError(
                    f"{name} has shape {list(labels.shape)}; give one class a text, {list(shape[:1])}, or a token, {list(shape)}."
                )

    def __len__(self) -> int:
        return len(self.input_ids)

    def swapped(self) -> ConceptTexts:
        """The texts with the control concept to forget and the concept to keep."""
        if self.control is None:
            raise InputError("these texts have no control concept to swap with; give control=.")
        return replace(self, concept=self.control, control=self.concept)


@dataclass(frozen=True)
class Forgetting:
    """How a twin is trained. `adversary` and `control` are the weights a and k; `masked` is the share of masked tokens.

    Defaults are the paper's. Small models need a higher `training.rate`; `heads="exact"` needs larger batches
    (`training.rows`) and `adversary=10`.
    """

    adversary: float = 1.0
    control: float = 1.0
    heads: Heads = "mean"
    balanced: bool = False
    masked: float = 0.15
    training: TrainSettings = TRAINING


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None


def reverse_gradient(x: Float[Tensor, "..."], scale: float = 1.0) -> Float[Tensor, "..."]:
    """`x` unchanged; its gradient is multiplied by `-scale`."""
    reversed_: Tensor = _Reversal.apply(x, scale)
    return reversed_


def forget(
    model: HeadModel,
    texts: ConceptTexts,
    settings: Forgetting | None = None,
    *,
    mask_id: int | None = None,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> HeadModel:
    """A twin of `model` that has forgotten `texts.concept` and kept `texts.control`; `model` stays bit for bit as it was.

    `mask_id` is the mask token (default: the tokenizer's). With a `folder` an interrupted call resumes. `bar` counts steps.
    `UnsupportedError` for a model that fills no masks; `InputError` without mask token or texts, or if texts cannot be balanced.
    """
    settings = settings or Forgetting()
    if not len(texts):
        raise InputError("got no texts to learn from; give at least one.")
    if mask_id is None:
        mask_id = getattr(model.tokenizer, "mask_token_id", None)
    if mask_id is None:
        raise InputError("a masked language model needs its mask token; give mask_id=, or open it with tokenizer=.")
    if model.is_causal or (model.layout.unembedding is None and not hasattr(model.plain, "get_output_embeddings")):
        raise UnsupportedError(f"{type(model.plain).__name__} fills no masks; give an encoder with a masked-LM head.")
    cells = _cells(texts, settings)
    twin = _Twin(copy.deepcopy(model.plain), texts, settings)

    def batch_at(number: int) -> Batch:
        return _masked(texts, settings, int(mask_id), number, cells)

    fit(twin, batch_at, settings.training, folder, bar=bar)
    return open_model(twin.trunk.to(model.device).eval(), tokenizer=model.tokenizer)


class _Twin(nn.Module):
    """The copy, and the two heads that are needed only to train it."""

    def __init__(self, trunk: Any, texts: ConceptTexts, settings: Forgetting) -> None:
        super().__init__()
        generator = generator_of(0, settings.training.seed)
        self.trunk, self.settings = trunk, settings
        width = trunk.config.hidden_size
        self.classes = [0 if labels is None else int(labels.max()) + 1 for labels in (texts.concept, texts.control)]
        if settings.heads != "exact":
            self.adversary, self.control = (
                LinearHead(LinearSettings(width, classes), generator) if classes else None for classes in self.classes
            )

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        mask = batch["attention_mask"]
        out = self.trunk(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED)
        states = out.hidden_states[-1]
        if self.settings.adversary:
            loss = loss + self.settings.adversary * self._hidden(out.hidden_states, batch)
        if self.settings.control and "control" in batch:
            loss = loss + self.settings.control * self._kept(states, batch)
        return loss

    def _hidden(self, depths: tuple[Float[Tensor, "B T D"], ...], batch: Batch) -> Float[Tensor, ""]:
        mask, labels = batch["attention_mask"], batch["concept"]
        if self.settings.heads != "exact":
            return self._seen(self.adversary, reverse_gradient(depths[-1]), labels, mask)
        seen = []
        for states in depths:
            x, y = _by_token(states, labels, mask)
            seen.append(explained(_with_cosines(x, int(batch["draw"])), y, self.classes[0], RIDGE["adversary"]))
        return torch.stack(seen).mean()

    def _kept(self, states: Float[Tensor, "B T D"], batch: Batch) -> Float[Tensor, ""]:
        mask, labels = batch["attention_mask"], batch["control"]
        if self.settings.heads != "exact":
            return self._seen(self.control, states, labels, mask)
        x, y = _by_token(states, labels, mask) if labels.ndim == 2 else (pooled(states, mask, "mean"), labels)
        return 1 - explained(x, y, self.classes[1], RIDGE["control"])

    def _seen(self, head: LinearHead | None, states: Tensor, labels: Tensor, mask: Tensor) -> Float[Tensor, ""]:
        assert head is not None
        if labels.ndim == 1 and self.settings.heads == "mean":
            return head.loss(head(pooled(states, mask, "mean")), labels)
        x, y = _by_token(states, labels, mask)
        return head.loss(head(x), y)


def explained(
    x: Float[Tensor, "M F"], labels: Int[Tensor, "M"], classes: int, ridge: float = 0.01
) -> Float[Tensor, ""]:
    """The share, in [0, 1], of the variance of one-hot `labels` that ridge regression on `x`, scaled to unit variance, explains.

    R2 = tr(b^T (A + ridge)^-1 b) / tr(cov(y)),        A = cov(x) [F, F], b = cov(x, y) [F, C]
    """
    x, y = x - x.mean(0), F.one_hot(labels, classes).to(x)
    x = x / (x.detach().square().mean(0).sqrt() + 1e-6)
    y = y - y.mean(0)
    b = x.T @ y / len(x)
    A = x.T @ x / len(x) + ridge * torch.eye(x.shape[1]).to(x)
    share: Tensor = (b * torch.linalg.solve(A, b)).sum() / y.square().mean(0).sum().clamp_min(1e-6)
    return share


def _with_cosines(x: Float[Tensor, "M D"], draw: int) -> Float[Tensor, "M F"]:
    generator = torch.Generator().manual_seed(draw)
    w = torch.randn(x.shape[1], COSINES, generator=generator) / x.shape[1] ** 0.5
    b = 2 * torch.pi * torch.rand(COSINES, generator=generator)
    return torch.cat([x, 2**0.5 * torch.cos(x @ w.to(x) + b.to(x))], -1)


def _by_token(
    states: Float[Tensor, "B T D"], labels: Tensor, mask: Tensor
) -> tuple[Float[Tensor, "M D"], Int[Tensor, "M"]]:
    """The states and labels of the tokens that have a label."""
    wide = labels if labels.ndim == 2 else labels[:, None].expand_as(mask)
    judged = (mask > 0) & (wide >= 0)
    return states[judged], wide[judged]


def _cells(texts: ConceptTexts, settings: Forgetting) -> list[Int[Tensor, "_"]] | None:
    """Rows of each pair (concept, control) for balanced batches, else None."""
    return pairs(texts.concept, texts.control) if settings.balanced else None


def pairs(concept: Int[Tensor, "N"], control: Int[Tensor, "N"] | None) -> list[Int[Tensor, "_"]]:
    """The rows of each pair of classes (concept, control), or of each concept class; `InputError` if a pair has none."""
    if concept.ndim != 1 or (control is not None and control.ndim != 1):
        raise InputError("only concepts of whole texts can be balanced; give one class a text, [N].")
    control = torch.zeros_like(concept) if control is None else control
    cells = [
        ((concept == one) & (control == other)).nonzero()[:, 0]
        for one in range(int(concept.max()) + 1)
        for other in range(int(control.max()) + 1)
    ]
    if not all(map(len, cells)):
        raise InputError(
            "some pair of concept and control has no text, so that the two cannot be told apart; add such texts."
        )
    return cells


def _masked(
    texts: ConceptTexts, settings: Forgetting, mask_id: int, number: int, cells: list[Tensor] | None = None
) -> Batch:
    """Batch `number`, a function of its number alone, so that a run can resume."""
    generator = generator_of(settings.training.seed, number)
    if cells is None:
        rows = torch.randint(len(texts), (settings.training.rows,), generator=generator)
    else:
        each = [cells[(number + i) % len(cells)] for i in range(settings.training.rows)]
        rows = torch.stack([cell[torch.randint(len(cell), (), generator=generator)] for cell in each])
    ids, mask = texts.input_ids[rows], texts.attention_mask[rows]
    may = mask > 0 if texts.maskable is None else texts.maskable[rows] & (mask > 0)
    hidden = may & (torch.rand(ids.shape, generator=generator) < settings.masked)
    batch = {
        "input_ids": ids.where(~hidden, mask_id),
        "attention_mask": mask,
        "targets": ids.where(hidden, IGNORED),
        "concept": texts.concept[rows],
        "draw": torch.tensor(generator.initial_seed()),
    }
    return batch if texts.control is None else batch | {"control": texts.control[rows]}
