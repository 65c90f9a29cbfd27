"""Examples as tensors, with tokenizers the tasks were not made for."""

from functools import cache

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manyheads import tasks
from manyheads.errors import InputError
from manyheads.tasks.families.greater_than import probability_difference

FAMILIES = sorted(tasks.TASKS)


@cache
def word_tokenizer(around: str | None = None) -> PreTrainedTokenizerFast:
    """One id a word or punctuation mark, years in groups of two digits; `around` adds special tokens."""
    pattern = Regex(r"\p{N}{1,2}|\w+|[^\w\s]+|\n")
    splitter = pre_tokenizers.Split(pattern, "removed", invert=True)
    texts = [
        e.prompt + e.answer + " " + (e.corrupted or "") + (e.corrupted_answer or "") + (e.foil or "")
        for t in tasks.TASKS.values()
        for e in t.examples(300)
    ]
    texts += [" ".join(f"{i:02d}" for i in range(100))]
    words = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    specials = ["<s>", "</s>", "<unk>", "<pad>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte its own token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_foreign_tokenizer_gets_full_batches(name, words):
    batch = tasks.encode(tasks.get_task(name), words, n=20)
    assert len(batch) == 20
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.corrupted_ids.shape
    for i, example in enumerate(batch.examples):
        row = batch.input_ids[i][batch.attention_mask[i].bool()]
        assert row.tolist() == words(example.prompt).input_ids
        assert words(example.prompt + example.answer).input_ids == [*row.tolist(), batch.answer_ids[i].item()]
        assert batch.answer_ids[i] in batch.accepted_ids[i]
        assert batch.foil_ids[i] == -1 or batch.foil_ids[i] != batch.answer_ids[i]
        twin = batch.corrupted_ids[i][batch.corrupted_mask[i].bool()]
        assert twin.tolist() == words(example.corrupted).input_ids


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("around", [None, "<s> $A", "<s> $A </s>"])
def test_token_spans_hold_the_text_of_the_spans(name, around):
    tokenizer = word_tokenizer(around)
    batch = tasks.encode(tasks.get_task(name), tokenizer, n=10, seed=5)
    for i, example in enumerate(batch.examples):
        for key, (start, end) in example.spans.items():
            first, last = batch.spans[key][i].tolist()
            assert batch.attention_mask[i, first:last].all()
            expected = tokenizer(example.prompt[start:end], add_special_tokens=False).input_ids
            assert batch.input_ids[i, first:last].tolist() == expected


def test_a_tokenizer_that_adds_bos_gets_it_once_and_no_eos():
    batch = tasks.encode(tasks.IOI(), word_tokenizer("<s> $A </s>"), n=8)
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        row = ids[mask.bool()].tolist()
        assert row[0] == 0
        assert row.count(0) == 1
        assert 1 not in row


def test_prompts_are_padded_on_the_left(words):
    batch = tasks.encode(tasks.Needle(), words, n=16)
    assert (batch.attention_mask[:, -1] == 1).all()
    assert (batch.attention_mask.diff(dim=1) >= 0).all()
    assert (batch.input_ids[batch.attention_mask == 0] == words.pad_token_id).all()


def test_an_unusable_tokenizer_is_refused_with_the_reasons():
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, "?")), unk_token="?")
    with pytest.raises(InputError, match=r"none of 40 ioi examples \(40 x answer is no tokens of its own\)"):
        tasks.encode(tasks.IOI(), nothing, n=5)


def test_dropped_examples_are_counted_by_reason(words):
    good = tasks.Facts().examples(3)
    unknown = tasks.Example("The capital of Italy is", " Xyzzy")
    long_twin = tasks.Example(
        "The capital of Italy is", " Rome", corrupted="The capital of the Italy is", corrupted_answer=" Rome"
    )
    batch = tasks.encode([unknown, *good, long_twin, unknown], words, n=10)
    assert batch.examples == good
    assert batch.dropped == {"answer is no tokens of its own": 2, "twin has another length": 1}


def test_examples_without_foil_or_twin_are_kept(words):
    batch = tasks.encode([tasks.Example("The capital of Italy is", " Rome")], words, n=1)
    assert batch.foil_ids.tolist() == batch.corrupted_answer_ids.tolist() == [-1]
    assert batch.corrupted_ids is None
    assert batch.corrupted_mask is None


def test_accuracy_counts_every_accepted_answer(words):
    batch = tasks.encode(tasks.GreaterThan(), words, n=6)
    logits = torch.zeros(6, len(words))
    for i, right in enumerate(batch.accepted_ids):
        logits[i, right[-1] if i < 3 else words.pad_token_id] = 1.0
    assert tasks.accuracy(logits, batch) == 0.5


def test_probability_difference_is_one_for_certain_later_years(words):
    later = torch.full((1, len(words)), -50.0)
    later[0, words.convert_tokens_to_ids("60")] = 50.0
    assert probability_difference(later, [43], words).item() == pytest.approx(1.0)
    assert probability_difference(later, [60], words).item() == pytest.approx(-1.0)
    with pytest.raises(InputError, match="00 to 99"):
        probability_difference(later, [43], byte_tokenizer())
