"""Small models trained to choose: the correct-letter heads are found among those that could learn it, and nowhere else."""

from dataclasses import replace

import pytest
import torch

import manyheads as mh
from manyheads.atlas.multiple_choice.classes import choice_classes
from manyheads.atlas.multiple_choice.effects import choice
from manyheads.atlas.multiple_choice.questions import Questions, measured
from manyheads.errors import InputError
from manyheads.lab.choosing import ASK, EACH, FIRST_OPTION, HEADS, SETTINGS, choice_prompts, choosing_model

LAYOUTS = ("label last", "label first")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_answer_is_the_label_of_the_one_option_of_the_category_asked_for(layout):
    batch, labels, right = choice_prompts(40, 3, layout)
    for i, ids in enumerate(batch.input_ids.tolist()):
        kinds = [(ids[int(batch.spans[f"option{k}"][i, 0])] - FIRST_OPTION) // EACH for k in range(4)]
        assert kinds.count(ids[1] - ASK) == 1 and kinds.index(ids[1] - ASK) == right[i]
        assert [ids[int(batch.spans[f"label{k}"][i, 0])] for k in range(4)] == labels[i].tolist()
        assert len(set(labels[i].tolist())) == 4 and labels[i, right[i]] == batch.answer_ids[i]
    same = choice_prompts(40, 3, layout)[0].input_ids
    assert torch.equal(same, batch.input_ids) and not torch.equal(same, choice_prompts(40, 4, layout)[0].input_ids)


def test_dead_heads_write_nothing_and_keep_the_queries_they_were_drawn_with():
    model = choosing_model([0, 3], settings=replace(SETTINGS, steps=3, weight_decay=0.0))
    before = choosing_model([0, 3], settings=replace(SETTINGS, steps=1, rate=0.0))
    after, drawn = model.model.layers[-1].self_attn, before.model.layers[-1].self_attn
    assert (after.o_proj.weight.unflatten(1, (HEADS, -1)).abs().amax((0, 2)) > 0).tolist() == [True, False, False, True]
    same = (after.q_proj.weight == drawn.q_proj.weight).unflatten(0, (HEADS, -1)).flatten(1).all(1)
    assert same.tolist() == [False, True, True, False]
    for alive in ([], [4]):
        with pytest.raises(InputError, match="heads 0 to 3"):
            choosing_model(alive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "alive", "layout"),
    [(0, [0, 3], "label last"), (1, [1, 2], "label last"), (2, [0, 2], "label last"), (1, [1, 2], "label first")],
)
def test_correct_letter_heads_are_exactly_those_that_could_learn_to_find_the_letter(seed, alive, layout):
    """#12, in trained models: against the heads that were alive, and an untrained twin."""
    asked = Questions(*choice_prompts(256, 99, layout))
    model = mh.open_model(choosing_model(alive, seed, layout))
    assert measured(model, asked)[2] > 0.99
    wanted = model.head_set((1, i) for i in alive)
    assert choice_classes(model, asked)["correct_letter"] == wanted
    scores = choice(model, asked)
    assert scores["choice_direct"].top(2) == wanted
    assert scores["correct_letter"].meta["classes"]["correct_letter"] == [str(head) for head in wanted]
    untrained = mh.open_model(choosing_model(alive, seed, layout, settings=replace(SETTINGS, steps=1, rate=0.0)))
    assert not any(choice_classes(untrained, asked).values())
