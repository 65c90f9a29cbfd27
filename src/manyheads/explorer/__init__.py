"""The explorer: a page on which the heads of a model are looked at, asked and changed. Live from this machine, or as one file."""
