"""Every verb on a real model: what it gives, beside its control, and what it costs. `manyheads bench real [--only prune,diff]`.

    explain     six prompts: logit difference, and the share of it that the five largest heads and MLPs write
    prefer      answers from the prompt instead of memory, by pruning heads found on other facts; gain beside random heads
    lofit       a task that the model half knows: accuracy before and after, and with random heads of the same layers
    inject      the same task by soft injection
    prune       one query head of each group out of three (6 heads on 3 KV heads from 9 on 3): loss on text, least and random
    guard       the head that carries most refusals, or that none are refused
    influence   documents a minute (128 tokens each) on the processor
    diff        an edited copy beside the model: which behaviours changed, and did it name the edited heads
    gating      causal head gating on a task, in its default fifteen processor minutes
    sae         see `manyheads bench sae`

Each result is a file in --out as soon as it is there; those that are there are not computed again. Seconds are of the processor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.atlas.circuits.gating import gating
from manyheads.atlas.core.judges import clean_scores, text_judge
from manyheads.atlas.core.screening import estimated_effects
from manyheads.atlas.facts.prefer import prefer
from manyheads.atlas.retrieval_heads.influence import influence
from manyheads.edit.learn.examples import of_task
from manyheads.edit.learn.lesson import learn_edit
from manyheads.edit.refusal_guard import guard
from manyheads.files import write_atomically
from manyheads.tasks import ByExample, get_task
from manyheads.tasks.texts import passages
from manyheads.tasks.verdicts import task_verdict

PROMPTS = (
    "The capital of France is",
    "When Mary and John went to the store, John gave a drink to",
    "Monday, Tuesday, Wednesday, Thursday,",
    "The opposite of hot is",
    "def add(a, b):\n    return a +",
    "One, two, three, four,",
)
Result = dict[str, Any]


def explain(model: mh.HeadModel) -> Result:
    rows = []
    for prompt in PROMPTS:
        found = mh.explain(model, prompt)
        frame = found.to_frame()
        size = frame.select_dtypes("number").iloc[:, 0].abs()
        rows.append(
            {
                "prompt": prompt,
                "answer": found.answer,
                "against": found.against,
                "largest": frame.loc[size.nlargest(5).index].iloc[:, 0].astype(str).tolist(),
            }
        )
    return {"prompts": rows}


def preferring(model: mh.HeadModel) -> Result:
    return prefer(model, "context", n=32).effect


def _half_known(model: mh.HeadModel) -> tuple[ByExample, float]:
    """The relation and number of examples by which the model answers nearest to half of the training content."""
    tried = {}
    for relation in ("plural", "opposite", "french", "spanish"):
        for shots in (0, 2):
            task = ByExample(relation=relation, shots=shots)
            tried[task] = task_verdict(model, task, n=32, split="train").answered
    task = min(tried, key=lambda one: abs(tried[one] - 0.5))
    return task, tried[task]


def _learned(model: mh.HeadModel, method: Any) -> Result:
    task, answered = _half_known(model)
    shown = [one.prompt for one in ByExample(relation=task.relation, shots=4).examples(32, 7, "train")]
    with TemporaryDirectory() as folder:
        found = learn_edit(model, of_task(task, 96, 0), method, folder=Path(folder), demonstrations=shown, controls=2)
    return {"task": repr(task), "answered in training": answered, **found.effect}


def lofit(model: mh.HeadModel) -> Result:
    return _learned(model, "lofit")


def inject(model: mh.HeadModel) -> Result:
    return _learned(model, "inject")


def prune(model: mh.HeadModel) -> Result:
    """Of each group the query head whose loss the gradient estimates least, beside a random one of each group."""
    judge = text_judge(model, n=8)
    estimates = np.abs(estimated_effects(model, judge)).mean(0)
    group = model.n_heads // model.n_kv_heads
    rng = np.random.default_rng(0)

    def chosen(pick: Callable[[int, range], int]) -> list[tuple[int, int]]:
        groups = [range(g * group, (g + 1) * group) for g in range(model.n_kv_heads)]
        return [(layer, pick(layer, members)) for layer in range(model.n_layers) for members in groups]

    rows = passages(model, None, n=16, length=64, seed=9)

    def loss(one: mh.HeadModel) -> float:
        log_p = one.logits(rows)[:, :-1].float().log_softmax(-1)
        return float(-log_p.gather(-1, rows[:, 1:, None]).mean())

    least = model.prune(chosen(lambda layer, members: min(members, key=lambda h: estimates[layer, h])))
    found = {"loss": loss(model), "least": loss(least), "heads": [least.n_heads, least.n_kv_heads]}
    found["random"] = [loss(model.prune(chosen(lambda _, members: int(rng.choice(members))))) for _ in range(3)]
    return found | {"clean judge": float(clean_scores(judge).mean())}


def guarding(model: mh.HeadModel) -> Result:
    try:
        frame = guard(model, n=16)
    except mh.ManyheadsError as error:
        return {"refused": str(error)}
    return {"first": frame.head(3).to_dict("records")}


def influencing(model: mh.HeadModel) -> Result:
    documents = [model.tokenizer.decode(row) for row in passages(model, None, n=64, length=128, seed=3)]
    heads = mh.atlas.retrieval(model, n=16).top(len(model.heads) // 20)
    started = time.process_time(), time.perf_counter()
    found = influence(model, documents, heads=heads, max_tokens=128)
    seconds = time.process_time() - started[0], time.perf_counter() - started[1]
    return {
        "documents a processor minute": 60 * len(documents) / seconds[0],
        "documents a minute": 60 * len(documents) / seconds[1],
        "threads": torch.get_num_threads(),
        "scores": len(found.to_frame()),
    }


def diffing(model: mh.HeadModel) -> Result:
    heads = mh.atlas.induction(model, n=8).top(3)
    edited = model.bake(mh.Scale(heads, 0.0))
    names = ["induction", "previous_token", "duplicate_token", "first_token", "positional", "copying"]
    a, b = (mh.atlas.survey(one, names, checks=False, n=8) for one in (model, edited))
    lost = a.found("induction") - b.found("induction")
    return {"edited": [str(h) for h in heads], "lost": [str(h) for h in lost], "silent": b.card["silent"]}


def gates(model: mh.HeadModel) -> Result:
    found = gating(model, get_task("repeat"))
    scores = {name: int((one.values > 0.5).sum()) for name, one in found.items()}
    meta = found["facilitating"].meta
    return {"heads above .5": scores, "nll": meta["nll"], "settings": meta.get("settings", {})}


JOBS: dict[str, Callable[[mh.HeadModel], Result]] = {
    "explain": explain,
    "prefer": preferring,
    "lofit": lofit,
    "inject": inject,
    "prune": prune,
    "guard": guarding,
    "influence": influencing,
    "diff": diffing,
    "gating": gates,
}


def main(
    model: Annotated[str, typer.Argument(help="A folder, or smollm2 after `manyheads fetch smollm2`.")] = "smollm2",
    only: Annotated[str, typer.Option(help="Only these, separated by commas.")] = ",".join(JOBS),
    out: Annotated[Path, typer.Option(help="Folder of the results, a file each.")] = Path("real"),
) -> None:
    """Run every verb on one model and print what it gave."""
    if unknown := set(only.split(",")) - set(JOBS):
        raise mh.ManyheadsError(f"there is no job {', '.join(sorted(unknown))}; choose from {', '.join(JOBS)}.")
    out.mkdir(parents=True, exist_ok=True)
    opened = mh.open_model(model)
    table = Table("verb", "processor s", "result", title=f"Every verb on {model}", title_justify="left")
    for name in only.split(","):
        file = out / f"{name}.json"
        if not file.is_file():
            started = time.process_time()
            try:
                result = JOBS[name](opened)
            except mh.ManyheadsError as error:
                result = {"cannot": str(error)}
            result["seconds"] = round(time.process_time() - started, 1)
            text = json.dumps(result, indent=1, default=str)
            write_atomically(file, lambda path, text=text: path.write_text(text, "utf-8"))  # type: ignore[misc]
        result = json.loads(file.read_text("utf-8"))
        table.add_row(name, str(result.pop("seconds")), json.dumps(result, ensure_ascii=False)[:1500])
        table.add_section()
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
