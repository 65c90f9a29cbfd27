"""#44, probes: what is in the states is read, what is not is not, and only automata that no probe has seen count."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from manyheads.errors import InputError
from manyheads.lab.automata import PAD, SEPARATOR, VOCABULARY, backoff, language_prompts, random_automata
from manyheads.lab.languages.automaton_probes import ProbedPrompts, PromptDecoder, distances, probe_layers
from manyheads.lab.languages.probes import (
    automaton_states,
    last_tokens,
    ngram_conditionals,
    ngram_counts,
    probe_r2,
    shares_so_far,
    state_auc,
    state_pairs,
)
from manyheads.lab.ngram_layer import NgramHeads


def prompts(split="train", width=80):
    automata = random_automata(80, 0, 40, seed=1)[split]
    return automata, language_prompts(automata, strings=(20, 20), lengths=(1, 24), width=width, seed=2)


def test_counts_are_those_of_the_text_so_far():
    _, given = prompts(width=40)
    for n in (1, 2, 3):
        counts, conditionals = ngram_counts(given.tokens[:5], n), ngram_conditionals(given.tokens[:5], n)
        for b, row in enumerate(given.tokens[:5].tolist()):
            for t in range(n - 1, 40):
                text, context = row[: t + 1], row[t + 1 - n : t + 1]
                came = Counter(text[j + n] for j in range(len(text) - n) if text[j : j + n] == context)
                expected = torch.tensor([float(came[w]) for w in range(VOCABULARY)])
                assert torch.equal(counts[b, t], expected)
                torch.testing.assert_close(conditionals[b, t], expected / max(1, came.total()))


def test_the_state_is_that_of_the_automaton_and_says_what_is_legal():
    automata, given = prompts()
    states = automaton_states(automata, given.tokens)
    for b, automaton in enumerate(automata[:20]):
        for t in given.scored[b].nonzero().flatten().tolist():
            legal = given.legal[b, t].nonzero().flatten().tolist()
            assert legal == [w for w, _ in automaton.edges[int(states[b, t])]]
    assert bool((states[given.tokens == SEPARATOR] == 0).all())
    padded = torch.cat([given.tokens[:1], torch.full((1, 1), PAD)], 1)
    assert automaton_states(automata[:1], padded)[0, -1] == -1
    with pytest.raises(InputError, match="automaton"):
        automaton_states(automata[1:6], given.tokens[:5])
    with pytest.raises(InputError, match="one automaton a prompt"):
        automaton_states(automata[:4], given.tokens[:5])


def test_surface_features_are_the_last_tokens_and_what_was_so_far():
    tokens = torch.tensor([[3, 4, 3]])
    found = last_tokens(tokens, 2)[0]
    assert found[2].nonzero().flatten().tolist() == [3, VOCABULARY + 4] and found[0].nonzero().flatten().tolist() == [3]
    shares = shares_so_far(tokens)[0]
    assert shares[2, 3] == pytest.approx(2 / 3) and shares[2, -1] == pytest.approx(torch.tensor(3.0).log().item())


def test_counts_that_are_in_the_states_are_read_and_random_states_hold_none():
    (_, learned), (_, tested) = prompts(), prompts("test")
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(VOCABULARY, 48, generator=generator)
    for target in (lambda t: ngram_conditionals(t, 2), lambda t: ngram_counts(t, 1).log1p()):
        planted, random, shuffled = [], [], []
        for given in (learned, tested):
            y, there = target(given.tokens), given.scored
            planted.append((y @ mixed + 1.0, y, there))
            random.append((torch.randn(*y.shape[:2], 48, generator=generator), y, there))
        shuffled = [(planted[0][0], planted[0][1], planted[0][2]), planted[1]]
        assert probe_r2(*planted) > 0.999
        assert abs(probe_r2(*random)) < 0.03
        assert abs(probe_r2(*shuffled, shuffle=0)) < 0.03


def test_the_last_tokens_hold_no_counts_of_a_language_that_no_probe_has_seen():
    """The baseline is weak across automata, which is why probes are tested on new ones."""
    (_, learned), (_, tested) = prompts(), prompts("test")
    sides = [(last_tokens(g.tokens, 3), ngram_conditionals(g.tokens, 1), g.scored) for g in (learned, tested)]
    assert probe_r2(*sides) < 0.2
    known = [(backoff(g.tokens, 3), ngram_conditionals(g.tokens, 1), g.scored) for g in (learned, tested)]
    assert probe_r2(*known) > probe_r2(*sides) + 0.2


def test_pairs_share_their_last_symbol_and_states_that_are_planted_are_told_apart():
    sides, generator = [], torch.Generator().manual_seed(1)
    for split in ("train", "test"):
        automata, given = prompts(split)
        states = automaton_states(automata, given.tokens)
        pairs = state_pairs(given.tokens, states, each=10, seed=3)
        tokens = given.tokens.numpy()
        assert (tokens[pairs.row, pairs.first] == tokens[pairs.row, pairs.second]).all()
        assert (pairs.first < pairs.second).all() and pairs.same.mean() == 0.5
        assert ((states.numpy()[pairs.row, pairs.first] == states.numpy()[pairs.row, pairs.second]) == pairs.same).all()
        names = torch.randn(len(automata), 12, 32, generator=generator)  # other vectors for each automaton's states
        planted = names[torch.arange(len(automata))[:, None], states]
        noise = torch.randn(planted.shape, generator=generator)
        sides.append((planted, noise, last_tokens(given.tokens, 1), pairs))
    planted, noise, symbol = ([(side[i], side[3]) for side in sides] for i in range(3))
    assert state_auc(*planted) > 0.99
    assert abs(state_auc(*noise) - 0.5) < 0.06
    assert state_auc(*symbol) == pytest.approx(0.5, abs=0.06)  # by construction of the pairs
    assert abs(state_auc(*planted, shuffle=0) - 0.5) < 0.2


def test_states_of_a_decoder_are_those_its_layers_read_with_the_heads_in_them_and_at_every_pass():
    heads, tokens = NgramHeads(64), prompts(width=20)[1].tokens[:6]
    plain, built = PromptDecoder(seed=3), PromptDecoder(heads, seed=3)
    with torch.no_grad():
        before = plain.states(tokens)
        for rows in (6, 2, 2):
            found = built.states(tokens, rows=rows)
            assert len(found) == 3
            torch.testing.assert_close(found[0], before[0])
            torch.testing.assert_close(found[1], heads(before[1], tokens), atol=1e-5, rtol=1e-4)
        body = built.network.decoder
        torch.testing.assert_close(body.lm_head(body.model.norm(found[2])), built(tokens), atol=1e-5, rtol=1e-4)


def test_every_layer_is_probed_for_every_target_and_the_highest_counts():
    """States that are the order-1 conditionals in layer 1, and noise in layer 0."""
    generator, layers, sides = torch.Generator().manual_seed(2), [], []
    for split in ("train", "test"):
        automata, given = prompts(split)
        sides.append(ProbedPrompts(automata, given, seed=0))
        planted = ngram_conditionals(given.tokens, 1)
        layers.append([torch.randn(planted.shape, generator=generator), planted])
    found = probe_layers(tuple(layers), *sides)
    assert found["conditionals 1, layer 0"] < 0.05 and found["conditionals 1, layer 1"] > 0.999
    assert found["conditionals 1"] == found["conditionals 1, layer 1"]
    assert found["conditionals 3"] < 0.8 and found["shuffled"] < 0.05
    assert {"counts 2", "same state", "same state, layer 1"} < set(found)


def test_the_backoff_predictor_is_at_no_distance_from_itself():
    _, given = prompts("test", width=40)
    found = distances(backoff(given.tokens, 2), given, 3)
    assert found["to backoff 2"] == 0 and min(found[f"to backoff {n}"] for n in (1, 3)) > 0.02
    assert 0.05 < found["to Baum-Welch"] < 1 and 0.3 < found["accuracy"] < 1
