"""What arithmetic heads and MLPs look at (#14, step 5): the last position's attention by span, and the MLPs' tokens.

Zhang et al., arXiv:2409.01659. With p the pattern's last row, r_w the direction that raises token w's logit (its unembedding
times the final norm's gain), m the residual stream that enters an MLP and o what the MLP adds,

    share[span][l, h] = mean over prompts of the sum of p over the span's columns        in [0, 1]; shares and the rest sum to 1
    cosine[l](x, w)   = mean over prompts of <x, r_w> / (|x| |r_w|),    x = m or o       in [-1, 1]

for w = A, B (operands; mean over their tokens) and C (the answer). All number tokens have much in common, so beside each cosine
stands the same with the tokens of another prompt: only what exceeds that is about this number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.circuits.arithmetic import PAPER, arithmetic_batch, inside
from manyheads.atlas.core.answered import AnyTask
from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.last_position import LastState
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadScores
from manyheads.model.editing.edits import derangement
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Reader
from manyheads.model.weights.ov import readout
from manyheads.tasks import TaskBatch

REST = "other"


class LastRowShares(Reader):
    """Keeps the newest query's attention summed over K sets of columns: `shares[l]` `[B, H, K]`."""

    site = "attention"

    def __init__(self, columns: Float[Tensor, "K B T"]) -> None:
        self.columns = columns
        self.shares: list[Tensor] = []

    def read(self, call: AttentionCall) -> None:
        """Look at the newest query's row only."""
        row = call.pattern_rows(slice(-1, None))[:, :, 0].float().cpu()
        columns = self.columns[..., call.first_column :]
        self.shares.append(torch.einsum("bhs,kbs->bhk", row, columns))


def attention_shares(
    model: HeadModel,
    *,
    task: AnyTask | None = None,
    spans: Sequence[str] = ("a", "operator", "b"),
    n: int = 64,
    seed: int = 0,
) -> dict[str, HeadScores]:
    """What share of its attention at the last position each head gives to each of `spans` and to the rest ("other").

    `meta["uniform"]` is the share that even attention would give.
    """
    batch = _batch(model, task, spans, n, seed)
    kept: list[Tensor] = []
    for rows in batch.chunks():
        masks = [inside(rows, name) for name in spans]
        reader = LastRowShares(torch.stack(masks).float())
        model.read(rows.inputs, reader, keep=1)
        kept.append(torch.stack(reader.shares, 1))
    shares = torch.cat(kept)  # [N, L, H, K]
    per_span = {name: shares[..., k] for k, name in enumerate(spans)} | {REST: 1 - shares.sum(-1)}
    lengths = {name: inside(batch, name).sum(1) / batch.attention_mask.sum(1) for name in spans}
    lengths[REST] = 1 - torch.stack(list(lengths.values())).sum(0)
    return {
        name: HeadScores.from_examples(
            f"attention_to_{name}",
            np.asarray(values),
            _about(name).provenance(model, seed, n=n) | {"uniform": float(lengths[name].mean())},
        )
        for name, values in per_span.items()
    }


def mlp_reading(
    model: HeadModel,
    *,
    task: AnyTask | None = None,
    operands: Sequence[str] = ("a", "b"),
    n: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosines of each MLP's input and write with the operands' and the answer's unembedding (formula above).

    A row for each layer, `side` ("in", "out") and `word` (operands, "answer"): `cosine`, and `shuffled`, with another prompt's.
    """
    if model.layout.blocks[0].post_norms is not None:
        raise UnsupportedError(
            f"{type(model.plain).__name__} norms its residual stream after each addition; use another."
        )
    batch = _batch(model, task, operands, n, seed)
    if len(batch) < 2:
        raise InputError("the MLPs' reading compares prompts with each other; give two or more.")
    sides: dict[tuple[int, str], list[Tensor]] = {}
    for rows in batch.chunks():
        resid, write = LastState("resid"), LastState("mlp_write")
        model.read(rows.inputs, resid, write, keep=1)
        for layer in range(model.n_layers):
            out = write.values[layer]
            before = resid.values[layer + 1] - out.to(resid.values[layer + 1])
            sides.setdefault((layer, "in"), []).append(before.float().cpu())
            sides.setdefault((layer, "out"), []).append(out.float().cpu())
    directions = {name: _mean_direction(model, batch, name) for name in operands}
    directions["answer"] = _unit(readout(model, batch.answer_ids.to(model.device)).float().cpu())
    other = derangement(len(batch), seed)
    return pd.DataFrame(
        [
            {
                "layer": layer,
                "side": side,
                "word": word,
                "cosine": float((_unit(torch.cat(states)) * r).sum(-1).mean()),
                "shuffled": float((_unit(torch.cat(states)) * r[other]).sum(-1).mean()),
            }
            for (layer, side), states in sides.items()
            for word, r in directions.items()
        ]
    )


def _batch(model: HeadModel, task: AnyTask | None, spans: Sequence[str], n: int, seed: int) -> TaskBatch:
    batch = arithmetic_batch(model, task, "operator" if "operator" in spans else None, n, seed)
    if not spans or not all(name in batch.spans and bool((batch.spans[name][:, 0] >= 0).all()) for name in spans):
        raise InputError(
            f"every prompt needs the spans {', '.join(spans) or '(none given)'}; this task names "
            f"{', '.join(sorted(batch.spans)) or 'none'}."
        )
    return batch


def _mean_direction(model: HeadModel, batch: TaskBatch, span: str) -> Float[Tensor, "N D"]:
    """The mean of the unit readouts of a span's tokens."""
    units = _unit(readout(model, batch.input_ids.flatten().to(model.device)).float().cpu())
    weight = inside(batch, span).float()
    mean = torch.einsum("nt,ntd->nd", weight, units.unflatten(0, tuple(batch.input_ids.shape)))
    return mean / weight.sum(1, keepdim=True)


def _unit(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _about(span: str) -> About:
    return About(
        name=f"attention_to_{span}",
        title=f"Attention to {span}",
        what=f"Where the result is predicted, it attends to: {span}.",
        formula="sum of the last row of the pattern over the span's columns",
        unit="share",
        paper=PAPER,
        threshold=0.5,
    )
