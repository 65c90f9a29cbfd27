"""Reward heads: what each loss asks for, pairs that cannot be lost, the recipe, objectives in closed form, and the command."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli.common import Commands
from manyheads.cli.rooms.predict import predict_reward
from manyheads.errors import InputError, UnsupportedError
from manyheads.learning import MultiHead, Trunk, sequence_classifier
from manyheads.predict.reward.answers import answer_states, conversations, tokens_of_texts
from manyheads.predict.reward.feedback import AnswerPair, Feedback, RatedAnswer, read_feedback, split_feedback
from manyheads.predict.reward.objectives import ObjectivesHead, ordered, tau_c, with_objectives, word_objectives
from manyheads.predict.reward.pairs import pair_accuracy, pair_batches, pair_target, pairs_of
from manyheads.predict.reward.preference import (
    RewardHead,
    RewardSettings,
    TwoStages,
    expo,
    extrapolated,
    linear_rewards,
    preference_loss,
    rate_then_prefer,
    rating_loss,
    reward_heads,
)
from manyheads.predict.reward.ridge import PENALTIES, best_penalty, ridge
from manyheads.predict.reward.training import FROZEN, TUNED, reward_scores, train_reward
from manyheads.training import TrainSettings, row_batches

DRAW = torch.Generator().manual_seed(0)
ONES = torch.ones(5)


def _gradient(gap, strength, objective):
    gap = gap.clone().requires_grad_()
    preference_loss(gap, strength, objective).backward()
    return gap.grad


GAP = torch.randn(5, generator=DRAW)


def test_scaled_is_regular_at_a_strength_of_1_and_has_three_times_its_gradient_at_3():
    assert torch.equal(preference_loss(GAP, ONES, "scaled"), preference_loss(GAP, ONES, "regular"))
    three, one = (_gradient(GAP.double(), m * ONES, kind) for m, kind in ((3, "scaled"), (1, "regular")))
    torch.testing.assert_close(three, 3 * one, rtol=1e-14, atol=0)


def test_regular_is_minus_log_sigmoid_whatever_the_strength_and_margin_is_ln_2_where_the_gap_is_the_margin():
    torch.testing.assert_close(preference_loss(GAP, 2 * ONES, "regular"), torch.log1p(torch.exp(-GAP)).mean())
    torch.testing.assert_close(preference_loss(2 * ONES, 2 * ONES, "margin"), torch.tensor(math.log(2)))
    torch.testing.assert_close(preference_loss(GAP + 3, 3 * ONES, "margin"), preference_loss(GAP, ONES, "regular"))


@pytest.mark.parametrize("objective", ["regular", "margin", "scaled"])
def test_ties_do_not_count_and_give_no_gradient(objective):
    strength = torch.tensor([1.0, 0.0, 3.0, 0.0, 2.0])
    kept = strength > 0
    torch.testing.assert_close(
        preference_loss(GAP, strength, objective), preference_loss(GAP[kept], strength[kept], objective)
    )
    assert not _gradient(GAP, strength, objective)[~kept].any()
    assert float(preference_loss(GAP, 0 * ONES, objective)) == 0.0


def test_swapping_a_pair_turns_the_gradient_around():
    head = RewardHead(RewardSettings(4, objective="regular"))
    states, target = torch.randn(2, 4, generator=DRAW), pair_target(torch.tensor([2.0]))
    reward = head(states).detach().requires_grad_()
    head.loss(reward, target).backward()
    swapped = reward.detach().requires_grad_()
    head.loss(swapped, -target * torch.tensor([-1.0, 1.0])).backward()
    assert reward.grad[0] < 0 < reward.grad[1] and swapped.grad[1] < 0 < swapped.grad[0]
    torch.testing.assert_close(reward.grad.sum(), torch.tensor(0.0))


def test_rows_of_pairs_may_stand_in_any_order_and_none_is_lost_unnoticed():
    strength = torch.tensor([1.0, 3.0, 0.0, 2.0])
    target, head = pair_target(strength), RewardHead(RewardSettings(4))
    states = torch.randn(8, 4, generator=DRAW)
    loss = head.loss(head(states), target)
    for seed in range(5):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(head.loss(head(states)[order], target[order]), loss)
        chosen, rejected, found = pairs_of(target[order])
        assert torch.equal(found, strength)
        firm = strength > 0
        assert torch.equal(order[chosen][firm], (2 * torch.arange(4))[firm])
        assert torch.equal(order[rejected][firm], (2 * torch.arange(4) + 1)[firm])
    with pytest.raises(InputError, match="pair 3 has 1 rows"):
        head.loss(head(states[:7]), target[:7])
    wrong = target.clone()
    wrong[1, 1] = -2.0
    with pytest.raises(InputError, match=r"pair 0 are not \+m and -m"):
        pairs_of(wrong)
    with pytest.raises(InputError, match="0 or more"):
        pair_target(torch.tensor([-1.0]))


@pytest.mark.usefixtures("any_shape")
def test_batches_of_pairs_are_whole_pairs_and_an_epoch_has_each_once():
    inputs = torch.arange(20.0).view(10, 2, 1)
    batches = pair_batches(inputs, torch.ones(10), 3, seed=1)
    seen = torch.cat([batches(i)["input"].view(-1, 2) for i in range(3)])
    assert torch.equal(seen[:, 1] - seen[:, 0], torch.ones(9)) and len(seen[:, 0].unique()) == 9
    with pytest.raises(InputError, match="10 pairs and 9 strengths"):
        pair_batches(inputs, torch.ones(9), 3)


def test_attributes_without_a_rating_do_not_count():
    output, rating = torch.randn(4, 3, generator=DRAW), torch.randn(4, 3, generator=DRAW)
    rating[0, 1] = rating[2] = -100
    given = rating != -100
    torch.testing.assert_close(rating_loss(output, rating), (output - rating)[given].square().mean())
    assert float(rating_loss(output, torch.full((4, 3), -100.0))) == 0.0
    heads = MultiHead(Trunk(torch.nn.Identity()), {"r": RewardHead(RewardSettings(5, 3, objective="rating"))})
    heads.losses({"input": torch.randn(4, 5), "r": rating})["r"].backward()
    weight = heads.heads["r"].linear.weight
    assert weight.grad[:, :].abs().sum(1).min() > 0


def test_pairs_compare_the_overall_attribute():
    head = RewardHead(RewardSettings(4, 3, overall=2))
    states, target = torch.randn(6, 4, generator=DRAW), pair_target(torch.tensor([1.0, 2.0, 3.0]))
    reward = head(states)[:, 2].view(3, 2)
    torch.testing.assert_close(
        head.loss(head(states), target), preference_loss(reward[:, 0] - reward[:, 1], torch.tensor([1.0, 2.0, 3.0]))
    )
    found = head.metrics(head(states), target)
    assert found["accuracy"] == pytest.approx(float((reward[:, 0] > reward[:, 1]).float().mean()))
    with pytest.raises(InputError, match="overall"):
        RewardSettings(4, 3, overall=3)


def test_pair_accuracy_counts_an_equal_score_half_and_leaves_ties_out():
    assert pair_accuracy(torch.tensor([1.0, 0.0, -1.0, 2.0])) == pytest.approx(2.5 / 4)
    assert pair_accuracy(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])) == 1.0


@given(st.integers(0, 100))
def test_extrapolation_gives_both_checkpoints_exactly(seed):
    draw = torch.Generator().manual_seed(seed)
    rated = {"w": torch.randn(50, generator=draw), "n": torch.tensor(3)}
    preferred = {"w": rated["w"] + 1e-3 * torch.randn(50, generator=draw), "n": torch.tensor(5)}
    assert torch.equal(extrapolated(rated, preferred, 0.0)["w"], rated["w"])
    assert torch.equal(extrapolated(rated, preferred, 1.0)["w"], preferred["w"])
    torch.testing.assert_close(
        extrapolated(rated, preferred, 1.5)["w"], rated["w"] + 1.5 * (preferred["w"] - rated["w"])
    )
    assert extrapolated(rated, preferred, 0.5)["n"] == 5


def test_expo_leaves_the_heads_where_the_judge_is_lowest():
    heads = reward_heads(Trunk(torch.nn.Identity()), RewardSettings(3))
    name = "heads.reward.linear.weight"
    stages = TwoStages({name: torch.zeros(1, 3)}, {name: torch.ones(1, 3)})
    weight = heads.heads["reward"].linear.weight
    assert expo(heads, stages, lambda: float((weight - 1.3).abs().sum())) == pytest.approx(1.3)
    torch.testing.assert_close(weight.detach(), torch.full((1, 3), 1.3))
    with pytest.raises(InputError, match="different parameters"):
        extrapolated({}, stages.preferred, 1.0)


def test_the_second_stage_begins_with_the_head_of_the_first():
    data = linear_rewards(0, n=100)
    heads = reward_heads(Trunk(torch.nn.Identity()), RewardSettings(32))
    rated = row_batches({"input": data.rated, "reward": data.rating}, 50)
    pairs = pair_batches(data.pairs, data.strength, 50)
    still = TrainSettings(steps=1, rate=0.0, warmup=1, precision="fp32")
    stages = rate_then_prefer(heads, rated, pairs, ADAM_30, still)
    alone = reward_heads(Trunk(torch.nn.Identity()), RewardSettings(32, objective="rating"))
    alone.fit(rated, ADAM_30)
    for state in (stages.rated, stages.preferred):
        assert torch.equal(state["heads.reward.linear.weight"], alone.heads["reward"].linear.weight)
    assert heads.attached["reward"].head.settings.objective == "scaled"
    with pytest.raises(InputError, match="the heads are reward"):
        rate_then_prefer(heads, rated, pairs, ADAM_30, still, name="other")


ADAM_30 = TrainSettings(
    steps=30, rate=1e-2, warmup=1, decay=0.0, optimizer="adam", weight_decay=0.0, clip=None, precision="fp32"
)


@pytest.mark.slow
def test_strengths_help_a_linear_reward():
    """300 pairs, over 20 seeds: scaled beats regular by half a point."""
    from manyheads.predict.reward.preference import _learned

    found = {
        kind: [_learned(kind)(linear_rewards, seed)["pair accuracy"] for seed in range(20)]
        for kind in ("regular", "margin", "scaled")
    }
    means = {kind: float(np.mean(values)) for kind, values in found.items()}
    print(means, float(np.std(np.subtract(found["scaled"], found["regular"])) / 20**0.5))
    assert means["scaled"] >= means["regular"] + 0.005


# Objectives in closed form


def _table(n, width, objectives, noise=0.1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=draw) + 3
    weight = torch.randn(width, objectives, generator=draw) / width**0.5
    return x, x @ weight + 7 + noise * torch.randn(n, objectives, generator=draw)


@pytest.mark.parametrize("shape", [(50, 8), (20, 60)])
def test_primal_and_dual_are_one_solution_and_the_intercept_pays_nothing(shape):
    x, y = _table(*shape, 3)
    for penalty in (1e-2, 1.0, 1e4):
        primal, dual = (ridge(x, y, penalty, form) for form in ("primal", "dual"))
        torch.testing.assert_close(primal, dual, rtol=0, atol=1e-4 if penalty < 1 else 1e-9)
        assert primal[0].dtype == torch.float64
    # By the normal equations with a column of ones that is not penalised.
    ones = torch.cat([x.double(), torch.ones(shape[0], 1)], 1)
    penalties = torch.diag(torch.cat([torch.full((shape[1],), 1.0), torch.zeros(1)])).double()
    whole = torch.linalg.solve(ones.T @ ones + penalties, ones.T @ y.double())
    weight, bias = ridge(x, y, 1.0)
    torch.testing.assert_close(torch.cat([weight, bias[None]]), whole)
    torch.testing.assert_close(ridge(x, y, 1e12)[1], y.double().mean(0))


def test_ridge_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = _table(40, 12, 2)
    weight, bias = ridge(x, y, 3.0)
    theirs = linear_model.Ridge(alpha=3.0).fit(x.double().numpy(), y.double().numpy())
    np.testing.assert_allclose(weight.T.numpy(), theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_, atol=1e-9)


def test_the_penalty_is_chosen_as_by_solving_every_fold():
    x, y = _table(60, 30, 2, noise=2.0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    scale, errors = y.double().var(0), []
    for penalty in PENALTIES:
        error = 0.0
        for fold in range(5):
            out = order[fold::5]
            kept = order[~torch.isin(order, out)]
            weight, bias = ridge(x[kept], y[kept], penalty)
            error += float(((x[out].double() @ weight + bias - y[out]).square() / scale).sum())
        errors.append(error)
    assert best_penalty(x, y) == PENALTIES[int(np.argmin(errors))]
    with pytest.raises(InputError, match="3 rows are too few for 5 folds"):
        best_penalty(x[:3], y[:3])


@pytest.mark.parametrize("shape", [(80, 40), (80, 200)])
def test_held_out_r2_is_within_two_points_of_the_best_penalty(shape):
    x, y = _table(shape[0] + 1000, shape[1], 7, noise=0.5)
    new, wanted = x[shape[0] :].double(), y[shape[0] :].double()
    x, y = x[: shape[0]], y[: shape[0]]

    def r2(penalty):
        weight, bias = ridge(x, y, penalty)
        return float((1 - (new @ weight + bias - wanted).square().mean(0) / wanted.var(0)).mean())

    assert r2(best_penalty(x, y)) >= max(map(r2, PENALTIES)) - 0.02


def test_seven_objectives_of_a_thousand_rows_are_refitted_at_once():
    x, y = _table(1000, 1024, 7)
    began = time.process_time()
    ridge(x, y, 1.0)
    assert time.process_time() - began < 5


def test_objectives_leave_the_reward_and_the_trunk_as_they_are_bit_for_bit(tmp_path):
    trunk = torch.nn.Linear(6, 16)
    heads = reward_heads(Trunk(trunk), RewardSettings(16))
    x = torch.randn(60, 6, generator=DRAW)
    states = trunk(x).detach()
    scores = states[:, :2] * 3 + 1
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    weights = [p.clone() for p in trunk.parameters()]
    more = with_objectives(heads, states, scores, ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(weights, trunk.parameters(), strict=True))
    assert all(torch.equal(value, more.state_dict()[name]) for name, value in before.items())
    assert torch.equal(more({"input": x})["reward"], heads({"input": x})["reward"])
    found = more({"input": x})["objectives"]
    torch.testing.assert_close(found, scores, rtol=0, atol=0.05)
    metrics = more.attached["objectives"].head.metrics(found, scores)
    assert metrics["r2"] > 0.99 and metrics["tau_c of second"] > 0.9 and metrics["pair accuracy"] > 0.95
    more.save(tmp_path / "h")
    again = MultiHead.load(tmp_path / "h", Trunk(trunk))
    assert torch.equal(again({"input": x})["objectives"], found)
    assert again.attached["objectives"].head.settings.names == ("first", "second")
    with pytest.raises(InputError, match="width 6"):
        with_objectives(heads, x, scores, ("first", "second"))
    with pytest.raises(InputError, match="name of its own"):
        with_objectives(heads, states, scores, ("first",))
    with pytest.raises(InputError, match="NaN"):
        ObjectivesHead.solved(states * float("nan"), scores, ("first", "second"), 1.0)


def test_tau_c_is_that_variant_and_ordered_counts_pairs():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 60).astype(float), rng.integers(0, 3, 60).astype(float)
    b += a
    assert tau_c(a, b) == pytest.approx(stats.kendalltau(a, b, variant="c").statistic, abs=1e-12)
    assert abs(tau_c(a, b) - stats.kendalltau(a, b, variant="b").statistic) > 1e-3
    # 2 (concordant - discordant) / (n^2 (m - 1) / m), m the smaller number of different values
    signs = np.sign(np.subtract.outer(a, a)) * np.sign(np.subtract.outer(b, b))
    assert tau_c(a, b) == pytest.approx(2 * (signs.sum() / 2) / (60**2 * 3 / 4))
    pairs = [(i, j) for i in range(60) for j in range(i) if b[i] != b[j]]
    right = [(a[i] - a[j]) * (b[i] - b[j]) for i, j in pairs]
    assert ordered(a, b) == pytest.approx(np.mean([1.0 if r > 0 else 0.5 if r == 0 else 0.0 for r in right]))


def test_word_objectives_are_what_ten_ratings_say():
    ratings = torch.tensor([[1.0, 2, 2, -1, 0, 0, 3, 1, 1, -2]])
    found = word_objectives(ratings)[0]
    torch.testing.assert_close(found, torch.tensor([0.7, float(ratings.std()), -2, 3, 0.6, 0.2, 0.2]))


# The command


WORDS = ("cat", "dog", "house", "tree", "river", "stone", "bread", "light")


def _pairs(n, seed=0):
    """A preference that a model can see at the last token, and length and first words cannot tell."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        words = " ".join(rng.choice(WORDS, 3))
        out.append(AnswerPair(f"Say something, {i}: ", f"The {words}.", f"The {words}?", float(rng.integers(1, 4))))
    return tuple(out)


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def _rows(pairs):
    return [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "margin": p.margin} for p in pairs]


def _command(*arguments):
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("reward")(predict_reward)
    return CliRunner().invoke(app, ["reward", *map(str, arguments)])


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "line, match",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no object"),
        ('{"prompt": "p", "chosen": "a"}', "line 2 has no rejected; it has prompt, chosen"),
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "line 2 has the same text"),
        ('{"prompt": "p", "chosen": "a", "rejected": 3}', "rejected in .*line 2 is 3"),
        ('{"prompt": "p", "chosen": " ", "rejected": "b"}', "chosen in .*line 2"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}', "margin in .*line 2 is -1"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}', "margin in .*line 2"),
        ('{"prompt": "p", "response": "a", "rating": NaN}', "rating in .*line 2 is nan"),
        ('{"response": "a", "rating": 1}', "line 2 has no prompt"),
    ],
)
def test_a_bad_line_is_named_by_its_number_before_anything_is_opened(tmp_path, line, match):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", "utf-8")
    with pytest.raises(InputError, match=match):
        read_feedback(path)
    found = _command("no-such-model", "--pairs", path)
    assert found.exit_code == 2 and found.stderr.count("\n") == 1 and "line 2" in found.stderr


def test_files_with_too_little_are_refused_before_anything_is_opened(tmp_path):
    empty = _lines(tmp_path / "empty.jsonl", [])
    few = _lines(tmp_path / "few.jsonl", [GOOD] * 9)
    for path, said in ((empty, "holds 0 lines"), (few, "at least 10"), (tmp_path / "none.jsonl", "there is no file")):
        found = _command("no-such-model", "--pairs", path)
        assert found.exit_code == 2 and said in found.stderr
    assert "nothing was asked for" in _command("ladon").stderr
    assert "needs --heads and --out" in _command("ladon", "--score", few).stderr
    both = _command("ladon", "--score", few, "--heads", tmp_path, "--out", tmp_path / "o", "--tune")
    assert "does not go with --tune" in both.stderr
    assert "--heads says whose" in _command("ladon", "--pairs", few, "--heads", tmp_path).stderr
    assert "give a number, or best" in _command("no-such", "--pairs", few, "--layer", "last").stderr
    assert "choose from regular" in _command("no-such", "--pairs", few, "--objective", "rating").stderr
    there = tmp_path / "there"
    there.mkdir()
    assert "already exists" in _command("no-such", "--pairs", few, "--out", there).stderr


def test_ratings_make_pairs_within_a_prompt_and_a_prompt_is_in_one_part():
    rated = tuple(RatedAnswer(f"p{i // 3}", f"a{i}", float(i % 3 // 2)) for i in range(36))
    pairs = Feedback(rated=rated).compared
    assert len(pairs) == 24 and all(int(p.chosen[1:]) // 3 == int(p.rejected[1:]) // 3 for p in pairs)
    assert all(int(p.chosen[1:]) % 3 == 2 and p.margin == 1 for p in pairs)
    first, second = split_feedback(Feedback(_pairs(6), rated), 0.25, seed=3)
    prompts = [{one.prompt for one in (*part.pairs, *part.rated)} for part in (first, second)]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 18
    assert len(first.rated) + len(second.rated) == 36 and second.rated
    assert Feedback((AnswerPair("p", "a", "b", 0.0),)).compared == ()


@pytest.fixture(scope="module")
def ladon():
    return mh.open_model()


@pytest.fixture(scope="module")
def run(ladon):
    return train_reward(ladon, Feedback(_pairs(100)), Feedback(_pairs(60, seed=9)), exportable=True)


def test_a_head_finds_what_is_preferred_where_length_and_chance_do_not(ladon, run):
    found = run.table.set_index("scorer")
    assert found.loc["reward head", "pair accuracy"] > 0.95 and found.loc["reward head", "pairs"] == 60
    assert found.loc["shorter answer" if "shorter answer" in found.index else "longer answer", "pair accuracy"] == 0.5
    assert found.loc["words counted", "pair accuracy"] > 0.95  # a full stop is a word there
    p = found.loc["random head", "pair accuracy"]
    assert found.loc["random head", "stderr"] == pytest.approx((p * (1 - p) / 59) ** 0.5)


def test_scores_are_the_heads_own_on_plain_states_and_padding_changes_nothing(ladon, run):
    answers = [
        (pair.prompt, text) for pair in _pairs(5, seed=2) for text in (pair.chosen, pair.rejected + " And more.")
    ]
    found = reward_scores(run.heads, answers)
    for answer, score in zip(answers, found, strict=True):
        state = Trunk(ladon).states(ladon.inputs("".join(answer)), -1, "last")
        torch.testing.assert_close(run.heads.heads["reward"](state)[0, 0].detach(), score, rtol=1e-3, atol=1e-4)
    again = reward_scores(run.heads, [answers[3], answers[0], answers[3]])
    torch.testing.assert_close(again, found[[3, 0, 3]], rtol=1e-3, atol=1e-4)


def test_a_frozen_trunk_stays_and_a_head_comes_back_and_is_exported(ladon, run, tmp_path):
    assert ladon.fingerprint == mh.open_model().fingerprint
    answers = [("Say: ", "The cat."), ("Say: ", "The cat?")]
    found = reward_scores(run.heads, answers)
    assert found[0] > found[1]
    run.heads.save(tmp_path / "h")
    assert torch.equal(reward_scores(MultiHead.load(tmp_path / "h", ladon), answers), found)
    made = sequence_classifier(run.heads, "reward")
    logits = made(**ladon.inputs(["Say: The cat."])).logits[:, 0]
    torch.testing.assert_close(logits.detach(), found[:1], rtol=1e-3, atol=1e-4)
    assert made.config.num_labels == 1


def test_a_model_in_half_precision_is_read_and_exported():
    model = mh.open_model(dtype="bfloat16")
    run = train_reward(model, Feedback(_pairs(40)), Feedback(_pairs(20, seed=9)), exportable=True)
    assert run.table["pair accuracy"][0] > 0.9
    assert sequence_classifier(run.heads, "reward").dtype == torch.bfloat16


def test_what_cannot_be_done_is_refused_before_training(ladon):
    feedback = Feedback(_pairs(30))
    with pytest.raises(UnsupportedError, match="reads other states"):
        train_reward(ladon, feedback, exportable=True, layer=2)
    with pytest.raises(InputError, match="no layer 40"):
        train_reward(ladon, feedback, layer=40)
    with pytest.raises(InputError, match="choose from regular"):
        train_reward(ladon, feedback, objective="rating")
    with pytest.raises(InputError, match="no pair to test on"):
        train_reward(ladon, feedback, feedback)
    ties = Feedback(tuple(replace(pair, margin=0.0) for pair in _pairs(30)))
    with pytest.raises(InputError, match="0 preferences"):
        train_reward(ladon, ties, Feedback(_pairs(9, seed=4)))


def test_ratings_are_learned_in_their_own_unit_and_both_kinds_together(ladon):
    def rated(n, seed):
        return tuple(
            RatedAnswer(f"r{seed}-{i // 2}", pair.chosen if i % 2 else pair.rejected, 3.0 + 2 * (i % 2))
            for i, pair in enumerate(_pairs(n, seed))
        )

    answers = [("Say: ", "The stone."), ("Say: ", "The stone?")]
    settings = replace(FROZEN, rate=5e-3, epochs=60)
    run = train_reward(ladon, Feedback(rated=rated(120, 0)), Feedback(rated=rated(30, 1)), settings=settings)
    good, bad = reward_scores(run.heads, answers).tolist()
    assert abs(good - 5) < 1 and abs(bad - 3) < 1 and good - bad > 0.8
    assert run.table["pair accuracy"][0] > 0.95 and any("share answers" in note for note in run.notes)
    both = train_reward(ladon, Feedback(_pairs(60), rated(60, 2)), Feedback(_pairs(30, seed=5)))
    assert both.table["pair accuracy"][0] > 0.95
    assert both.heads.attached["reward"].head.settings.objective == "scaled"


def test_a_trunk_that_is_tuned_is_saved_with_its_head_and_the_command_scores_by_it(tmp_path):
    train = _lines(tmp_path / "train.jsonl", _rows(_pairs(24)))
    test = _lines(tmp_path / "test.jsonl", _rows(_pairs(10, seed=3)))
    more = ("--tune", "--epochs", 1, "--rate", 1e-4, "--out", tmp_path / "h", "--export", tmp_path / "rm")
    found = _command("ladon", "--pairs", train, "--test", test, *more)
    assert found.exit_code == 0, found.output + found.stderr
    assert "reward head" in found.output and "24 pairs" in found.output
    rows = [{"prompt": "Say: ", "response": "The cat.", "id": 7}, _rows(_pairs(1))[0]]
    scores = _lines(tmp_path / "score.jsonl", rows)
    out = tmp_path / "scores.jsonl"
    found = _command("ladon", "--heads", tmp_path / "h", "--score", scores, "--out", out)
    assert found.exit_code == 0, found.output + found.stderr
    first, second = (json.loads(line) for line in out.read_text("utf-8").splitlines())
    assert first["id"] == 7 and isinstance(first["score"], float)
    assert set(second) >= {"chosen_score", "rejected_score"}
    heads = MultiHead.load(tmp_path / "h")
    assert heads.trunk.model.fingerprint != mh.open_model().fingerprint
    assert reward_scores(heads, [("Say: ", "The cat.")])[0] == pytest.approx(first["score"], abs=1e-5)
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    ids = AutoTokenizer.from_pretrained(tmp_path / "rm")("Say: The cat.", return_tensors="pt")["input_ids"]
    assert exported(input_ids=ids).logits.item() == pytest.approx(first["score"], rel=1e-3, abs=1e-4)
    assert TUNED.rate < FROZEN.rate


def test_a_trunk_is_tuned_from_the_head_that_was_trained_on_it_frozen():
    feedback, test = Feedback(_pairs(30)), Feedback(_pairs(10, seed=9))
    answers = [("Say: ", "The cat."), ("Say: ", "The cat?")]
    probe, still = (
        reward_scores(train_reward(mh.open_model(), feedback, test, tune=tune, settings=settings).heads, answers)
        for tune, settings in ((False, None), (True, replace(TUNED, rate=0.0, epochs=1)))
    )
    torch.testing.assert_close(still, probe, rtol=1e-3, atol=1e-4)


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


def test_a_chat_template_is_used_as_it_is_and_long_texts_lose_their_beginning():
    model = mh.open_model()
    assert conversations(model, [("One ", "two")]) == ["One two"]
    plain = model.tokenizer("One two")["input_ids"]
    assert tokens_of_texts(model, ["One two"], 99) == ([plain], 0)
    assert tokens_of_texts(model, ["One two"], 1) == ([plain[-1:]], 1)
    model.tokenizer.chat_template = TEMPLATE
    text = "<user>One</s><assistant>two</s>"
    assert conversations(model, [("One", "two")]) == [text]
    ids, _ = tokens_of_texts(model, [text], 99)
    assert ids[0] == model.tokenizer(text, add_special_tokens=False)["input_ids"]
    both = answer_states(model, [ids[0], ids[0][:4]], [2, -1], rows=2)
    for layer, states in zip((2, -1), both, strict=True):
        torch.testing.assert_close(states[1:], answer_states(model, [ids[0][:4]], [layer])[0], rtol=1e-3, atol=1e-4)


def test_the_best_layer_is_the_one_whose_head_does_best_on_what_was_left_out(ladon):
    feedback, test = Feedback(_pairs(60)), Feedback(_pairs(20, seed=9))
    short = replace(FROZEN, epochs=6)
    found = train_reward(ladon, feedback, test, layer="best", settings=short)
    layer = found.heads.attached["reward"].layer
    assert layer in (-1, 2, 3, 4, 5) and f"layer {layer}, the best of -1, 2, 3, 4, 5" in found.notes[0]
    alone = train_reward(ladon, feedback, test, layer=layer, settings=short)
    for one, other in zip(found.heads.heads.parameters(), alone.heads.heads.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(InputError, match="frozen trunk"):
        train_reward(ladon, feedback, test, layer="best", tune=True)
