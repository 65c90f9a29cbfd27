"""`manyheads draft`: draft heads, which let a model write several tokens a pass."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from manyheads.cli.common import Commands, Force, ModelName, Opening, Seed, opens, refuse, terminal
from manyheads.errors import InputError

draft_app = typer.Typer(
    cls=Commands,
    help="Draft heads: train them, write with them, and see what they are worth.",
    no_args_is_help=True,
)

Texts = Annotated[Path | None, typer.Option(help="A text file, a passage a line. Default: the model's own words.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=256, help="Threads to compute with. Default: as many as there are cores.")
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 takes the best token always, 1 samples as the model says.")
]
Length = Annotated[int, typer.Option(min=1, help="New tokens.")]
Tree = Annotated[
    str | None,
    typer.Option(
        help="Shape of the guesses: auto for what pays on this machine, a number of nodes for the best fixed tree, best:N for "
        "the likeliest N of every round, chain:N for one after another. Default: auto."
    ),
]


Lookup = Annotated[
    bool,
    typer.Option("--lookup", help="Also guess what followed the same words before, in one tree with the drafter's."),
]


class _Kind(StrEnum):
    medusa = "medusa"
    hydra = "hydra"
    hydra_plus_plus = "hydra++"
    clover = "clover"
    chimera = "chimera"
    eagle = "eagle"


@draft_app.command("train")
@opens()
def draft_train(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Write the drafter into this new folder.")],
    kind: Annotated[_Kind, typer.Option(help="Which heads.")] = _Kind.hydra_plus_plus,
    heads: Annotated[int, typer.Option(min=1, max=64, help="How many tokens ahead they guess.")] = 4,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Guess only this many of the most frequent tokens, which is cheaper. Medusa and Hydra only. Default: all.",
        ),
    ] = None,
    texts: Texts = None,
    greedy: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the model's own words that go on greedily after a while.")
    ] = 0.5,
    n: Annotated[int, typer.Option(min=10, max=10_000_000, help="Texts to learn from, one in ten to judge by.")] = 1600,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = 128,
    through_stops: Annotated[
        bool,
        typer.Option(
            "--through-stops",
            help="Texts that the model writes go on after a stop token: for models trained on packed documents.",
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of training.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training. Default, without --steps: 15.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Texts a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    teacher: Annotated[float, typer.Option(help="Weight of the model's own distribution in the loss.")] = 1.0,
    data: Annotated[float, typer.Option(help="Weight of the texts' tokens in the loss.")] = 0.0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Multiply in bfloat16, where the machine has instructions for it.")
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(help="Keep the corpus and checkpoints here: the same call goes on, another one is refused."),
    ] = None,
    vllm: Annotated[Path | None, typer.Option(help="Also write Medusa heads here, as vLLM loads them.")] = None,
    published: Annotated[
        Path | None, typer.Option(help="Also write Hydra heads here, as published ones are named.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    threads: Threads = None,
    opening: Opening = Opening(),
) -> None:
    """Train draft heads beside a model, which stays as it is."""
    for place in (out, vllm, published):
        refuse(place, force=force, inputs=[texts, model])
    _check_kind(kind, vllm, published, vocabulary)
    _check_seed(seed)
    import torch

    from manyheads.draft.files.exchange import export_hydra, export_medusa
    from manyheads.draft.files.saving import save_drafter
    from manyheads.draft.training.corpus import frequent
    from manyheads.draft.training.heads import TRAINING, Recipe, train
    from manyheads.files import working_folder
    from manyheads.pages.draft import acceptance_table
    from manyheads.progress import progressing

    if steps is None and minutes is None:
        minutes = 15.0
    precision: Literal["bf16", "fp32"] = "bf16" if bf16 else "fp32"
    settings = replace(TRAINING, steps=steps, minutes=minutes, rows=rows, rate=rate, precision=precision, seed=seed)
    recipe = Recipe(teacher=teacher, data=data, settings=settings)
    trunk = _trunk(model, opening, threads)
    corpus, made_of = _corpus(trunk.model, texts, n, length, greedy, through_stops, seed, work)
    torch.manual_seed(seed)
    words = {} if vocabulary is None else {"vocabulary": frequent(corpus, vocabulary)}
    drafter = _built(kind, trunk, heads=heads, **words)
    request = {"model": trunk.fingerprint, "corpus": made_of, "kind": kind.value, **drafter.settings}
    where = None if work is None else work / f"run-{kind.value}"
    kept = contextlib.nullcontext() if where is None else working_folder(where, request | asdict(recipe), keep=True)
    with kept as folder, progressing() as bar:
        found = train(trunk, drafter, corpus, recipe, folder=folder, bar=bar.step("steps of training", steps))
    about = {"recipe": asdict(recipe), "texts": len(corpus), "length": length, "loss": found.loss, "steps": found.steps}
    save_drafter(drafter, trunk, out, acceptance=found.acceptance, trained=about, force=force)
    if vllm is not None:
        export_medusa(drafter, trunk, vllm, force=force)
    if published is not None:
        export_hydra(drafter, trunk, published, force=force)
    console = terminal()
    console.print(acceptance_table(found))
    console.print(Text(f"Wrote {out}. Try: manyheads draft bench {model} --drafter {out}"))


@draft_app.command("generate")
@opens()
def draft_generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    drafter: Annotated[
        str, typer.Option(help="A drafter's folder, prompt-lookup, or a smaller model.")
    ] = "prompt-lookup",
    tree: Tree = None,
    lookup: Lookup = False,
    max_new_tokens: Length = 128,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k best tokens only.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the best tokens of this mass only.")] = 1.0,
    typical: Annotated[
        bool, typer.Option("--typical", help="Accept typical tokens: faster, but not lossless.")
    ] = False,
    seed: Seed = 0,
    threads: Threads = None,
    opening: Opening = Opening(),
) -> None:
    """Generate text, and show by colour which tokens came from one pass of the model."""
    from manyheads.draft.core.decode import rounds
    from manyheads.draft.drafters.prompt_lookup import PromptLookup
    from manyheads.draft.drafters.together import CombinedDrafter

    trunk = _trunk(model, opening, threads)
    chosen, growth = _drafter(trunk, drafter, tree)
    if lookup and drafter != "prompt-lookup":
        chosen = CombinedDrafter(chosen, PromptLookup())
    console = terminal()
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    told, shade, last = "", 0, None
    for last in rounds(
        trunk.model,
        chosen,
        prompt,
        growth=growth,
        max_new_tokens=max_new_tokens,
        acceptance="typical" if typical else "lossless",
        **sampling,
    ):
        if last.tally.passes == 1:  # not before, since settings and prompt are refused first
            console.print(Text(prompt, style="dim"), end="", soft_wrap=True)
        if (text := last.text[0]) != told and not text.endswith("\ufffd"):
            console.print(Text(text[len(told) :], style=("bold", "cyan")[shade % 2]), end="", soft_wrap=True)
            told, shade = text, shade + 1
    assert last is not None
    tally = last.tally
    per = f"{tally.tokens / tally.seconds:.0f} tokens a second, {tally.tokens_a_pass:.2f} a pass"
    console.print(Text(f"\n{tally.tokens} tokens in {tally.passes} passes: {per}.", style="dim"))


@draft_app.command("bench")
@opens()
def draft_bench(
    model: ModelName,
    drafter: Annotated[
        list[str] | None, typer.Option(help="A drafter's folder or a smaller model; more than one may be given.")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="Shapes to try with each: auto, 16, best:16, chain:4. Default: auto.")
    ] = None,
    lookup: Lookup = False,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, a prompt a line. Default: texts of the model's own.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Prompts.")] = 8,
    max_new_tokens: Length = 96,
    temperature: Temperature = 0.0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write bench.html and bench.json into this new folder.")] = None,
    seed: Seed = 0,
    force: Force = False,
    threads: Threads = None,
    opening: Opening = Opening(),
) -> None:
    """Compare drafters with plain decoding, prompt lookup and assisted generation, in one run."""
    refuse(out, force=force, inputs=[prompts, model, *(drafter or [])])
    _check_seed(seed)
    for shape in tree or []:
        _shape(shape)
    if tree and not drafter:
        raise InputError("--tree gives shapes to a drafter's guesses, and there is no --drafter; name one.")
    from manyheads.draft.bench import Contender, NoGuesses, bench
    from manyheads.draft.drafters.draft_model import DraftModel
    from manyheads.draft.drafters.prompt_lookup import PromptLookup
    from manyheads.draft.drafters.together import CombinedDrafter
    from manyheads.files import write_folder_atomically
    from manyheads.pages.draft import bench_table
    from manyheads.progress import progressing

    trunk = _trunk(model, opening, threads)
    contenders = [
        Contender("generate, prompt lookup", options={"prompt_lookup_num_tokens": 8}),
        Contender("no guesses", NoGuesses()),
        Contender("prompt lookup", PromptLookup()),
    ]
    for name in drafter or []:
        for shape in tree or ["auto"]:
            chosen, growth = _drafter(trunk, name, shape)
            if isinstance(chosen, DraftModel) and shape == (tree or ["auto"])[0]:
                contenders.append(
                    Contender(f"generate, {Path(name).name}", options={"assistant_model": chosen.small.plain})
                )
            contenders.append(Contender(f"{Path(name).name}, {shape}", chosen, growth))
            if lookup:
                both = CombinedDrafter(chosen, PromptLookup())
                contenders.append(Contender(f"{Path(name).name}, {shape}, lookup", both, growth))
    given = _prompts(trunk.model, prompts, n, seed)
    with progressing() as bar:
        step = bar.step("decoding", (1 + repeats * len(given)) * (len(contenders) + 1))
        found = bench(
            trunk.model,
            contenders,
            given,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            temperature=temperature,
            bar=step,
        )
    console = terminal()
    console.print(bench_table(found))
    if out is not None:

        def write(into: Path) -> None:
            found.report(into / "bench.html")
            (into / "bench.json").write_text(json.dumps([asdict(outcome) for outcome in found.outcomes], indent=2))

        write_folder_atomically(out, write, force=force)
        console.print(Text(f"Wrote {out / 'bench.html'} and the numbers beside it."))


def _trunk(model: str, opening: Opening, threads: int | None) -> Any:
    import torch

    from manyheads.draft.core.trunk import DraftTrunk

    if threads is not None:
        torch.set_num_threads(threads)
    return DraftTrunk(opening(model))


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; give a whole number from 0 to {2**32 - 1}.")


def _check_kind(kind: _Kind, vllm: Path | None, published: Path | None, vocabulary: int | None) -> None:
    """What this kind of heads has no place for."""
    hydra = kind in (_Kind.hydra, _Kind.hydra_plus_plus)
    if vllm is not None and kind != _Kind.medusa:
        raise InputError(f"vLLM loads Medusa heads, not {kind.value}; leave --vllm away.")
    if published is not None and not hydra:
        raise InputError(f"--published writes Hydra heads, not {kind.value}; leave it away.")
    if vocabulary is not None and not (hydra or kind == _Kind.medusa):
        raise InputError(f"{kind.value} guesses with the model's own output matrix; leave --vocabulary away.")
    if published is not None and vocabulary is not None:
        raise InputError("published Hydra heads guess all tokens; leave --published or --vocabulary away.")


def _built(kind: _Kind, trunk: Any, **settings: Any) -> Any:
    from manyheads.draft.drafters.hydra import Hydra
    from manyheads.draft.files.saving import KINDS

    if kind is _Kind.hydra_plus_plus:
        return Hydra.plus_plus(trunk, **settings)
    return KINDS[kind.value].build(trunk, **settings)


def _corpus(
    model: Any,
    texts: Path | None,
    n: int,
    length: int,
    greedy: float,
    through_stops: bool,
    seed: int,
    work: Path | None,
) -> tuple[Any, dict[str, Any]]:
    """The corpus that lies in the work folder, if it was made of the same, or a new one, kept there; and what it is made of."""
    from manyheads.draft.training.corpus import Corpus, from_texts, sampled_and_greedy
    from manyheads.progress import progressing

    request: dict[str, Any] = {"n": n, "length": length, "seed": seed}
    lines = None if texts is None else _lines(texts)
    if lines is None:
        request |= {"greedy": greedy, "through_stops": through_stops, "texts": "the model's own"}
    else:
        request["texts"] = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    kept = None if work is None else work / "corpus"
    if kept is not None and kept.exists():
        return Corpus.load(kept, model, request=request), request
    if lines is not None:
        corpus = from_texts(model, lines, n, length, seed=seed)
    else:
        with progressing() as bar:
            step = bar.step("the model's own words", n + round(greedy * n))
            settings: dict[str, Any] = {"through_stops": through_stops, "rows": 100, "seed": seed, "bar": step}
            corpus = sampled_and_greedy(model, n, length, greedy=greedy, **settings)
    if kept is not None:
        corpus.save(kept, request=request)
    return corpus, request


def _prompts(model: Any, path: Path | None, n: int, seed: int) -> list[list[int]]:
    from manyheads.draft.training.corpus import own_texts

    if path is not None:
        return [model.inputs(line)["input_ids"][0].tolist() for line in _lines(path)[:n]]
    ids: list[list[int]] = own_texts(model, n, 32, through_stops=True, seed=seed + 1).ids.tolist()
    return ids


def _lines(path: Path) -> list[str]:
    from manyheads.inputs import read_text

    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no text.")
    return lines


def _shape(given: str) -> tuple[str | None, int]:
    """The kind and size that the name of a tree says."""
    from manyheads.draft.core.tree import MOST_NODES

    if given == "auto":
        return "auto", 0
    found = re.fullmatch(r"(?:(best|chain):)?([0-9]{1,6})", given)
    if found is None or not 1 <= int(found[2]) <= MOST_NODES:
        raise InputError(
            f"the tree {given!r} is none of: auto, a number of nodes from 1 to {MOST_NODES} such as 16, best:16, chain:4."
        )
    return found[1], int(found[2])


def _drafter(trunk: Any, name: str, shape: str | None) -> tuple[Any, Any]:
    """The drafter of that name or folder, and a growth."""
    from manyheads.draft.core.growth import BestFirst, Chain
    from manyheads.draft.core.trees import small_tree
    from manyheads.draft.drafters.draft_model import DraftModel
    from manyheads.draft.drafters.prompt_lookup import PromptLookup
    from manyheads.draft.files.saving import load_drafter
    from manyheads.learning.saved import CARD
    from manyheads.model.opening import open_model

    kind, size = _shape(shape or "auto")
    if name == "prompt-lookup":
        return (PromptLookup(), "auto") if kind == "auto" else (PromptLookup(length=size), None)
    if not (Path(name) / CARD).is_file():
        small = DraftModel(open_model(name))
        return small, "auto" if kind == "auto" else BestFirst(size) if kind == "best" else Chain(size)
    saved = load_drafter(name, trunk)
    if kind == "auto":
        return saved.drafter, "auto"
    if kind == "best":
        return saved.drafter, BestFirst(size)
    if kind == "chain":
        return saved.drafter, Chain(size)
    return saved.drafter, saved.tree(size) or small_tree(4)
