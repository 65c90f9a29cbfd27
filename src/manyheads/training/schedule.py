"""Learning rates that depend on how much of the budget is spent, be it steps or minutes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau at `peak`, a linear fall to `floor * peak` over the last `decay` share of the budget.

        lr = peak * min(1, (step + 1) / warmup) * min(1, floor + (1 - floor) * (1 - spent) / decay)

    `spent` in [0, 1] is the share of the budget used so far, so that a run lands well whether steps or minutes end it.
    """

    peak: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.25
    floor: float = 0.02

    def __call__(self, step: int, spent: float) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = max(0.0, 1.0 - spent)
        fall = min(1.0, self.floor + (1.0 - self.floor) * left / self.decay) if self.decay > 0 else 1.0
        return self.peak * rise * fall
