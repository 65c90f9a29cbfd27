"""What was proved of an opened model, and which sites are not read there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from manyheads.errors import UnsupportedError


@dataclass(frozen=True)
class Proof:
    """`errors[site]` is the largest error in any layer, relative; `failed[site]` says why a site is not read.

    `first_position` is where a padded row's first token stands (None: the model counts by itself). `gated`: layers change the
    heads' outputs between attention and output projection, so that z is not `pattern @ values`.
    """

    name: str
    errors: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    first_position: int | None = None
    gated: bool = False

    def require(self, site: str) -> None:
        """`UnsupportedError` with the reason if `site` could not be proved."""
        if site in self.failed:
            raise UnsupportedError(f"{self.name}: {site} cannot be read right here: {self.failed[site]}.")


UNPROVED = Proof("a model")
