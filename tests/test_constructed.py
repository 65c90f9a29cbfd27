"""Constructed models are what they say, by plain Transformers: no detector of ours is used here."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyheads.errors import InputError
from manyheads.heads import Head, HeadSet
from manyheads.lab.circuits import codes
from manyheads.lab.constructed import ALL_KINDS, Constructed, constructed
from manyheads.lab.words import CLASSES, WORDS

PERIOD = 40
MODELS = {
    "llama": dict(shape="llama"),
    "gpt2": dict(shape="gpt2"),
    "grouped": dict(shape="llama", n_layers=5, n_heads=8, n_kv_heads=2),
    "wide heads": dict(shape="gpt2", n_layers=5, n_heads=2),
}
every_model = pytest.mark.parametrize("name,seed", [(name, seed) for name in MODELS for seed in range(2)])


@lru_cache
def model(name: str, seed: int) -> Constructed:
    made = constructed(seed=seed, **MODELS[name])
    made.module.set_attn_implementation("eager")
    return made


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words(n: int, length: int, seed: int) -> Int[Tensor, "n length"]:
    """Rows of different words, specials aside."""
    generator = torch.Generator().manual_seed(seed)
    first = 3
    return first + torch.stack([torch.randperm(len(WORDS) - first, generator=generator)[:length] for _ in range(n)])


def with_bos(ids: Int[Tensor, "n length"]) -> Int[Tensor, "n 1+length"]:
    return torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), ids], 1)


@torch.no_grad()
def patterns(made: Constructed, ids: Tensor) -> Float[Tensor, "L B H T S"]:
    return torch.stack(made.module(ids, output_attentions=True).attentions)


def assert_only_known(values: Float[Tensor, "L H"], known: HeadSet, above: float, below: float) -> None:
    """Known heads score more than `above`, all others less than `below`."""
    for head in (Head(*map(int, place)) for place in np.ndindex(*values.shape)):
        value = float(values[head])
        assert value > above if head in known else value < below, f"{head} scores {value}, known are {known}"


# -- patterns ---------------------------------------------------------------------------------------------------------


@every_model
def test_only_the_previous_token_head_attends_to_the_token_before(name, seed):
    made = model(name, seed)
    pattern = patterns(made, with_bos(words(4, 2 * PERIOD, seed)))
    mass = pattern.diagonal(-1, dim1=-2, dim2=-1).mean((1, 3))
    assert_only_known(mass, made.known["previous_token"], above=0.99, below=0.2)


@every_model
def test_only_duplicate_and_induction_heads_attend_to_and_after_the_earlier_occurrence(name, seed):
    made = model(name, seed)
    pattern = patterns(made, with_bos(words(4, PERIOD, seed).repeat(1, 2)))
    now = torch.arange(PERIOD + 1, 2 * PERIOD + 1)
    duplicate = pattern[..., now, now - PERIOD].mean((1, 3))
    induction = pattern[..., now, now - PERIOD + 1].mean((1, 3))
    assert_only_known(duplicate, made.known["duplicate_token"], above=0.99, below=0.1)
    assert_only_known(induction, made.known["induction"], above=0.99, below=0.1)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_patterns_hold_over_the_whole_context(shape):
    made = model(shape, 0)
    period = 250
    pattern = patterns(made, with_bos(words(1, period, 0).repeat(1, 2)))
    now = torch.arange(period + 1, 2 * period + 1)
    assert_only_known(pattern.diagonal(-1, dim1=-2, dim2=-1).mean((1, 3)), made.known["previous_token"], 0.99, 0.1)
    assert_only_known(pattern[..., now, now - period].mean((1, 3)), made.known["duplicate_token"], 0.99, 0.1)
    assert_only_known(pattern[..., now, now - period + 1].mean((1, 3)), made.known["induction"], 0.99, 0.1)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_heads_without_a_match_rest_on_the_first_token(shape):
    made = model(shape, 1)
    rest = patterns(made, with_bos(words(4, PERIOD, 1)))[..., 0].mean((1, 3))
    for head in made.known["induction"] | made.known["duplicate_token"]:
        assert rest[head] > 0.99


# -- causes -----------------------------------------------------------------------------------------------------------


@contextmanager
def changed(weight: Tensor, value: float = 0.0):
    """Sets a part of a weight (a view) to `value` for a while."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(value)
    yield
    with torch.no_grad():
        weight.copy_(kept)


def query_rows(made: Constructed, head: Head) -> Float[Tensor, "Dh D"]:
    """What makes the queries of `head`: zero, and its attention is uniform."""
    if made.module.config.model_type == "gpt2":
        weight = made.module.transformer.h[head.layer].attn.c_attn.weight.T
        return weight[: weight.shape[1]].unflatten(0, (made.module.config.n_head, -1))[head.index]
    weight = made.module.model.layers[head.layer].self_attn.q_proj.weight
    return weight.unflatten(0, (made.module.config.num_attention_heads, -1))[head.index]


def ov_matrices(made: Constructed, layer: int) -> tuple[Float[Tensor, "H Dh D"], Float[Tensor, "H Dh D"]]:
    """W_V and W_O of every head of `layer`; views of the model's weights, so W_O can be set."""
    config = made.module.config
    if config.model_type == "gpt2":
        attention, width = made.module.transformer.h[layer].attn, config.n_embd
        values, output = attention.c_attn.weight[:, 2 * width :].T, attention.c_proj.weight
        return values.unflatten(0, (config.n_head, -1)), output.unflatten(0, (config.n_head, -1))
    attention, group = (
        made.module.model.layers[layer].self_attn,
        config.num_attention_heads // config.num_key_value_heads,
    )
    values = attention.v_proj.weight.unflatten(0, (config.num_key_value_heads, -1)).repeat_interleave(group, 0)
    return values, attention.o_proj.weight.T.unflatten(0, (config.num_attention_heads, -1))


@torch.no_grad()
def continuation(made: Constructed, ids: Tensor, n: int) -> Int[Tensor, "B n"]:
    """Greedy decoding, with a KV cache."""
    mask = torch.ones_like(ids)
    return made.module.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False)[:, ids.shape[1] :]


@every_model
def test_a_repeated_sequence_is_continued_by_the_induction_head_alone(name, seed):
    made = model(name, seed)
    row = words(4, PERIOD, seed)
    prompt, rest = with_bos(torch.cat([row, row[:, :1]], 1)), row[:, 1:]
    assert (continuation(made, prompt, PERIOD - 1) == rest).float().mean() > 0.99
    for head in (*made.known["induction"], *made.known["previous_token"]):
        with changed(ov_matrices(made, head.layer)[1][head.index]):
            assert (continuation(made, prompt, PERIOD - 1) == rest).float().mean() < 0.1


@every_model
def test_only_the_retrieval_head_copies_the_needle_and_masking_it_leaves_chance(name, seed):
    made = model(name, seed)
    haystack, needle = words(8, 100, seed), 4
    at = torch.randint(10, 80, (8,), generator=torch.Generator().manual_seed(seed))
    key = haystack.gather(1, at[:, None])
    answer = haystack.gather(1, at[:, None] + 1 + torch.arange(needle))
    text = with_bos(torch.cat([haystack, key, answer], 1))
    pattern = patterns(made, text)[..., -needle - 1 : -1, :]  # the queries that say the needle's words
    place = at[:, None] + 2 + torch.arange(needle)
    copies = (pattern.argmax(-1) == place[:, None]).float().mean((1, 3))
    assert_only_known(copies, made.known["retrieval"], above=0.99, below=0.1)

    prompt = text[:, :-needle]
    assert (continuation(made, prompt, needle) == answer).all()
    (retrieval,) = made.known["retrieval"]
    others = [Head(retrieval.layer, i) for i in range(made.module.config.num_attention_heads) if i != retrieval.index]
    with changed(query_rows(made, retrieval)):
        assert (continuation(made, prompt, needle) == answer).float().mean() < 0.1
    for head in others[:2]:
        with changed(query_rows(made, head)):
            assert (continuation(made, prompt, needle) == answer).all()


# -- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def effective_embedding(made: Constructed) -> Float[Tensor, "V D"]:
    """The sheet's E0 = MLP_0(norm(W_E))."""
    if made.module.config.model_type == "gpt2":
        block = made.module.transformer.h[0]
        return block.mlp(block.ln_2(made.module.transformer.wte.weight))
    block = made.module.model.layers[0]
    return block.mlp(block.post_attention_layernorm(made.module.model.embed_tokens.weight))


@torch.no_grad()
def ov_circuits(made: Constructed, embedding: Float[Tensor, "V D"]) -> tuple[Float[Tensor, "L H V V"], Tensor]:
    """norm(embedding) W_V W_O gain W_U of every head, with the final norm's gain; and its eigenvalues other than 0."""
    if made.module.config.model_type == "gpt2":
        norms, gain = [block.ln_1 for block in made.module.transformer.h], made.module.transformer.ln_f.weight
    else:
        norms, gain = [block.input_layernorm for block in made.module.model.layers], made.module.model.norm.weight
    matrices = [ov_matrices(made, layer) for layer in range(len(norms))]
    reads = torch.stack([norm(embedding) @ values.mT for norm, (values, _) in zip(norms, matrices, strict=True)])
    says = torch.stack([output @ (gain[:, None] * made.module.lm_head.weight.T) for _, output in matrices])
    return reads @ says, torch.linalg.eigvals((says @ reads).double())


def raw_embedding(made: Constructed) -> Float[Tensor, "V D"]:
    return made.module.get_input_embeddings().weight.detach()


@every_model
def test_only_copying_heads_have_a_positive_diagonal_and_positive_eigenvalues(name, seed):
    made = model(name, seed)
    for embedding in (raw_embedding(made), effective_embedding(made)):
        logits, eigenvalues = ov_circuits(made, embedding)
        own = logits.diagonal(dim1=-2, dim2=-1)[..., None]
        rank = (logits < own).float().mean(-1)[..., 1:].mean(-1)  # `<bos>` is never copied
        assert_only_known(rank, made.known["copying"], above=0.99, below=0.7)
        positive = eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
        assert_only_known(positive, made.known["copying"], above=0.95, below=0.25)
        assert_only_known(-positive, made.known["anti_copying"], above=0.95, below=0.25)


def successor_scores(made: Constructed, embedding: Float[Tensor, "V D"]) -> Float[Tensor, "L H"]:
    logits, _ = ov_circuits(made, embedding)
    hits: list[Bool[Tensor, "L H n"]] = []
    for ids in made.classes.values():
        best = logits[:, :, ids[:-1]][..., ids].argmax(-1)
        hits.append(best == torch.arange(1, len(ids)))
    return torch.cat(hits, -1).float().mean(-1)


@every_model
def test_only_the_successor_head_says_the_next_of_every_ordinal(name, seed):
    made = model(name, seed)
    effective, raw = effective_embedding(made), raw_embedding(made)
    for embedding in (effective, effective + raw):
        assert_only_known(successor_scores(made, embedding), made.known["successor"], above=0.999, below=0.3)
    assert successor_scores(made, raw).max() < 0.3  # seen through MLP 0 only


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_text_is_continued_with_the_successor(shape):
    made = model(shape, 0)
    for members in CLASSES.values():
        ids = made.tokenizer(members[:-1], return_tensors="pt").input_ids
        assert made.tokenizer.batch_decode(continuation(made, ids, 1)) == members[1:]
    assert (
        made.tokenizer.decode(continuation(made, made.tokenizer("A B C", return_tensors="pt").input_ids, 3)[0])
        == "D E F"
    )


# -- what is promised around the heads --------------------------------------------------------------------------------


def test_codes_are_as_far_apart_as_promised():
    products = codes()[1:] @ codes()[1:].T * 31
    assert set(products.round(6).ravel()) == {31, 7, -1, -9}
    assert np.allclose(products.diagonal(), 31)


def test_seeds_move_the_heads():
    places = {str(constructed(seed=seed).known) for seed in range(8)}
    assert len(places) == 8


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_seed_gives_the_same_bits_whatever_torch_has_drawn_and_leaves_torch_alone(shape):
    torch.manual_seed(0)
    one = constructed(shape, seed=5)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    two = constructed(shape, seed=5)
    assert one.known == two.known
    for (name, a), b in zip(one.module.named_parameters(), two.module.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_reopens_with_equal_logits(name, tmp_path):
    made = model(name, 0)
    made.module.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = with_bos(words(2, 30, 0))
    with torch.no_grad():
        assert torch.equal(reopened(ids).logits, made.module(ids).logits)
    assert not made.module.training
    assert {parameter.dtype for parameter in made.module.parameters()} == {torch.float32}
    text = "Monday : the secret word"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == made.tokenizer(text).input_ids


def test_the_tokenizer_gives_a_token_a_word_and_round_trips():
    made = model("llama", 0)
    assert len(made.tokenizer) == len(WORDS) == len(set(WORDS)) == made.module.config.vocab_size
    text = " ".join(WORDS[3:])
    ids = made.tokenizer(text).input_ids
    assert ids == [0, *range(3, len(WORDS))]
    assert made.tokenizer.decode(ids, skip_special_tokens=True) == text
    for name, members in CLASSES.items():
        assert made.tokenizer.convert_ids_to_tokens(made.classes[name]) == members
    assert made.tokenizer("Monday, xyzzy").input_ids[-1] == made.tokenizer.unk_token_id


@pytest.mark.parametrize("left_out", ALL_KINDS)
def test_a_kind_left_out_has_no_head(left_out):
    made = constructed(seed=3, plant=set(ALL_KINDS) - {left_out})
    assert set(made.known) == set(ALL_KINDS)
    assert not made.known[left_out]
    assert made.known["copying"] or left_out == "copying"
    made.module.set_attn_implementation("eager")
    pattern = patterns(made, with_bos(words(4, PERIOD, 3).repeat(1, 2)))
    now = torch.arange(PERIOD + 1, 2 * PERIOD + 1)
    assert_only_known(pattern.diagonal(-1, dim1=-2, dim2=-1).mean((1, 3)), made.known["previous_token"], 0.99, 0.2)
    assert_only_known(pattern[..., now, now - PERIOD].mean((1, 3)), made.known["duplicate_token"], 0.99, 0.1)
    assert_only_known(pattern[..., now, now - PERIOD + 1].mean((1, 3)), made.known["induction"], 0.99, 0.1)
    assert_only_known(successor_scores(made, effective_embedding(made)), made.known["successor"], 0.999, 0.3)


@settings(max_examples=8, deadline=None)
@given(
    n_layers=st.integers(2, 4), groups=st.sampled_from([(6, 6), (6, 3), (8, 4), (5, 5)]), seed=st.integers(0, 2**32 - 1)
)
def test_every_planted_head_has_a_kv_head_of_its_own_and_reads_what_is_written_below(n_layers, groups, seed):
    n_heads, n_kv_heads = groups
    made = constructed(n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, seed=seed)
    planted = [head for kind in ALL_KINDS if kind not in ("retrieval", "copying") for head in made.known[kind]]
    planted += made.known["copying"] - made.known["induction"]
    assert len(planted) == len({(head.layer, head.index * n_kv_heads // n_heads) for head in planted}) == 6
    assert made.known["retrieval"] == made.known["induction"] < made.known["copying"]
    (previous,), (induction,), (successor,) = (
        made.known[kind] for kind in ("previous_token", "induction", "successor")
    )
    assert previous.layer < induction.layer
    assert successor.layer > 0


@pytest.mark.parametrize(
    "wrong,says",
    [
        (dict(shape="bert"), "llama"),
        (dict(plant=["inductoin"]), "previous_token"),
        (dict(plant="induction"), "collection"),
        (dict(n_layers=1), "room"),
        (dict(n_heads=1), "room"),
        (dict(n_layers=0), "at least 1"),
        (dict(n_kv_heads=3), "divide"),
        (dict(shape="gpt2", n_kv_heads=2), "GPT-2"),
        (dict(noise=-1.0), "noise"),
        (dict(seed=-1), "seed"),
    ],
)
def test_what_cannot_be_built_is_said(wrong, says):
    with pytest.raises(InputError, match=says):
        constructed(**wrong)
