"""#44, the rest: Baum and Welch's predictor is exact where it can be, and n-gram heads stand in any decoder."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

import manyheads as mh
from manyheads.errors import InputError
from manyheads.lab.automata import (
    PAD,
    SEPARATOR,
    SYMBOLS,
    backoff,
    language_prompts,
    next_symbol_accuracy,
    random_automata,
    total_variation,
)
from manyheads.lab.languages.baum_welch import (
    baum_welch,
    beliefs,
    edges_of,
    expectation_step,
    random_edges,
    split_strings,
    string_predictions,
)
from manyheads.lab.languages.prose import (
    ElsewhereHeads,
    WithNgramHeads,
    prose_perplexity,
    prose_tokens,
    train_prose,
)
from manyheads.lab.ngram_layer import NgramHeads
from manyheads.training import TrainSettings


def prompts(n=4, seed=3, **sizes):
    automata = random_automata(n, seed=seed)["train"]
    return automata, language_prompts(automata, seed=seed, **({"strings": (5, 8), "lengths": (1, 9)} | sizes))


def test_strings_and_places_are_those_of_the_prompt():
    tokens = torch.tensor([[3, 4, SEPARATOR, 5, SEPARATOR, PAD], [7, SEPARATOR, 8, 9, 1, 2]])
    strings, number, place = split_strings(tokens)
    assert strings.tolist() == [
        [[3, 4, PAD, PAD], [5] + [PAD] * 3, [PAD] * 4],
        [[7] + [PAD] * 3, [8, 9, 1, 2], [PAD] * 4],
    ]
    assert number[0].tolist() == [0, 0, 1, 1, 2, 2] and place[0, :5].tolist() == [0, 1, -1, 0, -1]


def test_the_likelihood_is_the_sum_over_all_paths():
    a = random_edges(2, 3, seed=1).double()
    string = torch.randint(SYMBOLS, (2, 1, 4))
    _, scores = beliefs(a.float(), string)
    for b in range(2):
        total = 0.0
        for path in product(range(3), repeat=4):
            states = (0, *path)
            total += float(np.prod([float(a[b, states[t], int(string[b, 0, t]), states[t + 1]]) for t in range(4)]))
        assert float(scores[b].sum()) == pytest.approx(np.log(total), abs=1e-4)


def test_the_automaton_itself_predicts_the_truth():
    automata, given = prompts()
    strings, number, place = split_strings(given.tokens)
    for b, automaton in enumerate(automata):
        p = string_predictions(edges_of(automaton), strings[b : b + 1])[0]
        for t in given.scored[b].nonzero().flatten().tolist():
            torch.testing.assert_close(p[number[b, t], place[b, t] + 1], given.truth[b, t, :SYMBOLS])


def test_no_step_makes_the_strings_less_likely_and_rows_stay_distributions():
    _, given = prompts(seed=5)
    strings, _, _ = split_strings(given.tokens)
    a, found = random_edges(4, 6), []
    for _ in range(15):
        a, score = expectation_step(a, strings)
        found.append(score)
        torch.testing.assert_close(a.sum((2, 3)), torch.ones(4, 6))
    assert bool((torch.stack(found).diff(dim=0) > -1e-3).all())
    assert bool((found[-1] > found[0] + 10).all())


def test_counts_of_one_step_are_those_of_all_paths():
    a, string = random_edges(1, 2, seed=2), torch.tensor([[[3, 5]]])
    new, _ = expectation_step(a, string)
    weights = {(r, s): float(a[0, 0, 3, r] * a[0, r, 5, s]) for r in range(2) for s in range(2)}
    total = sum(weights.values())
    counts = torch.zeros(2, SYMBOLS, 2)
    for (r, s), weight in weights.items():
        counts[0, 3, r] += weight / total
        counts[r, 5, s] += weight / total
    torch.testing.assert_close(new[0], counts / counts.sum((1, 2), keepdim=True))


def test_predictions_see_no_later_token_and_only_symbols_are_predicted():
    _, given = prompts()
    p = baum_welch(given.tokens, states=4, steps=2)
    other = given.tokens.clone()
    other[:, 20:] = torch.where(other[:, 20:] < SYMBOLS, (other[:, 20:] + 1) % SYMBOLS, other[:, 20:])
    torch.testing.assert_close(baum_welch(other, states=4, steps=2)[:, :20], p[:, :20])
    there = given.tokens != PAD
    torch.testing.assert_close(p.sum(-1)[there], torch.ones(int(there.sum())))
    assert float(p[..., SYMBOLS:].abs().max()) == 0.0


@pytest.mark.slow
def test_baum_and_welch_predict_worse_than_the_backoff_of_order_3():
    """Prints the figures; about a minute."""
    given = language_prompts(random_automata(0, 0, 200, seed=0)["test"][:20], seed=1)
    found = {}
    for name, p in (("Baum-Welch", baum_welch(given.tokens)), *((n, backoff(given.tokens, n)) for n in (1, 2, 3))):
        found[name] = next_symbol_accuracy(p, given), total_variation(p, given.truth, given)
        print(name, *found[name])
    assert found[1][0] + 0.2 < found["Baum-Welch"][0] < found[3][0]
    assert found["Baum-Welch"][1] > found[3][1]


def test_silent_heads_change_no_logit_and_trained_ones_stand_between_the_layers():
    model = mh.open_model()
    tokens = torch.randint(4096, (2, 30))
    plain = model.module(input_ids=tokens).logits
    built = WithNgramHeads(model, NgramHeads(256), after=2, silent=True)
    assert torch.equal(built(tokens, use_cache=False).logits, plain)
    with torch.no_grad():
        built.heads.heads[0].own.bias += 1.0
    after = built(tokens, use_cache=False, output_hidden_states=True).hidden_states
    before = model.module(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.equal(after[2], before[2])
    torch.testing.assert_close(after[3], before[3] + 1.0)
    assert torch.equal(model.module(input_ids=tokens).logits, plain)  # and nothing is left behind


def test_a_frozen_decoder_stays_and_its_heads_learn():
    model = mh.open_model()
    learned, held = prose_tokens(model)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    built = WithNgramHeads(model, NgramHeads(256, (1,)), after=4, silent=True)
    start = prose_perplexity(built, held[:4])
    train_prose(built, learned, TrainSettings(steps=2, rows=2, rate=1e-3, precision="fp32"), frozen_decoder=True)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert float(built.heads.heads[0].attended.weight.detach().abs().max()) > 0
    assert prose_perplexity(built, held[:4]) != start


def test_heads_elsewhere_have_the_same_parameters_and_other_matches():
    torch.manual_seed(0)
    here = NgramHeads(8)
    there = ElsewhereHeads(8)
    there.load_state_dict(here.state_dict())
    hidden, tokens = torch.randn(2, 20, 8), torch.randint(3, (2, 20))
    torch.testing.assert_close(there(hidden, tokens.roll(1, 0)), here(hidden, tokens))
    assert not torch.allclose(there(hidden, tokens), here(hidden, tokens))


def test_held_out_rows_are_of_every_fifth_text_and_too_little_text_is_refused():
    model = mh.open_model()
    texts = [f"{word} " * 200 for word in ("one", "two", "red", "blue", "green")]
    learned, held = prose_tokens(model, texts)
    green = set(model.tokenizer(texts[4])["input_ids"])
    assert held.shape[1] == 128
    assert set(held.flatten().tolist()) <= green and set(learned.tolist()) - green
    for wrong in (texts[:4], ["a"] * 5):
        with pytest.raises(InputError):
            prose_tokens(model, wrong)
    with pytest.raises(InputError):
        WithNgramHeads(model, None, after=6)
