import pytest
import torch
from toys import permutation_toy

from manyheads.errors import InputError
from manyheads.lab.permutations import BOS, CUE, SHOTS, SYMBOLS, permutation_prompts, tables


def accuracy(given) -> float:
    return float((permutation_toy().logits(given.tokens)[:, -1].argmax(-1) == given.answers).float().mean())


def test_a_prompt_shows_one_permutation_and_asks_for_another_input():
    given = permutation_prompts(20, seed=3)
    assert given.tokens.shape == (20, 3 * SHOTS + 3)
    for row, answer, task in zip(given.tokens.tolist(), given.answers.tolist(), given.tasks.tolist(), strict=True):
        x, cue, y = row[1::3], row[2::3], row[3::3]
        assert row[0] == BOS and set(cue) == {CUE} and len(set(x)) == SHOTS + 1
        assert [*y, answer] == tables()[task][x].tolist()


def test_random_labels_leave_queries_and_answers_and_use_output_tokens_only():
    plain, random = permutation_prompts(50, seed=1), permutation_prompts(50, seed=1, random_labels=True)
    shown = random.tokens[:, 3::3]
    assert torch.equal(plain.answers, random.answers) and torch.equal(plain.tokens[:, 1::3], random.tokens[:, 1::3])
    assert ((shown >= SYMBOLS) & (shown < BOS)).all()
    assert (shown == plain.tokens[:, 3::3]).float().mean() < 0.2


def test_a_permutation_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="tasks from 0 to 3"):
        permutation_prompts(2, task=4)


@pytest.mark.slow
def test_the_trained_toy_learns_from_five_shots_and_not_from_none():
    assert accuracy(permutation_prompts(1000, seed=7)) >= 0.98
    assert accuracy(permutation_prompts(1000, seed=7, shots=0)) <= 0.5
    assert accuracy(permutation_prompts(1000, seed=7, random_labels=True)) <= 0.5
