"""`python -m manyheads`: the command line."""

from manyheads.cli import main

if __name__ == "__main__":
    main()
