"""Train 150 small networks on digits, three seeds each, and write what they reached (judge/networks/digits_networks.json).

    python recipes/network_accuracies.py [FOLDER]

Twelve minutes on one core. What is done is kept in FOLDER (default: network-accuracies), and an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from manyheads.data import real
from manyheads.judge.networks.small_networks import KINDS, drawn_design, proxies, row_of
from manyheads.training import ADAM, drawn_rows, fit

EACH, SEEDS, STEPS = 50, 3, 120
OUT = Path(__file__).parents[1] / "src/manyheads/judge/networks/digits_networks.json"


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    given = real.digits()
    x, y = torch.from_numpy(given.x)[:, None], torch.as_tensor(given.y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    known, judged = order[500:], order[:500]
    draw, rows = np.random.default_rng(0), []
    for i in range(EACH * len(KINDS)):
        design = drawn_design(KINDS[i % len(KINDS)], draw)
        kept = folder / f"{i}.json"
        if not kept.exists():
            accuracy = []
            for seed in range(SEEDS):
                network = design.build(seed)

                def loss(module: torch.nn.Module, chosen: torch.Tensor) -> torch.Tensor:
                    return torch.nn.functional.cross_entropy(module(x[known[chosen]]), y[known[chosen]])

                settings = replace(ADAM, steps=STEPS, rows=64, rate=2e-3, seed=seed)
                fit(
                    network, lambda n, seed=seed: drawn_rows(len(known), 64, n, seed), settings, loss=loss, device="cpu"
                )
                with torch.no_grad():
                    right = network.eval()(x[judged]).argmax(1) == y[judged]
                accuracy.append(round(float(right.float().mean()), 4))
            told = proxies(design.build(0), x[known[:64]], y[known[:64]])
            kept.write_text(json.dumps({"design": row_of(design), "accuracy": accuracy, "proxies": told}))
        rows.append(kept.read_text("utf-8"))
        print(i + 1, "of", EACH * len(KINDS), flush=True)
    OUT.write_text("[\n" + ",\n".join(rows) + "\n]\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "network-accuracies"))
