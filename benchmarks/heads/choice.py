"""The multiple-choice circuit (#12) in trained models: which classes of heads are there, and which are empty.

    manyheads bench choice [--seeds 3] [--layout "label last"] [--model FOLDER] [--n 48] [--threads 1]

1. small models trained here, of whose upper layer two heads are alive: they alone can find the right letter
2. the bundled model, and a model of yours
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import manyheads as mh
from manyheads.atlas.multiple_choice.classes import choice_classes
from manyheads.atlas.multiple_choice.effects import choice
from manyheads.atlas.multiple_choice.questions import Questions, measured, questions
from manyheads.atlas.multiple_choice.subspaces import compress
from manyheads.lab.choosing import Layout, choice_prompts, choosing_model

ALIVE = ([0, 3], [1, 2], [0, 2], [1, 3], [0, 1], [2, 3])


def trained(seed: int, layout: Layout) -> None:
    """One small model."""
    alive = ALIVE[seed % len(ALIVE)]
    model, asked = mh.open_model(choosing_model(alive, seed, layout)), Questions(*choice_prompts(256, 99, layout))
    margin, _, accuracy = measured(model, asked)
    found = {name: str(heads) for name, heads in choice_classes(model, asked).items() if heads}
    print(
        f"seed {seed}, alive {', '.join(f'L1H{i}' for i in alive)}: accuracy {accuracy:.3f}, margin {margin:.1f}; {found}"
    )
    print(f"    {choice(model, asked)['correct_letter'].meta['note']}")
    heads = choice_classes(model, asked)["correct_letter"]
    if heads:
        kept = compress(model, asked, heads, ranks=(0, 1, 2, 3, 4, 5), n_random=3)
        print(
            "    margin kept (random):",
            ", ".join(f"rank {c.rank} {c.kept:.2f} ({c.random_kept:.2f})" for c in kept[1:]),
        )


def opened(model: mh.HeadModel, name: str, n: int) -> None:
    """A model that is there."""
    for labels in ("standard", "shuffled"):
        margin, _, accuracy = measured(model, questions(model, labels=labels, n=n))
        print(f"{name}: {labels} labels, accuracy among the labels {accuracy:.2f}, margin {margin:.2f}")
        if labels == "standard" and margin <= 0:
            print("    It does not prefer the right letter, so no head can matter for it.")
            return
    scores = choice(model, n=n)
    print(f"    {scores['correct_letter'].meta['note']} {scores['correct_letter'].meta['classes']}")


def main(
    seeds: Annotated[int, typer.Option(help="Small models to train.")] = 3,
    layout: Annotated[str, typer.Option(help="Where labels stand: label last or label first.")] = "label last",
    model: Annotated[str | None, typer.Option(help="A model of yours.")] = None,
    n: Annotated[int, typer.Option(help="Questions.")] = 48,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    for seed in range(seeds):
        trained(seed, layout)  # type: ignore[arg-type]
    opened(mh.open_model(), "ladon", n)
    if model is not None:
        opened(mh.open_model(model), model, n)


if __name__ == "__main__":
    typer.run(main)
