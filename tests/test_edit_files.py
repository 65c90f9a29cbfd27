import json
from dataclasses import replace

import pytest
import torch
from architectures import build, inputs_for, opened
from safetensors.torch import save_file

import manyheads as mh
from manyheads.edit.checkpoint import save_baked, undo
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.model.editing.edits import Affine
from manyheads.model.editing.head_edit import HeadEdit, compose

SCALING = ["llama", "gpt2", "qwen3", "gemma2", "gpt_neox", "falcon", "opt"]
SHIFTING = ["llama", "gpt2", "gpt_neox", "opt"]  # their output projections have a bias, or can be given one


def some(model, shift=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, model.head_dim, generator=generator) * (0.5 if shift else 0.0)
    edit = Affine(["L0H1", "L2H3"], scales=torch.tensor([0.5, -2.0]), shifts=vectors)
    return HeadEdit.of(model, edit, method="test", found="by hand", effect={"accuracy": 0.5})


@pytest.mark.parametrize("name", SCALING)
def test_an_edit_is_the_same_after_saving_and_a_few_kilobytes(name, tmp_path):
    model, inputs = opened(name), inputs_for(name)
    edit = some(model)
    again = HeadEdit.load(edit.save(tmp_path / "edit"))
    assert sum(file.stat().st_size for file in (tmp_path / "edit").iterdir()) < 10_000
    with model.editing(*edit.edits()):
        wanted = model.logits(inputs)
    with model.editing(*again.edits()):
        assert torch.equal(model.logits(inputs), wanted)
    assert again.heads == edit.heads and again.effect == {"accuracy": 0.5} and str(again) == "test of L0H1, L2H3"
    assert (wanted - model.logits(inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_an_edit_that_is_not_finite_is_refused_when_made_and_when_loaded(wrong, tmp_path):
    """One number among many is enough, of the scales as of the shifts."""
    good = some(opened("llama"))
    for part in ("scale", "shift"):
        values = getattr(good, part).clone()
        values.view(-1)[-1] = wrong
        with pytest.raises(InputError, match="must be finite numbers"):
            replace(good, **{part: values})
        folder = good.save(tmp_path / part)
        tensors = {"scale": good.scale, "shift": good.shift} | {part: values}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "edit.safetensors")
        with pytest.raises(InputError, match=f"{part}.* holds NaN or infinity"):
            HeadEdit.load(folder)


@pytest.mark.parametrize("name", SHIFTING)
def test_baked_equals_edited_and_undone_equals_before_bit_for_bit(name, tmp_path):
    model, inputs = mh.open_model(build(name)), inputs_for(name)
    edit = some(model)
    with model.editing(*edit.edits()):
        wanted = model.logits(inputs)
    folder = save_baked(model, edit, tmp_path / "baked")
    baked = mh.open_model(folder)
    assert (baked.logits(inputs) - wanted).abs().max() < 1e-4
    restored = undo(folder)
    assert restored.fingerprint == model.fingerprint != baked.fingerprint
    assert torch.equal(restored.logits(inputs), model.logits(inputs))


@pytest.mark.parametrize("name", SCALING)
def test_scaling_bakes_and_undoes_on_architectures_without_room_for_a_bias(name, tmp_path):
    model = mh.open_model(build(name))
    folder = save_baked(model, some(model, shift=False), tmp_path / "baked")
    assert undo(folder).fingerprint == model.fingerprint


def test_a_checkpoint_that_changed_after_baking_is_not_undone(tmp_path):
    model = mh.open_model(build("llama"))
    folder = save_baked(model, some(model, shift=False), tmp_path / "baked")
    changed = mh.open_model(folder)
    changed.plain.lm_head.weight.data[0, 0] += 1
    changed.plain.save_pretrained(folder)
    with pytest.raises(MismatchError, match="have changed since"):
        undo(folder)
    with pytest.raises(InputError, match="holds no baked edit"):
        undo(tmp_path)


def test_strength_goes_from_nothing_to_all():
    model, inputs = opened("llama"), inputs_for("llama")
    edit = some(model)
    with model.editing(*edit.at_strength(0).edits()):
        assert torch.equal(model.logits(inputs), model.logits(inputs))
        none = model.logits(inputs)
    assert (none - model.logits(inputs)).abs().max() < 1e-6
    with model.editing(*edit.at_strength(0.5).edits()):
        half = model.read_z(inputs)[0]
    plain = model.read_z(inputs)[0]
    with model.editing(*edit.edits()):
        whole = model.read_z(inputs)[0]
    assert torch.allclose(half, (plain + whole) / 2, atol=1e-6)
    assert edit.at_strength(0.5).effect == {}


def test_composing_applies_the_first_first():
    model, inputs = opened("llama"), inputs_for("llama")
    one, two = some(model, seed=1), some(model, seed=2).at_strength(0.7)
    with model.editing(*one.edits(), *two.edits()):
        wanted = model.logits(inputs)
    with model.editing(*compose([one, two]).edits()):
        assert (model.logits(inputs) - wanted).abs().max() < 1e-5
    with model.editing(*compose([two, one]).edits()):
        assert (model.logits(inputs) - wanted).abs().max() > 1e-4
    assert compose([one, two]).parts == ("test of L0H1, L2H3", "test of L0H1, L2H3 at strength 0.7")


def test_an_edit_at_the_prompt_touches_its_last_token_only_and_cannot_be_baked():
    model, inputs = opened("llama"), inputs_for("llama")
    edit = HeadEdit.of(model, mh.Scale(["L1H0"], 3.0), method="t", at="prompt")
    with model.editing(*edit.edits(prompt_length=11)):
        changed = model.logits(inputs)
    plain = model.logits(inputs)
    assert torch.equal(changed[:, :-1], plain[:, :-1]) and (changed[:, -1] - plain[:, -1]).abs().max() > 1e-4
    with pytest.raises(UnsupportedError, match="cannot be baked"):
        edit.bake(model)
    with pytest.raises(InputError, match="prompt_length="):
        edit.edits()


def test_another_model_is_refused_with_the_reason():
    edit = some(opened("llama"))
    other = mh.open_model(build("llama", seed=5))
    with pytest.raises(MismatchError, match="was made for model"):
        edit.check(other)
    edit.check(other, force=True)
    with pytest.raises(MismatchError, match="6 layers of 8 heads"):
        edit.check(mh.open_model(), force=True)
    with pytest.raises(MismatchError, match="two models"):
        edit.then(some(other))


def test_what_is_no_edit_is_refused(tmp_path):
    model = opened("llama")
    with pytest.raises(UnsupportedError, match=r"not linear in z|depends on"):
        HeadEdit.of(model, mh.Ablate(["L0H0"], "uniform"), method="t")
    with pytest.raises(InputError, match="at least one head"):
        HeadEdit.of(model, [], method="t")
    with pytest.raises(InputError, match="no edit at"):
        HeadEdit.load(tmp_path)
    folder = some(model).save(tmp_path / "edit")
    with pytest.raises(InputError, match="already exists"):
        some(model).save(folder)
    about = json.loads((folder / "edit.json").read_text())
    (folder / "edit.json").write_text(json.dumps(about | {"heads": ["L0H1"]}))
    with pytest.raises(InputError, match=r"is not an edit|has scale"):
        HeadEdit.load(folder)


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39, 10**30 * 10**30, "1", None, True])
def test_a_strength_is_a_finite_number_when_made_and_when_loaded(strength, tmp_path):
    good = some(opened("llama"))
    for make in (good.at_strength, lambda s: replace(good, strength=s)):
        with pytest.raises(InputError, match="strength is"):
            make(strength)
    folder = good.save(tmp_path / "edit")
    about = json.loads((folder / "edit.json").read_text())
    (folder / "edit.json").write_text(json.dumps(about | {"strength": strength}))
    with pytest.raises(InputError, match=r"not an edit .*strength is"):
        HeadEdit.load(folder)


def test_a_strength_that_overflows_with_its_shifts_is_refused():
    good = some(opened("llama"))
    assert good.at_strength(2).strength == 2.0
    with pytest.raises(InputError, match="times the largest shift"):
        replace(good, shift=good.shift * 0 + 1e30).at_strength(1e10)
    with pytest.raises(InputError, match="times the largest scale"):
        replace(good, shift=good.shift * 0, scale=good.scale * 0 - 1e30).at_strength(-1e10)


@pytest.mark.parametrize(
    "change",
    [
        {"effect": 3},
        {"settings": [1]},
        {"shape": [3]},
        {"shape": ["x", 4]},
        {"shape": 7},
        {"heads": 3},
        {"heads": ["L99H0"]},
        {"parts": 3},
        {"fingerprint": 3},
        {"at": ["all"]},
        {"format": {}},
        {"method": None},
    ],
    ids=str,
)
def test_an_edit_with_a_wrong_field_is_refused_in_one_sentence(change, tmp_path):
    folder = some(opened("llama")).save(tmp_path / "edit")
    about = json.loads((folder / "edit.json").read_text())
    for text in (json.dumps(about | change), json.dumps({k: v for k, v in about.items() if k not in change})):
        (folder / "edit.json").write_text(text)
        with pytest.raises(InputError, match="is not an edit") as caught:
            HeadEdit.load(folder)
        assert "\n" not in str(caught.value)
