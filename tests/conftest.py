"""What every test run needs: no network, few threads, the same random numbers every time."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch or Transformers, in the workers of xdist too.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Small tensors, and workers that share the cores: more threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

settings.register_profile("manyheads", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("manyheads")


def pytest_configure(config: pytest.Config) -> None:
    """Before the hook of jaxtyping meets the first module of the package; without it, the check's packages stay out."""
    if config.getoption("jaxtyping_packages", None):
        import shapes

        shapes.only_where_shapes_are_said()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator; torch's only where it is loaded already, so that light tests stay light."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    return 0


@pytest.fixture
def any_shape() -> Iterator[None]:
    """For tests of our own refusals of wrong shapes: the check of annotations (tests/shapes.py) would be first."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
