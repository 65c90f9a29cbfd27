"""#4, winning cases: direct effects against path patching, known winners on a model by hand, and the bundled model."""

from functools import cache

import numpy as np
import pytest
import torch
from architectures import VOCAB, inputs_for, opened
from bars import Counting
from planted_successor import COPYING, SUCCESSOR, planted

import manyheads as mh
from manyheads.atlas.successor_heads.winning_cases import winning_cases, winning_cases_in_text
from manyheads.errors import InputError, UnsupportedError

EXACT = ["llama", "gpt2", "gemma2", "olmo2", "granite", "gpt_neox", "falcon", "bloom", "opt", "gpt_oss"]


@cache
def made(n_kv_heads=4):
    return planted(n_kv_heads=n_kv_heads)


def prompts(p, n=40, seed=0):
    """`filler, number`, without numbers that need a carry."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([t for i, t in enumerate(p.classes["number"][:-1]) if i % 10 != 9])
    number = numbers[torch.randint(len(numbers), (n,), generator=generator)]
    filler = torch.tensor(p.fillers)[torch.randint(len(p.fillers), (n,), generator=generator)]
    return torch.stack([filler, number], 1), number + 1, filler


@pytest.mark.parametrize("name", EXACT)
def test_direct_effects_are_path_patching_to_the_logits_with_frozen_mlps(name):
    """Ablating to another prompt's z is patching from that prompt; the naive computation of it is tested with path patching."""
    model = opened(name)
    ids = inputs_for(name, batch=2, length=7)["input_ids"]
    clean, other = ids[:1], ids[1:]
    answers = torch.tensor([5, 9])
    cases = winning_cases_in_text(
        model, clean.expand(2, -1), answers=answers, reference=model.read_z(other)[:, 0, -1], seed=0
    )

    def log_p(logits):
        return logits[:, -1].float().log_softmax(-1)[:, answers[0]]

    patched = mh.path_patching(model, clean, other, log_p, mlps="frozen", positions=-1)
    assert np.abs(cases.effects[0] + patched.by_head(*model.shape)).max() < 1e-4 * max(1, np.abs(cases.effects).max())
    assert cases.cases["log_p"][0] == pytest.approx(float(patched.clean.mean()), abs=1e-4)


def test_direct_effects_are_the_naive_ones_on_a_llama():
    model = opened("llama")
    ids = inputs_for("llama", batch=3, length=9)["input_ids"]
    cases = winning_cases_in_text(model, ids, per_row=8)
    module, z, mean = model.module, model.read_z(ids), model.mean_z(ids)
    final = model.read_site(ids, "resid")[-1]
    for n, (row, position) in enumerate(cases.cases[["row", "position"]].itertuples(index=False)):
        assert cases.cases["right"][n] == str(int(ids[row, position + 1]))
        clean = module(ids).logits[row, position].log_softmax(-1)[ids[row, position + 1]]
        for layer, head in ((0, 1), (1, 3), (2, 0)):
            change = (mean[layer, head] - z[layer, row, position, head]) @ model.W_O(layer)[head]
            logits = module.lm_head(module.model.norm(final[row, position] + change))
            effect = clean - logits.log_softmax(-1)[ids[row, position + 1]]
            assert float(effect.detach()) == pytest.approx(cases.effects[n, layer, head], abs=1e-5)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_each_planted_head_wins_its_own_cases_and_no_other(n_kv_heads):
    p = made(n_kv_heads)
    ids, successors, fillers = prompts(p)
    for head, rival, answers in ((SUCCESSOR, COPYING, successors), (COPYING, SUCCESSOR, fillers)):
        scores = winning_cases_in_text(p.model, ids, answers=answers).scores
        assert scores["winning_cases"][head] == 1.0 and scores["winning_cases"][rival] == 0.0
        assert scores["direct_effect"][head] > 0.5 and scores["direct_effect"].top(1) == p.model.head_set([head])
        assert scores["shuffled"][head] < 0.5, "it does not win whatever is right"
        assert scores["winning_cases"].n == len(ids)


def test_a_case_that_no_head_helps_has_no_winner():
    p = made()
    ids, successors, _ = prompts(p, n=4)
    mean = p.model.read_z(ids)[:, :, -1].mean(1)
    same = winning_cases_in_text(p.model, ids[:1].expand(2, -1), answers=successors[:2], reference=mean)
    own = p.model.read_z(ids[:1])[:, 0, -1]
    none = winning_cases_in_text(p.model, ids[:1].expand(2, -1), answers=successors[:2], reference=own)
    assert (same.cases["winner"] != "").all()
    assert np.abs(none.effects).max() < 1e-5
    assert none.scores["winning_cases"].values.sum() <= 1


def test_cases_of_padded_texts_are_real_tokens():
    model = mh.open_model()
    texts = ["Monday Tuesday Wednesday Thursday", "The cup is in the kitchen and the pen is in the garden."]
    cases = winning_cases_in_text(model, texts, per_row=50)
    assert "" not in set(cases.cases["right"]) and set(cases.cases["row"]) == {0, 1}
    for n, (row, position) in enumerate(cases.cases[["row", "position"]].itertuples(index=False)):
        logits = model.logits(texts)[row, position].log_softmax(-1)
        right = model.tokenizer.convert_tokens_to_ids(model.tokenizer.tokenize(cases.cases["right"][n]))
        assert float(logits[right[0]]) == pytest.approx(cases.cases["log_p"][n], abs=1e-3)


def test_post_normed_models_have_no_direct_path():
    with pytest.raises(UnsupportedError, match="no direct paths"):
        winning_cases_in_text(opened("bert"), torch.randint(3, VOCAB, (2, 6)))


@pytest.mark.usefixtures("any_shape")
def test_wrong_input_is_refused():
    model = opened("llama")
    with pytest.raises(InputError, match="need a tokenizer"):
        winning_cases(model)
    with pytest.raises(InputError, match=r"answers have shape \[1\]; 2 rows need \[2\]"):
        winning_cases_in_text(model, torch.ones(2, 4, dtype=torch.long), answers=torch.tensor([1]))
    with pytest.raises(InputError, match="two tokens or more"):
        winning_cases_in_text(model, torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(InputError, match="two cases or more"):
        winning_cases_in_text(model, torch.ones(1, 2, dtype=torch.long))


def test_on_the_bundled_model_some_heads_win_successor_answers_more_than_other_answers():
    model = mh.open_model()
    steps = []
    cases = winning_cases(model, n=48, bar=Counting(steps))
    scores = cases.scores
    assert sum(steps) == len(cases.cases) == 48
    assert scores["winning_cases"].values.sum() <= 1 + 1e-9
    (best,) = scores["winning_cases"].top(1)
    assert scores["winning_cases"][best] > 2 / model.shape[0] / model.shape[1]
    assert scores["winning_cases"][best] > scores["shuffled"][best]
    won = cases.won_by(best)
    assert len(won) == round(48 * scores["winning_cases"][best]) and won["effect"].is_monotonic_decreasing
