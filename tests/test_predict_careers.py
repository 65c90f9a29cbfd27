"""Titles as text: their probabilities are the model's own, and a tuned model follows a known law."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.predict.output.careers import FROM_NOTHING, TUNING, language_of, resumes, title_scores, tune_on_texts

TITLES = [" senior nurse", " senior cook", " cook", " driver", " chief driver"]
LAW = {"junior cook": "senior driver", "senior nurse": "junior baker"}
FRAME = pd.DataFrame(
    {
        "person": [1, 1, 1, 2, 2],
        "year": [2002, 2001, 2003, 2001, 2002],
        "title": ["cook", "driver", "cook", "nurse", "nurse"],
        "sex": ["f", "f", "f", "m", "m"],
    }
)


def test_a_resume_has_a_line_a_year_in_order():
    assert resumes(FRAME, covariates=["sex"])[1] == "sex f\n2001: driver\n2002: cook\n2003: cook\n"
    assert resumes(FRAME)[2] == "2001: nurse\n2002: nurse\n"


def test_title_probabilities_are_those_of_whole_texts_and_sum_to_at_most_one():
    model = mh.open_model()
    histories = ["2001: cook\n2002:", "2001: senior nurse\n2002: driver\n2003:"]
    scores = title_scores(model, histories, TITLES)
    for i, history in enumerate(histories):
        start = len(model.tokenizer(history)["input_ids"])
        for j, title in enumerate(TITLES):
            ids = torch.tensor([model.tokenizer(history + title + "\n")["input_ids"]])
            log_p = model.logits(ids)[0].double().log_softmax(-1)
            own = sum(float(log_p[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
            assert float(scores.log_p[i, j]) == pytest.approx(own, abs=1e-4)
    assert (scores.log_p.exp().sum(1) <= 1 + 1e-9).all()
    torch.testing.assert_close(scores.renormalised.exp().sum(1), torch.ones(2, dtype=torch.double))
    alone = title_scores(model, histories[1:], TITLES[::-1])
    torch.testing.assert_close(alone.log_p[0].flip(0), scores.log_p[1], rtol=0, atol=1e-5)
    log_p = float(scores.log_p[0, 2] + scores.log_p[1, 3]) / 2
    assert scores.perplexity([" cook", " driver"]) == pytest.approx(torch.tensor(-log_p).exp().item())


@pytest.mark.slow
def test_a_tuned_model_follows_the_law_of_the_careers_and_the_model_stays():
    model = mh.open_model()
    before = model.fingerprint
    texts = ["2001: cook\n2002: driver\n", "2001: nurse\n2002: baker\n"] * 4
    tuned = tune_on_texts(model, texts, replace(TUNING, steps=40))
    scores = title_scores(tuned, ["2001: cook\n2002:", "2001: nurse\n2002:"], [" driver", " baker"])
    assert scores.renormalised[0, 0] > -0.1 and scores.renormalised[1, 1] > -0.1 and scores.log_p[0, 0] > -0.5
    assert model.fingerprint == before != tuned.fingerprint


def test_a_small_language_writes_its_texts_in_words_and_learns_their_law():
    texts = [f"2001: {a}\n2002: {b}\n" for a, b in LAW.items()] * 3
    small = language_of(texts, width=32)
    ids = small.tokenizer(texts[0])["input_ids"]
    assert small.tokenizer.decode(ids) == texts[0] and len(ids) == 10
    assert small.tokenizer.decode(small.tokenizer("Zoë's\n")["input_ids"]) == "Zoë's\n"
    before = title_scores(small, ["2001: cook\n2002:"], [" senior driver", " junior baker"])
    assert before.renormalised[0].max() < -0.3  # it knows nothing yet
    tuned = tune_on_texts(small, texts, replace(FROM_NOTHING, steps=120, rows=8, rate=1e-2))
    after = title_scores(tuned, [f"2001: {a}\n2002:" for a in LAW], [f" {b}" for b in LAW.values()])
    assert (after.renormalised.diagonal() > -0.2).all()


def test_with_texts_held_out_the_best_state_counts():
    texts = ["2001: cook\n2002: driver\n", "2001: nurse\n2002: baker\n"]
    held = ["2001: cook\n2002: cook\n", "2001: nurse\n2002: nurse\n"]
    small = language_of(texts + held, layers=1, width=32)
    settings = replace(FROM_NOTHING, steps=100, rows=8, rate=1e-2, every=5)

    def loss(model):
        return -float(title_scores(model, ["2001: cook\n2002:"], [" cook", " driver"]).log_p[0, 0])

    last, best = tune_on_texts(small, texts, settings), tune_on_texts(small, texts, settings, held_out=held)
    assert loss(best) < loss(last) - 0.5  # later states know the others' titles only


@pytest.mark.usefixtures("any_shape")
def test_what_cannot_be_scored_is_refused():
    model = mh.open_model()
    with pytest.raises(InputError, match="is the beginning of"):
        title_scores(model, ["2001:"], [" cook", " cook of ships"], end="")
    with pytest.raises(InputError, match="joins"):
        title_scores(model, ["2001: "], ["cook"])
    with pytest.raises(InputError, match="each title once"):
        title_scores(model, ["2001:"], [" cook", " cook"])
    with pytest.raises(InputError, match="no column 'title'"):
        resumes(FRAME.drop(columns="title"))
    with pytest.raises(InputError, match="two titles in one year"):
        resumes(FRAME.assign(year=2001))
    with pytest.raises(InputError, match="end of a line"):
        resumes(FRAME.assign(title="a\nb"))
    with pytest.raises(InputError, match="at least one"):
        tune_on_texts(model, [])
    with pytest.raises(InputError, match="at least one"):
        language_of([])
    with pytest.raises(InputError, match="multiple of 32"):
        language_of(["2001: cook\n"], width=48)
    from architectures import opened

    with pytest.raises(UnsupportedError, match="causal model"):
        title_scores(opened("bert"), ["a"], TITLES)
