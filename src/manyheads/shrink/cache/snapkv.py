"""SnapKV and the head budgets of AdaKV: what the end of a prompt looks at stays.

SnapKV (Li et al., arXiv:2404.14469). The w newest queries vote for the tokens before them:

    score[g, s] = pool_s( mean over g's query heads, sum over w queries of softmax(q k^T / sqrt(Dh))[s] )

The newest w tokens stay in any case. The pooling (a mean over `kernel` neighbours) keeps what stands around a token.

AdaKV (Feng et al., arXiv:2407.11550). All KV heads of a layer share one budget, n_kv_heads * n: the highest scores of the layer
stay, whichever head they are in, but each head keeps at least `safeguard` * n. It takes any method that scores tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number
from manyheads.shrink.cache.press import CacheCall, Press, ScorePress, highest
from manyheads.shrink.cache.ragged import RaggedLayer
from manyheads.shrink.shrinking import shrinks


@dataclass(frozen=True)
class SnapKV(ScorePress):
    """Keeps what the newest 32 queries attend to most. `kernel` is odd: over how many neighbours scores are averaged."""

    newest: ClassVar[int] = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_integer(self.kernel, "kernel", 1) % 2 == 0:
            raise InputError(f"kernel is {self.kernel}; give an odd number of neighbours, the token itself among them.")

    def score(self, call: CacheCall) -> Float[Tensor, "B G S"]:
        votes = attention_of(call).sum(-2).mean(2)
        votes = avg_pool1d(votes, self.kernel, 1, self.kernel // 2)
        votes[..., votes.shape[-1] - call.queries.shape[2] :] = math.inf
        return votes


def attention_of(call: CacheCall) -> Float[Tensor, "B G R W S"]:
    """The newest queries' attention to what is held; R query heads on each of G KV heads."""
    groups, width = call.keys.shape[1], call.queries.shape[-1]
    queries = call.queries.unflatten(1, (groups, -1))
    scores = queries @ call.keys[:, :, None].transpose(-1, -2) * getattr(call.core, "scaling", width**-0.5)
    newest, length = scores.shape[-2:]
    later = torch.ones(newest, length, dtype=torch.bool, device=scores.device).triu(length - newest + 1)
    hidden = later | ~call.held[:, :, None, None]
    # A row of padding sees nothing; its NaN must not vote.
    return scores.masked_fill(hidden, -math.inf).float().softmax(-1).nan_to_num(0.0)


@dataclass(frozen=True)
class AdaKV(Press):
    """The budget of `press`, shared out among the KV heads of each layer by what they score."""

    press: ScorePress
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.press, ScorePress):
            raise InputError(f"AdaKV shares out the budget of a method that scores tokens, not of {self.press!r}.")
        check_number(self.safeguard, "safeguard", 0.0, 1.0)

    @property
    def newest(self) -> int:  # type: ignore[override]
        return self.press.newest

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        return self.press.needs_hidden

    def due(self, layer: RaggedLayer, new: int) -> bool:
        return self.press.due(layer, new)

    def compress(self, call: CacheCall) -> Bool[Tensor, "B G S"]:
        scores = self.press.score(call).masked_fill(~call.held, -math.inf)
        each = self.press.budget(call).to(scores.device)
        safe = highest(scores, (self.safeguard * each).ceil().long()[:, None]) & call.held
        lifted = scores.masked_fill(safe, math.inf)
        total = highest(lifted.flatten(1), each * scores.shape[1])
        return total.view_as(scores) & call.held


@shrinks("snapkv", "cache", "every head keeps what the end of the prompt attends to")
def _snapkv(ratio: float) -> SnapKV:
    return SnapKV(compression_ratio=ratio)


@shrinks("adakv", "cache", "SnapKV with one budget for all heads of a layer")
def _adakv(ratio: float) -> AdaKV:
    return AdaKV(SnapKV(compression_ratio=ratio))
