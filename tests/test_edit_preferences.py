"""Learning from preferences (DPO): what the loss is, where its gradient points, and what it teaches."""

from dataclasses import replace
from functools import cache
from math import log

import pytest
import torch
from architectures import build, opened

import manyheads as mh
from manyheads.edit.learn.examples import Answered, of_task, swapped, task_of
from manyheads.edit.learn.lofit import lofit
from manyheads.edit.learn.preferences import Preferences, log_p, preferred
from manyheads.edit.learn.tuning import LEARNING, answer_accuracy
from manyheads.errors import InputError
from manyheads.tasks import Example


@cache
def ladon():
    return mh.open_model()


def sides(model, n=6, seed=0):
    ids = torch.randint(3, 58, (n, 8), generator=torch.Generator().manual_seed(seed))
    return Answered.of_tokens(ids[:, :6], ids[:, 6]), Answered.of_tokens(ids[:, :6], ids[:, 7])


def pairs(model, **more):
    return Preferences.of(model, *sides(model), **more)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_without_an_edit_every_row_costs_ln_2(name, beta):
    model = opened(name)
    given = pairs(model, beta=beta)
    assert torch.allclose(given.loss(lambda some: log_p(model, some)), torch.full((6,), log(2)), atol=1e-6)
    nothing = lofit(model, given, heads=["L1H0"], dev=given, tuning=replace(LEARNING, rate=0.0, steps=1, every=1))
    assert nothing.effect["held-out loss"] == pytest.approx(log(2), abs=1e-4)  # initial offsets are 1e-3 and not zero


def test_the_loss_is_the_papers_formula_computed_by_hand():
    model = opened("llama")
    given, edit = pairs(model), mh.Scale(["L0H1", "L2H0"], 3.0)

    def of(ids, edits):
        with model.editing(*edits):
            found = model.logits(ids[:, :-1])[:, -1].log_softmax(-1)
        return found.gather(1, ids[:, -1:])[:, 0]

    chosen, rejected = given.chosen.input_ids, given.rejected.input_ids
    moved = (of(chosen, [edit]) - of(chosen, [])) - (of(rejected, [edit]) - of(rejected, []))
    wanted = -torch.log(1 / (1 + torch.exp(-0.5 * moved)))
    assert torch.allclose(given.loss(lambda some: log_p(model, some, [edit])), wanted, atol=1e-5)


def test_the_gradient_lifts_the_chosen_answer_and_lowers_the_rejected_one_by_as_much():
    given = pairs(opened("llama"))
    both = given.reference.T.flatten().clone().requires_grad_()
    given.loss(lambda some: both).sum().backward()
    assert torch.allclose(both.grad[:6], torch.full((6,), -0.25)) and torch.allclose(
        both.grad[6:], torch.full((6,), 0.25)
    )


def test_what_is_learned_is_the_preference_and_the_reference_stays():
    model = mh.open_model(build("llama"))
    given = pairs(model)
    before = {name: value.clone() for name, value in model.plain.state_dict().items()}
    reference = given.reference.clone()
    edit = lofit(model, given, heads=2, tuning=replace(LEARNING, rate=5e-2, epochs=40, rows=6))
    margins = given.margins(lambda some: log_p(model, some, edit.edits()))
    assert (margins > 0).all() and given.loss(lambda some: log_p(model, some, edit.edits())).mean() < log(2) - 0.02
    assert torch.equal(given.reference, reference) and not given.reference.requires_grad
    assert torch.allclose(log_p(model, given.chosen), reference[:, 0], atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.plain.state_dict().items())
    assert edit.settings["beta"] == 0.5


def test_swapping_the_sides_turns_the_preference_around():
    model = opened("llama")
    chosen, rejected = sides(model)
    edit = [mh.Scale(["L0H1"], 3.0)]
    one, other = (Preferences.of(model, *order) for order in ((chosen, rejected), (rejected, chosen)))
    margins = [given.margins(lambda some: log_p(model, some, edit)) for given in (one, other)]
    assert torch.allclose(margins[0], -margins[1], atol=1e-6)
    assert preferred(model, one) + preferred(model, other) == pytest.approx(1)


def test_answers_of_several_tokens_are_padded_and_count_as_a_whole():
    model = ladon()
    examples = [
        Example("The colour is", " blue and red", " green"),
        Example("Q: What is one? A:", " two", " Monday and so"),
    ]
    given = Preferences.of_examples(model, examples)
    assert given.chosen.input_ids.shape == given.rejected.input_ids.shape
    for i, example in enumerate(examples):
        for side, text in enumerate((example.answer, example.foil)):
            alone = Answered.of_texts(model, [example.prompt], [text])
            assert alone.attention_mask.all()
            assert float(given.reference[i, side]) == pytest.approx(float(log_p(model, alone)[0]), abs=1e-4)
    some = given.rows(torch.tensor([1]))
    assert len(some) == 1 and torch.equal(some.reference[0], given.reference[1])


@pytest.mark.slow
def test_ladon_learns_to_prefer_what_it_knows_to_what_it_is_told():
    model = ladon()
    portions = of_task(task_of("counterfactual:form=bare"), 120)
    train, test = (Preferences.of_examples(model, swapped(part)) for part in (portions.train, portions.test))
    edit = lofit(
        model, train, heads=model.head_set([(2, h) for h in range(8)]), tuning=replace(LEARNING, rate=1e-2, steps=25)
    )
    before, after = preferred(model, test), preferred(model, test, edit.edits())
    print(f"known answer preferred: {before:.2f} before, {after:.2f} after")
    assert after >= before + 0.1
    other = preferred(model, test, edit.at_strength(-1).edits())
    assert other <= before


@pytest.mark.slow
def test_on_ladon_answers_and_preferences_both_teach_chosen_heads_to_answer_from_memory():
    model = ladon()
    portions = of_task(task_of("counterfactual:form=bare"), 256)
    train, dev, test = (swapped(part) for part in (portions.train, portions.dev, portions.test))

    def answered(part):
        return Answered.of_texts(model, [e.prompt for e in part], [e.answer for e in part])

    how = replace(LEARNING, rate=1e-2)
    said = lofit(model, answered(train), heads=2, dev=answered(dev), tuning=how)
    pairs = [Preferences.of_examples(model, part) for part in (train, dev, test)]
    told = lofit(model, pairs[0], heads=said.heads, dev=pairs[1], tuning=how)
    right = [answer_accuracy(model, answered(test), edits) for edits in ([], said.edits(), told.edits())]
    likelier = [preferred(model, pairs[2], edits) for edits in ([], said.edits(), told.edits())]
    print(f"right {right}, preferred {likelier}: without, from answers, from preferences")
    assert min(right[1:]) >= right[0] + 0.15 and min(likelier[1:]) >= likelier[0] + 0.15


def test_what_cannot_be_compared_is_refused():
    model = opened("llama")
    chosen, rejected = sides(model)
    with pytest.raises(InputError, match="give both for the same prompts"):
        Preferences.of(model, chosen, rejected.rows(slice(0, 2)))
    with pytest.raises(InputError, match="beta is 0"):
        Preferences.of(model, chosen, rejected, beta=0)
    with pytest.raises(InputError, match="not every example has a foil"):
        Preferences.of_examples(ladon(), [Example("a", " b")])
    with pytest.raises(InputError, match="no examples"):
        lofit(model, Preferences.of(model, chosen, rejected).rows(slice(0, 0)), heads=["L0H0"])
