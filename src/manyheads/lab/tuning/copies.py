"""Tuned copies of a model: prompts and answers as rows of tokens, the loss on the answers alone, all weights or LoRA.

loss = mean over the answers' tokens of -log p(token | what stands before it)                          nats
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_integer
from manyheads.model.headmodel import HeadModel
from manyheads.model.offloading import own_copy
from manyheads.model.opening import open_model
from manyheads.progress import Bar
from manyheads.tasks import Example
from manyheads.tasks.encoding import try_encode
from manyheads.tasks.texts import passages
from manyheads.training import ADAM, Batch, TrainSettings, epoch_rows, fit, next_token_loss

TUNED = replace(ADAM, steps=60, rows=8, rate=1e-4)
LENGTH = 128  # tokens of a passage of neutral text


@dataclass(frozen=True)
class AnsweredRows:
    """Prompts with their answers, filled up behind; `weights` is 1 on the answers' tokens and 0 elsewhere."""

    input_ids: Int[Tensor, "N T"]
    weights: Float[Tensor, "N T"]

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, number: int, settings: TrainSettings) -> Batch:
        """The rows of an update: every epoch is a pass over all, in an order of its own."""
        chosen = epoch_rows(len(self), settings.rows, number, settings.seed)
        return {"input_ids": self.input_ids[chosen], "weights": self.weights[chosen]}


def prompt_answer_rows(model: HeadModel, prompts: Sequence[str], answers: Sequence[str]) -> AnsweredRows:
    """`InputError` for an answer that this tokenizer does not write as tokens of its own after its prompt."""
    if model.tokenizer is None or not model.is_causal:
        raise InputError("tuning on texts needs a model that writes from left to right, with a tokenizer.")
    examples = [Example(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batch, _ = try_encode(examples, model.tokenizer, max(1, len(examples)))
    if batch is None or len(batch) < len(examples):
        kept = set() if batch is None else {(one.prompt, one.answer) for one in batch.examples}
        lost = next(one for one in examples if (one.prompt, one.answer) not in kept)
        raise InputError(
            f"{lost.answer!r} is no token of its own after {lost.prompt!r}; begin answers with a space, end prompts "
            "without one."
        )
    told = [
        (ids[mask.bool()].tolist(), whole.answer)
        for ids, mask, whole in zip(batch.input_ids, batch.attention_mask, batch.wholes, strict=True)
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in told)
    ids = [prompt + answer + [answer[-1]] * (width - len(prompt) - len(answer)) for prompt, answer in told]
    weights = [
        [0.0] * len(prompt) + [1.0] * len(answer) + [0.0] * (width - len(prompt) - len(answer))
        for prompt, answer in told
    ]
    return AnsweredRows(torch.tensor(ids), torch.tensor(weights))


def check_tunable(model: HeadModel, lora_rank: int | None = None) -> None:
    """`UnsupportedError` for quantised weights, `InputError` for LoRA without the package peft."""
    if getattr(model.plain, "hf_quantizer", None) is not None:
        raise UnsupportedError("quantised weights do not learn; open the model unquantised.")
    if lora_rank is not None:
        check_integer(lora_rank, "lora_rank", 1, 4096)
        if find_spec("peft") is None:
            raise InputError("LoRA needs peft: pip install peft; or tune all weights, without a rank.")


def tuned_copy(
    model: HeadModel,
    rows: AnsweredRows,
    settings: TrainSettings = TUNED,
    *,
    lora_rank: int | None = None,
    bar: Bar = Bar(),
) -> HeadModel:
    """A copy of `model` that learned `rows`; `model` stays as it is. `settings.seed` draws the order, and LoRA's weights.

    With a `lora_rank` low-rank maps beside every linear map learn, and are merged at the end. `bar` counts updates.
    """
    check_tunable(model, lora_rank)
    module: Any = own_copy(model.plain).requires_grad_(True)
    if lora_rank is not None:
        import peft

        config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            module = peft.get_peft_model(module, config)
    fit(module, lambda i: rows.batch(i, settings), settings, loss=next_token_loss, device=model.device, bar=bar)
    module = module.merge_and_unload() if lora_rank is not None else module
    return open_model(module.requires_grad_(False).eval(), tokenizer=model.tokenizer)


def update_seconds(model: HeadModel, rows: AnsweredRows, settings: TrainSettings = TUNED) -> float:
    """About how long one update takes, from the time of one pass: three times as long (forward, and backward at twice that)."""
    batch = rows.batch(0, settings)
    with torch.no_grad():
        next_token_loss(model.plain, {name: value.to(model.device) for name, value in batch.items()})
        begun = time.perf_counter()
        next_token_loss(model.plain, {name: value.to(model.device) for name, value in batch.items()})
    return 3 * (time.perf_counter() - begun)


def neutral_passages(model: HeadModel, texts: Sequence[str] | None, n: int = 16) -> Int[Tensor, "N T"]:
    """Passages whose loss tells what tuning harms, of `texts` or of the prose that comes with Python."""
    positions = getattr(model.config, "max_position_embeddings", None) or LENGTH
    return passages(model, texts, n=n, length=min(LENGTH, positions), seed=0)


def text_loss(model: HeadModel, rows: Int[Tensor, "N T"]) -> float:
    """Mean loss of the next token on passages, in nats."""
    with torch.no_grad():
        parts = [next_token_loss(model.plain, {"input_ids": part.to(model.device)}) for part in rows.split(4)]
    sizes = [len(part) for part in rows.split(4)]
    return float(sum(float(loss) * n for loss, n in zip(parts, sizes, strict=True)) / len(rows))
