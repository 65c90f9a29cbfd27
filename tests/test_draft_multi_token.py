"""Multi-token prediction and VideoPlan: every head looks as far as it says, and what is trained away leaves the model alone."""

import copy
import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import DECODERS, VOCAB, build, opened
from toys import markov_trunk

import manyheads as mh
from manyheads.draft.multi_token.model import MultiToken, logits_of, states_of, train_multi_token
from manyheads.draft.multi_token.planning import (
    AUXILIARY,
    PLAN,
    Episode,
    FieldTask,
    encode_exercises,
    exercises,
    parse_plan,
    plan_scores,
    predict_plans,
)
from manyheads.errors import InputError, UnsupportedError
from manyheads.lab.markov import ceiling, markov_text
from manyheads.training import TrainSettings, next_token_loss

FLOAT_ONLY = ("gpt_oss", "mixtral", "qwen3_moe")  # their experts do not run in double precision


def text(rows=3, length=12, seed=0, vocabulary=VOCAB):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def stirred(both, seed=0):
    """The heads as training would leave them: not at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in both.heads.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return both.eval()


def settings(steps, rate=2e-3):
    return TrainSettings(steps=steps, rate=rate, warmup=20, weight_decay=0.0, precision="fp32")


def gradients(both, batch):
    both.zero_grad()
    loss = both(batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in both.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", DECODERS)
def test_one_head_is_plain_next_token_training_on_every_architecture(name):
    exact = build(name) if name in FLOAT_ONLY else build(name).double()
    model, batch = mh.open_model(exact), {"input_ids": text()}
    assert abs(MultiToken(model, 1).eval()(batch) - next_token_loss(model.plain.eval(), batch)) < 1e-6


@pytest.mark.parametrize("name", DECODERS)
def test_further_heads_are_read_out_by_the_models_own_way_to_logits(name):
    model, ids = opened(name), text()
    both = stirred(MultiToken(model, 3))
    said = both.logits(ids)
    assert torch.equal(said[0], model.logits(ids))
    with torch.no_grad():
        assert torch.allclose(logits_of(model, states_of(model, ids)), said[0], atol=1e-5)
    assert (said[1:] - said[0]).abs().amax((1, 2, 3)).min() > 1e-3


def test_fresh_heads_say_what_the_model_says():
    model, ids = opened("llama"), text()
    said = MultiToken(model, 4).logits(ids)
    assert torch.allclose(said, said[:1].expand_as(said), atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_sum_over_heads_and_over_pairs_within_the_answer(side):
    model = opened("gemma2")
    ids, mask, answers = text(2, 10), torch.ones(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    answers[0, 5:9] = answers[1, 3:5] = answers[1, 6:8] = True
    padding = slice(0, 2) if side == "left" else slice(9, 10)
    mask[0, padding] = 0
    batch = {"input_ids": ids, "attention_mask": mask.long(), "answers": answers}
    both = stirred(MultiToken(model, 3, weights=(1.0, 0.5, 0.25)))
    said = both.logits({"input_ids": ids, "attention_mask": mask.long()}).log_softmax(-1)
    expected = 0.0
    for k, weight in ((1, 1.0), (2, 0.5), (3, 0.25)):
        terms = []
        for row in range(2):
            for t in range(10 - k):
                if answers[row, t + 1 : t + k + 1].all():
                    terms.append(-said[k - 1, row, t, ids[row, t + k]])
        expected += weight * torch.stack(terms).mean()
    assert len(terms) == 2  # head 3 in the first row only: 4 answer tokens
    assert abs(both(batch) - expected) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("marked", [False, True])
def test_padding_neither_speaks_nor_is_predicted_even_if_marked_as_answer(side, marked):
    model, ids = opened("llama"), text(1, 8)
    both = stirred(MultiToken(model, 3))
    padding, mask = torch.full((1, 4), 5), torch.ones(1, 12, dtype=torch.long)
    mask[:, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    batch = {"input_ids": torch.cat([padding, ids] if side == "left" else [ids, padding], 1), "attention_mask": mask}
    if marked:
        batch["answers"] = torch.ones(1, 12, dtype=torch.bool)
    assert abs(both(batch) - both({"input_ids": ids})) < 1e-5


def test_what_is_neither_answer_nor_before_it_trains_nothing():
    model = opened("gpt2")
    ids, answers = text(1, 10), torch.zeros(1, 10, dtype=torch.bool)
    answers[0, 4:7] = True
    both = stirred(MultiToken(model, 4))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    loss = both({"input_ids": ids, "attention_mask": mask, "answers": answers})
    padded = ids.clone()
    padded[0, 7:] = 3 + (padded[0, 7:] - 2) % (VOCAB - 3)
    assert loss == both({"input_ids": padded, "attention_mask": mask, "answers": answers})
    z = states_of(model, {"input_ids": ids, "attention_mask": mask}).detach().requires_grad_()
    seen = {"input_ids": ids, "attention_mask": mask, "answers": answers}
    total = sum(both._loss(k, z, _seen(model, seen)) for k in range(1, 5))
    (grad,) = torch.autograd.grad(total, z)
    assert grad[0].norm(dim=-1).nonzero().flatten().tolist() == [3, 4, 5]


def _seen(model, batch):
    from manyheads.draft.multi_token.model import _Seen

    return _Seen.of(model, batch)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("trunk", ["learning", "frozen"])
def test_one_head_at_a_time_gives_the_same_loss_and_gradients(name, trunk):
    model = mh.open_model(build(name))
    model.plain.requires_grad_(trunk == "learning")
    answers = torch.ones(3, 12, dtype=torch.bool)
    answers[:, :4] = False
    batch = {"input_ids": text(), "answers": answers}
    together, apart = (MultiToken(model, 4, weights=(1, 2, 1, 0.5), one_at_a_time=lean) for lean in (False, True))
    apart.heads = stirred(together).heads
    loss, grads = gradients(together.eval(), batch)
    again, same = gradients(apart.eval(), batch)
    assert abs(loss - again) < 1e-6 and grads.keys() == same.keys()
    assert any(key.startswith("trunk") for key in grads) == (trunk == "learning")
    for key, grad in grads.items():
        assert torch.allclose(grad, same[key], atol=1e-6), key


def test_one_head_at_a_time_works_under_mixed_precision():
    together, apart = (MultiToken(mh.open_model(build("llama")), 4, one_at_a_time=lean) for lean in (False, True))
    apart.heads = stirred(together).heads
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = gradients(together.eval(), {"input_ids": text()})
        _, same = gradients(apart.eval(), {"input_ids": text()})
    assert grads.keys() == same.keys()
    for key, grad in grads.items():
        assert (grad - same[key]).norm() < 0.02 * grad.norm(), key


@pytest.mark.parametrize("lean", [False, True])
def test_one_head_at_a_time_never_holds_two_heads_logits(lean):
    """Tensors of logits' size that autograd keeps, counted while they live."""

    living, most = Counter(), []

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.key = tensor, tensor.data_ptr()
            living[self.key] += tensor.shape in shapes
            most.append(sum(count > 0 for count in living.values()))

        def __del__(self):
            living[self.key] -= self.tensor.shape in shapes

    shapes = [(4 * (30 - k), VOCAB) for k in range(1, 5)]
    both = stirred(MultiToken(mh.open_model(build("llama")), 4, one_at_a_time=lean))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        both({"input_ids": text(4, 30)})
    assert max(most) == (1 if lean else 4)


def test_training_with_heads_leaves_an_ordinary_model_whose_logits_are_head_1(tmp_path):
    model = mh.open_model(build("llama"))
    before, ids = model.fingerprint, text()
    both = train_multi_token(model, lambda i: {"input_ids": text(seed=i)}, settings(5), n=3)
    assert model.fingerprint != before
    model.save_pretrained(tmp_path / "alone")
    alone = mh.open_model(tmp_path / "alone")
    assert torch.equal(alone.logits(ids), both.logits(ids)[0])
    assert not any("heads" in name for name in alone.plain.state_dict())


def test_a_frozen_trunk_stays_bit_for_bit_and_its_heads_learn():
    model = mh.open_model(build("llama"))
    before = copy.deepcopy(model.plain.state_dict())
    both = train_multi_token(model, lambda i: {"input_ids": text(seed=i)}, settings(3), n=2, frozen=True)
    assert all(torch.equal(before[name], value) for name, value in model.plain.state_dict().items())
    assert all(p.requires_grad for p in model.plain.parameters())
    assert any(bool(p.abs().sum()) for p in both.heads.parameters())


@pytest.mark.slow
def test_head_k_looks_k_tokens_ahead():
    """The text 3 4 5 6 ... tells every offset apart."""
    model = mh.open_model(build("llama"))
    runs = lambda i: 3 + (torch.arange(16)[None] + torch.arange(i, i + 16)[:, None]) % 50  # noqa: E731
    both = train_multi_token(model, lambda i: {"input_ids": runs(i)}, settings(120, 8e-3), n=3)
    assert min(both.accuracy({"input_ids": runs(7)})) > 0.95
    said = both.logits(runs(2)).argmax(-1)
    for k in (1, 2, 3):
        assert (said[k - 1, :, 4:] == 3 + (runs(2)[:, 4:] - 3 + k) % 50).float().mean() > 0.95


def test_what_cannot_be_trained_is_refused():
    model = opened("llama")
    with pytest.raises(InputError, match="3 weights for 4 heads"):
        MultiToken(model, 4, weights=(1, 1, 1))
    with pytest.raises(InputError, match="at least 1"):
        MultiToken(model, 0)
    with pytest.raises(InputError, match="heads 1 to 4"):
        MultiToken(model).heads.hidden(5, torch.zeros(1, 32))
    with pytest.raises(InputError, match="mark the answers"):
        MultiToken(model)({"input_ids": text(), "answers": torch.zeros(3, 12, dtype=torch.bool)})
    with pytest.raises(InputError, match="shape"):
        MultiToken(model)({"input_ids": text(), "answers": torch.zeros(3, 11, dtype=torch.bool)})
    with pytest.raises(UnsupportedError):
        MultiToken(opened("bert"))


EPISODE = Episode("hand egg pan", "fry an egg", ("heat pan", "crack egg"), ("add salt", "flip egg", "serve"))
ELSE = Episode("radio milk", "cook rice", ("wash rice",), ("boil water", "add rice", "stir", "drain"))
ACTIONS = (*EPISODE.past, *EPISODE.future, *ELSE.past, *ELSE.future)
FIELDS = ("video", "goal", "past", "future")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("task", [PLAN, *AUXILIARY], ids=lambda task: task.name)
def test_no_task_shows_what_it_asks_for_or_anything_else_it_was_not_given(task, field):
    changed = replace(EPISODE, **{field: getattr(ELSE, field)})
    tokenizer = mh.open_model().tokenizer
    rows = [encode_exercises(tokenizer, [task.exercise(episode)]) for episode in (EPISODE, changed)]
    before, after = (row["input_ids"][~row["answers"]].tolist() for row in rows)
    assert (before != after) == (field in task.given)
    said, other = (row["input_ids"][row["answers"]].tolist() for row in rows)
    assert (said != other) == (field == task.asked)


def test_the_tasks_are_those_of_the_method_and_a_leaking_one_cannot_be_made():
    assert {(t.given, t.asked) for t in (PLAN, *AUXILIARY)} == {
        (("video", "goal"), "future"),
        (("video",), "goal"),
        (("video", "goal"), "past"),
        (("video",), "future"),
    }
    with pytest.raises(InputError, match="show other fields"):
        FieldTask("leak", ("video", "future"), "future", "Say it.")
    with pytest.raises(InputError, match="rename"):
        PLAN.exercise(replace(EPISODE, future=("a; b",)))


def test_the_stream_mixes_tasks_evenly_and_another_mix_sees_the_same_episodes():
    mixed = exercises([EPISODE, ELSE], 4000, seed=1)
    counts = Counter(exercise.task for exercise in mixed)
    assert len(counts) == 4 and max(counts.values()) - min(counts.values()) < 160
    assert mixed == exercises([EPISODE, ELSE], 4000, seed=1) != exercises([EPISODE, ELSE], 4000, seed=2)
    plain = exercises([EPISODE, ELSE], 4000, tasks=(PLAN,), seed=1)
    assert all(a == b for a, b in zip(mixed, plain, strict=True) if a.task == "plan")


def test_answers_are_marked_up_to_their_end_and_prompts_and_padding_are_not():
    tokenizer = mh.open_model().tokenizer
    given = [PLAN.exercise(EPISODE), AUXILIARY[0].exercise(ELSE)]
    batch = encode_exercises(tokenizer, given)
    for ids, mask, answers, exercise in zip(*batch.values(), given, strict=True):
        assert tokenizer.decode(ids[answers], skip_special_tokens=True).strip() == exercise.answer.strip()
        assert ids[answers][-1] == tokenizer.eos_token_id and not answers[mask == 0].any()
        assert ids[~answers & mask.bool()].tolist() == tokenizer(exercise.prompt)["input_ids"]


def test_plans_are_scored_by_order_position_and_set():
    def scored(*pairs):
        found = plan_scores(*([tuple(plan) for plan in plans] for plans in zip(*pairs, strict=True)))
        return pytest.approx((found.success_rate, found.mean_accuracy, found.mean_iou), abs=1e-9)

    assert scored(("abc", "bac")) == (0, 1 / 3, 1)
    assert scored(("abc", "abc")) == (1, 1, 1)
    assert scored(("aab", "abb")) == (0, 2 / 3, 1)  # sets, not multisets
    assert scored(("aaa", "abc")) == (0, 1 / 3, 1 / 3)
    assert scored(("", "abc")) == (0, 0, 0)
    assert scored(("ab", "abc"), ("abc", "abc")) == (0.5, 5 / 6, 5 / 6)
    error = plan_scores(["abc", "abc", "xyz", "xyz"], ["abc"] * 4).stderr
    assert error == pytest.approx((0.288675,) * 3, abs=1e-5)
    with pytest.raises(InputError, match="cut it"):
        plan_scores(["abcd"], ["abc"])
    with pytest.raises(InputError, match="as many"):
        plan_scores([], ["abc"])


def test_text_becomes_the_nearest_actions():
    assert parse_plan(" add salt; flip egg ;serve", ACTIONS) == EPISODE.future
    assert parse_plan("Heat Pan\ncrack eggs\n\n", ACTIONS) == ("heat pan", "crack egg")
    assert parse_plan("boil the water; stirr; drain; serve", ACTIONS, 3) == ("boil water", "stir", "drain")
    assert parse_plan("  ", ACTIONS) == ()
    with pytest.raises(InputError, match="closed list"):
        parse_plan("serve", ())


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["frozen", "learning"])
def test_on_markov_text_every_head_reaches_its_ceiling(trunk):
    model = mh.open_model(copy.deepcopy(markov_trunk().plain))
    texts = lambda i: {"input_ids": markov_text(32, seed=1_000 * (i + 1))}  # noqa: E731
    both = train_multi_token(model, texts, settings(400), n=4, frozen=trunk == "frozen")
    found = both.accuracy({"input_ids": markov_text(1000, seed=77)})
    assert found == pytest.approx([ceiling(k) for k in range(1, 5)], abs=0.02)


@pytest.mark.slow
def test_a_small_model_learns_to_plan_in_all_four_ways_better_than_the_most_common_future_of_a_goal():
    """The ablation itself is `manyheads bench planning`; that heads or tasks help is not claimed."""
    path = Path(__file__).parents[1] / "benchmarks" / "planning.py"
    spec = importlib.util.spec_from_file_location("planning_benchmark", path)
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench
    spec.loader.exec_module(bench)
    world = bench.World.build(0)
    train, test = world.episodes(200, 0), world.episodes(200, 1)
    floor = bench.most_common(train, test, by_last=False)
    for way in bench.WAYS:
        model = bench.planner(world, train, way, steps=400)
        plans = predict_plans(model, test, bench.ACTIONS)
        found = plan_scores(plans, [episode.future for episode in test])
        print(way, found, "most common", floor)
        assert found.success_rate > floor.success_rate + 0.1
