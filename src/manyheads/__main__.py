"""`manyheads` and `python -m manyheads`: the command line, imported here so that Ctrl-C is one line from the first moment on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from manyheads.cli import app

        app()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing had begun\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
