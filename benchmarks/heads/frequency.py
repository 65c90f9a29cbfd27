"""Do counts of names in a text say whether a model follows its memory or the prompt (#8)? `manyheads bench frequency [MODEL]`.

    manyheads bench frequency                                    ladon, counts in a sample of its own training text, made again
    manyheads bench frequency smollm2 --texts wiki.txt           another model, counts in a text of yours

For each relation: slopes of `logit[stated] - logit[memorised]` on the logarithms of both counts (logits for ten times the count),
p by dealing the counts out anew, and the shares answered from the context and from memory in the half of the prompts with the
rarer names and in the other half. Prompts are of the test split.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.atlas.facts.frequency import KINDS, frequency_effects, name_counts, prompt_names
from manyheads.atlas.facts.memory_context import conflicts, known_phrasing
from manyheads.tasks import Counterfactual
from manyheads.tasks.families.counterfactual import STATEMENTS

CHUNKS = 130  # of ladon's training, 64 batches each


def ladons_text(model: mh.HeadModel, sampled: int) -> Iterator[str]:
    """Chunks of ladon's training text, evenly from its beginning to its end, as its recipe makes them."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
    from ladon_data import Reader, real_texts

    tokenizer: Any = model.tokenizer._tokenizer
    ids = [[*encoding.ids, 1] for encoding in tokenizer.encode_batch_fast(list(real_texts()))]
    reader = Reader(tokenizer, np.concatenate([np.array(one, np.uint16) for one in ids]), 0)
    for number in np.linspace(0, CHUNKS - 1, sampled).round():
        for rows, _ in reader.chunk(int(number)):
            yield from tokenizer.decode_batch(rows.tolist())


def main(
    model: Annotated[str, typer.Argument(help="ladon, smollm2, or a folder.")] = "ladon",
    texts: Annotated[Path | None, typer.Option(help="A text to count names in; ladon has its own.")] = None,
    sampled: Annotated[int, typer.Option(min=1, help="Chunks of ladon's training text to count in, of 130.")] = 6,
    n: Annotated[int, typer.Option(help="Prompts drawn for each relation, before doubles go.")] = 1500,
) -> None:
    """Print the slopes of each relation."""
    torch.set_num_threads(1)
    opened = mh.open_model(model)
    if texts is None and model != "ladon":
        raise mh.ManyheadsError("the training text of this model is not known here; name a text to count in (--texts).")
    phrasing = known_phrasing(opened)
    asked = {}
    for relation in STATEMENTS:
        task = Counterfactual(form="bare", relation=relation, phrasing=phrasing)
        different = list({one.prompt: one for one in task.examples(n, 0, "test")}.values())
        try:
            asked[relation] = conflicts(opened, different, n=len(different))
        except mh.ManyheadsError as error:
            print(f"{relation}: {error}")
    names = {name for some in asked.values() for kind in prompt_names(some).values() for name in kind}
    counts = name_counts([texts.read_text("utf-8")] if texts else ladons_text(opened, sampled), names)
    columns = ("relation", "prompts", "counts of", "names", "from ... to", "slope", "p", "rarer half", "other half")
    table = Table(*columns, title=f"{model}: counts and answers (context / memory)", title_justify="left")
    for relation, some in asked.items():
        try:
            found = frequency_effects(opened, some, counts)
        except mh.ManyheadsError as error:
            print(f"{relation}: {error}")
            continue
        for kind in KINDS:
            seen = [counts[name] for name in prompt_names(some)[kind]]
            halves = [f"{context:.2f} / {memory:.2f}" for context, memory in found.rates[kind]]
            figures = (f"{found.slopes[kind]:.2f}", f"{found.p_values[kind]:.3f}")
            span = f"{min(seen)} ... {max(seen)}"
            table.add_row(relation, str(found.n), kind, str(found.names[kind]), span, *figures, *halves)
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
