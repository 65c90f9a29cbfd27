"""`generate` gives Transformers' own answer, as text where text was given, and edits stay with the prompts they were made for."""

import pytest
import torch
from architectures import opened, padded, shared

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.editing.rows import Rows

HEADS = [(layer, h) for layer in range(3) for h in range(4)]
PROMPTS = ["Monday Tuesday", "red green blue"]
WAYS = {
    "beams": {"num_beams": 3, "do_sample": False},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "samples": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
}


def two(seed=0):
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def ladon():
    return mh.open_model()


@pytest.mark.parametrize("way", WAYS)
def test_several_sequences_of_a_text_are_all_told_in_transformers_order(ladon, way):
    settings = {"max_new_tokens": 4} | WAYS[way]
    n = settings.get("num_return_sequences", 1)
    batch = ladon.inputs(PROMPTS)
    batch.pop("position_ids", None)
    rows = ladon.plain.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    wanted = ladon.tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert ladon.generate(PROMPTS, **settings) == wanted and len(wanted) == 2 * n
    alone = ladon.generate(PROMPTS[0], **settings)
    assert alone == (wanted[:n] if n > 1 else wanted[0])


def test_a_dict_is_handed_on_with_the_texts_beside_it(ladon):
    settings = {"max_new_tokens": 5, "do_sample": False}
    out = ladon.generate(PROMPTS, return_dict_in_generate=True, output_logits=True, **settings)
    assert out.texts == ladon.generate(PROMPTS, **settings)
    assert len(out.logits) == 5 and "texts" not in out
    ids = ladon.inputs(PROMPTS[0])["input_ids"]
    told = ladon.generate(ids, return_dict_in_generate=True, **settings)
    assert torch.equal(told.sequences, ladon.generate(ids, **settings)) and not hasattr(told, "texts")


def test_stop_strings_and_assistants_need_no_more_than_to_be_named(ladon):
    plain = ladon.generate("Monday Tuesday", max_new_tokens=12, do_sample=False)
    assert "Friday" in plain and not plain.endswith("Friday")
    stopped = ladon.generate("Monday Tuesday", max_new_tokens=12, do_sample=False, stop_strings=["Friday"])
    assert stopped == plain[: plain.index("Friday") + 6]
    assert ladon.generate("Monday Tuesday", max_new_tokens=12, do_sample=False, assistant_model=ladon) == plain


def _rowwise(model, ids):
    """Edits that mean another thing for each of two prompts, and what they mean for each prompt alone."""
    z = model.read_z(two(1))
    longer = torch.cat([z, *[z[:, :, -1:]] * 8], 2)  # for the columns of the new tokens too
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    return {
        "rows": (mh.Scale(HEADS, -2.0, rows=[1]), [None, mh.Scale(HEADS, -2.0)]),
        "negative rows": (mh.Scale(HEADS, -2.0, rows=[-2]), [mh.Scale(HEADS, -2.0), None]),
        "positions": (
            mh.Scale(HEADS, -2.0, positions=torch.tensor([[2, 9], [5, 11]])),
            [mh.Scale(HEADS, -2.0, positions=[2, 9]), mh.Scale(HEADS, -2.0, positions=[5, 11])],
        ),
        "source": (mh.Patch(HEADS, longer), [mh.Patch(HEADS, longer[:, [i]]) for i in range(2)]),
        "reference": (
            mh.Ablate(HEADS, "resample", longer),
            [mh.Ablate(HEADS, "resample", longer[:, [i]]) for i in range(2)],
        ),
        "keys": (
            mh.Mask(HEADS, torch.tensor([[1, 2], [3, 6]])),
            [mh.Mask(HEADS, [1, 2]), mh.Mask(HEADS, [3, 6])],
        ),
        "weights": (
            Rows(HEADS, torch.tensor([[0, 3], [2, 4]]), weights, positions=[8, 9, 10]),
            [Rows(HEADS, [[0, 3], [2, 4]][i], weights[i], positions=[8, 9, 10]) for i in range(2)],
        ),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["rows", "negative rows", "positions", "source", "reference", "keys", "weights"])
def test_edits_follow_their_rows_through_beams_and_returned_sequences(kind, way):
    model, ids = opened("llama"), two()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5} | WAYS[way]
    edit, alone = _rowwise(model, ids)[kind]
    with model.editing(edit):
        got = model.generate(ids, **settings)
        again = model.generate(ids, **settings)
    wanted = []
    for row, own in enumerate(alone):
        with model.editing(*([] if own is None else [own])):
            wanted.append(model.generate(ids[[row]], **settings))
    assert torch.equal(got, torch.cat(wanted)) and torch.equal(again, got)
    assert not torch.equal(got, model.generate(ids, **settings))  # so the edit does something
    assert not model._dispatch.edits


def test_edits_that_cannot_follow_their_rows_are_refused_by_name():
    model, ids = opened("llama"), two()
    with model.editing(mh.Ablate(HEADS, "resample")), pytest.raises(UnsupportedError, match="resample ablation"):
        model.generate(ids, max_new_tokens=1, num_beams=2)

    class Own(mh.Scale):
        pass

    with model.editing(Own(HEADS, 0.0)), pytest.raises(UnsupportedError, match="Own cannot follow its rows"):
        model.generate(ids, max_new_tokens=2, num_beams=2)
    with model.editing(Own(HEADS, 0.0)):
        assert model.generate(ids[:1], max_new_tokens=2, num_beams=2).shape == (1, 11)
    with model.editing(mh.Scale(HEADS, 0.0, rows=[2])), pytest.raises(InputError, match="batch of 2"):
        model.generate(ids, max_new_tokens=2, num_beams=2)


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    ("inputs", "settings", "sentence"),
    [
        ([], {}, "at least one"),
        ([3, 4], {}, "list of texts"),
        (["", "red"], {}, "empty"),
        (torch.zeros(0, 4, dtype=torch.long), {}, "at least one row"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "at least one row"),
        (torch.ones(1, 3), {}, "whole numbers"),
        (torch.tensor([[5, 99_999]]), {}, "token id 99999 is out of range"),
        (torch.tensor([[5, -1]]), {}, "token id -1 is out of range"),
        ("Monday", {"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ("Monday", {"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_in_a_sentence(ladon, inputs, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ladon.generate(inputs, max_new_tokens=2, **settings)


def test_a_prompt_that_ends_in_padding_is_refused_and_a_left_padded_one_is_read():
    model = opened("llama")
    with pytest.raises(InputError, match="row 1 of the prompt is padded after"):
        model.generate(padded("llama", "right"), max_new_tokens=2)
    batch = padded("llama", "left")
    nothing = batch | {"attention_mask": batch["attention_mask"] * torch.tensor([[1], [1], [0]])}
    with pytest.raises(InputError, match="row 2 of the attention mask has no token"):
        model.generate(nothing, max_new_tokens=2)
    wanted = shared("llama").generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(batch, max_new_tokens=4, do_sample=False), wanted)
    assert torch.equal(model.generate(model.inputs(batch), max_new_tokens=4, do_sample=False), wanted)


def test_more_tokens_than_a_table_of_positions_has_are_refused_in_a_sentence():
    ids = torch.full((1, 120), 5)
    with pytest.raises(InputError, match="beyond the model's 128 positions"):
        opened("gpt2").generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert opened("gpt2").generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (1, 128)


def test_edits_follow_prompts_that_are_given_as_embeddings():
    model, ids = opened("llama"), two()
    embedded = {
        "inputs_embeds": model.plain.get_input_embeddings()(ids).detach(),
        "attention_mask": torch.ones_like(ids),
    }
    with model.editing(mh.Scale(HEADS, -2.0, rows=[1])):
        settings = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
        assert torch.equal(model.generate(embedded, **settings), model.generate(ids, **settings)[:, 9:])
