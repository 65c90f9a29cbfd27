"""The best state of a run, by a judge's losses: kept beside the newest one, so that a resumed run has both."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BestState:
    """What `module` learns, as it was at the lowest loss. `losses` are the judge's by step."""

    def __init__(self, module: nn.Module, losses: dict[int, float], state: dict[str, Tensor]) -> None:
        self.module, self.losses, self.state = module, losses, state

    def look(self, step: int, loss: float) -> None:
        """Write down the loss at `step`, and keep the state if none was better."""
        if loss <= min(self.losses.values(), default=loss):
            self.state = {name: value.detach().cpu().clone().contiguous() for name, value in self._learning().items()}
        self.losses[step] = loss

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` losses are no better than the one before them."""
        losses = list(self.losses.values())
        return bool(losses) and patience is not None and len(losses) - 1 - losses.index(min(losses)) >= patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state into the module."""
        for name, value in self._learning().items():
            if name in self.state:
                value.copy_(self.state[name])

    def _learning(self) -> dict[str, Tensor]:
        """Parameters that ask for gradients, and buffers: what is frozen need not be kept."""
        frozen = {name for name, p in self.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: value for name, value in self.module.state_dict().items() if name not in frozen}
