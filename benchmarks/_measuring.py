"""What the benchmarks measure with: seconds in turns, memory of a process of its own, the same weights in transformer-lens."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import manyheads as mh


def timed(rounds: int, *functions: Callable[[], Any]) -> list[float]:
    """Least seconds of each function, run in turns; the first round warms up."""
    best = [float("inf")] * len(functions)
    for turn in range(rounds + 1):
        for i, function in enumerate(functions):
            started = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - started) if turn else best[i]
    return best


def grown(file: str, task: str, threads: int) -> float:
    """MiB by which a process of its own (`file` called with `--child task`) grew while it ran `print_growth`."""
    command = [sys.executable, file, "--child", task, "--threads", str(threads)]
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "PYTHONPATH": str(Path(__file__).parent)}  # for this module
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def print_growth(work: Callable[[], Any]) -> None:
    """Do `work` and print by how many MiB the process grew at most."""
    before = psutil.Process().memory_info().rss
    print(json.dumps((highest_memory(work) - before) / 2**20))


def highest_memory(work: Callable[[], Any], every: float = 0.001) -> int:
    """Do `work` and say how many bytes the process held at most, looked at every so many seconds."""
    process, stop = psutil.Process(), threading.Event()
    highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not stop.wait(every):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return int(max(highest, process.memory_info().rss))


def lens(model: mh.HeadModel) -> Any:
    """The same weights in transformer-lens: its bridge over a saved copy, as its documentation opens a model."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        path = model.save_pretrained(Path(folder) / "model")
        tokenizer = model.tokenizer or mh.open_model().tokenizer  # it wants one; none is used
        return TransformerBridge.boot_transformers(
            str(path), hf_model=copy.deepcopy(model.plain), tokenizer=tokenizer, device="cpu"
        )
