"""Tables that users give: a file, a column to predict, and the other columns as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from manyheads.errors import InputError
from manyheads.inputs import clause

MOST_VALUES = 50  # of a column of words, each of which becomes a column


def read_table(path: str | Path, rows: str = "one row an example") -> pd.DataFrame:
    """A frame from a CSV or Parquet file. `InputError` for anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a .csv or .parquet file with {rows}.")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pd.read_parquet(path)
        return pd.read_csv(path)
    except Exception as error:  # whatever a damaged file raises
        raise InputError(f"cannot read {path} as a table ({clause(error)}).") from None


@dataclass(frozen=True)
class TableRows:
    """`x` `[N, D]` with the names of its columns, the target `y` `[N]` as it stood, and which rows of the table these are.

    Rows that lack a value are not among them: `rows` `[N]` counts the table's rows from 0, `left_out` says how many are not here.
    """

    x: Float[np.ndarray, "N D"]
    y: Shaped[np.ndarray, "N"]
    names: tuple[str, ...]
    rows: Int[np.ndarray, "N"]
    left_out: int = 0


def table_rows(frame: pd.DataFrame, target: str, *, without: Sequence[str] = ()) -> TableRows:
    """The columns of numbers as they are, those of words as one column a value; rows that lack anything are left out.

    `InputError` for a column that is not there, words of more than 50 kinds, or a table without a row or a column left.
    """
    missing = [name for name in (target, *without) if name not in frame]
    if missing:
        raise InputError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}.")
    complete = frame.notna().all(axis=1).to_numpy()
    kept = frame[complete]
    inputs = kept.drop(columns=[target, *without])
    if not len(kept) or not inputs.shape[1]:
        raise InputError(f"nothing is left to predict {target!r} from: {len(kept)} rows are complete.")
    words = inputs.select_dtypes(exclude=["number", "bool"])
    many = [name for name in words if words[name].nunique() > MOST_VALUES]
    if many:
        raise InputError(
            f"the column {many[0]!r} has {words[many[0]].nunique()} different values; leave it out or group them."
        )
    numbers = pd.get_dummies(inputs, columns=list(words), drop_first=True, dtype=float).astype(float)
    x = numbers.to_numpy()
    if not np.isfinite(x).all():
        raise InputError("the table holds infinite numbers; mend them first.")
    y, rows = kept[target].to_numpy(), np.flatnonzero(complete)
    return TableRows(x, y, tuple(map(str, numbers.columns)), rows, len(frame) - len(rows))
