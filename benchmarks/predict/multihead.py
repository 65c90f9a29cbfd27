"""What `MultiHead` costs beside a loop written by hand: two heads on a small network, and on the bundled model, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import manyheads as mh
from manyheads.learning import Attached, LinearHead, LinearSettings, MultiHead, ScalarHead, Trunk
from manyheads.training import ADAM, fit

States = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]


class ByHand(nn.Module):
    """The same two heads, in the way one writes them."""

    def __init__(self, trunk: nn.Module, width: int, states: States) -> None:
        super().__init__()
        self.trunk, self.kind, self.size, self.states = trunk, nn.Linear(width, 5), nn.Linear(width, 1), states

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        state = self.states(self.trunk, batch)
        size = F.mse_loss(self.size(state)[:, 0], batch["size"])
        return F.cross_entropy(self.kind(state), batch["kind"]) + 0.5 * size


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _ratios(
    hand: nn.Module, heads: MultiHead, batch: dict[str, torch.Tensor], steps: int, rounds: int
) -> list[tuple[float, float]]:
    """Processor seconds of both, in turns; the first round warms up. MultiHead's check of a batch and first look count."""
    settings = replace(ADAM, steps=steps, rate=1e-4)
    found = [
        (
            _seconds(lambda: fit(hand, lambda i: batch, settings)),
            _seconds(lambda: heads.fit(lambda i: batch, settings, log_every=10**6)),
        )
        for _ in range(rounds + 1)
    ]
    return found[1:]


def main(rounds: int = 12, steps: int = 200) -> None:
    torch.set_num_threads(1)
    targets = {"kind": torch.randint(0, 5, (128,)), "size": torch.randn(128)}
    small = {name: values[:8] for name, values in targets.items()}

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))

    def ladon_states(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return module.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state.mean(1)

    ids = torch.randint(3, 4000, (8, 64))
    cases = {
        "network": (network, 64, {"input": torch.randn(128, 64), **targets}, lambda m, b: m(b["input"]), steps, rounds),
        "ladon": (
            lambda: mh.open_model().plain,
            256,
            {"input_ids": ids, **small},
            ladon_states,
            steps // 2,
            rounds // 4,
        ),
    }
    table = Table("trunk", "ms a step by hand", "MultiHead", "spread", title="Processor time, in turns, one thread")
    for name, (make, width, batch, states, count, turns) in cases.items():
        kind, size = LinearHead(LinearSettings(width, 5)), ScalarHead(LinearSettings(width, 1))
        heads = MultiHead(Trunk(make(), frozen=False), {"kind": kind, "size": Attached(size, weight=0.5)})
        found = _both(ByHand(make(), width, states), heads, batch, count, turns)
        ratios = sorted(ours / own for own, ours in found)
        own = 1000 * median(own for own, _ in found) / count
        table.add_row(name, f"{own:.2f}", f"{median(ratios):.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
