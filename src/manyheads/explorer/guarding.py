"""Who may talk to the explorer: this machine, by this page, with the token in its address.

A page that binds to loopback can still be reached by other pages in the same browser (DNS rebinding, forged requests). So
the Host must be this machine's, an Origin must be this page's own, and every call to the API carries the token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

BODY = 64 * 1024  # bytes of a request
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Guard:
    """ASGI middleware that refuses everybody else (403), and bodies over `BODY` bytes (413)."""

    app: Any
    hosts: Sequence[str]
    token: str

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no web sockets here
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        body = await _whole(receive)
        if body is None:
            await _answer(send, 413, f"a request may have {BODY} bytes at most.")
            return
        given = False

        async def again() -> Any:
            nonlocal given
            if given:
                return await receive()  # the end of the connection, which streams wait for
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, again, with_headers)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        if headers.get("host", "") not in self.hosts:
            return 403, "this explorer answers to its own address only; use the one that it printed."
        origin = headers.get("origin")
        if origin is not None and origin not in [f"http://{host}" for host in self.hosts]:
            return 403, "this explorer answers to its own page only."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > BODY:
            return 413, f"a request may have {BODY} bytes at most."
        if scope["path"].startswith("/static/"):
            return None
        given = headers.get("x-manyheads-token") or "".join(
            parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[:1]
        )
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            return 403, "the token is missing or wrong; open the whole address that the explorer printed."
        return None


async def _whole(receive: Any) -> bytes | None:
    """The body of a request, None if it goes on beyond its bound: its stated length may be missing."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > BODY:
            return None
        if message["type"] != "http.request" or not message.get("more_body", False):
            return body


async def _answer(send: Any, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = {**HEADERS, "content-type": "application/json", "content-length": str(len(body))}
    start = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
