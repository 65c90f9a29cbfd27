"""The explorer's API: who may ask, what is answered, what a queue does, and pages that need nobody."""

import hashlib
import io
import json
import re
import threading
import time
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from typer.testing import CliRunner

import manyheads as mh
from manyheads.atlas.core.result import Atlas
from manyheads.cli import app as commands
from manyheads.errors import InputError, MismatchError
from manyheads.explorer import asking
from manyheads.explorer.app import make_app
from manyheads.explorer.guarding import BODY
from manyheads.explorer.jobs import WAITING, Full, Jobs
from manyheads.explorer.labels import LabelFile
from manyheads.explorer.overview import about_atlas, overview
from manyheads.explorer.page import STATIC, page_alone
from manyheads.explorer.workbench import Workbench
from manyheads.heads import HeadScores
from manyheads.model.reading.readers import ReadAttention
from manyheads.trace.sae.autoencoder import AttentionSae

LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30)
)
NAMES = st.sampled_from(
    ["kind", "prompt", "head", "scales", "labels", "heads", "name", "edit", "predict", "L0H0", "query", "key"]
)
JSON = st.recursive(
    LEAF | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=6),
)
TOKEN, HOST = "right-token", "127.0.0.1:8127"
PROMPT = "red cat seven lamp Paris red cat seven lamp"


@cache
def bench():
    return Workbench(mh.open_model(), "ladon")


def client(token=TOKEN, host=HOST, labels=None, **headers):
    labels = labels or LabelFile(None, bench().model.fingerprint)
    app = make_app(bench(), overview(bench().about, can_ask=True), labels, token=TOKEN, hosts=[HOST, "localhost:8127"])
    return TestClient(app, base_url=f"http://{host}", headers={"x-manyheads-token": token, **headers})


def ended(talk, asked):
    """The last event of a job."""
    job = talk.post("/api/jobs", json=asked)
    assert job.status_code == 202, job.text
    events = talk.get(f"/api/jobs/{job.json()['id']}/events").text.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return json.loads(events[-1][6:])


def answer(**asked):
    with client() as talk:
        found = ended(talk, asked)
    assert found["state"] == "done", found
    return found["result"]


# Who may ask


@pytest.mark.parametrize(
    "how, told",
    [
        (dict(token="wrong"), "token"),
        (dict(token=""), "token"),
        (dict(host="evil.example"), "own address"),
        (dict(host="127.0.0.1:9999"), "own address"),
        (dict(origin="https://evil.example"), "own page"),
        (dict(origin="null"), "own page"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/labels", "/openapi.json"])
def test_strangers_are_refused(how, told, path):
    with client(**how) as talk:
        refused = talk.get(path)
    assert refused.status_code == 403 and told in refused.json()["detail"]


def test_the_address_with_its_token_opens_the_page_which_may_load_nothing_from_elsewhere():
    with client(token="", origin=f"http://{HOST}") as talk:
        page = talk.get(f"/?token={TOKEN}")
        script = talk.get("/static/explorer.js")
    assert page.status_code == script.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.findall(r'(?:src|href)="(?!/static/|data:)', page.text)
    assert script.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/../pyproject.toml"]
)
def test_no_path_leads_out_of_the_static_folder(path):
    with client() as talk:
        assert talk.get(path).status_code in (404, 405)


def test_bodies_are_bounded_also_without_a_stated_length():
    def stream():
        for _ in range(20):
            yield b"x" * (BODY // 10)

    with client() as talk:
        assert talk.post("/api/jobs", content=b"x" * (BODY + 1)).status_code == 413
        assert talk.post("/api/jobs", content=stream()).status_code == 413


@pytest.mark.parametrize(
    "asked",
    [
        {},
        [],
        {"kind": "shell", "prompt": "x"},
        {"kind": "predict"},
        {"kind": "predict", "prompt": ""},
        {"kind": "predict", "prompt": "x" * (asking.PROMPT + 1)},
        {"kind": "predict", "prompt": "x", "path": "/etc/passwd"},
        {"kind": "pattern", "prompt": "x", "head": "../L0H0"},
        {"kind": "edit", "prompt": "x", "scales": [{"head": "L0H0", "scale": 4}]},
        {"kind": "edit", "prompt": "x", "scales": [{"head": "L0H0", "scale": 0}], "new_tokens": 10_000},
    ],
)
def test_what_is_not_understood_is_one_sentence(asked):
    with client() as talk:
        refused = talk.post("/api/jobs", json=asked)
    assert refused.status_code == 422
    assert isinstance(refused.json()["detail"], str) and len(refused.json()["detail"]) < 400


@pytest.mark.parametrize(
    "asked, told",
    [
        ({"kind": "pattern", "prompt": PROMPT, "head": "L9H0"}, "out of range"),
        ({"kind": "why", "prompt": PROMPT, "head": "L1H0", "query": 2, "key": 5}, "masked"),
        ({"kind": "why", "prompt": PROMPT, "head": "L1H0", "query": 900, "key": 0}, "9 tokens"),
        ({"kind": "predict", "prompt": "red cat " * 400}, "512 at most"),
        ({"kind": "explain", "prompt": PROMPT, "answer": "two words"}, "not one token"),
        ({"kind": "measure", "behaviour": "telepathy"}, "unknown behaviour"),
        ({"kind": "edit", "prompt": PROMPT}, "nothing is on the desk"),
        ({"kind": "edit", "prompt": PROMPT, "edits": [{"name": "../x"}]}, "no edit"),
    ],
)
def test_a_job_that_cannot_be_done_fails_with_the_command_lines_sentence(asked, told):
    with client() as talk:
        found = ended(talk, asked)
    assert found["state"] == "failed" and told in found["sentence"] and "should not" not in found["sentence"]


# What is answered


def test_next_tokens_are_the_models_own():
    found = answer(kind="predict", prompt=PROMPT)
    p = bench().model.logits(PROMPT)[0, -1].softmax(-1)
    best = p.topk(20)
    assert [row["p"] for row in found["next"]] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert found["next"][0]["token"] == bench().model.tokenizer.decode([int(best.indices[0])])
    assert len(found["tokens"]) == 9


def test_parts_of_an_answer_sum_to_its_difference():
    found = answer(kind="explain", prompt=PROMPT)
    total = sum(found["heads"]) + sum(found["mlps"]) + sum(found["constants"].values())
    assert total == pytest.approx(found["difference"], abs=0.02) and found["difference"] > 1


def test_a_pattern_and_its_reason_are_the_models_own():
    import base64

    found = answer(kind="pattern", prompt=PROMPT, head="L3H4")
    kept = []
    bench().model.look(PROMPT, ReadAttention(lambda call: kept.append(call.pattern[0, 4].numpy()), layers=[3]))
    shown = np.frombuffer(base64.b64decode(found["weights"]), np.uint8).reshape(9, 9) / 255
    assert np.abs(shown - kept[0]).max() <= 0.5 / 255 + 1e-6
    why = answer(kind="why", prompt=PROMPT, head="L3H4", query=8, key=4)
    assert sum(why["by_query"]) + why["bias"] == pytest.approx(why["score"], abs=0.05)
    assert sum(why["by_key"]) + why["bias"] == pytest.approx(why["score"], abs=0.05)
    assert why["weight"] == pytest.approx(kept[0][8, 4], abs=1e-4)


def test_an_edit_shows_both_sides_and_leaves_the_model_as_it_was():
    model = bench().model
    before = model.logits(PROMPT)
    heads = [str(head) for head in mh.atlas.induction(model).above(0.4)]
    found = answer(kind="edit", prompt=PROMPT, scales=[{"head": h, "scale": 0} for h in heads], new_tokens=3)
    assert found["before"]["text"] == model.generate(PROMPT, max_new_tokens=3, do_sample=False)
    with model.editing(mh.Ablate(heads)):
        assert found["after"]["text"] == model.generate(PROMPT, max_new_tokens=3, do_sample=False)
        p = model.logits(PROMPT)[0, -1].double().softmax(-1)
    moved = float((before[0, -1].double().softmax(-1) - p).abs().sum() / 2)
    assert found["shift"] == pytest.approx(moved, abs=1e-6) and moved > 0.3
    assert torch.equal(before, model.logits(PROMPT))


def test_the_desks_file_is_an_edit_that_does_the_same(tmp_path):
    scales = [{"head": "L3H4", "scale": 0.0}, {"head": "L1H2", "scale": 2.5}]
    with client() as talk:
        packed = talk.post("/api/recipe", json={"scales": scales})
    assert packed.status_code == 200
    zipfile.ZipFile(io.BytesIO(packed.content)).extractall(tmp_path)
    edit, model = mh.HeadEdit.load(tmp_path / "edit"), bench().model
    with model.editing(mh.Scale(["L3H4"], 0.0), mh.Scale(["L1H2"], 2.5)):
        wanted = model.logits(PROMPT)
    with model.editing(*edit.edits()):
        assert torch.allclose(model.logits(PROMPT), wanted, atol=1e-5)


def test_an_edit_from_a_file_acts_with_the_strength_that_was_set():
    model = bench().model
    own = Workbench(
        model, "ladon", edits={"off": mh.HeadEdit.of(model, mh.Ablate(["L3H4", "L3H6", "L3H7"]), method="ablate")}
    )
    asked = asking.Rewrite(kind="edit", prompt=PROMPT, edits=[asking.OnDesk(name="off", strength=0.5)], new_tokens=2)
    found = own.answer(asked)
    p = model.logits(PROMPT)[0, -1].double().softmax(-1)
    with model.editing(mh.Scale(["L3H4", "L3H6", "L3H7"], 0.5)):
        half = model.logits(PROMPT)[0, -1].double().softmax(-1)
    assert found["shift"] == pytest.approx(float((p - half).abs().sum() / 2), abs=1e-6) and found["shift"] > 0.01
    assert own.about["edits"][0]["name"] == "off"


@settings(max_examples=60, deadline=None)
@given(JSON, st.sampled_from(["/api/jobs", "/api/labels", "/api/recipe"]), st.sampled_from(["POST", "PUT", "PATCH"]))
def test_whatever_is_sent_is_refused_without_an_error_of_ours(body, path, method):
    with client() as talk:
        assert talk.request(method, path, json=body).status_code in (200, 202, 405, 413, 422, 429)


def test_the_decoding_view_shows_the_plain_text_in_fewer_passes():
    found = answer(kind="decode", prompt=PROMPT, new_tokens=24)
    text = "".join(token for one in found["passes"] for token in one)
    assert text == bench().model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    assert len(found["passes"]) < 24 and found["tokens_a_pass"] > 1


def test_a_copying_heads_ov_circuit_raises_what_it_reads():
    found = answer(kind="promotes", prompt=PROMPT, head="L5H3")
    assert [row["reads"] for row in found["rows"]] == ["red", "·cat", "·seven", "·lamp", "·Paris", "·red"]
    assert np.median([row["rank"] for row in found["rows"]]) < 0.05 * bench().model.vocab_size


def test_features_are_those_of_the_autoencoder_by_the_heads_share():
    model = bench().model
    width, eye = model.n_heads * model.head_dim, torch.eye(model.n_heads * model.head_dim)
    none = torch.zeros(width)
    sae = AttentionSae(
        3, model.n_heads, torch.cat([eye, -eye], 1), torch.zeros(2 * width), torch.cat([eye, -eye]), none
    )
    own = Workbench(model, "ladon", saes={3: sae})
    rows = own.answer(asking.Carries(kind="features", prompt=PROMPT, head="L3H4"))["rows"]
    z = model.read_z(PROMPT)[3, 0, :, 4]
    assert {row["feature"] % width // model.head_dim for row in rows} == {4} and {row["share"] for row in rows} == {1.0}
    assert max(rows[0]["activations"]) == pytest.approx(float(z.abs().max()), rel=1e-3)
    with client() as talk:
        assert "--sae" in ended(talk, {"kind": "features", "prompt": PROMPT, "head": "L3H4"})["sentence"]


def test_repeated_texts_need_induction_heads_most():
    once = "the old house by the river was cold and the garden was full of rain"
    twice = "red cat seven lamp Paris red cat seven lamp Paris red cat seven lamp Paris"
    own = Workbench(bench().model, "ladon", texts=[once, twice, once[::-1]])
    rows = own.answer(asking.Documents(kind="documents", head="L3H4"))["rows"]
    assert len(rows) == 3 and rows[0]["text"] == twice and rows[0]["score"] > 2 * abs(rows[1]["score"])


def test_a_behaviour_is_measured_on_request():
    found = answer(kind="measure", behaviour="previous_token")
    scores = mh.atlas.survey(bench().model, ["previous_token"], n=16, checks=False)["previous_token"]
    assert np.allclose(found["values"], scores.values.ravel(), rtol=2e-3)


# The queue


def test_jobs_wait_their_turn_are_cancelled_and_forgotten():
    jobs, going = Jobs(), threading.Event()

    def long(bar):
        step = bar.step("long", 100)
        going.set()
        while True:
            step(0)
            time.sleep(0.005)

    first = jobs.add("a", long)
    assert going.wait(5)
    others = [jobs.add("b", lambda bar: 7) for _ in range(WAITING)]
    assert [jobs.place(one) for one in (first, *others[:3])] == [0, 1, 2, 3]
    with pytest.raises(Full):
        jobs.add("c", lambda bar: 0)
    jobs.cancel(others[0])
    assert others[0].state == "cancelled" and jobs.place(others[1]) == 1
    jobs.cancel(first)
    until(lambda: others[-1].ended)
    assert first.state == "cancelled" and {one.state for one in others[1:]} == {"done"}
    for _ in range(80):
        last = jobs.add("d", lambda bar: 0)
        until(lambda last=last: last.ended)
    assert jobs.get(first.id) is None and jobs.get(last.id) is last and len(jobs._known) <= 33
    jobs.close()


def until(true, seconds=10):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_an_error_of_ours_ends_the_job_and_not_the_queue(capsys):
    jobs = Jobs()
    broken = jobs.add("a", lambda bar: 1 / 0)
    after = jobs.add("b", lambda bar: 7)
    until(lambda: after.ended)
    assert broken.state == "failed" and "ZeroDivisionError" in broken.sentence and after.result == 7
    assert "Traceback" in capsys.readouterr().err
    jobs.close()


# Labels


def test_labels_are_a_file_that_the_next_session_reads(tmp_path):
    file, mark = tmp_path / "labels.json", bench().model.fingerprint
    given = {"labels": [{"heads": ["L3H4"], "name": "copies", "note": "Paris"}]}
    with client(labels=LabelFile(file, mark)) as talk:
        assert talk.put("/api/labels", json=given).status_code == 200
        assert talk.put("/api/labels", json={"labels": [{"heads": [], "name": "x"}]}).status_code == 422
    assert LabelFile(file, mark).json()["labels"] == given["labels"]
    with pytest.raises(MismatchError, match="not of this one"):
        LabelFile(file, "0123456789abcdef")
    file.write_text(json.dumps({"fingerprint": mark, "labels": [{"heads": ["L3H4"]}]}))
    with pytest.raises(InputError, match="no file of labels"):
        LabelFile(file, mark)


# Pages


def small_atlas(name="tiny", seed=0):
    rng = np.random.default_rng(seed)
    values = rng.random((3, 4))
    values[0, 0] = np.nan
    scores = HeadScores("induction", values, np.full((3, 4), 0.01), 32)
    about = {"induction": {"title": "Induction </script><b>", "kind": "repetition", "threshold": 0.4, "unit": "share"}}
    return Atlas({"induction": scores}, about=about, card={"model": name, "fingerprint": "f" * 16})


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_page_alone_holds_its_numbers_and_loads_nothing():
    atlas = small_atlas()
    page = page_alone(overview(about_atlas(atlas), atlases=[atlas, small_atlas("other", 1)]))
    data = data_of(page)
    series = data["atlases"][0]["series"][0]
    assert series["values"][0] is None and series["values"][1:] == pytest.approx(
        atlas["induction"].values.ravel()[1:], rel=1e-3
    )
    assert not data["live"] and len(data["atlases"]) == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("</script>") == 2 and "default-src &#x27;none&#x27;" in page


def test_scores_are_shown_in_a_notebook_and_saved(tmp_path):
    scores = mh.atlas.induction(bench().model)
    shown = mh.show(scores, title="ladon")
    assert shown._repr_html_().startswith("<iframe") and "allow-same-origin" not in shown._repr_html_()
    data = data_of(shown.save(tmp_path / "page.html").read_text("utf-8"))
    assert data["atlases"][0]["series"][0]["values"] == pytest.approx(scores.values.ravel().tolist(), rel=1e-3)
    with pytest.raises(InputError, match="cannot show int"):
        mh.show(3)


def test_an_atlas_of_another_shape_is_refused():
    with pytest.raises(InputError, match="3 layers of 4 heads, not of 6 layers of 8"):
        overview(bench().about, atlases=[small_atlas()])


def test_the_command_writes_pages_of_atlases_histories_and_prompts(tmp_path):
    run = CliRunner().invoke
    small_atlas().save(tmp_path / "atlas")
    frame = pd.DataFrame(
        {"update": [0] * 4 + [20] * 4, "loss": [2.0] * 4 + [1.0] * 4, "accuracy": [0.1] * 4 + [0.9] * 4}
    )
    frame["head"] = ["L0H0", "L0H1", "L1H0", "L1H1"] * 2
    frame["induction"] = np.linspace(0, 0.7, 8)
    frame.to_parquet(tmp_path / "history.parquet")
    pages = {}
    for name, more in {
        "atlas": [str(tmp_path / "atlas")],
        "history": [str(tmp_path / "history.parquet")],
        "ladon": ["ladon", "--prompt", PROMPT],
    }.items():
        out = tmp_path / f"{name}.html"
        found = run(commands, ["explore", *more, "--out", str(out)])
        assert found.exit_code == 0, found.output
        pages[name] = data_of(out.read_text("utf-8"))
    assert pages["history"]["history"]["steps"] == [0, 20]
    assert pages["history"]["history"]["series"][0]["values"][1] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    kept = pages["ladon"]["prompts"][0]
    assert kept["prompt"] == PROMPT and len(kept["patterns"]) == 48 and kept["predict"]["next"][0]["token"] == " Paris"
    for bad, told in [
        (["explore", str(tmp_path / "atlas")], "give --out"),
        (["explore", "ladon", "--prompt", "x"], "give --out"),
        (
            ["explore", "ladon", "--history", str(tmp_path / "history.parquet"), "--out", str(tmp_path / "x.html")],
            "other heads",
        ),
        (
            ["explore", "ladon", "--atlas", str(tmp_path / "atlas"), "--out", str(tmp_path / "x.html")],
            "not of this one",
        ),
        (["explore", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "x.html")], "no readable"),
        (["explore", "ladon", "--out", str(tmp_path / "atlas.html")], "force"),
    ]:
        found = run(commands, bad)
        assert found.exit_code == 2 and told in found.output.replace("\n", " "), (bad, found.output)


def test_a_forecast_is_shown_as_it_was_written(tmp_path):
    folder, run = tmp_path / "forecast", CliRunner().invoke
    days = pd.date_range("2024-01-01", periods=80)
    pd.DataFrame({"unique_id": "a", "ds": days, "y": days.day}).to_csv(tmp_path / "series.csv", index=False)
    made = ["forecast", str(tmp_path / "series.csv"), "--horizon", "5", "-m", "seasonal_naive", "--out", str(folder)]
    assert run(commands, made).exit_code == 0
    assert run(commands, ["explore", str(folder), "--out", str(tmp_path / "fan.html")]).exit_code == 0
    (one,) = data_of((tmp_path / "fan.html").read_text("utf-8"))["forecast"]["series"]
    table = pd.read_parquet(folder / "forecast.parquet")
    ahead = one["ahead"]
    assert ahead["point"] == pytest.approx(table["seasonal_naive"].tolist(), rel=1e-3) and one["levels"] == [0.1, 0.9]
    assert ahead["time"][0] == table["ds"][0].timestamp() and all(len(w["time"]) == 5 for w in one["windows"])
    assert (np.diff([ahead[key] for key in ("low", "point", "high")], axis=0) >= 0).all()
    (folder / "backtest.parquet").write_text("no table")
    found = run(commands, ["explore", str(folder), "--out", str(tmp_path / "x.html")])
    assert found.exit_code == 2 and "no forecast that can be shown" in found.output.replace("\n", " ")


def test_the_script_was_built_from_the_sources_beside_it():
    sources = Path(__file__).parents[1] / "frontend"
    if not sources.exists():
        pytest.skip("the front end's sources come with the checkout")
    parts = [path.read_bytes() for path in sorted((sources / "src").iterdir())]
    mark = hashlib.sha256(b"".join([*parts, (sources / "package-lock.json").read_bytes()])).hexdigest()[:16]
    for name in ("explorer.js", "explorer.css"):
        assert f"built from {mark}" in (STATIC / name).read_text("utf-8")[:200], "run make explorer"
