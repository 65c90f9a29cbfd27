"""Ladon, the small language model that comes with manyheads, so that everything can be tried without a download."""

from pathlib import Path


def ladon_path() -> Path:
    """The folder of the bundled model, which Transformers loads like any other."""
    return Path(__file__).parent / "ladon"
