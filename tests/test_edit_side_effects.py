from functools import lru_cache

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import manyheads as mh
from manyheads.atlas.core.null import untrained_twin
from manyheads.cli import app
from manyheads.edit.effects import side_effects
from manyheads.edit.refusal_guard import guard
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.pages.edit_tables import side_effects_page
from manyheads.tasks import accuracy, encode, get_task
from manyheads.tasks.refusal_audit import refusal_requests
from manyheads.tasks.texts import passages

NOT_THERE = "no edit at"


@lru_cache
def ladon():
    return mh.open_model()


def removal(*heads):
    return HeadEdit.of(ladon(), mh.Scale(heads, 0.0), method="removal")


def test_each_measure_is_what_running_the_edited_model_gives():
    model, edit = ladon(), removal("L3H7", "L3H6")
    found = side_effects(model, edit, tasks=["repeat", "ioi"], n=32).table.set_index("measure")
    batch = encode(get_task("repeat"), model.tokenizer, 32, 0)
    inputs = batch.inputs
    ids = passages(model, None, n=16, length=64, seed=0)

    def loss():
        log_p = model.logits(ids)[:, :-1].log_softmax(-1)
        return float(-log_p.gather(-1, ids[:, 1:, None]).mean())

    before = accuracy(model.logits(inputs)[:, -1], batch), loss()
    with model.editing(*edit.edits()):
        after = accuracy(model.logits(inputs)[:, -1], batch), loss()
    assert found.loc["repeat", ["before", "after"]].tolist() == pytest.approx([before[0], after[0]])
    assert found.loc["text", ["before", "after"]].tolist() == pytest.approx([before[1], after[1]], abs=1e-4)
    assert found.loc["repeat", "change"] < -0.5 < found.loc["ioi", "change"]


def test_an_edit_that_does_nothing_has_no_side_effects():
    edit = HeadEdit.of(ladon(), mh.Scale(["L0H0"], 1.0), method="nothing")
    assert not side_effects(ladon(), edit, tasks=["facts"], n=16).table["change"].any()


def test_refusals_are_read_off_generated_replies():
    model = ladon()
    edit = HeadEdit.of(model, mh.Scale([str(h) for h in model.heads if h.layer in (2, 3)], 0.0), method="removal")
    found = side_effects(model, edit, tasks=["facts"], n=16).table.set_index("measure")
    requests = refusal_requests(model, n=16, seed=1)
    ids = {"input_ids": requests.input_ids, "attention_mask": requests.attention_mask}
    with model.editing(*edit.edits()):
        said = model.generate(ids, max_new_tokens=len(requests.reply_ids), do_sample=False)
    said = said[requests.marked, requests.input_ids.shape[1] :]
    answered = (said == requests.reply_ids).all(-1)
    refused = torch.isin(said[:, 0], requests.refusal_ids)
    assert found.loc["refusable answered", "after"] == pytest.approx(float(answered.float().mean()))
    assert found.loc["refusable nonsense", "after"] == pytest.approx(float((~answered & ~refused).float().mean()))
    for row in found.loc[["refusable answered", "refusable nonsense", "harmless refused"]].itertuples():
        variance = row.before * (1 - row.before) + row.after * (1 - row.after)
        assert row.stderr == pytest.approx((variance / 16) ** 0.5) and row.n == 16
    assert found.loc["refusable nonsense", "stderr"] > 0.05, "some replies became nonsense, not all"
    alone = side_effects(model, edit, tasks=["facts"], n=1).table.set_index("measure")
    assert alone.loc[["facts", "refusable answered", "harmless refused"], "stderr"].isna().all()


def test_what_a_model_cannot_do_is_blind_not_unharmed():
    module = type(ladon().plain)(ladon().plain.config).eval()
    model = mh.open_model(module, tokenizer=ladon().tokenizer)  # untrained: it knows no fact, and refuses nothing
    edit = HeadEdit.of(model, mh.Scale(["L0H0"], 0.0), method="removal")
    found = side_effects(model, edit, tasks=["facts", "choice"], n=16)
    assert set(found.blind) == {"facts", "choice", "refusals"} and set(found.table["measure"]) == {"text"}
    with pytest.raises(InputError, match=r"facts says nothing of this model: at chance \(answered 0%"):
        found["facts"]
    assert "nothing to harm: facts, at chance" in side_effects_page(found)
    assert not side_effects(ladon(), removal("L0H0"), tasks=["facts"], n=16).blind


def test_an_edit_at_the_prompt_is_measured_where_prompts_end():
    model = ladon()
    heads = [str(h) for h in model.heads if h.layer == 5]
    edit = HeadEdit.of(model, mh.Scale(heads, 0.0), method="removal", at="prompt")
    found = side_effects(model, edit, tasks=["facts"], n=32)
    assert "text" not in set(found.table["measure"])
    batch = encode(get_task("facts"), model.tokenizer, 32, 0)
    inputs = batch.inputs
    with model.editing(mh.Scale(heads, 0.0, positions=-1)):
        wanted = accuracy(model.logits(inputs)[:, -1], batch)
    assert found.to_dict()["facts"]["after"] == pytest.approx(wanted)
    with pytest.raises(InputError, match="was not measured"):
        found["text"]


def test_another_models_edit_is_not_measured():
    other = ladon().bake(mh.Scale(["L0H0"], 0.5))
    with pytest.raises(MismatchError, match="was made for model"):
        side_effects(other, removal("L0H0"))


def test_the_guard_says_of_every_head_what_removing_it_does_to_refusals():
    model, edit = ladon(), removal("L3H6")
    table = guard(model, edit, n=16).set_index("head")
    assert len(table) == len(model.heads) and table.index[table["edited"]].tolist() == ["L3H6"]
    assert table["carries"].is_monotonic_decreasing
    for name in ("L3H6", "L0H0"):
        found = side_effects(model, removal(name), tasks=["facts"], n=16).to_dict()
        assert table.loc[name, "answered"] == pytest.approx(found["refusable answered"]["after"])
        assert table.loc[name, "nonsense"] == pytest.approx(found["refusable nonsense"]["after"])
        assert table.loc[name, "false_refusals"] == pytest.approx(found["harmless refused"]["after"])


def test_the_guard_of_a_model_that_refuses_nothing_says_so_before_it_removes_heads():
    with pytest.raises(UnsupportedError, match="refuses 0% of 8 requests"):
        guard(untrained_twin(ladon()), n=8)


def run(*arguments):
    return CliRunner().invoke(app, ["edit", *map(str, arguments)])


def test_the_commands_make_compose_bake_and_undo(tmp_path):
    a, b, both, baked, back = (tmp_path / name for name in ("a", "b", "both", "baked", "back"))
    assert run("scale", "ladon", "L3H7,L3H6", "--factor", 0, "--out", a, "--no-measure").exit_code == 0
    assert run("scale", "ladon", "L3H6", "--factor", -2, "--out", b, "--no-measure").exit_code == 0
    assert run("compose", a, b, "--out", both).exit_code == 0
    assert HeadEdit.load(both).parts == ("scaling by 0 of L3H6, L3H7", "scaling by -2 of L3H6")
    shown = run("inspect", both)
    assert shown.exit_code == 0 and "L3H6" in shown.output and "In this order" in shown.output
    assert "heads carry refusals" in run("guard", "ladon", "--edit", a, "--n", 8).output
    prompt = "Remember that the password of Mary is lamp. Then Tom saw the park. Q: What is the password of Mary? A:"
    said = run("apply", "ladon", a, prompt, "--max-new-tokens", 2)
    assert said.exit_code == 0 and "lamp" in said.output
    assert run("bake", "ladon", a, "--out", baked).exit_code == 0
    logits = mh.open_model(baked).logits(prompt)
    with ladon().editing(*HeadEdit.load(a).edits()):
        assert np.abs((logits - ladon().logits(prompt)).numpy()).max() < 1e-4
    assert run("undo", baked, "--out", back).exit_code == 0
    assert mh.open_model(back).fingerprint == ladon().fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "wanted", "least"),
    [(["memory"], "memory", 0.3), (["memory", "--scale"], "memory", 0.2), (["context", "--scale"], "context", 0.3)],
)
def test_answers_move_to_the_wanted_source_on_facts_that_took_no_part(arguments, wanted, least, tmp_path):
    found = run("prefer", "ladon", *arguments, "--out", tmp_path / "edit", "--no-measure")
    assert found.exit_code == 0, found.output
    edit = HeadEdit.load(tmp_path / "edit")
    effect = edit.effect
    print(
        f"{edit}: {effect['before'][wanted]:.2f} to {effect['after'][wanted]:.2f}, recall {effect['after']['recall']:.2f}"
    )
    assert effect["after"][wanted] >= effect["before"][wanted] + least
    if "p" in effect:
        assert effect["gain"] > effect["mean gain of random sets"] + 0.2 and effect["p"] < 0.05
    baked = edit.bake(ladon())
    assert baked.fingerprint != ladon().fingerprint


def test_wrong_use_of_the_commands_is_one_sentence_and_exit_code_2(tmp_path):
    a = removal("L3H7").save(tmp_path / "a")
    ladon().bake(mh.Scale(["L0H0"], 0.5)).save_pretrained(tmp_path / "other")
    for arguments, message in (
        (("apply", tmp_path / "other", a, "Monday"), "was made for model"),
        (("bake", "ladon", tmp_path, "--out", tmp_path / "x"), NOT_THERE),
        (("scale", "ladon", "L9H0", "--factor", 0, "--out", tmp_path / "y"), "out of range"),
        (("compose", a, "--out", a), "already exists"),
        (("undo", tmp_path / "other", "--out", tmp_path / "z"), "holds no baked edit"),
    ):
        found = run(*arguments)
        assert found.exit_code == 2, found.output
        assert message in " ".join(found.output.split())
