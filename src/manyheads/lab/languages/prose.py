"""n-gram heads hard-wired into a language model of real prose lower its perplexity (#44).

Akyürek et al., arXiv:2401.12973. A stack of n-gram heads (`ngram_layer.py`) stands between two layers of any decoder:

    h <- h + A_n (mean of h over the tokens after earlier matches of the last n tokens) + B_n h        n = 1, 2, 3

Claim: perplexity on held-out text falls for a model that is trained with the heads, at equal steps. Refuted where it does not, or
where heads that match in another row's tokens (as many parameters, no induction) do as well. Texts are the topics of Python's
reference, of which every fifth is held out. The heads can also learn beside a finished decoder's frozen weights.

Departures: models of minutes, not of 340M parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer
from manyheads.lab.ngram_layer import NgramHeads
from manyheads.lab.small_llama import llama_config
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import frozen, leaving
from manyheads.model.opening import open_model
from manyheads.tasks.texts import bundled_prose
from manyheads.training import Batch, TrainSettings, fit, generator_of, next_token_loss

LEARNING = TrainSettings(steps=200, rows=8, rate=3e-3, warmup=10, decay=0.5, precision="fp32")
LENGTH = 128


class ElsewhereHeads(NgramHeads):
    """The control: the same parameters, but each row attends where the tokens of another row match."""

    def forward(self, hidden: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The states after the stack, of which each row's patterns are the row's before."""
        return super().forward(hidden, tokens.roll(1, 0))


class WithNgramHeads(nn.Module):
    """A decoder with a stack of heads after layer `after`; without `heads` it is the decoder itself.

    With `silent` the stack begins as 0, so that a finished model computes what it did.
    """

    def __init__(self, model: HeadModel, heads: NgramHeads | None, *, after: int = 0, silent: bool = False) -> None:
        super().__init__()
        check_integer(after, "after", 0, model.n_layers - 1)
        self.decoder, self.heads = model.module, heads
        self.layer = [model.layout.blocks[after].module]  # in a list, so that its parameters are not counted twice
        if heads is not None and silent:
            for parameter in heads.heads.parameters():
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Int[Tensor, "B T"], **settings: Any) -> Any:
        """What the decoder returns. Padding and a key/value cache are not known here: give whole rows."""
        if self.heads is None:
            return self.decoder(input_ids=input_ids, **settings)
        heads = self.heads
        with leaving(self.layer[0], lambda hidden: heads(hidden, input_ids)):
            return self.decoder(input_ids=input_ids, **settings)


def prose_tokens(model: HeadModel, texts: Sequence[str] | None = None) -> tuple[Int[Tensor, " N"], Int[Tensor, "M T"]]:
    """The tokens of the texts to learn from, joined, and rows of every fifth text, which is held out."""
    if model.tokenizer is None:
        raise InputError("reading text needs a tokenizer; open the model with tokenizer=.")
    texts = bundled_prose() if texts is None else list(texts)
    if len(texts) < 5:
        raise InputError(f"got {len(texts)} texts; give at least 5, of which every fifth is held out.")
    ids = [torch.tensor(model.tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]) for t in texts]
    held = [one for part in ids[4::5] for one in part.split(LENGTH) if len(one) == LENGTH]
    learned = torch.cat([part for i, part in enumerate(ids) if i % 5 != 4])
    if not held or len(learned) <= LENGTH:
        raise InputError(f"the texts hold too few passages of {LENGTH} tokens; give longer ones.")
    return learned, torch.stack(held)


def train_prose(
    model: WithNgramHeads,
    learned: Int[Tensor, " N"],
    settings: TrainSettings = LEARNING,
    *,
    frozen_decoder: bool = False,
) -> None:
    """Train on rows from random places of the tokens. With `frozen_decoder` only the heads learn."""

    def batch_at(number: int) -> Batch:
        starts = torch.randint(len(learned) - LENGTH, (settings.rows,), generator=generator_of(settings.seed, number))
        return {"input_ids": learned[starts[:, None] + torch.arange(LENGTH)]}

    place = next(model.parameters()).device
    if not frozen_decoder:
        fit(model, batch_at, settings, loss=next_token_loss, device=place)
    elif model.heads is not None:
        with frozen(model.decoder):
            fit(model, batch_at, settings, loss=next_token_loss, device=place)


@torch.no_grad()
def prose_perplexity(model: WithNgramHeads, held: Int[Tensor, "M T"]) -> float:
    """The exponential of the mean cross-entropy of held-out tokens, in nats; 16 rows at a time."""
    model.eval()
    losses = [(next_token_loss(model, {"input_ids": rows}), len(rows)) for rows in held.split(16)]
    return math.exp(sum(float(loss) * n for loss, n in losses) / len(held))


def _new_model(seed: int) -> HeadModel:
    """A new Llama of two layers that reads ladon's tokens."""
    ladon = open_model()
    config = llama_config(
        ladon.vocab_size, 96, 2, 4, intermediate_size=256, max_position_embeddings=LENGTH, tie_word_embeddings=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_model(LlamaForCausalLM(config), tokenizer=ladon.tokenizer)


def _tried(kind: type[NgramHeads] | None) -> Any:
    def run(steps: int, seed: int) -> dict[str, float]:
        model = _new_model(seed)
        learned, held = prose_tokens(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = None if kind is None else kind(model.layout.hidden_size)
        built = WithNgramHeads(model, heads)
        train_prose(built, learned, replace(LEARNING, steps=steps, seed=seed))
        return {"perplexity": prose_perplexity(built, held)}

    return run


register_experiment(
    Experiment(
        "ngram-prose",
        (44,),
        "2401.12973",
        "Do n-gram heads, built in, lower the perplexity of real prose?",
        datasets=lambda quick: {"from scratch": 40 if quick else 200},
        methods={"plain": _tried(None), "n-gram heads": _tried(NgramHeads), "elsewhere": _tried(ElsewhereHeads)},
        baseline="plain",
        claims=(
            Claim(
                "n-gram heads lower perplexity by 5 %",
                lambda v: v["n-gram heads", "perplexity"] / v["plain", "perplexity"],
                at_most=0.95,
            ),
            Claim(
                "and below that of heads that match elsewhere",
                lambda v: v["n-gram heads", "perplexity"] / v["elsewhere", "perplexity"],
                at_most=0.95,
            ),
        ),
        minutes=4,
        lower=frozenset({"perplexity"}),
        room="lab",
    )
)
