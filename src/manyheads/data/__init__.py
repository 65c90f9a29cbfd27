"""Data with targets, real ones from packages that install without a download, split so that equal rows stay together."""

from manyheads.data.labelled import Labelled
from manyheads.data.real import digits, table, word_ratings
from manyheads.data.series import classified_series, read_ts, series_frame

__all__ = ["Labelled", "classified_series", "digits", "read_ts", "series_frame", "table", "word_ratings"]
