"""`manyheads edit` as people use it: goals, learning from tasks and from their own examples, interruptions, repair."""

import json
import os
import signal
from dataclasses import replace
from functools import cache

import pytest
import torch
from typer.testing import CliRunner

import manyheads as mh
from manyheads.atlas.circuits.repair import turning_heads, wrong_columns
from manyheads.cli import app
from manyheads.cli.rooms.edit import GOALS, for_goal
from manyheads.edit.learn import tuning
from manyheads.edit.learn.examples import Answered, demonstrated, of_file, of_task, swapped, task_of
from manyheads.edit.learn.selective_tuning import tune_heads, tuning_effects
from manyheads.edit.learn.tuning import LEARNING, answer_accuracy, mean_loss, prompt_length
from manyheads.errors import InputError
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.tasks import TASKS, encode
from manyheads.training.checkpoint import states
from manyheads.training.head_slices import head_slices

FRENCH = "by_example:relation=french,shots=0"
QUICK = ["--n", 60, "--steps", 6, "--no-measure"]


@cache
def ladon():
    return mh.open_model()


def run(*arguments):
    return CliRunner().invoke(app, ["edit", *map(str, arguments)])


def words(result):
    return " ".join(result.output.split())


@pytest.fixture
def examples(tmp_path):
    """A file of facts that ladon does not know; answers of one token and of two."""
    file = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": f"Box {i} holds the", "answer": " lamp" if i % 2 else " red lamp", "foil": " cup"} for i in range(20)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", "utf-8")
    return file


# Goals


@pytest.mark.parametrize(
    ("goal", "wanted"),
    [
        ("prefer context", "prefer M context"),
        ("Prefer  Memory", "prefer M memory"),
        ("learn ioi", "learn M --method lofit --task ioi"),
        ("inject by_example:relation=french", "learn M --method inject --task by_example:relation=french"),
        ("tune arithmetic", "learn M --method tune --task arithmetic"),
        ("repair coloured objects", "repair M --task coloured_objects"),
    ],
)
def test_a_goal_is_a_command(goal, wanted):
    assert for_goal("M", goal) == wanted.split()


def test_every_goal_leads_to_a_command_that_exists():
    for goal in GOALS:
        name, *rest = for_goal("ladon", goal.replace("TASK", "ioi"))
        assert run(name, *rest, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ladon", "--goal", "be nice"],
            "there is no goal 'be nice'; the goals are prefer context, prefer memory, learn TASK",
        ),
        (["ladon", "--goal"], "there is no goal ''"),
        (["ladon"], "'ladon' is no command of manyheads edit (scale, prefer, learn, repair"),
        (["--goal", "prefer memory"], "no model was given"),
        (["ladon", "--goal", "learn juggling", "--out", "x"], "there is no task 'juggling'"),
    ],
)
def test_wrong_goals_are_one_sentence_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in words(result), result.output


@pytest.mark.slow
def test_a_goal_writes_what_its_command_writes(tmp_path):
    more = ["--n", 16, "--heads", 2, "--no-measure"]
    assert run("ladon", "--goal=prefer memory", *more, "--out", tmp_path / "a").exit_code == 0
    told = run("prefer", "ladon", "memory", *more, "--out", tmp_path / "b")
    assert told.exit_code == 0
    assert "Facts recalled where no prompt contradicts them: 1.00 before" in words(told)
    a, b = (HeadEdit.load(tmp_path / name) for name in "ab")
    assert a.heads == b.heads and torch.equal(a.scale, b.scale) and a.effect == b.effect
    assert a.effect["after"]["memory"] > a.effect["before"]["memory"]


# Examples


def test_a_task_has_settings_and_says_which():
    task = task_of(FRENCH)
    assert (task.relation, task.shots, task.name) == ("french", 0, "by_example")
    for given, message in (
        ("by_example:colour=red", "has no setting 'colour'; it has shots, relation"),
        ("by_example:shots=few", "give a number"),
        ("counterfactual:form=odd", "choose from marked, context, memory, bare"),
        ("juggling", "there is no task"),
    ):
        with pytest.raises(InputError, match=message):
            task_of(given)


def test_no_prompt_is_both_learned_and_judged(examples):
    for portions in (
        of_task(task_of("counterfactual:form=bare"), 100),
        of_task(task_of(FRENCH), 100),
        of_file(examples),
    ):
        parts = [{e.prompt for e in part} for part in (portions.train, portions.dev, portions.test)]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert [len(part) for part in vars(of_file(examples)).values()] == [12, 4, 4]


def test_lines_that_are_no_examples_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    for text, message in (
        ('{"prompt": "a", "answer": " b"}\nnonsense', "line 2 is not JSON"),
        ('{"prompt": "a"}', "line 1 is no"),
        ('{"prompt": "a", "answer": 3}', "line 1 is no"),
        ("[1]", "line 1 is no"),
        ('{"prompt": "a", "answer": " b"}', "has 1 different prompts"),
    ):
        file.write_text(text, "utf-8")
        with pytest.raises(InputError, match=message):
            of_file(file)
    with pytest.raises(InputError, match="there is no file"):
        of_file(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no token of its own"):
        Answered.of_texts(ladon(), ["The co"], ["lour"])


def test_answers_begin_in_one_column_whatever_their_lengths(examples):
    portions = of_file(examples)
    some = Answered.of_texts(ladon(), [e.prompt for e in portions.train], [e.answer for e in portions.train])
    assert {int(n) for n in some.is_answer.sum(1)} == {1, 2}
    start = prompt_length(some)
    for row, example in zip(range(len(some)), portions.train, strict=True):
        ids = some.input_ids[row][some.attention_mask[row].bool()]
        assert ids.tolist() == ladon().tokenizer(example.prompt + example.answer)["input_ids"]
        assert some.is_answer[row, start] and not some.is_answer[row, :start].any()


def test_demonstrations_are_other_examples_with_their_answers(examples):
    train = of_file(examples).train
    for prompt in demonstrated(train, 3, n=5):
        *shown, asked = prompt.split("\n")
        assert len(shown) == len(set(shown)) == 3 and not any(line.startswith(asked) for line in shown)
        assert set(shown) <= {e.prompt + e.answer for e in train} and asked in {e.prompt for e in train}
    with pytest.raises(InputError, match="there must be more examples"):
        demonstrated(train, len(train))


# Learning


def test_own_examples_become_an_edit_whose_file_says_what_applying_it_gives(tmp_path, examples):
    out = tmp_path / "edit"
    more = ["--heads", "L2H4,L3H1", "--epochs", 6, "--controls", 1, "--no-measure"]
    result = run("learn", "ladon", "--method", "lofit", "--examples", examples, *more, "--out", out)
    assert result.exit_code == 0 and "answered right" in result.output, result.output
    edit, test = HeadEdit.load(out), of_file(examples).test
    held_out = Answered.of_texts(ladon(), [e.prompt for e in test], [e.answer for e in test])
    right = edit.effect["right"]
    assert right["before"] == pytest.approx(answer_accuracy(ladon(), held_out))
    assert right["after"] == pytest.approx(answer_accuracy(ladon(), held_out, edit.edits()))
    assert right["n"] == 4 and len(right["random"]) == 1 and edit.effect["held-out loss"] > 0
    assert [str(h) for h in edit.heads] == ["L2H4", "L3H1"] and (edit.scale == 1).all()
    assert not out.with_name("edit.work").exists()


def test_preferences_are_learned_where_asked(tmp_path):
    given = ["--task", "counterfactual:form=bare", "--swap", "--loss", "preferences", "--beta", 0.3, "--heads", "L2H4"]
    result = run("learn", "ladon", "--method", "lofit", *given, *QUICK, "--out", tmp_path / "edit")
    assert result.exit_code == 0, result.output
    edit = HeadEdit.load(tmp_path / "edit")
    assert edit.settings["beta"] == 0.3 and edit.effect["loss"] == "preferences" and edit.effect["swapped"]
    no_foils = tmp_path / "plain.jsonl"
    no_foils.write_text("\n".join(json.dumps({"prompt": f"Box {i} is", "answer": " red"}) for i in range(9)), "utf-8")
    result = run("learn", "ladon", "--method", "lofit", "--examples", no_foils, *given[3:], "--out", tmp_path / "x")
    assert result.exit_code == 2 and "foil" in words(result)


def test_injection_is_saved_exactly_and_measured_beside_shuffled_gates(tmp_path):
    out = tmp_path / "edit"
    more = ["--steps", 40, "--n", 120, "--controls", 2, "--no-measure"]
    result = run("ladon", "--goal", "inject by_example:relation=french", *more, "--out", out)
    assert result.exit_code == 0, result.output
    edit, test = HeadEdit.load(out), of_task(task_of(FRENCH), 120).test
    held_out = Answered.of_texts(ladon(), [e.prompt for e in test], [e.answer for e in test])
    found = answer_accuracy(ladon(), held_out, edit.edits(prompt_length=prompt_length(held_out)))
    right = edit.effect["right"]
    assert edit.at == "prompt" and found == pytest.approx(right["after"])
    assert right["after"] > max(right["before"], sum(right["random"]) / 2) + 0.2


def test_tuned_heads_are_a_checkpoint_that_says_what_was_done(tmp_path):
    out = tmp_path / "model"
    given = ["--method", "tune", "--task", FRENCH, "--heads", "L3H1,L4H2", "--mlps", "5", "--rate", 1e-3]
    result = run("learn", "ladon", *given, *QUICK, "--out", out)
    assert result.exit_code == 0 and "an ordinary checkpoint" in words(result), result.output
    tuned, about = mh.open_model(out), json.loads((out / "manyheads_tuning.json").read_text())
    assert about["of"] == ladon().fingerprint and about["fingerprint"] == tuned.fingerprint
    assert about["tuned"] == "L3H1, L4H2 and MLPs 5"
    touched = {id(piece.module) for piece in head_slices(tuned, ["L3H1", "L4H2"])}
    before = ladon().plain.state_dict()
    for name, module in tuned.plain.named_modules():
        for key, value in module.named_parameters(recurse=False):
            same = torch.equal(value, before[f"{name}.{key}"])
            assert same != (id(module) in touched or "layers.5.mlp" in name), name


def test_an_interrupted_command_goes_on_to_the_same_edit(tmp_path, monkeypatch):
    given = ["learn", "ladon", "--method", "lofit", "--task", FRENCH, "--heads", "L2H4,L4H1", "--n", 60, "--no-measure"]
    given += ["--epochs", 5, "--patience", 20]
    assert run(*given, "--out", tmp_path / "whole").exit_code == 0
    out, work, measured = tmp_path / "parted", tmp_path / "parted.work", []

    def interrupting(*args, **kwargs):
        measured.append(mean_loss(*args, **kwargs))
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return measured[-1]

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "mean_loss", interrupting)
        stopped = run(*given, "--out", out)
    assert stopped.exit_code == 130 and "what was done is kept in" in words(stopped), stopped.output
    assert not out.exists() and len(states(work / "chosen" / "tuning")) == 1 and len(measured) == 2
    other = run(*given, "--rate", 0.5, "--out", out)
    assert other.exit_code == 2 and "is not the work of this call" in words(other)
    again = run(*given, "--out", out)
    assert again.exit_code == 0 and not work.exists(), again.output
    whole, parted = (HeadEdit.load(tmp_path / name) for name in ("whole", "parted"))
    assert torch.allclose(whole.shift, parted.shift, atol=1e-6) and (
        whole.effect["held-out loss"] == pytest.approx(parted.effect["held-out loss"], abs=1e-5)
    )


def test_a_work_folder_that_was_asked_for_stays_and_is_not_mixed_up(tmp_path):
    given = ["learn", "ladon", "--method", "lofit", "--task", FRENCH, "--heads", "L2H4", *QUICK]
    assert run(*given, "--out", tmp_path / "a", "--work", tmp_path / "work").exit_code == 0
    assert (tmp_path / "work" / "request.json").is_file()
    assert run(*given, "--out", tmp_path / "b", "--work", tmp_path / "work").exit_code == 0
    a, b = (HeadEdit.load(tmp_path / name) for name in "ab")
    assert torch.equal(a.shift, b.shift) and a.effect == b.effect
    mine = tmp_path / "mine"
    mine.mkdir()
    assert run(*given, "--out", tmp_path / "c", "--work", mine).exit_code == 2
    assert mine.is_dir() and not (tmp_path / "c").exists()


def test_wrong_use_of_learning_is_one_sentence_and_exit_code_2(tmp_path, examples):
    out = ["--out", tmp_path / "x"]
    for arguments, message in (
        (["--method", "lofit"], "either --task or --examples"),
        (["--method", "lofit", "--task", "ioi", "--examples", examples], "either --task or --examples"),
        (["--method", "lofit", "--task", "ioi", "--heads", "0"], "the number of heads is 0"),
        (["--method", "tune", "--task", "ioi", "--heads", "L0H0", "--mlps", "a"], "are no layers"),
        (["--method", "tune", "--task", "ioi", "--heads", "L0H0", "--mlps", "9"], "layers 0-5"),
        (["--method", "inject", "--examples", examples, "--shots", "50"], "there must be more examples"),
    ):
        result = run("learn", "ladon", *arguments, *out, "--n", 20)
        assert result.exit_code == 2 and message in words(result), result.output
        assert not (tmp_path / "x").exists()


def test_side_effects_of_a_tuned_model_are_those_of_running_both():
    model = ladon()
    portions = of_task(task_of("facts"), 40)
    given = Answered.of_texts(
        model, [e.prompt for e in swapped(portions.train)], [e.answer for e in swapped(portions.train)]
    )
    tuned = tune_heads(model, given, ["L5H0", "L4H1"], settings=replace(LEARNING, rate=5e-3, steps=8, rows=8))
    found = tuning_effects(model, tuned, tasks=["facts"], n=16).table.set_index("measure")
    batch = encode(TASKS["facts"], model.tokenizer, 16)
    inputs = batch.inputs
    for column, one in (("before", model), ("after", tuned)):
        assert found.loc["facts", column] == pytest.approx(mh.tasks.accuracy(one.logits(inputs)[:, -1], batch))
    assert found.loc["text", "after"] > found.loc["text", "before"] and found.loc["text", "stderr"] > 0
    assert not tuning_effects(model, model, tasks=["facts"], n=16).table["change"].any()


# Repair


def test_a_repair_beats_random_heads_and_is_not_saved_as_an_edit(tmp_path):
    out = tmp_path / "repair.json"
    goal = ["--goal", "repair counterfactual:form=bare", "--swap", "--heads", 3, "--n", 16]
    result = run("ladon", *goal, "--out", out)
    assert result.exit_code == 0 and "cannot be baked" in words(result), result.output
    found = json.loads(out.read_text())
    assert found["after"] >= found["before"] + 0.2 and found["after"] > max(found["random"])
    assert found["new_errors"] <= 0.05 and len(found["heads"]) == 3 and found["fingerprint"] == ladon().fingerprint


def test_wrong_answers_are_found_in_the_prompt():
    model = ladon()
    plain = encode(TASKS["coloured_objects"], model.tokenizer, 12)
    columns = wrong_columns(plain)
    assert torch.equal(plain.input_ids.gather(1, columns)[:, 0], plain.foil_ids)
    with pytest.raises(InputError, match="not every prompt holds its foil"):
        wrong_columns(encode(TASKS["arithmetic"], model.tokenizer, 12))
    with pytest.raises(InputError, match="asked for 0 heads"):
        turning_heads(model, plain, columns, 0)
