"""N-grams as units: the lexicon finds what was planted, masks keep places, slots see the text and are not seen."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from manyheads.errors import InputError
from manyheads.evaluation import auc
from manyheads.predict.auxiliary.ngrams import MaskedNgrams, ReplacedNgrams, masked, ngram_lexicon, units
from manyheads.training import ADAM

LEXICON = {(1, 2): 0, (1, 2, 3): 1, (5, 6): 2}


def _encoder(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=21, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def test_tokens_that_meet_more_often_than_chance_are_found():
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(400):
        row = torch.randint(10, 20, (8,), generator=draw).tolist()
        at = int(torch.randint(7, (1,), generator=draw))
        rows.append([*row[:at], *[(1, 2), (3, 4, 5)][at % 2], *row[at:]])
    found = ngram_lexicon(rows)
    assert {(1, 2), (3, 4, 5), (3, 4), (4, 5)} <= set(found)
    assert set(found[:4]) == {(1, 2), (3, 4, 5), (3, 4), (4, 5)}
    assert len(ngram_lexicon(rows, 2)) == 2 and all(len(gram) == 2 for gram in ngram_lexicon(rows, longest=2))


def test_t_is_the_formula():
    rows = [[1, 2]] * 6 + [[1, 3]] * 2 + [[4, 4]] * 12
    total, p = 40, 6 / 40
    t = (p - (8 / 40) * (6 / 40)) / (p / total) ** 0.5
    assert (1, 2) in ngram_lexicon(rows, least_t=t - 1e-6) and (1, 2) not in ngram_lexicon(rows, least_t=t + 1e-6)


def test_a_text_is_cut_into_the_longest_units():
    assert units([1, 2, 3, 5, 6, 1, 2, 4, 1], LEXICON) == [(1, 2, 3), (5, 6), (1, 2), (4,), (1,)]
    assert units([1], LEXICON) == [(1,)]


def test_a_masked_ngram_is_one_mask_and_all_others_keep_their_places():
    batch = masked([[7, 1, 2, 3, 8, 5, 6]], LEXICON, 20, 20, share=0.99)
    assert batch.input_ids[0].tolist() == [20] * 4 + [20] * 7
    assert batch.position_ids[0, :4].tolist() == [0, 1, 4, 5]
    assert batch.coarse[0].tolist() == [7, 21, 8, 22] + [-100] * 7
    assert batch.position_ids[0, 4:].tolist() == [0, 1, 2, 3, 4, 5, 6] and batch.fine[0, 4:].tolist() == [
        7,
        1,
        2,
        3,
        8,
        5,
        6,
    ]
    one = masked([[7, 1, 2, 3, 8]], LEXICON, 20, 20, share=0.3, generator=torch.Generator().manual_seed(3))
    shown = one.input_ids[0, : one.text]
    assert ((shown == 20).sum() == 1) and one.text == (
        5 if (shown[1:] != 20).all() or shown[0] == 20 or shown[-1] == 20 else 3
    )
    plain = masked([[7, 1, 2, 3, 8]], LEXICON, 20, 20, share=0.99, whole=False)
    assert (
        plain.input_ids[0].tolist() == [20] * 5
        and plain.coarse[0].tolist() == [7, 1, 2, 3, 8]
        and (plain.fine < 0).all()
    )


def test_the_text_is_the_same_with_slots_and_without_and_slots_do_not_see_each_other():
    heads = MaskedNgrams(_encoder(), list(LEXICON), mask_id=20, vocabulary=20).eval()
    batch = heads.masked([[7, 1, 2, 3, 8, 5, 6], [9, 5, 6, 4, 4, 4, 1, 2]], generator=torch.Generator().manual_seed(0))
    text = batch.text
    bare = batch.without_slots()
    assert bare.input_ids.shape == bare.coarse.shape == (2, text) and bare.attention.shape == (2, 1, text, text)
    with torch.no_grad():
        whole = heads.states(batch)
        torch.testing.assert_close(whole[:, :text], heads.states(bare), rtol=0, atol=1e-6)
        other = batch.input_ids.clone()
        other[:, -1] = 3  # what the last slot holds
        changed = heads.states(replace(batch, input_ids=other))
    torch.testing.assert_close(changed[:, :-1], whole[:, :-1], rtol=0, atol=1e-6)
    assert not torch.allclose(changed[:, -1], whole[:, -1])


ROWS = [[7, 1, 2, 3, 8, 5, 6], [9, 5, 6, 4, 4, 4, 1, 2], [1, 2, 3]]


def _both(share=1.0):
    heads = MaskedNgrams(_encoder(), list(LEXICON), mask_id=20, vocabulary=20)
    return ReplacedNgrams(heads, _encoder(1), share=share).eval()


def test_the_text_is_the_same_with_slots_and_without_where_masks_are_replaced():
    both = _both()
    batch = both.heads.masked(ROWS, share=0.6, generator=torch.Generator().manual_seed(0))
    bare, text = batch.without_slots(), batch.text
    with torch.no_grad():
        found = both.replaced(batch, torch.randn(3, text, 23, generator=torch.Generator().manual_seed(1)))
        assert ((found.drawn >= 0) == (batch.coarse >= 0)).all() and (found.drawn[:, text:] < 0).all()
        alone = replace(found, drawn=found.drawn[:, :text], labels=found.labels[:, :text])
        whole = both.heads.states(batch, both.embeds(batch, found))
        torch.testing.assert_close(
            whole[:, :text], both.heads.states(bare, both.embeds(bare, alone)), rtol=0, atol=1e-6
        )
        assert not torch.allclose(whole[:, :text], both.heads.states(batch)[:, :text], atol=1e-3)


def test_what_is_drawn_counts_as_replaced_only_where_it_is_not_the_original():
    both = _both()
    batch = both.heads.masked(ROWS, share=0.99)
    text = batch.text
    knows = torch.nn.functional.one_hot(batch.coarse[:, :text].clamp_min(0), 23) * 100.0
    right = both.replaced(batch, knows)
    given = batch.coarse >= 0
    assert torch.equal(right.drawn[given], batch.coarse[given]) and (right.labels[given] == 0).all()
    wrong = both.replaced(batch, -knows)
    assert (wrong.drawn[given] != batch.coarse[given]).all() and (wrong.labels[given] == 1).all()
    mixed = both.replaced(batch, torch.zeros(3, text, 23))
    assert torch.equal(mixed.labels[given] == 1, mixed.drawn[given] != batch.coarse[given])
    beyond = batch.attention[:, 0, 0] < 0  # the text's end, and slots
    for found in (right, wrong, mixed):
        assert (found.labels[beyond] == -100).all() and (found.labels[~beyond] >= 0).all()
    half = _both(0.5).replaced(batch, knows)
    still = (batch.coarse >= 0) & (half.drawn < 0)
    assert 0 < still.sum() < given.sum() and (half.labels[still] == -100).all()


def test_units_that_were_not_masked_count_as_not_replaced():
    both = _both()
    batch = both.heads.masked(ROWS, generator=torch.Generator().manual_seed(2))
    found = both.replaced(batch, torch.zeros(3, batch.text, 23))
    shown = (batch.coarse < 0) & (batch.attention[:, 0, 0] == 0)
    assert shown.any() and (found.labels[shown] == 0).all() and (found.drawn[shown] == -100).all()


def test_an_ngram_that_was_drawn_has_its_own_embedding_and_a_token_its_words():
    both = _both()
    batch = both.heads.masked([[7, 1, 2, 3]], share=0.99)
    found = both.replaced(batch, torch.zeros(1, 2, 23))
    found = replace(found, drawn=torch.tensor([[21, 4] + [-100] * (batch.coarse.shape[1] - 2)]))
    words = both.heads.encoder.get_input_embeddings().weight
    embeds = both.embeds(batch, found)
    assert torch.equal(embeds[0, 0], both.grams.weight[1]) and torch.equal(embeds[0, 1], words[4])
    assert torch.equal(embeds[0, 2], words[20])


def test_the_loss_is_the_sum_of_its_parts_and_no_gradient_runs_to_the_generator():
    both = _both()
    batch = both.heads.masked(ROWS, generator=torch.Generator().manual_seed(0))

    def loss(weight):
        both.weight = weight
        torch.manual_seed(3)
        return both(batch)

    torch.testing.assert_close(loss(2.0) - loss(0.0), 2 * (loss(1.0) - loss(0.0)), rtol=1e-4, atol=1e-4)
    guesses = both.generator.coarse(both.generator.states(batch.without_slots()))
    own = torch.nn.functional.cross_entropy(
        guesses[batch.coarse[:, : batch.text] >= 0], batch.coarse[batch.coarse >= 0]
    )
    learned = [p for p in both.generator.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(own, learned, allow_unused=True)
    for mine, theirs in zip(torch.autograd.grad(loss(5.0), learned, allow_unused=True), wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def test_generator_and_model_learn_to_name_and_to_detect():
    draw = torch.Generator().manual_seed(0)
    rows = []
    for kind in torch.randint(2, (200,), generator=draw).tolist():
        rows.append(
            [10 + kind, *([1, 2, 3] if kind else [5, 6]), *torch.randint(12, 20, (3,), generator=draw).tolist()]
        )
    both = _both(0.5).train()
    both.fit(rows, replace(ADAM, steps=250, rows=16, rate=5e-3))
    found = both.eval().heads.accuracy(rows)
    assert found[3] > 0.9 and found[2] > 0.9
    labels, logits = both.detection(rows)
    assert 0.01 < labels.mean() < 0.2 and auc(logits, labels == 1) > 0.7


def test_heads_learn_ngrams_and_the_encoder_is_left():
    draw = torch.Generator().manual_seed(0)
    rows = []
    for kind in torch.randint(2, (200,), generator=draw).tolist():
        rows.append(
            [10 + kind, *([1, 2, 3] if kind else [5, 6]), *torch.randint(12, 20, (3,), generator=draw).tolist()]
        )
    encoder = _encoder()
    heads = MaskedNgrams(encoder, [(1, 2, 3), (5, 6)], mask_id=20, vocabulary=20)
    heads.fit(rows, replace(ADAM, steps=250, rows=16, rate=3e-3))
    found = heads.eval().accuracy(rows)
    assert found[3] > 0.9 and found[2] > 0.9
    out = encoder(input_ids=torch.tensor(rows[:1])).last_hidden_state
    assert out.shape == (1, len(rows[0]), 16)


def test_what_is_no_encoder_is_refused():
    with pytest.raises(InputError, match="no encoder of Transformers"):
        MaskedNgrams(nn.Linear(2, 2), [(1, 2)], mask_id=0)
    with pytest.raises(InputError, match="share"):
        masked([[1, 2]], LEXICON, 20, 20, share=0.0)
    with pytest.raises(InputError, match="share"):
        _both(1.5)
