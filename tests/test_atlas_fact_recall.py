"""Factual recall: planted movers, planted decompositions, planted dampers - and what a trained model shows of each."""

from dataclasses import replace

import numpy as np
import planted_facts
import pytest
import torch
from architectures import inputs_for, opened
from planted_arithmetic import FIRST_RESULT, HEAD_DIM, NULL, planted, problems

import manyheads as mh
from manyheads.atlas.core.answered import encoded
from manyheads.atlas.core.last_position import last_writes
from manyheads.atlas.facts.mlp_decomposition import decompose, mlp_decomposition
from manyheads.atlas.facts.overconfidence import _prompts, calibration_error, overconfidence
from manyheads.atlas.facts.recall import fact_recall, rank, topic_movers
from manyheads.errors import InputError, UnsupportedError
from manyheads.lab.constructed import constructed
from manyheads.progress import Bar
from manyheads.tasks import Counterfactual, Example, Facts

ARCHITECTURES = ["llama", "gpt2", "gemma2", "olmo2", "gpt_neox", "granite", "opt", "falcon", "bloom"]


# 1. Movers


def stories(made, n, seed=0):
    """`... KEY topic ... KEY` -> ` topic`; the twin has another word in the topic's place."""
    rng = np.random.default_rng(seed)
    ids = [i for i in range(len(made.tokenizer)) if i not in made.tokenizer.all_special_ids]
    words = made.tokenizer.convert_ids_to_tokens(ids)
    examples = []
    for _ in range(n):
        key, topic, other, *rest = (str(w) for w in rng.choice(words, size=30, replace=False))
        place = int(rng.integers(2, 24))
        before, after = " ".join(["<bos>", *rest[:place], key]) + " ", " " + " ".join([*rest[place:], key])
        span = {"subject": (len(before), len(before) + len(topic))}
        examples.append(Example(before + topic + after, " " + topic, None, before + other + after, " " + other, span))
    return examples


@pytest.mark.parametrize(("shape", "seed"), [("llama", 0), ("llama", 3), ("gpt2", 1)])
def test_exactly_the_planted_mover_is_found_and_it_alone_carries_the_topic(shape, seed):
    made = constructed(shape, seed=seed)
    model = mh.open_model(made.module, tokenizer=made.tokenizer)
    scores = fact_recall(model, task=stories(made, 24), n=24)
    assert scores["topic_effect"].n == 24
    assert topic_movers(scores) == made.known["induction"]
    (mover,) = made.known["induction"]
    assert scores["topic_effect"][mover] == pytest.approx(1.0, abs=0.1) and scores["topic_token"][mover] == 1.0
    assert scores["topic_margin"][mover] > 0.3
    others = model.heads - made.known["induction"]
    assert max(abs(scores["topic_effect"][h]) for h in others - made.known["previous_token"]) < 0.05


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_and_bias_sum_to_what_attention_writes_and_all_writes_to_the_stream(name):
    model, inputs = opened(name), inputs_for(name)
    writes = last_writes(model, inputs)
    resid = model.read_site(inputs, "resid")[:, :, -1]
    with model.editing(mh.Scale(model.heads, 0.0)):
        silent = last_writes(model, inputs)
    for layer, one in writes.items():
        assert (resid[layer] + one.attention + one.mlp - resid[layer + 1]).abs().max() <= 1e-4
        assert silent[layer].heads.abs().max() <= 1e-6
        if name not in ("gemma2", "olmo2"):  # a norm inside the branch has another denominator when all is silent
            assert (one.heads.sum(1) + silent[layer].attention - one.attention).abs().max() <= 1e-4
        else:
            assert (one.heads.sum(1) - one.attention).abs().max() <= 1e-4


def test_a_rank_counts_the_words_below_and_half_the_ties():
    logits = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    assert rank(logits, torch.tensor([0])).tolist() == [[1.0, 0.5]]
    assert rank(logits, torch.tensor([2])).tolist() == [[0.625, 0.5]]
    assert rank(logits, torch.tensor([4])).tolist() == [[0.0, 0.5]]


def test_the_topic_score_is_the_logit_lens_of_a_heads_write_by_hand():
    model = opened("llama")
    batch = random_facts("llama")
    scores = fact_recall(model, task=batch)
    z = model.read_z(batch.input_ids)[1, :, -1, 2]
    write = z @ model.plain.model.layers[1].self_attn.o_proj.weight[:, 16:24].T
    logits = (write * model.plain.model.norm.weight) @ model.plain.lm_head.weight.T
    own, rival = (
        [float((row < row[i]).sum()) / 60 for row, i in zip(logits, ids[:, 3], strict=True)]
        for ids in (batch.input_ids, batch.corrupted_ids)
    )
    assert scores["topic_token"].values[1, 2] == pytest.approx(np.mean(own), abs=1e-6)
    assert scores["topic_margin"].values[1, 2] == pytest.approx(np.mean(own) - np.mean(rival), abs=1e-6)


def random_facts(name, n=8):
    ids = inputs_for(name, batch=n)["input_ids"]
    twins = ids.clone()
    twins[:, 3] = 3 + (ids[:, 3] + 7) % 50
    answers = opened(name).logits(ids)[:, -1].argmax(-1)
    return replace(
        problems(n), input_ids=ids, attention_mask=torch.ones_like(ids), answer_ids=answers, corrupted_ids=twins,
        corrupted_mask=torch.ones_like(ids), spans={"subject": torch.tensor([[3, 4]] * n)},
        accepted_ids=[[int(i)] for i in answers],
    )  # fmt: skip


def test_a_task_without_twins_or_topic_is_refused_and_unanswered_prompts_do_not_count():
    model, batch = opened("llama"), random_facts("llama")
    with pytest.raises(InputError, match="need twins and a span named 'topic'"):
        fact_recall(model, task=batch, span="topic")
    with pytest.raises(InputError, match="no twins"):
        fact_recall(model, task=replace(batch, corrupted_ids=None))
    scores = fact_recall(model, task=replace(batch, accepted_ids=[[0]] * 8))
    assert all(one.n == 0 and not one.values.any() for one in scores.values())
    with pytest.raises(InputError, match="needs a tokenizer"):
        fact_recall(model)


@pytest.mark.parametrize(("task", "span"), [(Facts(), "subject"), (Counterfactual("context"), "context")])
def test_in_ladon_the_found_movers_matter_more_than_random_heads_of_their_layers(task, span):
    model = mh.open_model()
    scores = fact_recall(model, task=task, span=span, n=32)
    assert scores["topic_effect"].n >= 16
    found = scores["topic_effect"].top(5)
    check = mh.atlas.causal_check(model, "topic_effect", found, mh.atlas.task_judge(model, task, n=24), "mean")
    assert len(check.random_effects) >= 20
    assert check.effect > 0.3 and check.effect > check.random_mean + 2 * check.random_spread
    assert np.mean([scores["topic_margin"][h] for h in found]) > scores["topic_margin"].values.mean()


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_pipeline_is_recovered_step_by_step_from_the_model_alone(seed):
    """#75 whole: which head brings the subject, what the next MLP makes of the heads' writes, and what damps the answer."""
    model, batch = planted_facts.recalling_model(seed), planted_facts.recalled(seed=seed)
    scores = fact_recall(model, task=batch, seed=seed)
    mover = model.head_set([planted_facts.MOVER])
    assert scores["topic_effect"].n == 60 and topic_movers(scores) == mover
    assert scores["topic_effect"].above(0.01) == mover == scores["topic_margin"].above(0.2)
    found = mlp_decomposition(model, task=batch, n=60, seed=seed)
    wanted = [0, 0.8, -0.5, 0]
    assert np.abs(found.gains.values[1] - wanted).max() <= 0.05, "the mover is amplified, the relation's head erased"
    assert found.layers[1].r2 > found.layers[1].shuffled.max() + 0.3 and found.layers[1].r2 > 0.95
    assert found.answers[1] > 0.75 > 0.5 > found.prompt_words[1], "the intercept favours the objects, all alike"
    assert found.layers[2].r2 < 0.3, "the layer that looks up has no head to say it with"
    damped = overconfidence(model, task=batch, n=60, seed=seed)
    assert damped.damping == (planted_facts.DAMPER,) and damped.beta == 0.0
    assert damped.damped.nll < 0.6 * damped.as_is.nll < 0.7 * min(one.nll for one in damped.random)
    undamped = overconfidence(planted_facts.recalling_model(seed, damping=0.0), task=batch, n=60, seed=seed)
    assert planted_facts.DAMPER not in undamped.damping


# 2. Decomposition


def planted_writes(n=500, width=32, noise=0.1, extra=2, seed=0, shared=0.0):
    """`0.8 o_1 - 0.5 o_2 + c + noise`, besides `extra` heads that do not count; `shared` makes the heads collinear."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, width, generator=g)
    heads = torch.randn(n, 2 + extra, width, generator=g) + shared * common + torch.randn(2 + extra, width, generator=g)
    intercept = torch.randn(width, generator=g)
    target = 0.8 * heads[:, 0] - 0.5 * heads[:, 1] + intercept + noise * torch.randn(n, width, generator=g)
    return heads, target, intercept


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_decomposition_is_recovered_and_beats_shuffled_heads(seed):
    """#75: coefficients within 0.05, cosine of the intercept at least 0.98, held-out R2 0.3 above shuffled heads."""
    heads, target, intercept = planted_writes(seed=seed)
    found = decompose(heads, target, seed=seed)
    assert np.abs(found.weights - [0.8, -0.5, 0, 0]).max() <= 0.05
    assert torch.cosine_similarity(found.intercept, intercept.double(), dim=0) >= 0.98
    assert found.r2 >= found.shuffled.max() + 0.3 and found.r2 > 0.95
    assert found.p_value == 1 / 21 and found.condition < 3
    assert (np.abs(found.weights - [0.8, -0.5, 0, 0]) <= 4 * found.stderr + 0.002).all(), "off by ridge and error only"


def test_collinear_heads_show_in_the_condition_and_in_the_error():
    apart, together = (decompose(*planted_writes(shared=s)[:2]) for s in (0.0, 30.0))
    assert together.condition > 100 * apart.condition
    assert (together.stderr > apart.stderr).all()


def test_where_heads_explain_nothing_the_held_out_share_says_so():
    heads, target, _ = planted_writes(n=40, extra=10)
    found = decompose(heads, target[torch.randperm(40, generator=torch.Generator().manual_seed(1))])
    assert found.r2 < 0.05 and found.p_value > 0.05


@pytest.mark.usefixtures("any_shape")
def test_shapes_and_numbers_that_do_not_fit_are_told():
    heads, target, _ = planted_writes(n=6)
    with pytest.raises(InputError, match="at least four each"):
        decompose(heads, target)
    with pytest.raises(InputError, match=r"\[N, H, D\]"):
        decompose(heads, target[:, :3])


def test_a_models_own_mlps_are_decomposed_at_the_last_position():
    """By hand: the fit of one layer from tensors that `decompose` had no part in making."""
    model, batch = opened("llama"), random_facts("llama", n=24)
    found = mlp_decomposition(model, task=batch, seed=3)
    z = model.read_z(batch.input_ids)[2, :, -1]
    heads = torch.stack(
        [z[:, h] @ model.plain.model.layers[2].self_attn.o_proj.weight[:, 8 * h : 8 * h + 8].T for h in range(4)], 1
    )
    mlp = model.read_site(batch.input_ids, "mlp_write")[2, :, -1]
    again = decompose(heads.detach(), mlp, seed=3)
    assert np.abs(found.gains.values[2] - again.weights).max() <= 1e-4
    assert found.layers[2].r2 == pytest.approx(again.r2, abs=1e-4)
    assert list(found.to_frame().layer) == [0, 1, 2] and found.gains.n == 12


def test_in_ladon_heads_explain_little_and_the_last_intercept_points_where_the_mean_write_does():
    found = mlp_decomposition(mh.open_model(), task=Facts("capital"), n=48)
    assert max(one.r2 for one in found.layers) < 0.5
    assert found.answers[-1] > 0.8 > found.prompt_words[-1]
    assert found.mean_write[-1] > 0.8, "the intercept says no more than this"


# 3. Overconfidence


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "opt"])
def test_without_a_change_the_logits_are_the_models_own_and_with_one_those_of_the_changed_state(name):
    model, batch = opened(name), random_facts(name)
    prompts = _prompts(model, batch, 8, 0, Bar())
    assert (prompts.logits() - model.logits(batch.input_ids)[:, -1]).abs().max() <= 1e-5
    state, change = model.read_site(batch.input_ids, "resid")[-1, :, -1], prompts.writes["L2H1"]
    with torch.no_grad():
        by_hand = model.plain.lm_head(model.layout.final_norm(state - change))
    by_hand = by_hand / getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    by_hand = by_hand if cap is None else cap * torch.tanh(by_hand / cap)
    assert (prompts.damped(["L2H1"], 0.0) - by_hand).abs().max() <= 1e-4


def damped_model(strength):
    """The planted adder, whose last layer has one more head that speaks against every result alike."""
    made = planted(1)
    head = next(mh.Head(2, h) for h in range(6) if mh.Head(2, h) not in made.heads)
    module, row = made.module, head.index * HEAD_DIM
    attention = module.transformer.h[2].attn
    with torch.no_grad():
        module.lm_head.weight *= 0.35
        results = torch.nn.functional.normalize(module.lm_head.weight[FIRST_RESULT:], dim=-1)
        attention.c_attn.bias[2 * 120 + row] = 1.0
        attention.c_proj.weight[row] = -strength * results.sum(0)
    return mh.open_model(module), head


def test_a_planted_damper_is_found_and_removing_it_calibrates_the_answers():
    """The head takes from every answer alike: accuracy stays 1, confidence is restored, and random writes do nothing of it."""
    model, head = damped_model(0.5)
    found = overconfidence(model, task=problems(120))
    assert found.damping == (str(head),) and found.change[str(head)] > 10 * found.stderr[str(head)] > 0
    assert found.beta == 0.0 and found.as_is.accuracy == found.damped.accuracy == 1.0
    assert found.damped.calibration_error < 0.5 * found.as_is.calibration_error
    assert found.damped.nll < min(one.nll for one in found.random)
    assert found.tempered.nll < found.damped.nll, "where every answer is right, a temperature does it for less"
    assert found.n_fit == found.n_held_out == 60
    assert [*found.to_frame().treatment][-1] == "random writes"


def test_damping_that_was_right_is_kept():
    """Answers that are wrong half of the time should not be said more loudly: beta stays at one."""
    model, head = damped_model(0.5)
    batch = problems(120)
    wrong = torch.arange(120) % 2 == 1
    answers = torch.where(wrong, torch.full_like(batch.answer_ids, NULL), batch.answer_ids)
    found = overconfidence(
        model, task=replace(batch, answer_ids=answers, accepted_ids=[[int(i)] for i in answers]), n=120
    )
    assert found.damping == (str(head),) and found.beta == 1.0 and found.damped == found.as_is


def test_calibration_error_is_zero_where_confidence_is_accuracy_and_one_where_it_is_the_opposite():
    sure = torch.ones(8, dtype=torch.double)
    assert calibration_error(0.75 * sure, torch.tensor([1.0, 1, 1, 0] * 2).double()) == 0
    assert calibration_error(sure, 0 * sure) == 1
    mixed = torch.tensor([0.15] * 4 + [0.95] * 4).double()
    assert calibration_error(mixed, (mixed > 0.5).double()) == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)


def test_few_prompts_and_norms_after_the_additions_are_refused():
    with pytest.raises(InputError, match="at least eight"):
        overconfidence(opened("llama"), task=random_facts("llama", n=4))
    with pytest.raises(UnsupportedError, match="after each addition"):
        last_writes(opened("bert"), inputs_for("bert"))


def test_in_ladon_the_writes_and_what_damping_is_worth_are_told_for_the_held_out_half():
    model = mh.open_model()
    found = overconfidence(model, n=48)
    total = len(encoded(model, Facts(), 48, 0))
    assert len(found.change) == model.n_heads + 1 and found.n_fit + found.n_held_out == total
    assert 0 <= found.beta <= 1 and (found.damping or found.beta == 1.0)
    assert found.change[f"MLP {model.n_layers - 1}"] < 0, "the last MLP says facts"
