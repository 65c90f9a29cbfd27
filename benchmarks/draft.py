"""Drafting against plain decoding: ladon, and ladon under silent layers, which says the same at a larger model's cost.

    python benchmarks/draft.py --work drafters          # or: manyheads bench draft --work drafters

Drafters that `--work` lacks are trained first (`--steps` each, resumable). A silent layer writes nothing to the residual stream:
the words are ladon's, bit for bit, the passes cost what a model of `--deep` layers costs. All contenders of a table continue the
same held-out texts of ladon's own, one at a time, in turn; the median round counts.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.draft import (
    BestFirst,
    Chain,
    CombinedDrafter,
    Corpus,
    DraftTrunk,
    Fixed,
    Hydra,
    Medusa,
    PromptLookup,
    Recipe,
    best_ranks,
    confidence,
    frequent,
    learn_acceptance,
    load_drafter,
    observed_examples,
    own_texts,
    sampled_and_greedy,
    save_drafter,
    train,
    with_states,
)
from manyheads.draft.bench import Contender, bench, sum_of
from manyheads.draft.core.decode import Tally, generate
from manyheads.draft.files.saving import KINDS
from manyheads.draft.training.heads import TRAINING
from manyheads.draft.training.stopping import AcceptanceExamples, acceptance_auc
from manyheads.errors import InputError
from manyheads.files import working_folder
from manyheads.pages.draft import bench_table

TEXTS, LENGTH, HEADS, VOCABULARY = 4000, 128, 6, 2048


def corpora(model: mh.HeadModel, work: Path) -> tuple[Corpus, Corpus]:
    """Ladon's own words, half of them greedy, with its states, to learn from, and others to judge by."""
    request = {"texts": TEXTS, "length": LENGTH}
    if not (work / "corpus").exists():
        words = sampled_and_greedy(model, TEXTS, LENGTH, through_stops=True, rows=100, seed=1)
        with_states(model, words).save(work / "corpus", request=request)
    if not (work / "held out").exists():
        judged = own_texts(model, 128, LENGTH, through_stops=True, rows=128, seed=2)
        judged.save(work / "held out", request=request)
    return tuple(Corpus.load(work / name, model, request=request) for name in ("corpus", "held out"))  # type: ignore[return-value]


def drafter(trunk: DraftTrunk, corpus: Corpus, kind: str, work: Path, steps: int, minutes: float | None) -> Any:
    """The trained drafter of this kind, trained now if it is not there. `InputError` if it was trained for longer or shorter."""
    asked = {"texts": TEXTS, "length": LENGTH, "steps": None if minutes else steps, "minutes": minutes}
    if not (work / kind / "head.json").exists():
        torch.manual_seed(0)
        words = frequent(corpus, VOCABULARY)
        made = {
            "hydra++": lambda: Hydra.plus_plus(trunk, HEADS, vocabulary=words),
            "hydra": lambda: Hydra(trunk, HEADS, vocabulary=words),
            "medusa": lambda: Medusa(trunk, HEADS, vocabulary=words),
        }.get(kind, lambda: KINDS[kind].build(trunk))()
        settings = replace(
            TRAINING,
            steps=None if minutes else steps,
            minutes=minutes,
            rows=8,
            rate=3e-3,
            precision="bf16",
        )
        recipe = Recipe(settings=settings)
        with working_folder(work / f"run-{kind}", {"model": trunk.fingerprint, **asked}, keep=True) as folder:
            found = train(trunk, made, corpus, recipe, folder=folder)
        about = {"steps": found.steps, "minutes": found.minutes, "asked": asked}
        save_drafter(made, trunk, work / kind, acceptance=found.acceptance, trained=about)
    saved = load_drafter(work / kind, trunk)
    if saved.card.about["trained"].get("asked") != asked:
        raise InputError(f"the drafter in {work / kind} was not made of this request, {asked}; remove it.")
    return saved


def deepened(model: mh.HeadModel, layers: int) -> mh.HeadModel:
    """The same words from a model of so many layers: those added write nothing."""
    config = copy.deepcopy(model.config)
    own, config.num_hidden_layers, config.layer_types = config.num_hidden_layers, layers, None
    big = LlamaForCausalLM(config).eval()
    big.load_state_dict(model.plain.state_dict(), strict=False)
    with torch.no_grad():
        for layer in big.model.layers[own:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return mh.open_model(big, tokenizer=model.tokenizer)


def contenders(found: dict[str, Any], nodes: int) -> list[Contender]:
    """Every drafter with the best tree for its measured acceptance, as a chain, and some with trees of their own and lookup."""
    several = [Contender("generate, prompt lookup", options={"prompt_lookup_num_tokens": 8})]
    several.append(Contender("prompt lookup", PromptLookup()))
    for kind, saved in found.items():
        several.append(Contender(f"{kind}, tree of {nodes}", saved.drafter, Fixed(best_ranks(saved.acceptance, nodes))))
        several.append(Contender(f"{kind}, chain of 4", saved.drafter, Chain(4)))
        if kind in ("eagle", "hydra++"):
            depth = saved.drafter.depth or 4
            both = CombinedDrafter(saved.drafter, PromptLookup())
            several.append(Contender(f"{kind}, best {nodes}", saved.drafter, BestFirst(nodes, levels=depth)))
            several.append(Contender(f"{kind}, chain of {depth}", saved.drafter, Chain(depth)))
            several.append(Contender(f"{kind}, chain of {depth}, lookup", both, Chain(depth)))
    return several


def stopping(
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


def main(
    work: Annotated[Path, typer.Option(help="Where corpus and drafters lie, or are put.")] = Path("drafters"),
    kinds: Annotated[str, typer.Option(help="Which drafters.")] = "medusa,hydra,hydra++,clover,chimera,eagle",
    steps: Annotated[int, typer.Option(help="Steps of training of a drafter that is missing.")] = 600,
    minutes: Annotated[float | None, typer.Option(help="Train for so many minutes instead.")] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    n: Annotated[int, typer.Option(help="Prompts.")] = 6,
    length: Annotated[int, typer.Option(help="New tokens for each.")] = 64,
    nodes: Annotated[int, typer.Option(help="Nodes of a tree.")] = 16,
    deep: Annotated[int, typer.Option(help="Layers of the deepened ladon; 0 leaves it out.")] = 24,
    repeats: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 3,
    stops: Annotated[bool, typer.Option(help="Also compare rules for when to stop.")] = True,
) -> None:
    """Train what is missing and print the tables."""
    torch.set_num_threads(threads)
    console = Console(width=150)
    model = mh.open_model()
    corpus, judged = corpora(model, work)
    found = {kind: drafter(DraftTrunk(model), corpus, kind, work, steps, minutes) for kind in kinds.split(",")}
    prompts = judged.ids[:n, :32].tolist()
    for name, trunk in {
        "ladon, 6 layers": model,
        **({f"ladon, {deep} layers": deepened(model, deep)} if deep else {}),
    }.items():
        for temperature in (0.0, 1.0):
            found = bench(
                trunk,
                contenders(found, nodes),
                prompts,
                max_new_tokens=length,
                repeats=repeats,
                temperature=temperature,
            )
            console.print(f"\n{name}, temperature {temperature:g}, {threads} threads")
            console.print(bench_table(found))
    for kind in ("hydra++", "eagle") if stops else ():
        if kind in found:
            learnt_from, others = corpus.ids[:400, :32].tolist(), judged.ids[:48, :32].tolist()
            console.print(stopping(DraftTrunk(model), kind, found[kind].drafter, learnt_from, others, 96))


if __name__ == "__main__":
    typer.run(main)
