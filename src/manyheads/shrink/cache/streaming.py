"""StreamingLLM's cache: the first tokens and the last ones, in every head. The baseline of everything that chooses better.

Xiao et al., arXiv:2309.17453. Departure: keys keep the positions at which they were read. The paper numbers them anew inside the
cache, which is needed for texts beyond the trained length; see LongHeads for those.
"""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.inputs import check_integer
from manyheads.model.headmodel import HeadModel
from manyheads.shrink.cache.press import Press, kv_heads
from manyheads.shrink.cache.ragged import Window


@dataclass(frozen=True)
class Streaming(Press):
    """Every head keeps the first `sinks` tokens of its row and the last `recent`."""

    sinks: int = 4
    recent: int = 252

    def __post_init__(self) -> None:
        check_integer(self.sinks, "sinks", 0)
        check_integer(self.recent, "recent", 1)

    def windows(self, model: HeadModel) -> list[list[Window | None]]:
        return [[Window(self.sinks, self.recent)] * n for n in kv_heads(model)]
