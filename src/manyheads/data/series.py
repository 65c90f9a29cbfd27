"""Real series that install from packages: long frames (statsmodels, the extra `forecast`), and series with a class (aeon).

Nothing is downloaded, and aeon is not imported: its files are read where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.data.labelled import Labelled
from manyheads.errors import InputError
from manyheads.inputs import check_choice, read_text

CLASSIFIED = ("ACSF1", "ArrowHead", "BasicMotions", "GunPoint", "ItalyPowerDemand", "JapaneseVowels", "OSULeaf")


def series_frame(name: str) -> pd.DataFrame:
    """A real series by name; `InputError` lists the names.

    co2          weekly, 1958 to 2001, parts of a million at Mauna Loa (gaps are missing values)
    elnino       monthly, 1950 to 2010, temperature of the sea surface
    nile         yearly, 1871 to 1970, flow of the river at Aswan
    sunspots     yearly, 1700 to 2008
    unemployment, inflation, interest        quarterly, 1959 to 2009, of the United States
    """
    if name not in SERIES:
        raise InputError(f"there is no series {name!r}; choose from {', '.join(SERIES)}.")
    values = SERIES[name]()
    return pd.DataFrame({"item_id": name, "timestamp": values.index, "target": values.to_numpy(dtype=float)})


def _loaded(name: str) -> pd.DataFrame:
    try:
        module: Any = import_module(f"statsmodels.datasets.{name}")
    except ImportError:
        raise InputError("this needs statsmodels; install it by pip install 'manyheads[forecast]'.") from None
    table: pd.DataFrame = module.load_pandas().data
    return table


def _co2() -> pd.Series:
    return _loaded("co2")["co2"]


def _elnino() -> pd.Series:
    table = _loaded("elnino").set_index("YEAR")
    return pd.Series(
        table.to_numpy().ravel(), pd.date_range(f"{int(table.index[0])}-01-01", periods=table.size, freq="MS")
    )


def _yearly(name: str, column: str) -> pd.Series:
    table = _loaded(name)
    first = int(table.iloc[0, 0])
    return pd.Series(table[column].to_numpy(), pd.date_range(f"{first}-01-01", periods=len(table), freq="YS"))


def _quarterly(column: str) -> pd.Series:
    table = _loaded("macrodata")
    return pd.Series(table[column].to_numpy(), pd.date_range("1959-01-01", periods=len(table), freq="QS"))


SERIES: dict[str, Callable[[], pd.Series]] = {
    "co2": _co2,
    "elnino": _elnino,
    "nile": lambda: _yearly("nile", "volume"),
    "sunspots": lambda: _yearly("sunspots", "SUNACTIVITY"),
    "unemployment": lambda: _quarterly("unemp"),
    "inflation": lambda: _quarterly("infl"),
    "interest": lambda: _quarterly("tbilrate"),
}


def classified_series(name: str) -> tuple[Labelled, Labelled]:
    """Training and test series with their classes, split as the UCR and UEA archives do; `InputError` lists the names.

    They are the files that ship with aeon (BSD-3). Rows are [N, T, C]; a series that is shorter than T ends in NaN.
    """
    check_choice(name, "name", CLASSIFIED)
    found = find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise InputError("this reads data that ship with aeon; install it by pip install --no-deps aeon.")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / name
    return read_ts(folder / f"{name}_TRAIN.ts"), read_ts(folder / f"{name}_TEST.ts")


def read_ts(path: str | Path) -> Labelled:
    """Series with classes from a .ts file: a line a series, its channels and then its class, with colons between.

    Rows are [N, T, C], NaN where a value is "?" or after the end of a shorter series. `InputError` names the line that is wrong.
    """
    names, rows, y = list[str](), list[Float[np.ndarray, "T C"]](), list[int]()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if words and words[0].lower() == "@classlabel":
            names = words[2:]
        if not words or line.lstrip()[0] in "#@":
            continue
        *channels, label = line.strip().split(":")
        try:
            values = [[np.nan if v.strip() == "?" else float(v) for v in channel.split(",")] for channel in channels]
            rows.append(np.array(list(zip_longest(*values, fillvalue=np.nan)), dtype=np.float32))
            y.append(names.index(label.strip()))
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no series with a class ({error}).") from None
    if not rows or len({row.shape[1:] for row in rows}) != 1:
        raise InputError(
            f"{path} holds no series, or series of different channels; give a .ts file of a classification."
        )
    x = np.full((len(rows), max(map(len, rows)), rows[0].shape[1]), np.nan, np.float32)
    for into, row in zip(x, rows, strict=True):
        into[: len(row)] = row
    return Labelled(x, np.array(y), tuple(names))
