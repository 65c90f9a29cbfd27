"""CausaLM (#70): a twin of an encoder that has forgotten one concept and kept another, to ask what the concept did.

Feder et al., arXiv:2005.13407. From a pretrained masked language model, a copy goes on learning to fill masks on the task's text
with two heads on its last hidden states,

    loss = CE(masked words) + a CE(concept | reversed states) + k CE(control concept)          a = k = 1

where reversal hands on states as they are and gradients times -1: the head learns to see the concept, the encoder to hide it,
while the control concept, which goes along with the first in the data, has to stay. With a = k = 0 the twin has only seen the
text: the baseline that shows what further training does by itself.

Concepts are labels of whole texts, judged on every token (`level="token"`, the default: hidden in each token's state, a pooling
cannot find it in one of them) or on the mean over tokens ("mean", as in the paper); or labels of single tokens, `[N, T]`, -1 for
none. A head that was beaten proves no erasure: fit a fresh probe (`manyheads.trace.concept_effect`). What the control concept
tells of the concept stays, so that a probe cannot fall below that.

The encoder easily runs ahead of its adversary and then hides the concept from this one head only, or even shows it more. So
the adversary's logits are multiplied by `speed`, which under Adam lets it move that much faster.

Departures: masks fall on 15 % of tokens at random; the paper masks adjectives and as many others where adjectives are the concept
(give `maskable` for such a policy).
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.training import TrainSettings, WarmupStableDecay, fit
from manyheads.training.loop import Batch

Level = Literal["token", "mean"]
PAPER = "arXiv:2005.13407"
IGNORED = -100


@dataclass(frozen=True)
class ConceptTexts:
    """Encoded texts with a concept to forget and one to keep, class numbers `[N]` of texts or `[N, T]` of tokens (-1: none).

    `maskable` limits which tokens masks may fall on (None: all that are attended to).
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
                    f"{name} has shape {list(labels.shape)}; give a class a text, {list(shape[:1])}, or a token, {list(shape)}."
                )

    def __len__(self) -> int:
        return len(self.input_ids)

    def swapped(self) -> ConceptTexts:
        """The texts with the control concept to forget and the concept to keep."""
        if self.control is None:
            raise InputError("these texts have no control concept to change places with.")
        return replace(self, concept=self.control, control=self.concept)


@dataclass(frozen=True)
class Forgetting:
    """How a twin learns. `adversary` and `control` are the weights a and k; `masked` is the share of tokens behind a mask."""

    steps: int = 2000
    rows: int = 32
    rate: float = 1e-4
    adversary: float = 1.0
    control: float = 1.0
    speed: float = 30.0
    masked: float = 0.15
    level: Level = "token"
    weight_decay: float = 0.01
    seed: int = 0


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None


def reverse_gradient(x: Float[Tensor, "..."], scale: float = 1.0) -> Float[Tensor, "..."]:
    """`x` itself, whose gradient is `-scale` times what comes back."""
    reversed_: Tensor = _Reversal.apply(x, scale)
    return reversed_


def forget(
    model: HeadModel,
    texts: ConceptTexts,
    how: Forgetting | None = None,
    *,
    mask_id: int | None = None,
    folder: str | Path | None = None,
) -> HeadModel:
    """A twin of `model` that has forgotten `texts.concept` and kept `texts.control`; `model` stays bit for bit as it was.

    `mask_id` is the mask token (default: the tokenizer's). With a `folder` an interrupted call goes on. `UnsupportedError` for a
    model that fills no masks; `InputError` without a mask token or texts.
    """
    how = how or Forgetting()
    if not len(texts):
        raise InputError("there are no texts to learn from.")
    if mask_id is None:
        mask_id = getattr(model.tokenizer, "mask_token_id", None)
    if mask_id is None:
        raise InputError("a masked language model needs its mask token; give mask_id=, or open it with tokenizer=.")
    if model.is_causal or (model.layout.unembedding is None and not hasattr(model.plain, "get_output_embeddings")):
        raise UnsupportedError(f"{type(model.plain).__name__} fills no masks; give an encoder with a masked-LM head.")
    twin = _Twin(copy.deepcopy(model.plain), texts, how)
    settings = TrainSettings(
        steps=how.steps,
        schedule=WarmupStableDecay(peak=how.rate, warmup=max(1, how.steps // 20), decay=0.5),
        weight_decay=how.weight_decay,
        betas=(0.9, 0.999),
        precision="fp32",
        seed=how.seed,
    )

    def batch_at(number: int) -> Batch:
        return _masked(texts, how, int(mask_id), number)

    with tempfile.TemporaryDirectory() as scratch:
        fit(
            twin,
            batch_at,
            Path(scratch if folder is None else folder),
            settings,
            loss=lambda module, batch: module(batch),
        )
    return open_model(twin.trunk.to(model.device).eval(), tokenizer=model.tokenizer)


class _Twin(nn.Module):
    """The copy, and the two heads that only exist to train it."""

    def __init__(self, trunk: Any, texts: ConceptTexts, how: Forgetting) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(how.seed)
        self.trunk, self.how = trunk, how
        width = trunk.config.hidden_size
        self.adversary = _head(width, texts.concept, generator)
        self.control = None if texts.control is None else _head(width, texts.control, generator)

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        mask = batch["attention_mask"]
        out = self.trunk(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), batch["words"].flatten(), ignore_index=IGNORED)
        states = out.hidden_states[-1]
        if self.how.adversary:
            loss = loss + self.how.adversary * self._seen(
                self.adversary, reverse_gradient(states), batch["concept"], mask
            )
        if self.how.control and self.control is not None:
            loss = loss + self.how.control * self._seen(self.control, states, batch["control"], mask)
        return loss

    def _seen(
        self, head: nn.Linear, states: Tensor, labels: Tensor, mask: Tensor, speed: float = 1.0
    ) -> Float[Tensor, ""]:
        """How well a head tells the concept from the states: of every token, or of their mean."""
        if labels.ndim == 1 and self.how.level == "mean":
            weight = mask[..., None].to(states)
            return F.cross_entropy(speed * head((states * weight).sum(1) / weight.sum(1)), labels)
        wide = labels if labels.ndim == 2 else labels[:, None].expand_as(mask)
        wide = wide.where((mask > 0) & (wide >= 0), IGNORED)
        return F.cross_entropy(speed * head(states).flatten(0, 1), wide.flatten(), ignore_index=IGNORED)


def _head(width: int, labels: Tensor, generator: torch.Generator) -> nn.Linear:
    head = nn.Linear(width, int(labels.max()) + 1)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / width**0.5)
        head.bias.zero_()
    return head


def _masked(texts: ConceptTexts, how: Forgetting, mask_id: int, number: int) -> Batch:
    """The `number`-th batch: a function of its number alone."""
    generator = torch.Generator().manual_seed(1_000_003 * how.seed + number)
    rows = torch.randint(len(texts), (how.rows,), generator=generator)
    ids, mask = texts.input_ids[rows], texts.attention_mask[rows]
    may = mask > 0 if texts.maskable is None else texts.maskable[rows] & (mask > 0)
    hidden = may & (torch.rand(ids.shape, generator=generator) < how.masked)
    batch = {
        "input_ids": ids.where(~hidden, mask_id),
        "attention_mask": mask,
        "words": ids.where(hidden, IGNORED),
        "concept": texts.concept[rows],
    }
    return batch if texts.control is None else batch | {"control": texts.control[rows]}
