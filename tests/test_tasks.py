"""The task families: spans, splits, twins, seeds."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads import tasks
from manyheads.errors import InputError
from manyheads.tasks import lexicon
from manyheads.tasks.base import fill_in
from manyheads.tasks.families import facts, successor

FAMILIES = sorted(tasks.TASKS)
SPLITS = ("train", "test")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_examples_are_well_formed(name, split):
    for example in tasks.get_task(name).examples(200, seed=3, split=split):
        assert example.prompt == example.prompt.rstrip()
        assert example.answer != example.foil
        assert example.answer.startswith(" ") or name == "greater_than"
        assert example.corrupted != example.prompt
        assert example.corrupted_answer not in (None, example.answer) or name in ("arithmetic", "by_example")
        for start, end in example.spans.values():
            assert 0 <= start < end <= len(example.prompt)
            assert example.prompt[start:end].strip() == example.prompt[start:end]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_same_seed_gives_the_same_examples(name, seed):
    task = tasks.get_task(name)
    assert task.examples(5, seed) == task.examples(5, seed)
    assert task.examples(5, seed)[:2] == task.examples(2, seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_seed_gives_other_examples(name):
    task = tasks.get_task(name)
    assert task.examples(20, 0) != task.examples(20, 1)


def _contents(name, split):
    """What the family holds out, read back from its examples."""
    found = set()
    for example in tasks.get_task(name).examples(1500, seed=1, split=split):
        at = {key: example.prompt[start:end] for key, (start, end) in example.spans.items()}
        words = set(example.prompt.replace(".", " ").replace(",", " ").replace("?", " ").split())
        match name:
            case "repeat":
                found |= words - {"List:"}
            case "needle":
                found |= words & {*lexicon.NAMES}
                found.add(at["needle"])
            case "ioi":
                found |= words & {*lexicon.NAMES}
            case "coloured_objects":
                found.add(at["object"])
            case "docstring":
                found |= {at[key] for key in ("A_def", "B_def", "C_def", "D_def")}
            case "facts":
                found.add(example.prompt)
            case "successor":
                opening = next((lead for lead in successor.LEADS[1:] if example.prompt.startswith(lead)), "")
                found.add((opening, example.prompt[example.spans["last"][1] :], example.answer))
            case "counterfactual":
                found.add((at["subject"], at["context"], "currency" in example.prompt, "language" in example.prompt))
            case "arithmetic":
                pair = (int(at["a"]), int(at["b"]))
                plus = any(sign in example.prompt for sign in ("+", "plus", "sum"))
                found.add((plus, *(sorted(pair) if plus else pair)))
            case "choice":
                found.add((example.prompt.split("\n")[0], at["option"]))
            case "greater_than":
                found.add(example.prompt[example.spans["year"][0] - 2 :][:4])
            case "by_example":
                found.add((at["query"], example.answer))
            case "refusal":
                found.add((at["mark"], at["thing"]))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_train_and_test_share_no_content(name):
    train, test = _contents(name, "train"), _contents(name, "test")
    assert train
    assert test
    assert not train & test


def test_every_fact_is_told_in_training():
    told = {(e.prompt[slice(*e.spans["subject"])], e.answer) for e in tasks.Facts().examples(20_000, split="train")}
    for relation in facts.RELATIONS.values():
        assert all((subject, " " + answer) in told for subject, answer in relation.table.items())


def test_ioi_names_the_receiver_once_and_the_actor_twice():
    for order in ("ABBA", "BABA"):
        for example in tasks.IOI(order=order).examples(100):
            at = {key: example.prompt[start:end] for key, (start, end) in example.spans.items()}
            assert example.prompt.count(at["IO"]) == 1
            assert at["S1"] == at["S2"] == example.foil.strip()
            assert at["IO"] == example.answer.strip()
            assert (example.spans["IO"] < example.spans["S1"]) == (order == "ABBA")


def test_abc_twins_of_ioi_name_three_strangers():
    for example in tasks.IOI(corruption="abc").examples(50):
        assert example.corrupted_answer is None
        assert example.answer not in example.corrupted
        assert example.foil not in example.corrupted


@settings(max_examples=40, deadline=None)
@given(
    longest=st.integers(30, 500),
    words=st.integers(1, 3),
    rivals=st.integers(0, 2),
    depth=st.none() | st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_needles_stand_once_in_the_haystack_at_the_depth_asked_for(longest, words, rivals, depth, seed):
    shortest = longest - 15
    task = tasks.Needle(shortest=shortest, longest=longest, words=words, rivals=rivals, depth=depth)
    for example in task.examples(3, seed):
        at = {key: example.prompt[start:end] for key, (start, end) in example.spans.items()}
        assert at["needle"] in at["sentence"]
        assert at["key"] in at["sentence"]
        assert at["query"] == at["key"]
        assert (example.answer + example.continuation).strip(" .") == at["needle"]
        assert not re.search(rf"\b{at['needle']}\b", example.corrupted)
        pieces = len(example.prompt.replace(".", " .").replace("?", " ?").replace(":", " :").replace(",", " ,").split())
        assert pieces <= longest or example.prompt.count(".") == 1 + rivals  # no room for hay
        if depth == 0.0:
            assert example.spans["sentence"][0] == 0
        if depth == 1.0:
            assert example.prompt[example.spans["sentence"][1] :].startswith(" Q:")


def test_counterfactual_forms_say_which_source_is_right():
    for form in ("context", "memory", "bare"):
        for example in tasks.Counterfactual(form=form).examples(50):
            stated = " " + example.prompt[slice(*example.spans["context"])]
            assert stated == (example.foil if form == "memory" else example.answer)


def test_arithmetic_is_right():
    for example in tasks.Arithmetic().examples(300):
        a, b = (int(example.prompt[slice(*example.spans[key])]) for key in "ab")
        minus = any(sign in example.prompt for sign in (" - ", "minus", "difference"))
        assert int(example.answer) == (a - b if minus else a + b)


def test_greater_than_accepts_exactly_the_later_years():
    for example in tasks.GreaterThan().examples(50):
        year = int(example.prompt[slice(*example.spans["year"])])
        assert [int(one) for one in example.accepted] == list(range(year + 1, 100))
        assert int(example.foil) < year


def test_swapping_the_options_makes_the_foil_right():
    for example in tasks.Choice().examples(50):
        option = example.prompt[slice(*example.spans["option"])]
        assert f"\n{example.corrupted_answer.strip()}. {option}\n" in example.corrupted + "\n"


def test_training_never_offers_as_wrong_what_is_never_right_there():
    def options(example):
        return {line[3:] for line in example.prompt.split("\n")[1:5]}

    examples = tasks.Choice().examples(4000, split="train")
    animals = [e for e in examples if "an animal" in e.prompt]
    right = {e.prompt[slice(*e.spans["option"])] for e in animals}
    offered = set().union(*map(options, examples)) & set(lexicon.ANIMALS)
    assert right == offered < set(lexicon.ANIMALS)


def test_repeated_tokens_repeat_and_are_different_within_a_copy():
    ids = tasks.repeated_tokens(range(5, 50), n=4, length=20, seed=1, copies=3)
    assert ids.shape == (4, 60)
    assert torch.equal(ids[:, :20], ids[:, 20:40])
    assert torch.equal(ids[:, :20], ids[:, 40:])
    assert all(len(set(row[:20].tolist())) == 20 and min(row) >= 5 for row in ids)
    assert torch.equal(ids, tasks.repeated_tokens(range(5, 50), n=4, length=20, seed=1, copies=3))
    with pytest.raises(InputError, match="45 token ids"):
        tasks.repeated_tokens(range(5, 50), n=1, length=46)


def test_unknown_tasks_and_splits_are_explained():
    with pytest.raises(InputError, match=r"no task 'oii'; choose one of .*ioi"):
        tasks.get_task("oii")
    with pytest.raises(InputError, match='"train" or "test"'):
        tasks.IOI().examples(1, split="dev")
    with pytest.raises(InputError, match="at least 1"):
        tasks.IOI().examples(0)


@given(st.text("abc {", max_size=0) | st.text("abc .,", max_size=10), st.text("xyz", min_size=1, max_size=5))
def test_filling_a_template_remembers_where_the_parts_stand(literal, part):
    text, spans = fill_in(literal + "{one} and {two}", one=part, two=part + "!")
    assert text[slice(*spans["one"])] == part
    assert text[slice(*spans["two"])] == part + "!"


def test_lexicon_words_are_plain_single_words():
    words = lexicon.every_word()
    assert len(words) == len(set(words))
    assert all(word.isascii() and word.isalnum() for word in words)
    assert not set(lexicon.NAMES) & set(lexicon.OBJECTS)
    assert random.Random(0).choice(words)
