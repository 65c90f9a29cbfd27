from dataclasses import replace

import pytest
import torch
from architectures import build, opened

import manyheads as mh
from manyheads.edit.learn.examples import Answered
from manyheads.edit.learn.selective_tuning import tune_heads
from manyheads.edit.learn.tuning import LEARNING
from manyheads.errors import InputError
from manyheads.training.head_slices import head_slices

HOW = replace(LEARNING, rate=1e-2, epochs=20, rows=8)


def some(n=8):
    ids = torch.randint(3, 58, (n, 7), generator=torch.Generator().manual_seed(0))
    return Answered.of_tokens(ids[:, :-1], ids[:, -1])


def loss(model):
    examples = some()
    return -float(examples.log_p(model.logits(examples.inputs(model))).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_only_the_slices_of_chosen_heads_move_whatever_decays(name):
    model = mh.open_model(build(name))
    before = {key: value.clone() for key, value in model.plain.state_dict().items()}
    tuned = tune_heads(model, some(), ["L1H2"], settings=replace(HOW, weight_decay=0.5))
    assert loss(tuned) < loss(model) - 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.plain.state_dict().items())
    pieces = {id(piece.module): piece for piece in head_slices(tuned, ["L1H2"])}
    moved = 0
    for key, module in tuned.plain.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        old = before[f"{key}.weight"]
        if id(module) in pieces:
            piece = pieces[id(module)]
            inside = torch.zeros(weight.shape[piece.dim], dtype=torch.bool)
            inside[piece.index] = True
            new, kept = weight.movedim(piece.dim, 0), old.movedim(piece.dim, 0)
            assert torch.equal(new[~inside], kept[~inside]) and not torch.equal(new[inside], kept[inside])
            moved += 1
        else:
            assert torch.equal(weight, old), key
    assert moved == len(pieces) >= 2


def test_mlps_are_tuned_where_asked_and_the_result_saves_as_any_checkpoint(tmp_path):
    model = opened("llama")
    tuned = tune_heads(model, some(), ["L0H0"], mlps=[2], settings=HOW)
    changed = {
        key for key, value in tuned.plain.state_dict().items() if not torch.equal(value, model.plain.state_dict()[key])
    }
    assert any("layers.2.mlp" in key for key in changed) and not any("layers.1." in key for key in changed)
    assert not any("layers.2.self_attn" in key for key in changed)
    again = mh.open_model(tuned.save_pretrained(tmp_path / "tuned"))
    assert again.fingerprint == tuned.fingerprint != model.fingerprint
    assert not any("parametrizations" in key for key in tuned.plain.state_dict())


def test_plain_descent_steps_h_over_h_times_as_far_and_adamw_cancels_the_factor():
    model = opened("llama")
    assert model.n_heads == 4

    def moved(**how):
        settings = replace(LEARNING, steps=how.pop("steps"), clip=None, **{"optimizer": "sgd", "rate": 1e-1} | how)
        parts = [
            tune_heads(model, some(), ["L1H2"], scaled=scaled, settings=settings).plain.model.layers[1].self_attn
            for scaled in (True, False)
        ]
        before = model.plain.model.layers[1].self_attn
        pairs = [zip(part.parameters(), before.parameters(), strict=True) for part in parts]
        return [torch.cat([(a - b).flatten() for a, b in pair]) for pair in pairs]

    scaled, plain = moved(steps=1)
    assert plain.abs().max() > 1e-5
    assert (scaled - 4 * plain).norm() < 1e-3 * scaled.norm()
    scaled, plain = moved(steps=5, optimizer="adamw", rate=1e-3)
    assert (scaled - plain).norm() < 1e-3 * plain.norm()


def test_with_no_heads_named_every_weight_learns():
    model = opened("llama")
    tuned = tune_heads(model, some(), None, settings=replace(HOW, epochs=2))
    before = model.plain.state_dict()
    assert all(not torch.equal(p, before[name]) for name, p in tuned.plain.named_parameters())
    assert loss(tuned) < loss(model) - 0.1


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    model = opened("llama")
    whole = tune_heads(model, some(), ["L1H0"], settings=replace(LEARNING, rate=1e-2, steps=6, rows=4))
    tune_heads(model, some(), ["L1H0"], settings=replace(LEARNING, rate=1e-2, steps=3, rows=4), folder=tmp_path)
    parted = tune_heads(
        model, some(), ["L1H0"], settings=replace(LEARNING, rate=1e-2, steps=6, rows=4), folder=tmp_path
    )
    assert whole.fingerprint == parted.fingerprint


def test_wrong_layers_and_no_heads_are_refused():
    with pytest.raises(InputError, match="layers 0-2"):
        tune_heads(opened("llama"), some(), ["L0H0"], mlps=[7])
    with pytest.raises(InputError, match="no heads given"):
        tune_heads(opened("llama"), some(), [])
