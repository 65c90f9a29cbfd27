"""AttentionInfluence (#17): algebra and brute force first, then what the bundled model's retrieval heads tell apart."""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from architectures import DECODERS
from bars import Counting
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.core.repeats import usable_ids
from manyheads.atlas.retrieval_heads.influence import (
    FLOOR,
    Influence,
    influence,
    retrieval_heads,
    selection,
    token_matched,
)
from manyheads.atlas.retrieval_heads.influence_files import influence_files
from manyheads.atlas.retrieval_heads.json_recall import JsonRecall
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadScores

COLUMNS = "id file row domain n_tokens loss loss_masked score rank selected random random_tokens".split()


@cache
def tiny(name):
    torch.manual_seed(3)
    module = DECODERS[name]().eval()
    for parameter in module.parameters():  # so that attention is far from uniform
        if parameter.ndim > 1:
            parameter.data *= 4
    return mh.open_model(module)


@cache
def ladon():
    return mh.open_model()


def ragged(n=14, vocabulary=61, longest=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, size=rng.integers(2, longest)).tolist() for _ in range(n)]


ARCHITECTURES = ["llama", "gpt2", "mistral", "gpt_neox"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_heads_give_a_score_of_exactly_zero(name):
    """#17 (a)."""
    found = influence(tiny(name), ragged(), heads=[])
    assert np.array_equal(found.score, np.zeros(14)) and found.loss.min() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_neither_padding_nor_company_changes_a_score(name):
    """#17 (a): to 1e-5."""
    model, rows = tiny(name), ragged()
    heads = [(1, 0), (1, 3), (2, 1)]
    alone = influence(model, rows, heads=heads, batch_tokens=1)
    together = influence(model, rows, heads=heads, batch_tokens=10_000)
    mirrored = influence(model, rows[::-1], heads=heads, batch_tokens=100)
    assert np.abs(alone.score).max() > 1e-3
    for other in (together.score, mirrored.score[::-1]):
        assert np.abs(alone.score - other).max() <= 1e-5


def test_of_a_large_vocabulary_a_pass_reads_fewer_tokens(monkeypatch):
    model, rows, sizes = tiny("llama"), ragged(), []
    whole = influence(model, rows, heads=[(1, 0)])
    monkeypatch.setattr(import_module("manyheads.atlas.retrieval_heads.influence"), "LOGITS", 50 * model.vocab_size)
    handle = model.plain.model.layers[0].register_forward_hook(
        lambda _, given, out: sizes.append(given[0][..., 0].numel())
    )
    parts = influence(model, rows, heads=[(1, 0)])
    handle.remove()
    assert max(sizes) <= 50 < sum(map(len, rows))
    assert np.abs(parts.score - whole.score).max() <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_score_is_its_formula_on_the_modules_own_logits(name):
    model, rows = tiny(name), ragged(5)
    heads = [(0, 2), (2, 3)]
    found = influence(model, rows, heads=heads)

    def loss(row):
        ids = torch.tensor([row])
        with torch.no_grad():
            return model.module(ids, labels=ids).loss.item()

    for i, row in enumerate(rows):
        clean = loss(row)
        with model.editing(mh.Ablate(heads, "uniform")):
            masked = loss(row)
        assert found.loss[i] == pytest.approx(clean, rel=1e-5)
        assert found.score[i] == pytest.approx((masked - clean) / clean, abs=1e-5)
        assert found.n_tokens[i] == len(row)


def test_the_denominator_has_a_floor_and_a_lone_token_no_score():
    known = Influence(np.array([5, 5, 1]), np.array([0.001, 2.0, np.nan]), np.array([0.011, 3.0, np.nan]), mh.HeadSet())
    assert known.score[:2] == pytest.approx([0.01 / FLOOR, 0.5]) and np.isnan(known.score[2])
    frame = known.to_frame(keep=0.5)
    assert frame["rank"].tolist()[:2] == [2, 1] and frame["rank"].isna().tolist() == [False, False, True]
    assert frame.selected.tolist() == [False, True, False]
    assert np.isnan(influence(tiny("llama"), [[5], [5, 6, 7]], heads=["L0H0"]).score).tolist() == [True, False]


def test_the_first_max_tokens_of_a_document_count():
    model, rows = tiny("llama"), ragged(4, longest=60)
    cut = influence(model, [row[:10] for row in rows], heads=["L1H1"])
    assert np.array_equal(influence(model, rows, heads=["L1H1"], max_tokens=10).score, cut.score)
    assert influence(model, [[5] * 500], heads=["L1H1"]).n_tokens[0] == 128  # all its positions


def test_a_model_without_retrieval_heads_is_refused_not_ranked():
    """#17 (c): an untrained twin of the bundled model, and scores that are too low."""
    torch.manual_seed(0)
    twin = mh.open_model(LlamaForCausalLM(ladon().config).eval(), tokenizer=ladon().tokenizer)
    with pytest.raises(UnsupportedError, match="no retrieval heads"):
        influence(twin, ["The red cup lay in the barn."])
    low = HeadScores("retrieval", np.full((6, 8), 0.09), np.zeros((6, 8)), 40)
    with pytest.raises(UnsupportedError, match=r"best score 0\.090"):
        retrieval_heads(twin, scores=low)
    assert influence(twin, ["The red cup lay in the barn."], heads=["L3H6"]).loss > 0  # whoever names heads gets scores


def test_the_top_twentieth_of_the_heads_is_masked():
    values = np.arange(48.0).reshape(6, 8) / 48
    scores = HeadScores("retrieval", values, np.zeros((6, 8)), 40)
    assert retrieval_heads(ladon(), scores=scores) == {(5, 7), (5, 6)}
    assert len(retrieval_heads(ladon(), scores=scores, share=0.001)) == 1
    with pytest.raises(InputError, match="share is 0"):
        retrieval_heads(ladon(), scores=scores, share=0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.one_of(st.just(float("nan")), st.floats(-1, 5)), st.integers(1, 500)),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_each_domain_selects_its_top_share_beside_as_many_random_ones_and_as_many_random_tokens(rows, keep):
    domain, score, tokens = (np.array(column) for column in zip(*rows, strict=True))
    frame = pd.DataFrame({"domain": domain, "score": score, "tokens": tokens})
    frame = frame.assign(**selection(score, tokens, domain, keep=keep, seed=1))
    assert frame["rank"].isna().tolist() == np.isnan(score).tolist()
    assert not frame[np.isnan(score)][["selected", "random", "random_tokens"]].any(axis=None)
    for _, part in frame[~np.isnan(score)].groupby("domain"):
        k = round(keep * len(part))
        ordered = part.sort_values("rank")
        assert ordered["rank"].tolist() == list(range(1, len(part) + 1))
        assert (np.diff(ordered.score) <= 0).all()
        assert ordered.selected.tolist() == [True] * k + [False] * (len(part) - k)
        assert part.random.sum() == k
        wanted, drawn = part.tokens[part.selected].sum(), part.tokens[part.random_tokens]
        assert drawn.sum() >= wanted and (not k or drawn.sum() - drawn.max() < wanted)


def test_a_token_matched_twin_has_the_same_tokens_in_another_order():
    rows = ragged(8)
    twins = token_matched(rows, seed=2)
    assert [sorted(twin) for twin in twins] == [sorted(row) for row in rows]
    assert [twin[0] for twin in twins] == [row[0] for row in rows] and twins != rows
    assert token_matched(torch.tensor([[1, 2, 3, 4]]), 0) == token_matched([[1, 2, 3, 4]], 0)


def test_wrong_input_is_said():
    with pytest.raises(InputError, match="texts need a tokenizer"):
        influence(tiny("llama"), ["text"], heads=["L0H0"])
    with pytest.raises(InputError, match="one text"):
        influence(ladon(), "text", heads=["L0H0"])
    with pytest.raises(InputError, match="at least 2 tokens"):
        influence(ladon(), ["text"], heads=["L0H0"], max_tokens=1)
    with pytest.raises(InputError, match="floor is 0; give a number above 0"):
        influence(ladon(), ["text"], heads=["L0H0"], floor=0)


def auroc(score, positive):
    ranks = pd.Series(score).rank()
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum()))


def repeats_and_twins(n=24, period=20, seed=0):
    """The same random tokens twice, in order the second time or not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(usable_ids(ladon()))
    first = torch.stack([ids[torch.randperm(len(ids), generator=generator)[:period]] for _ in range(n)])
    second = torch.stack([row[torch.randperm(period, generator=generator)] for row in first])
    rows = torch.cat([torch.cat([first, first], 1), torch.cat([first, second], 1)])
    return rows, np.arange(2 * n) < n


def test_on_ladon_its_retrieval_heads_mark_repeats_against_twins_with_the_same_tokens():
    rows, repeats = repeats_and_twins()
    heads = retrieval_heads(ladon())
    found = influence(ladon(), rows, heads=heads).score
    assert auroc(found, repeats) >= 0.9
    assert found[repeats].mean() > 2 * abs(found[~repeats].mean())


def test_the_proxy_task_marks_the_value_the_key_and_the_query():
    for example in JsonRecall().examples(5, seed=1):
        part = {name: example.prompt[a:b] for name, (a, b) in example.spans.items()}
        assert part["key"] == part["query"] and len(part["key"]) == 6
        assert part["needle"] == example.answer + example.continuation
        assert f'"{part["key"]}": "{part["needle"]}"' in example.prompt
        assert example.prompt.count(part["key"]) == 2 and example.prompt.count("\n") == 4
    batch = mh.tasks.encode(JsonRecall(), ladon().tokenizer, 4)
    start, end = batch.spans["needle"][0].tolist()
    assert ladon().tokenizer.decode(batch.input_ids[0, start:end]).startswith(batch.examples[0].answer)
    with pytest.raises(InputError, match="more than 3 pairs"):
        JsonRecall(pairs=3).examples(1)


HEADS = ["L3H6", "L2H1"]


def corpus(folder, n=160, seed=0):
    """Two files, JSON lines and Parquet, of short texts in two domains; some are empty."""
    rng = np.random.default_rng(seed)
    words = "The red cup lay in old barn and Mary saw a lamp near hill".split()
    rows = [{"text": " ".join(rng.choice(words, rng.integers(0, 12))), "topic": "xy"[i % 3 == 0]} for i in range(n)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: n // 2]))
    pd.DataFrame(rows[n // 2 :]).to_parquet(folder / "b.parquet")
    return [folder / "a.jsonl", folder / "b.parquet"], rows


SETTINGS = dict(heads=HEADS, domain_column="topic", batch_tokens=32)


def test_files_are_scored_into_one_table_with_ranks_and_provenance(tmp_path):
    paths, rows = corpus(tmp_path, 60)
    out = influence_files(ladon(), paths, tmp_path / "scores.parquet", **SETTINGS)
    frame = pd.read_parquet(out)
    assert frame.columns.tolist() == COLUMNS and frame.id.tolist() == list(range(len(frame)))
    texts = [row["text"] for row in rows if row["text"]]
    direct = influence(ladon(), texts, heads=HEADS)
    assert np.array_equal(frame.score.isna(), np.isnan(direct.score))
    assert np.nanmax(np.abs(frame.score - direct.score)) <= 1e-5
    kept = [(str(paths[i // 30]), i % 30) for i in range(60) if rows[i]["text"]]
    assert list(zip(frame.file, frame.row, strict=True)) == kept
    for _, part in frame[frame.score.notna()].groupby("domain"):
        ordered = part.sort_values("rank")
        assert ordered["rank"].tolist() == list(range(1, len(part) + 1)) and ordered.score.is_monotonic_decreasing
        assert part.selected.sum() == part.random.sum() == round(0.2 * len(part))
    about = json.loads(pq.read_schema(out).metadata[b"manyheads.influence"])
    assert about["heads"] == sorted(HEADS) and about["wanted"]["fingerprint"] == ladon().fingerprint
    assert about["documents"] == len(frame) and about["wanted"]["settings"]["domain_column"] == "topic"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.parquet", "scores.parquet"]


@pytest.fixture
def short_parts(monkeypatch):
    """A fourth of what an interruption may lose: a few texts are several parts."""
    monkeypatch.setattr("manyheads.atlas.retrieval_heads.influence_files.BATCHES", 8)


@pytest.mark.usefixtures("short_parts")
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    paths, _ = corpus(tmp_path)
    whole = pd.read_parquet(influence_files(ladon(), paths, tmp_path / "whole.parquet", **SETTINGS))
    out, seen = tmp_path / "scores.parquet", []

    def interrupt(n):
        seen.append(n)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        influence_files(ladon(), paths, out, bar=interrupt, **SETTINGS)
    assert not out.exists() and 0 < seen[0] < len(whole)
    parts = tmp_path / ".scores.parquet.parts"
    (parts / ".000000009999.parquet.abc").write_bytes(b"half a part")
    resumed = []
    influence_files(ladon(), paths, out, bar=Counting(resumed), **SETTINGS)
    assert resumed[0] == seen[0] and sum(resumed) == len(whole)
    pd.testing.assert_frame_equal(pd.read_parquet(out), whole)
    assert not parts.exists()


@pytest.mark.usefixtures("short_parts")
def test_an_unfinished_run_with_another_plan_is_refused_unless_forced(tmp_path):
    paths, _ = corpus(tmp_path)
    out = tmp_path / "scores.parquet"

    def interrupt(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        influence_files(ladon(), paths, out, bar=interrupt, **SETTINGS)
    with pytest.raises(InputError, match="unfinished run with another heads and floor"):
        influence_files(ladon(), paths, out, **{**SETTINGS, "heads": ["L0H0"], "floor": 0.5})
    with paths[0].open("a") as file:
        file.write('{"text": "one more", "topic": "x"}\n')
    with pytest.raises(InputError, match="another files"):
        influence_files(ladon(), paths, out, **SETTINGS)
    influence_files(ladon(), paths, out, force=True, **SETTINGS)
    assert pd.read_parquet(out).row.max() == 80  # the line that came later
    with pytest.raises(InputError, match="already exists"):
        influence_files(ladon(), paths, out, **SETTINGS)


def test_without_documents_or_tokenizer_nothing_is_left_behind(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match="there is no document in"):
        influence_files(ladon(), [empty], tmp_path / "out.parquet", heads=HEADS)
    with pytest.raises(InputError, match="need a tokenizer"):
        influence_files(tiny("llama"), [empty], tmp_path / "out.parquet", heads=["L0H0"])
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


KILLED = """
import os, signal, sys
import manyheads as mh
from manyheads.atlas.retrieval_heads.influence_files import influence_files
calls = []
def bar(n):
    calls.append(n)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
influence_files(mh.open_model(), sys.argv[2:], sys.argv[1], heads=["L3H6", "L2H1"], domain_column="topic",
                batch_tokens=32, bar=bar)
"""


@pytest.mark.slow
def test_a_killed_run_loses_and_doubles_no_row(tmp_path):
    paths, _ = corpus(tmp_path, 2000)
    whole = pd.read_parquet(influence_files(ladon(), paths, tmp_path / "whole.parquet", **SETTINGS))
    out = tmp_path / "scores.parquet"
    environment = {**os.environ, "PYTHONPATH": str(Path(mh.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", KILLED, str(out), *map(str, paths)], env=environment, check=False)
    assert run.returncode == -signal.SIGKILL and not out.exists()
    resumed = []
    influence_files(ladon(), paths, out, bar=Counting(resumed), **SETTINGS)
    assert 0 < resumed[0] < len(whole) and sum(resumed) == len(whole)
    pd.testing.assert_frame_equal(pd.read_parquet(out), whole)
