"""The explorer's page, in its two lives: live, where its script asks this machine, and as one file that needs nothing else.

Both are the same script and style with the same overview in a data element; `overview["live"]` tells them apart.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

STATIC = Path(__file__).with_name("static")
_ALONE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def live_page(overview: dict[str, Any]) -> str:
    """The page that the explorer serves."""
    head = (
        '<link rel="stylesheet" href="/static/explorer.css"><script type="module" src="/static/explorer.js"></script>'
    )
    return _page(head, {**overview, "live": True})


def page_alone(overview: dict[str, Any]) -> str:
    """The page as one file: no server, no network, opens from disk."""
    script = (STATIC / "explorer.js").read_text("utf-8").replace("</script", "<\\/script")
    style = (STATIC / "explorer.css").read_text("utf-8")
    head = (
        f'<meta http-equiv="content-security-policy" content="{escape(_ALONE)}"><style>{style}</style>'
        f'<script type="module">{script}</script>'
    )
    return _page(head, {**overview, "live": False})


def _page(head: str, overview: dict[str, Any]) -> str:
    # `<` cannot end the data element where it is written as an escape.
    data = json.dumps(overview, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    title = escape(f"{overview['model']['name']}: heads")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="icon" href="data:,">'
        f'<script type="application/json" id="data">{data}</script>{head}</head>'
        '<body><div id="app"></div><noscript>This page needs JavaScript, which comes with it.</noscript></body></html>'
    )
