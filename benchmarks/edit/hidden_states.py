"""Hidden-state optimisation (#83) on a model of yours: text as it is and enciphered, and answers after demonstrations.

    manyheads bench hidden_states [--model FOLDER] [--texts 4] [--draws 4] [--threads 1]

1. Perplexity against unmoved states on passages of Python's language reference, as it is and with its letters exchanged, beside
   shuffled gradients and one temperature chosen on the text itself
2. Words by example after four demonstrations, whose states have moved or not: nats of the answer's first token over all words,
   and how often it leads among the answers to all queries; paired differences with their standard errors over queries
"""

from __future__ import annotations

import random
import string
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn import functional as F

import manyheads as mh
from manyheads.edit.inference_time.hidden_state_optimisation import StateSteps, optimise_states, score_answers
from manyheads.heads import mean_stderr
from manyheads.tasks.families.by_example import RELATIONS
from manyheads.tasks.texts import passages

LENGTH = 257
TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
SHOTS, QUERIES = 4, 8


def cipher(text: str) -> str:
    """Every letter is another one, the same throughout."""
    letters = random.Random(1).sample(string.ascii_lowercase, 26)
    return text.translate(str.maketrans(string.ascii_lowercase, "".join(letters)))


def perplexities(model: mh.HeadModel, n: int) -> None:
    """Part 1."""
    text = "\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 1500)
    for name, shift in (("as it is", str), ("enciphered", cipher)):
        sources = [shift(text)[at : at + 30_000] for at in range(0, n * 30_000, 30_000)]
        ids = passages(model, sources, n=n, length=LENGTH, seed=5)
        plain = optimise_states(model, ids, StateSteps(eta=0.0)).nll
        print(f"{name}: perplexity {plain.mean().exp():.1f}, {n} passages of {LENGTH} tokens")
        for how in (StateSteps(), StateSteps(shuffled=0)):
            change = (optimise_states(model, ids, how).nll - plain).mean(1)
            mean, error = mean_stderr(change.numpy(force=True))
            steps = f"eta {how.eta}" + (", shuffled gradients" if how.shuffled is not None else "")
            print(f"    {steps}: times {np.exp(mean):.3f} (standard error of the log {error:.3f})")
        logits, targets = model.logits(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(model.device)
        best = min(float(F.cross_entropy(logits / t, targets)) for t in TEMPERATURES)
        print(f"    the best temperature: times {np.exp(best - float(plain.mean())):.3f}", flush=True)


def few_shot(model: mh.HeadModel, relation: str, draws: int) -> None:
    """Part 2, one relation."""
    ways = {
        "unmoved": StateSteps(eta=0.0),
        "moved": StateSteps(),
        "moved, windows of 8": StateSteps(window=8),
        "shuffled, windows of 8": StateSteps(window=8, shuffled=0),
    }
    nats: dict[str, list[float]] = {name: [] for name in ways}
    leads: dict[str, list[float]] = {name: [] for name in ways}
    first = {
        y: model.tokenizer(" " + y, add_special_tokens=False)["input_ids"][0] for y in RELATIONS[relation].values()
    }
    for draw in range(draws):
        pairs = random.Random(draw).sample(sorted(RELATIONS[relation].items()), SHOTS + QUERIES)
        shown = "".join(f"* {x} -> {y}\n" for x, y in pairs[:SHOTS])
        queries = [f"* {x} ->" for x, _ in pairs[SHOTS:]]
        right = torch.tensor([first[y] for _, y in pairs[SHOTS:]])
        for name, how in ways.items():
            scores = score_answers(model, optimise_states(model, shown, replace(how)), queries, right).cpu()
            nats[name] += (-scores.diagonal()).tolist()
            leads[name] += (scores.argmax(1) == torch.arange(len(queries))).float().tolist()
    for name in ways:
        apart, error = mean_stderr(np.array(nats[name]) - np.array(nats["unmoved"]))
        print(
            f"{relation}, {name}: {np.mean(nats[name]):.3f} nats ({apart:+.3f}, standard error {error:.3f}), "
            f"leads {np.mean(leads[name]):.3f} of {len(leads[name])}",
            flush=True,
        )


def main(
    model: Annotated[str | None, typer.Option(help="A model of yours (default: the bundled one).")] = None,
    texts: Annotated[int, typer.Option(help="Passages.")] = 4,
    draws: Annotated[int, typer.Option(help="Draws of demonstrations.")] = 4,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    opened = mh.open_model() if model is None else mh.open_model(model)
    perplexities(opened, texts)
    for relation in RELATIONS:
        few_shot(opened, relation, draws)


if __name__ == "__main__":
    typer.run(main)
