"""What opens of every config class of Transformers: prints the table and writes docs/architectures.md.

    python benchmarks/architectures.py [TYPE ...] [--out docs/architectures.md]

With types, only their lines are printed and nothing is written. The whole takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import zoo  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types, such as llama; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in arguments.types or [n for n in zoo.CONFIG_MAPPING_NAMES if zoo.model_classes(n)]:
        for row in zoo.checked(name):
            rows.append(row)
            print(f"{row.state:10} {row.type} {row.part} {row.words[:200]}", flush=True)
    print(dict(collections.Counter(row.state for row in rows)))
    if not arguments.types:
        arguments.out.write_text(zoo.table(rows), "utf-8")


if __name__ == "__main__":
    main()
