"""Every way to edit heads on the same two tasks of the bundled model, and LoRA (peft): what each wins, costs and breaks.

    manyheads bench edits [--threads 1] [--n 256] [--seed 0]

    memory    a prompt contradicts a known fact, and nothing says which side is right; wanted is the known answer
    French    a word, and no demonstration of what to do with it; wanted is its French

Every side learns from the same examples, stops early by the same, and is judged on the same others: content it has not seen.
Columns: share answered as wanted; change of the loss on text, in nats a token; mean change of the accuracy on 13 tasks, and the
worst; share of refusable requests that are no longer refused; numbers learned or set; seconds of processor time, finding the
heads included. Random heads are means over two to five draws; what else they change is that of the first.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import rich
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import manyheads as mh
from manyheads.atlas.circuits.repair import repair, turning_heads, wrong_columns
from manyheads.atlas.facts.conflict_paths import conflict_paths, conflict_prompts
from manyheads.atlas.facts.memory_context import conflicts, find_strength, memory_context
from manyheads.edit.effects import SideEffects, side_effects
from manyheads.edit.learn.examples import Answered, Portions, demonstrated, of_task, swapped, task_of
from manyheads.edit.learn.lofit import SELECTION, TUNING, lofit, select_heads
from manyheads.edit.learn.preferences import Preferences
from manyheads.edit.learn.selective_tuning import tune_heads, tuning_effects
from manyheads.edit.learn.soft_injection import soft_injection, task_embedding
from manyheads.edit.learn.tuning import LEARNING, answer_accuracy, prompt_length, train_module
from manyheads.heads import HeadSet
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.tasks import TASKS, ByExample, Example, encode
from manyheads.training import head_slices

WEIGHTS = replace(LEARNING, rate=1e-3)  # of slices and of LoRA: the paper's 2e-5 is for large models
MEASURE = 32


@dataclass(frozen=True)
class Case:
    """One task: examples, and the prompts that soft injection averages over."""

    model: mh.HeadModel
    portions: Portions
    few_shot: list[str]

    def answered(self, part: Sequence[Example]) -> Answered:
        """Encoded."""
        return Answered.of_texts(self.model, [e.prompt for e in part], [e.answer for e in part])

    @property
    def train(self) -> Answered:
        """What is learned from."""
        return self.answered(self.portions.train)

    @property
    def dev(self) -> Answered:
        """What says when to stop."""
        return self.answered(self.portions.dev)

    @property
    def test(self) -> Answered:
        """What is judged by."""
        return self.answered(self.portions.test)

    def right(self, edit: HeadEdit | None = None) -> float:
        """Share answered as wanted."""
        test = self.test
        return answer_accuracy(self.model, test, [] if edit is None else edit.edits(prompt_length=prompt_length(test)))


Made = list[HeadEdit] | list[mh.HeadModel] | float  # edits or models, one a draw; or the share alone


@dataclass(frozen=True)
class Way:
    """A way of editing: what makes the edit, and how many numbers it sets."""

    name: str
    make: Callable[[], Made]
    numbers: Callable[[], int]


@dataclass(frozen=True)
class Side:
    """What a way reached (means over its draws); the first draw's `effects`, if it has any to measure."""

    reached: float
    effects: SideEffects | None


def measured(case: Case, made: Made) -> Side:
    """Judge what was made."""
    if isinstance(made, float):
        return Side(made, None)
    reached = [case.right(one) if isinstance(one, HeadEdit) else answer_accuracy(one, case.test) for one in made]
    first = made[0]
    if isinstance(first, HeadEdit):
        return Side(float(np.mean(reached)), side_effects(case.model, first, n=MEASURE))
    return Side(float(np.mean(reached)), tuning_effects(case.model, first, n=MEASURE))


def memory_case(model: mh.HeadModel, n: int, seed: int) -> Case:
    """Conflicts that are to be answered from memory."""
    stated = of_task(task_of("counterfactual:form=bare"), n, seed)
    portions = Portions(*(swapped(part) for part in vars(stated).values()))
    return Case(model, portions, demonstrated(portions.train, 5, seed=seed))


def french_case(model: mh.HeadModel, n: int, seed: int) -> Case:
    """Words that are to be translated without a demonstration."""
    shown = ByExample(relation="french", shots=5).examples(50, seed, "train")
    return Case(model, of_task(ByExample(relation="french", shots=0), n, seed), [example.prompt for example in shown])


def found_heads(case: Case, n: int, seed: int) -> Iterator[Way]:
    """The ways that learn nothing: they need heads that carry the two answers."""
    model = case.model
    context: list[HeadSet] = []
    random: list[float] = []

    def scaled() -> Made:
        extremes = memory_context(model, conflicts(model, n=n // 2, seed=seed, split="train"), seed=seed)
        tuning = conflicts(model, n=n // 2, seed=seed + 1, split="train")
        heads = extremes["memory"].top(1) | extremes["context"].top(1)
        found = find_strength(model, tuning, heads, "memory", share=0.5, seed=seed)
        return [HeadEdit.of(model, found.edit, method="scaling")]

    def pruned() -> Made:
        paths = conflict_paths(model, conflict_prompts(model, n=n // 4, seed=seed, split="train"), seed=seed)
        context.append(paths["context_path"].top(5))
        return [HeadEdit.of(model, mh.Scale(context[0], 0.0), method="pruning")]

    def pruned_at_random() -> Made:
        sets = context[0].matched_random(5, seed, shape=model.shape)
        return [HeadEdit.of(model, mh.Scale(heads, 0.0), method="pruning") for heads in sets]

    def turned() -> Made:
        parts = ((case.portions.train, 32), (case.portions.test, 64))
        some, test = (encode([Example(e.prompt, e.answer, e.foil) for e in p], model.tokenizer, k) for p, k in parts)
        heads = turning_heads(model, some, wrong_columns(some), 4)
        result = repair(model, test, heads, wrong_columns(test), n_random=5, seed=seed)
        random.append(float(np.mean(result.random)))
        return result.after

    yield Way("scale one head (#8)", scaled, lambda: 1)
    yield Way("prune five heads (#82)", pruned, lambda: 5)
    yield Way("  five random heads", pruned_at_random, lambda: 5)
    yield Way("turn four heads to the stated answer (#34)", turned, lambda: 4)
    yield Way("  four random heads", lambda: random[0], lambda: 4)


def learned(case: Case, seed: int, foreign: HeadSet, heads: int, *, preferences: bool) -> Iterator[Way]:
    """The ways that learn."""
    model = case.model
    chosen: list[HeadSet] = []

    def offsets(which: HeadSet | int, draw: int = seed, *, pairs: bool = False) -> HeadEdit:
        given, dev = (
            Preferences.of_examples(model, part) if pairs else case.answered(part)
            for part in (case.portions.train, case.portions.dev)
        )
        return lofit(model, given, heads=which, dev=dev, tuning=replace(TUNING, seed=draw))

    def best() -> Made:
        edit = offsets(heads)
        chosen.append(edit.heads)
        return [edit]

    def at_random() -> Made:
        return [offsets(which, i) for i, which in enumerate(chosen[0].matched_random(2, seed, shape=model.shape))]

    def injected() -> Made:
        embedding = task_embedding(model, case.few_shot)
        return [soft_injection(model, embedding, case.train, dev=case.dev).edit]

    def tuned(which: HeadSet) -> Made:
        return [tune_heads(model, case.train, which, dev=case.dev, settings=replace(WEIGHTS, seed=seed))]

    def random_tuned() -> Made:
        return tuned(chosen[0].matched_random(1, seed, shape=model.shape)[0])

    def offset_numbers() -> int:
        return heads * model.head_dim

    def slice_numbers() -> int:
        pieces = head_slices(model, chosen[0])
        return sum(piece.weight.select(piece.dim, 0).numel() * len(piece.index) for piece in pieces)

    yield Way(f"LoFiT, {heads} chosen heads (#30)", best, offset_numbers)
    yield Way(f"  {heads} random heads of the same layers", at_random, offset_numbers)
    yield Way(f"  {heads} heads chosen for arithmetic", lambda: [offsets(foreign)], offset_numbers)
    if preferences:
        yield Way("  chosen heads, from preferences (DPO)", lambda: [offsets(chosen[0], pairs=True)], offset_numbers)
    yield Way("soft injection (#57)", injected, lambda: len(model.heads))
    yield Way(f"weights of {heads} chosen heads (#14)", lambda: tuned(chosen[0]), slice_numbers)
    yield Way(f"  {heads} random heads", random_tuned, slice_numbers)
    for rank in (1, 8) if importlib.util.find_spec("peft") is not None else ():
        yield lora(case, rank, seed)


def lora(case: Case, rank: int, seed: int) -> Way:
    """LoRA on queries and values, the usual places, through the same loop."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    module: Any = get_peft_model(copy.deepcopy(case.model.plain), config)
    numbers = sum(p.numel() for p in module.parameters() if p.requires_grad)

    def log_p(trained: nn.Module, some: Answered) -> torch.Tensor:
        return some.log_p(first_logits(trained(**some.inputs(case.model), **no_cache(case.model.plain))))

    def make() -> Made:
        train_module(module, case.train, replace(WEIGHTS, seed=seed), log_p, dev=case.dev)
        merged = module.merge_and_unload().to(case.model.device).eval()
        return [mh.open_model(merged, tokenizer=case.model.tokenizer)]

    return Way(f"LoRA, rank {rank}", make, lambda: numbers)


def effects(side: Side) -> list[str]:
    """Text, other tasks, refusals."""
    if side.effects is None:
        return ["", "", ""]
    change = side.effects.to_frame().set_index("measure")["change"]
    others = change[[name for name in TASKS if name in change]]
    text = f"{change['text']:+.2f}" if "text" in change else ""
    lost = change[["refusable answered", "refusable nonsense"]].sum()
    return [text, f"{others.mean():+.2f} ({others.idxmin()} {others.min():+.2f})", f"{lost:+.2f}"]


def main(
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    n: Annotated[int, typer.Option(help="Examples of each task.")] = 256,
    heads: Annotated[int, typer.Option(help="Heads to tune: 3 % of 48 is 1.4.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    rich.get_console().quiet = True  # the training bars
    model = mh.open_model()
    foreign = select_heads(
        model, Answered.of_task(model, TASKS["arithmetic"], n), settings=replace(SELECTION, epochs=2)
    ).top(heads)
    table = Table(title=f"{n} examples a task, seed {seed}", title_justify="left")
    for column in ("edit", "as wanted", "text", "other tasks (worst)", "refusals lost", "numbers", "seconds"):
        table.add_column(column, justify="left" if column == "edit" else "right")
    memory, french = memory_case(model, n, seed), french_case(model, n, seed)
    ways = {
        "memory": (memory, [*found_heads(memory, n, seed), *learned(memory, seed, foreign, heads, preferences=True)]),
        "French": (french, [*learned(french, seed, foreign, heads, preferences=False)]),
    }
    for name, (case, list_of_ways) in ways.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/bold]: nothing", f"{case.right():.2f}", "", "", "", "0", "")
        for way in list_of_ways:
            at = time.process_time()
            made = way.make()
            seconds = (time.process_time() - at) / (len(made) if isinstance(made, list) else 1)
            side = measured(case, made)
            table.add_row(way.name, f"{side.reached:.2f}", *effects(side), f"{way.numbers():,}", f"{seconds:.0f}")
            print(
                f"{time.process_time():.0f} s, {name}: {way.name.strip()}, {side.reached:.2f}, {seconds:.0f} s",
                file=sys.stderr,
            )
    console = Console(width=130)
    console.print(table)
    console.print(f"{time.process_time():.0f} s in all; heads chosen for arithmetic: {foreign}.")
    if importlib.util.find_spec("peft") is None:
        console.print("LoRA was left out; install it with pip install peft.")


if __name__ == "__main__":
    typer.run(main)
