"""Answers of several tokens: where they are read, how they are scored, and what is said of a family."""

import hashlib
from functools import cache
from math import comb

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import manyheads as mh
from manyheads import tasks
from manyheads.atlas.core.answered import is_right
from manyheads.tasks.scoring import whole_answers
from manyheads.tasks.verdicts import TaskVerdict, task_verdict

LEARNED = ("six and one make 7.", "six and ten make 16.", "after ten: 20!", "red, red and red")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@cache
def parrot() -> mh.HeadModel:
    """A small model that knows `LEARNED` by heart, a byte a token."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    module = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    rows = [torch.tensor([tokenizer(text).input_ids]) for text in LEARNED]
    for _ in range(60):
        loss = torch.stack([module(ids, labels=ids).loss for ids in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mh.open_model(module.eval().requires_grad_(False), tokenizer=tokenizer)


def text_of(batch: tasks.TaskBatch, row: int, ids: torch.Tensor) -> str:
    return byte_tokenizer().decode(ids[row][batch.attention_mask[row].bool()])


def test_what_answer_and_foil_share_stands_in_the_row_and_the_last_column_is_where_they_part():
    example = tasks.Example(
        "six and ten make",
        " 16",
        foil=" 17",
        corrupted="two and ten make",
        corrupted_answer=" 32",
        spans={"a": (0, 3), "end": (12, 16)},
        accepted=(" 19", " 24"),
    )
    batch = tasks.encode([example], byte_tokenizer(), n=1)
    assert text_of(batch, 0, batch.input_ids) == "six and ten make 1"
    assert text_of(batch, 0, batch.corrupted_ids) == "two and ten make 3"  # with its own first digit
    ids = {one: byte_tokenizer()(one).input_ids for one in " 1234679"}
    assert [*batch.answer_ids.tolist(), *batch.foil_ids.tolist()] == ids["6"] + ids["7"]
    assert batch.corrupted_answer_ids.tolist() == ids["2"]
    assert batch.accepted_ids == [sorted(ids["6"] + ids["9"])]  # 24 does not begin with 1
    (whole,) = batch.wholes
    assert whole.answer == ids[" "] + ids["1"] + ids["6"]
    assert whole.foil == ids[" "] + ids["1"] + ids["7"]
    assert whole.accepted == [whole.answer, ids[" "] + ids["1"] + ids["9"], ids[" "] + ids["2"] + ids["4"]]
    assert whole.shared == 2
    assert batch.spans["end"].tolist() == [[17, 18]]
    assert batch.spans["a"].tolist() == [[0, 3]]
    assert batch.take(torch.tensor([0])).wholes == batch.wholes


def test_without_a_foil_nothing_moves():
    batch = tasks.encode([tasks.Example("six and ten make", " 16")], byte_tokenizer(), n=1)
    assert text_of(batch, 0, batch.input_ids) == "six and ten make"
    assert batch.answer_ids.tolist() == byte_tokenizer()(" ").input_ids
    assert len(batch.wholes[0].answer) == 3
    assert batch.wholes[0].shared == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": " 1"}, "foil and answer begin one another"),
        ({"foil": " 1"}, "foil and answer begin one another"),
        ({"answer": ""}, "answer is no tokens of its own"),
        ({"corrupted_answer": " 9"}, "twin's answer ends where answer and foil part"),
        ({"corrupted": "nine and ten make"}, "twin has another length"),
    ],
)
def test_what_cannot_be_told_apart_is_dropped_with_its_reason(change, reason):
    settings = dict(answer=" 16", foil=" 17", corrupted="two and ten make", corrupted_answer=" 32") | change
    _, dropped = tasks.try_encode([tasks.Example("six and ten make", **settings)], byte_tokenizer(), n=1)
    assert dropped == {reason: 1}


def test_an_answer_that_merges_with_the_prompt_is_dropped():
    vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("b", "c")])))
    assert tasks.try_encode([tasks.Example("ab", "c")], tokenizer, 1)[1] == {"answer is no tokens of its own": 1}
    assert tasks.encode([tasks.Example("ab", "ac")], tokenizer, 1).wholes[0].answer == [0, 2]


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_every_family_has_twins_and_spans_with_a_byte_a_token(name):
    batch = tasks.encode(tasks.get_task(name), byte_tokenizer(), n=6)
    for i, (example, whole) in enumerate(zip(batch.examples, batch.wholes, strict=True)):
        moved = byte_tokenizer().decode(whole.answer[: whole.shared])
        assert text_of(batch, i, batch.input_ids) == example.prompt + moved
        assert byte_tokenizer().decode(whole.answer) == example.answer
        assert batch.answer_ids[i] == whole.answer[whole.shared]
        assert batch.answer_ids[i] != batch.foil_ids[i]
        twin = text_of(batch, i, batch.corrupted_ids)
        assert twin.startswith(example.corrupted)
        assert len(twin) == len(example.prompt + moved)
        for key in set(example.spans) - {"end"}:
            start, end = batch.spans[key][i].tolist()
            assert byte_tokenizer().decode(batch.input_ids[i, start:end]) == example.prompt[slice(*example.spans[key])]


def test_ladons_batches_are_what_they_have_always_been():
    tokenizer, digest = mh.open_model().tokenizer, hashlib.sha256()
    for task in tasks.TASKS.values():
        for split in ("train", "test"):
            b = tasks.encode(task, tokenizer, 16, 0, split)
            assert b.whole is None
            tensors = (b.input_ids, b.attention_mask, b.answer_ids, b.foil_ids, b.corrupted_ids, b.corrupted_mask)
            for tensor in (*tensors, b.corrupted_answer_ids, *b.spans.values()):
                digest.update(tensor.numpy().tobytes() + str(tuple(tensor.shape)).encode())
            digest.update(repr((b.accepted_ids, list(b.spans), b.dropped)).encode())
    assert digest.hexdigest()[:16] == "b347f23edf913fb1"


CASES = [
    # the model writes 7 and a full stop
    (tasks.Example("six and one make", " 7", foil=" 8"), True),
    (tasks.Example("six and one make", " 8", foil=" 7"), False),
    # it writes 16, of which 1 is only the beginning
    (tasks.Example("six and ten make", " 1", foil=" 7"), False),
    (tasks.Example("six and ten make", " 16", foil=" 17"), True),
    (tasks.Example("six and ten make", " 17", foil=" 26"), False),
    # it writes 20, which is accepted, though the answer drawn begins in another way than it, and shares a digit with the foil
    (tasks.Example("after ten:", " 12", foil=" 19", accepted=(" 11", " 12", " 20")), True),
    (tasks.Example("after ten:", " 12", foil=" 19", accepted=(" 11", " 12", " 21")), False),
    (tasks.Example("after ten:", " 11"), False),
    (tasks.Example("red, red", " and", foil=" ant"), True),
]


def test_an_answer_is_right_if_greedy_decoding_writes_all_of_it_and_not_more():
    model = parrot()
    batch = tasks.encode([example for example, _ in CASES], model.tokenizer, len(CASES))
    assert len(batch) == len(CASES)
    assert is_right(model, batch).tolist() == whole_answers(model, batch).right.tolist() == [ok for _, ok in CASES]
    for example, ok in CASES:  # what is padded beside it changes nothing
        assert is_right(model, tasks.encode([example], model.tokenizer, 1)).item() == ok


def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens():
    model = parrot()
    batch = tasks.encode([example for example, _ in CASES], model.tokenizer, len(CASES))
    scores = whole_answers(model, batch)
    for i, (example, _) in enumerate(CASES):
        for text, found in ((example.answer, scores.answer[i]), (example.foil, scores.foil[i])):
            if text is None:
                assert found.isnan()
                continue
            before = len(model.tokenizer(example.prompt).input_ids)
            ids = torch.tensor([model.tokenizer(example.prompt + text).input_ids])
            log_p = model.logits(ids)[0].double().log_softmax(-1)
            assert found.item() == pytest.approx(
                sum(log_p[j - 1, ids[0, j]].item() for j in range(before, ids.shape[1]))
            )


def test_single_token_answers_cost_one_pass():
    model, passes = mh.open_model(), []
    batch = tasks.encode(tasks.IOI(), model.tokenizer, 8)
    logits = model.logits(batch.inputs)
    hook = model.plain.register_forward_pre_hook(lambda *_: passes.append(1))
    assert torch.equal(is_right(model, batch), tasks.right_answers(logits[:, -1], batch))
    assert len(passes) == 1
    scores = whole_answers(model, batch)
    assert len(passes) == 2
    hook.remove()
    assert torch.allclose(scores.answer - scores.foil, batch.logit_difference(logits), atol=1e-4)


class Known(tasks.Task):
    """Rows of `CASES` by turns: `pick` chooses them."""

    name = "known"

    def __init__(self, *pick):
        self.pick = pick

    def draw(self, rng, split):
        return CASES[rng.choice(self.pick)][0]


def test_a_family_is_answered_preferred_or_at_chance():
    model = parrot()
    answered = task_verdict(model, Known(0, 3), n=10)
    assert (answered.verdict, answered.answered, answered.preferred, answered.stderr) == ("answered", 1, 1, 0)
    assert answered.p_value == pytest.approx(2**-10)
    preferred = task_verdict(model, Known(2), n=10)  # 1 is likelier than 7, but the model writes 16
    assert (preferred.verdict, preferred.answered, preferred.preferred) == ("preferred", 0, 1)
    assert not preferred.blind
    half = task_verdict(model, Known(0, 1), n=40)  # always 7, which is the answer of about a half
    assert half.verdict == "at chance"
    assert half.blind
    wins = round(40 * half.preferred)
    assert half.p_value == pytest.approx(sum(comb(40, k) for k in range(wins, 41)) / 2**40)
    assert half.answered == half.preferred
    assert half.stderr == pytest.approx((half.preferred * (1 - half.preferred) / 39) ** 0.5)
    worst = task_verdict(model, Known(1), n=10)
    assert (worst.verdict, worst.p_value) == ("at chance", 1)


def test_without_foils_the_share_answered_decides():
    assert task_verdict(parrot(), Known(7), n=4).verdict == "at chance"
    rows = tasks.encode([tasks.Example("after ten:", " 20")] * 4, parrot().tokenizer, 4)
    assert task_verdict(parrot(), rows).verdict == "answered"


def test_a_family_that_the_tokenizer_cannot_encode_is_blind_with_the_reasons():
    class Empty(Known):
        def draw(self, rng, split):
            return tasks.Example("six", "")

    verdict = task_verdict(parrot(), Empty(0), n=3)
    assert (verdict.n, verdict.verdict) == (0, "at chance")
    assert verdict.dropped == {"answer is no tokens of its own": 24}
    assert isinstance(verdict, TaskVerdict)


def test_ties_count_half_and_are_left_out_of_p():
    """A model whose output matrix is zero finds all tokens alike: answers of one length are ties, shorter ones win."""
    silent = parrot().bake(mh.Scale([], 1.0))
    silent.plain.lm_head.weight.data.zero_()
    tied = task_verdict(silent, Known(0, 3, 4), n=6)
    assert (tied.preferred, tied.p_value, tied.verdict) == (0.5, 1.0, "at chance")
