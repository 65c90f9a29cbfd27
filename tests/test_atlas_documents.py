"""Documents come out of files in order, one by one, with where they came from; what is wrong is named by file and line."""

import gzip
import json

import pandas as pd
import pytest

from manyheads.atlas.retrieval_heads.documents import Document, documents
from manyheads.errors import InputError

ROWS = [
    {"text": "one\ntwo", "topic": "a"},
    {"text": "", "topic": "a"},
    {"text": "drei ä", "topic": None},
    {"text": None, "topic": "b"},
    {"text": "five", "topic": 5},
]


def write(path, text):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["d.txt", "d.text.gz", "D.TXT"])
def test_a_document_of_a_text_file_is_a_line_that_is_not_blank(tmp_path, name):
    path = write(tmp_path / name, "first\n\n  \nfourth: ä \r\nlast")
    found = list(documents([path]))
    assert [(d.row, d.text) for d in found] == [(0, "first"), (3, "fourth: ä "), (4, "last")]
    assert {d.file for d in found} == {str(path)} and {d.domain for d in found} == {""}


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson.gz", "d.parquet"])
def test_json_lines_and_parquet_hold_the_same_documents(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        pd.DataFrame([{**row, "topic": row["topic"] and str(row["topic"])} for row in ROWS]).to_parquet(path)
    else:
        write(path, as_lines(ROWS) + "\n")
    wanted = [(0, "one\ntwo", "a"), (2, "drei ä", ""), (4, "five", "5")]
    assert list(documents([path], domain_column="topic")) == [Document(str(path), *w[:2], w[2]) for w in wanted]


def test_rows_of_parquet_are_counted_over_its_batches(tmp_path):
    path = tmp_path / "many.parquet"
    pd.DataFrame({"body": [f"text {i}" if i % 3 else "" for i in range(1000)]}).to_parquet(path, row_group_size=100)
    found = list(documents([path], text_column="body"))
    assert [d.row for d in found] == [i for i in range(1000) if i % 3]
    assert all(d.text == f"text {d.row}" for d in found)


def test_documents_stream_a_later_line_is_not_read_before_its_turn(tmp_path):
    path = write(tmp_path / "d.jsonl", as_lines(ROWS[:1]) + "{broken\n")
    stream = documents([path])
    assert next(stream).text == "one\ntwo"
    with pytest.raises(InputError, match=r"d\.jsonl, line 2 is not JSON"):
        next(stream)


def test_every_path_is_looked_at_before_the_first_is_read(tmp_path):
    good = write(tmp_path / "good.txt", "text\n")
    with pytest.raises(InputError, match="there is no file"):
        documents([good, tmp_path / "missing.txt"])
    with pytest.raises(InputError, match=r"none of \.txt, \.jsonl, \.parquet"):
        documents([good, write(tmp_path / "paper.pdf", "x")])
    with pytest.raises(InputError, match="plain text and has no column 'topic'"):
        documents([good], domain_column="topic")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', "line 1 has no 'text'; it has body"),
        ("b.jsonl", "[1]\n", "line 1 holds list"),
        ("c.jsonl", '{"text": 3}\n', "'text' holds int, not text"),
        ("d.parquet", "not parquet", "is not a Parquet file"),
        ("e.jsonl.gz", None, "is not a whole gzip file"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text("plain" if text is None else text)
    with pytest.raises(InputError, match=message):
        list(documents([path]))


def test_a_missing_parquet_column_and_text_that_is_not_utf8_are_said(tmp_path):
    pd.DataFrame({"body": ["x"]}).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(InputError, match="has no column 'text'; it has body"):
        list(documents([tmp_path / "d.parquet"]))
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        list(documents([tmp_path / "d.txt"]))
