"""What comes from users is checked once, here: texts, JSON, safetensors and numbers.

Each function returns what is right or raises `InputError` with one sentence that names the file or the setting and says what is
wrong. Readers have bounds, so that a damaged or hostile file costs neither the memory nor the stack: its size, the depth of
JSON, the digits of its integers.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 1 << 26  # bytes of a text or of a JSON file
LONGEST_LINE = 1 << 26  # characters of a line in a file of lines
DEEPEST = 64  # levels of JSON
DIGITS = 400  # of an integer in JSON: more than any float has
FLOAT32 = 3.4028234663852886e38  # the largest number that a weight can be
SEEDS = (0, 2**32 - 1)  # what every random generator takes

# Files


def read_text(path: str | Path, *, most: int = LONGEST) -> str:
    """The text of a UTF-8 file, without the byte-order mark that some editors write. At most `most` bytes."""
    path = Path(path)
    data = _bytes(path, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it.") from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file or of a gzipped one (.gz), numbered from 0, with their ends, one in memory at a time."""
    path = Path(path)
    _check_file(path)
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for row in range(1 << 62):
                line = lines.readline(LONGEST_LINE + 1)
                if len(line) > LONGEST_LINE:
                    raise InputError(f"{path}, line {row + 1} is longer than {LONGEST_LINE} characters; divide it.")
                if not line:
                    return
                yield row, line
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; convert it.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(f"{path} is not a whole gzip file; fetch or pack it again.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}.") from None


def parse_json(text: str, where: str | Path) -> Any:
    """The JSON value in `text`; `where` names it in errors.

    NaN and Infinity pass, as Python writes them; a number that only overflows to infinity does not, and neither do lone
    surrogates, which no file can hold.
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_float)
    except RecursionError:
        raise InputError(f"{where} is nested deeper than {DEEPEST} levels; give a flatter file.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where} is not JSON ({error.msg}, {place}); repair it or write it again.") from None
    except _NumberError as error:
        raise InputError(f"{where} holds a number that is too large ({error}); give smaller ones.") from None
    _check_json(value, where)
    return value


def read_json(path: str | Path, *, most: int = LONGEST) -> Any:
    """The JSON value of a file (see `read_text` and `parse_json`)."""
    return parse_json(read_text(path, most=most), path)


def read_object(path: str | Path, *, most: int = LONGEST) -> dict[str, Any]:
    """The JSON object of a file, as a dict."""
    value = read_json(path, most=most)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {_kind(value)}; an object with names was expected.")
    return value


def read_tensors(path: str | Path, ndims: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Those named in `ndims` must be there, have so many dimensions, and be finite numbers."""
    import torch  # here, because the command line starts without it
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    _check_file(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is no whole safetensors file ({_reason(error)}); copy or make it again.") from None
    for name, ndim in (ndims or {}).items():
        if name not in tensors:
            raise InputError(f"{path} has no tensor {name!r}; it has {', '.join(sorted(tensors)) or 'none'}.")
        tensor = tensors[name]
        if tensor.ndim != ndim or not tensor.is_floating_point():
            raise InputError(
                f"{name!r} in {path} is {tensor.dtype} of shape {list(tensor.shape)}; numbers of {ndim} dimensions were "
                "expected."
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise InputError(f"{name!r} in {path} holds NaN or infinity; make the file again.")
    return tensors


# Numbers and names


def check_number(value: Any, name: str, low: float = -FLOAT32, high: float = FLOAT32, *, above: bool = False) -> float:
    """`value` as a finite float in `[low, high]`, with `above` in `(low, high]`; `name` is what errors call it."""
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if low <= found <= high and not (above and found == low):
            return found
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name} is {_short(value)}; give a number.")
    if (low, high) == (-FLOAT32, FLOAT32):
        raise InputError(f"{name} is {_short(value)}; give a finite number.")
    least = "" if low == -FLOAT32 else f"above {low:g}" if above else f"at least {low:g}"
    most = "" if high == FLOAT32 else f"at most {high:g}"
    raise InputError(f"{name} is {_short(value)}; give a number {' and '.join(filter(None, (least, most)))}.")


def check_integer(value: Any, name: str, low: int = 0, high: int = 2**31 - 1) -> int:
    """`value` as an integer in `[low, high]`; `name` is what errors call it."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} is {_short(value)}; give a whole number from {low} to {high}.")
    return int(value)


def check_seed(value: Any) -> int:
    """`value` as the seed of a random generator, `[0, 2^32)`."""
    return check_integer(value, "seed", *SEEDS)


def check_choice(value: Any, name: str, choices: Collection[str]) -> str:
    """`value` if it is one of `choices`; `name` is what errors call it."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {_short(value)}; choose from {', '.join(choices)}.")
    return value


def check_text(value: str, name: str) -> str:
    """`value` if every character can be written as UTF-8: what was no UTF-8 on a command line cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8 text ({_short(value)}); convert it.") from None
    return value


def clause(error: Exception) -> str:
    """What an error of reading says is wrong, without its advice, to stand in another sentence."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return " ".join(str(error).partition(";")[0].split()).rstrip(".")[:300] or type(error).__name__


class _NumberError(Exception):
    """A number in JSON that is too large to be one."""


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _NumberError(f"{len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _NumberError(digits[:20])
    return value


def _check_json(value: Any, where: str | Path) -> None:
    """Depth and texts, level by level, without recursion."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for one in level for part in _parts(one, where)]
        if not level:
            return
    raise InputError(f"{where} is nested deeper than {DEEPEST} levels; give a flatter file.")


def _parts(value: Any, where: str | Path) -> list[Any]:
    if isinstance(value, str):
        if not value.isascii():
            check_text(value, f"a text in {where}")
        return []
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _bytes(path: Path, most: int) -> bytes:
    _check_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}.") from None
    if len(data) > most:
        raise InputError(f"{path} has more than {most} bytes; that is too long for what it should hold.")
    return data


def _check_file(path: Path) -> None:
    """`InputError` unless `path` is a regular file: a device or a pipe may never end."""
    try:
        there, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as error:
        raise InputError(f"{_short(str(path))} cannot be read: {_reason(error)}.") from None
    if not there:
        raise InputError(f"there is no file {path}; give one that exists.")
    if not regular:
        raise InputError(f"{path} is not a file; give one.")


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _short(value: Any) -> str:
    """How a value that was given stands in an error."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a whole number of more than 40 digits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."
