from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from manyheads.atlas.core.result import Atlas, CausalCheck, PatternExample
from manyheads.errors import InputError
from manyheads.heads import Head, HeadScores
from manyheads.pages.atlas_tables import head_table, summary_table
from manyheads.report import html_of as report
from manyheads.report import write
from manyheads.report.families import TITLES, families_of
from manyheads.report.figures import HUES, ColourScale, Finding, findings_map, nice_ticks, pattern_figure
from manyheads.report.html import Html, el, escape, markdown
from manyheads.report.html import page as whole_page
from manyheads.report.numbers import brief, number, p_equals, plus_minus, visible

HOSTILE = (
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "]]>",
    '" onload="x',
    "&lt;",
    "\x00",
    "\u202e",
    "\ud800",
    "",
)
HOSTILE += ("é", "漢字", "\n", " the", "\xa0", "🙂")
VOID = {"meta", "link", "br", "hr", "input", "col", "img"}


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and what its scripts and styles hold."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.append((self.open[-1], data))
        else:
            self.texts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(next(data for tag, data in self.raw if tag == "script"))

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if attrs.get("id")]

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in attrs]


def pattern(rng: np.random.Generator, n: int) -> np.ndarray:
    weights = np.tril(rng.exponential(size=(n, n)))
    return weights / weights.sum(1, keepdims=True)


def an_atlas(n_layers: int = 3, n_heads: int = 4, *, seed: int = 0, tokens: tuple[str, ...] = HOSTILE) -> Atlas:
    rng = np.random.default_rng(seed)
    shape = (n_layers, n_heads)
    induction = HeadScores("induction", rng.uniform(0, 0.3, shape), rng.uniform(0.001, 0.03, shape), 64)
    induction.values[-1, -1] = 0.93
    copying = HeadScores("copying", rng.uniform(-1, 1, shape), np.zeros(shape), 0)
    top = f"L{n_layers - 1}H{n_heads - 1}"
    effects = tuple(rng.normal(0.2, 0.1, 20).tolist())
    checks = [
        CausalCheck("induction", mode, (top,), "logit <difference>", 64, 4.0, 1.5, 2.5, 0.1, effects, 1 / 21)
        for mode in ("mean", "zero")
    ]
    about = {
        "induction": dict(
            title="Induction", what="Looks <back>.", formula="a < b", unit="share", threshold=0.4, low=0.0, high=1.0
        ),
        "copying": dict(title="Copying", what="Copies.", paper="arXiv:1234.56789", threshold=0.6, low=-1.0, high=1.0),
    }
    card = dict(
        model="<img src=x onerror=alert(1)>",
        n_layers=n_layers,
        n_heads=n_heads,
        parameters=1234567,
        seed=7,
        version="9.9",
        seconds=1.25,
        settings={"<b>": ["</script>"]},
        card_markdown="---\nlicense: x\n---\n# Card\n![p](https://x.org/p.png) <b>hi</b> [a](javascript:alert(1))",
    )
    examples = [PatternExample("induction", top, tokens, pattern(rng, len(tokens)))]
    return Atlas(
        {"induction": induction, "copying": copying}, checks, examples, about, {"successor": "no <tokenizer>"}, card
    )


def shown(table: Any) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report(an_atlas()))


def test_every_element_is_closed_and_every_id_is_there_once(page: Page):
    assert page.open == []
    assert len(page.ids()) == len(set(page.ids()))


def test_links_within_the_page_lead_to_a_place_or_a_head_of_it(page: Page):
    inside = {attrs["href"][1:] for attrs in page.having("href") if attrs["href"].startswith("#")}
    assert inside
    assert inside <= {*page.ids(), *page.data["heads"]}


def test_nothing_that_came_in_becomes_markup(page: Page):
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "style"]
    text = "".join(page.texts)
    for piece in ("<img src=x onerror=alert(1)>", "Looks <back>.", "no <tokenizer>", "logit <difference>", "<b>hi</b>"):
        assert piece in text


def test_every_token_is_readable_in_the_page_and_in_its_data(page: Page):
    assert page.data["patterns"][0]["tokens"] == [visible(token) for token in HOSTILE]
    for token in HOSTILE:
        assert visible(token) in page.texts


def test_the_data_name_every_head_and_hold_its_scores():
    atlas = an_atlas(5, 7)
    data = Page(report(atlas)).data
    assert data["heads"] == [f"L{layer}H{i}" for layer in range(5) for i in range(7)]
    for series, scores in zip(data["series"], atlas.scores.values(), strict=True):
        np.testing.assert_allclose(series["scores"], scores.values.ravel(), atol=1e-4)
        np.testing.assert_allclose(series["stderr"], scores.stderr.ravel(), atol=1e-4)


def test_the_patterns_in_the_data_are_those_of_the_atlas():
    atlas = an_atlas()
    kept = Page(report(atlas)).data["patterns"][0]
    weights = np.frombuffer(base64.b64decode(kept["weights"]), np.uint8) / 255
    np.testing.assert_allclose(weights.reshape(len(HOSTILE), -1), atlas.patterns[0].pattern, atol=1 / 255)


def test_the_page_loads_nothing_from_anywhere(page: Page):
    assert not page.having("src")
    elsewhere = [tag for tag, attrs in page.tags if "href" in attrs and not attrs["href"].startswith(("#", "data:"))]
    assert set(elsewhere) == {"a"}
    (style,) = (data for tag, data in page.raw if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_its_policy_allows_its_own_script_and_style_and_nothing_else(page: Page):
    (policy,) = (attrs["content"] for attrs in page.having("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    own = [data for tag, data in page.raw if tag == "style"] + [page.raw[-1][1]]
    for text in own:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_a_heat_map_shows_each_score_and_outlines_the_heads_found(page: Page):
    atlas = an_atlas()
    tables = [attrs for tag, attrs in page.tags if tag == "table" and "data-series" in attrs]
    assert len(tables) == 2
    outlined = [attrs for tag, attrs in page.tags if tag == "td" and "found" in (attrs.get("class") or "").split()]
    assert len(outlined) == sum(len(atlas.found(name)) for name in atlas.scores)
    for value in atlas["copying"].values.flat:
        assert brief(value) in page.texts


def test_the_causal_check_has_a_dot_for_each_random_set(page: Page):
    dots = [attrs for tag, attrs in page.tags if tag == "circle" and "data-tip" in attrs]
    assert len(dots) == 40
    assert any(p_equals(1 / 21) in text for text in page.texts)
    assert any("None of 20 random sets cost as much" in text for text in page.texts)


def test_p_stands_beside_its_q_and_the_page_says_how_many_claims_were_tried():
    """Three claims with p 1/21, 2/21 and 11/21: q is 3 p / rank, 3/21, 3/21 and 11/21."""
    atlas = an_atlas()
    others = [
        dataclasses.replace(atlas.checks[0], mode=mode, p_value=p)
        for mode, p in (("zero", 11 / 21), ("uniform", 2 / 21))
    ]
    atlas = dataclasses.replace(atlas, checks=[atlas.checks[0], *others])
    assert atlas.q_values() == pytest.approx((3 / 21, 11 / 21, 3 / 21))
    frame = atlas.checks_frame()
    assert frame["q"].tolist() == list(atlas.q_values()) and frame["sets"].tolist() == [20] * 3
    assert frame["p"].tolist() == [check.p_value for check in atlas.checks]
    page = Page(report(atlas))
    text = " ".join(" ".join(page.texts).replace("\N{NO-BREAK SPACE}", " ").split())
    assert "3 claims were tried" in text and "no p can be below 0.048" in text
    assert text.count("q = 0.14") == 4, "in the strips and in numbers, for two of the three"
    assert page.data["checks"][1]["p"].replace("\N{NO-BREAK SPACE}", " ") == "p = 0.52, q = 0.52"
    table = " ".join(shown(summary_table(atlas)).split())
    assert "0.048 │ 0.14" in table and "3 claims were tried" in table
    assert "claims" not in shown(summary_table(dataclasses.replace(atlas, checks=[])))


def with_p(atlas: Atlas, *p_values: float) -> Atlas:
    """Checks of one behaviour with these p."""
    checks = [dataclasses.replace(atlas.checks[0], mode=f"kind {i}", p_value=p) for i, p in enumerate(p_values)]
    return dataclasses.replace(atlas, checks=checks)


def test_what_is_bold_is_what_q_says_and_not_what_p_says():
    """Two claims with p 1/21 and 1/2: q is 2/21 and 1/2, so neither is bold; one claim with p 1/21 is, since q is p."""

    def bold(atlas: Atlas) -> list[str]:
        return [
            b
            for b in re.findall(r"<b>([^<]*)</b>", report(atlas))
            if b.startswith(("p\N{NO-BREAK SPACE}", "0.048", "&lt;"))
        ]

    assert not bold(with_p(an_atlas(), 1 / 21, 0.5))
    alone = bold(with_p(an_atlas(), 1 / 21))
    assert alone[:2] == ["0.048", "0.048"] and alone[2].replace("\N{NO-BREAK SPACE}", " ") == "p = 0.048, q = 0.048"
    assert len(bold(with_p(an_atlas(), 0.0001, 0.9))) == 3, "in the overview p and q, in the strip both"


def test_the_terms_stand_open_before_the_findings_and_say_what_p_can_be_and_how_many_claims_were_tried():
    text = report(with_p(an_atlas(), 1 / 21, 0.5, 0.9))
    (terms,) = re.findall(r"<details open><summary>How to read this</summary>(.*?)</details>", text)
    assert text.index(terms) < text.index("<main>")
    said = "".join(Page(terms).texts)
    for term in ("L4H2", "Score", " z ", "Found", "Ablation"):
        assert term in said
    assert "20 random sets cannot show less than 0.048" in said and "the 3 claims tried on this page" in said
    assert "bold where q ≤ 0.05: here none. More random sets" in said
    assert "here 1." in "".join(Page(report(with_p(an_atlas(), 0.001, 0.9))).texts)
    assert "claims tried" not in report(dataclasses.replace(an_atlas(), checks=[])), (
        "nothing to say where nothing was tried"
    )


def test_what_found_nothing_is_folded_and_enters_the_page_when_it_is_opened(page: Page):
    atlas = an_atlas()
    atlas.about["copying"]["threshold"] = 1.5
    text = report(atlas)
    (folded,) = re.findall(r'<details id="behaviour-copying"[^>]*><summary>(.*?)</summary><template>', text)
    assert "Copying</b>: no head reaches 1.50; best L" in folded
    assert text.index('id="behaviour-induction"') < text.index('<section id="nothing">') < text.index(folded)
    assert '<article id="behaviour-induction" class="behaviour">' in text, "what was found stands open"
    assert "Nothing found" not in page.texts, "both behaviours have heads here"
    assert "Nothing found: 1 behaviour" in text and "No head reaches the threshold of: Copying." in text


def test_behaviours_of_one_kind_share_a_colour_and_letter_and_others_do_not():
    kinds = {"a": "copying", "b": "position", "c": "copying", "d": "sorting", "e": "sums", "f": "position"}
    found = families_of(kinds)
    assert list(found) == ["b", "f", "a", "c", "d", "e"], "one family next to each other"
    families = {kinds[name]: family for name, family in found.items()}
    assert found["a"] == found["c"] != found["b"] and found["a"].title == "Copying" and found["d"].title == "Sorting"
    assert (
        len({family.letter for family in families.values()}) == len({f.hue for f in families.values()}) == len(families)
    )
    every = families_of({kind: kind for kind in TITLES})
    assert (
        len({family.hue for family in every.values()}) == len({f.letter for f in every.values()}) == len(TITLES) == HUES
    )


def test_a_head_with_two_behaviours_of_a_family_has_one_stripe_and_with_two_families_two():
    findings = [Finding(n, [Head(0, 0)], hue_, letter) for n, hue_, letter in (("x", "b0", "P"), ("y", "b0", "P"))]
    findings.append(Finding("z", [Head(0, 0), Head(0, 1)], "b3", "C"))
    cells = re.findall(r"<td>(.*?)</td>", findings_map((1, 3), findings, label="map"))[1:]
    assert [re.findall(r'<i class="(b\d)" aria-hidden="true">(.)</i>', cell) for cell in cells] == [
        [("b0", "P"), ("b3", "C")],
        [("b3", "C")],
        [],
    ]
    assert "x, y, z" in cells[0]


def colours(css: str) -> dict[str, dict[str, str]]:
    """The variables of the light and of the dark theme; the dark one changes some of the light ones."""
    light, dark = css.split("@media screen and (prefers-color-scheme: dark)")
    first = dict(re.findall(r"--([\w-]+): ([^;}]+)", light))
    return {"light": first, "dark": first | dict(re.findall(r"--([\w-]+): ([^;}]+)", dark.split(".b0")[0]))}


_TO_LMS = np.array(
    [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
)
_TO_LAB = np.array(
    [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
)


def linear(colour: str) -> np.ndarray:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    values = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(colour: str) -> np.ndarray:
    return _TO_LAB @ np.cbrt(_TO_LMS @ linear(colour))


def mixed(colour: str, zero: str, share: float) -> np.ndarray:
    """CSS's color-mix(in oklab), as linear light."""
    parts = share * lab(colour) + (1 - share) * lab(zero)
    return np.clip(np.linalg.inv(_TO_LMS) @ (np.linalg.inv(_TO_LAB) @ parts) ** 3, 0, 1)


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    bright = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ c) for c in (a, b))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_on_every_shade_of_every_colour_can_be_read_and_the_colours_are_told_apart(theme: str):
    css = (files("manyheads.report") / "report.css").read_text("utf-8")
    variables = colours(css)[theme]
    names = re.findall(r"^\.b\d+ \{ --hue: var\(--(\w+)\)", css, re.MULTILINE)
    assert len(names) == HUES
    for name in [*names, "cold", "warm"]:
        assert contrast(linear(variables[name]), linear(variables["paper"])) >= 4.5, name
        turn = float(variables[f"{name}-mid"].rstrip("%"))
        for step in range(21):
            text = variables["on-cold" if 5 * step < turn else "on-hot"]
            shade = mixed(variables[name], variables["zero"], step / 20)
            assert contrast(linear(text), shade) >= 4.5, (name, step)
    apart = [np.linalg.norm(lab(variables[a]) - lab(variables[b])) for i, a in enumerate(names) for b in names[:i]]
    assert min(apart) > 0.11


def test_figures_have_words_for_those_who_do_not_see_them(page: Page):
    for tag, attrs in page.tags:
        if tag == "svg" and attrs.get("role") == "img":
            assert attrs["aria-label"]
    assert all(attrs["aria-label"] for attrs in page.having("data-series"))


def test_an_existing_page_stays_unless_forced(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"report\.html already exists"):
        an_atlas().report(path)
    assert path.read_text() == "mine"
    assert an_atlas().report(path, force=True) == path
    assert path.read_text("utf-8").startswith("<!doctype html>")


def bare(atlas: Atlas) -> Atlas:
    return Atlas(atlas.scores)


def without_errors(atlas: Atlas) -> Atlas:
    nan = {n: dataclasses.replace(s, stderr=np.full(s.shape, np.nan)) for n, s in atlas.scores.items()}
    checks = [dataclasses.replace(c, stderr=math.nan, random_effects=()) for c in atlas.checks]
    return dataclasses.replace(atlas, scores=nan, checks=checks)


def without_numbers(atlas: Atlas) -> Atlas:
    nan = {n: dataclasses.replace(s, values=np.full(s.shape, np.nan)) for n, s in atlas.scores.items()}
    checks = [dataclasses.replace(c, effect=math.nan, p_value=math.nan) for c in atlas.checks]
    blank = [dataclasses.replace(p, pattern=np.full_like(p.pattern, np.nan)) for p in atlas.patterns]
    return dataclasses.replace(atlas, scores=nan, checks=checks, patterns=blank)


@pytest.mark.parametrize("change", [bare, without_errors, without_numbers])
@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (24, 16), (2, 40)])
def test_what_is_missing_leaves_a_gap_and_never_breaks_the_page(change: Any, shape: tuple[int, int]):
    atlas = change(an_atlas(*shape))
    page = Page(report(atlas))
    assert page.open == []
    assert len(page.data["heads"]) == shape[0] * shape[1]
    assert not re.search(r"\bnan\b", "".join(page.texts))
    assert bool(re.search(r"L\d+H\d+", shown(summary_table(atlas)))) == (change is not without_numbers)


@pytest.mark.parametrize("n_tokens", [1, 2, 40, 150])
def test_a_pattern_of_any_length_keeps_to_its_width(n_tokens: int):
    text = tuple(f" word{i}" for i in range(n_tokens))
    (svg, *_) = Page(pattern_figure(pattern(np.random.default_rng(0), n_tokens), text, label="x", index=0)).tags
    assert int(svg[1]["width"]) <= 500


@given(
    st.recursive(
        st.sampled_from(HOSTILE[:6]) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_no_data_of_a_page_can_end_the_element_it_stands_in(data: Any):
    """Nor begin one: `<`, `>` and `&` are written as JSON's escapes, and what is read back is what was put in."""
    text = whole_page("title", Html("<p>body</p>"), data={"data": [data, "</script><!--<script>"]})
    embedded = text.split('id="data">')[1].split("</script>")[0]
    assert not re.search("[<>&]", embedded) and "\\u003c/script\\u003e" in embedded
    read, put = json.loads(embedded)["data"], json.loads(json.dumps(data))
    assert read[1] == "</script><!--<script>" and (read[0] == put or "\ufffd" in embedded)
    seen = Page(text)
    assert seen.open == [] and [tag for tag, _ in seen.tags].count("script") == 2


def test_a_big_model_makes_a_page_of_under_two_megabytes():
    assert len(report(an_atlas(32, 32, tokens=tuple(f" word{i}" for i in range(64))))) < 2e6


def test_the_summary_says_how_many_behaviours_stood_the_check(page: Page):
    assert any("For 1 of the 1 behaviour checked" in text for text in page.texts)


def test_beating_every_random_set_counts_where_there_are_too_few_for_a_small_p():
    atlas = an_atlas()
    few = [dataclasses.replace(c, random_effects=(0.1, 0.2, 0.3), p_value=0.25) for c in atlas.checks]
    assert "For 1 of the 1 behaviour checked" in report(dataclasses.replace(atlas, checks=few))
    beaten = [dataclasses.replace(few[0], random_effects=(0.1, 9.0, 0.3), p_value=0.5), few[1]]
    text = report(dataclasses.replace(atlas, checks=beaten))
    assert "For 0 of the 1 behaviour checked" in text
    assert "1 of 3 random sets costs as much" in text


def test_a_model_opened_from_a_folder_is_called_by_the_last_part_of_its_path():
    card = {"model": "/home/someone/models/ladon"}
    text = report(dataclasses.replace(an_atlas(), card=card))
    assert "<h1>ladon</h1>" in text
    assert "manyheads atlas /home/someone/models/ladon" in text


def test_an_atlas_without_scores_is_refused_with_the_reason():
    with pytest.raises(InputError, match="successor: no tokenizer"):
        report(Atlas({}, skipped={"successor": "no tokenizer"}))
    with pytest.raises(InputError, match="none was asked for"):
        summary_table(Atlas({}))


def test_the_summary_table_shows_top_heads_effect_random_and_p():
    text = shown(summary_table(an_atlas()))
    assert "L2H3 0.93 ±" in text
    assert "2.50 ± 0.10" in text
    assert "0.048" in text
    assert "no <tokenizer>" in text


def test_the_head_table_ranks_heads_and_marks_those_found_and_checked():
    lines = [line for line in shown(head_table(an_atlas(), "induction", 3)).splitlines() if re.search(r"L\dH\d", line)]
    assert len(lines) == 3
    assert "L2H3" in lines[0]
    assert lines[0].count("yes") == 2
    assert "yes" not in lines[1]


@given(st.text())
def test_text_comes_out_of_a_page_as_it_went_in(text: str):
    printable = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)
    page = Page(el("p", text, title=text))
    assert "".join(page.texts) == printable
    assert page.tags == [("p", {"title": printable})]
    escape(text).encode()


@given(st.text())
def test_visible_tokens_hold_nothing_that_disturbs_a_line(token: str):
    assert visible(token)
    assert visible(token).isprintable()
    visible(token).encode()


def test_markup_is_kept_and_text_is_not():
    assert el("p", Html("<b>x</b>"), "<b>", [1, None, [el("br")]]) == "<p><b>x</b>&lt;b&gt;1<br></p>"
    assert (
        el("a", class_="x", data_row=3, hidden=True, title=None, disabled=False)
        == '<a class="x" data-row="3" hidden></a>'
    )


def test_markdown_has_no_raw_html_no_pictures_and_links_only_to_the_web():
    text = markdown(
        "# T\n<script>x</script>\n\n![a](https://x.org/a.png) [b](./c) [d](https://d.org)\n\n|a|\n|-:|\n|1|"
    )
    page = Page(text)
    assert {tag for tag, _ in page.tags} == {"h2", "p", "a", "table", "thead", "tbody", "tr", "th", "td"}
    assert [attrs["href"] for attrs in page.having("href") if "d.org" in attrs["href"]] == ["https://d.org"]
    assert not page.having("style")


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_ticks_are_few_evenly_spaced_and_within(low: float, width: float):
    high = low + width
    ticks = nice_ticks(low, high)
    assert len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_scale_goes_from_pale_to_full_and_diverges_where_it_begins_below_zero():
    assert [ColourScale(0, 1).step(x) for x in (0, 0.5, 1, 2, math.nan)] == ["q0", "q10", "q20", "q20", "q-none"]
    assert [ColourScale(-1, 1).step(x) for x in (-1, -0.001, 0.5)] == ["n20", "q0", "q10"]
    assert ColourScale(-1, 1).percent(0) == 50
    assert ColourScale.holding(np.array([math.nan])) == ColourScale(0, 1)
    assert ColourScale.holding(np.array([0.2, 1.7]), 0, 1) == ColourScale(0, 1.7)


@pytest.mark.parametrize(
    "value, expected", [(0.834, ".83"), (-0.4, "−.40"), (0.999, "1.0"), (12.3, "12"), (-0.001, ".00"), (math.nan, "–")]
)
def test_cells_hold_brief_numbers(value: float, expected: str):
    assert brief(value) == expected


def test_a_number_has_the_decimals_its_error_deserves():
    assert plus_minus(0.5, 0.03) == "0.50 ± 0.03"
    assert plus_minus(0.5, 0.0031) == "0.500 ± 0.003"
    assert plus_minus(0.5, math.nan) == "0.50 ± n/a"
    assert plus_minus(0.5, 0.0, exact=True) == "0.50"
    assert number(-0.001) == "0.00"
    assert number(123456.0) == "123,456"


def test_any_result_is_written_by_type_and_what_has_no_page_is_refused_by_name(tmp_path):
    scores = HeadScores.from_examples(
        "induction", np.random.default_rng(0).random((5, 3, 4)), {"paper": "arXiv:2209.11895"}
    )
    text = write(scores, tmp_path / "scores.html").read_text("utf-8")
    assert str(next(iter(scores.top(1)))) in text
    assert "arxiv.org/abs/2209.11895" in text
    with pytest.raises(InputError, match="already exists"):
        write(scores, tmp_path / "scores.html")
    with pytest.raises(InputError, match=r"a dict has no page; there are pages for .*Atlas.*HeadScores"):
        write({}, tmp_path / "nothing.html")
    assert not (tmp_path / "nothing.html").exists()
