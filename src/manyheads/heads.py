"""Attention heads, sets of heads, and scores of heads: the words every room shares. Imports no other room."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Real, Shaped

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_atomically
from manyheads.inputs import check_integer, parse_json

_NAME = re.compile(r"L(\d{1,6})H(\d{1,6})", re.ASCII)


def mean_stderr(per_example: Shaped[np.ndarray, "N ..."]) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Mean and standard error over examples, the first axis; entries that are NaN do not count.

        mean = sum of x / n,    stderr = sqrt(sum of (x - mean)^2 / (n - 1)) / sqrt(n)        n: the entries that are not NaN

    The mean is NaN where no entry counts, the standard error where fewer than two do: one example says nothing of the next.
    """
    x = np.asarray(per_example, dtype=np.float64)
    missing = np.isnan(x)
    n = (~missing).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(missing, 0.0, x).sum(0) / n
        variance = np.where(missing, 0.0, (x - mean) ** 2).sum(0) / (n - 1)
        stderr = np.where(n > 1, np.sqrt(variance) / np.sqrt(n), np.nan)
    return np.asarray(mean), stderr


class Head(NamedTuple):
    """One attention head, written `L3H5`: layer 3, query head 5, both counted from 0."""

    layer: int
    index: int  # type: ignore[assignment]  # a head's index, not a tuple's method

    @classmethod
    def parse(cls, text: str) -> Head:
        """The head that `text` names. `InputError` unless it has the form `L3H5`."""
        match = _NAME.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise InputError(f"{text!r} does not name a head; write it as L<layer>H<index>, for example L3H5.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, value: HeadLike) -> Head:
        """A head from `"L3H5"`, `(3, 5)` or a `Head`."""
        if isinstance(value, str):
            return cls.parse(value)
        try:
            layer, index = (int(part) for part in value)
        except (TypeError, ValueError):
            raise InputError(f"{value!r} is not a head; give 'L3H5', (3, 5) or Head(3, 5).") from None
        if layer < 0 or index < 0:
            raise InputError(f"{value!r} is not a head; layer and index are counted from 0.")
        return cls(layer, index)

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"


HeadLike = Head | str | tuple[int, int]


class HeadSet(frozenset[Head]):
    """A set of heads: all set operations, iterated in order of layer and index.

    `shape` is `(n_layers, n_heads)` of the model the set belongs to, if known. Operations keep it.
    """

    shape: tuple[int, int] | None

    def __new__(cls, heads: Iterable[HeadLike] | HeadLike = (), shape: tuple[int, int] | None = None) -> HeadSet:
        single = isinstance(heads, (Head, str))
        self = super().__new__(cls, [Head.of(h) for h in ([heads] if single else heads)])  # type: ignore[list-item, union-attr, arg-type]
        self.shape = shape if shape is not None else getattr(heads, "shape", None)
        if self.shape is not None:
            self.check(*self.shape)
        return self

    def check(self, n_layers: int, n_heads: int) -> None:
        """`InputError` if a head lies outside a model with `n_layers` layers of `n_heads` heads."""
        outside = [h for h in self if h.layer >= n_layers or h.index >= n_heads]
        if outside:
            raise InputError(
                f"head {outside[0]} is out of range: this model has layers 0-{n_layers - 1} with heads 0-{n_heads - 1}."
            )

    def matched_random(
        self, n: int, seed: int = 0, *, shape: tuple[int, int] | None = None, disjoint: bool = True
    ) -> list[HeadSet]:
        """`n` random sets with as many heads in each layer as this one, the usual control of a causal claim.

        If `disjoint`, heads of the set itself are left out wherever its layers have enough others. Where they have not, all
        the others are taken and the rest is drawn from the set, which makes the control harder to beat, never easier.
        """
        shape = shape or self.shape
        if shape is None:
            raise InputError("this HeadSet does not know its model; pass shape=(n_layers, n_heads).")
        self.check(*shape)
        rng = np.random.default_rng(seed)
        wanted = Counter(h.layer for h in self)
        return [HeadSet(self._draw(wanted, shape[1], rng, disjoint), shape) for _ in range(n)]

    def _draw(self, wanted: Counter[int], n_heads: int, rng: np.random.Generator, disjoint: bool) -> Iterator[Head]:
        for layer, count in sorted(wanted.items()):
            if not disjoint:
                yield from (Head(layer, int(i)) for i in rng.permutation(n_heads)[:count])
                continue
            others = [i for i in range(n_heads) if Head(layer, i) not in self]
            own = [i for i in range(n_heads) if Head(layer, i) in self]
            chosen = list(rng.permutation(others)[:count])
            chosen += list(rng.permutation(own)[: count - len(chosen)])
            yield from (Head(layer, int(i)) for i in chosen)

    def by_layer(self) -> dict[int, list[int]]:
        """`{layer: [head indices]}`, both ascending."""
        layers: dict[int, list[int]] = {}
        for head in self:
            layers.setdefault(head.layer, []).append(head.index)
        return layers

    def __iter__(self) -> Iterator[Head]:
        return iter(sorted(super().__iter__()))

    def __str__(self) -> str:
        return ", ".join(str(h) for h in self) or "no heads"

    def __repr__(self) -> str:
        return f"HeadSet([{', '.join(repr(str(h)) for h in self)}])"

    def __reduce__(self) -> tuple[Any, ...]:
        return HeadSet, (list(self), self.shape)

    def _like(self, heads: Iterable[HeadLike], other: object = None) -> HeadSet:
        return HeadSet(heads, self.shape or getattr(other, "shape", None))

    def __or__(self, other: Any) -> HeadSet:
        return self._like(frozenset(self) | frozenset(HeadSet(other)), other)

    def __and__(self, other: Any) -> HeadSet:
        return self._like(frozenset(self) & frozenset(HeadSet(other)), other)

    def __sub__(self, other: Any) -> HeadSet:
        return self._like(frozenset(self) - frozenset(HeadSet(other)), other)

    def __xor__(self, other: Any) -> HeadSet:
        return self._like(frozenset(self) ^ frozenset(HeadSet(other)), other)


@dataclass(frozen=True)
class HeadScores:
    """One number a head, with its standard error over the examples behind it.

    `values` and `stderr` are `[L, H]`; `n` is the number of examples (0 where a score is read off the weights alone, whose
    standard error is then 0). `meta` carries the method, its settings, the seed, the version and the model's fingerprint.
    """

    name: str
    values: Real[np.ndarray, "L H"]
    stderr: Float[np.ndarray, "L H"]
    n: int
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, dtype=np.float64))
        object.__setattr__(self, "stderr", np.asarray(self.stderr, dtype=np.float64))
        if self.values.ndim != 2 or self.values.shape != self.stderr.shape:
            raise InputError(
                f"scores need values and stderr of one shape [L, H]; got {self.values.shape} and {self.stderr.shape}."
            )

    @classmethod
    def from_examples(
        cls, name: str, per_example: Shaped[np.ndarray, "N L H"], meta: dict[str, Any] | None = None
    ) -> HeadScores:
        """Mean and standard error over `per_example` (see `mean_stderr`); entries that are NaN do not count.

        `n` is the number of examples, whatever they hold; a head's standard error is over its own entries.
        """
        mean, stderr = mean_stderr(per_example)
        return cls(name, mean, stderr, len(per_example), meta or {})

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def __getitem__(self, head: HeadLike) -> float:
        head = Head.of(head)
        HeadSet([head], self.shape)
        return float(self.values[head])

    def ranked(self) -> list[tuple[Head, float]]:
        """Every head with its score, highest first; ties in order of layer and index."""
        order = np.argsort(-self.values, axis=None, kind="stable")
        n_heads = self.shape[1]
        return [(Head(int(i) // n_heads, int(i) % n_heads), float(self.values.flat[i])) for i in order]

    def top(self, k: int) -> HeadSet:
        """The `k` heads that score highest."""
        return HeadSet([head for head, _ in self.ranked()[:k]], self.shape)

    def above(self, threshold: float) -> HeadSet:
        """The heads that score at least `threshold`."""
        return HeadSet([Head(int(layer), int(h)) for layer, h in np.argwhere(self.values >= threshold)], self.shape)

    def to_frame(self) -> pd.DataFrame:
        """A row a head: layer, index, head, score, stderr, n."""
        layers, indices = (axis.ravel() for axis in np.indices(self.values.shape))
        return pd.DataFrame(
            {
                "layer": layers,
                "index": indices,
                "head": [str(Head(int(layer), int(i))) for layer, i in zip(layers, indices, strict=True)],
                "score": self.values.ravel(),
                "stderr": self.stderr.ravel(),
                "n": self.n,
            }
        )

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write a Parquet file whose metadata hold everything that is not in the table."""
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        about = json.dumps({"name": self.name, "shape": self.shape, "n": self.n, "meta": self.meta})
        table = table.replace_schema_metadata({b"manyheads.scores": about.encode()})
        return write_atomically(path, lambda file: pq.write_table(table, file), force=force)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> HeadScores:
        """Read what `save` wrote. With `fingerprint`, `MismatchError` if the scores are of another model."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no scores at {path}: there is no such file.")
        try:
            table = pq.read_table(path)
            about = parse_json(table.schema.metadata[b"manyheads.scores"].decode(), path)
            values = np.asarray(table["score"]).reshape(about["shape"])
            stderr = np.asarray(table["stderr"]).reshape(about["shape"])
            scores = cls(str(about["name"]), values, stderr, check_integer(about["n"], "n"), dict(about["meta"]))
        except (pa.ArrowException, KeyError, TypeError, ValueError, OSError, OverflowError, MemoryError):
            raise InputError(f"{path} is not a file of head scores; give one that HeadScores.save wrote.") from None
        found = scores.meta.get("fingerprint")
        if fingerprint is not None and found != fingerprint:
            raise MismatchError(f"{path} holds scores of model {found}, not of this model, {fingerprint}.")
        return scores
