"""A small model that learns multiple-choice questions, where it is known which heads can find the right letter (#12).

Prompts ask which of four options is of a category; the answer is the label of its line. Labels are drawn anew for each prompt,
4 of 16, so the answer must be read off the prompt:

    label last     <bos> ask  c A  c B  c C  c D  end
    label first    <bos> ask  A c  B c  C c  D c  end

Of the upper layer only the heads `alive` write anything: the output slices of the others are zero throughout training, so their
queries and keys get no gradient and stay as they were drawn. Whatever finds the right letter at the end is among `alive`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from manyheads.errors import InputError
from manyheads.lab.small_llama import llama_config
from manyheads.progress import Bar
from manyheads.tasks import Example, TaskBatch
from manyheads.training import TrainSettings, fit

Layout = Literal["label last", "label first"]
CATEGORIES, EACH, LABELS, LINES = 6, 3, 16, 4
WIDTH, HEADS = 64, 4
BOS, ASK, FIRST_LABEL = 0, 1, 1 + CATEGORIES
FIRST_OPTION = FIRST_LABEL + LABELS
END = FIRST_OPTION + CATEGORIES * EACH
VOCABULARY = END + 1

SETTINGS = TrainSettings(steps=600, rows=128, rate=3e-3, warmup=50, decay=0.3, weight_decay=0.01, precision="fp32")


def choice_prompts(
    n: int, seed: int = 0, layout: Layout = "label last"
) -> tuple[TaskBatch, Int[Tensor, "N 4"], Int[Tensor, "N"]]:
    """`n` prompts with the spans `label0`, `option0`, ..., the labels of their lines, and which line is right (in turn)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(n)
    right = rows % LINES
    kinds = torch.rand(n, CATEGORIES, generator=generator).argsort(1)[:, :LINES]
    options = FIRST_OPTION + EACH * kinds + torch.randint(EACH, (n, LINES), generator=generator)
    labels = FIRST_LABEL + torch.rand(n, LABELS, generator=generator).argsort(1)[:, :LINES]
    lines = torch.stack([options, labels] if layout == "label last" else [labels, options], 2).flatten(1)
    ask = ASK + kinds[rows, right]
    ids = torch.cat([torch.full((n, 1), BOS), ask[:, None], lines, torch.full((n, 1), END)], 1)
    first = {"label": 2 + (layout == "label last"), "option": 2 + (layout == "label first")}
    answers = labels[rows, right]
    missing = torch.full((n,), -1)
    batch = TaskBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        answer_ids=answers,
        foil_ids=missing,
        corrupted_ids=None,
        corrupted_mask=None,
        corrupted_answer_ids=missing,
        spans={
            f"{name}{k}": torch.tensor([[start + 2 * k, start + 2 * k + 1]]).expand(n, 2)
            for name, start in first.items()
            for k in range(LINES)
        },
        accepted_ids=[[answer] for answer in answers.tolist()],
        examples=[Example("", "")] * n,
        dropped={},
    )
    return batch, labels, right


def choosing_model(
    alive: Iterable[int] = range(HEADS),
    seed: int = 0,
    layout: Layout = "label last",
    *,
    layers: int = 2,
    settings: TrainSettings = SETTINGS,
    bar: Bar = Bar(),
) -> LlamaForCausalLM:
    """A Llama of `layers` layers of 4 heads, trained on them (10 s of one core). Only heads `alive` of the last layer write.

    `bar` counts steps. `InputError` if no head is alive, or one is not there.
    """
    dead = sorted(set(range(HEADS)) - set(alive))
    if not set(alive) or not set(alive) <= set(range(HEADS)):
        raise InputError(f"alive is {sorted(alive)}; give one or more of the heads 0 to {HEADS - 1}.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            llama_config(VOCABULARY, WIDTH, layers, HEADS, intermediate_size=64, max_position_embeddings=16)
        )
    writes = model.model.layers[-1].self_attn.o_proj.weight

    def silence(*_: object) -> None:
        with torch.no_grad():
            writes.unflatten(1, (HEADS, -1))[:, dead] = 0.0

    def loss(module: nn.Module, number: Tensor) -> Tensor:
        batch, _, _ = choice_prompts(settings.rows, 1_000_003 * (seed + 1) + int(number), layout)
        logits = module(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return functional.cross_entropy(logits, batch.answer_ids)

    silence()
    fit(model, torch.tensor, settings, loss=loss, after_step=silence, device="cpu", bar=bar)
    return model.eval().requires_grad_(False)
