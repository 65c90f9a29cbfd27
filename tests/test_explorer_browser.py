"""Every flow of the explorer in a Chromium without a window, by mouse and by keyboard, light and dark, narrow and wide.

Needs Chromium and the package playwright (no browser of its own); axe-core too where MANYHEADS_AXE names axe.min.js.
With MANYHEADS_SHOTS=FOLDER the pictures are kept there, to be looked at.
"""

import json
import os
import re
import threading
import time
from functools import cache
from pathlib import Path

import axe
import numpy as np
import pandas as pd
import pytest

import manyheads as mh
from manyheads.atlas.core.result import Atlas
from manyheads.explorer.labels import LabelFile
from manyheads.explorer.overview import about_atlas, overview
from manyheads.explorer.page import page_alone
from manyheads.explorer.workbench import Workbench
from manyheads.heads import HeadScores

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
if not axe.CHROMIUM:
    pytest.skip("needs Chromium", allow_module_level=True)
pytestmark = pytest.mark.slow
PROMPT = "red cat seven lamp Paris red cat seven lamp"
SHOTS = os.environ.get("MANYHEADS_SHOTS", "")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=axe.CHROMIUM, args=["--no-sandbox", *axe.OFF.split()])
        yield chromium
        chromium.close()


@cache
def atlas(shape=(6, 8), name="ladon", seed=0):
    rng = np.random.default_rng(seed)
    about = {
        "induction": {"title": "Induction", "kind": "repetition", "threshold": 0.9, "unit": "share of attention"},
        "copying": {"title": "Copying", "kind": "copying", "threshold": 0.95, "unit": "share"},
    }
    scores = {key: HeadScores(key, rng.random(shape), np.full(shape, 0.02), 32) for key in about}
    return Atlas(scores, about=about, card={"model": name})


@pytest.fixture(scope="module")
def address():
    """A live explorer of ladon on a free port."""
    import uvicorn

    from manyheads.explorer.app import make_app
    from manyheads.explorer.serving import bound

    model = mh.open_model()
    bench = Workbench(model, "ladon")
    shown = overview(bench.about, atlases=[atlas()], can_ask=True)
    listening = bound(0)
    at = f"127.0.0.1:{listening.getsockname()[1]}"
    app = make_app(bench, shown, LabelFile(None, model.fingerprint), token="t", hosts=[at])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://{at}/?token=t"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def page(browser, address):
    """The page, which may ask nobody else and may not complain."""
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    told, asked = [], []
    tab.on(
        "console",
        lambda message: (
            told.append(message.text)
            if message.type in ("error", "warning") and "readback" not in message.text
            else None
        ),
    )
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("[role=application]")
    yield tab
    assert told == []
    home = address.split("?")[0]
    assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []
    tab.close()


def ask(tab, prompt=PROMPT):
    tab.fill("#prompt", prompt)
    tab.click("button.main:has-text('Ask')")
    tab.wait_for_selector("table[aria-label='part']", timeout=60_000)
    tab.wait_for_selector("[aria-label^='Attention pattern']", timeout=60_000)


def shot(tab, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def grid(tab):
    return tab.locator("[aria-label^='Grid of heads']")


def test_a_head_is_found_by_mouse_and_by_keyboard(page):
    field = grid(page)
    side = field.bounding_box()["width"] / 8
    field.hover(position={"x": side * 4.5, "y": side * 3.5})
    assert "L3H4:" in page.locator(".tip").first.inner_text()
    field.click(position={"x": side * 4.5, "y": side * 3.5})
    assert page.locator("section[aria-label='L3H4']").count() == 1 and page.url.endswith("#L3H4")
    field.focus()
    for key in ("Home", "ArrowRight", "ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert page.locator("section[aria-label='L2H1']").count() == 1


def test_colours_change_with_what_is_asked_for(page):
    def cell():
        return page.evaluate(
            "[...document.querySelector('canvas').getContext('2d').getImageData(10, 10, 1, 1).data].join()"
        )

    seen = set()
    for value in ("roles", "Scores:induction", "Scores:copying"):
        page.select_option("section[aria-label=Heads] select >> nth=0", value)
        page.wait_for_timeout(100)
        seen.add(cell())
    assert len(seen) == 3


def test_a_prompt_is_answered_explained_and_drawn_on_the_grid(page):
    ask(page)
    assert "·Paris" in page.locator("table[aria-label='next token'] tbody tr").first.inner_text()
    assert (
        "This answer"
        in page.locator("section[aria-label=Heads] select >> nth=0").locator("option:checked").inner_text()
    )
    page.click("table[aria-label='next token'] tbody tr:nth-child(2) button")
    page.wait_for_selector("table[aria-label='next token'] tbody tr:nth-child(2).chosen", timeout=60_000)
    shot(page, "asked")


def test_a_choice_of_two_tokens_says_why_the_head_looks_there(page):
    page.goto(page.url.split("#")[0] + "#L3H4")
    page.reload()
    ask(page)
    pattern = page.locator("[aria-label^='Attention pattern of L3H4']")
    side = pattern.bounding_box()["width"] / 9
    pattern.click(position={"x": side * 4.5, "y": side * 8.5})
    page.wait_for_selector(".why", timeout=60_000)
    told = page.locator(".why").inner_text()
    assert "16.447" in told and "L1H4" in told
    page.click("text=Which texts need it most?")
    page.wait_for_selector(".documents li", timeout=120_000)
    page.click("text=What does it write?")
    page.wait_for_selector("text=(its OV circuit)", timeout=60_000)
    shot(page, "why")


def test_the_edit_desk_changes_the_answer_and_gives_the_file(page):
    page.fill("#prompt", PROMPT)
    for head in ("L3H4", "L3H6", "L3H7"):
        page.evaluate(f"location.hash = '{head}'")
        page.wait_for_selector(f"section[aria-label='{head}']")
        page.click("text=Put it on the edit desk")
    page.click("text=Run edited")
    page.wait_for_selector(".written >> nth=1", timeout=60_000)
    before, after = (page.locator(".written").nth(i).inner_text() for i in (0, 1))
    assert before != after
    page.locator(".sliders input").first.fill("1.5")
    assert page.locator(".sliders output").first.inner_text() == "1.5"
    with page.expect_download() as loading:
        page.click("text=Download the scales")
    assert loading.value.suggested_filename == "edit.zip"
    shot(page, "desk")


def test_decoding_shows_passes_and_labels_are_kept_and_saved(page):
    page.fill("#prompt", PROMPT)
    page.click("text=Write 64 tokens")
    page.wait_for_selector(".decoded", timeout=60_000)
    assert page.locator(".decoded > span").count() < 40
    page.fill("text=/^Label for/ >> input", "copies")
    page.fill("text=What you saw >> input", "it says Paris")
    page.click(".label-form button")
    page.wait_for_selector(".labels li")
    with page.expect_download() as loading:
        page.click("text=Save as file")
    saved = json.loads(Path(loading.value.path()).read_text("utf-8"))
    assert saved["labels"][0]["name"] == "copies"
    page.click("[aria-label='Delete the label copies']")
    page.wait_for_selector(".labels li", state="detached")


def test_figures_are_saved_as_svg_and_png(page):
    for kind, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as loading:
            page.click(f"section[aria-label=Heads] button:text-is('{kind}')")
        assert Path(loading.value.path()).read_bytes().startswith(start)


def test_what_cannot_be_done_is_said_in_its_place(page):
    page.fill("#prompt", "cat " * 700)
    page.click("button.main:has-text('Ask')")
    page.wait_for_selector("[role=alert]", timeout=60_000)
    assert "512 at most" in page.locator("[role=alert]").inner_text()


def test_a_long_job_is_cancelled(page):
    page.select_option("text=Not measured yet >> select", "retrieval")
    page.click("text=Measure now")
    page.click("text=Cancel")
    page.wait_for_selector(".busy", state="detached", timeout=60_000)


@pytest.mark.skipif(not axe.AXE, reason="needs MANYHEADS_AXE as the path of axe.min.js")
@pytest.mark.parametrize("width", [1600, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_core_finds_nothing_wrong(browser, address, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    tab = context.new_page()
    tab.goto(address)
    ask(tab)
    tab.click("text=Put it on the edit desk")
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.add_script_tag(path=axe.AXE)
    found = tab.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    shot(tab, f"{scheme}-{width}")
    assert [(one["id"], [node["html"][:150] for node in one["nodes"]]) for one in found] == []
    context.close()


def test_a_page_alone_opens_from_disk_and_shows_training(browser, tmp_path):
    frame = pd.DataFrame({"update": np.repeat([0, 20, 40], 48), "loss": np.repeat([2.0, 1.0, 0.5], 48)})
    frame["accuracy"], frame["head"] = 0.5, [f"L{i // 8}H{i % 8}" for i in range(48)] * 3
    frame["induction"] = np.linspace(0, 1, 144)
    frame.to_parquet(tmp_path / "history.parquet")
    told = overview(about_atlas(atlas()), atlases=[atlas(), atlas(seed=1)], history=tmp_path / "history.parquet")
    (tmp_path / "page.html").write_text(page_alone(told), "utf-8")
    tab, errors = browser.new_page(viewport={"width": 1200, "height": 900}), []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((tmp_path / "page.html").as_uri())
    tab.wait_for_selector("[role=application]")
    assert "Difference" in tab.locator("optgroup").evaluate_all("all => all.map((one) => one.label).join()")
    tab.select_option("section[aria-label=Heads] select >> nth=0", "Scores:induction")
    assert tab.locator("section[aria-label=Heads] canvas").count() == 2, "two atlases stand one below the other"
    tab.locator("section[aria-label=Training] input").fill("2")
    tab.wait_for_selector("text=Update 40")
    assert "after 40 updates" in tab.locator("section[aria-label=Heads] select option:checked").inner_text()
    shot(tab, "training")
    assert errors == [] and not tab.locator("#prompt").count()
    tab.close()


def test_a_notebook_draws_scores_in_a_frame_of_their_own(browser, tmp_path):
    shown = mh.show(HeadScores("mine", np.random.default_rng(0).random((6, 8)), np.full((6, 8), 0.1), 4))
    (tmp_path / "notebook.html").write_text(f"<!doctype html><p>cell</p>{shown._repr_html_()}", "utf-8")
    tab, errors = browser.new_page(viewport={"width": 1000, "height": 800}), []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((tmp_path / "notebook.html").as_uri())
    field = tab.frame_locator("iframe").locator("[role=application]")
    field.click(position={"x": 60, "y": 60})
    assert tab.frame_locator("iframe").locator("section[aria-label='L1H1']").count() == 1
    shot(tab, "notebook")
    assert errors == []
    tab.close()


def test_large_models_paint_within_a_second_and_follow_the_pointer(browser, tmp_path):
    """512 tokens, 32 x 32 heads; and 128 layers of 64 heads stay usable. Times are printed, and bounds are loose."""
    import base64

    times = {}
    for shape, tokens in (((32, 32), 512), ((128, 64), 64)):
        large = atlas(shape, "large")
        shown = overview(about_atlas(large), atlases=[large])
        weights = base64.b64encode(np.tril(np.full((tokens, tokens), 9, np.uint8)).tobytes()).decode()
        names = [f"t{i}" for i in range(tokens)]
        shown["prompts"] = [
            {
                "prompt": "long",
                "predict": {"tokens": names, "next": []},
                "explain": None,
                "patterns": [{"head": shown["start"], "tokens": names, "weights": weights}],
            }
        ]
        (tmp_path / "page.html").write_text(page_alone(shown), "utf-8")
        tab = browser.new_page(viewport={"width": 1400, "height": 1000})
        tab.goto((tmp_path / "page.html").as_uri())
        tab.wait_for_selector("canvas")
        times[shape, "paint"] = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        tab.click("button.chip:has-text('long')")
        field = tab.locator("[aria-label^='Attention pattern']")
        field.scroll_into_view_if_needed()
        box = field.bounding_box()
        started = time.monotonic()
        for i in range(20):
            tab.mouse.move(box["x"] + 5 + 7 * i, box["y"] + 5 + 9 * i)
        tab.wait_for_function("document.querySelectorAll('.tip')[1].textContent.includes('looks at')")
        times[shape, "hover"] = 1000 * (time.monotonic() - started) / 20
        shot(tab, f"large-{shape[0]}")
        tab.close()
    print({f"{shape} {what}": round(ms) for (shape, what), ms in times.items()}, "ms")
    assert max(times.values()) < 5000


def test_the_page_names_its_assets_only(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=t", address)
