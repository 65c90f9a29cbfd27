"""VideoPlan (#1) in a small world: plain training, multi-token heads, auxiliary tasks, both. Equal steps, equal data.

    manyheads bench planning [--threads 1] [--episodes 200] [--steps 400] [--seeds 3]

The world: 10 goals, each a script of 7 of 24 two-word actions, of which any may be skipped. A "video" is what is seen of the
actions done: their words, some missing, among distractors. A Llama of 2 layers and width 64 learns from scratch to plan the next
3 actions, decoded greedily and judged on other episodes. Baselines: for each goal the futures most common in training; and
the same for each goal and word seen last. Nothing says that heads or tasks must help a model this small, and they need not.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import manyheads as mh
from manyheads.draft.multi_token.model import train_multi_token
from manyheads.draft.multi_token.planning import (
    AUXILIARY,
    PLAN,
    Episode,
    PlanScores,
    encode_exercises,
    exercises,
    plan_scores,
    predict_plans,
)
from manyheads.lab.small_llama import llama_config
from manyheads.training import TrainSettings

VERBS = ("add", "cut", "heat", "mix", "pour", "wash")
NOUNS = ("egg", "milk", "pan", "rice")
ACTIONS = tuple(f"{verb} {noun}" for verb in VERBS for noun in NOUNS)
GOALS = tuple(f"make dish {name}" for name in "abcdefghij")
DISTRACTORS = ("hand", "table", "window", "radio", "cat", "lamp")
STEPS, HORIZON = 7, 3
WAYS = {"plain": (1, False), "heads": (4, False), "tasks": (1, True), "both": (4, True)}


@dataclass(frozen=True)
class World:
    """Scripts and a tokenizer that knows all their words."""

    scripts: dict[str, tuple[str, ...]]
    tokenizer: Any

    @classmethod
    def build(cls, seed: int = 0) -> World:
        """Random scripts that share their actions."""
        rng = random.Random(f"world/{seed}")
        scripts = {goal: tuple(rng.sample(ACTIONS, STEPS)) for goal in GOALS}
        said = [task.exercise(Episode("", "", (), ())).prompt for task in (PLAN, *AUXILIARY)]
        words = Whitespace().pre_tokenize_str(" ".join([*said, *ACTIONS, *GOALS, *DISTRACTORS, ";"]))
        known = ["<pad>", "<end>", *sorted({word for word, _ in words})]
        bare = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<pad>"))
        bare.pre_tokenizer = Whitespace()  # type: ignore[assignment]
        return cls(scripts, PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<end>"))

    def episodes(self, n: int, seed: int) -> list[Episode]:
        """`n` of them: every step of a script is skipped with probability 0.1, every word seen is lost with 0.15."""
        rng = random.Random(f"episodes/{seed}")
        found: list[Episode] = []
        while len(found) < n:
            goal = rng.choice(GOALS)
            done = [action for action in self.scripts[goal] if rng.random() > 0.1]
            if len(done) <= HORIZON:
                continue
            cut = rng.randint(1, len(done) - HORIZON)
            past = tuple(done[:cut])
            seen = [word for action in past for word in (*action.split(), rng.choice(DISTRACTORS))]
            video = " ".join(word for word in seen if rng.random() > 0.15)
            found.append(Episode(video, goal, past, tuple(done[cut : cut + HORIZON])))
        return found


def most_common(train: list[Episode], test: list[Episode], *, by_last: bool) -> PlanScores:
    """Per goal (and last word seen that belongs to an action), the future that training showed most."""
    words = {word for action in ACTIONS for word in action.split()}

    def key(episode: Episode) -> tuple[str, ...]:
        seen = [word for word in episode.video.split() if word in words]
        return (episode.goal, *(seen[-2:] if by_last else ()))

    counts: dict[tuple[str, ...], Counter[tuple[str, ...]]] = {}
    for episode in train:
        for name in (key(episode), (episode.goal,), ()):
            counts.setdefault(name, Counter())[episode.future] += 1
    known = [next(name for name in (key(e), (e.goal,), ()) if name in counts) for e in test]
    guesses = [counts[name].most_common(1)[0][0][: len(e.future)] for name, e in zip(known, test, strict=True)]
    return plan_scores(guesses, [e.future for e in test])


def planner(world: World, train: list[Episode], way: str, *, steps: int, rows: int = 16, seed: int = 0) -> mh.HeadModel:
    """A model trained from scratch in one of the four ways."""
    heads, recycled = WAYS[way]
    torch.manual_seed(seed)
    config = llama_config(
        len(world.tokenizer),
        64,
        2,
        4,
        intermediate_size=256,
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=world.tokenizer.eos_token_id,
        pad_token_id=world.tokenizer.pad_token_id,
    )
    model = mh.open_model(LlamaForCausalLM(config), tokenizer=world.tokenizer)
    tasks = (PLAN, *AUXILIARY) if recycled else (PLAN,)

    def batch_at(number: int) -> dict[str, torch.Tensor]:
        return encode_exercises(world.tokenizer, exercises(train, rows, tasks=tasks, seed=1000 * seed + number))

    settings = TrainSettings(steps=steps, rate=2e-3, warmup=40, weight_decay=0.01, precision="fp32", seed=seed)
    train_multi_token(model, batch_at, settings, n=heads)
    return model


def main(
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    episodes: Annotated[int, typer.Option(help="Episodes to learn from.")] = 200,
    steps: Annotated[int, typer.Option(help="Training steps of 16 exercises, the same for all.")] = 400,
    seeds: Annotated[int, typer.Option(help="Runs of each, with other worlds and weights.")] = 3,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    found: dict[str, list[PlanScores]] = {}
    started = time.perf_counter()
    for seed in range(seeds):
        world = World.build(seed)
        train, test = world.episodes(episodes, 2 * seed), world.episodes(400, 2 * seed + 1)
        found.setdefault("most common for the goal", []).append(most_common(train, test, by_last=False))
        found.setdefault("and for the words seen last", []).append(most_common(train, test, by_last=True))
        for way in WAYS:
            plans = predict_plans(planner(world, train, way, steps=steps, seed=seed), test, ACTIONS)
            found.setdefault(way, []).append(plan_scores(plans, [e.future for e in test]))
    minutes = (time.perf_counter() - started) / 60
    table = Table(title=f"next 3 actions, {episodes} episodes, {steps} steps, {seeds} seeds ({minutes:.1f} min)")
    for column in ("way", "SR (range)", "mAcc", "mIoU", "SR against plain, per seed"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, scores in found.items():
        rates = [score.success_rate for score in scores]
        gaps = [f"{100 * (a - b.success_rate):+.1f}" for a, b in zip(rates, found["plain"], strict=True)]
        table.add_row(
            way,
            f"{np.mean(rates):.3f} ({min(rates):.3f}-{max(rates):.3f})",
            f"{np.mean([score.mean_accuracy for score in scores]):.3f}",
            f"{np.mean([score.mean_iou for score in scores]):.3f}",
            "" if way == "plain" else " ".join(gaps),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
