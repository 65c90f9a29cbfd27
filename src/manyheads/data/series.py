"""Real series that install from a package (statsmodels, the extra `forecast`), as long frames: item_id, timestamp, target."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pandas as pd

from manyheads.errors import InputError


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
