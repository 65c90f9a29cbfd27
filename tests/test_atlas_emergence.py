"""Emergent heads (#21): planted ones are found, none is found where nothing changed, and chance is not called emergence."""

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from bars import Counting
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.circuits.emergence import (
    CircuitTrace,
    emergence,
    emergence_of_scores,
    emergence_series,
    scaling_check,
    trace_circuit,
)
from manyheads.atlas.core.causal import causal_check
from manyheads.atlas.core.judges import repeats_judge, task_judge
from manyheads.errors import InputError
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.lab.constructed import constructed
from manyheads.lab.words import FILLERS
from manyheads.model.replay.edges import name_of, receivers, senders
from manyheads.model.replay.patching import Mlp, Receiver
from manyheads.tasks import Example, Repeat

NOUNS = [word for word in FILLERS if word.isalpha() and word.islower()]
N = 12


def moved(n=N, seed=0, length=10):
    """A list and one of its words again. In the twin that word stood elsewhere: both heads of induction see something else."""
    rng, examples = random.Random(seed), []
    for _ in range(n):
        words = rng.sample(NOUNS, length)
        k, j = rng.sample(range(length - 1), 2)
        twin = list(words)
        twin[k], twin[j] = words[j], words[k]
        prompt, corrupted = (" ".join([*some, words[k]]) for some in (words, twin))
        examples.append(Example(prompt, " " + words[k + 1], corrupted=corrupted, corrupted_answer=" " + twin[j + 1]))
    return examples


def swapped(n=N, seed=0, length=10):
    """The same, but in the twin another word followed: where to look is the same, only what stands there is not."""
    rng, examples = random.Random(seed), []
    for _ in range(n):
        *words, new = rng.sample(NOUNS, length + 1)
        k = rng.randrange(length - 1)
        twin = [*words[: k + 1], new, *words[k + 2 :]]
        prompt, corrupted = (" ".join([*some, words[k]]) for some in (words, twin))
        examples.append(Example(prompt, " " + words[k + 1], corrupted=corrupted, corrupted_answer=" " + new))
    return examples


@cache
def planted(seed, shape="llama"):
    """A model with an induction head, and the same one before it had it."""
    made = constructed(shape, seed=seed)
    post = mh.open_model(made.module, tokenizer=made.tokenizer)
    return post.bake(mh.Ablate(made.known["induction"], "zero")), post, made.known


@cache
def traces(seed, twin, shape="llama", steps=5):
    examples = {"moved": moved, "swapped": swapped}[twin](seed=seed)
    base, post, _ = planted(seed, shape)
    return tuple(trace_circuit(model, examples, n=N, steps=steps, batch=N) for model in (base, post))


def jaccard(a, b):
    return len(a & b) / len(a | b)


TWINS = {
    "moved": ("previous_token", "induction"),
    "swapped": ("induction",),
}  # the planted heads that see the difference


def truth(seed, twin, shape="llama"):
    known = planted(seed, shape)[2]
    return HeadSet([head for kind in TWINS[twin] for head in known[kind]])


def test_planted_heads_emerge():
    """#21: mean Jaccard at least 0.6 with what was planted, all of which is found, and no worse than differencing once."""
    cases = [(seed, twin) for seed in range(2) for twin in TWINS]
    results = [emergence(*traces(*case), n_boot=100) for case in cases]
    for case, result in zip(cases, results, strict=True):
        assert truth(*case) <= result.emergent
        assert planted(case[0])[2]["induction"] <= result.strengthened()
        assert not result.vanished
    found = np.mean([jaccard(result.emergent, truth(*case)) for case, result in zip(cases, results, strict=True)])
    plain = np.mean([jaccard(result.differenced, truth(*case)) for case, result in zip(cases, results, strict=True)])
    assert found >= 0.6 and found >= plain


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_planted_heads_emerge_whatever_the_seed_and_the_twin(shape):
    """Of the default 5 steps, on seeds that settled nothing; single cases reach only 1/2, by one copying head too many."""
    for twin in TWINS:
        found = [
            jaccard(emergence(*traces(s, twin, shape), n_boot=100).emergent, truth(s, twin, shape))
            for s in range(4, 10)
        ]
        print(f"{shape}, {twin}: Jaccard {np.mean(found):.2f}, {[round(value, 2) for value in found]}")
        assert np.mean(found) >= 0.6


def test_a_head_that_did_not_change_can_emerge():
    """Why a Jaccard of 1 is out of reach: the copying head is the same in both, and its writes come to matter in one."""
    known, found = planted(0)[2], emergence(*traces(0, "swapped"), n_boot=100)
    assert found.differenced - truth(0, "swapped") == known["copying"] - known["induction"]


def test_shares_of_a_circuit_that_is_not_there_say_nothing():
    """The previous-token head has a third of the base's edges, which together are nothing: only nats tell it emerged."""
    base, post = traces(0, "moved")
    head = next(iter(planted(0)[2]["previous_token"]))
    found = emergence(base, post, n_boot=100)
    assert base.magnitudes.mean(0).max() < 0.1 and found.before[head] > 0.2
    assert head in found.emergent and head not in found.strengthened()


def test_without_integration_nothing_emerges():
    """The divergence is flat at the clean run, so plain EAP sees no circuit in the model that has one."""
    base, post = traces(0, "moved", steps=1)
    assert not post.circuit().heads and not emergence(base, post, n_boot=20).emergent


def test_what_emerged_one_way_vanished_the_other_way():
    base, post = traces(0, "moved")
    there, back = emergence(base, post, n_boot=50), emergence(post, base, n_boot=50)
    assert there.emergent == back.vanished and there.vanished == back.emergent
    assert np.allclose(there.change, -back.change)


def test_identical_checkpoints_give_empty_sets():
    """#21: also where the second is a copy with the same weights."""
    _, post, _ = planted(0)
    again = trace_circuit(post.bake(mh.Scale([], 1.0)), moved(), n=N, batch=N)
    result = emergence(traces(0, "moved")[1], again, n_boot=50)
    assert not result.emergent and not result.vanished and not result.differenced and not result.strengthened()
    assert (result.change == 0).all() and result.kept
    assert set(result.to_frame()["call"]) <= {"kept", ""}


def test_two_halves_of_the_examples_of_one_model_call_fewer_heads_than_differencing_once():
    """The null that resampling is for: edges near the threshold, other examples, no change at all."""
    rng, plain, called = np.random.default_rng(0), 0, 0
    model = planted(0)[1]
    for _ in range(10):
        level = np.exp(rng.normal(-2.3, 0.5, (1, len(senders(model)), len(receivers(model)))))
        base, post = (synthetic(model, level * rng.exponential(1.0, (N, *level.shape[1:]))) for _ in range(2))
        result = emergence(base, post, top=120, n_boot=60)
        plain += len(result.differenced)
        called += len(result.emergent)
    assert plain >= 10
    assert called <= plain / 4


def synthetic(model, magnitudes):
    return CircuitTrace(model.shape, senders(model), receivers(model), magnitudes)


def test_a_circuit_keeps_only_what_lies_between_embedding_and_logits():
    model = planted(0)[1]
    path = [
        ("embedding", Receiver(Head(0, 1), "value")),
        (Head(0, 1), Receiver(Head(2, 3), "query")),
        (Head(2, 3), Mlp(2)),
        (Mlp(2), "logits"),
    ]
    loose = [
        ("embedding", Receiver(Head(1, 0), "key")),  # leads nowhere
        (Head(1, 1), "logits"),  # comes from nowhere
        (Head(1, 2), Receiver(Head(3, 0), "query")),  # both
    ]
    who, ends = senders(model), receivers(model)
    magnitudes = np.zeros((2, len(who), len(ends)))
    for strength, (u, v) in enumerate([*loose, *path], start=1):
        magnitudes[:, who.index(u), ends.index(v)] = strength
    trace = synthetic(model, magnitudes)
    circuit = trace.circuit()
    assert circuit.heads == HeadSet(["L0H1", "L2H3"])
    assert circuit.edges == tuple(reversed(path))  # strongest first
    assert not trace.circuit(top=3).edges and not trace.circuit(threshold=5).heads
    assert trace.circuit(top=4).edges == circuit.edges
    assert list(trace.to_frame()["sender"])[:2] == [name_of(Mlp(2)), "L2H3"]


def test_importances_are_shares():
    scores = traces(0, "moved")[1].importance()
    assert scores.values.sum() == pytest.approx(1.0) and (scores.values >= 0).all()
    assert scores.n == N and scores.meta["settings"]["task"] == "given"
    assert scores.top(2) == HeadSet([*planted(0)[2]["previous_token"], *planted(0)[2]["induction"]])


def test_a_series_is_every_checkpoint_against_the_first():
    base, post = traces(0, "moved")
    frame = emergence_series({"first": base, "same": base, "last": post}, n_boot=50)
    by = frame[frame["call"] == "emergent"].groupby("checkpoint")["head"].apply(list)
    assert list(by.index) == ["last"]
    assert HeadSet(by["last"]) == emergence(base, post, n_boot=50).emergent
    assert len(frame) == 2 * 16


def test_scores_of_two_checkpoints_are_compared_with_their_standard_errors():
    def scores(values, name="induction"):
        return HeadScores(name, np.array([values]), np.full((1, 4), 0.05), 20)

    base, post = scores([0.1, 0.9, 0.49, 0.3]), scores([0.9, 0.1, 0.51, 0.4])
    result = emergence_of_scores(base, post, 0.5)
    assert result.emergent == HeadSet(["L0H0"]) and result.vanished == HeadSet(["L0H1"])
    assert result.differenced == HeadSet(["L0H0", "L0H2"])  # the third crossed by less than its error
    assert result.appeared[0, 2] == pytest.approx(0.5793 * 0.5793, abs=1e-3)
    assert result.strengthened() == HeadSet(["L0H0"])
    assert not emergence_of_scores(base, base, 0.5).emergent
    alone = [replace(one, stderr=np.full_like(one.stderr, np.nan)) for one in (base, post)]
    assert not emergence_of_scores(*alone, 0.5).emergent, "single examples are not sure of anything"
    with pytest.raises(InputError, match="one score of one architecture"):
        emergence_of_scores(base, scores([0, 0, 0, 0], "copying"), 0.5)


def test_scaling_by_zero_is_the_zero_ablation_of_the_causal_check():
    model = mh.open_model()
    judge = task_judge(model, Repeat(shortest=4, longest=8), n=8)
    heads = HeadSet(["L1H2", "L2H5"], model.shape)
    one, other = scaling_check(model, heads, judge), causal_check(model, "emergent", heads, judge)
    assert one.effect == pytest.approx(other.effect, abs=1e-4)
    assert one.random_effects == pytest.approx(other.random_effects, abs=1e-4)
    assert one.p_value == other.p_value
    same = scaling_check(model, heads, judge, 1.0)
    assert same.effect == pytest.approx(0.0, abs=1e-5) and same.p_value == 1.0


def test_heads_that_emerged_in_ladon_matter_more_than_random_ones():
    model, task = mh.open_model(), Repeat(shortest=4, longest=8)
    torch.manual_seed(0)
    untrained = mh.open_model(LlamaForCausalLM(model.config).eval(), tokenizer=model.tokenizer)
    done = []
    post = trace_circuit(model, task, n=12, steps=2, batch=6, bar=Counting(done))
    base = trace_circuit(untrained, task, n=12, steps=2, batch=6)
    assert done == [6, 6]
    result = emergence(base, post, n_boot=100)
    assert not base.circuit().heads and result.emergent and not result.vanished
    check = scaling_check(model, result.emergent, task_judge(model, task, n=16), n_random=20)
    assert check.effect > check.random_mean + check.random_spread


def test_what_does_not_fit_is_refused():
    base, post = traces(0, "moved")
    model = planted(0)[1]
    with pytest.raises(InputError, match="as many examples"):
        emergence(base, synthetic(model, post.magnitudes[:-1]))
    with pytest.raises(InputError, match="n_boot=1"):
        emergence(base, post, n_boot=1)
    with pytest.raises(InputError, match="two checkpoints"):
        emergence_series({"only": base})
    with pytest.raises(InputError, match="no corrupted twin"):
        trace_circuit(model, [Example("cup lamp cup", " lamp")])
    with pytest.raises(InputError, match="needs a tokenizer"):
        trace_circuit(mh.open_model(model.plain), Repeat())
    judge = repeats_judge(model, n=2, length=4)
    with pytest.raises(InputError, match="at least 20"):
        scaling_check(model, HeadSet(["L0H0"]), judge, n_random=5)
    with pytest.raises(InputError, match="nothing emerged"):
        scaling_check(model, HeadSet([]), judge)
