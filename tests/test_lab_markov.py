import pytest
import torch
from toys import markov_trunk

from manyheads.errors import InputError
from manyheads.lab.markov import VOCABULARY, ceiling, likely_successor, markov_text


def hits(given, ahead):
    """How often applying the permutation `ahead` times hits the token that many steps ahead."""
    guess = given
    for _ in range(ahead):
        guess = likely_successor()[guess]
    return float((guess[:, :-ahead] == given[:, ahead:]).float().mean())


def test_the_permutation_is_one_cycle_of_all_tokens():
    token, seen = torch.tensor(0), []
    for _ in range(VOCABULARY):
        seen.append(int(token))
        token = likely_successor()[token]
    assert sorted(seen) == list(range(VOCABULARY)) and int(token) == seen[0]


def test_equal_seeds_give_equal_texts_and_tables_are_independent_of_them():
    assert torch.equal(markov_text(5, seed=3), markov_text(5, seed=3))
    assert not torch.equal(markov_text(5, seed=3), markov_text(5, seed=4))
    assert not torch.equal(likely_successor(0), likely_successor(1))


def test_the_best_guess_hits_as_often_as_its_ceiling_and_a_wrong_offset_by_chance():
    given = markov_text(8000, seed=1)
    assert [round(ceiling(k), 3) for k in range(1, 5)] == [0.705, 0.498, 0.353, 0.252]
    for k in range(1, 5):
        assert abs(hits(given, k) - ceiling(k)) < 0.005
    wrong = (likely_successor()[given[:, :-2]] == given[:, 2:]).float().mean()
    assert wrong < 0.02


def test_a_ceiling_of_the_past_and_empty_texts_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        ceiling(0)
    with pytest.raises(InputError, match="counted from 1"):
        markov_text(0)


@pytest.mark.slow
def test_the_trunk_knows_the_permutation_also_in_texts_longer_than_those_it_learned_from():
    given = markov_text(100, 300, seed=7)
    logits = markov_trunk().logits(given)
    assert (logits.argmax(-1) == likely_successor()[given]).float().mean() > 0.999
    right = (logits[:, :-1].argmax(-1) == given[:, 1:]).float().mean()
    assert abs(right - ceiling(1)) < 0.01
    sure = logits.softmax(-1).gather(-1, likely_successor()[given][..., None]).mean()
    assert abs(sure - ceiling(1)) < 0.03
