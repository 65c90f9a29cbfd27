"""The judges by name: what each behaviour's heads are ablated on."""

from __future__ import annotations

from manyheads.atlas.core.causal import Judge, repeats_judge, representation_judge, task_judge, text_judge
from manyheads.atlas.core.repeats import repeats
from manyheads.atlas.patterns.ngram import ngram_judge
from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Counterfactual, Needle, Refusal, Task, get_task
from manyheads.tasks.texts import passages

# Where a family as it stands is not what should be judged: short haystacks do, and only marked requests are refused.
JUDGING: dict[str, Task] = {
    "needle": Needle(shortest=32, longest=64),
    "refusal": Refusal(marked=True),
    "context": Counterfactual(form="context"),
    "memory": Counterfactual(form="memory"),
}


def make_judge(model: HeadModel, name: str, seed: int = 1) -> Judge:
    """The judge called `name`: "repeats", "text", "ngram2" (order 2), or a task family.

    Encoders are judged by what becomes of their representation of the same inputs. `InputError` where a tokenizer or its words
    are missing, `UnsupportedError` for a task and an encoder.
    """
    if not model.is_causal:
        if name not in ("repeats", "text"):
            raise UnsupportedError(f"the task {name} needs a model that predicts the next token.")
        rows = (
            repeats(model, 12, 32, seed)[0] if name == "repeats" else passages(model, None, n=12, length=64, seed=seed)
        )
        return representation_judge(model, rows)
    if name == "repeats":
        return repeats_judge(model, seed=seed)
    if name == "text":
        return text_judge(model, seed=seed)
    if name.startswith("ngram"):
        return ngram_judge(model, order=int(name[5:]), seed=seed)
    task = JUDGING.get(name) or get_task(name)
    return task_judge(model, task, n=12 if name == "needle" else 32, seed=seed)
