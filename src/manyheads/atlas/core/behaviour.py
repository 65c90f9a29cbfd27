"""What a behaviour is, for the survey and the report: its name, its formula, and when a head counts as having it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from manyheads.model.headmodel import HeadModel
from manyheads.provenance import Provenance


@dataclass(frozen=True)
class About:
    """One kind of head. A score of at least `threshold` counts as found; scores lie in `[low, high]`.

    Behaviours of one `kind` (position, repetition, copying, ...) are shades of one thing: a head that has two of them is not
    polysemantic for it. A `trait` is what a head does when it finds nothing to do, such as to rest on the first token: it is
    named, but it is no role.
    """

    name: str
    title: str
    what: str
    formula: str
    unit: str
    paper: str
    threshold: float
    low: float = 0.0
    high: float = 1.0
    kind: str = ""
    trait: bool = False

    def to_json(self) -> dict[str, Any]:
        """As the atlas stores it."""
        return asdict(self)

    def provenance(self, model: HeadModel, seed: int, **settings: Any) -> dict[str, Any]:
        """What a score of this behaviour carries: the record of `manyheads.provenance`.

        `UnsupportedError` for heads that read another sequence and for a model with layers without heads, where rows of scores
        would be other layers' than they say.
        """
        model.require_alike(self.name)
        return Provenance.of(model, self.name, self.paper, seed, **settings).to_json()
