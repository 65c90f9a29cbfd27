"""Prompt-CAM: prompts by hooks equal prompts by hand, blurring equals brute force, the trunk stays as it is; planted patches."""

import copy
import json

import pytest
import torch
from architectures import build, inputs_for, opened
from bars import Stopped, Stopping
from planted_patches import CLASSES, images, pretrained
from torch.nn import functional as F

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.model.editing.edits import Ablate, Mask
from manyheads.model.reading.readers import Keep, ReadAttention
from manyheads.trace.prompts.maps import cls_attention, prompt_attention, prompt_maps, rank_heads
from manyheads.trace.prompts.prompt_cam import PromptCAM, fit_prompt_cam
from manyheads.trace.prompts.prompting import finish, last_call
from manyheads.training import TrainSettings

TRUNKS = ("vit", "dinov2")
QUICK = TrainSettings(steps=8, rows=4, rate=1e-2, warmup=2, weight_decay=1e-3, precision="fp32")


def cam_of(name, n_classes=6, scale=10.0):
    """Prompts large enough that they matter."""
    cam = PromptCAM(opened(name), n_classes, dropout=0.0).eval()
    with torch.no_grad():
        cam.prompts.mul_(scale)
    return cam


def pixels(name="vit", batch=3, seed=0):
    return inputs_for(name, batch=batch, seed=seed)["pixel_values"]


def naive(cam, x, blurred=(), c=0):
    """Prompts concatenated by hand, layer by layer, through a copy of the model's modules; blurring by hand in the last."""
    trunk = copy.deepcopy(cam.trunk.plain)
    base = trunk.base_model
    hidden = base.embeddings(x)
    layers = getattr(base, "layers", None) or base.encoder.layer
    for prompts, layer in zip(cam.prompts, layers, strict=True):
        hidden = torch.cat([prompts.expand(len(hidden), -1, -1), hidden], 1)
        if layer is layers[-1] and blurred:
            layer.attention.forward = blurring(layer.attention, blurred, c)
        out = layer(hidden)
        out = out if torch.is_tensor(out) else out[0]
        hidden = out[:, cam.n_classes :]
    return base.layernorm(out)[:, : cam.n_classes] @ cam.weight[0] + cam.bias


def blurring(attention, heads, c):
    """Eager attention that sets the logits of row c to 0 in some heads."""

    def forward(x, *_, **__):
        size = attention.head_dim if hasattr(attention, "head_dim") else attention.attention_head_size
        q, k, v = (
            p(x).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = q @ k.transpose(-1, -2) * size**-0.5
        scores[:, list(heads), c] = 0
        return attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None

    return forward


@pytest.mark.parametrize("name", TRUNKS)
def test_prompts_by_hooks_equal_prompts_concatenated_by_hand(name):
    cam = cam_of(name)
    with torch.no_grad():
        logits, wanted = cam(pixels(name)), naive(cam, pixels(name))
    assert logits.shape == (3, 6) and logits.std() > 1e-2
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_that_may_not_look_at_the_prompts_computes_what_it_always_does(name):
    cam, keep = cam_of(name), Keep("z", layers=[2])
    with torch.no_grad(), cam.trunk.editing(Mask(cam.trunk.heads, keys=range(6))), cam.trunk.reading(keep):
        finish(cam.trunk, last_call(cam.trunk, pixels(name), cam.prompts))
    torch.testing.assert_close(
        keep.values[2][:, 6:], cam.trunk.read_z({"pixel_values": pixels(name)})[2], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", TRUNKS)
def test_training_leaves_the_trunk_and_its_logits_bitwise_as_they_were(name, tmp_path):
    module = build(name)
    before, trunk = copy.deepcopy(module.state_dict()), mh.open_model(module)
    x, y = pixels(name, 12), torch.arange(12) % 3
    logits, known = trunk.logits({"pixel_values": x}), trunk.fingerprint
    cam = fit_prompt_cam(trunk, x, y, tmp_path / "run", settings=QUICK)
    start = PromptCAM(trunk, 3)
    assert (cam.prompts - start.prompts).abs().amax((1, 2)).min() > 1e-3
    assert not torch.equal(cam.weight, start.weight) and torch.equal(
        cam.bias, start.bias
    )  # which cancels in the softmax
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(trunk.logits({"pixel_values": x}), logits) and mh.open_model(module).fingerprint == known
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert not any(block.module._forward_hooks or block.module._forward_pre_hooks for block in trunk.layout.blocks)


def test_gradients_of_the_prompts_equal_those_by_hand():
    cam = cam_of("dinov2")
    grads = [
        torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 1, 2])), [cam.prompts, cam.weight])
        for logits in (cam(pixels("dinov2")), naive(cam, pixels("dinov2")))
    ]
    for ours, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_prompts_start_as_the_paper_says():
    cam = PromptCAM(opened("vit"), 40)
    bound = (6 / (3 * 4**2 + 32)) ** 0.5
    assert cam.prompts.shape == (3, 40, 32) and bound * 0.98 < cam.prompts.abs().max() <= bound
    assert abs(cam.prompts.std() / bound - 3**-0.5) < 0.02
    assert torch.equal(cam.prompts, PromptCAM(opened("vit"), 40).prompts)
    assert not torch.equal(cam.prompts, PromptCAM(opened("vit"), 40, seed=1).prompts)
    assert sum(p.numel() for p in cam.parameters()) == 40 * 3 * 32 + 32 + 1


@pytest.mark.parametrize("name", TRUNKS)
def test_greedy_blurring_equals_brute_force(name):
    cam = cam_of(name, scale=20.0)
    x, classes = pixels(name, 5, seed=2), torch.tensor([0, 3, 5, 3, 1])
    found = rank_heads(cam, x, classes, rows=2)
    for b, c in enumerate(classes.tolist()):
        with torch.no_grad():
            p = lambda heads: float(naive(cam, x[b : b + 1], heads, c)[0].double().softmax(-1)[c])  # noqa: B023, E731
            blurred, kept = [], []
            for _ in range(4):
                options = {h: p([*blurred, h]) for h in range(4) if h not in blurred}
                blurred.append(max(options, key=options.get))
                kept.append(options[blurred[-1]])
            assert found.clean[b] == pytest.approx(p([]), abs=1e-5)
        assert found.order[b].tolist() == blurred[::-1]
        assert found.p[b] == pytest.approx(kept[::-1], abs=1e-5)


def test_blurring_changes_only_the_logit_of_its_class_and_equals_uniform_attention():
    cam, x, c = cam_of("vit"), pixels(), 2
    with torch.no_grad():
        clean = cam(x)
        with cam.trunk.editing(Ablate([(2, h) for h in range(4)], "uniform", positions=[c])):
            uniform = cam(x)
    others = [i for i in range(6) if i != c]
    torch.testing.assert_close(uniform[:, others], clean[:, others], atol=1e-5, rtol=1e-5)
    ranked = rank_heads(cam, x, torch.full((3,), c))
    torch.testing.assert_close(torch.tensor(ranked.p[:, 0]), uniform.double().softmax(-1)[:, c], atol=1e-5, rtol=1e-5)
    assert (uniform[:, c] - clean[:, c]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TRUNKS)
def test_maps_are_rows_of_the_last_pattern_over_the_patches(name):
    cam, x, classes = cam_of(name), pixels(name), torch.tensor([4, 0, 4])
    maps = prompt_attention(cam, x, classes)
    patterns = []
    with torch.no_grad(), cam.trunk.reading(ReadAttention(lambda call: patterns.append(call.pattern))):
        cam(x)
    assert maps.shape == (3, 4, 4, 4) and patterns[-1].shape == (3, 4, 6 + 1 + 16, 6 + 1 + 16)
    for b, c in enumerate(classes.tolist()):
        torch.testing.assert_close(maps[b].flatten(1), patterns[-1][b, :, c, 7:])
    assert maps.sum((2, 3)).min() > 0 and maps.sum((2, 3)).max() < 1
    plain = cls_attention(cam.trunk, x)
    assert plain.shape == maps.shape and not torch.allclose(plain, maps)


def test_a_training_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    x, y = pixels(batch=10), torch.arange(10) % 2
    whole = fit_prompt_cam(opened("vit"), x, y, tmp_path / "whole", settings=QUICK)

    always = TrainSettings(**{**QUICK.__dict__, "save_minutes": 0.0})
    with pytest.raises(Stopped):
        fit_prompt_cam(opened("vit"), x, y, tmp_path / "cut", settings=always, bar=Stopping(5))
    resumed = fit_prompt_cam(opened("vit"), x, y, tmp_path / "cut", settings=QUICK)
    assert torch.equal(resumed.prompts, whole.prompts) and torch.equal(resumed.weight, whole.weight)


def test_what_is_saved_loads_again_and_only_onto_its_trunk(tmp_path):
    cam = cam_of("vit")
    named = PromptCAM(opened("vit"), ["cat", "dog", "owl", "fox", "elk", "bee"]).eval()
    named.load_state_dict(cam.state_dict())
    folder = named.save(tmp_path / "cam")
    assert {f.name for f in folder.iterdir()} == {"head.safetensors", "head.json"}
    assert json.loads((folder / "head.json").read_text())["fingerprint"] == cam.trunk.fingerprint
    again = PromptCAM.load(folder, opened("vit"))
    assert again.classes == named.classes and torch.equal(again(pixels()), cam(pixels()))
    with pytest.raises(InputError, match="already exists"):
        named.save(folder)
    other = mh.open_model(build("vit", seed=1))
    with pytest.raises(MismatchError, match="was learned beside model"):
        PromptCAM.load(folder, other)
    assert torch.equal(PromptCAM.load(folder, other, force=True).prompts, cam.prompts)
    (folder / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no Prompt-CAM"):
        PromptCAM.load(folder, opened("vit"))


@pytest.mark.usefixtures("any_shape")
def test_wrong_input_is_refused_in_a_sentence(tmp_path):
    cam, x = cam_of("vit"), pixels()
    with pytest.raises(UnsupportedError, match="reads no image"):
        PromptCAM(mh.open_model(), 3)
    with pytest.raises(InputError, match="two classes or more"):
        PromptCAM(opened("vit"), ["cat", "cat"])
    with pytest.raises(InputError, match="prompts for this trunk"):
        last_call(cam.trunk, x, cam.prompts[:2])
    with pytest.raises(InputError, match="a class for each image"):
        prompt_attention(cam, x, torch.tensor([0]))
    with pytest.raises(InputError, match="classes are 0 to 5"):
        rank_heads(cam, x, torch.tensor([0, 1, 6]))
    with pytest.raises(InputError, match="no class 'cat'"):
        prompt_maps(cam, x[0], "cat")
    with pytest.raises(InputError, match="name every class"):
        fit_prompt_cam(cam.trunk, x, torch.tensor([0, 1, 2]), tmp_path, classes=2)
    with pytest.raises(InputError, match="images \\[N, channels, H, W\\]"):
        fit_prompt_cam(cam.trunk, x, torch.tensor([0, 1]), tmp_path)


def test_the_page_shows_every_head_the_runner_up_and_survives_odd_names(tmp_path):
    cam = PromptCAM(opened("vit"), ["<b>owl</b>", "dog", "elk"]).eval()
    maps = prompt_maps(cam, pixels()[0], "dog")
    frame = maps.to_frame()
    assert [str(h) for h in maps.survivors(2)] == list(frame["head"][:2]) and sorted(frame["head"]) == [
        f"L2H{i}" for i in range(4)
    ]
    assert maps.target == 1 and maps.rival != 1 and maps.probabilities[maps.rival] == maps.probabilities[[0, 2]].max()
    text = maps.report(tmp_path / "page.html", survivors=2).read_text()
    assert text.count("<svg") == 1 + 4 + 2 and text.count('class="veil"') == 6 * 16 and text.count('class="peak"') == 6
    assert "<b>owl" not in text and "runner-up" in text and f"<b>{frame['head'][0]}</b> rank 1, kept" in text
    with pytest.raises(InputError, match="already exists"):
        maps.report(tmp_path / "page.html")


def hits(maps, labels, places):
    """How often the peak of a class's best head, chosen on the first half, is the class patch in the other. Chance is 0.04."""
    found = (maps.flatten(2).argmax(-1) == places[:, None]).float()
    choose, judge = slice(0, len(found) // 2), slice(len(found) // 2, None)
    best = torch.stack([found[choose][labels[choose] == c].mean(0).argmax() for c in range(CLASSES)])
    return float(found[judge].gather(1, best[labels[judge]][:, None]).mean())


def measured(seed, folder):
    """Accuracy, and how often peaks of the right, wrong, untrained prompt and of CLS hit."""
    trunk = mh.open_model(pretrained(seed=seed))
    x, y, _ = images(1024, seed=1)
    settings = TrainSettings(steps=400, rows=32, rate=1e-2, warmup=50, decay=0.6, weight_decay=1e-3, precision="fp32")
    cam = fit_prompt_cam(trunk, x, y, folder, settings=settings, seed=seed)
    x, y, places = images(2048, seed=2)
    wrong = (y + torch.randint(1, CLASSES, y.shape, generator=torch.Generator().manual_seed(3))) % CLASSES
    return {
        "right": hits(prompt_attention(cam, x, y), y, places),
        "one head for all": hits(prompt_attention(cam, x, y), torch.zeros_like(y), places),
        "wrong": hits(prompt_attention(cam, x, wrong), wrong, places),
        "untrained": hits(prompt_attention(PromptCAM(trunk, CLASSES), x, y), y, places),
        "cls": hits(cls_attention(trunk, x), y, places),
        "accuracy": float((cam.probabilities(x).argmax(-1) == y).float().mean()),
    }


@pytest.mark.slow
def test_the_best_head_of_a_class_prompt_finds_the_class_patch_where_cls_does_not(tmp_path):
    for seed in range(3):
        found = measured(seed, tmp_path / str(seed))
        print({name: round(value, 3) for name, value in found.items()})
        assert found["accuracy"] >= 0.95 and found["right"] >= 0.75
        assert found["right"] >= found["cls"] + 0.1 and found["right"] >= found["untrained"] + 0.1
        assert found["right"] > found["wrong"] > 0.04  # a wrong class's prompt finds the patch too
