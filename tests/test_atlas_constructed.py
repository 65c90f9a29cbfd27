"""Every detector finds exactly the heads that were built in, and nothing where nothing was."""

from functools import cache

import numpy as np
import pytest
import torch

import manyheads as mh
from manyheads.atlas.successor_heads.scores import successor_of_set
from manyheads.errors import InputError
from manyheads.lab.constructed import ALL_KINDS, constructed
from manyheads.tasks import Example, repeated_tokens

BEHAVIOURS = ("previous_token", "duplicate_token", "induction", "copying", "successor")
CASES = {
    "llama": dict(shape="llama", seed=0),
    "llama-elsewhere": dict(shape="llama", seed=3, noise=0.05),
    "llama-grouped": dict(shape="llama", seed=2, n_heads=8, n_kv_heads=4),
    "gpt2": dict(shape="gpt2", seed=1),
    "gpt2-elsewhere": dict(shape="gpt2", seed=4),
}


@cache
def built(case):
    model = constructed(**CASES[case])
    return model, mh.open_model(model.module, tokenizer=model.tokenizer)


def score(behaviour, model):
    settings = {} if behaviour in ("copying", "successor") else {"n": 6, "length": 24}
    return getattr(mh.atlas, behaviour)(model, **settings)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("case", CASES)
def test_the_found_heads_are_the_known_heads(case, behaviour):
    made, model = built(case)
    scores = score(behaviour, model)
    assert scores.above(mh.atlas.behaviours()[behaviour].about.threshold) == made.known[behaviour]
    others = [scores[h] for h in model.heads - made.known[behaviour]]
    assert min(scores[h] for h in made.known[behaviour]) > 0.8 and max(others) < 0.3


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_nothing_is_found_where_nothing_was_built_in(shape, behaviour):
    others = [kind for kind in ALL_KINDS if kind not in (behaviour, "retrieval" if behaviour == "copying" else "")]
    made = constructed(shape, seed=5, plant=others)
    model = mh.open_model(made.module, tokenizer=made.tokenizer)
    assert not made.known[behaviour]
    assert not score(behaviour, model).above(0.4)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_an_anti_copying_head_scores_minus_one(case):
    made, model = built(case)
    for embed in ("embed", "mlp", "sum"):
        scores = mh.atlas.copying(model, embed=embed)
        assert all(scores[h] < -0.8 for h in made.known["anti_copying"])
        assert all(scores[h] > 0.8 for h in made.known["copying"])


def test_the_scores_are_their_formulas_on_the_architectures_own_patterns():
    """Against `output_attentions`, which no code of ours has a part in."""
    made, model = built("llama-grouped")
    n, period = 6, 24
    rows = repeated_tokens([i for i in range(256) if i not in made.tokenizer.all_special_ids], n, period, seed=7)
    rows = torch.cat([torch.full((n, 1), made.tokenizer.bos_token_id), rows], 1)
    module = made.module
    module.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = torch.stack(module(rows, output_attentions=True).attentions).double()  # [L, N, H, T, T]
    module.set_attn_implementation("sdpa")
    t = torch.arange(1, 2 * period + 1)
    second = t[t > period]
    for behaviour, queries, offset in (
        ("previous_token", t, 1),
        ("duplicate_token", second, period),
        ("induction", second, period - 1),
    ):
        per_row = patterns[..., queries, queries - offset].mean(-1).transpose(0, 1).numpy()
        scores = getattr(mh.atlas, behaviour)(model, n=n, length=period, seed=7)
        assert np.abs(scores.values - per_row.mean(0)).max() <= 1e-5
        assert np.abs(scores.stderr - per_row.std(0, ddof=1) / n**0.5).max() <= 1e-5
        assert scores.n == n


def needle_examples(made, n, words=3, hay=100, seed=0):
    """`... KEY a b c ... KEY` -> ` a`, then ` b c`: different words throughout."""
    rng = np.random.default_rng(seed)
    ids = [i for i in range(len(made.tokenizer)) if i not in made.tokenizer.all_special_ids]
    vocabulary = made.tokenizer.convert_ids_to_tokens(ids)
    examples = []
    for _ in range(n):
        drawn = [str(w) for w in rng.choice(vocabulary, size=hay + words + 1, replace=False)]
        key, needle, rest = drawn[0], drawn[1 : words + 1], drawn[words + 1 :]
        place = int(rng.integers(1, hay - 1))
        before = " ".join([*rest[:place], key]) + " "
        body = before + " ".join([*needle, *rest[place:]])
        spans = {"needle": (len(before), len(before) + len(" ".join(needle)))}
        more = "".join(" " + w for w in needle[1:])
        examples.append(Example(body + " " + key, " " + needle[0], spans=spans, continuation=more))
    return examples


def with_bos(made, examples):
    """The constructed tokenizer adds no <bos> by itself."""
    bos = made.tokenizer.bos_token + " "
    return [
        Example(bos + e.prompt, e.answer, spans={k: (a + len(bos), b + len(bos)) for k, (a, b) in e.spans.items()})
        for e in examples
    ]


@pytest.mark.parametrize("case", ["llama", "gpt2", "llama-grouped"])
def test_retrieval_finds_the_planted_head_and_masking_it_gives_chance(case):
    """#11 (a): the planted head scores 1.00, all others at most 0.05; masking it, not another, loses the needle."""
    made, model = built(case)
    examples = with_bos(made, needle_examples(made, 24))
    scores = mh.atlas.retrieval(model, task=examples, n=24)
    assert scores.meta["answered"] == scores.n == 24
    assert scores.above(0.1) == made.known["retrieval"]
    assert all(scores[h] == 1.0 for h in made.known["retrieval"])
    assert max(scores[h] for h in model.heads - made.known["retrieval"]) <= 0.05

    batch = mh.tasks.encode(examples, model.tokenizer, 24)
    inputs = batch.inputs

    def accuracy(heads):
        with model.editing(mh.Ablate(heads, "uniform")):
            return mh.tasks.accuracy(model.logits(inputs)[:, -1], batch)

    assert accuracy([]) == 1.0
    assert accuracy(made.known["retrieval"]) <= 0.1
    (head,) = made.known["retrieval"]
    for other in [
        h for h in model.heads if h.layer == head.layer and h != head and h not in made.known["previous_token"]
    ]:
        assert accuracy([other]) >= 0.99


def test_without_a_needle_every_retrieval_score_is_exactly_zero():
    """#11 (c)."""
    made, model = built("llama")
    examples = [Example(e.prompt, e.answer) for e in with_bos(made, needle_examples(made, 6))]
    scores = mh.atlas.retrieval(model, task=examples, n=6)
    assert np.array_equal(scores.values, np.zeros(model.shape))


def test_a_model_that_answers_nothing_has_no_retrieval_heads():
    made = constructed("llama", seed=0, plant=["previous_token", "duplicate_token"])
    model = mh.open_model(made.module, tokenizer=made.tokenizer)
    scores = mh.atlas.retrieval(model, task=with_bos(made, needle_examples(made, 6)), n=6)
    assert scores.meta["answered"] == 0 and scores.n == 0 and not scores.values.any()


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_successor_scores_are_one_for_the_planted_head_whatever_stands_for_the_token(case):
    """#4 (a): the planted OV circuit scores 1.00, random heads below 0.30; given as classes or found by the tokenizer."""
    made, model = built(case)
    by_classes = mh.atlas.successor(model, classes=made.classes)
    assert [by_classes[h] for h in made.known["successor"]] == [1.0]
    assert max(by_classes[h] for h in model.heads - made.known["successor"]) < 0.3
    assert by_classes.n == sum(len(ids) - 1 for ids in made.classes.values())
    assert successor_of_set(model, made.known["successor"], classes=made.classes) == 1.0
    summed = mh.atlas.successor(model, classes=made.classes, embed="sum")
    assert [summed[h] for h in made.known["successor"]] == [1.0]
    plain = mh.atlas.successor(model, classes=made.classes, embed="embed")
    assert all(plain[h] < 0.5 for h in made.known["successor"]), "the first MLP is part of the circuit"


def test_successor_without_ordinals_says_so():
    _, model = built("llama")
    with pytest.raises(InputError, match="need a tokenizer or classes="):
        mh.atlas.successor(mh.open_model(model.module))
    with pytest.raises(InputError, match="two tokens or more"):
        mh.atlas.successor(model, classes={"one": [3]})


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_ablating_found_heads_hurts_their_task_and_ablating_others_does_not(case):
    made, model = built(case)
    judge = mh.atlas.repeats_judge(model, n=6, length=16)
    for behaviour in ("induction", "previous_token"):
        for mode in ("zero", "mean", "uniform"):
            check = mh.atlas.causal_check(model, behaviour, made.known[behaviour], judge, mode)
            assert check.effect > 3 and max(np.abs(check.random_effects)) < 0.1
            assert check.p_value == 1 / (1 + len(check.random_effects))
    innocent = mh.atlas.causal_check(model, "duplicate_token", made.known["duplicate_token"], judge)
    assert abs(innocent.effect) < 0.1 and innocent.p_value > 0.2


def test_a_check_counts_every_random_set_once_and_never_the_found_one():
    _, model = built("llama-grouped")
    judge = mh.atlas.repeats_judge(model, n=2, length=8)
    one = mh.atlas.causal_check(model, "x", model.head_set(["L0H0"]), judge, n_random=300)
    assert len(one.random_effects) == 7  # the layer's other heads
    whole = mh.atlas.causal_check(model, "x", model.head_set([(0, h) for h in range(8)]), judge)
    assert whole.random_effects == () and whole.p_value == 1.0
    with pytest.raises(InputError, match="at least 20 random sets"):
        mh.atlas.causal_check(model, "x", model.head_set(["L0H0"]), judge, n_random=5)
