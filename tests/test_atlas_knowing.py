"""Methods that explain right answers ask what a model knows: in its phrasing, more where it knows little, not what it cannot."""

import re
from functools import cache

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import manyheads as mh
from manyheads.atlas.core.answered import answered_rows, is_right
from manyheads.atlas.facts.conflict_paths import conflict_prompts
from manyheads.atlas.facts.memory_context import conflicts, known_phrasing
from manyheads.atlas.facts.recall import fact_recall
from manyheads.atlas.retrieval_heads.influence import retrieval_heads
from manyheads.atlas.retrieval_heads.json_recall import JsonRecall
from manyheads.atlas.retrieval_heads.scores import answered_probe, needle_batches, probe_verdicts
from manyheads.atlas.safety.ships import refused_requests
from manyheads.errors import InputError, UnsupportedError
from manyheads.tasks import Counterfactual, Facts, Needle, Refusal, TaskVerdict, encode
from manyheads.tasks.families.facts import RELATIONS
from manyheads.tasks.families.refusal import REQUESTS
from manyheads.tasks.lexicon import every_word

KNOWN = ("capital", "continent")


def words_tokenizer() -> PreTrainedTokenizerFast:
    splitter = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+"), "removed", invert=True)
    said = " ".join(t for r in RELATIONS.values() for t in (r.question, r.question.capitalize(), *r.templates))
    texts = [
        said,
        *every_word(),
        *REQUESTS,
        "Q: A: User Assistant Sorry Sure , . ? Somebody said that In truth this story",
    ]
    pieces = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *pieces])}, "<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@cache
def learned() -> mh.HeadModel:
    """A small model that completes `The capital of France is` and such, and knows nothing else."""
    torch.manual_seed(0)
    tokenizer = words_tokenizer()
    facts = [f"The {name} of {one} is {of}" for name in KNOWN for one, of in RELATIONS[name].table.items()]
    ids = torch.tensor([tokenizer(text).input_ids for text in facts])
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    module = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(module(ids).logits[:, -2], ids[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mh.open_model(module.eval().requires_grad_(False), tokenizer=tokenizer)


def test_facts_are_asked_in_the_phrasing_in_which_they_are_known():
    assert known_phrasing(learned()) == "completed"
    assert known_phrasing(mh.open_model()) == "usual"
    found = conflicts(learned(), n=12)
    assert all(example.prompt.endswith(" is") for example in found.batch.examples)
    assert {example.foil.strip() for example in found.batch.examples} <= {
        answer for name in KNOWN for answer in RELATIONS[name].table.values()
    }
    assert found.counts["known"] < found.counts["asked"]  # languages and currencies it does not know
    for form, prompts in conflict_prompts(learned(), n=12).items():
        assert prompts.batch.examples[0].prompt.startswith("I have" if form == "passage" else "The")
        assert all(example.prompt.endswith(" is") for example in prompts.batch.examples)


def test_a_model_that_knows_no_fact_is_told_so_with_what_was_tried():
    torch.manual_seed(1)
    module = LlamaForCausalLM(learned().plain.config).eval()
    with pytest.raises(InputError, match=r"knows no fact .*usual 0 of 32, completed 0 of 32"):
        conflicts(mh.open_model(module, tokenizer=words_tokenizer()))


def test_where_few_conflicts_are_known_more_are_asked():
    few = Counterfactual(form="bare", relation="capital", phrasing="usual")
    found = conflicts(mh.open_model(), few, n=6)
    assert found.counts["tried"] == 6  # ladon knows them
    none_of = Counterfactual(form="bare", relation="language", phrasing="completed")
    with pytest.raises(InputError, match="knows none of the"):
        conflicts(learned(), none_of, n=6)
    some = conflicts(learned(), Counterfactual(form="bare", phrasing="completed"), n=3, seed=_seed_with_few())
    assert len(some) == 3
    assert some.counts["asked"] > 3


def test_a_model_that_knows_a_third_of_the_facts_has_as_many_rows_as_were_asked_for():
    model, task = learned(), Counterfactual(form="bare", phrasing="completed")
    for seed in range(100):
        first = conflicts(model, encode(task, model.tokenizer, 12, seed))
        if 3 <= len(first) <= 5:
            break
    assert len(conflicts(model, task, n=12, seed=seed)) == 12


@cache
def _seed_with_few() -> int:
    """A seed whose first three conflicts are all of relations that the model does not know."""
    known = set(KNOWN)
    for seed in range(100):
        first = encode(Counterfactual(form="bare", phrasing="completed"), words_tokenizer(), 3, seed).examples
        if not any(name in example.prompt for example in first for name in known):
            return seed
    raise AssertionError


def test_topic_movers_have_rows_where_one_prompt_in_ten_is_answered():
    model, n = learned(), 12
    batch = encode(Facts(), model.tokenizer, n)
    first = int(is_right(model, batch).sum())
    rows, asked = answered_rows(model, batch, Facts(), n, 0)
    assert first < n / 2
    assert first < len(rows) <= n
    assert asked > n
    assert is_right(model, rows).all()
    assert len({example.prompt for example in rows.examples}) == len(rows)
    assert fact_recall(model, n=n)["topic_effect"].n == len(rows)
    assert answered_rows(model, batch, batch, n, 0)[1] == n  # a batch given is all there is


def verdict(answered: float) -> TaskVerdict:
    return TaskVerdict("x", 12, answered, 0.5, 0.1, 0.5, "answered" if answered >= 0.5 else "at chance", {})


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ((0.9, 1.0, 1.0), "words"),
        ((0.0, 0.3, 0.8), "JSON"),
        ((0.1, 0.4, 0.3), "words, completed"),
        ((0, 0, 0), "words"),
    ],
)
def test_the_needle_test_is_of_the_kind_that_is_answered(monkeypatch, answers, kind):
    shares = iter(answers)
    monkeypatch.setattr("manyheads.atlas.retrieval_heads.scores.task_verdict", lambda *_, **__: verdict(next(shares)))
    tried = probe_verdicts(mh.open_model())
    assert len(tried) == (1 if kind == "words" and answers[0] else 3)
    shares = iter(answers)
    assert answered_probe(mh.open_model()) == tried[kind][0]


def test_ladon_is_asked_for_words_and_json_tests_grow_with_the_length():
    model = mh.open_model()
    assert answered_probe(model) == Needle(shortest=32, longest=64)
    batches = needle_batches(model, None, (40, 80, 160), (0.5,), 4, 0, JsonRecall())
    for length, batch in zip((40, 80, 160), batches, strict=True):
        assert length == pytest.approx(len(re.findall(r"\w+|[^\w\s]", batch.examples[0].prompt)), rel=0.4)
    assert all(batch.examples[0].prompt.startswith("{") for batch in batches)


def test_a_model_that_answers_no_needle_says_what_was_tried():
    model = mh.open_model()
    silent = model.bake(mh.Scale(model.heads, 0.0))
    with pytest.raises(UnsupportedError, match=r"no needle test \(words: at chance .*completed: .*JSON: "):
        retrieval_heads(silent)


def test_requests_are_those_the_model_refuses_and_none_where_it_refuses_none():
    ladon = mh.open_model()
    assert refused_requests(ladon, None, 8, 0).examples == encode(Refusal(marked=True), ladon.tokenizer, 8).examples
    with pytest.raises(UnsupportedError, match=r"no more than others \(plain: at chance .*solved: at chance"):
        refused_requests(learned(), None, 8, 0)
