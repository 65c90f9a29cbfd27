"""LABOR-LLM (#68): a career written as text, and the next job's probability read off a language head.

Athey et al., arXiv:2406.17972. A history is a resume, a line a year; every title that there may be is scored as text, with the
line's end behind it, after the resume so far:

    P(title | history) = product over the tokens w_j of title + end of P(w_j | history, w_1 .. w_(j-1))

With the end, no title is the beginning of another, so these sum to at most 1 over any list; divided by their sum they are a
distribution over the list. Both are given. The resume is read once, and its keys and values serve all titles. The model was
tuned on resumes before, by the next-token loss of all text; it may be a small one with tokens of its own (`language_of`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_integer
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.progress import Bar
from manyheads.training import TrainSettings, fit, generator_of
from manyheads.training.batches import on_device

END = "\n"
FROM_NOTHING = TrainSettings(
    steps=4000, rows=32, rate=2e-3, warmup=50, decay=0.6, weight_decay=0.1, every=500, precision="fp32"
)
TUNING = TrainSettings(steps=400, rows=16, rate=5e-4, warmup=20, decay=0.5, weight_decay=0.01, precision="fp32")


@dataclass(frozen=True)
class TitleScores:
    """Log-probability in nats of each of K titles after each of N histories. `titles` are in the order of the columns."""

    titles: tuple[str, ...]
    log_p: Float[Tensor, "N K"]

    @property
    def renormalised(self) -> Float[Tensor, "N K"]:
        """Log-probabilities over the list of titles alone."""
        return self.log_p.log_softmax(-1)

    def perplexity(self, chosen: Sequence[str], *, renormalised: bool = False) -> float:
        """Exp of the mean of -log p of the title that came next, one for each history."""
        where = torch.tensor([self.titles.index(title) for title in chosen])
        log_p = self.renormalised if renormalised else self.log_p
        return float(log_p.gather(1, where[:, None]).mean().neg().exp())


@torch.no_grad()
def title_scores(
    model: HeadModel, histories: Sequence[str], titles: Sequence[str], *, end: str = END, bar: Bar = Bar()
) -> TitleScores:
    """Score every title after every history (formula above). A history ends where a title begins: "... 2011:", " nurse".

    `InputError` where a title with its end begins another, or where the tokenizer joins the history's end with a title's
    beginning; `UnsupportedError` for models that do not write text from left to right.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not model.is_causal:
        raise UnsupportedError("titles are scored by a causal model with a tokenizer; give one.")
    if not titles or len(set(titles)) < len(titles) or not histories:
        raise InputError(f"there are {len(histories)} histories and {len(titles)} titles; give some, each title once.")
    out = torch.empty(len(histories), len(titles), dtype=torch.double)
    done = bar.step("scoring histories", len(histories))
    for i, history in enumerate(histories):
        prefix, rest = _split(tokenizer, history, [title + end for title in titles])
        out[i] = _after(model, prefix, rest)
        done(1)
    return TitleScores(tuple(titles), out)


def _split(tokenizer: Any, history: str, endings: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The tokens of the history, and of each ending after it."""
    prefix = tokenizer(history)["input_ids"]
    rest = []
    for ending in endings:
        whole = tokenizer(history + ending)["input_ids"]
        if whole[: len(prefix)] != prefix:
            raise InputError(
                f"the tokenizer joins {history[-8:]!r} with {ending[:8]!r}; end histories before a space, not behind."
            )
        rest.append(whole[len(prefix) :])
    ordered = sorted(map(tuple, rest))
    for one, other in pairwise(ordered):
        if other[: len(one)] == one:
            short, long = (tokenizer.decode(tokens) for tokens in (one, other))
            raise InputError(f"{short!r} is the beginning of {long!r}; give an end that no title has.")
    return prefix, rest


def _after(model: HeadModel, prefix: list[int], rest: list[list[int]]) -> Float[Tensor, "K"]:
    """Log P of each continuation: one pass over the prefix, and one over all continuations beside each other."""
    plain, device = model.plain, model.device
    first = plain(input_ids=torch.tensor([prefix], device=device), use_cache=True)
    past = copy.deepcopy(first.past_key_values)
    past.batch_repeat_interleave(len(rest))
    width = max(map(len, rest))
    ids = torch.tensor([tokens + [tokens[-1]] * (width - len(tokens)) for tokens in rest], device=device)
    last = first.logits[:, -1:].expand(len(rest), 1, -1)
    logits = last if width == 1 else torch.cat([last, plain(input_ids=ids[:, :-1], past_key_values=past).logits], 1)
    log_p = logits.double().log_softmax(-1).gather(2, ids[..., None])[..., 0].cpu()
    real = torch.arange(width) < torch.tensor([len(tokens) for tokens in rest])[:, None]
    return (log_p * real).sum(1)


def resumes(
    frame: pd.DataFrame,
    *,
    person: str = "person",
    year: str = "year",
    title: str = "title",
    covariates: Sequence[str] = (),
) -> dict[Any, str]:
    """Each person's career as text: a line of covariates (their first values), then a line a year, "2011: nurse".

    `InputError` for columns that are not there, titles with a line's end in them, or two titles of one person in a year.
    """
    if missing := [name for name in (person, year, title, *covariates) if name not in frame]:
        raise InputError(f"the frame has no column {missing[0]!r}, only {', '.join(map(str, frame.columns))}.")
    if frame[title].astype(str).str.contains(END).any():
        raise InputError("a title holds the end of a line; replace it.")
    if frame.duplicated([person, year]).any():
        raise InputError("somebody has two titles in one year; keep one of them.")
    found = {}
    for who, own in frame.sort_values(year).groupby(person, sort=False):
        about = ", ".join(f"{name} {own[name].iloc[0]}" for name in covariates)
        lines = [f"{when}: {what}" for when, what in zip(own[year], own[title], strict=True)]
        found[who] = "\n".join([*([about] if about else []), *lines]) + END
    return found


def tune_on_texts(
    model: HeadModel,
    texts: Sequence[str],
    settings: TrainSettings = TUNING,
    folder: str | Path | None = None,
    *,
    held_out: Sequence[str] = (),
    bar: Bar = Bar(),
) -> HeadModel:
    """A copy of the model, tuned on whole texts by the next-token loss (mean over real tokens); the model stays as it is.

    With texts `held_out` the state counts whose loss on them is lowest, looked at every `settings.every` steps.
    """
    if not texts:
        raise InputError("there are no texts; give at least one.")
    module: Any = copy.deepcopy(model.plain)
    rows = [model.tokenizer(text)["input_ids"] for text in texts]

    def padded(some: Sequence[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, some))
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in some])
        real = torch.arange(width) < torch.tensor([len(row) for row in some])[:, None]
        return {"input_ids": ids, "weights": real.float()}

    def batch(number: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(rows), (settings.rows,), generator=generator_of(settings.seed, number)).tolist()
        return padded([rows[i] for i in chosen])

    def loss(learning: Any, given: Mapping[str, Tensor]) -> Tensor:
        # Padding stands on the right, where a causal model does not see it.
        logits = learning(input_ids=given["input_ids"], use_cache=False).logits[:, :-1].float()
        log_p = logits.log_softmax(-1).gather(2, given["input_ids"][:, 1:, None])[..., 0]
        weights = given["weights"][:, 1:]
        return -(log_p * weights).sum() / weights.sum()

    judged = padded([model.tokenizer(text)["input_ids"] for text in held_out]) if held_out else None
    judge = None if judged is None else lambda: float(loss(module, on_device(judged, next(module.parameters()).device)))
    fit(module, batch, settings, folder, loss=loss, judge=judge, bar=bar)
    return open_model(module.eval(), tokenizer=model.tokenizer)


def language_of(
    texts: Sequence[str], *, layers: int = 2, width: int = 128, vocabulary: int = 512, seed: int = 0
) -> HeadModel:
    """A small Llama that knows nothing yet, with at most `vocabulary` tokens (byte pairs) that were found in the texts.

    Resumes have few words: most are one token, so that a resume has half as many tokens, and a step costs a small part. Train it
    by `tune_on_texts` (`FROM_NOTHING`). Heads are 32 wide.
    """
    if not texts:
        raise InputError("there are no texts; give at least one.")
    if check_integer(width, "width", 32) % 32:
        raise InputError(f"width is {width}; give a multiple of 32.")
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # so that any text can be written
    pairs.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs)
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=max(256, 2 * longest), tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config)
    return open_model(module.eval(), tokenizer=tokenizer)
