"""Every config class of Transformers, built tiny: what is read from it is what the plain model does, or it is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import CONFIG_MAPPING_NAMES, built, checked, example, model_classes, problems, table

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.layout import parts_of
from manyheads.model.reading import Keep, ReadAttention
from manyheads.model.weights.qkv import head_weights
from manyheads.model.weights.slices import head_map

# One of each kind: how blocks, projections, norms, scales and towers can lie.
SAMPLE = {
    "distilbert": ("",),  # its parts under names of their own, norms after each addition
    "gpt_neo": ("",),  # attention inside attention
    "granitemoe": ("",),  # a mixture of experts under a name of its own, a residual multiplier
    "minicpm3": ("",),  # a scale on what is added, latent attention
    "glm4": ("",),  # norms inside the branch
    "gemma4_text": ("",),  # heads as wide as their layer says
    "llama4_text": ("",),
    "gpt_oss": ("",),  # sinks
    "bloom": ("",),  # attention without an interface
    "codegen": ("",),  # one map for q, k and v in an order of its own
    "xglm": ("",),
    "jamba": ("",),  # a hybrid
    "lfm2": ("",),
    "t5": ("encoder", "decoder", "cross"),
    "whisper": ("encoder", "decoder", "cross"),
    "time_series_transformer": ("encoder", "decoder", "cross"),
    "patchtst": ("",),
    "wav2vec2": ("",),
    "videomae": ("",),
    "clip": ("",),
    "siglip": ("",),
    "llava": ("", "text", "vision"),
}
REFUSED = {
    "mamba": "shows no attention in a list of layers",
    "albert": "runs 3 times in one pass",
    "longcat_flash": "computes 2 attentions",
    "swin": "in several lists of layers",
    "mobilenet_v1": "shows no attention in a list of layers",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_type_of_each_kind_reads_as_the_plain_model_computes(name):
    rows = checked(name)
    assert {row.part: (row.state, row.words) for row in rows} == dict.fromkeys(SAMPLE[name], ("clean", ""))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(name):
    (row,) = checked(name)
    assert row.state == "refused" and REFUSED[name] in row.words and "\n" not in row.words


def test_the_check_finds_what_is_wrong(monkeypatch):
    """A heads' order that is not the model's, and a write that is not what is added, do not pass."""
    model = built("llama")
    opened, inputs = mh.open_model(model), example(model)
    assert problems(opened, inputs) == ([], [])
    with torch.no_grad():
        before = Keep.read
        monkeypatch.setattr(Keep, "read", lambda self, call: (before(self, call), _turn(self, call))[0])
        assert any(word.startswith("z: sum of z W_O") for word in problems(opened, inputs)[1])
    monkeypatch.undo()
    object.__setattr__(opened.layout, "residual_scale", 0.5)
    assert any("is not the next resid" in word for word in problems(opened, inputs)[1])


def _turn(keep, call):
    if keep.site == "z":
        keep.values[call.layer] = keep.values[call.layer].flip(-2)


def test_a_model_with_an_encoder_and_a_decoder_names_its_parts_and_opens_each():
    model = built("bart")
    with pytest.raises(UnsupportedError, match="part='encoder' or 'decoder' or 'cross'"):
        mh.open_model(model)
    assert parts_of(model) == ("encoder", "decoder", "cross")
    ids = example(model)["input_ids"]
    shapes: dict[str, torch.Size] = {}
    for part in parts_of(model):
        opened = mh.open_model(model, part=part)
        assert opened.plain is model and opened.shape == (3, 4)
        opened.look(
            {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
            ReadAttention(lambda call, part=part: shapes.__setitem__(part, call.pattern.shape)),
        )
    assert {part: tuple(shape[-2:]) for part, shape in shapes.items()} == {
        "encoder": (9, 9),
        "decoder": (4, 4),
        "cross": (4, 9),
    }
    with pytest.raises(UnsupportedError, match="no part 'vision': its parts are encoder, decoder, cross"):
        mh.open_model(model, part="vision")


def test_a_decoder_that_was_given_nothing_reads_the_inputs_behind_its_start_token():
    model = built("t5")
    model.config.decoder_start_token_id = 7
    opened, ids = mh.open_model(model, part="decoder"), example(model)["input_ids"]
    start = torch.full((2, 1), 7)
    said = {"input_ids": ids, "decoder_input_ids": torch.cat([start, ids[:, :-1]], 1)}
    assert torch.equal(opened.logits(ids), opened.logits(said))


@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
def test_the_encoder_of_a_sequence_to_sequence_model_opens_by_itself(name):
    model = built(name)
    ids = example(model)["input_ids"]
    alone, part = mh.open_model(model.get_encoder()), mh.open_model(model, part="encoder")
    assert torch.allclose(alone.read_z(ids), part.read_z(ids), atol=1e-5)


def test_towers_of_equal_depth_open_by_name():
    from transformers import CLIPModel

    model = CLIPModel(built("clip").config).eval()
    assert parts_of(model) == ("text", "vision")
    with pytest.raises(UnsupportedError, match="part='text' or 'vision'"):
        mh.open_model(model)
    text, vision = mh.open_model(model, part="text"), mh.open_model(model, part="vision")
    assert text.plain is model.text_model and vision.plain is model.vision_model
    assert problems(vision, example(vision.plain)) == ([], [])


def test_layers_of_a_hybrid_keep_their_numbers_and_those_without_attention_have_no_heads():
    opened = mh.open_model(built("jamba"))
    ids = example(opened.plain)["input_ids"]
    assert opened.shape == (3, 4) and {head.layer for head in opened.heads} == {1}
    z = opened.read_z(ids)
    assert z[0].isnan().all() and z[2].isnan().all() and z[1].isfinite().all()
    assert opened.read_site(ids, "resid").isfinite().all()
    for refused in (
        lambda: opened.head_set(["L0H1"]),
        lambda: opened.W_O(2),
        lambda: opened.sweep(ids, [mh.Ablate(["L2H0"])], len),
    ):
        with pytest.raises(InputError, match="has no attention and so no heads; those that have are 1"):
            refused()


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("jamba", None, "only 1 have heads, and {} needs heads in every layer"),
        ("gemma4_text", None, "differ in width from layer to layer, and {} needs one width"),
        ("bart", "cross", "read another sequence than their own, and {} has but one"),
    ],
)
def test_what_needs_heads_of_one_kind_in_every_layer_says_so(name, part, reason):
    opened = mh.open_model(built(name), part=part)
    inputs = example(opened.plain)
    answers, foils = torch.tensor([5, 6]), torch.tensor([7, 8])
    attempts = {
        "a matrix of each head": lambda: head_weights(opened),
        "a map of heads to weights": lambda: head_map(opened),
        "an OV circuit": lambda: opened.ov(torch.randn(3, 32)),
        "exact attribution": lambda: mh.logit_attribution(opened, inputs, answers, foils),
    }
    for what, attempt in attempts.items():
        with pytest.raises(UnsupportedError, match=reason.format(what)):
            attempt()


@pytest.mark.parametrize(("name", "part"), [("bert", None), ("t5", "decoder")])
def test_writes_are_stacked_only_where_they_sum_to_the_next_stream(name, part):
    opened = mh.open_model(built(name), part=part)
    inputs = example(opened.plain)
    with pytest.raises(UnsupportedError, match="resid \\+ attention_write \\+ mlp_write is not the next resid"):
        opened.read_site(inputs, "mlp_write")
    keep = Keep("mlp_write")
    opened.read(inputs, keep)
    assert sorted(keep.values) == [0, 1, 2] and len(opened.read_site(inputs, "attention_write")) == 3


@pytest.mark.slow
def test_no_type_is_silently_wrong_and_the_table_in_the_docs_is_the_one_of_today():
    rows = [row for name in CONFIG_MAPPING_NAMES if model_classes(name) for row in checked(name)]
    assert [row for row in rows if row.state in ("wrong", "traceback")] == []
    assert len({row.type for row in rows if row.state == "clean"}) >= 180
    said = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text("utf-8")
    assert said == table(rows)
