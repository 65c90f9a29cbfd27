"""Documents from files, one after the other: what a corpus is scored from (#17) without ever being held in memory.

| file | a document is | its row |
| --- | --- | --- |
| .txt, .text | a line; blank ones are none | the line, from 0 |
| .jsonl, .ndjson | a line that holds a JSON object, its text under `text_column` | the line, from 0 |
| .parquet | a row, its text in `text_column` | the row, from 0 |

Text and JSON lines may be gzipped (.gz). A line of text is a document, not a file: that streams, however large the file is. What
has line breaks inside its documents belongs in JSON lines or Parquet. Empty and missing texts are no documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyheads.errors import InputError
from manyheads.inputs import parse_json, read_lines

ROWS = 256  # of a Parquet file, decoded at a time
TEXT, JSON, PARQUET = {".txt", ".text"}, {".jsonl", ".ndjson"}, {".parquet"}


@dataclass(frozen=True)
class Document:
    """A text and where it came from; `domain` is "" unless a column names it."""

    file: str
    row: int
    text: str
    domain: str = ""


def documents(
    paths: Sequence[str | Path], *, text_column: str = "text", domain_column: str | None = None
) -> Iterator[Document]:
    """The documents of `paths`, in order. Every path is looked at before the first is read.

    `InputError` for a file that is missing or of another kind, a line that is not JSON, a missing column (text files have only
    their text), or a value that is not text.
    """
    checked = [_checked(Path(path), domain_column) for path in paths]
    return (document for path in checked for document in _of_file(path, text_column, domain_column))


def kind(path: Path) -> str:
    """The suffix by which `path` is read: without `.gz`, in small letters."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def _checked(path: Path, domain_column: str | None) -> Path:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give .txt, .jsonl or .parquet files.")
    if kind(path) not in TEXT | JSON | PARQUET or (kind(path) in PARQUET and path.suffix.lower() == ".gz"):
        raise InputError(
            f"{path} is none of .txt, .jsonl, .parquet (the first two also .gz); convert it to one of them."
        )
    if domain_column is not None and kind(path) in TEXT:
        raise InputError(
            f"{path} is plain text and has no column {domain_column!r}; give JSON lines or Parquet with one."
        )
    return path


def _of_file(path: Path, text_column: str, domain_column: str | None) -> Iterator[Document]:
    rows = _parquet if kind(path) in PARQUET else _json if kind(path) in JSON else _text
    for row, values in rows(path, text_column, domain_column):
        text = values.get(text_column)
        if text is not None and not isinstance(text, str):
            raise InputError(f"{path}, row {row}: {text_column!r} holds {type(text).__name__}, not text.")
        if text and text.strip():
            domain = values.get(domain_column) if domain_column is not None else None
            yield Document(str(path), row, text, "" if domain is None else str(domain))


def _text(path: Path, text_column: str, domain_column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, line in read_lines(path):
        yield row, {text_column: line.rstrip("\r\n")}


def _json(path: Path, text_column: str, domain_column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    for row, line in read_lines(path):
        if not line.strip():
            continue
        values = parse_json(line, f"{path}, line {row + 1}")
        if not isinstance(values, dict):
            raise InputError(f"{path}, line {row + 1} holds {type(values).__name__}; give one JSON object a line.")
        for column in (text_column, *([domain_column] if domain_column is not None else [])):
            if column not in values:
                raise InputError(f"{path}, line {row + 1} has no {column!r}; it has {', '.join(values) or 'nothing'}.")
        yield row, values


def _parquet(path: Path, text_column: str, domain_column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    columns = [text_column, *([domain_column] if domain_column is not None else [])]
    try:
        with pq.ParquetFile(path) as file:
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}.")
            row = 0
            for batch in file.iter_batches(ROWS, columns=columns):
                for values in batch.to_pylist():
                    yield row, values
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"{path} is not a Parquet file that can be read: {error}") from None
