"""Successor heads (#4): which heads turn an ordinal token into the next one, by their weights alone.

Gould et al., arXiv:2312.09230. With `E0[t] = MLP_0(norm(W_E[t]))`, the first block's attention left out, and a class of ordinals
in order (the days, the months, ...), a head succeeds on t if its OV circuit favours t's successor among t's class:

    score[l, h] = share of t with  argmax_{u in class(t)} ( E0[t] W_OV[l,h] W_U )[u] = succ(t)        in [0, 1], dimensionless

The last item of a class has no successor and is left out. Above 0.5 the paper calls it a successor head. We read E0 through
each layer's own input norm and the logits through the final norm's gain, which the paper's formula leaves out: the direction
of a norm's gain is part of what a head sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import by_task
from manyheads.atlas.core.registry import by_weights, register
from manyheads.atlas.patterns.copying import Embedding, token_embedding
from manyheads.errors import InputError
from manyheads.heads import HeadLike, HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.ov import ov_z, readout
from manyheads.tasks.families.successor import KINDS

Classes = Mapping[str, Sequence[int]]
ABOUT = About(
    name="successor",
    title="Successor",
    what="Its OV circuit turns an ordinal into the next one (Monday to Tuesday, 3 to 4), read off the weights alone.",
    formula="share of ordinals whose successor is the arg-max of the OV circuit within their class",
    unit="share",
    paper="arXiv:2312.09230",
    threshold=0.5,
    kind="succession",
)


def successor(
    model: HeadModel, *, classes: Classes | None = None, embed: Embedding = "mlp", seed: int = 0
) -> HeadScores:
    """Score every head by the share of ordinals it increments (formula above); `n` counts the ordinals.

    `classes` are token ids in order, by name; without them, the days, months, letters, numbers, number words and ordinals that
    are single tokens of the model's tokenizer, each spelling (with and without a leading space, capitals) a class of its own.
    `embed` is what stands for a token: the first MLP's output (the paper's E0), the embedding, or their sum. Scores differ.
    """
    classes = ordinal_classes(model.tokenizer) if classes is None else classes
    z, pairs = _circuits(model, classes, embed)
    hits = np.stack(
        [
            np.concatenate([_hits(model, layer, zc[layer], c) for zc, c in zip(z, pairs, strict=True)])
            for layer in range(model.n_layers)
        ]
    )
    per_token = hits.transpose(1, 0, 2)  # [N, L, H]
    meta = ABOUT.provenance(model, seed, embed=embed, classes={name: len(ids) for name, ids in classes.items()})
    return HeadScores.from_examples(ABOUT.name, per_token, meta)


def successor_of_set(
    model: HeadModel, heads: Iterable[HeadLike], *, classes: Classes | None = None, embed: Embedding = "mlp"
) -> float:
    """The score of the summed circuit of several heads: succession may be spread over heads that score low one by one."""
    classes = ordinal_classes(model.tokenizer) if classes is None else classes
    z, pairs = _circuits(model, classes, embed)
    chosen = model.head_set(heads)
    hits = []
    for zc, unembedding in zip(z, pairs, strict=True):
        logits = sum(_logits(model, h.layer, zc[h.layer], unembedding)[:, h.index] for h in chosen)
        hits.append(_succeeds(torch.as_tensor(logits)))
    return float(torch.cat(hits).double().mean())


def ordinal_classes(tokenizer: Any) -> dict[str, list[int]]:
    """The ordinal classes of a tokenizer: maximal runs of neighbours that are single tokens, in each spelling.

    `InputError` if it has none.
    """
    if tokenizer is None:
        raise InputError("successor heads need a tokenizer or classes=; open the model with tokenizer=.")
    classes: dict[str, list[int]] = {}
    for kind, items in KINDS.items():
        for spelling, write in SPELLINGS.items():
            run: list[int] = []
            best: list[int] = []
            for item in items:
                ids = tokenizer(write(item), add_special_tokens=False)["input_ids"]
                known = len(ids) == 1 and ids[0] != tokenizer.unk_token_id and ids[0] not in run
                run = [*run, ids[0]] if known else []
                best = max(best, run, key=len)
            if len(best) >= 3 and best not in classes.values():
                classes[f"{kind}{spelling}"] = best
    if not classes:
        raise InputError(
            "this tokenizer has no ordinal classes: no three days, months, letters or numbers are single tokens."
        )
    return classes


SPELLINGS = {
    "": lambda item: " " + item,
    ", no space": lambda item: item,
    ", other case": lambda item: " " + (item.lower() if item[:1].isupper() else item.capitalize()),
    ", other case, no space": lambda item: item.lower() if item[:1].isupper() else item.capitalize(),
}


def _circuits(model: HeadModel, classes: Classes, embed: Embedding) -> tuple[list[Tensor], list[Tensor]]:
    """Z of each class's tokens but the last `[L, n-1, H, Dh]`, and its unembedding `[n, D]`; one pass for all classes."""
    rows = [torch.as_tensor(list(ids), device=model.device) for ids in classes.values()]
    if any(len(ids) < 2 for ids in rows) or not rows:
        raise InputError("an ordinal class needs two tokens or more.")
    z = ov_z(model, token_embedding(model, torch.cat(rows), embed))
    cut = z.split([len(ids) for ids in rows], dim=1)
    return [part[:, :-1] for part in cut], [readout(model, ids) for ids in rows]


def _logits(
    model: HeadModel, layer: int, z: Float[Tensor, "N H Dh"], unembedding: Float[Tensor, "C D"]
) -> Float[Tensor, "N H C"]:
    back = torch.einsum("hde,ce->hdc", model.W_O(layer).detach().to(unembedding), unembedding)
    return torch.einsum("nhd,hdc->nhc", z.to(back), back)


def _hits(model: HeadModel, layer: int, z: Tensor, unembedding: Tensor) -> Bool[np.ndarray, "N H"]:
    return np.asarray(_succeeds(_logits(model, layer, z, unembedding)).cpu())


def _succeeds(logits: Float[Tensor, "N ... C"]) -> Bool[Tensor, "N ..."]:
    """Whether row i's largest logit is item i + 1's."""
    wanted = torch.arange(1, len(logits) + 1, device=logits.device)
    return logits.argmax(-1) == wanted.reshape(-1, *[1] * (logits.ndim - 2))


register(ABOUT, score=by_weights(successor), judge=by_task("successor"), steps=lambda model, n: 1)
