"""Is what we read of a real model what others read? In an environment with the extra `bench`: `manyheads bench agreement MODEL`.

Against transformer-lens on the same weights: the largest difference of logits, of previous-token, duplicate-token and induction
scores of every head, and of what zero-ablating a head does to a logit difference (every third head). Against the literature:
the share of retrieval heads (arXiv:2404.15574: under 5 %), whether the first strong induction head stands above the first strong
previous-token head (arXiv:2209.11895), and the share of sinks (arXiv:2410.10781). And against itself: Spearman's correlation of
all heads' scores between five seeds.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measuring import lens
from atlas import lens_patterns, metric, patterns, sweep_inputs
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.atlas.core.registry import behaviours, score_all
from manyheads.atlas.surveys.stability import rank_agreement

PATTERNS = ("previous_token", "duplicate_token", "induction", "positional", "first_token")


def ablations(model: mh.HeadModel, hooked: Any) -> tuple[np.ndarray, np.ndarray]:
    """The logit difference without every third head, by a replayed sweep and by transformer-lens's hooks."""
    inputs, heads = sweep_inputs(model, 4), list(model.heads)[::3]
    ours = model.sweep(inputs, [mh.Ablate([head]) for head in heads], metric, keep=1)
    theirs = []
    for head in heads:

        def ablate(z: torch.Tensor, hook: Any, index: int = head.index) -> torch.Tensor:
            z[:, :, index] = 0
            return z

        with torch.no_grad():
            logits = hooked.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{head.layer}.attn.hook_z", ablate)])
        theirs.append(metric(logits).double().numpy())
    return ours, np.stack(theirs)


def main(
    model: Annotated[str, typer.Argument(help="A folder, or smollm2 after `manyheads fetch smollm2`.")] = "smollm2",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seeds: Annotated[int, typer.Option(min=2)] = 5,
) -> None:
    """Print how far apart the readings are."""
    torch.set_num_threads(threads)
    opened = mh.open_model(model)
    table = Table("what", "ours", "others", title=f"{model}: our readings beside others'", title_justify="left")
    hooked = lens(opened)
    inputs = sweep_inputs(opened, 4)
    with torch.no_grad():
        gap = float((opened.logits(inputs) - hooked(inputs)).abs().max())
    table.add_row("logits, largest difference", f"{gap:.1e}", "transformer-lens")
    for name, ours, theirs in zip(PATTERNS, patterns(opened), lens_patterns(opened, hooked), strict=False):
        table.add_row(
            f"{name} of every head, largest difference", f"{np.abs(ours - theirs).max():.1e}", "transformer-lens"
        )
    ours, theirs = ablations(opened, hooked)
    table.add_row(
        "logit difference without a head, largest difference",
        f"{np.abs(ours - theirs).max():.1e} of {np.abs(theirs - theirs.mean()).max():.2f}",
        "transformer-lens",
    )
    draws = [score_all(opened, PATTERNS, n=16, seed=1000 * seed)[0] for seed in range(seeds)]
    for name in PATTERNS:
        agreement = rank_agreement([draw[name] for draw in draws])
        table.add_row(f"{name}, rank correlation of {seeds} seeds", f"{agreement:.3f}", "itself")
    found = {name: draws[0][name].above(behaviours()[name].about.threshold) for name in PATTERNS}
    n_heads = len(opened.heads)
    first = {name: min((h.layer for h in found[name]), default=None) for name in ("previous_token", "induction")}
    table.add_row("first layers of previous-token and induction heads", f"{first}", "previous below induction")
    table.add_row("share of sinks", f"{len(found['first_token']) / n_heads:.0%}", "most heads of small models")
    retrieval = mh.atlas.retrieval(opened, n=40)
    share = len(retrieval.above(0.1)) / n_heads
    table.add_row(f"share of retrieval heads (of {retrieval.n} tests answered)", f"{share:.1%}", "under 5 %")
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
