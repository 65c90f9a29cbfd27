"""Arithmetic with mod-10 features (#4): does moving an ordinal's residue move the successor head's answer?

Gould et al., arXiv:2312.09230. With unit directions f_r for the residues (see `successor_features`), each ordinal t
of residue i and each other residue j make one case:

    x = E0[t] - s f_i + s f_j        a success if the head's top logit in t's domain has residue (j + 1) mod 10

s is in units of the mean length of E0 about its mean, tuned on a part of the ordinals and reported on the rest. Cases whose
wanted residue no item of the domain has are left out. Beside it: no move (s = 0), the difference of residue means, and random
directions with their own s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.atlas.successor_heads.features import residue_means
from manyheads.atlas.successor_heads.ordinals import MODULUS, OrdinalCircuit
from manyheads.errors import InputError
from manyheads.evaluation.controls import p_value
from manyheads.heads import mean_stderr

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class OrdinalArithmetic:
    """Success on the held-out ordinals at the tuned `scale`, with its standard error over ordinals.

    `unmoved` is the share of the same cases that succeed with no move at all; `random` has the success of each set of random
    directions, tuned alike, and `p_value` is how rarely it is as high. `cases` has a row a case: domain, index, wanted residue,
    success.
    """

    name: str
    scale: float
    success: float
    stderr: float
    unmoved: float
    random: tuple[float, ...]
    p_value: float
    cases: pd.DataFrame

    @property
    def by_domain(self) -> dict[str, float]:
        """Success in each domain."""
        return {str(name): float(rate) for name, rate in self.cases.groupby("domain")["success"].mean().items()}


def successor_arithmetic(
    circuit: OrdinalCircuit,
    directions: Mapping[str, Float[Tensor, "R D"]],
    *,
    scales: Sequence[float] = SCALES,
    tuning: float = 0.3,
    n_random: int = 20,
    seed: int = 0,
) -> dict[str, OrdinalArithmetic]:
    """Move every ordinal to every other residue along each set of ten `directions` (NaN rows: that residue has none).

    "residue means" are added to the sets as a baseline. All sets share the tuning ordinals, a share `tuning` of all.
    """
    if not 0 < tuning < 1 or not scales or n_random < 20:
        raise InputError(
            f"got tuning={tuning}, {len(scales)} scales and n_random={n_random}; give 0 < tuning < 1, "
            "one scale or more, and at least 20 random sets."
        )
    tokens = circuit.tokens
    width = circuit.embeddings.shape[1]
    wrong = [name for name, d in directions.items() if d.shape != (MODULUS, width)]
    if wrong:
        raise InputError(
            f"directions {wrong[0]!r} have shape {list(directions[wrong[0]].shape)}, not [{MODULUS}, {width}]."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=generator)
    tune = torch.zeros(len(tokens), dtype=torch.bool)
    tune[order[: max(1, round(tuning * len(tokens)))]] = True
    rows, targets = _cases(circuit)
    drawn = [F.normalize(torch.randn(MODULUS, width, generator=generator), dim=-1) for _ in range(n_random)]
    chance = [_tuned(circuit, d.to(circuit.embeddings), rows, targets, tune, scales) for d in drawn]
    random = [float(hits.double().mean()) for _, hits in chance]
    means = residue_means(circuit.embeddings, tokens.residue)
    return {
        name: _arithmetic(circuit, name, d.to(means), rows, targets, tune, scales, random)
        for name, d in {**directions, "residue means": means}.items()
    }


def _arithmetic(
    circuit: OrdinalCircuit,
    name: str,
    directions: Float[Tensor, "R D"],
    rows: Int[Tensor, "C"],
    targets: Int[Tensor, "C"],
    tune: Tensor,
    scales: Sequence[float],
    random: list[float],
) -> OrdinalArithmetic:
    scale, hits = _tuned(circuit, directions, rows, targets, tune, scales)
    test = ~tune[rows]
    unmoved = _succeeds(circuit, directions.nan_to_num(), rows[test], targets[test], 0.0).double().mean()
    tokens = circuit.tokens
    domains = [tokens.names[d] for d in tokens.domain[rows[test]].tolist()]
    table = {"domain": domains, "index": tokens.index[rows[test]].tolist(), "wanted": ((targets[test] + 1) % MODULUS)}
    frame = pd.DataFrame({**table, "success": hits.numpy(), "row": rows[test]})
    per_token = frame.groupby("row")["success"].mean()
    success = float(hits.double().mean())
    return OrdinalArithmetic(
        name=name,
        scale=scale,
        success=success,
        stderr=float(mean_stderr(per_token.to_numpy())[1]),
        unmoved=float(unmoved),
        random=tuple(random),
        p_value=p_value(success, random),
        cases=frame.drop(columns="row"),
    )


def _cases(circuit: OrdinalCircuit) -> tuple[Int[Tensor, "C"], Int[Tensor, "C"]]:
    """Every ordinal with every residue it may be moved to."""
    tokens = circuit.tokens
    present = torch.zeros(len(tokens.names), MODULUS, dtype=torch.bool)
    present[tokens.domain, tokens.residue] = True
    allowed = present[tokens.domain].roll(-1, 1)  # column j: an item of residue j + 1 exists
    allowed[torch.arange(len(tokens)), tokens.residue] = False
    rows, targets = allowed.nonzero().T
    return rows, targets


def _tuned(
    circuit: OrdinalCircuit, directions: Tensor, rows: Tensor, targets: Tensor, tune: Tensor, scales: Sequence[float]
) -> tuple[float, Tensor]:
    """The scale that succeeds most on the tuning ordinals, and the successes on the others."""
    part = tune[rows]
    rates = [float(_succeeds(circuit, directions, rows[part], targets[part], s).double().mean()) for s in scales]
    best = float(scales[int(np.argmax(rates))])
    return best, _succeeds(circuit, directions, rows[~part], targets[~part], best)


def _succeeds(circuit: OrdinalCircuit, directions: Tensor, rows: Tensor, targets: Tensor, scale: float) -> Tensor:
    x, tokens = circuit.embeddings, circuit.tokens
    move = directions[targets] - directions[tokens.residue[rows]]
    known = ~move.isnan().any(-1).cpu()
    step = scale * (x - x.mean(0)).norm(dim=1).mean() * move.nan_to_num()
    top = circuit.logits(x[rows] + step, rows).argmax(-1)
    return known & (tokens.residue[top] == (targets + 1) % MODULUS)
