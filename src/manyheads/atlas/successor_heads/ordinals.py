"""What the analyses of successor heads (#4) share: ordinals with index and domain, and heads' logits for vectors in place of E0.

    logits(x)[u] = sum_{(l, h) in heads} ( x W_OV[l,h] W_U )[u],    u in the domain of the token that x stands for

read through each layer's own input norm and the final norm's gain, as in `successor`. Several heads are one summed circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.atlas.patterns.copying import Embedding, token_embedding
from manyheads.atlas.successor_heads.scores import Classes, ordinal_classes
from manyheads.errors import InputError
from manyheads.heads import Head, HeadLike, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.ov import ov_z, readout
from manyheads.tasks.families.successor import KINDS

MODULUS = 10
AT_ONCE = 2048  # vectors sent through the model together


@dataclass(frozen=True)
class Ordinals:
    """Tokens with an order: `domain[n]` counts the classes, `index[n]` is 3 for 3, three, third and March."""

    ids: Int[Tensor, "N"]
    index: Int[Tensor, "N"]
    domain: Int[Tensor, "N"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def residue(self) -> Int[Tensor, "N"]:
        """The index modulo 10."""
        return self.index % MODULUS

    @cached_property
    def has_successor(self) -> Bool[Tensor, "N"]:
        """Whether the next token is of the same domain: true of all but the last of a domain."""
        return torch.cat([self.domain[1:] == self.domain[:-1], torch.zeros(1, dtype=torch.bool)])

    def of(self, name: str) -> Bool[Tensor, "N"]:
        """The tokens of one domain."""
        if name not in self.names:
            raise InputError(f"there is no ordinal class {name!r}; choose one of {', '.join(self.names)}.")
        return self.domain == self.names.index(name)


def ordinals(model: HeadModel, classes: Classes | None = None, first: Mapping[str, int] | None = None) -> Ordinals:
    """The ordinals of `classes` (token ids in order, by name), or those of the model's tokenizer (see `ordinal_classes`).

    `first` gives the index of a class's first item; without it, it is looked up by the token's text (numbers count from 0, all
    else from 1), and 1 where there is no tokenizer. `InputError` for classes of fewer than two tokens.
    """
    classes = ordinal_classes(model.tokenizer) if classes is None else classes
    if not classes or any(len(ids) < 2 for ids in classes.values()):
        raise InputError("an ordinal class needs two tokens or more.")
    rows: list[tuple[int, int, int]] = []
    for domain, (name, ids) in enumerate(classes.items()):
        start = first[name] if first is not None and name in first else _first(model.tokenizer, ids)
        rows += [(int(token), start + i, domain) for i, token in enumerate(ids)]
    ids, index, domains = torch.tensor(rows).T
    return Ordinals(ids, index, domains, tuple(classes))


class OrdinalCircuit:
    """The logits that `heads` together write for vectors in the place of ordinals' embeddings.

    `embeddings` `[N, D]` are those of `tokens` (`embed`: E0, the embedding, or their sum).
    """

    def __init__(
        self, model: HeadModel, heads: Iterable[HeadLike] | Head | str, tokens: Ordinals, embed: Embedding = "mlp"
    ) -> None:
        self.model, self.tokens, self.embed = model, tokens, embed
        self.heads = model.head_set(HeadSet(heads))
        if not self.heads:
            raise InputError("no heads given; name one head or more, for example 'L3H5'.")
        self.embeddings = token_embedding(model, tokens.ids.to(model.device), embed).float()
        self._unembedding = readout(model, tokens.ids.to(model.device)).float()

    def logits(self, x: Float[Tensor, "M D"], rows: Int[Tensor, "M"]) -> Float[Tensor, "M N"]:
        """Logits of all ordinals where `x[m]` stands for ordinal `rows[m]`; minus infinity outside its domain."""
        logits = self._logits(x.to(self.embeddings)).cpu()
        same = self.tokens.domain[rows.cpu(), None] == self.tokens.domain
        return logits.masked_fill(~same, -torch.inf)

    def contrast(self, x: Float[Tensor, "M D"], rows: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        """The successor's logit minus the mean over its domain, for rows that have a successor."""
        logits = self.logits(x, rows)
        inside = logits.isfinite()
        mean = logits.where(inside, torch.zeros(())).sum(-1) / inside.sum(-1)
        return logits.gather(-1, rows.cpu()[:, None] + 1)[:, 0] - mean

    def score(self) -> float:
        """The successor score of the heads' sum."""
        rows = self.tokens.has_successor.nonzero()[:, 0]
        return float((self.logits(self.embeddings[rows], rows).argmax(-1) == rows + 1).double().mean())

    @cached_property
    def _linear(self) -> tuple[str, Tensor, Tensor] | None:
        """`(norm, A, c)` with `logits(x) = x A / sigma(x) + c`, measured on unit vectors; None if the model itself differs."""
        width = self.embeddings.shape[1]
        constant = self._through_model(torch.zeros(1, width, device=self.embeddings.device))
        unit = 1e3 * torch.eye(width, device=self.embeddings.device)  # so long that no norm's epsilon counts
        logits = torch.cat([self._through_model(part) for part in unit.split(AT_ONCE)]) - constant
        # Random vectors too: a head that does not react to E0 would fit any norm.
        drawn = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(unit)
        tried = torch.cat([self.embeddings, drawn * self.embeddings.norm(dim=1).mean() / width**0.5])
        wanted = self._through_model(tried)
        for norm in SIGMAS:
            matrix = logits * SIGMAS[norm](unit) / 1e3
            got = tried @ matrix / SIGMAS[norm](tried) + constant
            if (got - wanted).norm() <= 2e-3 * wanted.norm():
                return norm, matrix, constant
        return None

    def _logits(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "M N"]:
        if self._linear is None:
            return torch.cat([self._through_model(part) for part in x.split(AT_ONCE)])
        norm, matrix, constant = self._linear
        return x @ matrix / SIGMAS[norm](x) + constant

    def _through_model(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "M N"]:
        z = ov_z(self.model, x)
        write = sum(
            z[layer][:, heads].flatten(1) @ self.model.W_O(layer)[heads].detach().to(z).flatten(0, 1)
            for layer, heads in self.heads.by_layer().items()
        )
        return torch.as_tensor(write).to(self._unembedding) @ self._unembedding.T


SIGMAS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms": lambda x: x.square().mean(-1, keepdim=True).sqrt(),
    "layer": lambda x: x.var(-1, correction=0, keepdim=True).sqrt(),
    "none": lambda x: torch.ones_like(x[..., :1]),
}


def _first(tokenizer: Any, ids: Sequence[int]) -> int:
    if tokenizer is None:
        return 1
    text = tokenizer.decode([int(ids[0])]).strip().lower()
    for kind, items in KINDS.items():
        known = [item.lower() for item in items]
        if text in known:
            return known.index(text) + (kind != "number")
    return 1
