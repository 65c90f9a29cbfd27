"""States of many inputs, for heads that are fitted at once: ridge regression, logistic regression, k-means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.inputs import check_integer
from manyheads.learning.trunk import Layer, Pool, Trunk
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar


def features(
    trunk: Trunk | HeadModel | nn.Module,
    inputs: Sequence[str] | Tensor,
    layer: Layer = -1,
    pool: Pool = "mean",
    *,
    rows: int = 32,
    bar: Bar = Bar(),
) -> Float[Tensor, "N D"]:
    """The state of each input at a layer of a frozen trunk, one row an input, on the processor.

    `inputs` are texts, or a tensor whose first axis counts inputs. Texts are read `rows` at a time, those of like length
    together, so that little is padding. `InputError` for no inputs.
    """
    check_integer(rows, "rows", 1)
    if not len(inputs):
        raise InputError("there are no inputs; give at least one.")
    if pool == "tokens":
        raise InputError("one state an input is wanted, and 'tokens' gives many; pool by mean, first or last.")
    read = Trunk(trunk.model) if isinstance(trunk, Trunk) else Trunk(trunk)
    texts = not isinstance(inputs, Tensor)
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i])) if texts else list(range(len(inputs)))
    out: Any = None
    done = bar.step("reading states", len(order))
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        found = (
            read.states([inputs[i] for i in part] if texts else inputs[start : start + rows], layer, pool).float().cpu()
        )
        out = torch.empty(len(order), *found.shape[1:]) if out is None else out
        out[part] = found
        done(len(part))
    states: Tensor = out
    return states
