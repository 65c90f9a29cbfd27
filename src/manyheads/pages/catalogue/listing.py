"""The list of methods of the catalogue as HTML, with fields that narrow it: on a page of its own and in the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files

from manyheads.catalogue import ROOM_ABOUT, STATES, Method
from manyheads.catalogue.headlines import headline, replicated
from manyheads.evaluation.replication import experiments_of
from manyheads.report.html import Html, el, join, link

ABOUT_STATES = {
    "ready": "what its paper claims is built, and tests show it",
    "partial": "it works, but a part of the paper is missing or not confirmed",
    "absent": "not built",
}


def listing_css() -> str:
    """The style of the list, on top of any page's own."""
    return (files(__package__) / "listing.css").read_text("utf-8")


def listing_js() -> str:
    """The script that narrows the list while somebody types."""
    return (files(__package__) / "listing.js").read_text("utf-8")


def listing(methods: Sequence[Method], docs: Callable[[str], str] | None = None) -> Html:
    """The fields and the list. `docs` makes the address of a docs page from its path; without it the path is shown as text."""
    claims = _claims()
    rooms = [room for room in ROOM_ABOUT if any(m.room == room for m in methods)]
    fields = el(
        "div",
        el("label", "What do you need?", el("input", type="search", data_narrow="text", autocomplete="off")),
        el("label", "Room", _select("room", [(room, f"{room}: {ROOM_ABOUT[room]}") for room in rooms])),
        el("label", "State", _select("state", [(state, f"{state}: {ABOUT_STATES[state]}") for state in STATES])),
        el("p", f"{len(methods)} of {len(methods)} methods", class_="narrowed", role="status"),
        class_="search narrow",
        hidden=True,  # shown by the script, without which it would do nothing
    )
    rows = [_row(m, claims.get(m.number, ()), docs) for m in methods]
    return join(fields, el("ul", *rows, class_="methods"))


def _select(name: str, options: Sequence[tuple[str, str]]) -> Html:
    return el(
        "select",
        el("option", "all", value=""),
        *[el("option", text, value=value) for value, text in options],
        data_narrow=name,
    )


def _row(m: Method, claims: Sequence[str], docs: Callable[[str], str] | None) -> Html:
    claim, figure = headline(m.number)
    page = None if m.docs is None else el("code", m.docs) if docs is None else link(docs(m.docs), "its page")
    return el(
        "li",
        el(
            "div",
            el("h3", el("span", f"#{m.number}", class_="soft"), " ", m.name),
            el("p", el("span", m.room, class_="tag"), " ", el("span", m.state, class_=f"tag {m.state}")),
            el(
                "p",
                link(f"https://arxiv.org/abs/{m.arxiv}", m.title),
                f", {m.year}",
                f", {m.venue}" if m.venue else None,
                class_="small",
            ),
        ),
        el(
            "div",
            el("p", el("b", "For: "), m.asked),
            el("p", el("b", "It says: "), f"{claim[0].upper()}{claim[1:]} ({figure})."),
            el("p", el("b", "Verdict: "), verdict(m)),
            el("details", el("summary", "What its experiment asks for"), el("ul", *[el("li", says) for says in claims]))
            if claims
            else None,
            el("p", el("code", m.command, class_="command"), class_="small") if m.command else None,
            el("p", "Read ", page, class_="small") if page else None,
        ),
        id=f"method-{m.number}",
        data_room=m.room,
        data_state=m.state,
    )


def verdict(m: Method) -> str:
    """What became of the paper's claim here, in one sentence."""
    if m.state == "absent":
        return "not built here, so not judged."
    tests = "one test" if len(m.tests) == 1 else f"{len(m.tests)} tests"
    shown = f"shown by {tests}." if m.reason is None else f"shown in part, by {tests}. {m.reason}"
    return f"{shown} Tried again: {again}." if (again := replicated(m.number)) else shown


def _claims() -> dict[int, list[str]]:
    """The claims of every experiment, with their bounds, by the number of its methods."""
    return {
        number: [claim.says for _, one in found for claim in one.claims] for number, found in experiments_of().items()
    }
