"""Index and domain (#4): is an ordinal's embedding the sum of a part for its index and a part for its domain?

Gould et al., arXiv:2312.09230. A linear map P is to take the index from one ordinal and leave the domain of another:

    P E0[a] + (I - P) E0[b] = E0[c],    c = the ordinal with the index of a in the domain of b    (third, May -> March)

top-1 = share of pairs (a, b) whose left side is nearest (cosine, about the mean) to E0[c] among all ordinals       in [0, 1]

We solve for P by ridge regression, where the paper trains it through a decoder. **The trap:** a linear map in many
dimensions can learn ordinals by heart, so that held-out *pairs* of ordinals it has met are decoded even where indices were
shuffled. Therefore some *answers* are held out as well: ordinals that were in no pair at all while P was fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.atlas.patterns.copying import Embedding, token_embedding
from manyheads.atlas.successor_heads.ordinals import Ordinals, ordinals
from manyheads.atlas.successor_heads.scores import Classes
from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel

MAX_PAIRS = 20_000


@dataclass(frozen=True)
class Decoding:
    """Top-1 on held-out pairs of known ordinals, and on pairs whose answer P never met; `index` and `domain`: that part right."""

    pairs: float
    answers: float
    answers_index: float
    answers_domain: float


@dataclass(frozen=True)
class IndexDomain:
    """The map `P` `[D, D]` (x P picks the index) and its decoding beside baselines of the same kind.

    `shuffled`: fitted and tested with the indices shuffled within each domain. `keep_index`: P = I, answers a itself.
    `keep_domain`: P = 0, answers b itself. `n_pairs` and `n_answers` count the test pairs.
    """

    P: Float[Tensor, "D D"]
    decoding: Decoding
    shuffled: Decoding
    keep_index: Decoding
    keep_domain: Decoding
    n_pairs: int
    n_answers: int


def index_domain(
    model: HeadModel,
    *,
    classes: Classes | None = None,
    first: Mapping[str, int] | None = None,
    embed: Embedding = "mlp",
    held_out: float = 0.2,
    ridge: float = 1e-3,
    seed: int = 0,
) -> IndexDomain:
    """Fit P and decode pairs it has not met (formula above).

    A share `held_out` of the pairs, and of the ordinals as answers, is kept for the test. `ridge` is relative to the
    mean square of what P reads. `classes` and `first` as in `ordinals`.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out}; give a share between 0 and 1.")
    tokens = ordinals(model, classes, first)
    x = token_embedding(model, tokens.ids.to(model.device), embed).double()
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(seed)
    unseen = torch.rand(len(tokens), generator=generator) < held_out
    mixed = tokens.index.clone()
    for domain in range(len(tokens.names)):
        here = (tokens.domain == domain).nonzero()[:, 0]
        mixed[here] = tokens.index[here[torch.randperm(len(here), generator=generator)]]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    results = []
    for index, fixed in ((tokens.index, None), (mixed, None), (tokens.index, eye), (tokens.index, 0 * eye)):
        train, pairs, answers = _pairs(tokens, index, unseen, held_out, generator)
        if not len(train) or not len(pairs) or not len(answers):
            raise InputError("too few ordinals share an index across classes; give two classes or more that do.")
        P = _fit(x, train, ridge) if fixed is None else fixed
        results.append((P, _decode(x, P, pairs, answers, tokens, index), len(pairs), len(answers)))
    (P, decoding, n_pairs, n_answers), (_, shuffled, *_), (_, index_kept, *_), (_, domain_kept, *_) = results
    return IndexDomain(P, decoding, shuffled, index_kept, domain_kept, n_pairs, n_answers)


def _pairs(
    tokens: Ordinals, index: Int[Tensor, "N"], unseen: Tensor, held_out: float, generator: torch.Generator
) -> tuple[Int[Tensor, "M 3"], Int[Tensor, "K 3"], Int[Tensor, "J 3"]]:
    """Triples (a, b, c): to fit P, held-out ones of known ordinals, and those with an unseen answer."""
    top = int(index.max()) + 1
    at = torch.full((len(tokens.names), top), -1)
    at[tokens.domain, index] = torch.arange(len(tokens))
    a, b = torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(len(tokens))).T
    c = at[tokens.domain[b], index[a]]
    usable = (tokens.domain[a] != tokens.domain[b]) & (c >= 0) & (c != b) & ~unseen[a] & ~unseen[b]
    triples = torch.stack([a, b, c], 1)[usable]
    triples = triples[torch.randperm(len(triples), generator=generator)]
    new = unseen[triples[:, 2]]
    known = triples[~new][:MAX_PAIRS]
    cut = round(held_out * len(known))
    return known[cut:], known[:cut], triples[new][:MAX_PAIRS]


def _fit(x: Float[Tensor, "N D"], triples: Int[Tensor, "M 3"], ridge: float) -> Float[Tensor, "D D"]:
    a, b, c = x[triples].unbind(1)
    read, wanted = a - b, c - b
    gram = read.T @ read
    floor = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + floor, read.T @ wanted)


def _decode(
    x: Float[Tensor, "N D"], P: Tensor, pairs: Tensor, answers: Tensor, tokens: Ordinals, index: Tensor
) -> Decoding:
    def nearest(triples: Tensor) -> Tensor:
        a, b, _ = x[triples].unbind(1)
        made = a @ P + b - b @ P
        return (F.normalize(made, dim=-1) @ F.normalize(x, dim=-1).T).argmax(-1).cpu()

    def share(right: Tensor) -> float:
        return float(right.double().mean())

    known, new = nearest(pairs), nearest(answers)
    return Decoding(
        pairs=share(known == pairs[:, 2]),
        answers=share(new == answers[:, 2]),
        answers_index=share(index[new] == index[answers[:, 2]]),
        answers_domain=share(tokens.domain[new] == tokens.domain[answers[:, 2]]),
    )
