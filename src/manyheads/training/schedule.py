"""Learning rates that depend on how much of the budget is spent, be it steps or minutes."""

from __future__ import annotations


def warmup_stable_decay(step: int, spent: float, warmup: int, decay: float, floor: float) -> float:
    """Linear warm-up, a plateau at 1, a linear fall to `floor` over the last `decay` share of the budget.

        min(1, (step + 1) / warmup) * min(1, floor + (1 - floor) * (1 - spent) / decay)          in units of the highest rate

    `spent` in [0, 1] is the share of the budget used so far, so that a run lands well whether steps or minutes end it.
    """
    rise = min(1.0, (step + 1) / max(1, warmup))
    left = max(0.0, 1.0 - spent)
    fall = min(1.0, floor + (1.0 - floor) * left / decay) if decay > 0 else 1.0
    return rise * fall
