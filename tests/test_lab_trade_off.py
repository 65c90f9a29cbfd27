"""#51, the trade-off: the three tests tell a reader of the prompt from a memory, and the data decide which one is learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn
from torch.nn import functional as F

from manyheads.lab.formation.trade_off import SMALL, accuracies_by_test, trade_off

KNOWN = replace(SMALL, classes=64, noise=0.1)


class Reader(nn.Module):
    """Answers with the label beside the item of the context that is most like the target; it knows no class."""

    def forward(self, given):
        items, target = given.content[:, :-1:2], given.content[:, -1]
        at = (items @ target[..., None])[..., 0].argmax(-1)
        return F.one_hot(given.labels[:, :-1].gather(1, at[:, None])[:, 0], 16).float()


class Memory(nn.Module):
    """Answers with the label of the class whose mean is nearest; it sees no context."""

    def forward(self, given):
        means, _ = KNOWN.vectors()
        return F.one_hot((given.content[:, -1] @ means.T).argmax(-1) % 16, 16).float()


def test_a_reader_follows_the_context_and_a_memory_the_class():
    reader, memory = accuracies_by_test(Reader(), KNOWN), accuracies_by_test(Memory(), KNOWN)
    assert reader["in context"] > 0.97 and reader["swapped"] > 0.97 and reader["in weights"] == 0
    assert memory["in weights"] > 0.99 and memory["swapped"] == 0
    assert memory["in context"] == pytest.approx(1 / 16, abs=0.02)


def test_few_classes_are_remembered():
    found = trade_off(updates=250)
    assert found["in weights"] > 0.95 and found["swapped"] < 0.05 and found["in context"] < 0.15
    assert trade_off(updates=10, seed=1) == trade_off(updates=10, seed=1)


@pytest.mark.slow
def test_many_classes_are_read_from_the_context_and_not_by_a_network_that_cannot_look_at_other_tokens():
    task = replace(SMALL, classes=1024)
    found, held = trade_off(task), trade_off(task, held=True)
    assert found["swapped"] > 0.9 and found["in weights"] < 0.1
    assert held["in context"] < 0.35
    assert found["in context"] > 0.9
