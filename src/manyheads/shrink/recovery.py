"""Recovery: train a pruned or converted model on plain text for a stated number of tokens, by LoRA or in full.

What is learned minimises, in nats a token, the cross-entropy of next tokens or, with a teacher (Hinton et al., arXiv:1503.02531),

    KL = mean over tokens of  sum_v p_v (log p_v - log q_v)        p [B, T, V] the teacher's probabilities, q the model's

The model from which it was made is the natural teacher: a text has one next token, and the teacher says how likely each is.

With LoRA (Hu et al., arXiv:2106.09685) every linear map W of the layers becomes W + (alpha / r) B A, with A [r, F_in],
B [F_out, r] and alpha = 2 r; B begins at zero, so training begins at the model as it is. Afterwards the product is merged, and
the result is a checkpoint of the same form. The state in which the same loss is lowest on held-out passages counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_integer, check_seed
from manyheads.model.headmodel import HeadModel
from manyheads.model.linear import features_of
from manyheads.model.offloading import own_copy
from manyheads.model.opened import OpenedModel
from manyheads.model.opening import open_model
from manyheads.model.weights.copies import settled
from manyheads.progress import Bar
from manyheads.tasks.texts import passages
from manyheads.training import Batch, TrainSettings, epoch_rows, fit
from manyheads.training.loop import next_token_loss

LORA = TrainSettings(rows=8, rate=3e-4, warmup=10, weight_decay=0.0, betas=(0.9, 0.999), precision="fp32")
FULL = replace(LORA, rate=5e-5)
_HELD_OUT = 32  # passages at most
_JUDGED = 10  # times a run


@dataclass(frozen=True)
class Recovery:
    """What a run did: tokens read, parameters trained, and the loss of next tokens on held-out text before and after, in nats."""

    tokens: int
    trained: int
    loss_before: float
    loss_after: float
    minutes: float


def recover(
    model: HeadModel,
    texts: Sequence[str] | Int[Tensor, "N T"] | None = None,
    tokens: int = 1_000_000,
    *,
    teacher: HeadModel | None = None,
    lora_rank: int | None = 8,
    length: int = 256,
    settings: TrainSettings | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> tuple[HeadModel, Recovery]:
    """A copy of `model` trained on `tokens` tokens of `texts`, and the record of it; the model itself stays as it is.

    With a `teacher` the model learns to predict what the teacher predicts (formula above), and not the texts themselves.
    `texts` (None: the prose that comes with Python) are cut into passages of `length` tokens and read again where they do not
    suffice; token ids are passages already. A tenth of them is held out, 32 at most, and few where `tokens` are few. `lora_rank`
    None trains every weight. `settings` (`LORA`, `FULL`) give rate and rows; their steps follow from `tokens`. With a `folder`
    the same call goes on where it stopped. `InputError` where the texts are too short for two passages, for a teacher with other
    tokens, or without the package `peft` if LoRA is asked for; `UnsupportedError` for a quantised model.
    """
    check_integer(tokens, "tokens", 1)
    check_integer(length, "length", 2)
    check_seed(seed)
    if lora_rank is not None:
        check_integer(lora_rank, "lora_rank", 1)
        if find_spec("peft") is None:
            raise InputError("LoRA needs peft: pip install peft; or pass lora_rank=None to train every weight.")
    if getattr(model.plain, "hf_quantizer", None) is not None:
        raise UnsupportedError(
            f"{type(model.plain).__name__} is quantised, and its weights do not learn; open it unquantised."
        )
    if teacher is not None and teacher.vocab_size != model.vocab_size:
        raise InputError(
            f"the teacher knows {teacher.vocab_size} tokens and the model {model.vocab_size}; they must be the same."
        )
    rows, held_out = _passages(model, texts, length, seed, max(4, tokens // (_JUDGED * length)))
    settings = settings or (FULL if lora_rank is None else LORA)
    steps = max(1, round(tokens / (settings.rows * rows.shape[1])))
    settings = replace(settings, steps=steps, every=settings.every or max(1, steps // _JUDGED), seed=seed)
    base = settled(model)
    part = _Learning.of(base, lora_rank, seed)
    whole = part.whole

    def batch(i: int) -> dict[str, Tensor]:
        return {"input_ids": rows[epoch_rows(len(rows), settings.rows, i, seed)]}

    def judged(module: nn.Module, by: HeadModel | None = None) -> float:
        return _loss(module, by, held_out, model.device)

    before = judged(base.plain)
    progress = fit(
        part,
        batch,
        settings,
        folder,
        loss=lambda _, given: _objective(whole, teacher, given),
        judge=lambda: judged(whole, teacher),
        device=model.device,
        bar=bar,
    )
    trained = sum(parameter.numel() for parameter in part.parameters())
    done = open_model(part.merged(), tokenizer=model.tokenizer)
    record = Recovery(progress.tokens, trained, before, judged(done.plain), progress.minutes)
    return done, record


def _objective(whole: nn.Module, teacher: HeadModel | None, batch: Batch) -> Float[Tensor, ""]:
    """What a step of recovery lowers: the loss of next tokens, or the divergence from the teacher."""
    if teacher is None:
        return next_token_loss(whole, batch)
    ids: Int[Tensor, "B T"] = batch["input_ids"]
    made: Tensor = whole(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with torch.no_grad():
        plain: Any = teacher.plain
        wanted: Tensor = plain(input_ids=ids.to(teacher.device), use_cache=False).logits.float().log_softmax(-1)
    # The sum over the vocabulary, divided by tokens: "batchmean" would divide by rows.
    return F.kl_div(made, wanted.to(made.device), reduction="sum", log_target=True) / ids.numel()


class _Learning(nn.Module):
    """The parameters of a model that learn, and nothing else, so that a saved state is no larger than they are."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self._whole = (whole,)
        self.learned = nn.ParameterList([p for p in whole.parameters() if p.requires_grad])

    @classmethod
    def of(cls, base: OpenedModel, lora_rank: int | None, seed: int) -> _Learning:
        module: Any = own_copy(base.plain)
        if lora_rank is None:
            return cls(module.requires_grad_(True))
        import peft

        maps = list(linear_maps(base))
        config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.05, target_modules=maps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(peft.get_peft_model(module, config))

    @property
    def whole(self) -> Any:
        """The model they are of."""
        return self._whole[0]

    def train(self, mode: bool = True) -> _Learning:
        """Of the whole model too, for its dropout."""
        self.whole.train(mode)
        return super().train(mode)

    def merged(self) -> Any:
        """The model with what was learned in its own weights, frozen as a model that is opened."""
        whole = self.whole.merge_and_unload() if hasattr(self.whole, "merge_and_unload") else self.whole
        return whole.requires_grad_(True).eval()


def linear_maps(model: OpenedModel) -> dict[str, nn.Module]:
    """Every linear map of the layers, by its path in the module."""
    names = {part: name for name, part in model.plain.named_modules()}
    parts = (part for block in model.layout.blocks for part in block.module.modules())
    return {names[part]: part for part in parts if features_of(part) is not None}


def in_pieces(texts: Sequence[str] | None, length: int) -> list[str] | None:
    """Long texts in pieces of some passages of `length` tokens: `passages` draws a few of each text."""
    size = 16 * length
    return None if texts is None else [text[at : at + size] for text in texts for at in range(0, len(text), size)]


def _passages(
    model: HeadModel, texts: Sequence[str] | Int[Tensor, "N T"] | None, length: int, seed: int, most: int
) -> tuple[Int[Tensor, "A T"], Int[Tensor, "B T"]]:
    """Passages to learn from, and those held out, at most so many: to judge should not cost more than to learn."""
    rows = texts
    if not isinstance(rows, Tensor):
        rows = passages(model, in_pieces(rows, length), n=10**9, length=length, seed=seed)
    n = min(most, _HELD_OUT, max(1, len(rows) // 10))
    if len(rows) <= n:
        raise InputError(f"the texts hold {len(rows)} passage of {length} tokens, and one is held out; give more text.")
    return rows[n:], rows[:n]


@torch.no_grad()
def _loss(module: nn.Module, teacher: HeadModel | None, rows: Int[Tensor, "N T"], device: torch.device) -> float:
    """The mean of `_objective` over these passages."""
    return float(torch.stack([_objective(module, teacher, {"input_ids": row[None].to(device)}) for row in rows]).mean())
