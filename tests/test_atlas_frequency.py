"""#8: counts of subject and stated answer, and which answer wins: planted slopes come back, and none where there is none."""

import numpy as np
import planted_conflict as planting
import pytest
import torch

import manyheads as mh
from manyheads.atlas.facts.frequency import frequency_effects, name_counts, prompt_names
from manyheads.atlas.facts.memory_context import conflicts
from manyheads.errors import InputError
from manyheads.heads import Head
from manyheads.tasks import Counterfactual

FACTS = planting.FACTS


def names_of(prompts):
    """Subject and stated city of each planted prompt, by number."""
    return {
        "subject": [f"s{i}" for i in prompts.batch.input_ids[:, 0].tolist()],
        "stated": [f"c{i}" for i in (prompts.batch.answer_ids - FACTS).tolist()],
    }


def counts_of(seed):
    """Counts of 40 subjects and 40 cities from 9 to 9999, in random order; and their logarithms."""
    rng = np.random.default_rng(seed)
    logs = {kind: rng.permutation(np.linspace(1, 4, FACTS)) for kind in "sc"}
    counts = {f"{kind}{i}": round(10**x - 1) for kind in "sc" for i, x in enumerate(logs[kind])}
    return counts, {kind: torch.tensor(values, dtype=torch.float32) for kind, values in logs.items()}


def test_planted_slopes_are_found_with_their_signs():
    """The memory head writes 2 + .7 log10(count of the subject), the context head 5 - .4 log10(count of the stated city)."""
    counts, logs = counts_of(0)
    places = {"memory": [Head(0, 2)], "context": [Head(0, 0)]}
    model = planting.planted(2 + 0.7 * logs["s"], 5 - 0.4 * logs["c"], places, (1, 4)).model
    prompts = planting.planted_conflicts(model, every=3)
    found = frequency_effects(model, prompts, counts, names=names_of(prompts), n_random=199)
    assert found.slopes["subject"] == pytest.approx(-0.7, abs=0.02)
    assert found.slopes["stated"] == pytest.approx(-0.4, abs=0.02)
    assert max(found.p_values.values()) == pytest.approx(1 / 200)
    for kind in ("subject", "stated"):
        (rare_context, rare_memory), (often_context, often_memory) = found.rates[kind]
        assert rare_context > often_context and rare_memory < often_memory


def test_where_counts_do_not_matter_no_slope_is_sure():
    """Gains that have nothing to do with the counts: over 20 deals of counts, p is small about as often as it should be."""
    generator = torch.Generator().manual_seed(3)
    gm, gc = torch.randn(2, FACTS, generator=generator) + 3
    model = planting.planted(gm, gc, {"memory": [Head(0, 2)], "context": [Head(0, 0)]}, (1, 4)).model
    prompts = planting.planted_conflicts(model, every=7)
    p = [
        p
        for seed in range(20)
        for p in frequency_effects(
            model, prompts, counts_of(seed)[0], names=names_of(prompts), n_random=39, seed=seed
        ).p_values.values()
    ]
    assert np.mean(np.array(p) <= 0.05) <= 0.15 and 0.3 < np.mean(p) < 0.7


def test_names_are_counted_as_whole_words_and_the_longer_name_first():
    text = "New Zealand is far from Zealand. Franceville is not in France, France's neighbour."
    counts = name_counts([text, "France"], ["France", "Zealand", "New Zealand", "Peru"])
    assert counts == {"New Zealand": 1, "Zealand": 1, "France": 3, "Peru": 0}


def test_ladons_prompts_name_their_subject_and_their_stated_answer():
    model = mh.open_model()
    prompts = conflicts(model, Counterfactual(form="bare", relation="capital"), n=24)
    names = prompt_names(prompts)
    for example, subject, stated in zip(prompts.batch.examples, names["subject"], names["stated"], strict=True):
        assert example.prompt.startswith(f"The capital of {subject} is {stated}.")
    counts = {name: i for i, name in enumerate(sorted({*names["subject"], *names["stated"]}))}
    found = frequency_effects(model, prompts, counts, n_random=19)
    answered = np.concatenate([found.rates["subject"], found.rates["stated"]])
    assert found.n == len(prompts) and (answered.sum(1) <= 1 + 1e-9).all()


def test_wrong_input_is_told_what_to_do():
    counts, logs = counts_of(0)
    model = planting.planted(logs["s"], logs["c"], {"memory": [Head(0, 2)], "context": [Head(0, 0)]}, (1, 4)).model
    prompts = planting.planted_conflicts(model, every=39)
    names = names_of(prompts)
    with pytest.raises(InputError, match="no count of s"):
        frequency_effects(model, prompts, {}, names=names)
    with pytest.raises(InputError, match="as often"):
        frequency_effects(model, prompts, dict.fromkeys(counts, 7), names=names)
    with pytest.raises(InputError, match="query"):
        frequency_effects(model, prompts, counts)
    with pytest.raises(InputError, match="no names"):
        name_counts(["text"], [])


@pytest.mark.slow
def test_a_toy_follows_its_memory_more_about_subjects_that_it_was_asked_about_more():
    """#8: facts in the training text as often as 1 / rank, no conflict among them; six seeds of 300 steps."""
    found = []
    for seed in range(6):
        model = planting.toy(seed, planting.counted_lesson, 300)
        asked = (planting.shares(seed) * 300 * 96).round().int().tolist()  # 96 questions about facts a step
        counts = {f"s{i}": n for i, n in enumerate(asked)} | {
            f"c{i}": n + 300 * 96 // FACTS for i, n in enumerate(asked)
        }
        prompts = planting.toy_conflicts(model, "all")
        found.append(frequency_effects(model, prompts, counts, names=names_of(prompts), n_random=199))
    slopes, p = ([getattr(one, name)["subject"] for one in found] for name in ("slopes", "p_values"))
    memory = [one.rates["subject"][:, 1] for one in found]
    print(np.round(slopes, 1), np.round(p, 3), np.round(memory, 2).tolist())
    assert max(slopes) < 0 and np.mean(np.array(p) <= 0.05) >= 0.6
    assert all(often > rare for rare, often in memory)
