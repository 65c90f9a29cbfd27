"""Time and memory of mixers by the number of channels: SOFTS and OLinear beside attention across channels.

    python benchmarks/forecast/channels.py          # or: manyheads bench channels

A forward and a backward pass of one window, look-back and horizon 96, one block of the same width each. "attention" is SOFTS's
trunk with attention in the place of STAR, by PyTorch's fused function and with the softmax written out. OLinear's matrix A is
C x C: its mixing grows with the square of C, and what else it does with C. Seconds are the least of several rounds in turns;
memory is what a process of its own grows by in one pass, the weights aside. The exponents are those between the two largest
numbers of channels: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.forecast.core.windows import Shape
from manyheads.forecast.mixers.olinear import OLinearTrunk
from manyheads.forecast.mixers.softs import SoftsTrunk

sys.path.insert(0, str(Path(__file__).parents[1]))
from _measuring import grown, print_growth, timed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
STEPS, HEADS = 96, 8


class Attention(nn.Module):
    """Attention across channels, fused or written out."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.project, self.out, self.fused = nn.Linear(width, 3 * width), nn.Linear(width, width), fused

    def forward(self, x: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """What each channel reads of all."""
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            z = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        out: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return out


def softs(channels: int, width: int, star: Callable[[], nn.Module] | None = None) -> nn.Module:
    """SOFTS's trunk with a last layer; `star` makes another mixer."""
    shape = Shape(STEPS, STEPS, channels)
    trunk = SoftsTrunk(shape, width=width, core=width, hidden=width, layers=1)
    if star is not None:
        trunk.blocks[0].star = star()
    return nn.Sequential(trunk, nn.Linear(width, STEPS))


def olinear(channels: int, width: int, mixes: bool = True) -> nn.Module:
    """OLinear's trunk with a last layer."""
    shape = Shape(STEPS, STEPS, channels)
    trunk = OLinearTrunk(shape, width=width, embedding=4, layers=1, dropout=0.0, mixes=mixes)
    return nn.Sequential(trunk, nn.Linear(width, STEPS))


METHODS: dict[str, Callable[[int, int], nn.Module]] = {
    "softs": softs,
    "olinear": olinear,
    "olinear unmixed": lambda channels, width: olinear(channels, width, mixes=False),
    "attention, fused": lambda channels, width: softs(channels, width, lambda: Attention(width, True)),
    "attention, written out": lambda channels, width: softs(channels, width, lambda: Attention(width, False)),
}


def work(method: str, channels: int, width: int) -> Callable[[], None]:
    """A forward and a backward pass of a network of its own."""
    torch.manual_seed(0)
    network, x = METHODS[method](channels, width), torch.randn(1, STEPS, channels)

    def once() -> None:
        network(x).square().mean().backward()

    return once


@app.command()
def main(
    channels: Annotated[str, typer.Option(help="Numbers of channels.")] = "100,250,500,1000,2000",
    width: Annotated[int, typer.Option(help="D of every network.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds, in turns; the least seconds count.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Seconds and memory of a pass by the number of channels."""
    torch.set_num_threads(threads)
    if child is not None:
        method, count, size = child.split(":")
        print_growth(work(method, int(count), int(size)))
        return
    counts = [int(count) for count in channels.split(",")]
    seconds = {n: timed(rounds, *(work(method, n, width) for method in METHODS)) for n in counts}
    memory = {n: [grown(__file__, f"{method}:{n}:{width}", threads) for method in METHODS] for n in counts}
    for title, found, unit in (("ms", seconds, 1e3), ("MiB", memory, 1.0)):
        table = Table(title=f"{title} of a forward and a backward pass, width {width}, one window of {STEPS} steps")
        table.add_column("method")
        for name in (*map(str, counts), "exponent", "times softs's", "times fused attention's"):
            table.add_column(name, justify="right")
        last, before = found[counts[-1]], found[counts[-2]]
        fused = list(METHODS).index("attention, fused")
        for i, method in enumerate(METHODS):
            exponent = math.log(last[i] / before[i]) / math.log(counts[-1] / counts[-2])
            row = [f"{found[n][i] * unit:.1f}" for n in counts]
            table.add_row(method, *row, f"{exponent:.2f}", f"{last[i] / last[0]:.2f}", f"{last[i] / last[fused]:.2f}")
        Console(width=140).print(table)


if __name__ == "__main__":
    app()
