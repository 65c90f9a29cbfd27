"""A smaller model reads the prompt (#15): `manyheads bench kv_prediction [MODEL]`.

The auxiliary model has a share of the base's layers. On held-out passages, whose first half is the prompt, nats a token of the
second half:

    base          reads all itself
    auxiliary     alone, trained as long on the same passages (next tokens only)
    predicted     the base goes on from the cache that its trained helper predicts: what KV prediction gives
    untrained     the same before anything was learned
    no prompt     the base reads the second half alone: what a cache of no use would give

"closed" is how much of the way from the auxiliary model to the base the prediction goes. First token: seconds until the first
new token, as a ratio to the base, both in turns. Resumable in --work.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import manyheads as mh
from manyheads.progress import progressing
from manyheads.shrink.online.kv_prediction import LEARNING, KVPrediction, KVPredictor, layer_pruned
from manyheads.tasks.texts import passages
from manyheads.training import epoch_rows, fit, next_token_loss


@torch.inference_mode()
def second_half(model: mh.HeadModel, ids: torch.Tensor, cache: Any) -> float:
    """Nats a token of the second half; `cache` holds the first half but its last token, or is None for a plain pass."""
    half = ids.shape[1] // 2
    plain: Any = model.plain
    if cache is None:
        logits = plain(ids, use_cache=False).logits[:, half - 1 : -1]
    else:
        logits = plain(ids[:, half - 1 : -1], past_key_values=cache).logits
    return float(-logits.float().log_softmax(-1).gather(-1, ids[:, half:, None]).mean())


def main(
    model: Annotated[str, typer.Argument()] = "ladon",
    layers: Annotated[float, typer.Option(min=0.05, max=1.0)] = 0.5,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    rows: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=16)] = 128,
    rate: Annotated[float, typer.Option()] = 1e-3,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    prompt: Annotated[int, typer.Option(min=8, help="Tokens of the prompt whose first token is waited for.")] = 512,
    work: Annotated[Path | None, typer.Option()] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    torch.set_num_threads(threads)
    base = mh.open_model(model)
    every = passages(base, None, n=1000, length=length, seed=0)
    held, ids = every[:32], every[32:]
    found: dict[str, list[float]] = {name: [] for name in ("auxiliary", "predicted")}
    whole, half = second_half(base, held, None), length // 2
    predictor = KVPredictor.new(base, layer_pruned(base, layers)).eval()
    untrained = second_half(base, held, predictor.cache(held[:, : half - 1]))
    nothing = second_half(base, held, DynamicCache(config=base.config))
    for seed in range(seeds):
        settings = replace(LEARNING, steps=steps, rows=rows, rate=rate, warmup=max(1, steps // 10), seed=seed)
        place = None if work is None else work / f"{seed}"
        with progressing() as bar:
            method = KVPrediction(layers=layers, texts=ids, settings=settings, seed=seed)
            predictor = method.learn(base, folder=place, bar=bar.step(f"seed {seed}, prediction", steps))
            found["predicted"].append(second_half(base, held, predictor.cache(held[:, : half - 1])))
            alone = layer_pruned(base, layers)
            alone.plain.requires_grad_(True)

            def batch(step: int, settings: Any = settings) -> dict[str, torch.Tensor]:
                return {"input_ids": ids[epoch_rows(len(ids), rows, step, settings.seed)]}

            place = None if work is None else work / f"{seed}-alone"
            step = bar.step(f"seed {seed}, alone", steps)
            fit(alone.plain, batch, settings, place, loss=next_token_loss, bar=step)
            alone.plain.eval()
            found["auxiliary"].append(second_half(alone, held, None))
    table = Table("", "nats a token", "each seed")
    table.add_row("base", f"{whole:.3f}", "")
    for name, values in found.items():
        table.add_row(name, f"{np.mean(values):.3f}", " ".join(f"{value:.3f}" for value in values))
    table.add_row("untrained", f"{untrained:.3f}", "")
    table.add_row("no prompt", f"{nothing:.3f}", "")
    console = Console(width=100)
    console.print(table)
    closed = [(a - p) / (a - whole) for a, p in zip(found["auxiliary"], found["predicted"], strict=True)]
    console.print(f"closed: {np.mean(closed):.2f} (each seed {' '.join(f'{value:.2f}' for value in closed)})")
    ids = torch.randint(5, base.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    ratios = []
    for turn in range(8):
        seconds = []
        for one in (base, predictor):
            started = time.perf_counter()
            one.generate(ids, max_new_tokens=1, do_sample=False)
            seconds.append(time.perf_counter() - started)
        if turn:
            ratios.append(seconds[1] / seconds[0])
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    console.print(f"first token after {prompt}: {middle:.2f} of the base's time ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    typer.run(main)
