"""Every kind of page: readable with the keyboard, by ear, in the dark and on a telephone, and explained on the page itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import axe
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import inputs_for, opened
from planted_sae import random_sae
from planted_vit import COPY, coloured_images, planted_vit
from test_report import Page, an_atlas
from typer.testing import CliRunner

import manyheads as mh
from manyheads import cli
from manyheads.atlas.surveys.diff import diff
from manyheads.atlas.vision.heads import vision_heads
from manyheads.draft.bench import DraftBench, Outcome
from manyheads.edit.effects import SideEffects
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.pages.catalogue.page import catalogue_page
from manyheads.report import html_of
from manyheads.tasks import IOI, encode
from manyheads.trace.positions.logit_lens import read_states
from manyheads.trace.positions.patching_map import patching_map
from manyheads.trace.prompts.maps import prompt_maps
from manyheads.trace.prompts.prompt_cam import PromptCAM
from manyheads.trace.regions.cutting import ImageRegions, grid_regions
from manyheads.trace.regions.lima import rank_regions
from manyheads.trace.sae.features import FeatureReport, feature_cards, polysemanticity

ladon = cache(mh.open_model)
PROMPT = "When Rachel and Eric went to the garden, Rachel gave a camera to"


def a_bench() -> str:
    plain = Outcome("generate", 80.0, 1.0, None, None, None, None, None)
    drafted = Outcome("lookup <x>", 160.0, 2.0, 2.5, [0.8, 0.5], 0.1, 12.0, 1.0)
    return html_of(DraftBench((plain, drafted), "Eight prompts."))


def an_explanation() -> str:
    return html_of(mh.explain(ladon(), PROMPT, "Eric", "Rachel"))


def a_circuit() -> str:
    return html_of(mh.explain(ladon(), PROMPT, "Eric", "Rachel").circuit.top(12))


def a_lens() -> str:
    return html_of(read_states(ladon(), PROMPT, top=3))


def a_map() -> str:
    batch = encode(IOI(), ladon().tokenizer, 2, 0)
    return html_of(patching_map(ladon(), batch.inputs, batch.twins, batch.logit_difference, keep=1))


def scores() -> str:
    return html_of(
        HeadScores.from_examples("induction", np.random.default_rng(0).normal(size=(5, 3, 4)), {"paper": "x"})
    )


def regions() -> str:
    found = ImageRegions(torch.rand(3, 8, 8), grid_regions(8, 8, 2))

    def bright(images: torch.Tensor) -> torch.Tensor:
        x = images[:, 0, 4:6].mean((1, 2)) * 8 - 4
        return torch.stack([-x, x], 1).softmax(-1)

    return html_of(rank_regions(found, bright, target=1))


def features() -> str:
    model = opened("llama")
    cards = feature_cards(
        model, random_sae(model, 1), [torch.randint(1, opened("llama").plain.config.vocab_size, (8, 40))], examples=3
    )
    return html_of(FeatureReport(cards[:3], random_sae(model, 1), model, polysemanticity(cards, 1)))


def prompts() -> str:
    cam = PromptCAM(opened("vit"), ["owl", "dog", "elk"]).eval()
    return html_of(prompt_maps(cam, inputs_for("vit", batch=1)["pixel_values"][0], "dog"))


def vision() -> str:
    model, (images, labels) = planted_vit(copies=COPY[:1]), coloured_images(16)
    return html_of(vision_heads(model, images, labels, top=2, clusters=8))


def an_edit(**changes: Any) -> HeadEdit:
    """Two heads, one scaled and one shifted, with a goal and side effects as the methods write them."""
    effect = {
        "right": {"before": 0.25, "after": 0.75, "random": [0.25, 0.3, 0.75], "n": 32},
        "side effects": {
            "text": {"before": 3.0, "after": 3.5, "stderr": 0.1, "n": 16.0},
            "ioi": {"before": 1.0, "after": 0.9, "stderr": 0.06, "n": 64.0},
        },
    }
    made = {"method": "LoFiT <b>", "found": "by hand & eye", "effect": effect, "strength": 0.5} | changes
    heads = HeadSet([Head(0, 1), Head(2, 3)], (4, 4))
    return HeadEdit(heads, torch.tensor([0.0, 1.0]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "abc", **made)


def side_effects() -> str:
    rows = [("text", "nats", 3.0, 3.5, 0.5, 0.1, 16), ("ioi", "share", 1.0, 0.9, -0.1, 0.06, 64)]
    columns = ["measure", "unit", "before", "after", "change", "stderr", "n"]
    return html_of(SideEffects(pd.DataFrame(rows, columns=columns)))


PAGES: dict[str, Callable[[], str]] = {
    "atlas": lambda: html_of(an_atlas()),
    "diff": lambda: html_of(diff(an_atlas(), an_atlas(seed=1))),
    "catalogue": catalogue_page,
    "drafting": a_bench,
    "edit": lambda: html_of(an_edit()),
    "side-effects": side_effects,
    "explanation": an_explanation,
    "circuit": a_circuit,
    "logit-lens": a_lens,
    "patching-map": a_map,
    "scores": scores,
    "regions": regions,
    "features": features,
    "class-prompts": prompts,
    "vision": vision,
}


@cache
def page(name: str) -> Page:
    torch.manual_seed(0)
    return Page(PAGES[name]())


@pytest.mark.parametrize("name", PAGES)
def test_what_scrolls_can_be_reached_with_the_keyboard_and_has_a_name(name):
    regions = [attrs for _, attrs in page(name).tags if "scroll" in (attrs.get("class") or "").split()]
    for attrs in regions:
        assert attrs.get("tabindex") == "0" and attrs.get("role") == "region" and attrs.get("aria-label")
    names = [attrs["aria-label"] for attrs in regions]
    assert len(names) == len(set(names)), "two regions of one name cannot be told apart"


@pytest.mark.parametrize("name", PAGES)
def test_every_page_says_how_to_read_it_before_its_first_figure(name):
    found = page(name)
    text = "\n".join(found.texts)
    assert text.count("How to read this") == 1
    assert [tag for tag, _ in found.tags].index("summary") < [tag for tag, _ in found.tags].index("main")


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of each row of the tables of a page, by the first."""
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", text)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}


def test_the_page_of_an_edit_says_what_it_does_at_its_strength_and_what_random_heads_would_do():
    text = html_of(an_edit())
    rows = rows_of(text)
    assert rows["L0H1"] == ["0.500", "0.000"], "halfway between 1 and 0"
    assert rows["L2H3"] == ["1.000", "2.500"], "half of a vector of length 5"
    assert rows["Answered right"] == ["0.25", "0.75", "0.50", "0.43 (3)", "32"]
    assert "1 of 3 random choices reaches as much" in text
    assert re.findall(r'<i class="b\d" aria-hidden="true">(.)</i>', text) == ["×", "+"]
    assert "LoFiT &lt;b&gt;" in text and "by hand &amp; eye" in text
    assert "<h2>What it is for</h2>" not in html_of(an_edit(effect={})) and "Nothing was measured" in html_of(
        an_edit(effect={})
    )


def test_the_page_of_an_edit_found_with_shares_before_and_after_shows_them_and_the_mean_of_random_heads():
    effect = {"before": {"memory": 0.5, "n": 16}, "after": {"memory": 1.0, "n": 16}, "gain": 0.5}
    text = html_of(an_edit(effect=effect | {"mean gain of random sets": 0.01, "p": 1 / 21}))
    assert rows_of(text)["Memory"] == ["0.50", "1.00", "0.50", "–", "16"]
    said = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "The gain is 0.50; random heads of the same layers gain 0.01 on average, p = 0.048." in said


@pytest.mark.parametrize("name", ["edit", "side-effects"])
def test_side_effects_beyond_two_standard_errors_are_bold_and_others_not(name):
    rows = rows_of(PAGES[name]())
    assert rows["Text"][:3] == ["3.000", "3.500", "<b>0.50 ± 0.10</b>"]
    assert rows["Ioi"][2] == "<span>−0.10 ± 0.06</span>"


def test_a_command_writes_the_page_of_an_edit(tmp_path):
    an_edit().save(tmp_path / "edit")
    asked = ["edit", "report", str(tmp_path / "edit"), "--out", str(tmp_path / "page.html")]
    assert CliRunner().invoke(cli.app, asked).exit_code == 0
    assert (tmp_path / "page.html").read_text("utf-8") == html_of(HeadEdit.load(tmp_path / "edit"))
    again = CliRunner().invoke(cli.app, asked)
    assert again.exit_code == 2 and "already exists" in again.output


@pytest.mark.slow
@pytest.mark.skipif(
    not (axe.AXE and axe.CHROMIUM), reason="needs Chromium, and MANYHEADS_AXE as the path of axe.min.js"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_core_finds_nothing_wrong(name, dark):
    found = [v for width in (1200, 400) for v in axe.examine(PAGES[name](), dark=dark, width=width)["found"]]
    assert not found, re.sub(r"\s+", " ", str(found))
