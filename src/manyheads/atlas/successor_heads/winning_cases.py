"""Winning cases (#4): the tokens for which one head's direct effect counts more than any other head's.

Gould et al., arXiv:2312.09230. At a position whose right next token is y, a head's write is replaced by its mean over the data
set on the path to the logits alone: other heads and all MLPs keep what they wrote; only final norm and unembedding see it.

    effect[l, h] = log p(y) - log p(y | z_lh -> mean z_lh on the direct path)        nats
    a case is won by the head of the largest effect, if that is above 0;    score[l, h] = share of cases it wins    in [0, 1]

Winning is a rank and has no size; the mean effect comes from the same passes. A head that writes much wins whatever is
right, so the share is also given for wrong answers, those of other cases, in `shuffled`. The paper's measure is the loss too; the
final norm is computed anew, as in the paper's ablation, so effects need not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadLike, HeadScores
from manyheads.model.editing.edits import derangement
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor
from manyheads.model.replay.recording import Recording, replay, starting_at
from manyheads.progress import Bar
from manyheads.tasks import Example, Successor, Task, encode

ABOUT = {
    "winning_cases": About(
        name="winning_cases",
        title="Winning cases",
        what="Its direct effect on the right token is larger than any other head's.",
        formula="share of cases in which mean ablation on the direct path hurts the right token most",
        unit="share",
        paper="arXiv:2312.09230",
        threshold=0.2,
    ),
    "direct_effect": About(
        name="direct_effect",
        title="Direct effect",
        what="What it writes raises the right token at the output, with no other head or MLP in between.",
        formula="log p of the right token less log p with the head's write at its mean on the direct path",
        unit="nats",
        paper="arXiv:2312.09230",
        threshold=0.5,
        low=-10.0,
        high=10.0,
    ),
}
ROWS = 16  # of one clean pass
AT_ONCE = 1 << 23  # logits held at a time


@dataclass(frozen=True)
class WinningCases:
    """A case is a position with a right next token. `effects` `[N, L, H]` in nats, `shuffled` the same for other cases' answers.

    `cases` has a row a case: row, position, the last token read, the right one, its clean log-probability, the winner (or "").
    """

    effects: Float[np.ndarray, "N L H"]
    shuffled: Float[np.ndarray, "N L H"]
    cases: pd.DataFrame
    meta: dict[str, dict[str, object]]

    @property
    def scores(self) -> dict[str, HeadScores]:
        """ "winning_cases" (share), "direct_effect" (nats) and "shuffled", the share of cases won for other cases' answers."""
        made = {"winning_cases": _won(self.effects), "direct_effect": self.effects, "shuffled": _won(self.shuffled)}
        return {name: HeadScores.from_examples(name, value, self.meta[name]) for name, value in made.items()}

    def won_by(self, head: HeadLike) -> pd.DataFrame:
        """The cases one head wins, those it decides most first."""
        head = Head.of(head)
        size = self.effects[(slice(None), *head)]
        return self.cases.assign(effect=size)[self.cases["winner"] == str(head)].sort_values("effect", ascending=False)


def winning_cases(
    model: HeadModel,
    *,
    task: Task | Sequence[Example] | None = None,
    n: int = 64,
    seed: int = 0,
    reference: Float[Tensor, "L H Dh"] | None = None,
    bar: Bar = Bar(),
) -> WinningCases:
    """Who wins the answers of a task (default: successors): one case an example, at the prompt's end.

    `reference` is the mean z to put in; by default that of these prompts over all positions. `bar` counts rows.
    """
    task = Successor() if task is None else task
    if model.tokenizer is None:
        raise InputError("winning cases of a task need a tokenizer; open the model with tokenizer=, or give token ids.")
    batch = encode(task, model.tokenizer, n, seed)
    inputs = batch.inputs
    positions = torch.full((len(batch), 1), batch.input_ids.shape[1] - 1)
    name = task.name if isinstance(task, Task) else "given examples"
    return _winning(model, inputs, positions, batch.answer_ids[:, None], reference, seed, name, bar)


def winning_cases_in_text(
    model: HeadModel,
    text: str | Sequence[str] | Int[Tensor, "B T"],
    *,
    answers: Int[Tensor, "B"] | None = None,
    per_row: int = 16,
    seed: int = 0,
    reference: Float[Tensor, "L H Dh"] | None = None,
    bar: Bar = Bar(),
) -> WinningCases:
    """Who wins the next tokens of running text, at up to `per_row` random positions of each row.

    With `answers`, one right token a row, the one case of a row is its end. `text` may be token ids, all rows of one length.
    """
    inputs = model.inputs(text)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if answers is not None:
        if answers.shape != (len(ids),):
            raise InputError(f"answers have shape {list(answers.shape)}; {len(ids)} rows need [{len(ids)}].")
        positions, wanted = torch.full((len(ids), 1), ids.shape[1] - 1), answers[:, None]
    else:
        usable = mask[:, :-1] & mask[:, 1:]
        shortest = int(usable.sum(1).min())
        if shortest < 1 or per_row < 1:
            raise InputError(
                f"every text needs two tokens or more, and per_row 1 or more; got {shortest + 1} and {per_row}."
            )
        draw = torch.rand(usable.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~usable.cpu(), -1)
        positions = draw.topk(min(per_row, shortest), dim=1).indices.sort(1).values
        wanted = ids.cpu().gather(1, positions + 1)
    return _winning(model, inputs, positions, wanted, reference, seed, "text", bar)


def _winning(
    model: HeadModel,
    inputs: dict[str, Tensor],
    positions: Int[Tensor, "B P"],
    wanted: Int[Tensor, "B P"],
    reference: Float[Tensor, "L H Dh"] | None,
    seed: int,
    data: str,
    bar: Bar,
) -> WinningCases:
    ids = inputs["input_ids"]
    if wanted.numel() < 2:
        raise InputError("winning cases need two cases or more: a mean and other cases' answers to compare with.")
    other = wanted.flatten()[derangement(wanted.numel(), seed)].reshape(wanted.shape)
    reference = _mean_z(model, inputs) if reference is None else reference
    asked = torch.stack([wanted, other], -1)  # [B, P, 2]
    effects, clean = [], []
    for start in range(0, len(ids), ROWS):
        rows = slice(start, start + ROWS)
        part = {k: v[rows] if isinstance(v, Tensor) and len(v) == len(ids) else v for k, v in inputs.items()}
        found, log_p = _direct_effects(model, part, positions[rows], asked[rows], reference)
        effects.append(found)
        clean.append(log_p[..., 0])
        bar(len(found))
    both = torch.cat(effects).flatten(0, 1).double().numpy()  # [B P, L, H, 2]
    own, shuffled = both[..., 0], both[..., 1]
    winner = own.reshape(len(own), -1).argmax(-1)
    names = [str(Head(*divmod(int(i), model.n_heads))) for i in winner]
    hurt = own.reshape(len(own), -1).max(-1) > 0
    read = ids.cpu().gather(1, positions)
    cases = pd.DataFrame(
        {
            "row": np.repeat(np.arange(len(ids)), positions.shape[1]),
            "position": positions.flatten().numpy(),
            "read": _words(model, read),
            "right": _words(model, wanted),
            "log_p": torch.cat(clean).flatten().double().numpy(),
            "winner": [name if won else "" for name, won in zip(names, hurt, strict=True)],
        }
    )
    meta: dict[str, dict[str, object]] = {
        name: about.provenance(model, seed, data=data, n=len(own)) for name, about in ABOUT.items()
    }
    meta["shuffled"] = ABOUT["winning_cases"].provenance(model, seed, data=data, n=len(own), answers="shuffled")
    return WinningCases(own, shuffled, cases, meta)


def _direct_effects(
    model: HeadModel,
    inputs: dict[str, Tensor],
    positions: Int[Tensor, "B P"],
    asked: Int[Tensor, "B P A"],
    reference: Float[Tensor, "L H Dh"],
) -> tuple[Float[Tensor, "B P L H A"], Float[Tensor, "B P A"]]:
    """What ablating each head on its direct path costs the asked tokens, and their clean log-probabilities."""
    if model.layout.blocks[0].post_norms is not None:
        name = type(model.plain).__name__
        raise UnsupportedError(f"{name} has no direct paths: it norms the residual stream itself after every layer.")
    recording = model.record(inputs)
    rows = torch.arange(recording.batch)[:, None].expand_as(positions)
    final = first_tensor(recording.outputs[-1])[rows, positions].flatten(0, 1)  # [n, D], n = B P
    asked = asked.flatten(0, 1)

    def log_p(resid: Float[Tensor, "n h D"]) -> Float[Tensor, "n h A"]:
        log_p = _read_out(model, recording, resid.flatten(0, 1)).float().log_softmax(-1)
        wanted = asked.repeat_interleave(resid.shape[1], 0).to(log_p.device)
        return log_p.gather(-1, wanted).unflatten(0, resid.shape[:2]).cpu()

    clean = log_p(final[:, None])
    measured = recording.logits[rows, positions].flatten(0, 1).float().log_softmax(-1).cpu().gather(-1, asked)
    if not torch.allclose(clean[:, 0], measured, rtol=1e-3, atol=1e-2):
        raise UnsupportedError(f"the logits of {type(model.plain).__name__} are not read off its last layer's output.")
    effects = []
    for layer in range(model.n_layers):
        change = _changes(model, layer, recording.z[layer][rows, positions].flatten(0, 1), reference)
        effects.append(clean - log_p(final[:, None] + change.to(final)))
    table = torch.stack(effects, 1)  # [n, L, H, A]
    return table.unflatten(0, positions.shape), clean[:, 0].unflatten(0, positions.shape)


def _changes(
    model: HeadModel, layer: int, z: Float[Tensor, "n H Dh"], reference: Float[Tensor, "L H Dh"]
) -> Float[Tensor, "n H D"]:
    """How the layer's attention write changes when one head's z is at its reference, for each head."""
    block = model.layout.blocks[layer]
    W_O = model.W_O(layer).detach().to(z.device)
    change = torch.einsum("nhd,hde->nhe", reference[layer].to(z) - z, W_O)
    if (
        block.attention_write is not block.projection
    ):  # a norm or a scale comes after the projection, so the change is not linear
        bias = model.bias_O(layer)
        projected = torch.einsum("nhd,hde->ne", z, W_O) + (0 if bias is None else bias.detach())
        with torch.no_grad():
            before, after = block.attention_write(projected), block.attention_write(projected[:, None] + change)
        change = after - before[:, None]
    return change * model.layout.residual_scale


def _read_out(model: HeadModel, recording: Recording, resid: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
    """The logits of final residual streams, by the model's own norm and head: a replay that runs no layer."""
    logits = []
    for part in resid.split(max(1, AT_ONCE // model.vocab_size)):
        last = recording.outputs[-1]
        output = part[:, None] if isinstance(last, Tensor) else (part[:, None], *last[1:])
        ids = torch.zeros(len(part), 1, dtype=torch.long, device=model.device)
        given = replace(recording, inputs={"input_ids": ids}, outputs=[*recording.outputs[:-1], output])
        with starting_at(model.layout, given, model.n_layers):
            logits.append(replay(model.plain, given)[:, 0])
    return torch.cat(logits)


def _mean_z(model: HeadModel, inputs: dict[str, Tensor]) -> Float[Tensor, "L H Dh"]:
    """Mean z over all tokens, a few rows at a time."""
    total, count = torch.zeros(()), 0
    for start in range(0, len(inputs["input_ids"]), ROWS):
        part = {k: v[start : start + ROWS] for k, v in inputs.items()}
        mask = part.get("attention_mask", torch.ones_like(part["input_ids"]))
        tokens = int(mask.sum())
        total = total + model.mean_z(part).cpu() * tokens
        count += tokens
    return total / count


def _won(effects: Float[np.ndarray, "N L H"]) -> Float[np.ndarray, "N L H"]:
    flat = effects.reshape(len(effects), -1)
    won = np.zeros_like(flat)
    won[np.arange(len(flat)), flat.argmax(-1)] = flat.max(-1) > 0
    return won.reshape(effects.shape)


def _words(model: HeadModel, ids: Int[Tensor, "B P"]) -> list[str]:
    flat = [int(i) for i in ids.flatten()]
    return [str(i) for i in flat] if model.tokenizer is None else [model.tokenizer.decode([i]) for i in flat]
