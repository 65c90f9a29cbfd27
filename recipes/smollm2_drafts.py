"""Train draft heads (Medusa and Hydra++) for SmolLM2-135M-Instruct on its own text.

    python recipes/smollm2_drafts.py MODEL --work drafting          # again: goes on where it stopped

MODEL is the folder of the model. `--work` then holds the texts with the model's states (0.9 GB), the runs, and the drafters
`medusa` and `hydra++`, which `manyheads draft generate` and `bench` take. The texts are greedy, those of a quarter of the rows
after a few sampled tokens; `smollm2_prompts.py` has the prompts. About an hour of one core.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import manyheads as mh
from manyheads.draft import Corpus, DraftTrunk, Hydra, Medusa, Recipe, frequent, save_drafter, train
from manyheads.draft.training.corpus import greedy_texts
from manyheads.draft.training.heads import TRAINING
from manyheads.files import working_folder
from manyheads.progress import Bar, progressing
from smollm2_prompts import training_prompts

NEW, LONGEST, BATCH = 128, 56, 128
BATCHES = (
    *range(10),
    11,
    13,
    15,
    23,
)  # of the texts that are begun all; of those that are asked for some, to save time
HEADS, VOCABULARY = 4, 8192
MINUTES = {"hydra++": 26.0, "medusa": 6.0}


def corpus(model: mh.HeadModel, each: int, work: Path, bar: Bar) -> Corpus:
    """The texts of all batches that are on disk, and of those that are not, which are written first; rows are shuffled."""
    prompts = training_prompts(model.tokenizer, each)
    # A quarter of the prompts comes twice; the second text begins with a few sampled tokens.
    asked = [(row, 0) for row in prompts] + [(row, 12) for row in prompts[::4]]
    asked.sort(key=lambda pair: len(pair[0]))  # rows of one length share a batch: little padding
    parts = []
    for number, start in enumerate(range(0, len(asked), BATCH)):
        if number not in BATCHES:
            continue
        rows, sampled = zip(*asked[start : start + BATCH], strict=True)
        request = {"each": each, "new": NEW, "batch": BATCH, "seed": number}
        kept = work / "texts" / f"{number:02d}"
        if not kept.exists():
            settings: dict[str, Any] = {"new": NEW, "length": LONGEST + NEW, "sampled": sampled, "seed": number}
            greedy_texts(model, rows, **settings).save(kept, request=request)
        parts.append(Corpus.load(kept, model, request=request))
        bar(len(rows))
    whole = Corpus.of_parts(parts)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    assert whole.hidden is not None
    return replace(whole, ids=whole.ids[order], counts=whole.counts[order], hidden=whole.hidden[order])


def drafter(trunk: DraftTrunk, kind: str, vocabulary: list[int]) -> Any:
    """An untrained one. Hydra++ shares the output matrix: as good on this model, and cheaper to train and to draft with."""
    torch.manual_seed(0)
    if kind == "medusa":
        return Medusa(trunk, HEADS, vocabulary=vocabulary)
    return Hydra.plus_plus(trunk, HEADS, own_readout=False, vocabulary=vocabulary)


def main(
    model: Annotated[Path, typer.Argument(help="The folder of SmolLM2-135M-Instruct.")],
    work: Annotated[Path, typer.Option(help="Where texts, runs and drafters lie.")] = Path("drafting"),
    each: Annotated[int, typer.Option(help="Prompts of each kind.")] = 800,
    share: Annotated[float, typer.Option(help="Train for this share of the usual minutes.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
) -> None:
    """Write the texts, then train and save each drafter."""
    torch.set_num_threads(threads)
    opened = mh.open_model(str(model))
    trunk = DraftTrunk(opened)
    with progressing() as bar:
        texts = corpus(opened, each, work, bar.step("prompts answered", None))
    words = frequent(texts, VOCABULARY)
    known = torch.isin(texts.ids[texts.counts], torch.tensor(words)).float().mean()
    print(
        f"{int(texts.counts.sum())} tokens of {len(texts)} texts; the vocabulary of {len(words)} holds {known:.3f} of them"
    )
    for kind, minutes in MINUTES.items():
        if (work / kind).exists():
            continue
        made = drafter(trunk, kind, words)
        settings = replace(TRAINING, steps=None, minutes=share * minutes, rows=8, rate=2e-3, precision="bf16")
        recipe = Recipe(settings=settings)
        request = {"model": trunk.fingerprint, "kind": kind, "each": each, **asdict(recipe)}
        with working_folder(work / f"run-{kind}", request, keep=True) as folder, progressing() as bar:
            step = bar.step(f"steps of {kind}", None)
            found = train(trunk, made, texts, recipe, folder=folder, held_out=0.05, bar=step)
        about = {"steps": found.steps, "minutes": found.minutes, "loss": found.loss, "texts": len(texts)}
        save_drafter(made, trunk, work / kind, acceptance=found.acceptance, trained=about)
        print(kind, about)
        print("top 1, 3, 10 by head:", [[round(x, 3) for x in found.top(k)] for k in (1, 3, 10)])


if __name__ == "__main__":
    typer.run(main)
