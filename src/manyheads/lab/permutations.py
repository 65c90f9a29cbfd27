"""A small model that learns a permutation from its prompt: a toy to test in-context methods on.

Four fixed random permutations map 16 input tokens to 16 output tokens. A prompt shows one of them,

    BOS (x cue y) * shots, x cue          x distinct, y = permutation(x), the answer comes next

and the model is trained from scratch on the tokens after every cue. It is a pre-norm GPT-2 without positions (3 layers,
8 heads, width 64): the demonstrations are a set. Without the cue between x and y a model this small forms no task vector
(it looks up y directly), which is why the cue is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from manyheads.errors import InputError
from manyheads.training import Batch, TrainSettings, fit

SYMBOLS = 16
TASKS = 4
BOS, CUE, VOCABULARY = 2 * SYMBOLS, 2 * SYMBOLS + 1, 2 * SYMBOLS + 2  # inputs are 0..15, outputs 16..31
SHOTS = 5


@dataclass(frozen=True)
class Shots:
    """Prompts of one length. `answers` follow `tokens`; `tasks` are the numbers of the permutations shown."""

    tokens: Int[Tensor, "B T"]
    answers: Int[Tensor, "B"]
    tasks: Int[Tensor, "B"]


def tables(seed: int = 0) -> Int[np.ndarray, "4 16"]:
    """The permutations: `tables[task, x]` is the output token of x."""
    rng = np.random.default_rng((seed, 0))
    return SYMBOLS + np.stack([rng.permutation(SYMBOLS) for _ in range(TASKS)])


def permutation_prompts(
    n: int,
    *,
    shots: int = SHOTS,
    task: int | None = None,
    random_labels: bool = False,
    table_seed: int = 0,
    seed: int = 0,
) -> Shots:
    """`n` prompts with `shots` demonstrations of permutation `task` (None: a random one each).

    With `random_labels` each demonstration's output is a random one of the 16, so that the prompt holds no information
    on the permutation; answers stay. `InputError` for more demonstrations than other inputs, or an unknown task.
    """
    if not 0 <= shots < SYMBOLS or (task is not None and not 0 <= task < TASKS):
        raise InputError(
            f"got {shots} shots and task {task}; give shots from 0 to {SYMBOLS - 1} and tasks from 0 to {TASKS - 1}."
        )
    rng = np.random.default_rng((seed, 1))
    tasks = rng.integers(TASKS, size=n) if task is None else np.full(n, task)
    x = rng.permuted(np.tile(np.arange(SYMBOLS), (n, 1)), axis=1)[:, : shots + 1]
    y = np.take_along_axis(tables(table_seed)[tasks], x, 1)
    shown = rng.integers(SYMBOLS, BOS, size=(n, shots)) if random_labels else y[:, :-1]
    demonstrations = np.stack([x[:, :-1], np.full_like(shown, CUE), shown], -1).reshape(n, -1)
    ends = np.full((n, 1), BOS), demonstrations, x[:, -1:], np.full((n, 1), CUE)
    tokens = torch.from_numpy(np.concatenate(ends, 1))
    return Shots(tokens, torch.from_numpy(y[:, -1]), torch.from_numpy(tasks))


def permutation_model(*, steps: int = 1500, table_seed: int = 0, seed: int = 0) -> GPT2LMHeadModel:
    """Train the toy (about a minute on one core): AdamW at 1e-3, 64 prompts a step, cross-entropy at the cues."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_layer=3,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    positions = model.transformer.wpe.weight
    nn.init.zeros_(positions)
    positions.requires_grad_(False)

    def batch_at(number: int) -> Batch:
        given = permutation_prompts(64, table_seed=table_seed, seed=1 + seed + 100_000 * (number + 1))
        return {"input_ids": torch.cat([given.tokens, given.answers[:, None]], 1)}

    settings = TrainSettings(steps=steps, rate=1e-3, warmup=100, weight_decay=0.01, precision="fp32", seed=seed)
    fit(model, batch_at, settings, loss=_loss_at_cues, device="cpu")
    return model.eval()


def _loss_at_cues(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    cues = ids[:, :-1] == CUE
    return F.cross_entropy(logits[cues], ids[:, 1:][cues])
