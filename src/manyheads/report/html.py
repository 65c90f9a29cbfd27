"""HTML that cannot be broken by what is put into it, and the page around it: one file, no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from manyheads.version import __version__

# The squares of a heat map, as an icon.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 7 7'%3E%3Cpath fill='%231f5fa8' "
    "d='M0 0h3v3H0zM4 4h3v3H4z'/%3E%3Cpath fill='%231f5fa8' opacity='.35' d='M4 0h3v3H4zM0 4h3v3H0z'/%3E%3C/svg%3E"
)
_VOID = frozenset({"br", "col", "hr", "input", "link", "meta"})
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Text that is markup already. Every other string is escaped where it enters a page."""

    __slots__ = ()


Child = Any  # Html, text, a number, None (nothing), or an iterable of these


def escape(text: object) -> Html:
    """`text` as markup that shows exactly it; characters that HTML forbids become U+FFFD."""
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(text))))


def join(*children: Child) -> Html:
    """The children one after another, escaped where they are not markup."""
    return Html("".join(_markup(child) for child in children))


def el(tag: str, *children: Child, **attributes: object) -> Html:
    """An element: `el("td", "a < b", class_="q3", data_row=1)`. An attribute that is None or False is left out."""
    shown = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{shown}>" if tag in _VOID else f"<{tag}{shown}>{join(*children)}</{tag}>")


def _markup(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return join(*child)
    return escape(child)


def link(url: str, *text: Child) -> Html:
    """A link to elsewhere, followed only by a click."""
    return el("a", *text, href=url, rel="noreferrer")


def with_links(text: str) -> Html:
    """`text`, with its addresses and arXiv numbers made links."""
    parts = re.split(r"(https?://[^\s<>\"']*[^\s<>\"'.,;:)]|arXiv:\d{4}\.\d{4,5})", text)
    return join(
        link(part.replace("arXiv:", "https://arxiv.org/abs/") if part[0] == "a" else part, part) if i % 2 else part
        for i, part in enumerate(parts)
    )


def masthead(eyebrow: str, title: Child, lede: Child, facts: Mapping[str, Child] | None = None, *more: Child) -> Html:
    """The head of a page: its kind, its title, what it shows in a sentence or two, a few facts by name, then `more`."""
    listed = [el("div", el("dt", name), el("dd", value)) for name, value in (facts or {}).items()]
    return el(
        "header",
        el("p", eyebrow, class_="eyebrow"),
        el("h1", title),
        el("p", lede, class_="lede"),
        el("dl", *listed, class_="facts") if listed else None,
        *more,
        class_="top",
    )


def unfold(summary: Child, *inner: Child, late: bool = False, **attributes: object) -> Html:
    """What a click on `summary` opens; closed at first. With `late` it enters the page only then, and slows nothing before."""
    held = el("div", *inner, class_="inner")
    return el("details", el("summary", summary), el("template", held) if late else held, **attributes)


def how_to_read(terms: Mapping[str, Child]) -> Html:
    """What the words and signs of a page mean, before its first figure; open, since it is short."""
    listed = [el("div", el("dt", name), el("dd", meaning)) for name, meaning in terms.items()]
    return el("details", el("summary", "How to read this"), el("dl", *listed, class_="terms"), open=True)


def scroll(label: str, *inner: Child) -> Html:
    """What is wider than a narrow screen; `label` names it to those who reach it with the keyboard or by ear."""
    return el("div", *inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def plain_table(titles: Iterable[Child], rows: Iterable[Html], *, label: str, class_: str = "plain") -> Html:
    """A table that scrolls by itself where it is too wide; `rows` are elements of type tr. A title may be empty."""
    return scroll(label, el("table", table_head(titles), el("tbody", *rows), class_=class_))


def table_head(titles: Iterable[Child]) -> Html:
    """The row of titles of a table; a column without a title has a plain cell there, since an empty heading tells nothing."""
    return el("thead", el("tr", *[el("th", title, scope="col") if title else el("td") for title in titles]))


def markdown(text: str) -> Html:
    """Markdown as HTML: no raw HTML, no pictures, links only to the web; headings begin at the second level."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the front matter of a model card
    tokens = parser.parse(_UNPRINTABLE.sub("\ufffd", text))
    for token in tokens:
        token.attrs.pop("style", None)  # alignment of columns, which the content security policy would refuse
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
        token.children = _web_links(token.children or [])
    return Html(parser.renderer.render(tokens, parser.options, {}))


def _web_links(tokens: list[Token]) -> list[Token]:
    """Without the links that lead nowhere once the text is a page of its own; their text stays."""
    kept, closing = [], []
    for token in tokens:
        if token.type == "link_open":
            closing.append(re.match(r"https?://", str(token.attrs.get("href"))) is not None)
            token.attrs["rel"] = "noreferrer"
        if token.type not in ("link_open", "link_close") or closing[-1]:
            kept.append(token)
        if token.type == "link_close":
            closing.pop()
    return kept


def page(
    title: str, body: Html, *, data: object = None, version: str = __version__, css: str = "", js: str = ""
) -> str:
    """A whole page. `data` (JSON) is what its script looks up; `css` adds to the style sheet, `js` to the script, `version`
    is that of manyheads that made what is shown.

    The content security policy allows the page's own style sheet and script, by their hashes, and nothing else.
    """
    style = (files(__package__) / "report.css").read_text("utf-8") + css
    script = (files(__package__) / "report.js").read_text("utf-8") + js
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content=f"manyheads {version}".strip()),
        el("title", title),
        Html(f'<link rel="icon" href="{_ICON}">'),
        el("style", Html(style)),
    )
    embedded = el("script", _json(data), type="application/json", id="data") if data is not None else None
    return (
        "<!doctype html>\n" + el("html", head, el("body", body, embedded, el("script", Html(script))), lang="en") + "\n"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: object) -> Html:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Html(
        _UNPRINTABLE.sub("\ufffd", text).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
