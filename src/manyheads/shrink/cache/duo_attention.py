"""DuoAttention (#47): retrieval heads keep every token, the others the first and the last.

Xiao et al., arXiv:2410.10819. Every KV head has a score; the share `compression_ratio` that scores lowest, over all layers,
streams: it keeps `sinks` + `recent` tokens, and the cache grows by the other heads alone.

    bytes = (n_full * T + n_streaming * (sinks + recent)) * (Dh_k + Dh_v) * bytes of a number      (for each row)

Scores are trained gates (`duo_gates`) or measured in one pass (`duo_scores`), which is done where none are given. Departures: a
streaming head sees as many tokens when it decodes as it saw when its gate was trained, the new one among the recent (the paper's
decoding sees one more); and the share is met exactly, by rank, where the paper adds noise to break ties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from manyheads.errors import InputError, MismatchError
from manyheads.heads import HeadScores
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.model.headmodel import HeadModel
from manyheads.shrink.cache.duo_scores import duo_scores
from manyheads.shrink.cache.press import Press, kv_heads
from manyheads.shrink.cache.ragged import Window
from manyheads.shrink.shrinking import shrinks

_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[str, int, int], HeadScores]] = WeakKeyDictionary()


@dataclass(frozen=True)
class DuoAttention(Press):
    """A share of the KV heads streams.

    A prompt (or each chunk of one) is read densely, and cut after. With `prompt="streaming"` streaming heads have their window
    while it is read, too: less work for long prompts, but what is read is then no longer exact.
    """

    compression_ratio: float = 0.5
    sinks: int = 64
    recent: int = 256
    scores: HeadScores | None = None
    prompt: Literal["dense", "streaming"] = "dense"

    def __post_init__(self) -> None:
        check_number(self.compression_ratio, "compression_ratio", 0.0, 1.0)
        check_integer(self.sinks, "sinks", 0)
        check_integer(self.recent, "recent", 1)
        check_choice(self.prompt, "prompt", ("dense", "streaming"))

    @property
    def streams_prompt(self) -> bool:  # type: ignore[override]
        return self.prompt == "streaming"

    def windows(self, model: HeadModel) -> list[list[Window | None]]:
        """`MismatchError` where the scores are another model's, `InputError` where they have another shape."""
        scores = self.scores_of(model)
        heads = [(layer, g) for layer, n in enumerate(kv_heads(model)) for g in range(n)]
        lowest = sorted(
            heads, key=lambda head: float(scores.values[head])
        )  # stable: of equal ones the lower layer streams
        streaming = set(lowest[: round(self.compression_ratio * len(heads))])
        window = Window(self.sinks, self.recent)
        return [
            [window if (layer, g) in streaming else None for g in range(n)] for layer, n in enumerate(kv_heads(model))
        ]

    def settled(self, model: HeadModel) -> DuoAttention:
        return replace(self, scores=self.scores_of(model))

    def scores_of(self, model: HeadModel) -> HeadScores:
        """The scores given, or those of one pass over this model (kept while the model is in memory)."""
        if self.scores is None:
            known = _FOUND.setdefault(model.plain, {})
            key = (model.fingerprint, self.sinks, self.recent)
            if key not in known:
                length = max(1024, 2 * (self.sinks + self.recent))
                known[key] = duo_scores(model, length=length, sinks=self.sinks, recent=self.recent)
            return known[key]
        of = self.scores.meta.get("fingerprint")
        if of is not None and of != model.fingerprint:
            raise MismatchError(f"these scores are of model {of}, not of this one, {model.fingerprint}; score it anew.")
        if self.scores.shape != (model.n_layers, model.n_kv_heads):
            raise InputError(
                f"scores of KV heads have shape {(model.n_layers, model.n_kv_heads)} here, not {self.scores.shape}."
            )
        if np.isnan(self.scores.values[list(model.layout.attention_layers)]).any():
            raise InputError("some of the scores are no numbers; score the model anew.")
        return self.scores


@shrinks("duo", "cache", "retrieval heads keep every token, the others the first and the last")
def _make(ratio: float) -> DuoAttention:
    return DuoAttention(ratio)
