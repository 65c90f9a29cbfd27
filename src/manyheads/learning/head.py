"""`Head`: a module that reads a trunk's states, its loss, and how well it does. A new head is one class:

    @dataclass(frozen=True)
    class ScaleSettings:
        width: int

    class ScaleHead(Head):
        Settings = ScaleSettings

        def __init__(self, settings: ScaleSettings) -> None:
            super().__init__(settings)
            self.linear = nn.Linear(settings.width, 1)

        def forward(self, states):            # [N, D] -> [N]
            return self.linear(states)[:, 0]

        def loss(self, output, target):       # a scalar
            return F.smooth_l1_loss(output, target)

It can then be put on any trunk (`MultiHead`), trained, saved and loaded by the name of its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import clause


class Head(nn.Module):
    """A module that reads a trunk's states: `forward` makes an output of them, `loss` compares it with a target.

    `settings` is a frozen dataclass of all that builds the head again: `type(head)(head.settings)` has the same shapes.
    """

    Settings: ClassVar[type[Any] | None] = None
    _kinds: ClassVar[dict[str, type[Head]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Head._kinds[cls.__name__] = cls

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def loss(self, output: Any, target: Any) -> Float[Tensor, ""]:
        """How far an output is from its target. Heads fill this in."""
        raise TypeError(f"{type(self).__name__} has no loss of its own; fill in its loss method.")

    def metrics(self, output: Any, target: Any) -> dict[str, float]:
        """How well it does, by name; heads fill this in. `MultiHead.evaluate` gives all outputs and targets at once."""
        return {}

    def described(self) -> dict[str, Any]:
        """The settings as JSON, for a card."""
        return asdict(self.settings)

    @staticmethod
    def rebuilt(kind: str, settings: Mapping[str, Any]) -> Head:
        """A head by the name of its class and the JSON of its settings, with new weights.

        `InputError` for a class that was not imported, or settings that it does not take.
        """
        cls = Head._kinds.get(kind)
        if cls is None or cls.Settings is None:
            raise InputError(f"no head is called {kind!r}; import the module that defines it first.")
        try:
            return cls(cls.Settings(**settings))
        except TypeError as error:
            raise InputError(f"the settings of a {kind} are damaged ({clause(error)}).") from None


@dataclass(frozen=True)
class LinearSettings:
    """`width` of the states, `outputs`, the seed of the initial weights, and whether there is a bias."""

    width: int
    outputs: int
    seed: int = 0
    bias: bool = True


class LinearHead(Head):
    """W h + b, a class by cross-entropy (nats). W is from N(0, 1 / width), b is zero at first."""

    Settings = LinearSettings

    def __init__(self, settings: LinearSettings, generator: torch.Generator | None = None) -> None:
        super().__init__(settings)
        draw = generator or torch.Generator().manual_seed(settings.seed)
        self.linear = nn.Linear(settings.width, settings.outputs, bias=settings.bias)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(self.linear.weight.shape, generator=draw) / settings.width**0.5)
            if settings.bias:
                self.linear.bias.zero_()

    @staticmethod
    def seeded(width: int, outputs: int, seed: int = 0) -> nn.Linear:
        """The linear layer of such a head alone, for heads that go on from it."""
        return LinearHead(LinearSettings(width, outputs, seed)).linear

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... C"]:
        """Logits."""
        out: Tensor = self.linear(states)
        return out

    def loss(self, output: Float[Tensor, "N C"], target: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(output, target)

    def metrics(self, output: Float[Tensor, "N C"], target: Int[Tensor, "N"]) -> dict[str, float]:
        """The share of rows whose class is right."""
        return {"accuracy": float((output.argmax(-1) == target).float().mean())}


class ScalarHead(LinearHead):
    """w h + b, one number for each output, by mean squared error. Without a bias and with one output: a reward head."""

    def loss(self, output: Float[Tensor, "N C"], target: Float[Tensor, "N *C"]) -> Float[Tensor, ""]:
        """Mean squared error, in the target's unit squared. A target of one dimension is that of a single output."""
        return F.mse_loss(output, _columns(output, target))

    def metrics(self, output: Float[Tensor, "N C"], target: Float[Tensor, "N *C"]) -> dict[str, float]:
        """R^2, the mean over outputs, and the root of the mean squared error."""
        target = _columns(output, target)
        error, spread = (output - target).square().mean(0), (target - target.mean(0)).square().mean(0)
        return {"r2": float((1 - error / spread).mean()), "rmse": float(error.mean().sqrt())}


def _columns(output: Float[Tensor, "N C"], target: Float[Tensor, "N *C"]) -> Float[Tensor, "N C"]:
    target = target[:, None] if target.ndim == 1 else target
    if target.shape != output.shape:
        raise InputError(f"it has outputs of shape {list(output.shape)} and a target of shape {list(target.shape)}.")
    return target.to(output.dtype)
