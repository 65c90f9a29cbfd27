"""`mh.show`: the explorer's page of scores or of an atlas, in a notebook or as a file."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from manyheads.atlas.core.result import Atlas
from manyheads.errors import InputError
from manyheads.explorer.overview import about_atlas, overview
from manyheads.explorer.page import page_alone
from manyheads.files import write_atomically
from manyheads.heads import HeadScores


@dataclass(frozen=True)
class Shown:
    """A page that a notebook draws by itself; elsewhere `save` it."""

    page: str
    height: int = 620

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the page as one file that needs nothing else."""
        return write_atomically(path, lambda to: to.write_text(self.page, "utf-8"), force=force)

    def _repr_html_(self) -> str:
        # A frame keeps the page's style and script apart from the notebook's; it may not reach out of it.
        return (
            f'<iframe title="manyheads" sandbox="allow-scripts allow-downloads" srcdoc="{escape(self.page)}" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )


def show(what: HeadScores | Atlas, *, title: str = "heads", height: int = 620) -> Shown:
    """The explorer's page of one score of every head, or of an atlas, which a notebook draws. `height` in pixels.

    `InputError` for anything else.
    """
    if isinstance(what, HeadScores):
        what = Atlas({what.name: what}, card={"model": title, "fingerprint": what.meta.get("fingerprint")})
    if not isinstance(what, Atlas):
        raise InputError(f"cannot show {type(what).__name__}; give HeadScores or an Atlas.")
    return Shown(page_alone(overview(about_atlas(what), atlases=[what])), height)
