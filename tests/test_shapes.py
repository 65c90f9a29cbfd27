"""The check of shapes in these tests (tests/shapes.py) is made where a shape is said, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from jaxtyping import Float, Int
from shapes import checked, only_where_shapes_are_said
from torch import Tensor

Named = Float[Tensor, "B T"]


@pytest.fixture
def hook(monkeypatch):
    """What jaxtyping's import hook puts around each function and class."""
    monkeypatch.setattr(jaxtyping, "jaxtyped", jaxtyping.jaxtyped)
    only_where_shapes_are_said()
    return jaxtyping.jaxtyped(typechecker=checked)


@dataclass
class Holds:
    value: Named | None = None


@dataclass
class Plain:
    value: Tensor


def says_none(x: Tensor, name: str = "Float") -> int:
    return len(x)


def takes(x: list[Int[Tensor, "B"]]) -> None: ...


def gives(x: Tensor) -> Named:
    return x


def test_what_says_no_shape_is_left_as_it_is(hook):
    assert hook(says_none) is says_none and hook(Plain).__init__ is Plain.__init__


@pytest.mark.parametrize("made", [takes, gives, Holds], ids=lambda made: made.__name__)
def test_what_says_one_is_checked_also_by_another_name_and_inside_another_type(hook, made):
    given = (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    right = {takes: [given[1]], gives: torch.zeros(2, 3), Holds: torch.zeros(2, 3)}[made]
    wrong = {takes: [given[0]], gives: torch.zeros(2), Holds: torch.zeros(2)}[made]
    tried = hook(made)
    tried(right)
    with pytest.raises(jaxtyping.TypeCheckError):
        tried(wrong)


def test_the_run_that_asked_for_the_check_has_it(request):
    if not request.config.getoption("jaxtyping_packages", None):
        pytest.skip("run with --jaxtyping-packages=manyheads,shapes.checked")
    from manyheads.heads import mean_stderr
    from manyheads.inputs import check_integer

    assert hasattr(mean_stderr, "__wrapped__") and not hasattr(check_integer, "__wrapped__")
