"""`python -m manyheads.cli`."""

from manyheads.cli import main

main()
