"""Provenance: what made a result, written the same by every room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from manyheads.version import __version__


@runtime_checkable
class _Fingerprinted(Protocol):
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Provenance:
    """The method that made a result, its paper, its settings and seed, our version, and the model by its fingerprint.

    `seed` is None where nothing was drawn, `fingerprint` None where no model of ours was read. Results keep it as the plain
    dictionary that `to_json` gives, which Parquet and JSON files hold as it is.
    """

    method: str
    paper: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    version: str = __version__
    fingerprint: str | None = None

    @classmethod
    def of(
        cls, model: _Fingerprinted | None, method: str, paper: str = "", seed: int | None = None, **settings: Any
    ) -> Provenance:
        """The record of what `method` does with `model` now."""
        fingerprint = None if model is None else model.fingerprint
        return cls(method, paper, settings, seed, fingerprint=fingerprint)

    def to_json(self) -> dict[str, Any]:
        """As results and files hold it."""
        return asdict(self) | {"settings": dict(self.settings)}
