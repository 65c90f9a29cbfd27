"""`report.write(result, path)`: any result that has a page, as one HTML file that needs nothing else, not even a network.

A page belongs to a type of result and is written in the room `pages`, above the results it shows:

    @page_of(Atlas)
    def atlas_page(atlas: Atlas) -> str: ...

Pages are found when the first result is written, so that a result never imports its page.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, TypeVar

from manyheads.errors import InputError
from manyheads.files import refuse_existing, write_atomically

Page = TypeVar("Page", bound=Callable[..., str])
_PAGES: dict[type, Callable[..., str]] = {}


def page_of(kind: type) -> Callable[[Page], Page]:
    """Make a function `(result, **options) -> HTML` the page of results of type `kind`."""

    def register(page: Page) -> Page:
        _PAGES[kind] = page
        return page

    return register


def html_of(result: Any, **options: Any) -> str:
    """The page of `result` as text. `InputError` for a result that has none."""
    page = _found(type(result))
    if page is None:
        _load()
        page = _found(type(result))
    if page is None:
        shown = ", ".join(sorted(kind.__name__ for kind in _PAGES))
        raise InputError(f"a {type(result).__name__} has no page; there are pages for {shown}.")
    return page(result, **options)


def write(result: Any, path: str | Path, *, force: bool = False, **options: Any) -> Path:
    """Write the page of `result` to `path`; `options` are its page's own.

    `InputError` for a result without a page, or if something is at `path` and `force` is not set.
    """
    refuse_existing(path, force=force)
    text = html_of(result, **options)
    return write_atomically(path, lambda file: file.write_text(text, "utf-8", newline="\n"), force=force)


class Reported:
    """Mixed into results that have a page."""

    def report(self, path: str | Path, *, force: bool = False, **options: Any) -> Path:
        """Write the result's page: one HTML file that needs nothing else. See `report.write`."""
        return write(self, path, force=force, **options)


def _found(kind: type) -> Callable[..., str] | None:
    return next((_PAGES[base] for base in kind.__mro__ if base in _PAGES), None)


def _load() -> None:
    """Import every module of `manyheads.pages`; each registers its pages."""
    spec = find_spec("manyheads.pages")
    for module in walk_packages(spec.submodule_search_locations if spec else None, "manyheads.pages."):
        import_module(module.name)
