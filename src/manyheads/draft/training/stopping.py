"""SpecDec++ (#91): a chain of guesses goes on while it is likely enough that all of them are right.

Huang et al., arXiv:2405.19715. Let t_d be the time of a draft step and t_t that of a verification. Beyond what every token costs
anyway, a discarded guess costs t_d and a verification t_t - t_d. Then it is best to stop as soon as

    P(some of Y_1..Y_k is rejected) > h          1 - prod_i a_i > h

where a_i estimates P(Y_i accepted | all before it were) from the drafter's state after reading Y_i. The newest guess has not been
read, so it is proposed in any case. The estimate is a head of three residual blocks and a linear layer to two classes, trained on
a frozen drafter with the weighted cross-entropy

    - ( a log p + w (1 - a) log(1 - p) )        summed, over the summed weights a + w (1 - a)        w = 6, h = 0.7

**Examples.** `mixed_examples` is the paper's way, for draft models: at each token X_i of the target's text a guess Y_i is drawn
from the draft model after X_<i, its label is min(1, p(Y_i) / q(Y_i)) there, and the draft model reads a text in which X_i stands
with probability 0.15 (no example) and Y_i otherwise. `observed_examples` decodes with any chain drafter and records for
each guess that was reached whether it was accepted. The baseline without a head is `confidence`, the drafter's own probability of
its guess.

Beyond the paper, and not the default: an *informed* head reads the logarithm of that probability beside the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.draft.core.decode import rounds
from manyheads.draft.core.drafter import Stepwise, residual_blocks
from manyheads.draft.core.growth import Chain
from manyheads.draft.core.rounds import Levels, Nodes
from manyheads.draft.core.target import draw
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.draft_model import DraftModel
from manyheads.draft.training.corpus import Corpus, trunk_states
from manyheads.errors import InputError
from manyheads.evaluation import metrics
from manyheads.progress import Bar
from manyheads.training import Batch, TrainSettings, drawn_rows, fit

LEARNING = TrainSettings(
    steps=600, rows=256, rate=1e-3, warmup=20, decay=0.6, betas=(0.9, 0.999), weight_decay=0.01, precision="fp32"
)


@dataclass(frozen=True)
class AcceptanceExamples:
    """States after reading a guess, the probability that it is accepted, and the drafter's own probability of it."""

    features: Float[Tensor, "N D"]
    accepted: Float[Tensor, "N"]
    confidence: Float[Tensor, "N"] | None = None

    def __len__(self) -> int:
        return len(self.accepted)


class AcceptanceHead(nn.Module):
    """The probability that a guess is accepted if all before it were; for `Chain(stop=...)`."""

    def __init__(self, width: int, blocks: int = 3, informed: bool = False) -> None:
        super().__init__()
        self.informed = informed
        self.blocks = residual_blocks(width + informed, blocks)
        self.classes = nn.Linear(width + informed, 2)

    def forward(self, drafter: Levels, nodes: Nodes, logits: Float[Tensor, "B 1 V"]) -> Float[Tensor, "B"]:
        """P(accepted) of the node that the drafter read last. `InputError` for drafters that keep no states."""
        if drafter.features is None:
            raise InputError(
                f"{drafter.kind} keeps no states after a guess; use `confidence`, or a drafter with features."
            )
        return self.chance(drafter.features[:, 0], confidence(drafter, nodes, logits) if self.informed else None)

    def chance(
        self, features: Float[Tensor, "... D"], confidence: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """P(accepted), in [0, 1]."""
        return self.logits(features, confidence).softmax(-1)[..., 1]

    def logits(
        self, features: Float[Tensor, "... D"], confidence: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "... 2"]:
        """Logits of (rejected, accepted). `InputError` for an informed head without the drafter's probabilities."""
        if self.informed:
            if confidence is None:
                raise InputError("an informed head reads the drafter's own probability of its guess; give it.")
            features = torch.cat([features, confidence.clamp_min(1e-6).log()[..., None].to(features)], -1)
        out: Tensor = self.classes(self.blocks(features))
        return out


def confidence(drafter: Levels, nodes: Nodes, logits: Float[Tensor, "B 1 V"]) -> Float[Tensor, "B"]:
    """The drafter's own probability of its guess: the baseline without training."""
    return logits[:, 0].softmax(-1).gather(1, nodes.tokens[:, :1])[:, 0]


def learn_acceptance(
    examples: AcceptanceExamples,
    *,
    blocks: int = 3,
    weight: float = 6.0,
    informed: bool = False,
    settings: TrainSettings = LEARNING,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> AcceptanceHead:
    """Fit the head. `weight` is w above; `informed` heads need examples with `confidence`.

    With a `folder` an interrupted call resumes. `bar` counts steps.
    """
    if not len(examples):
        raise InputError("there are no examples to learn from; decode more text.")
    torch.manual_seed(settings.seed)
    head = AcceptanceHead(examples.features.shape[1], blocks, informed).to(examples.features.device)
    if informed and examples.confidence is None:
        raise InputError("an informed head reads the drafter's own probability of its guess; these examples have none.")

    def batch_at(number: int) -> Batch:
        some = drawn_rows(len(examples), settings.rows, number, settings.seed)
        batch = {"features": examples.features[some], "accepted": examples.accepted[some]}
        return batch if examples.confidence is None else batch | {"confidence": examples.confidence[some]}

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        logits = head.logits(batch["features"], batch.get("confidence"))
        return acceptance_loss(logits, batch["accepted"], weight)

    fit(head, batch_at, settings, folder, loss=loss, device=examples.features.device, bar=bar)
    return head.eval()


def acceptance_loss(logits: Float[Tensor, "N 2"], accepted: Float[Tensor, "N"], weight: float) -> Float[Tensor, ""]:
    """The weighted cross-entropy above, in nats."""
    log_p = logits.log_softmax(-1)
    rejected = weight * (1 - accepted)
    return -(accepted * log_p[:, 1] + rejected * log_p[:, 0]).sum() / (accepted + rejected).sum()


@torch.inference_mode()
def mixed_examples(
    trunk: DraftTrunk,
    drafter: DraftModel,
    corpus: Corpus,
    *,
    mixing: float = 0.15,
    temperature: float = 1.0,
    seed: int = 0,
) -> AcceptanceExamples:
    """The paper's examples (see above), from texts that the target wrote at this temperature."""
    generator = torch.Generator().manual_seed(seed)
    features, labels, chances = [], [], []
    for ids, counts in zip(corpus.ids.split(16), corpus.counts.split(16), strict=True):
        ids, counts = ids.to(trunk.device), counts.to(trunk.device)
        target = (trunk_states(trunk.model, ids)[1][:, :-1].float() / temperature).softmax(-1)
        own = (trunk_states(drafter.small, ids)[1][:, :-1].float() / temperature).softmax(-1)
        guesses = draw(own.cpu(), generator).to(ids.device)
        label = soft_labels(target, own, guesses)
        true = (torch.rand(guesses.shape, generator=generator) < mixing).to(ids.device)
        mixed = torch.cat([ids[:, :1], ids[:, 1:].where(true, guesses)], 1)
        states = trunk_states(drafter.small, mixed)[0][:, 1:]
        kept = ~true & counts[:, 1:]
        features.append(states[kept])
        labels.append(label[kept])
        chances.append(own.gather(-1, guesses[..., None])[..., 0][kept])
    return AcceptanceExamples(*(torch.cat(part).clone() for part in (features, labels, chances)))


def soft_labels(
    target: Float[Tensor, "B T V"], own: Float[Tensor, "B T V"], guesses: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """min(1, p / q) of each guess: the probability that a guess drawn from q is accepted."""
    at = guesses[..., None]
    return (target.gather(-1, at) / own.gather(-1, at).clamp(min=1e-30)).clamp(max=1.0)[..., 0]


def observed_examples(
    trunk: DraftTrunk,
    drafter: Stepwise,
    prompts: Sequence[Sequence[int]],
    *,
    length: int = 8,
    max_new_tokens: int = 96,
    sample: bool = False,
    **sampling: Any,
) -> AcceptanceExamples:
    """Examples from decoding with chains of this length: 1 for an accepted guess, 0 for the first rejected one.

    The last guess of a chain is never read by the drafter and gives no example.
    """
    features: list[Tensor] = []
    chances: list[Tensor] = []
    read: list[tuple[Tensor, Tensor]] = []

    def watch(drafter: Levels, nodes: Nodes, logits: Tensor) -> Tensor:
        if drafter.features is None:
            raise InputError(f"{drafter.kind} keeps no states after a guess; give a drafter with features.")
        read.append((drafter.features[0, 0].clone(), confidence(drafter, nodes, logits)[0].clone()))
        return torch.ones(1, device=drafter.features.device)

    labels: list[float] = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=trunk.device)
        before = 1
        for number, state in enumerate(
            rounds(
                trunk.model,
                drafter,
                ids,
                growth=Chain(length, sample=sample, stop=watch),
                max_new_tokens=max_new_tokens,
                stop=[],
                trunk=trunk,
                **sampling,
            )
        ):
            written = len(state.tokens[0])
            # The last round is cut at the limit, so that its number of accepted guesses is unknown.
            if number and written < max_new_tokens:
                right = written - before - 1
                for i, (state_after, chance) in enumerate(read[: right + 1]):
                    features.append(state_after)
                    chances.append(chance)
                    labels.append(float(i < right))
            before = written
            read.clear()
    if not features:
        raise InputError("no guess was read by the drafter; give more prompts or longer chains.")
    return AcceptanceExamples(
        torch.stack(features), torch.tensor(labels, device=features[0].device), torch.stack(chances)
    )


def acceptance_auc(chance: Float[Tensor, "N"], accepted: Float[Tensor, "N"]) -> float:
    """How often an accepted guess has the higher chance than a rejected one; ties count half."""
    return metrics.auc(chance.detach().double().cpu().numpy(), (accepted > 0.5).cpu().numpy())
