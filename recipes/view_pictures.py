"""Draw what the systems of views did with real digits: pictures for the documentation.

python recipes/view_pictures.py neighbours --out docs/images/split-views.png         #118, about a minute on one core
python recipes/view_pictures.py distilled --out docs/images/distilled-images.png     #117, about a minute
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.files import check_output, write_atomically
from manyheads.vision.core.pictures import as_picture
from manyheads.vision.core.turned import turned_digits, view_mlp
from manyheads.vision.views.krr_st_claims import distil_tasks, distilled_digits
from manyheads.vision.views.sie import TRAINING, fit_split

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="The picture to write.")]
Force = Annotated[bool, typer.Option("--force", help="Write over an older one.")]


@app.command()
def neighbours(out: Out, force: Force = False) -> None:
    """Each row: a digit of the test, its four nearest by the half that stays, and its four nearest by the half that moves."""
    check_output(out, folder=False, force=force)
    things = turned_digits(0)
    model = fit_split(view_mlp(256, 64, 0), things.batches(TRAINING.rows, 2, 0), training=replace(TRAINING, seed=0))
    draw = torch.Generator().manual_seed(1)
    which = things.test[torch.randint(len(things.test), (2000,), generator=draw)]
    angles = math.pi / 2 * (2 * torch.rand(2000, generator=draw) - 1)
    seen = things.draw(which, angles)
    with torch.no_grad():
        halves = [F.normalize(half, dim=1) for half in model.embed(seen)]
    rows = []
    for digit in range(0, 10, 2):
        asked = int((things.y[which] == digit).nonzero()[0])
        line = [seen[asked]]
        for half in halves:
            near = half @ half[asked]
            near[which == which[asked]] = -1  # other pictures only, not the same one turned
            line += [torch.ones(1, 16, 4), *seen[near.topk(4).indices]]
        rows.append(torch.cat(line, 2)[0])
    _write(torch.cat([F.pad(row, (1, 1, 1, 1), value=1.0) for row in rows]), 5, out, force)


@app.command()
def distilled(out: Out, force: Force = False) -> None:
    """Above the 50 real digits that distilling starts from, below what they become, each spread from black to white."""
    check_output(out, folder=False, force=force)
    task = distil_tasks(False)["digits"]
    few, _ = distilled_digits(task, 0)
    train, _ = task.parts(0)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:50]
    real, learned = (_grid(one) for one in (task.pictures[train][chosen], few.pictures))
    _write(torch.cat([real, torch.ones(3, real.shape[1]), learned]), 6, out, force)


def _grid(pictures: Float[Tensor, "50 1 S S"]) -> Float[Tensor, "H W"]:
    low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
    spread = F.pad((pictures - low) / (high - low), (1, 1, 1, 1), value=1.0)[:, 0]
    return torch.cat([torch.cat(list(spread[25 * row : 25 * (row + 1)]), 1) for row in range(2)])


def _write(grey: Float[Tensor, "H W"], times: int, out: Path, force: bool) -> None:
    picture = as_picture(grey.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy())
    write_atomically(out, lambda file: picture.save(file, format="PNG"), force=force)


if __name__ == "__main__":
    app()
