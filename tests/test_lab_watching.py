"""Heads while a model learns: scores by hand, runs that differ in the ablated heads alone, the page."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.lab.formation.checkpoints import checkpoints_history
from manyheads.lab.formation.watching_heads import SCORES, pattern_scores, repeats_history, said_twice
from manyheads.lab.small_llama import llama_config
from manyheads.training import generator_of


def test_scores_are_those_of_the_patterns() -> None:
    model = mh.open_model()
    rows = said_twice(3, 8, 200, torch.Generator().manual_seed(0)) + 300
    found = pattern_scores(model, rows)
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = torch.stack(model.module(rows, output_attentions=True).attentions, 1).numpy()  # [B, L, H, T, T]
    model.module.set_attn_implementation("sdpa")
    expected = [
        np.mean([patterns[..., t, t - 1].mean(0) for t in range(1, 16)], 0),
        np.mean([patterns[..., t, t - 7].mean(0) for t in range(8, 16)], 0),
        np.mean([patterns[..., t, 0].mean(0) for t in range(1, 16)], 0),
    ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_ablated_head_writes_nothing_from_the_first_update_on_and_the_start_is_the_same() -> None:
    settings = {"steps": 4, "every": 2, "heads": 2, "period": 4}
    run = repeats_history(without=["L0H0", "L0H1", "L1H0", "L1H1"], **settings)
    assert run.other is not None and run.other.without == ("L0H0", "L0H1", "L1H0", "L1H1")
    alone = repeats_history(**settings)
    np.testing.assert_array_equal(run.loss, alone.loss)  # the second run takes nothing from the first
    np.testing.assert_array_equal(run.scores["induction"], alone.scores["induction"])
    assert not np.array_equal(run.loss, run.other.loss)
    np.testing.assert_array_equal(run.updates, [0, 2, 4])
    np.testing.assert_allclose(run.scores["previous token"][0], run.other.scores["previous token"][0], atol=0.02)


def test_the_frame_has_a_row_a_moment_and_head() -> None:
    run = repeats_history(steps=2, every=1, heads=3, layers=1, period=4)
    frame = run.to_frame()
    assert len(frame) == 3 * 3 and set(SCORES) <= set(frame)
    assert frame["first token"][4] == run.scores["first token"][1, 0, 1] and frame["head"][4] == "L0H1"


def test_wrong_settings_are_refused_before_training(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("manyheads.lab.formation.watching_heads.fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(InputError, match="look more often"):
        repeats_history(steps=2, every=3)
    for head in ("L9H0", "L0H4", "x"):
        with pytest.raises(InputError, match=r"L9H0|L0H4|x"):
            repeats_history(steps=2, every=1, without=[head])


def test_the_command_writes_a_page_whose_slider_has_all_moments(tmp_path) -> None:  # type: ignore[no-untyped-def]
    page, table = tmp_path / "page.html", tmp_path / "heads.parquet"
    given = [
        "lab",
        "watch",
        "--steps",
        "10",
        "--every",
        "5",
        "--without",
        "L0H1",
        "--out",
        str(page),
        "--table",
        str(table),
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    text = page.read_text("utf-8")
    assert text.count('data-moment="2"') == text.count('data-moment="0"') == 2 * (1 + 2 + 3)
    assert 'max="2"' in text and "without L0H1" in text and table.exists()


@pytest.mark.slow
def test_induction_forms_at_once_and_others_take_over_where_heads_are_missing() -> None:
    run = repeats_history(steps=400, without=["L0H1", "L0H2"])
    assert run.other is not None
    for one in (run, run.other):
        assert one.accuracy[-1] > 0.9 and one.scores["induction"][-1].max() > 0.6
        assert one.scores["induction"][5].max() < 0.3
    assert (
        run.other.scores["previous token"][-1][0, [0, 3]].max()
        > 0.35
        > run.scores["previous token"][-1][0, [0, 3]].max()
    )


def test_any_behaviour_of_the_atlas_can_be_watched(tmp_path) -> None:  # type: ignore[no-untyped-def]
    table = tmp_path / "heads.parquet"
    told = ["lab", "watch", "--steps", "10", "--every", "10", "--vocabulary", "64", "--behaviours", "ngram_2,copying"]
    result = CliRunner().invoke(app, [*told, "--table", str(table), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    frame = pd.read_parquet(table)
    assert frame["ngram_2"].abs().max() < 0.1 and frame["copying"].nunique() > 8
    assert "copying" in (tmp_path / "page.html").read_text("utf-8")
    for bad, said in [("nothing", "nothing"), ("successor", "tokenizer")]:
        refused = CliRunner().invoke(app, ["lab", "watch", "--steps", "10000", "--every", "10", "-b", bad])
        assert refused.exit_code == 2 and said in refused.output, refused.output


def test_checkpoints_are_scored_in_the_order_of_their_steps(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ladon = mh.open_model()
    torch.manual_seed(0)
    young = LlamaForCausalLM(llama_config(ladon.vocab_size, 32, 2, 4, max_position_embeddings=256))
    for step, scale in ((200, 3.0), (1000, 9.0), (50, 1.0)):  # a training that is nothing but larger weights
        grown = copy.deepcopy(young)
        grown.model.embed_tokens.weight.data *= scale
        grown.save_pretrained(tmp_path / f"run-2026/checkpoint-{step}")
        ladon.tokenizer.save_pretrained(tmp_path / f"run-2026/checkpoint-{step}")
    folders = [str(tmp_path / f"run-2026/checkpoint-{step}") for step in (200, 1000, 50)]
    history = checkpoints_history(folders, mh.open_model)
    assert history.updates.tolist() == [50, 200, 1000] and history.accuracy.shape == (3,)
    alone = mh.open_model(folders[2])
    rows = said_twice(32, 16, alone.vocab_size, generator_of(0, 10**6 - 3))
    np.testing.assert_allclose(history.scores["first token"][0], pattern_scores(alone, rows)[2], atol=1e-6)
    table = tmp_path / "heads.parquet"
    told = ["lab", "checkpoints", *folders, "-b", "induction", "--table", str(table), "--out", str(tmp_path / "p.html")]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    frame = pd.read_parquet(table)
    assert frame["update"].unique().tolist() == [50, 200, 1000] and frame["head"].nunique() == 8
    assert len(set(frame.groupby("update")["loss"].first())) == 3 and frame["induction"].notna().all()


@pytest.mark.parametrize(
    "names, said",
    [
        (["a", "b"], "no number"),
        (["a1", "b/step1"], "two checkpoints are of step 1"),
        (["a1"], "two checkpoints or more"),
    ],
)
def test_names_that_tell_no_order_are_refused(names, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=said):
        checkpoints_history(names, lambda _: pytest.fail("it opened one"))
