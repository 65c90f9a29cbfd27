from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from architectures import DECODERS, build, opened
from planted_steps import answered_by, settings, sums, taught, tiny_llama
from torch.nn import functional as F

from manyheads.draft.hidden_cot.data import Worked, batch_with_chain, right_padded
from manyheads.draft.hidden_cot.judge import judge
from manyheads.draft.hidden_cot.loss import contrastive_loss, retrieved, same_chain
from manyheads.draft.hidden_cot.model import HiddenCot
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.model.opening import open_model

SOME = Worked(
    [[5, 9, 4], [7, 3], [8, 8, 6, 11, 12], [7, 3, 9]], [[4, 5, 6], [9, 4], [9, 4], [3]], [[7], [8, 3], [3], [11, 12]]
)


def shaken(name="llama"):
    """An untrained one in which [CoT], u and the two models differ."""
    hidden = HiddenCot(opened(name))
    with torch.no_grad():
        for parameter in hidden.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return hidden.eval()


def one_by_one(model, prefix, slot, new):
    """Greedy decoding of one text without padding and without a cache."""
    written = []
    with torch.no_grad():
        for _ in range(new):
            table = model.get_input_embeddings()
            embeds = torch.cat([table(torch.tensor(prefix)), slot[None], table(torch.tensor(written).long())])
            logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
            written.append(int(logits.argmax()))
            if written[-1] == model.generation_config.eos_token_id:
                return written[:-1]
    return written


def brute_force(u, t, chains, tau):
    total = 0.0
    for a, b in ((u, t), (t, u)):
        for i in range(len(a)):
            scores = {j: F.cosine_similarity(a[i], b[j], dim=0) / tau for j in range(len(b))}
            kept = [j for j in scores if j == i or chains[j] != chains[i]]
            total += torch.stack([scores[j] for j in kept]).logsumexp(0) - scores[i]
    return total / (2 * len(u))


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_every_decoder_writes_from_u_what_it_writes_without_padding_and_cache(name):
    hidden = shaken(name)
    u = hidden.hidden(SOME.prefixes)
    answers = hidden.generate(SOME.prefixes, max_new_tokens=4)
    chains = hidden.decode_chain(SOME.prefixes, max_new_tokens=4)
    for i, prefix in enumerate(SOME.prefixes):
        torch.testing.assert_close(hidden.hidden([prefix])[0], u[i], atol=1e-4, rtol=1e-4)
        assert answers[i] == one_by_one(hidden.answerer, prefix, hidden.project(u[i]), 4)
        assert chains[i] == one_by_one(hidden.compressor, prefix, hidden.token, 4)


def test_u_is_the_state_that_the_output_matrix_reads_after_the_cot_embedding():
    hidden = shaken("gpt2")
    for prefix, u in zip(SOME.prefixes, hidden.hidden(SOME.prefixes), strict=True):
        embeds = torch.cat([hidden.compressor.get_input_embeddings()(torch.tensor(prefix)), hidden.token[None]])
        logits = hidden.compressor(inputs_embeds=embeds[None]).logits[0, -1]
        torch.testing.assert_close(hidden.compressor.lm_head(u), logits, atol=1e-4, rtol=1e-4)


def test_t_is_the_first_models_mean_state_of_the_chain_by_itself_through_a_linear_map():
    hidden, first = shaken(), opened("llama").plain
    for chain, t in zip(SOME.chains, hidden.chain_states(SOME.chains), strict=True):
        mean = first.model(torch.tensor([chain])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(t, hidden.match.weight @ mean, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(t, mean, atol=1e-2)
    fresh = HiddenCot(opened("llama"))
    assert fresh.match.weight.equal(torch.eye(len(t))) and not any("reader" in name for name in fresh.state_dict())


def test_contrastive_loss_is_infonce_both_ways_without_equal_chains():
    u, t = torch.randn(6, 8), torch.randn(6, 8)
    chains = [[1, 2], [3], [1, 2], [1], [3], [1, 2]]
    same = same_chain(*right_padded(chains))
    assert same.tolist() == [[a == b for b in chains] for a in chains]
    for tau in (0.05, 0.7):
        torch.testing.assert_close(contrastive_loss(u, t, same, tau), brute_force(u, t, chains, tau))
    torch.testing.assert_close(contrastive_loss(u, t, torch.eye(6).bool(), 0.7), brute_force(u, t, list(range(6)), 0.7))


def test_equal_chains_cost_nothing_where_they_would_have_been_false_negatives():
    t = torch.eye(4)[[0, 0, 1, 2]]
    same = same_chain(*right_padded([[5], [5], [6], [7]]))
    assert contrastive_loss(t, t, same) < 1e-6
    assert contrastive_loss(t, t, torch.eye(4).bool()) > 0.3
    assert retrieved(t, t, same) == 1.0


def test_a_chain_that_ends_with_token_zero_is_not_a_shorter_one():
    assert same_chain(*right_padded([[5, 0], [5], [5, 0, 0]])).equal(torch.eye(3).bool())


def test_the_loss_of_stage_one_learns_the_chain_only():
    hidden = shaken()
    loss = hidden.compressor_loss(batch_with_chain(SOME), 0.0, 0.05)
    wanted = []
    for prefix, chain in zip(SOME.prefixes, SOME.chains, strict=True):
        table = hidden.compressor.get_input_embeddings()
        embeds = torch.cat([table(torch.tensor(prefix)), hidden.token[None], table(torch.tensor(chain))])
        odds = hidden.compressor(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        wanted += [-odds[len(prefix) + k, token] for k, token in enumerate(chain)]
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), atol=1e-4, rtol=1e-4)


def test_each_stage_trains_its_own_model_and_leaves_the_rest_bit_for_bit():
    model = open_model(build("llama"))
    hidden = HiddenCot(model)
    before = copy.deepcopy(hidden.state_dict())
    hidden.train_compressor(SOME, settings=settings(2, rows=4))
    middle = copy.deepcopy(hidden.state_dict())
    hidden.train_answerer(SOME, settings=settings(2, rows=4))
    after = hidden.state_dict()
    for name in before:
        first = name.startswith(("token", "match", "compressor"))
        assert before[name].equal(middle[name]) != first, name
        assert middle[name].equal(after[name]) == first, name
    assert open_model(build("llama")).fingerprint == model.fingerprint == hidden.base


def test_stage_two_learns_from_u_what_the_answerer_cannot_see_in_the_prefix():
    """The answer is a coin in the prefix, which the answerer's frozen embedding does not tell from its other side."""
    torch.manual_seed(0)
    hidden = HiddenCot(open_model(tiny_llama(layers=1, width=32)))
    table = hidden.answerer.get_input_embeddings().weight.requires_grad_(False)
    table[1] = table[0]
    coins = torch.randint(2, (256,)).tolist()
    data = Worked([[5, coin] for coin in coins], [[1]] * 256, [[coin] for coin in coins])
    hidden.train_answerer(data, settings=settings(60, rows=64))
    both = [[5, 0], [5, 1]]
    assert table[1].equal(table[0])
    assert hidden.generate(both, max_new_tokens=1) == [[0], [1]]
    assert hidden.generate(both, hidden=hidden.hidden(both).flip(0), max_new_tokens=1) == [[1], [0]]
    with pytest.raises(InputError, match="as many hidden states"):
        hidden.generate(both, hidden=hidden.hidden([[5, 0]]))


def test_saved_and_loaded_it_answers_the_same_and_only_beside_its_model(tmp_path):
    hidden = shaken()
    hidden.save(tmp_path / "hidden")
    with pytest.raises(InputError, match="already exists"):
        hidden.save(tmp_path / "hidden")
    again = HiddenCot.load(tmp_path / "hidden", opened("llama"))
    for name, value in hidden.state_dict().items():
        assert value.equal(again.state_dict()[name]), name
    assert hidden.generate(SOME.prefixes) == again.generate(SOME.prefixes)
    other = open_model(build("llama", seed=1))
    with pytest.raises(MismatchError, match="learned beside model"):
        HiddenCot.load(tmp_path / "hidden", other)
    assert HiddenCot.load(tmp_path / "hidden", other, force=True).base == hidden.base
    with pytest.raises(InputError, match="holds no hidden chain"):
        HiddenCot.load(tmp_path / "nothing", other)


def test_an_interrupted_stage_goes_on_as_if_it_had_not_been(tmp_path):
    def taught_in(folder, *ends):
        for end in ends:
            torch.manual_seed(0)
            hidden = HiddenCot(opened("llama"))
            hidden.train_compressor(
                SOME, settings=settings(6, rows=4), folder=tmp_path / folder, on_step=lambda p, end=end: p.step < end
            )
        return hidden.state_dict()

    whole, parts = taught_in("whole", 6), taught_in("parts", 3, 6)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], msg=name)


def test_the_judge_counts_what_the_models_say():
    hidden = shaken()
    said = hidden.generate(SOME.prefixes, max_new_tokens=1)
    lied = [[(token + (i > 1)) % 61 for token in row] for i, row in enumerate(said)]
    report = judge(hidden, Worked(SOME.prefixes, SOME.chains, lied), rows=4)
    assert report.hidden == 0.5 and report.n == 4 and report.full is report.without is None
    assert report.tokens == 2 and report.tokens_full == 3 and report.tokens_kept == 2 / 3
    assert 0 <= report.retrieval <= 1


def test_wrong_input_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="every problem needs"):
        Worked([[1]], [[1], [2]], [[1]])
    with pytest.raises(InputError, match="is empty"):
        Worked([[1]], [[]], [[1]])
    with pytest.raises(InputError, match="is empty"):
        right_padded([])
    with pytest.raises(InputError, match="make no batch"):
        judge(shaken(), SOME, rows=5)
    with pytest.raises(InputError, match="make no loss"):
        shaken().train_compressor(SOME, tau=0.0)
    with pytest.raises(UnsupportedError, match="causal language model"):
        HiddenCot(opened("bert"))
    with pytest.raises(UnsupportedError, match="causal language model"):
        HiddenCot(opened("vit"))


TRAIN, HELD_OUT = sums(20000, split="train", digits=7), sums(512, split="test", seed=1, digits=7)
CHANCE = 1 / 5


@cache
def writes_its_steps(seed=0):
    return taught(tiny_llama(seed=seed), TRAIN, 300, chains=True)


@cache
def never_saw_any(layers=2):
    return taught(tiny_llama(layers=layers), TRAIN, 2000, chains=False)


@cache
def on_sums(seed=0, contrast=1.0):
    """A hidden chain of thought after 2,000 steps in all, beside a model that had as many from answers alone."""
    return thought(writes_its_steps(seed), TRAIN, HELD_OUT, never_saw_any(), contrast)


def thought(full, data, held_out, without, contrast=1.0):
    hidden = HiddenCot(full)
    hidden.train_compressor(data, contrast=contrast, settings=settings(1000))
    hidden.train_answerer(data, settings=settings(700))
    report = judge(hidden, held_out, full=full, without=without)
    print(report)
    return hidden, report


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_sums_it_answers_as_the_full_chain_does_in_a_third_of_the_tokens_and_as_nothing_does_without_steps(seed):
    found = on_sums(seed)[1]
    assert found.full > 0.95
    assert found.hidden >= 0.9 * found.full
    assert found.hidden >= 1.3 * found.without
    assert found.tokens_kept <= 1 / 3
    assert found.retrieval >= 0.9


@pytest.mark.slow
def test_on_sums_another_problems_u_leaves_chance_and_so_do_answers_alone():
    """Also in a model that goes on from the one with steps, for as long, and in one with the layers of both models."""
    found = on_sums()[1]
    goes_on = taught(copy.deepcopy(writes_its_steps().plain), TRAIN, 1700, chains=False)
    others = [answered_by(model, HELD_OUT, chains=False) for model in (goes_on, never_saw_any(layers=4))]
    assert max(found.shuffled, found.mean, found.without, *others) <= CHANCE + 0.1


@pytest.mark.slow
def test_on_sums_nothing_is_gained_without_the_contrastive_term():
    found = on_sums(contrast=0.0)[1]
    assert found.retrieval < 0.1
    assert found.hidden <= CHANCE + 0.1


@pytest.mark.slow
def test_on_shorter_sums_a_fresh_model_learns_from_answers_alone():
    """A digit less, and answers alone teach all that steps do: there is nothing to gain."""
    fresh = taught(tiny_llama(), sums(20000, split="train"), 1400, chains=False)
    assert answered_by(fresh, sums(512, split="test", seed=1), chains=False) > 0.9


@pytest.mark.slow
def test_on_longer_sums_hidden_steps_fail_as_answers_alone_do():
    """Eight digits modulo 7: written steps answer all, and this budget compresses nothing of use."""
    shape = {"digits": 8, "modulus": 7}
    data, held_out = sums(20000, split="train", **shape), sums(512, split="test", seed=1, **shape)
    full = taught(tiny_llama(modulus=7), data, 300, chains=True)
    fresh = taught(tiny_llama(modulus=7), data, 2000, chains=False)
    found = thought(full, data, held_out, fresh)[1]
    assert found.full > 0.95
    assert max(found.without, found.hidden) < 0.3


def read_off(states, values, judged, true):
    """How often a linear readout, fitted by least squares, tells a digit from states it was not fitted on."""
    states, judged = (torch.cat([x, torch.ones(len(x), 1)], dim=1).double() for x in (states, judged))
    weights = torch.linalg.lstsq(states, F.one_hot(torch.tensor(values)).double()).solution
    return ((judged @ weights).argmax(1) == torch.tensor(true)).double().mean().item()


@pytest.mark.slow
def test_on_sums_u_holds_the_sums_the_later_the_less():
    """The last one of all it lacks: the answerer adds that digit itself."""
    hidden, fitted = on_sums()[0], TRAIN.at(range(6000))
    u, v = hidden.hidden(fitted.prefixes), hidden.hidden(HELD_OUT.prefixes)
    held = [read_off(u, [row[i] for row in fitted.chains], v, [row[i] for row in HELD_OUT.chains]) for i in range(6)]
    print(held)
    assert held[0] > 0.9 and min(held[:4]) > CHANCE + 0.2 > held[5]
    assert hidden.decode_chain(HELD_OUT.prefixes[:100], max_new_tokens=7) == HELD_OUT.chains[:100]
