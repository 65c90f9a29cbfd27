"""What users could bring, at random: damaged files, JSON values, numbers and command lines. None may end in a traceback.

    python benchmarks/fuzz.py --cases 10000

The cases are those of tests/fuzzing.py. It prints how many ran of each kind, and every different traceback; exit code 1 if there
is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fuzzing import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged files and odd command lines, at random.")
    parser.add_argument("--cases", type=int, default=10_000, help="How many.")
    parser.add_argument("--seed", type=int, default=0, help="Which ones.")
    parser.add_argument("--only", default=None, help="Only cases of this kind.")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ran, failures = fuzz(
            given.cases, Path(folder), seed=given.seed, only=given.only, told=lambda line: print(line, flush=True)
        )
    for place, how in failures.items():
        print(f"\n{place}\n{how}")
    print(f"{ran} cases in {time.perf_counter() - started:.0f} s, {len(failures)} different tracebacks")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
