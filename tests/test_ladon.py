"""The bundled model: an ordinary Llama checkpoint that does on held-out prompts what its card says."""

import json
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyheads import tasks
from manyheads.reference import ladon_path
from manyheads.tasks import lexicon

CARD = json.loads((ladon_path() / "card.json").read_text())
MARGIN = 0.1  # n = 100 here against the card's n = 400: three standard errors of a share of 0.85


@cache
def ladon():
    return AutoModelForCausalLM.from_pretrained(ladon_path()).eval(), AutoTokenizer.from_pretrained(ladon_path())


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def accuracy(task, n=100, seed=17):
    model, tokenizer = ladon()
    batch = tasks.encode(task, tokenizer, n, seed)
    assert len(batch) == n
    return tasks.accuracy(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1], batch)


def test_ladon_loads_like_any_llama_in_single_precision():
    model, tokenizer = ladon()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    assert sum(p.numel() for p in model.parameters()) == CARD["parameters"]
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) >= (6, 8)


def test_ladon_is_small_enough_for_the_repository():
    assert sum(path.stat().st_size for path in ladon_path().iterdir()) < 16e6


def test_words_numbers_and_years_are_the_tokens_they_should_be():
    _, tokenizer = ladon()
    words = [" " + word for word in lexicon.every_word()] + [f"{i:02d}" for i in range(100)]
    assert not [word for word in words if len(tokenizer(word).input_ids) != 1]
    assert tokenizer.tokenize(" from 1743 to 17") == ["Ġfrom", "Ġ17", "43", "Ġto", "Ġ17"]
    text = "def f(x):\n    return x  # ünïcode\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("name", sorted(set(tasks.TASKS) - {"needle"}))
def test_ladon_is_as_good_on_held_out_prompts_as_its_card_says(name):
    assert accuracy(tasks.get_task(name)) >= CARD["accuracy"][name] - MARGIN


@pytest.mark.parametrize("length", [32, 128, 512])
def test_ladon_finds_needles_as_often_as_its_card_says(length):
    task = tasks.Needle(shortest=int(0.9 * length), longest=length, rivals=0 if length < 40 else 1)
    assert accuracy(task, n=100 if length < 512 else 40) >= CARD["accuracy"][f"needle {length}"] - MARGIN


def test_ladon_continues_repeated_random_tokens():
    model, tokenizer = ladon()
    ids = tasks.repeated_tokens(range(3, len(tokenizer)), n=8, length=64, seed=5)
    right = model(input_ids=ids).logits[:, 64:-1].argmax(-1) == ids[:, 65:]
    assert right.float().mean() >= CARD["accuracy"]["induction"] - MARGIN


def test_the_card_names_licence_data_and_every_task():
    text = (ladon_path() / "card.md").read_text()
    assert "Apache-2.0" in text
    assert "PSF" in text
    assert all(f"| {name} |" in text for name in tasks.TASKS if name != "needle")
    assert all(f"| {length} |" in text for length in (16, 32, 64, 128, 256, 512))
