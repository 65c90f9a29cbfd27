"""Causal head gating finds the heads that were set to help, to hinder and to do nothing, and its gates do what they say."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from architectures import DECODERS, VOCAB
from bars import Counting
from planted_gates import planted, prompts

import manyheads as mh
import manyheads.atlas.circuits.gating as gating_file
from manyheads.atlas.circuits.gating import (
    CLIP,
    CONTRASTIVE,
    FIRST,
    SECOND,
    Gate,
    contrastive_gating,
    gate_roles,
    gating,
)
from manyheads.errors import InputError, UnsupportedError


def stages(steps, rows, **first):
    short = {"steps": steps, "rows": rows}
    return {"first": replace(FIRST, **short, **first), "second": replace(SECOND, **short)}


SHORT = stages(40, 8)
PLANTED = {
    "say above, deny below": (dict(heads={(1, 2): ("say", 8.0), (0, 1): ("deny", 3.0)}, seed=0), "L1H2", "L0H1"),
    "grouped queries": (
        dict(heads={(0, 0): ("say", 8.0), (1, 3): ("deny", 3.0)}, seed=1, n_kv_heads=2),
        "L0H0",
        "L1H3",
    ),
}


@cache
def fitted(case, seed=0):
    settings, *_ = PLANTED[case]
    model = planted(**settings)
    return model, gating(model, prompts(64), fits=2, **SHORT, seed=seed)


@pytest.mark.parametrize("case", PLANTED)
def test_every_head_has_the_role_it_was_given(case):
    _, says, denies = PLANTED[case]
    model, scores = fitted(case)
    found = gate_roles(scores)
    assert found["facilitating"] == model.head_set([says])
    assert found["interfering"] == model.head_set([denies])
    assert found["irrelevant"] == model.heads - found["facilitating"] - found["interfering"]
    assert scores["facilitating"][says] > 0.9 and scores["interfering"][denies] > 0.8
    assert all(scores["irrelevant"][head] > 0.9 for head in found["irrelevant"])


def test_where_nothing_was_built_in_every_head_is_irrelevant():
    scores = gating(planted({}), prompts(32), fits=2, **SHORT)
    assert len(gate_roles(scores)["irrelevant"]) == 8


def test_the_same_seed_gives_the_same_gates_and_another_one_others():
    model, scores = fitted("grouped queries")
    again = gating(model, prompts(64), fits=2, **SHORT, seed=0)
    other = gating(model, prompts(64), fits=2, **SHORT, seed=1)
    for name in scores:
        assert np.array_equal(scores[name].values, again[name].values)
        assert not np.array_equal(scores[name].values, other[name].values)


def test_scores_say_what_they_are_of():
    model, scores = fitted("say above, deny below")
    one = scores["facilitating"]
    assert set(scores) == {"facilitating", "interfering", "irrelevant"}
    assert one.n == 2 and one.shape == model.shape and one.meta["fingerprint"] == model.fingerprint
    assert one.meta["settings"] | {"task": "given", "n": 64, "fits": 2} == one.meta["settings"]
    assert [one.meta["settings"][stage]["steps"] for stage in ("first", "second")] == [40, 40]
    assert one.meta["nll"]["G+"] < one.meta["nll"]["all heads"], "without the head that denies, the answer is likelier"
    assert (np.array(one.meta["least"]) <= one.values + 1e-4).all() and (one.values - 1e-4 <= one.meta["most"]).all()
    assert all(s.values.min() >= 0 and s.values.max() <= 1 for s in scores.values())
    assert np.allclose(one.stderr, np.abs(np.array(one.meta["most"]) - one.meta["least"]) / 2, atol=1e-4), "two fits"


@pytest.mark.parametrize("case", PLANTED)
def test_switching_a_head_off_at_its_gates_moves_the_answer_as_its_role_says(case):
    """The paper's validation: at G+, each head set to 0 against 1."""
    model, scores = fitted(case)
    batch = prompts(64, seed=9)
    up = torch.tensor(1 - scores["interfering"].values)

    def log_p(gates):
        with model.editing(Gate(model.heads, gates=gates)):
            return float(
                model.logits(batch.input_ids)[:, -1].log_softmax(-1).gather(-1, batch.answer_ids[:, None]).mean()
            )

    found = gate_roles(scores)
    for head in model.heads:
        on, off = up.clone(), up.clone()
        on[head], off[head] = 1.0, 0.0
        change = log_p(off) - log_p(on)
        if head in found["facilitating"]:
            assert change < -0.5
        elif head in found["interfering"]:
            assert change > 0.1
        else:
            assert abs(change) < 0.02


def test_a_gate_that_drifted_is_brought_back_before_the_second_stage():
    """A long first stage drives irrelevant gates beyond the clip, where nothing would push them any more."""
    model = planted(**PLANTED["say above, deny below"][0])
    long = stages(60, 8, rate=1.0, floor=1.0)
    found = gate_roles(gating(model, prompts(64), fits=2, **long))
    assert found["facilitating"] == model.head_set(["L1H2"]) and found["interfering"] == model.head_set(["L0H1"])
    assert CLIP == 4.0


def test_contrastive_gates_close_only_what_the_forgotten_task_needs():
    """One head answers words, another refuses at flags: forgetting either closes it and leaves the other open."""
    heads = {(1, 1): ("say", 12.0), (0, 2): ("watch", 12.0)}
    model = planted(heads, seed=3, comply=1.0)
    words, flags = prompts(64, words=3), prompts(64, words=3, flagged=1.0)
    settings = replace(CONTRASTIVE, steps=60, rows=8)
    for retain, forget, lost, kept in ((words, flags, "L0H2", "L1H1"), (flags, words, "L1H1", "L0H2")):
        scores = contrastive_gating(model, retain, forget, fits=2, settings=settings)
        assert scores.top(1) == model.head_set([lost]) and scores[lost] > 0.9
        assert scores[kept] < 0.1
        nll = scores.meta["nll"]
        assert nll["forget, gated"] > nll["forget, all heads"] + 1
        assert nll["retain, gated"] < nll["retain, all heads"] + 0.1


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "bloom"])
def test_gradients_of_gates_are_slopes_of_the_loss_on_any_architecture(name):
    torch.manual_seed(0)
    module = DECODERS[name]().eval().double()
    for weight in module.parameters():
        weight.data *= 4 if weight.ndim > 1 else 1  # as they are drawn, heads move next to nothing
    model = mh.open_model(module)
    ids = torch.randint(3, VOCAB, (2, 9))

    def loss(gates):
        with model.editing(Gate(model.heads, gates=gates)):
            return model.plain(ids, use_cache=False).logits[:, -1].log_softmax(-1)[:, 5].sum()

    gates = torch.full(model.shape, 0.5, dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(gates), gates)
    for head in [(0, 1), (2, 3)]:
        step = torch.zeros_like(gates)
        step[head] = 3e-3  # norms compute in single precision whatever the model's is
        with torch.no_grad():
            measured = (loss(gates + step) - loss(gates - step)) / 6e-3
        assert float((slope[head] - measured).abs()) <= 1e-3 * float(slope.abs().max())
    assert slope.abs().max() > 0.03


def test_gates_are_scales_by_head_by_row_where_asked_and_in_weights():
    torch.manual_seed(0)
    model = mh.open_model(DECODERS["llama"]().eval())
    ids, gates = torch.randint(3, VOCAB, (2, 9)), torch.rand(2, *model.shape)
    with model.editing(Gate(model.heads, gates=gates)):
        both = model.logits(ids)
    for row in range(2):
        edits = [mh.Scale([h], float(gates[row][h])) for h in model.heads]
        with model.editing(*edits):
            assert torch.allclose(model.logits(ids[row : row + 1]), both[row], atol=1e-5)
    with model.editing(Gate(["L1H2"], gates=np.zeros(model.shape), positions=[8], rows=[0])):
        some = model.logits(ids)
    with model.editing(mh.Ablate(["L1H2"], positions=[8], rows=[0])):
        assert torch.allclose(model.logits(ids), some, atol=1e-5)
    baked = model.bake(Gate(model.heads, gates=gates[0]))
    assert torch.allclose(baked.logits(ids[:1]), both[0], atol=1e-4)
    with pytest.raises(UnsupportedError, match="differ by row"):
        model.bake(Gate(model.heads, gates=gates))


def test_fitting_leaves_the_model_as_it_was():
    model = planted(**PLANTED["grouped queries"][0])
    ids, before = prompts(4).input_ids, model.fingerprint
    clean = model.logits(ids)
    next(iter(model.plain.parameters())).requires_grad_(False)
    wanted = [p.requires_grad for p in model.plain.parameters()]
    gating(model, prompts(16), fits=1, **stages(2, 2))
    assert [p.requires_grad for p in model.plain.parameters()] == wanted
    assert all(p.grad is None for p in model.plain.parameters())
    assert torch.equal(model.logits(ids), clean) and model.fingerprint == before


def test_progress_counts_the_steps_of_both_stages():
    steps = []
    gating(planted({}), prompts(8), fits=1, **stages(3, 2), bar=Counting(steps))
    assert sum(steps) == 6


def test_wrong_input_says_what_is_wrong():
    model = planted({})
    with pytest.raises(InputError, match="fits is 0"):
        gating(model, prompts(8), fits=0)
    with pytest.raises(InputError, match="pressure is 0"):
        gating(model, prompts(8), pressure=0.0)
    with pytest.raises(InputError, match="need a tokenizer"):
        gating(model, mh.tasks.IOI())
    with pytest.raises(InputError, match=r"\[L, H\] or \[B, L, H\]"):
        Gate(["L0H0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["successor", "ioi", "facts"])
def test_on_ladon_the_facilitating_heads_are_needed_and_enough_as_random_ones_are_not(name):
    """All of them, on prompts they were not fitted on: which of several gates near 1 is the largest says nothing."""
    model, task = mh.open_model(), mh.tasks.get_task(name)
    scores = gating(model, task, n=128, fits=2, **stages(50, 8))
    needed = gate_roles(scores)["facilitating"]
    assert len(needed) <= model.n_layers * model.n_heads / 2
    judge = mh.atlas.task_judge(model, task, n=48)
    for mode in ("zero", "mean"):
        check = mh.atlas.causal_check(model, "facilitating", needed, judge, mode)
        assert check.p_value <= 0.05 and check.effect > 0.5
        others = mh.atlas.causal_check(model, "others", model.heads - needed, judge, mode)
        assert others.effect < min(others.random_effects), "any other set as large costs more"
        assert others.effect < check.effect
    nll = scores["facilitating"].meta["nll"]
    assert nll["G+"] < nll["all heads"] + 0.1 and nll["G-"] < nll["all heads"] + 0.5


def test_gates_of_a_slow_model_are_fitted_in_the_time_given(monkeypatch):
    model = mh.open_model()
    batch = mh.tasks.encode(mh.tasks.Repeat(shortest=4, longest=6), model.tokenizer, 8, 0, "train")

    def fitting(seconds_a_row, minutes):
        clock = iter([0.0, 8 * seconds_a_row])
        monkeypatch.setattr(gating_file.time, "process_time", lambda: next(clock))
        one, two, fits = gating_file._fitting(model, batch, gating_file.FIRST, gating_file.SECOND, 4, minutes)
        return one.rows, one.steps, two.steps, fits

    assert fitting(100.0, None) == fitting(0.01, 15.0) == (16, 100, 100, 4)  # 300 steps of 4 fits of 16 rows: 192 s
    assert fitting(0.06, 15.0) == (12, 100, 100, 4)  # fewer rows: 864 s
    assert fitting(0.15, 15.0) == (8, 100, 100, 2)  # then fewer fits: 720 s
    assert fitting(0.3, 15.0) == (8, 62, 62, 2)  # then fewer steps
    assert fitting(100.0, 15.0) == (8, 40, 40, 2)
