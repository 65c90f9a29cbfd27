"""Initial guesses (#27) on a language model: does a preliminary rating in a few-shot prompt bring the answer nearer?

    manyheads bench guessed_ratings [MODEL] [--n 20] [--seeds 3]

Ten words with ratings from 1 to 9 (VADER, the mean of nine people), then a word to rate. Its guess is what a tenth person said.
The answer is the mean of the digits under the model's probabilities. Beside no guess: the guess of another word, and the guess
itself, which a model has to beat to be of use.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.data.real import word_ratings
from manyheads.progress import progressing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SHOTS = 10


def prompt(words: list[str], labels: list[int], guesses: list[int] | None, *, everywhere: bool) -> str:
    """Lines of words and ratings, the last without its rating. Guesses stand on every line, or on the last alone."""
    lines = []
    for i, word in enumerate(words):
        shown = guesses is not None and (everywhere or i == SHOTS)
        guess = f" (first guess {guesses[i]})" if shown and guesses is not None else ""
        lines.append(f"{word}{guess}:" + (f" {labels[i]}" if i < SHOTS else ""))
    return "How pleasant is each word, from 1 to 9?\n" + "\n".join(lines)


def rated(model: Any, text: str) -> float:
    """The mean digit that the model expects next."""
    answers = [model.tokenizer(f" {digit}", add_special_tokens=False).input_ids for digit in range(1, 10)]
    before = answers[0][:-1]  # a blank of its own, in some vocabularies
    ids = torch.tensor([model.tokenizer(text).input_ids + before])
    with torch.no_grad():
        logits = model.module(input_ids=ids, logits_to_keep=1).logits[0, -1]
    share = logits[[answer[-1] for answer in answers]].double().softmax(-1)
    return float(share @ torch.arange(1, 10).double())


def drawn(n: int, seed: int) -> list[tuple[list[str], list[int], list[int], float]]:
    """`n` prompts: words, rounded ratings, guesses, and the rating of the last word."""
    words, ratings = word_ratings()
    kept = [i for i, word in enumerate(words) if word.isalpha()]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        rows = rng.choice(kept, SHOTS + 1, replace=False)
        persons = rng.integers(10, size=SHOTS + 1)
        guesses = ratings[rows, persons] + 5
        truth = (ratings[rows].sum(1) - ratings[rows, persons]) / 9 + 5
        labels = [round(float(t)) for t in truth]
        found.append(([words[i] for i in rows], labels, [int(g) for g in guesses], float(truth[-1])))
    return found


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A model that `open_model` knows.")] = "smollm2",
    n: Annotated[int, typer.Option(min=2, help="Prompts a seed.")] = 20,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """The mean squared error of every kind of prompt, over seeds."""
    torch.set_num_threads(threads)
    opened, errors = mh.open_model(model), dict[str, list[float]]()
    with progressing() as bar:
        done = bar.step("prompts", n * seeds)
        for seed in range(seeds):
            prompts, squares = drawn(n, seed), dict[str, list[float]]()
            for i, (words, labels, guesses, truth) in enumerate(prompts):
                other = [*guesses[:-1], prompts[i - 1][2][-1]]
                answers = {
                    "no guess": rated(opened, prompt(words, labels, None, everywhere=True)),
                    "guess for the last word": rated(opened, prompt(words, labels, guesses, everywhere=False)),
                    "guesses on every line": rated(opened, prompt(words, labels, guesses, everywhere=True)),
                    "and another word's for the last": rated(opened, prompt(words, labels, other, everywhere=True)),
                    "the guess itself": float(guesses[-1]),
                    "the mean of the ten ratings": float(np.mean(labels[:-1])),
                }
                for name, answer in answers.items():
                    squares.setdefault(name, []).append((answer - truth) ** 2)
                done(1)
            for name, values in squares.items():
                errors.setdefault(name, []).append(float(np.mean(values)))
    table = Table("prompt", "squared error", "standard error over seeds", title=f"{model}, {n} prompts, {seeds} seeds")
    for name, found in errors.items():
        spread = np.std(found, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.nan
        table.add_row(name, f"{np.mean(found):.3f}", f"{spread:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    app()
