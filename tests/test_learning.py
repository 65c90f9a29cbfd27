"""Trunks give states of text, images and series, pooled as they say; heads come back from disk bit for bit."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from architectures import build, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import nn

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.learning import Card, Head, LinearHead, Trunk, at_readout, fill, load, pooled, save
from manyheads.learning.head import LinearSettings

IDS = torch.randint(3, 58, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


# Pooling


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pooled_states_are_those_of_each_row_alone_without_its_padding(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    left = data.draw(st.booleans())
    states = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(sum(lengths)))
    places = torch.arange(6).expand(len(lengths), 6)
    size = torch.tensor(lengths)[:, None]
    mask = (places >= 6 - size if left else places < size).long()
    rows = [row[real.bool()] for row, real in zip(states, mask, strict=True)]
    for how, wanted in (
        ("mean", [row.mean(0) for row in rows]),
        ("last", [row[-1] for row in rows]),
        ("first", [row[0] for row in rows]),
    ):
        torch.testing.assert_close(pooled(states, mask, how), torch.stack(wanted))
    assert pooled(states, mask, "tokens") is states


def test_without_a_mask_every_token_counts_and_one_state_a_row_stays():
    states = torch.randn(2, 5, 3)
    assert torch.equal(pooled(states, None, "first"), states[:, 0]) and torch.equal(
        pooled(states, None, "last"), states[:, -1]
    )
    torch.testing.assert_close(pooled(states, None, "mean"), states.mean(1))
    assert torch.equal(pooled(states[:, 0], None, "mean"), states[:, 0])
    with pytest.raises(InputError, match=r"expected \[B, T, D\]"):
        pooled(states[None], None, "mean")
    with pytest.raises(InputError, match=r"mask has shape \[2, 4\]"):
        pooled(states, torch.ones(2, 4), "mean")
    with pytest.raises(InputError, match="give one of tokens, mean"):
        Trunk(nn.Identity()).states(states, pool="max")


# Text, images, series


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_layers_of_a_text_trunk_are_the_residual_stream_and_what_its_head_reads(name):
    model, batch = opened(name), {"input_ids": IDS, "attention_mask": MASK}
    for trunk, taken in ((Trunk(model), model.inputs(batch)), (Trunk(model.plain), batch)):
        whole = model.plain(**taken, output_hidden_states=True)
        first, middle, last = trunk.states(batch, [0, 1, -1])
        torch.testing.assert_close(first, whole.hidden_states[0])
        torch.testing.assert_close(middle, whole.hidden_states[1])
        assert torch.equal(last, trunk.states(batch, model.n_layers))
        assert not torch.allclose(last, middle)
    if name != "bert":  # behind its last state BERT has a transform, and no norm
        with at_readout(model.layout.unembedding) as seen:
            model.plain(input_ids=IDS, attention_mask=MASK)
        torch.testing.assert_close(last, seen[0])
    assert trunk.width == last.shape[-1] == model.layout.hidden_size


def test_text_is_pooled_by_its_mask_and_what_the_trunk_does_not_read_is_left_aside():
    trunk = Trunk(opened("bert"))
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.arange(3), "number": 3}
    tokens = trunk.states(batch)
    torch.testing.assert_close(trunk.states(batch, pool="mean"), pooled(tokens, MASK, "mean"))
    assert torch.equal(trunk.states(batch, pool="last")[2], tokens[2, 3]), "row 2 ends after four tokens"
    alone = trunk.states(IDS[2:, :4], pool="last")
    torch.testing.assert_close(trunk.states(batch, pool="last")[2], alone[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"nothing of the batch \(labels\)"):
        trunk.states({"labels": torch.arange(3)})


def test_left_padding_does_not_move_a_rows_states():
    trunk = Trunk(opened("gpt2"))
    padded = trunk.states({"input_ids": IDS, "attention_mask": MASK}, pool="last")
    torch.testing.assert_close(padded[1], trunk.states(IDS[1:2, 2:], pool="last")[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_have_patches_behind_a_class_token(name):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = opened(name)
    size = model.config.image_size
    pixels = torch.nn.functional.interpolate(pixels, size=size if isinstance(size, int) else tuple(size))
    wanted = model.plain.base_model(pixel_values=pixels).last_hidden_state
    for trunk in (Trunk(model), Trunk(model.plain)):
        assert torch.equal(trunk.states(pixels), wanted)
        assert torch.equal(trunk.states({"pixel_values": pixels}, pool="first"), wanted[:, 0])
    assert Trunk(model).unembedding is None


class Series(nn.Module):
    """A small trunk of series [B, T]: a GRU over values, its states."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 5), nn.GRU(5, 4, batch_first=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, values, labels=None):
        assert labels is None
        return self.dropout(self.outer(self.inner(values[..., None]))[0])


def test_any_module_gives_its_output_and_layers_by_name_for_series():
    module, x = Series().eval(), torch.randn(2, 9)
    trunk = Trunk(module)
    inner, out = trunk.states(x, ["inner", -1])
    assert torch.equal(out, module(x)) and torch.equal(inner, module.inner(x[..., None]))
    assert torch.equal(trunk.states({"values": x, "target": x, "labels": x}, "outer", "last"), out[:, -1])
    assert trunk.embedding is None and trunk.unembedding is None
    with pytest.raises(InputError, match=r"no layer 1; Series has its output, layer -1"):
        trunk.states(x, 1)
    with pytest.raises(InputError, match="no layer 'middle'"):
        trunk.states(x, "middle")
    with pytest.raises(InputError, match=r"no layer 7; .* has layers 0 to 3"):
        Trunk(opened("llama")).states(IDS, 7)
    with pytest.raises(UnsupportedError, match="no hidden_size in its config"):
        trunk.width  # noqa: B018


def test_a_frozen_trunk_has_no_gradients_and_no_dropout_and_stays_in_its_mode():
    module, x = Series().train(), torch.randn(2, 9)
    frozen, learning = Trunk(module), Trunk(module, frozen=False)
    assert torch.equal(frozen.states(x), frozen.states(x)) and not frozen.states(x).requires_grad
    assert module.training and not torch.equal(learning.states(x), learning.states(x))
    learning.states(x, pool="mean").sum().backward()
    assert module.inner.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not learning.states(x).requires_grad


def test_the_fingerprint_is_that_of_config_and_weights():
    assert Trunk(opened("llama")).fingerprint == opened("llama").fingerprint == Trunk(opened("llama").plain).fingerprint
    module = Series()
    before = Trunk(module).fingerprint
    assert Trunk(copy.deepcopy(module)).fingerprint == before
    other = type("Other", (Series,), {})()
    other.load_state_dict(module.state_dict())
    assert Trunk(other).fingerprint != before
    module.inner.bias.data += 1
    assert Trunk(module).fingerprint != before


# Heads and files


@dataclass(frozen=True)
class Sizes:
    width: int
    outputs: tuple[int, ...]


class Several(Head):
    def __init__(self, settings):
        super().__init__(settings)
        self.parts = nn.ModuleList(nn.Linear(settings.width, n) for n in settings.outputs)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, states):
        return torch.cat([part(states) for part in self.parts], -1)


def kept(folder, head=None, **changes):
    head = head or Several(Sizes(6, (2, 3)))
    about = {"kind": "several", "settings": head.described(), "fingerprint": "abc", "method": "test", "seed": 3}
    return head, save(folder, Card(**about | {"about": {"rate": 0.1, "names": ["ä"]}} | changes), head)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(["float32", "bfloat16"]))
def test_a_head_comes_back_bit_for_bit(tmp_path_factory, width, outputs, dtype):
    folder = tmp_path_factory.mktemp("heads") / "head"
    head = Several(Sizes(width, tuple(outputs))).to(getattr(torch, dtype))
    head.seen += 5
    kept(folder, head)
    card, tensors = load(folder, "several", "head", fingerprint="abc")
    assert (card.method, card.seed, card.version, card.format) == ("test", 3, mh.__version__, 1)
    assert card.about == {"rate": 0.1, "names": ["ä"]}
    again = Several(Sizes(card.settings["width"], tuple(card.settings["outputs"]))).to(getattr(torch, dtype))
    fill(again, tensors, folder)
    assert again.settings == head.settings and again.state_dict().keys() == head.state_dict().keys()
    for name, value in head.state_dict().items():
        assert value.dtype == again.state_dict()[name].dtype and torch.equal(value, again.state_dict()[name])
    x = torch.randn(4, width).to(getattr(torch, dtype))
    assert torch.equal(again(x), head(x))


def test_another_trunk_is_refused_unless_forced(tmp_path):
    _, folder = kept(tmp_path / "head")
    with pytest.raises(MismatchError, match="was learned beside model abc, not other"):
        load(folder, "several", "head", fingerprint="other")
    assert load(folder, "several", "head", fingerprint="other", force=True)[0].fingerprint == "abc"
    with pytest.raises(MismatchError, match="does not fit this model"):
        fill(Several(Sizes(6, (2, 4))), load(folder, "several", "head")[1], folder)
    with pytest.raises(MismatchError, match="does not fit this model"):
        fill(Several(Sizes(6, (2,))), load(folder, "several", "head")[1], folder)


def test_writing_is_whole_and_never_over_something_by_accident(tmp_path):
    _, folder = kept(tmp_path / "head")
    assert sorted(path.name for path in folder.iterdir()) == ["head.json", "head.safetensors"]
    with pytest.raises(InputError, match="already exists"):
        kept(folder)

    def fail(into):
        raise RuntimeError("full")

    before = (folder / "head.json").read_bytes()
    with pytest.raises(RuntimeError, match="full"):
        save(folder, Card("tests", fingerprint="x", kind="several"), {"a": torch.zeros(1)}, also=fail, force=True)
    assert (folder / "head.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["head"]
    with pytest.raises(InputError, match="is no card"):
        save(
            tmp_path / "large",
            Card("tests", settings={"x": "y" * (1 << 20)}, fingerprint="x", kind="several"),
            {"a": torch.zeros(1)},
        )


def test_missing_damaged_and_foreign_folders_get_one_sentence(tmp_path):
    def refused(because, **changes):
        _, folder = kept(tmp_path / f"head-{len(list(tmp_path.iterdir()))}")
        for name, content in changes.items():
            path = folder / {"card": "head.json", "weights": "head.safetensors"}[name]
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        with pytest.raises(InputError, match=f"holds no head .*{because}.*give a folder") as error:
            load(folder, "several", "head")
        assert "\n" not in str(error.value)

    card = json.loads((kept(tmp_path / "whole")[1] / "head.json").read_text())
    refused("there is no file", card=None)
    refused("there is no file", weights=None)
    refused("header", weights=b"nothing of the kind")
    refused("Expecting", card=b"{not json")
    refused("holds a list", card=b"[1, 2]")
    refused("w holds NaN", weights=save_tensors({"w": torch.tensor([1.0, float("nan")])}))
    refused("is no card of format 1", card=json.dumps(card | {"format": 2}).encode())
    refused("it holds a drafter", card=json.dumps(card | {"kind": "drafter"}).encode())
    refused("settings", card=json.dumps({k: v for k, v in card.items() if k != "settings"}).encode())
    refused("is damaged", card=json.dumps(card | {"settings": [1]}).encode())
    refused("more than 1048576 bytes", card=b" " * ((1 << 20) + 1))
    with pytest.raises(InputError, match="holds no head"):
        load(tmp_path / "nowhere", "several", "head")


def test_linear_heads_start_alike_for_a_seed_and_their_loss_is_cross_entropy():
    one, two, other = (LinearHead(LinearSettings(5, 3, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.linear.weight, two.linear.weight) and not torch.equal(one.linear.weight, other.linear.weight)
    wide = LinearHead(LinearSettings(400, 50))
    assert float(wide.linear.weight.detach().std()) == pytest.approx(400**-0.5, rel=0.05) and not wide.linear.bias.any()
    states, target = torch.randn(7, 5), torch.arange(7) % 3
    torch.testing.assert_close(
        one.loss(one(states), target), -one(states).log_softmax(-1)[torch.arange(7), target].mean()
    )
    assert LinearHead(LinearSettings(**one.described())).settings == one.settings
    with pytest.raises(TypeError, match="Several has no loss of its own"):
        Several(Sizes(2, (1,))).loss(states, target)


def test_what_stands_in_at_the_readout_is_what_becomes_logits():
    module = build("llama")
    with at_readout(module.lm_head, lambda z: z[:, -1:] * 0) as seen, torch.no_grad():
        logits = module(input_ids=IDS).logits
    assert logits.shape[1] == 1 and not logits.any() and seen[0].shape[:2] == (3, 7)
    assert module(input_ids=IDS).logits.shape[1] == 7


def test_files_hold_no_pickle(tmp_path):
    _, folder = kept(tmp_path / "head")
    save_file({"parts.0.weight": torch.zeros(1)}, folder / "head.safetensors")
    with pytest.raises(MismatchError):
        fill(Several(Sizes(6, (2, 3))), load(folder, "several", "head")[1], folder)
