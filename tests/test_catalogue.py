from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads import catalogue
from manyheads.catalogue import ROOMS, STATES, Method, method, methods, search
from manyheads.errors import InputError

ROOT = Path(__file__).parents[1]
BUILT = [m for m in methods() if m.state != "absent"]


def numbers(query: str) -> list[int]:
    return [m.number for m in search(query)]


def test_the_catalogue_numbers_its_125_methods_from_1_to_125():
    assert [m.number for m in methods()] == list(range(1, 126))


def test_names_titles_and_papers_are_given_once_each():
    for field in ("name", "title", "arxiv"):
        values = [getattr(m, field) for m in methods()]
        assert len(set(values)) == len(values), field


def test_every_row_is_whole():
    for m in methods():
        assert m.room in ROOMS, m
        assert m.state in STATES, m
        assert all(text == text.strip() != "" for text in (m.name, m.title, m.what)), m
        assert re.fullmatch(r"\d{4}\.\d{4,5}", m.arxiv), m
        built = [m.entry, m.docs, m.test]
        assert all(built) if m.state != "absent" else not any(built), m


@pytest.mark.parametrize("m", BUILT, ids=lambda m: str(m.number))
def test_what_is_built_can_be_called(m: Method):
    assert callable(m.load())


@pytest.mark.parametrize("m", BUILT, ids=lambda m: str(m.number))
def test_what_is_built_has_a_docs_page_that_names_its_paper(m: Method):
    assert m.docs is not None
    page = ROOT / m.docs
    assert page.is_file(), f"#{m.number} ({m.name}) promises {m.docs}"
    assert m.arxiv in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("m", BUILT, ids=lambda m: str(m.number))
def test_what_is_built_has_the_test_that_shows_its_claim(m: Method):
    assert m.test is not None
    file, *node = m.test.split("::")
    assert (ROOT / file).is_file(), f"#{m.number} ({m.name}) promises {file}"
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert any(name.startswith("test_") for name in defined)
    assert {part.partition("[")[0] for part in node} <= defined


def test_an_absent_method_says_that_it_cannot_be_called():
    absent = next(m for m in methods() if m.state == "absent")
    with pytest.raises(InputError, match=f"#{absent.number} .*no entry point yet"):
        absent.load()


def test_a_method_is_found_by_its_number():
    assert method(11).name == "Retrieval heads"
    assert method(125).name == "Faceptor"
    assert (
        method(11).paper
        == "Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv:2404.15574, ICLR 2025"
    )


@pytest.mark.parametrize("number", [0, 126, -1, "11"])
def test_an_unknown_number_is_refused_with_the_range(number: object):
    with pytest.raises(InputError, match=r"no method .* 1 to 125"):
        method(number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "query", ["retrieval", "Retrieval heads", "RETRIEVAL HEAD", "retriev", "#11", "11", "arXiv:2404.15574"]
)
def test_retrieval_heads_are_the_first_answer(query: str):
    assert numbers(query)[0] == 11


def test_speculative_decoding_finds_the_draft_room():
    found = search("speculative decoding draft")
    assert {m.room for m in found} == {"draft"}
    assert {32, 91, 33, 59} <= {m.number for m in found}


@pytest.mark.parametrize(
    "query, number",
    [
        ("reward model", 110),
        ("prune heads", 84),
        ("pruning", 84),
        ("hallucinate", 88),
        ("head pose", 5),
        ("kv cache", 15),
    ],
)
def test_a_need_in_plain_words_finds_its_method_among_the_first_five(query: str, number: int):
    assert number in numbers(query)[:5]


def test_a_common_word_does_not_bury_the_rare_one():
    """Half the catalogue has to do with heads; only what has to do with retrieval answers "retrieval heads"."""
    assert set(numbers("retrieval heads")) == set(numbers("retrieval"))
    assert len(search("heads")) > 40


def test_plural_case_and_order_change_nothing():
    assert numbers("DRAFT head") == numbers("heads, drafts")


def test_no_word_lists_everything_and_an_unknown_word_nothing():
    assert search("") == search("what is the") == methods()
    assert search("xylophone") == []


@given(st.text(max_size=60))
def test_any_text_can_be_searched(query: str):
    found = search(query)
    assert len(set(found)) == len(found)
    assert set(found) <= set(methods())


def test_nobody_can_change_the_catalogue():
    methods().clear()
    assert len(catalogue.methods()) == 125
