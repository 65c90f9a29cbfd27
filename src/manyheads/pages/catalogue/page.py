"""The catalogue as one HTML file: every method with its paper, what it says, and what became of it here."""

from __future__ import annotations

from manyheads.catalogue import STATES, methods
from manyheads.pages.catalogue.listing import ABOUT_STATES, listing, listing_css, listing_js
from manyheads.report.html import el, how_to_read, join, masthead, page

_TERMS = {
    "For": "What somebody would ask who needs the method.",
    "It says": "What the paper claims, in our words.",
    "Verdict": "How much of that is shown here, by tests that anybody can run.",
    "Room": "The part of manyheads that it belongs to.",
    **{state: about.capitalize() + "." for state, about in ABOUT_STATES.items()},
}


def catalogue_page() -> str:
    """All methods, with fields that narrow the list to words, a room or a state."""
    found = methods()
    facts = {state: str(sum(m.state == state for m in found)) for state in STATES}
    lede = f"{len(found)} published systems that work on the heads of transformers, and how far each is built in manyheads."
    body = join(
        masthead("Catalogue", "Methods", lede, facts, how_to_read(_TERMS)),
        el("main", el("section", el("h2", "All methods"), listing(found))),
    )
    return page("Methods of manyheads", body, css=listing_css(), js=listing_js())
