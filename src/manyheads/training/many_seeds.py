"""`fit_seeds`: several equally shaped models, one a seed, trained in one run.

Parameters are stacked, [S, ...], and the loss is the sum over seeds, each seed's model on its own batch (`torch.func.vmap`):

    loss = sum_s loss(model_s, batch_s)            d loss / d parameters_s is what a run of seed s alone has

SGD, Adam and AdamW change each number by its own gradient alone, so each seed's run is its own run, up to rounding. What
would mix seeds is kept apart or refused: gradients are clipped seed by seed; a run that is judged, or that ends by the clock,
has to be trained alone.

What is saved is the time of calls, not of numbers: a small model gains a little, and one with large batches nothing
(`benchmarks/lab/many_seeds.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from manyheads.errors import InputError, UnsupportedError
from manyheads.progress import Bar
from manyheads.training.batches import mapped
from manyheads.training.loop import Progress, fit
from manyheads.training.settings import TrainSettings

Loss = Callable[[Any, Any], Tensor]


class StackedSeeds(nn.Module):
    """S models as one: `forward(batches)` is the sum of their losses, model s on `batches[s]`. `give_back` makes them new."""

    def __init__(self, models: Sequence[nn.Module], loss: Loss) -> None:
        super().__init__()
        self.models, self.loss = tuple(models), loss  # a tuple: their own parameters are not ours
        stacked, buffers = stack_module_state(list(models))
        learning = {name for name, one in models[0].named_parameters() if one.requires_grad}
        self.names = list(stacked)
        self.stacked = nn.ParameterList(nn.Parameter(one.detach(), name in learning) for name, one in stacked.items())
        self._buffers_of = {f"model.{name}": one for name, one in buffers.items()}
        self._one = _Losing(copy.deepcopy(models[0]), loss)
        for parameter in self._one.parameters():
            parameter.requires_grad_(False)  # a place for the seeds' own, never trained

    def forward(self, batches: Sequence[Any]) -> Float[Tensor, ""]:
        """The sum over seeds."""
        tensors, form = _stacked(batches)
        state = {f"model.{name}": one for name, one in zip(self.names, self.stacked, strict=True)} | self._buffers_of

        def one_loss(own: dict[str, Tensor], given: list[Tensor]) -> Tensor:
            parts = iter(given)
            loss: Tensor = functional_call(self._one, own, (mapped(form, lambda _: next(parts)),))
            return loss

        found: Tensor = vmap(one_loss)(state, tensors)
        if found.ndim != 1:
            raise InputError(f"a seed's loss has shape {list(found.shape[1:])}; give one number.")
        return found.sum()

    def clip(self, bound: float) -> None:
        """Scale each seed's gradients to a norm of at most `bound`, as torch does for one model."""
        gradients = [one.grad.view(len(self.models), -1) for one in self.stacked if one.grad is not None]
        scale = (bound / (torch.cat(gradients, 1).norm(dim=1) + 1e-6)).clamp(max=1.0)
        for one in gradients:
            one.mul_(scale[:, None])

    @torch.no_grad()
    def give_back(self) -> None:
        """Put the parameters as they are now into the models."""
        for s, model in enumerate(self.models):
            own = dict(model.named_parameters())
            for name, stacked in zip(self.names, self.stacked, strict=True):
                own[name].copy_(stacked[s])


class _Losing(nn.Module):
    """A model whose forward pass is its loss, so that a loss may call any method of the model."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def fit_seeds(
    models: Sequence[nn.Module],
    batches: Sequence[Callable[[int], Any]],
    settings: TrainSettings,
    *,
    loss: Loss,
    look: Callable[[int], object] | None = None,
    every: int = 1,
    bar: Bar = Bar(),
) -> Progress:
    """Train S models in place on the processor, model s on `batches[s](i)`, each as `fit` would alone: equal up to rounding.

    `loss(model, batch)` is one seed's, a scalar. Models are of the same class and shapes; batches of one number too, and what
    is no tensor in them is the first seed's. `look(step)`
    is called after every `every` updates, with the models as they are then. The progress has the sum of the losses.

    `InputError` before work begins for models of different shapes, for another number of batches, or for settings that end by
    the clock or judge; `UnsupportedError` for models with dropout or batch norm, whose seeds would not be their own.
    """
    if not models or len(models) != len(batches):
        raise InputError(f"got {len(models)} models and {len(batches)} batches; give each model its own.")
    _check(models, settings)

    def looking(give_back: Callable[[], object]) -> Callable[[Progress, torch.optim.Optimizer], None]:
        def after_step(progress: Progress, _: torch.optim.Optimizer) -> None:
            if look is not None and progress.step % every == 0:
                give_back()
                look(progress.step)

        return after_step

    if len(models) == 1:
        after = looking(lambda: None)
        return fit(models[0], batches[0], settings, loss=loss, after_step=after, device="cpu", bar=bar)
    together, bound = StackedSeeds(models, loss), settings.clip
    progress = fit(
        together,
        lambda i: [draw(i) for draw in batches],
        replace(settings, clip=None),
        after_backward=None if bound is None else lambda *_: together.clip(bound),
        after_step=looking(together.give_back),
        device="cpu",
        bar=bar,
    )
    together.give_back()
    return progress


def _check(models: Sequence[nn.Module], settings: TrainSettings) -> None:
    shapes = [{name: (one.shape, one.requires_grad) for name, one in model.named_parameters()} for model in models]
    if any(type(model) is not type(models[0]) for model in models) or any(one != shapes[0] for one in shapes):
        raise InputError(
            "the models differ in class, in shapes or in what is trained; give one kind, or fit them alone."
        )
    if settings.steps is None or settings.minutes is not None:
        raise InputError("several seeds end after the same steps; give TrainSettings steps and no minutes.")
    if settings.patience is not None:
        raise InputError("several seeds cannot stop at different steps; fit them alone, or give no patience.")
    flat = [name for name, (shape, learns) in shapes[0].items() if learns and len(shape) < 2]
    if (
        len(models) > 1
        and settings.optimizer == "adamw"
        and settings.decayed != "all"
        and settings.weight_decay
        and flat
    ):
        raise InputError(f"stacked, {flat[0]} would decay like a matrix; give weight_decay 0 or decayed='all'.")
    for name, module in models[0].named_modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0):
            raise UnsupportedError(
                f"{name} is {type(module).__name__}, which draws or counts by itself; fit seeds alone."
            )


def _stacked(batches: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """The batches' tensors, each stacked over seeds, and the form in which they stand. `InputError` where forms differ."""
    found: list[list[Tensor]] = [[] for _ in batches]

    def keep(tensor: Tensor, own: list[Tensor]) -> Tensor:
        own.append(tensor)
        return tensor

    for batch, own in zip(batches, found, strict=True):
        mapped(batch, partial(keep, own=own))
    shapes = [[one.shape for one in own] for own in found]
    if any(one != shapes[0] for one in shapes):
        raise InputError("the seeds' batches have different shapes; give as many examples of each.")
    if not shapes[0]:
        raise InputError("the batches hold no tensors, so all seeds would learn from the same; draw them in `batches`.")
    return [torch.stack(parts) for parts in zip(*found, strict=True)], batches[0]
