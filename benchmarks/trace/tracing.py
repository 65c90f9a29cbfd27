"""Tracing: ours beside transformer-lens on the same weights, and attribution patching beside one backward pass through it all.

    manyheads bench tracing [--threads 2] [--repeats 3]          (in an environment with the extra `bench`)

1. patching every head, at all positions at once and position by position, against transformer-lens's `patching`
2. logit lens and composition scores against transformer-lens's, attribution patching against its and against plain autograd
3. attribution patching's memory on models of 4 to 32 layers at 300 tokens: what autograd keeps, and what a process of its own
   grows by over its loaded model, streamed, in one graph, and by transformer-lens

Both sides get the same threads. Times are the least of `repeats`, taken in turns; of a single run where transformer-lens takes
minutes. Ours patches with `keep=1`: the metric reads the last position only, and transformer-lens has no such thing.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measuring import grown, lens, print_growth, timed
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import manyheads as mh
from manyheads.model.replay.patching import activation_patching
from manyheads.trace.circuits.attribution_patching import attribution_patching
from manyheads.trace.positions.composition import KINDS, composition_scores
from manyheads.trace.positions.logit_lens import read_states
from manyheads.trace.positions.patching_map import patching_map

MODELS = ("ladon", "gpt2-small")
TOKENS = 300
SITES = ("z", "mlp_write", "resid")


def load(name: str) -> mh.HeadModel:
    """The bundled model, a random one of GPT-2 small's size, or a random Llama of `name` layers, 512 wide."""
    torch.manual_seed(0)
    if name == "ladon":
        return mh.open_model()
    if name == "gpt2-small":
        return mh.open_model(GPT2LMHeadModel(GPT2Config()).eval())
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=int(name),
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    return mh.open_model(LlamaForCausalLM(config).eval())


def pairs(model: mh.HeadModel, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts, and twins with other tokens in their first half."""
    generator = torch.Generator().manual_seed(0)
    clean, other = torch.randint(5, model.vocab_size, (2, rows, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, : length // 2] = other[:, : length // 2]
    return clean, corrupted


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A logit difference at the last position, one a row."""
    return logits[:, -1, 5] - logits[:, -1, 6]


def mean_metric(logits: torch.Tensor) -> torch.Tensor:
    """Its mean, as transformer-lens wants it."""
    return metric(logits).mean()


# Every head


def ours_all(model: mh.HeadModel, clean: torch.Tensor, corrupted: torch.Tensor) -> np.ndarray:
    """`[L, H]`: the clean run's mean metric with each head from the other run."""
    effects = activation_patching(model, clean, corrupted, metric, keep=1)
    return effects.by_head(*model.shape) + effects.clean.mean()


def ours_by_position(model: mh.HeadModel, clean: torch.Tensor, corrupted: torch.Tensor) -> np.ndarray:
    """`[L, T, H]`: the same, a position at a time."""
    found = patching_map(model, clean, corrupted, metric, site="z", keep=1)
    return found.mean + found.clean.mean()


def theirs(function: str, hooked: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> np.ndarray:
    """The same by one of transformer-lens's functions, which patch into what they call corrupted."""
    from transformer_lens import patching

    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        _, cache = hooked.run_with_cache(corrupted, names_filter=lambda name: name.endswith("hook_z"))
        return np.asarray(getattr(patching, function)(hooked, clean, cache, mean_metric).double())


# Attribution patching


def streamed(model: mh.HeadModel, clean: torch.Tensor, corrupted: torch.Tensor) -> dict[str, np.ndarray]:
    """Ours."""
    return attribution_patching(model, clean, corrupted, metric, sites=SITES, keep=1).values


def one_graph(model: mh.HeadModel, clean: torch.Tensor, corrupted: torch.Tensor) -> dict[str, np.ndarray]:
    """By one backward pass through the whole model, as everybody writes it."""
    other, here = _activations(model, corrupted, grads=False), _activations(model, clean, grads=True)
    output = here.pop("logits")
    grads = dict(zip(here, torch.autograd.grad(metric(output).sum(), list(here.values())), strict=True))
    dots: dict[str, np.ndarray] = {}
    for site in SITES:
        layers = range(model.n_layers + (site == "resid"))
        values = [
            ((other[f"{site}{i}"] - here[f"{site}{i}"].detach()) * grads[f"{site}{i}"])
            .unflatten(-1, (model.n_heads if site == "z" else 1, -1))
            .sum(-1)
            for i in layers
        ]
        dots[site] = np.asarray(torch.stack(values, 1).squeeze(-1).double())
    return dots


def _activations(model: mh.HeadModel, ids: torch.Tensor, *, grads: bool) -> dict[str, torch.Tensor]:
    """Every site's activation, in the graph or without one."""
    kept: dict[str, torch.Tensor] = {}
    handles = []

    def first(value: Any) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else value[0]

    def note(name: str, value: torch.Tensor) -> None:
        kept[name] = value.requires_grad_() if grads and not value.requires_grad else value

    for i, block in enumerate(model.layout.blocks):
        handles += [
            block.module.register_forward_pre_hook(lambda m, a, i=i: note(f"resid{i}", a[0])),
            block.projection.register_forward_pre_hook(lambda m, a, i=i: note(f"z{i}", a[0])),
            block.mlp_write.register_forward_hook(lambda m, a, out, i=i: note(f"mlp_write{i}", first(out))),
        ]
    last = model.layout.blocks[-1].module
    handles.append(last.register_forward_hook(lambda m, a, out: note(f"resid{model.n_layers}", first(out))))
    with torch.set_grad_enabled(grads):
        kept["logits"] = model.plain(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return kept


def their_nodes(hooked: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> dict[Any, float]:
    """transformer-lens's; its clean run is ours that is patched from."""
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    return dict(attribution_patch(hooked, corrupted, clean, mean_metric).node_scores)


def their_gradients(hooked: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> Any:
    """What it keeps for that; to score it, node by node, takes minutes at this length."""
    from transformer_lens.tools.analysis import attribution_patching as theirs_

    names = theirs_._required_hook_names(hooked.cfg.n_layers)
    cache = partial(theirs_.cache_activation_and_gradient, hooked, metric_fn=mean_metric, names_filter=names)
    return cache(corrupted, compute_gradient=False), cache(clean)


def node_gap(ours: dict[str, np.ndarray], nodes: dict[Any, float]) -> float:
    """The largest difference over nodes that both score, relative to the largest score."""
    apart = [0.0]
    for node, value in nodes.items():
        if node.kind == "attn_head_out":
            apart.append(abs(ours["z"][:, node.layer, node.position, node.head].mean() - value))
        elif node.kind == "mlp_out":
            apart.append(abs(ours["mlp_write"][:, node.layer, node.position].mean() - value))
    if len(apart) == 1:
        raise RuntimeError(f"no node in common: {sorted({node.kind for node in nodes})}")
    return max(apart) / max(map(abs, nodes.values()))


# Time and memory


def once(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds of one run of what takes minutes."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def kept_by_autograd(model: mh.HeadModel, work: Callable[[], Any]) -> int:
    """The most bytes saved for backward at any moment: each storage once, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.plain.parameters()}
    holders: dict[int, int] = {}
    sizes: dict[int, int] = {}
    now = peak = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, peak
            storage = tensor.untyped_storage()
            self.tensor, self.key = tensor, storage.data_ptr()
            if self.key not in holders:
                sizes[self.key] = 0 if self.key in weights else storage.nbytes()
                now += sizes[self.key]
            holders[self.key] = holders.get(self.key, 0) + 1
            peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            holders[self.key] -= 1
            if not holders[self.key]:
                now -= sizes[self.key]
                del holders[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        work()
    return peak


def child(task: str) -> None:
    """What a process of its own does for `grown`."""
    what, depth = task.split(":")
    model = load(depth)
    hooked = lens(model) if what == "lens" else None
    clean, corrupted = pairs(model, 1, TOKENS)
    model.logits(clean[:, :8])
    if what == "lens":
        print_growth(lambda: their_gradients(hooked, clean, corrupted))
    else:
        print_growth(lambda: (streamed if what == "streamed" else one_graph)(model, clean, corrupted))


def compare(name: str, rounds: int, table: Table) -> None:
    """Times and agreement for one model."""
    model = load(name)
    hooked = lens(model)

    def row(what: str, ours: float, baseline: str, other: float, goal: str, gap: float) -> None:
        note = f"differ by {gap:.0e}" + ("" if gap <= 1e-4 else ", more than 1e-4")
        table.add_row(name, what, f"{ours:.3f} s", baseline, f"{other:.3f} s", f"{other / ours:.1f}x", goal, note)

    small = name == "ladon"
    for rows, length in ((1, 33), (8, 33)) if small else ((1, 17),):
        clean, corrupted = pairs(model, rows, length)
        a = partial(ours_all, model, clean, corrupted)
        b = partial(theirs, "get_act_patch_attn_head_out_all_pos", hooked, clean, corrupted)
        mine, seconds = once(a)
        other, baseline = once(b)
        gap = float(np.abs(mine - other).max())
        best = _ratio(rounds, a, "transformer-lens", b) if small else (seconds, "transformer-lens", baseline)
        what = f"patch each of {model.n_layers * model.n_heads} heads, {rows} x {length} tokens"
        row(what, *best, ">= 3x", gap)
    length = 12 if small else 2
    clean, corrupted = pairs(model, 1, length)
    mine, seconds = once(partial(ours_by_position, model, clean, corrupted))
    other, baseline = once(partial(theirs, "get_act_patch_attn_head_out_by_pos", hooked, clean, corrupted))
    gap = float(np.abs(mine - other).max())
    row(f"patch each head at each of {length} positions", seconds, "transformer-lens", baseline, ">= 3x", gap)

    clean, corrupted = pairs(model, 4, 32)
    c, d, e = (
        partial(streamed, model, clean, corrupted),
        partial(one_graph, model, clean, corrupted),
        partial(their_nodes, hooked, clean, corrupted),
    )
    ours, graph = c(), d()
    nodes, seconds_nodes = once(e)
    gap = max(float(np.abs(ours[site] - graph[site]).max() / np.abs(graph[site]).max()) for site in SITES)
    seconds = timed(rounds, c, d)
    row("attribution patching, 4 x 32 tokens", seconds[0], "one graph", seconds[1], "", gap)
    row("attribution patching, 4 x 32 tokens", seconds[0], "transformer-lens", seconds_nodes, "", node_gap(ours, nodes))

    states = read_states(model, clean, keep_logits=True).logits
    assert states is not None
    lenses = partial(hooked_lens, hooked, clean)
    gap = float((states - lenses()).abs().max())
    row(
        "logit lens, every position",
        *_ratio(rounds, partial(read_states, model, clean), "transformer-lens", lenses),
        "",
        gap,
    )

    if not small:  # transformer-lens would need 4 GB for one product
        return
    scores = composition_scores(model, fold=False)
    found = {kind: np.asarray(hooked.all_composition_scores(kind).scores.detach()) for kind in KINDS}
    gap = max(float(np.nanmax(np.abs(scores.values[kind] - found[kind]))) for kind in KINDS)
    both = (
        partial(composition_scores, model, fold=False),
        "transformer-lens",
        lambda: [hooked.all_composition_scores(kind) for kind in KINDS],
    )
    row("composition, every pair", *_ratio(1, *both), "", gap)


def hooked_lens(hooked: Any, ids: torch.Tensor) -> torch.Tensor:
    """transformer-lens's logit lens: `[S, B, T, V]`."""
    from transformer_lens.tools.analysis.logit_lens import logit_lens

    with torch.no_grad():
        return logit_lens(hooked, ids, incl_mid=True, positions=None).values  # type: ignore[no-any-return]


def _ratio(rounds: int, ours: Callable[[], Any], name: str, other: Callable[[], Any]) -> tuple[float, str, float]:
    a, b = timed(rounds, ours, other)
    return a, name, b


def memory(depths: list[int], threads: int, table: Table) -> None:
    """A row a depth."""
    for depth in depths:
        model = load(str(depth))
        clean, corrupted = pairs(model, 1, TOKENS)
        work = [partial(f, model, clean, corrupted) for f in (streamed, one_graph)]
        kept = [kept_by_autograd(model, one) / 2**20 for one in work]
        streams = 2 * (depth + 1) * TOKENS * model.layout.hidden_size * 4 / 2**20
        rss = [grown(__file__, f"{what}:{depth}", threads) for what in ("streamed", "one graph", "lens")]
        table.add_row(str(depth), *(f"{m:.1f}" for m in (*kept, streams)), *(f"{m:.0f}" for m in rss))


def main(
    threads: Annotated[int, typer.Option(help="Threads of every side.")] = 2,
    repeats: Annotated[int, typer.Option(help="Rounds; the least time counts.")] = 3,
    models: Annotated[str, typer.Option(help="Which models, separated by commas.")] = ",".join(MODELS),
    depths: Annotated[str, typer.Option(help="Layers of the models whose memory is measured.")] = "4,8,16,32",
    child_task: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Print two tables."""
    torch.set_num_threads(threads)
    if child_task:
        child(child_task)
        return
    names = [name for name in models.split(",") if name]
    if unknown := set(names) - set(MODELS):
        raise typer.BadParameter(f"there is no model {sorted(unknown)[0]!r}; choose from {', '.join(MODELS)}.")
    table = Table(title=f"tracing, {threads} threads, least of {repeats}")
    for column in ("model", "what", "ours", "baseline", "theirs", "ratio", "goal", "results"):
        table.add_column(column)
    for name in names:
        compare(name, repeats, table)
    Console(width=170).print(table if names else "")
    sys.stdout.flush()
    deep = Table(title=f"attribution patching of one prompt of {TOKENS} tokens, MiB")
    for column in (
        "layers",
        "kept by autograd, streamed",
        "in one graph",
        "residual streams kept",
        "process grew, streamed",
        "in one graph",
        "transformer-lens",
    ):
        deep.add_column(column, justify="right")
    memory([int(depth) for depth in depths.split(",") if depth], threads, deep)
    Console(width=170).print(deep)


if __name__ == "__main__":
    typer.run(main)
