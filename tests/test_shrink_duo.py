"""DuoAttention: the heads it finds, the cache it keeps, and what is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import manyheads as mh
from manyheads.errors import InputError, MismatchError
from manyheads.lab.constructed import Constructed, constructed
from manyheads.shrink.cache.duo_attention import DuoAttention
from manyheads.shrink.cache.duo_gates import Gates, duo_gates
from manyheads.shrink.cache.duo_scores import duo_scores
from manyheads.shrink.cache.haystacks import Haystack, haystacks, needle_recall
from manyheads.shrink.cache.press import Press
from manyheads.shrink.cache.ragged import Window

WINDOW = Window(1, 16)
PLANTED = ("previous_token", "induction", "copying", "retrieval")


def pairs(step: int) -> Haystack:
    """Random words; then, one after the other, words that stood early in them, each followed by what followed it."""
    generator = torch.Generator().manual_seed(step)
    words = 1 + torch.randperm(255, generator=generator)[:120]
    early = torch.randperm(80, generator=generator)[:6].tolist()
    context = torch.cat([torch.zeros(1, dtype=torch.long), words])
    return Haystack(context, [[int(words[i])] for i in early], [[int(words[i + 1])] for i in early])


@pytest.fixture(scope="module")
def made() -> tuple[mh.HeadModel, Constructed]:
    built = constructed(seed=3, n_layers=3, n_heads=4, plant=PLANTED)
    return mh.open_model(built.module, tokenizer=built.tokenizer), built


@pytest.fixture(scope="module")
def ladon() -> mh.HeadModel:
    return mh.open_model()


def test_the_pass_without_training_finds_the_head_that_retrieves(made: tuple[mh.HeadModel, Constructed]) -> None:
    model, built = made
    scores = duo_scores(model, sinks=1, recent=16, contexts=[pairs(i) for i in range(3)])
    assert scores.shape == (3, 4)
    (retriever,) = built.known["retrieval"]
    (previous,) = built.known["previous_token"]
    assert scores.top(1) == mh.HeadSet([retriever], model.shape)
    assert scores[previous] < 0.01 * scores[retriever]


def test_trained_gates_stay_open_for_the_head_that_retrieves_alone(made: tuple[mh.HeadModel, Constructed]) -> None:
    model, built = made
    before = model.fingerprint
    # The states of this model are a third as long as those of trained ones, and the loss goes with their square.
    gates = duo_gates(model, length=121, sinks=1, recent=16, steps=100, sparse=0.01, contexts=pairs)
    (retriever,) = built.known["retrieval"]
    (previous,) = built.known["previous_token"]
    assert gates[retriever] >= 0.85
    assert gates[previous] <= 0.05
    assert gates.top(1) == mh.HeadSet([retriever], model.shape)
    assert model.fingerprint == before
    assert all(parameter.requires_grad for parameter in model.plain.parameters())


def test_open_gates_are_the_model_and_a_closed_one_streams(made: tuple[mh.HeadModel, Constructed]) -> None:
    model, built = made
    one = pairs(0)
    row, start = one.row
    batch = (row[None], torch.arange(start - 1, len(row)))
    gates = Gates(model, WINDOW)
    assert float(gates(batch)) == pytest.approx(0.05, abs=1e-6)  # the states agree; mean|a| is 1
    (retriever,) = built.known["retrieval"]
    (previous,) = built.known["previous_token"]
    for head, least, most in ((retriever, 2e-3, 1.0), (previous, 0.0, 2e-5)):
        gates.values.data.fill_(1.0)
        gates.values.data[head] = 0.0
        assert least <= float(gates(batch)) - 0.05 * 11 / 12 <= most


def test_what_the_head_retrieves_is_lost_with_it_and_with_no_other(made: tuple[mh.HeadModel, Constructed]) -> None:
    model, built = made
    hay = [pairs(100 + i) for i in range(4)]
    scores = duo_scores(model, sinks=1, recent=16, contexts=[pairs(i) for i in range(2)])
    (retriever,) = built.known["retrieval"]
    assert needle_recall(model, Press(), hay).mean() == 1.0
    kept = DuoAttention(11 / 12, 1, 16, scores)  # all heads stream but one
    assert kept.windows(model)[retriever.layer][retriever.index] is None
    assert needle_recall(model, kept, hay).mean() == 1.0
    worst = np.array(scores.values)
    worst[retriever] = -1.0
    lost = DuoAttention(1 / 12, 1, 16, replace(scores, values=worst))
    assert needle_recall(model, lost, hay).mean() <= 0.1


def test_ladon_keeps_its_needles_with_a_quarter_of_its_heads(ladon: mh.HeadModel) -> None:
    hay = haystacks(ladon, 3, 500, asks=True, seed=5)
    scores = duo_scores(ladon, n=2, length=600, sinks=16, recent=64)
    full = needle_recall(ladon, Press(), hay).mean()
    chosen = needle_recall(ladon, DuoAttention(0.75, 16, 64, scores), hay).mean()
    drawn = replace(scores, values=np.random.default_rng(0).random(scores.shape))
    assert full >= 0.7
    assert chosen >= full - 0.1
    assert needle_recall(ladon, DuoAttention(0.75, 16, 64, drawn), hay).mean() <= chosen - 0.3


def test_bytes_are_those_of_full_and_streaming_heads(ladon: mh.HeadModel) -> None:
    ids = torch.randint(5, 4000, (2, 500), generator=torch.Generator().manual_seed(0))
    scores = duo_scores(ladon, n=1, length=600, sinks=16, recent=64)
    with torch.no_grad(), DuoAttention(0.5, 16, 64, scores)(ladon) as block:
        ladon.plain(ids, use_cache=True)
    full = streaming = ladon.n_layers * ladon.n_kv_heads // 2
    kept = 2 * (full * 500 + streaming * 80) * 2 * ladon.head_dim * 4
    assert kept <= block.nbytes <= 1.02 * kept


def test_a_prompt_that_streams_is_read_as_the_gates_were_trained(made: tuple[mh.HeadModel, Constructed]) -> None:
    model, _ = made
    scores = duo_scores(model, sinks=1, recent=16, contexts=[pairs(0)])
    ids = pairs(7).context[None]
    with torch.no_grad(), DuoAttention(0.5, 1, 16, scores, "streaming")(model):
        whole = model.plain(ids, use_cache=True).logits
    with torch.no_grad(), DuoAttention(0.5, 1, 16, scores)(model) as block:
        cache = block.new_cache()
        steps = [model.plain(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-3, rtol=1e-3)


def test_scores_of_another_model_and_of_query_heads_are_refused(
    made: tuple[mh.HeadModel, Constructed], ladon: mh.HeadModel
) -> None:
    model, _ = made
    scores = duo_scores(model, sinks=1, recent=16, contexts=[pairs(0)])
    with pytest.raises(MismatchError, match="not of this one"), DuoAttention(scores=scores)(ladon):
        pass
    wide = replace(scores, values=np.zeros((3, 8)), stderr=np.zeros((3, 8)))
    with pytest.raises(InputError, match="shape"), DuoAttention(scores=wide)(model):
        pass
    with pytest.raises(InputError, match="make it at least 34 tokens"):
        duo_scores(model, sinks=1, recent=16, contexts=[Haystack(torch.arange(20), [[1]], [[2]])])
    with pytest.raises(InputError, match="compression_ratio"):
        DuoAttention(1.5)
