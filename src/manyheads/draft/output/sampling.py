"""How far sampling from drawn clusters of the output matrix (#24) moves the distribution of tokens.

Sampling from P drawn clusters gives token v of cluster k, where p is the dense head's softmax at the temperature, S the drawn
clusters and p(S) their tokens' probability,

    q(v) = p(v) r_k,     r_k = E_S[ 1(k in S) / p(S) ],     TV = 1/2 sum_v |q(v) - p(v)|,     KL = sum_v q(v) log r_k    [nats]

The expectation over S is a mean over draws of all Gumbel noise but cluster k's own, which is integrated exactly: given the other
clusters' P-th largest score t, k is drawn with chance 1 - exp(-exp(s_k - t)). So no r_k is zero, and perplexities are finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.draft.output.flash_head import FlashHead
from manyheads.draft.output.measuring import ReadText
from manyheads.errors import InputError


@dataclass(frozen=True)
class SamplingLoss:
    """How far sampled tokens are from the dense head's: means over states. `text` is the perplexity of the tokens that follow
    (infinite if one cannot be sampled), `sampled` that of the sampled tokens in the dense head's eyes."""

    tv: float
    kl: float
    text: float
    sampled: float


@torch.no_grad()
def sampling_loss(
    head: FlashHead, text: ReadText, *, temperature: float = 1.0, draws: int = 16, best: bool = False, seed: int = 0
) -> tuple[SamplingLoss, SamplingLoss]:
    """(The head's, the dense head's) loss in sampling at `temperature`, with `draws` of the clusters for each state.

    `best` takes the clusters of the greedy search instead of drawn ones. `InputError` without a temperature above 0 or a draw.
    """
    if not temperature > 0 or draws < 1:
        raise InputError(f"temperature {temperature}, {draws} draws: give a temperature above 0 and at least one draw.")
    generator = torch.Generator(head.rows.device).manual_seed(seed)
    parts = []
    for states, following in zip(text.states.split(64), text.following.split(64), strict=True):
        log_p = _dense(head, states, temperature)
        log_r = _best(head, states, log_p) if best else _drawn(head, states, log_p, temperature, draws, generator)
        parts += [_loss(log_p, log_r, following), _loss(log_p, torch.zeros_like(log_p), following)]
    means = [torch.cat(parts[i::2]).double().mean(0).tolist() for i in (0, 1)]
    ours, dense = (SamplingLoss(tv, kl, _exp(text), _exp(sampled)) for tv, kl, text, sampled in means)
    return ours, dense


def _exp(nats: float) -> float:
    return float(torch.tensor(nats, dtype=torch.double).exp())


def _loss(
    log_p: Float[Tensor, "N V"], log_r: Float[Tensor, "N V"], following: Int[Tensor, "N"]
) -> Float[Tensor, "N 4"]:
    log_q = log_p + log_r
    q = log_q.exp()
    rises = torch.where(q > 0, log_r, 0)
    at = following[:, None]
    return torch.stack(
        [
            0.5 * (q - log_p.exp()).abs().sum(1),
            (q * rises).sum(1),
            -log_q.gather(1, at)[:, 0],
            -(q * log_p).sum(1),
        ],
        1,
    )


def _dense(head: FlashHead, states: Float[Tensor, "N D"], temperature: float) -> Float[Tensor, "N V"]:
    scores = F.linear(states.to(head.rows.dtype), head.rows, head.bias).float()
    logits = scores.new_empty(len(states), head.vocab_size)
    logits[:, head.tokens] = scores  # an empty slot repeats a row: the same number twice
    return (logits / temperature).log_softmax(-1)


def _best(head: FlashHead, states: Float[Tensor, "N D"], log_p: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    inside = head.logits(states).isfinite()
    kept = log_p.masked_fill(~inside, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(inside, -kept, -torch.inf)


def _drawn(
    head: FlashHead,
    states: Float[Tensor, "N D"],
    log_p: Float[Tensor, "N V"],
    temperature: float,
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "N V"]:
    """Log r of every token (formula above)."""
    p = log_p.exp()
    always = torch.tensor(head.specials, dtype=torch.long, device=p.device)
    fixed = p[:, always].sum(1, keepdim=True)
    rest = p.index_fill(1, always, 0.0)
    taken = head.ids >= 0
    mass = (rest[:, head.ids.clamp(min=0)] * taken).sum(-1)  # [N, K]
    scores = F.linear(states.to(head.rows.dtype), head.means, head.mean_bias).float() / temperature
    ratio, special = torch.zeros_like(mass), torch.zeros_like(fixed)
    for _ in range(draws):
        noisy = scores - torch.empty_like(scores).exponential_(generator=generator).log()
        top = noisy.topk(min(head.probes + 1, noisy.shape[1]), sorted=True)
        inside = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, top.indices[:, : head.probes], True)
        kept = (mass * inside).sum(1, keepdim=True) + fixed
        special += 1 / (draws * kept)
        if head.probes == mass.shape[1]:
            ratio += 1 / (draws * kept)
            continue
        last, beyond = top.indices[:, head.probes - 1 : head.probes], top.values[:, -1:]
        threshold = torch.where(inside, beyond, top.values[:, -2:-1])
        # With k in S, the other P - 1 clusters are the same; a k outside takes the place of the last one inside.
        with_k = torch.where(inside, kept, kept - mass.gather(1, last) + mass)
        chance = -torch.expm1(-torch.exp(scores - threshold))
        ratio += chance / (draws * with_k.clamp(min=1e-30))
    log_r = torch.empty_like(log_p)
    log_r[:, head.ids[taken]] = ratio.clamp(min=1e-38).log().repeat_interleave(taken.sum(1), 1)
    log_r[:, always] = special.log()
    return log_r
