"""Fifty clients ask one explorer for ten minutes: answers a second, the slowest of a hundred, and the memory of the server.

    manyheads bench explorer_load [--clients 50] [--minutes 10]

Every client opens the page, then asks again and again: next tokens, a pattern, an edit; and reads the events to their end. Where
the queue is full (429) it waits. Any other answer is an error.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import psutil

WORDS = "red cat seven lamp Paris blue dog nine chair Rome".split()


def request(base: str, token: str, path: str, body: object = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"x-manyheads-token": token, "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(base + path, data, headers), timeout=120) as answer:
        return str(answer.read().decode())


def client(base: str, token: str, end: float, seconds: list[float], seen: Counter[str], seed: int) -> None:
    draw = random.Random(seed)
    try:
        request(base, token, "/")
        while time.monotonic() < end:
            prompt = " ".join(draw.choices(WORDS, k=12))
            asked = draw.choice(
                [
                    {"kind": "predict", "prompt": prompt},
                    {"kind": "pattern", "prompt": prompt, "head": f"L{draw.randrange(6)}H{draw.randrange(8)}"},
                    {"kind": "edit", "prompt": prompt, "scales": [{"head": "L3H4", "scale": 0}], "new_tokens": 2},
                ]
            )
            started = time.monotonic()
            try:
                job = json.loads(request(base, token, "/api/jobs", asked))
                last = json.loads(request(base, token, f"/api/jobs/{job['id']}/events").strip().split("\n\n")[-1][6:])
                seen[last["state"]] += 1
                seconds.append(time.monotonic() - started)
            except urllib.error.HTTPError as error:
                seen[str(error.code)] += 1
                time.sleep(draw.uniform(0.2, 1.0))
    except Exception as error:
        seen[f"{type(error).__name__}: {error}"[:80]] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    command = [sys.executable, "-m", "manyheads", "explore", "ladon", "--no-browser", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = next(word for word in server.stderr.readline().split() if word.startswith("http"))
    base, token = address.split("/?token=")
    threading.Thread(target=server.stderr.read, daemon=True).start()
    seconds, seen, process = list[float](), Counter[str](), psutil.Process(server.pid)
    end = time.monotonic() + 60 * given.minutes
    crowd = [
        threading.Thread(target=client, args=(base, token, end, seconds, seen, i), daemon=True)
        for i in range(given.clients)
    ]
    for one in crowd:
        one.start()
    print("minutes   answers   MiB of the server", flush=True)
    every = max(5.0, 6 * given.minutes)
    while time.monotonic() < end:
        time.sleep(min(every, max(0.1, end - time.monotonic())))
        passed = given.minutes - (end - time.monotonic()) / 60
        print(f"{passed:7.1f} {len(seconds):9d} {process.memory_info().rss / 2**20:9.0f}", flush=True)
    for one in crowd:
        one.join(60)
    server.terminate()
    server.wait(20)
    ordered = sorted(seconds)
    print(
        f"{len(ordered) / given.minutes / 60:.1f} answers a second; half within {ordered[len(ordered) // 2]:.2f} s, ",
        end="",
    )
    print(f"99 of 100 within {ordered[int(0.99 * len(ordered))]:.2f} s; ends: {dict(seen)}")


if __name__ == "__main__":
    main()
