"""What comes from users is read with bounds, and what is wrong with it is one sentence that names it."""

from __future__ import annotations

import gzip
import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from manyheads import tasks
from manyheads.edit.learn.examples import task_of
from manyheads.errors import InputError
from manyheads.inputs import (
    DEEPEST,
    check_choice,
    check_integer,
    check_number,
    check_seed,
    check_text,
    parse_json,
    read_json,
    read_lines,
    read_object,
    read_tensors,
    read_text,
)
from manyheads.model.editing.edits import Scale


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400 and all(word in said for word in words), said


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_json_that_python_writes_reads_as_it_was(value):
    assert parse_json(json.dumps(value), "x") == value or "\\ud" in json.dumps(value)


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('"\\ud800"', "not UTF-8"),
        ('{"a": ["\\udfff"]}', "not UTF-8"),
        ('{"\\ud800": 1}', "not UTF-8"),
        ("9" * 6000, "too large"),
        ("1e400", "too large"),
        ("[-1e999]", "too large"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
    ],
)
def test_json_out_of_bounds_is_refused(text, word):
    refused(lambda: parse_json(text, "the file"), "the file", word)


def test_json_may_be_just_as_deep_as_it_says():
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")
    refused(lambda: parse_json("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "x"), "nested deeper than 64")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_object(file) == {"a": "é"} and read_text(file)[0] == "{"
    assert [line for _, line in read_lines(file)] == ['{"a": "é"}']


def test_files_that_are_none_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "none", tmp_path / ("n" * 300)):
        for read in (read_text, read_json, read_tensors, lambda p: list(read_lines(p))):
            refused(lambda read=read, path=path: read(path))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    refused(lambda: read_text(tmp_path / "latin"), "latin is not UTF-8", "byte 3")
    (tmp_path / "long").write_bytes(b" " * 101)
    refused(lambda: read_text(tmp_path / "long", most=100), "more than 100 bytes")
    assert len(read_text(tmp_path / "long", most=101)) == 101
    refused(lambda: read_object(tmp_path / "long"), "not JSON")
    (tmp_path / "long").write_text("[1]")
    refused(lambda: read_object(tmp_path / "long"), "holds a list")


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_a_flipped_bit_anywhere_in_a_gzip_file_is_said_or_harmless(tmp_path, at):
    rows = "".join(f"line {i}\n" for i in range(40))
    whole = bytearray(gzip.compress(rows.encode(), mtime=0))
    whole[at % len(whole)] ^= 16
    (tmp_path / "x.gz").write_bytes(whole)
    try:
        assert "".join(line for _, line in read_lines(tmp_path / "x.gz")) == rows
    except InputError as error:
        assert "x.gz is not" in str(error)


def test_lines_are_numbered_and_stream(tmp_path):
    (tmp_path / "x").write_text("a\r\n\nb")
    assert list(read_lines(tmp_path / "x")) == [(0, "a\r\n"), (1, "\n"), (2, "b")]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("manyheads.inputs.LONGEST_LINE", 10)
    (tmp_path / "x").write_text("123456789\n12345678901")
    refused(lambda: list(read_lines(tmp_path / "x")), "line 2 is longer than 10")


def test_tensors_are_there_of_the_right_kind_and_finite(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2), "n": torch.ones(2, dtype=torch.long)}, file)
    assert torch.equal(read_tensors(file, {"a": 1})["a"], torch.ones(2))
    refused(lambda: read_tensors(file, {"b": 1}), "no tensor 'b'", "a, n")
    refused(lambda: read_tensors(file, {"a": 2}), "'a'", "[2]", "2 dimensions")
    refused(lambda: read_tensors(file, {"n": 1}), "'n'", "int64")
    for value in (math.nan, math.inf, -math.inf):
        save_file({"a": torch.tensor([1.0, value], dtype=torch.float16)}, file)
        refused(lambda: read_tensors(file, {"a": 1}), "'a'", "NaN or infinity")
    for content in (b"", b"\0" * 8, b"\xff" * 40, file.read_bytes()[:-1], file.read_bytes() + b"\0"):
        file.write_bytes(content)
        refused(lambda: read_tensors(file), "x.safetensors is no whole safetensors file")


def test_numbers_keep_to_their_range():
    assert check_number(3, "x") == 3.0 and isinstance(check_number(3, "x"), float)
    assert [check_number(v, "x", 0, 1) for v in (0, 0.5, 1)] == [0, 0.5, 1]
    for value in (math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400):
        refused(lambda value=value: check_number(value, "strength"), "strength is", "give a finite number")
    for value in (-1e-9, 1.001, math.nan):
        refused(lambda value=value: check_number(value, "keep", 0, 1), "at least 0 and at most 1")
    refused(lambda: check_number(0, "x", 0, above=True), "above 0")
    for value in (True, "1", None, [1], np.array([1.0])):
        refused(lambda value=value: check_number(value, "x"), "give a number")
    assert check_integer(2, "n", 2, 5) == 2 and check_integer(5, "n", 2, 5) == 5
    for value in (1, 6, 2.0, True, "3", None, 10**5000):
        refused(lambda value=value: check_integer(value, "n", 2, 5), "n is", "from 2 to 5")
    assert check_seed(2**32 - 1) == 2**32 - 1
    for value in (-1, 2**32):
        refused(lambda value=value: check_seed(value), "seed is")
    assert check_choice("a", "x", ("a", "b")) == "a"
    for value in ("c", 1, None, ["a"]):
        refused(lambda value=value: check_choice(value, "x", ("a", "b")), "choose from a, b")
    assert check_text("é", "x") == "é"
    refused(lambda: check_text("caf\udce9", "the prompt"), "the prompt is not UTF-8")


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, "2", None])
def test_a_factor_is_a_finite_number(value):
    refused(lambda: Scale(["L0H0"], value), "factor")


@pytest.mark.parametrize(
    "given, word",
    [
        ("by_example:relation=klingon", "klingon"),
        ("by_example:shots=-1", "shots is -1"),
        ("by_example:shots=31", "from 0 to 30"),
        ("by_example:shots=1.5", "give a number"),
        ("needle:longest=1000000000", "longest"),
        ("needle:depth=nan", "depth"),
        ("needle:depth=2", "depth"),
        ("needle:shortest=200", "shortest is larger"),
        ("repeat:shortest=1", "shortest"),
        ("repeat:shortest=45", "shortest"),
        ("arithmetic:operation=*", "operation"),
        ("facts:relation=shoe size", "relation"),
        ("counterfactual:relation=young", "relation"),
        ("successor:kind=planet", "kind"),
        ("refusal:marked=perhaps", "marked"),
        ("ioi:order=CDDC", "order"),
    ],
)
def test_settings_of_tasks_are_checked_where_a_task_is_made(given, word):
    refused(lambda: task_of(given), word)


def test_settings_of_tasks_at_their_limits_work():
    for setting in (
        "by_example:shots=30",
        "by_example:shots=0",
        "repeat:shortest=44,longest=44",
        "needle:depth=0",
        "refusal:marked=true",
    ):
        for split in ("train", "test"):
            assert task_of(setting).examples(20, split=split)
    assert all(e.answer == tasks.families.refusal.REFUSED[0] for e in task_of("refusal:marked=True").examples(5))
    for relation in ("plural", "french", "spanish", "opposite"):
        assert task_of(f"by_example:shots=30,relation={relation}").examples(20, split="train")
