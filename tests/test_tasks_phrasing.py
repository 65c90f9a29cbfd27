"""The ways to put a task to a model, and the pick of one; what texts open with."""

from functools import cache

import pytest
import torch
from test_tasks_answers import byte_tokenizer, parrot
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

import manyheads as mh
from manyheads import tasks
from manyheads.errors import InputError
from manyheads.tasks.base import Task

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<me>\n{% endif %}"
)


@cache
def talking_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def with_phrasings():
    return [name for name, task in tasks.TASKS.items() if task.variants()]


def test_a_chat_turn_is_the_prompt_in_the_template_and_the_answer_begins_the_reply():
    turn = tasks.as_chat(tasks.IOI(), talking_tokenizer())
    plain, example = tasks.IOI().examples(5, 3), turn.examples(5, 3)
    assert turn.name == "ioi"
    for one, put in zip(plain, example, strict=True):
        assert put.prompt == f"<user>{one.prompt}</><me>\n"
        assert put.corrupted == f"<user>{one.corrupted}</><me>\n"
        assert (put.answer, put.foil) == (one.answer.strip(), one.foil.strip())  # a line begins without a space
        assert {key: put.prompt[slice(*span)] for key, span in put.spans.items()} == {
            key: one.prompt[slice(*span)] for key, span in one.spans.items() if key != "end"
        } | {"end": "\n"}
    led = tasks.as_chat(tasks.IOI(), talking_tokenizer(), "Answer:").examples(1, 3)[0]
    assert led.prompt.endswith("<me>\nAnswer:")
    assert led.answer == plain[0].answer
    with pytest.raises(InputError, match="no chat template"):
        tasks.as_chat(tasks.IOI(), byte_tokenizer())


def test_solved_examples_are_of_the_training_split_and_never_the_one_asked():
    for split in ("train", "test"):
        for plain, put in zip(
            tasks.Facts().examples(40, 1, split), tasks.Solved(tasks.Facts(), 3).examples(40, 1, split), strict=False
        ):
            *shown, asked = put.prompt.split("\n\n")
            assert len(shown) == 3
            assert all(one.endswith(".") for one in shown)
            assert asked + put.answer + "." not in shown
            assert put.prompt[slice(*put.spans["subject"])] in asked
            assert put.corrupted.startswith(put.prompt[: -len(asked)])
            assert plain.spans.keys() == put.spans.keys()
    told = {one for put in tasks.Solved(tasks.Facts()).examples(60) for one in put.prompt.split("\n\n")[:-1]}
    held_out = {one.prompt for one in tasks.Facts().examples(400)}
    assert not {text.rpartition(" ")[0] for text in told} & held_out


@pytest.mark.parametrize("name", with_phrasings())
def test_a_variant_has_the_same_spans_and_a_right_answer(name):
    task = tasks.get_task(name)
    for variant in task.variants().values():
        assert variant.name == name
        assert variant != task
        for example in variant.examples(100, 2):
            at = {key: example.prompt[start:end] for key, (start, end) in example.spans.items()}
            match name:
                case "arithmetic":
                    minus = any(sign in example.prompt for sign in (" - ", "minus", "difference"))
                    a, b = int(at["a"]), int(at["b"])
                    assert 1 <= min(a, b) <= max(a, b) <= 9
                    assert int(example.answer) == (a - b if minus else a + b)
                case "needle":
                    assert example.answer == " " + at["needle"]
                    assert at["query"] == at["key"]
                    asked = example.prompt[example.prompt.rindex(". ") + 2 :]
                    assert asked + example.answer in at["sentence"]
                case "coloured_objects":
                    assert example.answer == " " + at["colour"]
                    assert at["object"] == at["query"]
                    assert example.prompt.endswith((" is", at["query"]))
                    first = example.spans["object"][0]
                    assert first < example.spans["colour"][0] < first + 25
                case "counterfactual":
                    assert at["subject"] == at["query"]
                    assert example.prompt.endswith((" is", " is the"))
                    assert " " + at["context"] in (example.answer, example.foil)


def test_operands_may_be_chosen():
    for task in (tasks.Arithmetic(operands=(2, 5)), tasks.Arithmetic(operands=(0, 999))):
        drawn = [int(e.prompt[slice(*e.spans[key])]) for e in task.examples(300, split="train") for key in "ab"]
        assert task.operands[0] <= min(drawn) <= max(drawn) <= task.operands[1]
    assert max(drawn) > 900
    with pytest.raises(InputError, match=r"such as \(1, 9\)"):
        tasks.Arithmetic(operands=(9, 1))
    with pytest.raises(InputError, match="leave no pair"):
        for split in ("train", "test"):  # one pair is in one of them
            tasks.Arithmetic("-", operands=(1, 1)).examples(1, split=split)


class Either(Task):
    """Two wordings of one question, of which the parrot knows the second."""

    name = "either"

    def __init__(self, known):
        self.known = known

    def draw(self, rng, split):
        return tasks.Example("six and one make" if self.known else "one more", " 7" if self.known else " 3", foil=" 8")

    def variants(self):
        return {} if self.known else {"known": Either(True)}


def test_the_phrasing_that_is_answered_is_picked_and_what_is_answered_stays():
    model = parrot()
    picked = tasks.suited(model, Either(False), chat=False, n=8)
    assert (picked.how, picked.verdict.verdict) == ("known", "answered")
    assert list(picked.tried) == ["plain", "known"]  # longer prompts were not needed
    plain = Either(True)
    assert tasks.suited(model, plain, n=8).task is plain


def test_where_nothing_is_above_chance_all_was_tried():
    splits = set()

    class Unknown(Task):
        name = "unknown"

        def draw(self, rng, split):
            splits.add(split)
            return tasks.Example(f"{rng.random()} is", " 7", foil=" 8" if rng.random() < 0.5 else " 6")

    model = mh.open_model(parrot().plain, tokenizer=talking_tokenizer())
    task = Unknown()
    found = tasks.suited(model, task, n=4)
    assert set(found.tried) == {"plain", "chat", 'chat with "Answer:"', "plain, solved"}
    assert found.verdict.blind
    assert splits == {"train"}  # what is then said of the test split is not chosen by it
    best = max(one.answered + one.preferred for one in found.tried.values())
    assert found.verdict.answered + found.verdict.preferred == best
    assert set(tasks.suited(model, task, chat=True, n=4).tried) == {"chat", 'chat with "Answer:"'}
    with pytest.raises(InputError, match="no chat template"):
        tasks.suited(parrot(), task, chat=True, n=4)


@pytest.mark.parametrize("name", ["repeat", "ioi", "arithmetic", "needle"])
def test_ladon_is_asked_as_it_was_trained(name):
    task = tasks.get_task(name)
    assert tasks.suited(mh.open_model(), task, n=8).task is task


def test_the_opening_token_stands_once_and_is_told():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = mh.open_model(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer=tokenizer)
    assert str(tasks.openings(model)) == "prompts open with nothing, passages with <s>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert tasks.openings(model) == tasks.texts.Openings("<s>", "<s>")
    for prompt in ("six", "<s>six"):  # as a chat template would write it
        batch = tasks.encode([tasks.Example(prompt, " 7", spans={"all": (len(prompt) - 3, len(prompt))})], tokenizer, 1)
        assert batch.input_ids.tolist() == [[bos, *tokenizer("six", add_special_tokens=False).input_ids]]
        assert batch.spans["all"].tolist() == [[1, 4]]
    assert str(tasks.openings(mh.open_model())) == "prompts open with nothing, passages with <s>"
    assert torch.is_tensor(batch.input_ids)
