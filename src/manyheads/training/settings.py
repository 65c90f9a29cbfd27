"""`TrainSettings`: how long, how fast and by which optimiser, for every method that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from manyheads.errors import InputError
from manyheads.training.schedule import warmup_stable_decay


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run. A method has a default of its own: change it by `dataclasses.replace(DEFAULT, rate=1e-3)`.

    A run ends at `steps` or after `minutes` (summed over resumes), whichever comes first. Where a method has a fixed number of
    examples, `epochs` passes over them count if `steps` is not given. `rows` is the size of a batch that a method draws.

    The learning rate rises over `warmup` steps to `rate`, stays there, and falls linearly over the last `decay` share of the
    budget to `floor * rate` (`manyheads.training.schedule`). "adamw" decays by `weight_decay` what has two dimensions or
    more, and not gains and biases; with `decayed="all"` those too. "adam" and "sgd" (without momentum) decay nothing. `clip`
    bounds the norm of all gradients together (None: not at all). `compile` compiles the loss, which pays from a few minutes
    of training on.

    Where a method judges its states, it does so after every `every` steps (None: at the end only), the best one counts, and
    `patience` judgements without a better one end the run (None: never).
    """

    steps: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    rows: int = 16
    rate: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.25
    floor: float = 0.02
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    decayed: Literal["matrices", "all"] = "matrices"
    clip: float | None = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    every: int | None = None
    patience: int | None = None
    save_minutes: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "epochs": self.epochs, "rows": self.rows, "every": self.every}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give at least 1.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"minutes is {self.minutes}; give a finite number above 0.")
        if not 0 <= self.rate < math.inf:
            raise InputError(f"rate is {self.rate}; give a finite learning rate of 0 or more.")
        if self.optimizer != "adamw" and self.weight_decay:
            name = "SGD" if self.optimizer == "sgd" else "Adam"
            raise InputError(f"{name} decays no weights, and weight_decay is {self.weight_decay}; give 0, or adamw.")

    def spent(self, step: int, minutes: float) -> float:
        """Share of the budget used, in [0, 1]."""
        shares = [step / self.steps if self.steps else 0.0, minutes / self.minutes if self.minutes else 0.0]
        return min(1.0, max(shares))

    def rate_at(self, step: int, spent: float) -> float:
        """The learning rate of a step, `spent` of the budget being used before it."""
        return self.rate * warmup_stable_decay(step, spent, self.warmup, self.decay, self.floor)

    def for_examples(self, n: int) -> TrainSettings:
        """The same for `n` examples: `epochs` in steps, and a judgement after every epoch unless `every` is given."""
        epoch = max(1, n // self.rows)
        steps = self.epochs * epoch if self.steps is None and self.epochs is not None else self.steps
        return replace(self, steps=steps, every=self.every or epoch)


ADAM = TrainSettings(
    warmup=1, decay=0.0, optimizer="adam", betas=(0.9, 0.999), weight_decay=0.0, clip=None, precision="fp32"
)
"""Plain Adam at a constant rate: nothing decays, nothing is clipped."""
