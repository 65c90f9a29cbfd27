"""Every verb on a real model: what it gives, beside its control, and what it costs. `manyheads bench real [--only prune,diff]`.

    explain     six prompts: the five largest parts of the logit difference, and what it loses without its five largest heads,
                beside 20 random sets of the same layers
    prefer      answers from the prompt instead of memory, by pruning heads found on other facts, beside random heads; by scaling
    lofit       a task that the model half knows: accuracy on held-out words before and after, and with random heads
    inject      the same task by soft injection, and with the learned gates shuffled
    prune       grouped: one query head of three on each KV head (6 on 3 from 9 on 3); uneven: as many heads of any layer; as many
                in whole groups. Loss on text, of those whose loss the gradient estimates least and of random ones; masked, and
                for good
    guard       the heads that carry most refusals, or why there are none
    influence   documents a minute (128 tokens each), beside plain forward passes over the same documents
    diff        an edited copy beside the model: whether the heads whose roles changed are those that were edited
    gating      causal head gating on a task, as near to five processor minutes as the least rows, fits and steps allow
    sae         see `manyheads bench sae`

Each result is a file in --out as soon as it is there; those that are there are not computed again, and interrupted training goes
on (its seconds are then those of the last call). Seconds are of the processor, memory is the most that the process held.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measuring import highest_memory
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.atlas.circuits.gating import gating
from manyheads.atlas.core.judges import text_judge
from manyheads.atlas.core.screening import estimated_effects
from manyheads.atlas.facts.prefer import prefer
from manyheads.atlas.retrieval_heads.influence import influence
from manyheads.atlas.surveys.diff import diff
from manyheads.edit.learn.examples import of_task
from manyheads.edit.learn.lesson import learn_edit
from manyheads.edit.refusal_guard import guard
from manyheads.errors import UnsupportedError
from manyheads.evaluation.controls import matched_sets, p_value, random_sets
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
GATING = 5.0  # processor minutes
Result = dict[str, Any]


def explain(model: mh.HeadModel, _: Path) -> Result:
    return {prompt: _explained(model, prompt) for prompt in PROMPTS}


def _explained(model: mh.HeadModel, prompt: str) -> Result:
    """The largest parts, and the logit difference without the heads that favour the answer most, or as many others."""
    found, inputs = mh.explain(model, prompt), model.inputs([prompt])
    best = model.logits(inputs)[0, -1].topk(2).indices
    heads, mean = found.heads.top(5), model.mean_z(inputs)
    sets = [heads, *matched_sets(heads, 20, shape=model.shape)]
    edits = [mh.Scale([], 1.0), *(mh.Ablate(one, "mean", mean) for one in sets)]
    values = model.sweep(inputs, edits, lambda logits: logits[:, -1, best[0]] - logits[:, -1, best[1]], keep=1)[:, 0]
    lost = values[0] - values[1:]
    return {
        "answer": f"{found.answer} {found.probability:.2f}, against {found.against}",
        "logit difference": round(found.difference, 2),
        "largest parts": {row.node: round(row.score, 2) for row in found.to_frame().head(5).itertuples()},
        "five heads": str(heads),
        "lost without them": round(float(lost[0]), 2),
        "random": _spread(lost[1:]),
        "p": round(p_value(lost[0], lost[1:]), 3),
    }


def _spread(values: Any) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def preferring(model: mh.HeadModel, _: Path) -> Result:
    return {
        "pruning": prefer(model, "context", n=32).effect,
        "scaling": prefer(model, "context", scale=True, n=32).effect,
    }


@cache
def _half_known(model: mh.HeadModel) -> tuple[ByExample, float]:
    """The relation and number of examples by which the model answers nearest to half of the training content."""
    tried = {}
    for relation in ("plural", "opposite", "french", "spanish"):
        for shots in (0, 2):
            task = ByExample(relation=relation, shots=shots)
            tried[task] = task_verdict(model, task, n=32, split="train").answered
    task = min(tried, key=lambda one: abs(tried[one] - 0.5))
    return task, tried[task]


def _learned(model: mh.HeadModel, method: Any, folder: Path) -> Result:
    task, answered = _half_known(model)
    shown = [one.prompt for one in ByExample(relation=task.relation, shots=4).examples(32, 7, "train")]
    found = learn_edit(model, of_task(task, 96, 0), method, folder=folder, demonstrations=shown, controls=2)
    return {"task": repr(task), "answered in training": answered, **found.effect}


def lofit(model: mh.HeadModel, folder: Path) -> Result:
    return _learned(model, "lofit", folder)


def inject(model: mh.HeadModel, folder: Path) -> Result:
    return _learned(model, "inject", folder)


def prune(model: mh.HeadModel, _: Path) -> Result:
    """Heads of least estimated loss and random ones: as many of each group for good, as many anywhere masked."""
    estimates = np.abs(estimated_effects(model, text_judge(model, n=8))).mean(0)
    rows = passages(model, None, n=16, length=64, seed=9)
    rng = np.random.default_rng(0)

    def loss(one: mh.HeadModel) -> float:
        log_p = one.logits(rows)[:, :-1].float().log_softmax(-1)
        return round(float(-log_p.gather(-1, rows[:, 1:, None]).mean()), 3)

    def masked(heads: mh.HeadSet) -> float:
        with model.editing(mh.Scale(heads, 0.0)):
            return loss(model)

    group = model.n_heads // model.n_kv_heads
    groups = np.arange(model.n_heads).reshape(model.n_kv_heads, group)

    def of_each_group(pick: Callable[[int, np.ndarray], int]) -> mh.HeadModel:
        return model.prune([(layer, int(pick(layer, some))) for layer in range(model.n_layers) for some in groups])

    found: Result = {"loss": loss(model), "parameters": sum(weight.numel() for weight in model.plain.parameters())}
    least = of_each_group(lambda layer, some: some[estimates[layer, some].argmin()])
    found |= {"heads": [least.n_heads, least.n_kv_heads], "grouped, least": loss(least)}
    found["grouped, parameters"] = sum(weight.numel() for weight in least.plain.parameters())
    found["grouped, random"] = [loss(of_each_group(lambda _, some: rng.choice(some))) for _ in range(3)]
    ranked = sorted(model.heads, key=lambda head: estimates[head])
    uneven = model.head_set(ranked[: len(ranked) // group])
    found |= {"uneven, least, masked": masked(uneven), "uneven": str(uneven)}
    found["uneven, random, masked"] = [masked(one) for one in random_sets(uneven, 3, shape=model.shape)]
    of_groups = sorted(
        np.ndindex(model.n_layers, model.n_kv_heads), key=lambda at: estimates[at[0], groups[at[1]]].sum()
    )
    whole = model.head_set([(layer, int(h)) for layer, g in of_groups[: len(of_groups) // group] for h in groups[g]])
    found["whole groups"] = str(whole)
    found["whole groups, random, masked"] = [masked(_groups_like(model, whole, groups, rng)) for _ in range(3)]
    for name, heads in (("uneven", uneven), ("whole groups", whole)):
        try:
            small = model.prune(heads)
        except UnsupportedError as error:
            found[f"{name}, for good"] = str(error)
            continue
        found[f"{name}, for good"] = loss(small)
        found[f"{name}, parameters"] = sum(weight.numel() for weight in small.plain.parameters())
    return found


def _groups_like(model: mh.HeadModel, heads: mh.HeadSet, groups: np.ndarray, rng: np.random.Generator) -> mh.HeadSet:
    """As many whole groups of any layers."""
    every = list(np.ndindex(model.n_layers, model.n_kv_heads))
    picked = rng.permutation(len(every))[: len(heads) // groups.shape[1]]
    return model.head_set([(every[i][0], int(h)) for i in picked for h in groups[every[i][1]]])


def guarding(model: mh.HeadModel, _: Path) -> Result:
    return {"first": guard(model, n=16).head(3).to_dict("records")}


def influencing(model: mh.HeadModel, _: Path) -> Result:
    documents = [model.tokenizer.decode(row) for row in passages(model, None, n=64, length=128, seed=3)]
    heads = mh.atlas.retrieval(model, n=16).top(len(model.heads) // 20)
    rows = passages(model, None, n=64, length=128, seed=3)
    plain = _minute(lambda: [model.logits(some) for some in rows.split(8)], len(documents))
    found: list[Any] = []
    ours = _minute(lambda: found.append(influence(model, documents, heads=heads, max_tokens=128)), len(documents))
    score = found[0].score
    return {
        "documents a processor minute": ours,
        "plain passes alone": plain,
        "threads": torch.get_num_threads(),
        "heads": str(heads),
        "scores": [round(float(x), 3) for x in np.quantile(score, (0, 0.5, 1))],
    }


def _minute(work: Callable[[], Any], count: int) -> int:
    """How many of `count` things that `work` does fit into a processor minute."""
    started = time.process_time()
    work()
    return round(60 * count / (time.process_time() - started))


def diffing(model: mh.HeadModel, _: Path) -> Result:
    """Three induction heads are scaled to nothing and baked in: the atlases of both say which heads lost a role."""
    heads = mh.atlas.induction(model, n=8).top(3)
    edited = model.bake(mh.Scale(heads, 0.0))
    names = ["induction", "previous_token", "duplicate_token", "first_token", "positional", "copying"]
    both = [mh.atlas.survey(one, names, checks=False, n=8) for one in (model, edited)]
    found = diff(*both)
    sure = found.heads[found.heads["surely"] & (found.heads["call"] != "")]
    return {
        "edited": str(heads),
        "silent": both[1].card["silent"],
        "roles changed": found.roles.to_dict("records"),
        "surely": [f"{row.head} {row.behaviour} {row.call} by {row.change:.2f}" for row in sure.itertuples()],
        "agreement": {name: round(value, 3) for name, value in found.agreement.items()},
    }


def gates(model: mh.HeadModel, _: Path) -> Result:
    found = gating(model, get_task("repeat"), minutes=GATING)
    scores = {name: int((one.values > 0.5).sum()) for name, one in found.items()}
    meta = found["facilitating"].meta
    return {"heads above .5": scores, "nll": meta["nll"], "settings": meta.get("settings", {})}


JOBS: dict[str, Callable[[mh.HeadModel, Path], Result]] = {
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


def costed(job: Callable[[mh.HeadModel, Path], Result], model: mh.HeadModel, folder: Path) -> Result:
    """A job's result, or why there is none, with its processor seconds and the most memory that the process held."""
    found: Result = {}

    def work() -> None:
        try:
            found.update(job(model, folder))
        except mh.ManyheadsError as error:
            found["cannot"] = str(error)

    started = time.process_time()
    most = highest_memory(work, 0.05)
    return found | {"seconds": round(time.process_time() - started, 1), "GB": round(most / 1e9, 2)}


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
    table = Table("verb", "processor s", "GB", "result", title=f"Every verb on {model}", title_justify="left")
    for name in only.split(","):
        file = out / f"{name}.json"
        if not file.is_file():
            result = costed(JOBS[name], opened, out / f"{name}.work")
            text = json.dumps(result, indent=1, default=str)
            write_atomically(file, lambda path, text=text: path.write_text(text, "utf-8"))  # type: ignore[misc]
        result = json.loads(file.read_text("utf-8"))
        costs = f"{result.pop('seconds'):.0f}", f"{result.pop('GB'):.1f}"
        table.add_row(name, *costs, json.dumps(result, ensure_ascii=False)[:3000])
        table.add_section()
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
