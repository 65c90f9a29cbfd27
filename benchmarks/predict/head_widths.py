"""Head tuning (#25) on the states of a language model: the risk of a least-squares head by width, beside ridge.

    manyheads bench head_widths [MODEL] [--layers 1,3,6] [--n 60] [--rows 1500] [--draws 20]

States are at random places of the prose that ships with Python, the target is how many letters the next token has
(standardised). A width takes the first p columns of a random rotation. Risk is the mean over training sets of the mean squared
error on held-out rows.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.predict.transfer.head_tuning import min_norm_head, ridge_head, width_sweep
from manyheads.predict.transfer.small_sets import next_word_states


def main(
    model: Annotated[str, typer.Argument(help="A model as `manyheads` opens it.")] = "ladon",
    layers: Annotated[str, typer.Option(help="Layers, with commas.")] = "1,3,6",
    n: Annotated[int, typer.Option(help="Rows of a training set.")] = 60,
    rows: Annotated[int, typer.Option(help="Rows in all.")] = 1500,
    draws: Annotated[int, typer.Option(help="Training sets at each width.")] = 20,
) -> None:
    opened = mh.open_model(model)
    for layer in map(int, layers.split(",")):
        states, target = next_word_states(opened, layer, n=rows)
        shares = (0, 0.25, 0.5, 0.8, 0.95, 1, 1.05, 1.5, 3)
        widths = sorted({round(share * n) for share in shares} | {states.shape[1]})
        found = [
            width_sweep(states, target, n, widths, draws=draws, head=head).table for head in (min_norm_head, ridge_head)
        ]
        table = Table(
            "width", "least norm", "+-", "bias^2", "variance", "ridge", title=f"{model}, layer {layer}, n = {n}"
        )
        for i, p in enumerate(widths):
            row = found[0].iloc[i]
            numbers = (row["risk"], row["stderr"], row["bias2"], row["variance"], found[1]["risk"].iloc[i])
            table.add_row(str(p), *(f"{value:.3g}" if np.isfinite(value) else "" for value in numbers))
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
