"""Drafting measured: speed by kind of prompt on SmolLM2, draft heads with parts removed, and rules for when to stop.

    python benchmarks/draft.py kinds MODEL --drafters drafting     # or: manyheads bench draft kinds MODEL --drafters drafting
    python benchmarks/draft.py parts MODEL --work drafting
    python benchmarks/draft.py stopping --work drafters

The first two take SmolLM2-135M-Instruct's folder and what `recipes/smollm2_drafts.py` made. The last takes ladon, and trains a
drafter first if `--work` lacks one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.draft import (
    Chain,
    Chimera,
    Clover,
    CombinedDrafter,
    Corpus,
    DraftHeads,
    DraftTrunk,
    Hydra,
    Medusa,
    PromptLookup,
    Recipe,
    confidence,
    frequent,
    learn_acceptance,
    load_drafter,
    observed_examples,
    own_texts,
    rank_acceptance,
    sampled_and_greedy,
    save_drafter,
    train,
    with_states,
)
from manyheads.draft.bench import Contender, NoGuesses, bench, sum_of
from manyheads.draft.core.costs import pass_costs
from manyheads.draft.core.decode import Tally, generate
from manyheads.draft.training.heads import TRAINING, drafting_loss, rows_of
from manyheads.draft.training.stopping import AcceptanceExamples, acceptance_auc
from manyheads.files import working_folder
from manyheads.model.packing import Packed
from manyheads.pages.draft import bench_table, kinds_table
from manyheads.progress import progressing
from manyheads.training import drawn_rows, fit

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from smollm2_prompts import held_out_prompts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Threads = Annotated[int, typer.Option(help="Threads. One: processor time is measured.")]
TEXTS, LENGTH, HEADS, VOCABULARY = 4000, 128, 6, 2048


@app.command()
def kinds(
    model: Annotated[str, typer.Argument(help="The model's folder.")],
    drafters: Annotated[Path, typer.Option(help="The folder with the drafters medusa and hydra++.")],
    each: Annotated[int, typer.Option(help="Held-out prompts of each kind, 12 at most.")] = 8,
    length: Annotated[int, typer.Option(help="New tokens for each.")] = 96,
    repeats: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 1,
    unpacked: Annotated[bool, typer.Option("--unpacked", help="Also without packed weights.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write bench.html here.")] = None,
    threads: Threads = 1,
) -> None:
    """What passes cost, and every drafter with growth="auto" against plain `generate`, by kind of held-out prompt."""
    torch.set_num_threads(threads)
    console = Console(width=170)
    opened = mh.open_model(model)
    trunk = DraftTrunk(opened)
    for wanted in (False, True):
        with Packed(opened.plain, wanted=wanted) as packing:
            costs = pass_costs(opened, 1, packing.on)
        curve = ", ".join(f"{n}: {1e3 * seconds:.0f}" for n, seconds in costs.measured.items())
        console.print(f"ms of a pass by its tokens, {'packed' if wanted else 'as PyTorch has it'}: {curve}")
    medusa, hydra = (load_drafter(drafters / kind, trunk).drafter for kind in ("medusa", "hydra++"))
    contenders = [
        Contender("no guesses", NoGuesses()),
        Contender("prompt lookup", PromptLookup()),
        Contender("Medusa", medusa),
        Contender("Hydra++", hydra),
        Contender("Hydra++ and lookup", CombinedDrafter(hydra, PromptLookup())),
    ]
    if unpacked:
        contenders += [
            Contender("no guesses, not packed", NoGuesses(), packed=False),
            Contender("lookup, not packed", PromptLookup(), packed=False),
            Contender("Hydra++ and lookup, not packed", CombinedDrafter(hydra, PromptLookup()), packed=False),
        ]
    prompts = {kind: rows[:each] for kind, rows in held_out_prompts(opened.tokenizer).items()}
    with progressing() as bar:
        step = bar.step("decoding", (len(prompts) + repeats * 4 * each) * (1 + len(contenders)))
        found = bench(opened, contenders, prompts, max_new_tokens=length, repeats=repeats, bar=step)
    console.print(bench_table(found))
    console.print(kinds_table(found))
    if out is not None:
        found.report(out)


class FrequentTrunk(DraftTrunk):
    """A trunk that knows its most frequent tokens only, numbered anew, and one more that stands for all others.

    Heads with an output matrix as large as the model's cost too much to train them many times over.
    """

    def __init__(self, model: mh.HeadModel, words: list[int]) -> None:
        super().__init__(model)
        self.words = torch.tensor(words)
        rows = self.embedding.weight.detach()
        self._embedding = torch.cat([rows[self.words], rows.mean(0, keepdim=True)])
        readout = self.unembedding.weight.detach()
        self._readout = torch.cat([readout[self.words], torch.zeros_like(readout[:1])])

    @property
    def readout(self) -> torch.Tensor:
        return self._readout

    @property
    def vocab_size(self) -> int:
        return len(self._readout)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self._embedding)

    def renumbered(self, corpus: Corpus) -> Corpus:
        """The same texts; tokens outside the vocabulary do not count."""
        place = torch.full((self.model.vocab_size,), len(self.words))
        place[self.words] = torch.arange(len(self.words))
        ids = place[corpus.ids]
        return replace(corpus, ids=ids, counts=corpus.counts & (ids < len(self.words)))


def _without_context(trunk: DraftTrunk) -> Chimera:
    """Chimera whose layer adds nothing: its outputs are the trigram features."""
    made = Chimera(trunk, 3)
    for matrix in (made.context.layer.self_attn.o_proj, made.context.layer.mlp.down_proj):
        matrix.weight.requires_grad_(False)  # they begin at zero
    return made


def _without_trigrams(trunk: DraftTrunk) -> Chimera:
    """Chimera whose features are zero: the layer sees positions and states."""
    made = Chimera(trunk, 3)
    made.trigrams.requires_grad_(False)
    for weight in made.trigrams.parameters():
        weight.data.zero_()
    return made


PARTS: dict[str, Callable[[DraftTrunk], DraftHeads]] = {
    "Medusa": lambda trunk: Medusa(trunk, 3, own_readout=False),
    "Hydra": lambda trunk: Hydra(trunk, 3, own_readout=False),
    "Hydra++": lambda trunk: Hydra.plus_plus(trunk, 3, own_readout=False),
    "Hydra++, no prefix layer": lambda trunk: Hydra(trunk, 3, layers=4, own_readout=False),
    "Clover": lambda trunk: Clover(trunk, 3),
    "Clover, no attention": lambda trunk: Clover(trunk, 3, attention=False),
    "Clover, not regressive": lambda trunk: Clover(trunk, 3, regressive=False),
    "Clover, no layer": lambda trunk: Clover(trunk, 3, augmenting=False),
    "Chimera": lambda trunk: Chimera(trunk, 3),
    "Chimera, no trigrams": _without_trigrams,
    "Chimera, no context": _without_context,
}


@app.command()
def parts(
    model: Annotated[str, typer.Argument(help="The model's folder.")],
    work: Annotated[Path, typer.Option(help="The work folder of recipes/smollm2_drafts.py, which has the texts.")],
    steps: Annotated[int, typer.Option(help="Steps of 8 texts, for each.")] = 300,
    vocabulary: Annotated[int, typer.Option(help="The most frequent tokens that count.")] = 2048,
    only: Annotated[str, typer.Option(help="Names begin with this.")] = "",
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of first weights and batches.")] = 0,
    threads: Threads = 1,
) -> None:
    """Train each draft head on the same texts, equally long, whole and with a part removed; acceptance on held-out texts."""
    torch.set_num_threads(threads)
    opened = mh.open_model(model)
    whole = Corpus.of_parts([Corpus.load(folder, opened) for folder in sorted((work / "texts").iterdir())])
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    assert whole.hidden is not None
    whole = replace(whole, ids=whole.ids[order], counts=whole.counts[order], hidden=whole.hidden[order])
    trunk = FrequentTrunk(opened, frequent(whole, vocabulary))
    learnt_from, judged = trunk.renumbered(whole).split(0.08)
    settings = replace(TRAINING, steps=steps, rows=8, rate=rate, precision="bf16", seed=seed)
    print(f"{len(learnt_from)} texts, {len(judged)} held out; {settings}")
    print("top 1 of heads 1, 2, 3 | top 5 | expected tokens a pass of a chain of three")
    for name, build in PARTS.items():
        if not name.startswith(only):
            continue
        torch.manual_seed(seed)
        drafter = build(trunk)
        recipe = Recipe(settings=settings)

        def batch_at(number: int) -> dict[str, torch.Tensor]:
            return rows_of(learnt_from, drawn_rows(len(learnt_from), settings.rows, number, seed))

        def loss(module: torch.nn.Module, batch: Any, recipe: Recipe = recipe) -> torch.Tensor:
            return drafting_loss(trunk, module, batch, recipe)  # type: ignore[arg-type]

        fit(drafter, batch_at, settings, loss=loss)
        found = rank_acceptance(trunk, drafter, judged)
        best = found[:, 0].tolist()
        chain = 1 + sum(torch.tensor(best).cumprod(0).tolist())
        top5 = " ".join(f"{x:.3f}" for x in found[:, :5].sum(1).tolist())
        print(f"{name}: {' '.join(f'{x:.3f}' for x in best)} | {top5} | {chain:.2f}", flush=True)


def ladon_drafter(model: mh.HeadModel, kind: str, work: Path, minutes: float) -> tuple[Any, Corpus]:
    """Ladon's drafter of this kind, trained now on ladon's own texts if it is not there; and the texts."""
    request = {"texts": TEXTS, "length": LENGTH}
    if not (work / "corpus").exists():
        words = sampled_and_greedy(model, TEXTS, LENGTH, through_stops=True, rows=100, seed=1)
        with_states(model, words).save(work / "corpus", request=request)
    corpus = Corpus.load(work / "corpus", model, request=request)
    trunk = DraftTrunk(model)
    if not (work / kind / "head.json").exists():
        torch.manual_seed(0)
        made = Hydra.plus_plus(trunk, HEADS, vocabulary=frequent(corpus, VOCABULARY))
        settings = replace(TRAINING, steps=None, minutes=minutes, rows=8, rate=3e-3, precision="bf16")
        asked = {"model": trunk.fingerprint, "minutes": minutes, **request}
        with working_folder(work / f"run-{kind}", asked, keep=True) as folder:
            found = train(trunk, made, corpus, Recipe(settings=settings), folder=folder)
        save_drafter(made, trunk, work / kind, acceptance=found.acceptance)
    return load_drafter(work / kind, trunk).drafter, corpus


def _stopping_table(
    trunk: DraftTrunk, kind: str, drafter: Any, prompts: list[list[int]], judged: list[list[int]], length: int
) -> Table:
    """SpecDec++ against fixed lengths, sampled: what is drafted, verified and thrown away, and the modelled time."""
    longest = drafter.depth or 8
    examples = observed_examples(trunk, drafter, prompts, length=longest, max_new_tokens=length, temperature=1.0)
    cut = len(examples) * 9 // 10
    assert examples.confidence is not None
    first = AcceptanceExamples(examples.features[:cut], examples.accepted[:cut], examples.confidence[:cut])
    heads = {
        "head": learn_acceptance(first),
        "informed head": learn_acceptance(first, informed=True),
    }
    with torch.no_grad():
        told = {
            name: acceptance_auc(
                head.chance(examples.features[cut:], examples.confidence[cut:]), examples.accepted[cut:]
            )
            for name, head in heads.items()
        }
    settings: dict[str, Any] = {"max_new_tokens": length, "stop": [], "temperature": 1.0}

    def tried(growth: Chain) -> Tally:
        several = [
            generate(trunk.model, drafter, torch.tensor([prompt]), growth=growth, seed=i, **settings).tally
            for i, prompt in enumerate(judged)
        ]
        tally = sum_of(several)
        assert tally is not None
        return tally

    rules = {f"{k}": Chain(k) for k in range(1, longest + 1)}
    rules |= {
        f"{name}, h = {h}": Chain(longest, stop=head, threshold=h, shortest=1)
        for name, head in heads.items()
        for h in (0.5, 0.7, 0.9)
    }
    rules |= {f"confidence, h = {h}": Chain(longest, stop=confidence, threshold=h, shortest=1) for h in (0.3, 0.5, 0.7)}
    found = {name: tried(rule) for name, rule in rules.items()}
    times = {
        ratio: {name: (tally.passes + ratio * tally.drafted) / tally.tokens for name, tally in found.items()}
        for ratio in (0.1, 0.05)
    }
    best = {ratio: min(each[f"{k}"] for k in range(1, longest + 1)) for ratio, each in times.items()}
    table = Table(
        title=f"When to stop (SpecDec++, {kind}, temperature 1, {len(judged)} prompts; heads of {cut} examples, AUC on others "
        f"{told['head']:.3f}, informed {told['informed head']:.3f}). Speed is that of the best fixed length, where a guess takes "
        "a tenth or a twentieth of a verification",
        title_justify="left",
    )
    for title in ("chain", "tokens a pass", "drafted a token", "thrown away", "speed at t_t / 10", "at t_t / 20"):
        table.add_column(title, justify="left" if title == "chain" else "right")
    for name, tally in found.items():
        wasted = tally.drafted - sum(tally.accepted)
        table.add_row(
            name,
            f"{tally.tokens_a_pass:.2f}",
            f"{tally.drafted / tally.tokens:.2f}",
            f"{wasted / tally.tokens:.2f}",
            *(f"{best[ratio] / each[name]:.3f}" for ratio, each in times.items()),
        )
    return table


@app.command()
def stopping(
    work: Annotated[Path, typer.Option(help="Where texts and drafter lie, or are put.")] = Path("drafters"),
    minutes: Annotated[float, typer.Option(help="Minutes to train the drafter, if it is missing.")] = 15.0,
    threads: Threads = 1,
) -> None:
    """Rules for when a chain of ladon's Hydra++ stops (SpecDec++)."""
    torch.set_num_threads(threads)
    model = mh.open_model()
    drafter, corpus = ladon_drafter(model, "hydra++", work, minutes)
    judged = own_texts(model, 48, LENGTH, through_stops=True, rows=48, seed=2)
    prompts, others = corpus.ids[:400, :32].tolist(), judged.ids[:, :32].tolist()
    Console(width=150).print(_stopping_table(DraftTrunk(model), "hydra++", drafter, prompts, others, 96))


if __name__ == "__main__":
    app()
