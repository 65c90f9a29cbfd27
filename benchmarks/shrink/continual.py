"""An encoder over an endless sequence, step by step beside the whole window anew (#78): `manyheads bench continual`.

Milliseconds of a step, both ways in turns, medians over steps; the largest difference of an output; one thread.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from manyheads.shrink.online.continual import ContinualEncoder


def main(
    windows: Annotated[str, typer.Option(help="Steps in a window.")] = "32,128,512",
    width: Annotated[int, typer.Option(min=8)] = 64,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    steps: Annotated[int, typer.Option(min=3)] = 60,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    table = Table("layers", "window", "window anew, ms", "one step, ms", "ratio", "quartiles", "largest difference")
    for layers in (1, 2):
        for window in map(int, windows.split(",")):
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
            encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
            model = ContinualEncoder(encoder, window, torch.randn(2 * window, width)).eval()
            x = torch.randn(1, window + steps, width)
            for t in range(window):
                model.forward_step(x[:, t])
            anew, once, error = [], [], 0.0
            with torch.inference_mode():
                for t in range(window, window + steps):
                    started = time.perf_counter()
                    found = model.forward_step(x[:, t])
                    middle = time.perf_counter()
                    wanted = model(x[:, t - window + 1 : t + 1], t - window + 1)
                    anew.append(time.perf_counter() - middle)
                    once.append(middle - started)
                    error = max(error, float((found - wanted).abs().max()))
            ratio = np.array(once) / np.array(anew)
            low, high = np.quantile(ratio, (0.25, 0.75))
            table.add_row(
                str(layers),
                str(window),
                f"{1000 * np.median(anew):.2f}",
                f"{1000 * np.median(once):.2f}",
                f"{np.median(ratio):.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{error:.1e}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
