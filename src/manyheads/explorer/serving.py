"""Starting the explorer: an address on loopback with a fresh token, a browser if there is one, and a clean end."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from collections.abc import Callable
from typing import Any

from manyheads.errors import InputError
from manyheads.explorer.labels import LabelFile
from manyheads.explorer.workbench import Workbench

HOST = "127.0.0.1"
PORT = 8127


def serve(
    bench: Workbench,
    overview: dict[str, Any],
    labels: LabelFile,
    *,
    port: int | None = None,
    browser: bool = True,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C. `port` None: 8127, or any free one if that is taken. `announce` gets the address."""
    import uvicorn

    from manyheads.explorer.app import make_app

    listening = bound(port)
    at = f"{HOST}:{listening.getsockname()[1]}"
    token = secrets.token_urlsafe(18)
    app = make_app(bench, overview, labels, token=token, hosts=[at, at.replace(HOST, "localhost")])
    address = f"http://{at}/?token={token}"
    announce(address)
    if browser:
        _open(address)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])


def bound(port: int | None) -> socket.socket:
    """A socket on loopback that listens."""
    for one in (PORT, 0) if port is None else (port,):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, one))
            listening.listen(128)  # now, since the address is told before the server accepts
        except OSError as error:
            listening.close()
            if port is not None:
                raise InputError(f"port {port} cannot be used ({error.strerror}); give another, or none.") from None
        else:
            return listening
    raise InputError("no port of this machine is free.")


def _open(address: str) -> None:
    try:
        webbrowser.get()
    except webbrowser.Error:  # a machine without one: the address was printed
        return
    webbrowser.open(address)
