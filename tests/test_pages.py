"""Every kind of page: readable with the keyboard, by ear, in the dark and on a telephone, and explained on the page itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import axe
import numpy as np
import pytest
import torch
from architectures import inputs_for, opened
from planted_sae import random_sae
from planted_vit import COPY, coloured_images, planted_vit
from test_report import Page, an_atlas

import manyheads as mh
from manyheads.atlas.surveys.diff import diff
from manyheads.atlas.vision.heads import vision_heads
from manyheads.draft.bench import DraftBench, Outcome
from manyheads.heads import HeadScores
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


PAGES: dict[str, Callable[[], str]] = {
    "atlas": lambda: html_of(an_atlas()),
    "diff": lambda: html_of(diff(an_atlas(), an_atlas(seed=1))),
    "drafting": a_bench,
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


@pytest.mark.slow
@pytest.mark.skipif(
    not (axe.AXE and axe.CHROMIUM), reason="needs Chromium, and MANYHEADS_AXE as the path of axe.min.js"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_core_finds_nothing_wrong(name, dark):
    found = [v for width in (1200, 400) for v in axe.examine(PAGES[name](), dark=dark, width=width)["found"]]
    assert not found, re.sub(r"\s+", " ", str(found))
