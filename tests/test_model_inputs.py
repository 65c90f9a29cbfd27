"""Inputs: padded rows keep their positions, masks of every shape mean what they say, and what cannot be read is refused."""

import numpy as np
import pytest
import torch
import transformers as tf
from architectures import COMMON, ENCODER, LLAMA, build, inputs_for, opened
from torch import nn

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.inputs import kept_tokens, repeated_inputs
from manyheads.model.reading import ReadAttention

_BERT = {k: v for k, v in ENCODER.items() if k != "num_key_value_heads"}


def strong(model, seed=0):
    """Weights large enough for positions to matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model.eval()


LEARNED = {
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT)),
    "xlm_roberta": lambda: tf.XLMRobertaForMaskedLM(tf.XLMRobertaConfig(**_BERT)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "opt": lambda: build("opt"),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("name", LEARNED)
def test_a_padded_row_gets_the_logits_it_has_alone_whatever_fills_the_padding(name, pad, side):
    model, ids = mh.open_model(strong(LEARNED[name]())), inputs_for("llama", batch=1)["input_ids"]
    filling, one, none = torch.full((1, 4), pad), torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.long)
    join = lambda a, b: torch.cat([a, b] if side == "left" else [b, a], 1)  # noqa: E731
    got = model.logits({"input_ids": join(filling, ids), "attention_mask": join(none, one)})
    with torch.no_grad():
        alone = model.module(input_ids=ids).logits
    assert torch.allclose(got[:, 4:] if side == "left" else got[:, :-4], alone, atol=1e-4)


class Adapter(nn.Module):
    """An adapter's wrapper as PEFT has it: its forward does not say what the model's own takes, and `generate` goes past it."""

    def __init__(self, inner):
        super().__init__()
        self.base_model = inner
        self.config, self.get_input_embeddings = inner.config, inner.get_input_embeddings

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_inside_a_wrapper_padded_rows_keep_their_positions():
    model, ids = mh.open_model(Adapter(strong(LEARNED["gpt2"]()))), inputs_for("llama")["input_ids"]
    none = torch.zeros(3, 2, dtype=torch.long)
    padded = {"input_ids": torch.cat([none, ids], 1), "attention_mask": torch.cat([none, torch.ones_like(ids)], 1)}
    assert torch.allclose(model.logits(padded)[:, 2:], model.logits(ids), atol=1e-4)


@pytest.mark.parametrize(
    "edit",
    [
        lambda heads: mh.Scale(heads, -1.0, positions=[3, 12, 14]),
        lambda heads: mh.Mask(heads, keys=[2, 11], positions=[5, 12, 13]),
        lambda heads: mh.Ablate(heads, "uniform", positions=[4, 13]),
    ],
)
def test_inside_a_wrapper_positions_count_from_the_start_at_every_decoding_step(edit):
    model, ids = mh.open_model(Adapter(build("llama"))), inputs_for("llama")["input_ids"]
    plain = opened("llama")
    kwargs = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with model.editing(edit(model.heads)):
        cached, uncached = (model.generate(ids, use_cache=use, **kwargs) for use in (True, False))
    with plain.editing(edit(plain.heads)):
        assert torch.equal(cached, plain.generate(ids, use_cache=True, **kwargs))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_packed_documents_under_a_mask_of_their_own_are_read_as_the_model_reads_them(name, kind):
    model, ids = opened(name), inputs_for(name, batch=1, length=10)["input_ids"]
    document = torch.tensor([0] * 4 + [1] * 6)
    seen = ((document[:, None] == document[None]) & torch.ones(10, 10).tril().bool())[None, None]
    mask = seen if kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    patterns = []
    read = model.read(batch, ReadAttention(lambda call: patterns.append(call.pattern)))
    assert torch.allclose(read, model.logits(batch), atol=1e-4)
    assert all(float(pattern[0, :, 4:, :4].abs().max()) < 1e-6 for pattern in patterns)
    second = model.logits(ids[:, 4:])
    assert torch.allclose(read[:, 4:], second, atol=1e-4)
    with model.editing(mh.Ablate(["L1H1"], "uniform")):
        assert torch.allclose(model.logits(batch)[:, 4:], model.logits(ids[:, 4:]), atol=1e-4)


def test_a_mean_over_rows_leaves_padding_out_at_each_position():
    model, ids = opened("llama"), inputs_for("llama", batch=2, length=6)["input_ids"]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    z, mean = model.read_z(batch), model.mean_z(batch, by_position=True)
    assert torch.allclose(mean[:, :2], z[:, 1, :2]) and torch.allclose(mean[:, 2:], z[:, :, 2:].mean(1), atol=1e-6)
    pooled = model.mean_z(batch)
    assert torch.allclose(pooled, torch.cat([z[:, 0, 2:], z[:, 1]], 1).mean(1), atol=1e-6)


def test_under_a_mask_of_four_dimensions_what_sees_itself_is_a_token():
    seen = torch.ones(1, 1, 4, 4).tril().bool()
    seen[..., 1, 1] = False
    low = torch.finfo(torch.float32).min
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, low)):
        assert kept_tokens({"attention_mask": mask}).tolist() == [[True, False, True, True]]
    assert kept_tokens({}) is None


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, 61]]), "token id 61 is out of range: the model knows ids from 0 to 60"),
        (torch.tensor([[3, -2]]), "token id -2 is out of range"),
        (torch.zeros(0, 4, dtype=torch.long), "at least one row and one token"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one row and one token"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \[B, T\]"),
        (torch.ones(1, 3), "token ids are whole numbers"),
        ([[1, 2]], "expected a text or a list of texts"),
        ([], "expected a text or a list of texts"),
        (7, "expected text, token ids or a mapping of inputs, got int"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(1, 3).long()},
            "has 1 rows, and the token ids",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            "row 1 .* only padding",
        ),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused_in_a_sentence(ids, message):
    model = opened("llama")
    model.tokenizer = model.tokenizer or (lambda texts: {"input_ids": [[1] for _ in texts]})
    try:
        with pytest.raises(InputError, match=message):
            model.logits(ids)
    finally:
        model.tokenizer = None


def test_what_is_not_one_row_a_prompt_repeats_whole_and_the_rest_row_by_row():
    patches, grid = torch.arange(6.0).reshape(6, 1), torch.tensor([[1, 2, 1], [1, 4, 1]])
    inputs = {
        "input_ids": torch.tensor([[1, 2], [3, 4]]),
        "pixel_values": patches,
        "image_grid_thw": grid,
        "position_ids": torch.arange(2)[None],
        "cache_position": torch.arange(2),
    }
    twice = repeated_inputs(inputs, 2, 2)
    assert twice["input_ids"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert torch.equal(twice["pixel_values"], torch.cat([patches, patches])) and twice["image_grid_thw"].shape == (4, 3)
    assert twice["position_ids"].shape == (1, 2) and twice["cache_position"].shape == (2,)
    three = torch.arange(12).reshape(3, 2, 2)
    assert torch.equal(repeated_inputs({"position_ids": three}, 2, 2)["position_ids"], torch.cat([three, three], 1))
    with pytest.raises(UnsupportedError, match="do not know which rows of strange"):
        repeated_inputs({"strange": torch.zeros(5, 2)}, 2, 2)


def test_a_sweep_over_a_prompt_of_two_pictures_equals_each_edit_by_itself():
    config = tf.Gemma3Config(
        text_config=dict(LLAMA, head_dim=16, sliding_window=6, query_pre_attn_scalar=16),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        mm_tokens_per_image=4,
        boi_token_index=58,
        eoi_token_index=59,
        image_token_id=60,
    )
    config.image_token_id = 60
    model = mh.open_model(strong(tf.Gemma3ForConditionalGeneration(config)))
    ids = torch.randint(3, 50, (1, 14), generator=torch.Generator().manual_seed(0))
    ids[:, 2:6] = ids[:, 8:12] = 60
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "pixel_values": pictures, "token_type_ids": (ids == 60).long()}
    edits = [mh.Ablate([head]) for head in ("L1H0", "L1H3", "L0H1")]
    each = []
    for edit in edits:
        with model.editing(edit):
            each.append(model.logits(batch)[:, -1, 5].numpy())
    assert np.abs(model.sweep(batch, edits, lambda logits: logits[:, -1, 5]) - np.stack(each)).max() < 1e-4
    assert np.ptp(np.stack(each)) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_in_three_dimensions_are_left_to_a_model_that_counts_them_with_pictures(side):
    """Qwen2-VL gives a picture's patches positions of height and width: a running count of the mask would be others."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    eyes = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4, spatial_merge_size=2)
    config = tf.Qwen2VLConfig(
        text_config=dict(LLAMA, rope_parameters=rope),
        vision_config=dict(eyes, temporal_patch_size=2),
        image_token_id=60,
        vision_start_token_id=58,
        vision_end_token_id=59,
        video_token_id=57,
    )
    model, generator = (
        mh.open_model(strong(tf.Qwen2VLForConditionalGeneration(config))),
        torch.Generator().manual_seed(0),
    )

    def prompt(length):
        ids = torch.randint(3, 50, (1, length), generator=generator)
        ids[:, 1], ids[:, 2:6], ids[:, 6] = 58, 60, 59
        return ids, torch.randn(16, 96, generator=generator)

    def logits(ids, mask, pictures):
        grid = torch.tensor([[1, 4, 4]] * len(ids))
        more = {"pixel_values": pictures, "image_grid_thw": grid, "mm_token_type_ids": (ids == 60).long()}
        return model.logits({"input_ids": ids, "attention_mask": mask, **more})

    (long, first), (short, second) = prompt(12), prompt(9)
    none, one = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(short)
    join = lambda a, b: torch.cat([a, b] if side == "left" else [b, a], 1)  # noqa: E731
    ids = torch.cat([long, join(none, short)])
    mask = torch.cat([torch.ones_like(long), join(none, one)])
    together = logits(ids, mask, torch.cat([first, second]))
    alone = logits(short, one, second)[0]
    assert torch.allclose(together[0], logits(long, torch.ones_like(long), first)[0], atol=1e-4)
    assert torch.allclose(together[1, 3:] if side == "left" else together[1, :9], alone, atol=1e-4)
