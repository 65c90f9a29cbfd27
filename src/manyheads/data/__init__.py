"""Data with targets, real ones from packages that install without a download, split so that equal rows stay together."""

from manyheads.data.labelled import Labelled
from manyheads.data.real import digits, table, word_ratings

__all__ = ["Labelled", "digits", "table", "word_ratings"]
