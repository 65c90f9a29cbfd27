import math
import random
import re
import string
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from architectures import build, opened
from planted_degenerate import END, FIRST, bigram_model, bigram_table, prompts
from torch.nn import functional as F
from toys import permutation_toy
from transformers import DynamicCache, LlamaForCausalLM

import manyheads as mh
from manyheads.edit.inference_time.conditional_beams import (
    LEARNING,
    AttributeHead,
    AttributeSizes,
    HeadLearning,
    conditional_beam_search,
    learn_attribute,
    not_degenerate,
)
from manyheads.edit.inference_time.hidden_state_optimisation import StateSteps, optimise_states, score_answers
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.lab.permutations import permutation_prompts
from manyheads.lab.small_llama import llama_config
from manyheads.tasks.texts import passages
from manyheads.training import TrainSettings, fit, next_token_loss

DECODERS = ["llama", "gpt2", "qwen3", "gemma2", "opt", "falcon", "bloom", "mpt", "gpt_oss", "mixtral"]


def some_ids(rows=3, length=13, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


# Hidden-state optimisation


@torch.no_grad()
def windowed_nll(model, ids, window):
    cached, parts = DynamicCache(), []
    for start in range(0, ids.shape[1] - 1, window):
        targets = ids[:, start + 1 : start + window + 1]
        logits = model.plain(input_ids=ids[:, start : start + window], past_key_values=cached, use_cache=True).logits
        parts.append(F.cross_entropy(logits[:, : targets.shape[1]].transpose(1, 2), targets, reduction="none"))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", DECODERS)
def test_without_a_step_states_score_as_plain_windows_do_and_weights_stay_bit_for_bit(name):
    model, ids = mh.open_model(build(name)), some_ids()
    before = {key: value.clone() for key, value in model.plain.state_dict().items()}
    read = optimise_states(model, ids, StateSteps(eta=0.0, window=4))
    assert torch.equal(read.nll, windowed_nll(model, ids, 4))
    whole = F.cross_entropy(model.logits(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert (read.nll - whole).abs().max() < 2e-5
    moved = optimise_states(model, ids, StateSteps(eta=0.05, window=4))
    assert (
        torch.equal(moved.nll[:, :4], read.nll[:, :4]) and (moved.nll - read.nll)[:, 4:].abs().min(1).values.max() > 0
    )
    assert all(torch.equal(value, before[key]) for key, value in model.plain.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.plain.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_token_is_scored_with_states_that_saw_it_or_what_follows(name):
    model, ids = opened(name), some_ids(length=17)
    how = StateSteps(eta=0.05, window=4)
    whole = optimise_states(model, ids, how).nll
    for changed in (1, 4, 5, 8, 11, 16):
        other = ids.clone()
        other[:, changed:] = some_ids(length=17 - changed, seed=changed)
        assert torch.equal(optimise_states(model, other, how).nll[:, : changed - 1], whole[:, : changed - 1])
        logits_of_it = optimise_states(model, other[:, : changed + 1], how).nll[:, -1]
        alone = ids[:, : changed + 1].clone()
        alone[:, changed] = other[:, changed]
        assert torch.allclose(optimise_states(model, alone, how).nll[:, -1], logits_of_it, atol=1e-6)


class Nudged(DynamicCache):
    """Adds a number to one entry of one layer's new keys or values, which that layer's attention then reads."""

    def __init__(self, where, by):
        super().__init__()
        self.where, self.by = where, by

    def update(self, keys, values, layer, *args, **kwargs):
        at_layer, kind, *entry = self.where
        if layer == at_layer:
            held = [keys, values]
            held[kind] = held[kind].clone()
            held[kind][tuple(entry)] += self.by
            keys, values = held
        return super().update(keys, values, layer, *args, **kwargs)


@pytest.mark.parametrize("where", [(0, 0, 0, 1, 2, 3), (1, 1, 1, 0, 4, 0), (2, 0, 2, 1, 5, 7), (2, 1, 0, 0, 0, 1)])
def test_the_gradient_is_that_of_the_windows_loss_by_finite_differences(where):
    model, ids = mh.open_model(build("llama").double()), some_ids(length=7)
    how = StateSteps(eta=1e6, eps=1e6, window=7)  # so large an eps makes Adam's first step the gradient itself
    moved, plain = (optimise_states(model, ids, replace(how, eta=eta)).states for eta in (1e6, 0.0))
    at_layer, kind, *entry = where
    found = (plain[2 * at_layer + kind] - moved[2 * at_layer + kind])[tuple(entry)]

    @torch.no_grad()
    def loss(by):
        logits = model.plain(input_ids=ids, past_key_values=Nudged(where, by), use_cache=True).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="sum")

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2  # norms compute in float32: a smaller nudge drowns in rounding
    assert found == pytest.approx(float(slope), rel=2e-3, abs=2e-4) and abs(found) > 1e-3


@pytest.mark.parametrize("memory", [None, 6])
def test_every_state_moves_by_an_adam_of_its_own(memory):
    model, ids = opened("llama"), some_ids(rows=2, length=17)
    how = StateSteps(eta=0.02, window=4, memory=memory)
    read = optimise_states(model, ids, how)
    states, optimisers, nll = [], [], []
    for start in range(0, 16, 4):
        past = list(zip(*[[p.data for p in state] for state in states], strict=True))
        pairs = [torch.cat(part, 2) for part in past]
        cached = DynamicCache(list(zip(pairs[::2], pairs[1::2], strict=True))) if pairs else DynamicCache()
        where = torch.arange(start, start + 4).expand(2, -1)
        logits = model.plain(
            input_ids=ids[:, start : start + 4], past_key_values=cached, position_ids=where, use_cache=True
        ).logits
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, start + 1 : start + 5], reduction="none")
        nll.append(losses.detach())
        held = [tensor for layer in cached.layers for tensor in (layer.keys, layer.values)]
        grads = torch.autograd.grad(losses.sum(), held)
        for at in range(held[0].shape[2]):
            if at >= len(states):
                states.append([torch.nn.Parameter(h[:, :, at : at + 1].detach().clone()) for h in held])
                optimisers.append(torch.optim.Adam(states[at], lr=0.02))
            for parameter, grad in zip(states[at], grads, strict=True):
                parameter.grad = grad[:, :, at : at + 1]
            optimisers[at].step()
        if memory:
            states, optimisers = states[-memory:], optimisers[-memory:]
    assert torch.allclose(torch.cat(nll, 1), read.nll, atol=1e-5)
    kept = [torch.cat(part, 2) for part in zip(*states, strict=True)]
    for mine, theirs in zip(read.states, kept, strict=True):
        assert mine.shape[2] == (17 if memory is None else memory)
        assert torch.allclose(mine[:, :, -len(states) - 1 : -1][:, :, -5:], theirs[:, :, -5:], atol=1e-5)


def test_texts_in_a_batch_have_states_of_their_own():
    model, ids, how = opened("qwen3"), some_ids(), StateSteps(eta=0.03, window=3)
    together = optimise_states(model, ids, how).nll
    for i in range(3):
        assert torch.allclose(optimise_states(model, ids[i : i + 1], how).nll[0], together[i], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_answers_after_unmoved_demonstrations_score_as_after_the_whole_prompt(name):
    model, ids = opened(name), some_ids(rows=1, length=10)
    queries, answers = some_ids(rows=4, length=3, seed=1), torch.tensor([5, 9, 30])
    read = optimise_states(model, ids, StateSteps(eta=0.0, window=4))
    whole = model.logits(torch.cat([ids.expand(4, -1), queries], 1))[:, -1].log_softmax(-1)[:, answers]
    assert (score_answers(model, read, queries, answers) - whole).abs().max() < 2e-5
    moved = optimise_states(model, ids, StateSteps(eta=0.05, window=4))
    assert (score_answers(model, moved, queries, answers) - whole).abs().max() > 1e-3


@cache
def python_topics():
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 1500)


def cipher(text):
    """Every letter is another one, the same throughout."""
    shuffled = random.Random(1).sample(string.ascii_lowercase, 26)
    return text.translate(str.maketrans(string.ascii_lowercase, "".join(shuffled)))


def renamed(text):
    """Every word is another one of the text, the same throughout."""
    words = sorted(set(re.findall(r"[a-z]{3,}", text)))
    other = dict(zip(words, random.Random(1).sample(words, len(words)), strict=True))
    return re.sub(r"[a-z]{3,}", lambda found: other[found.group()], text)


def ratio(model, ids, how):
    return optimise_states(model, ids, how).perplexity / optimise_states(model, ids, replace(how, eta=0.0)).perplexity


def test_shifted_text_is_foretold_better_from_moved_states_and_not_from_shuffled_gradients():
    model = mh.open_model()
    ids = passages(model, [cipher(python_topics()[:40_000])], n=4, length=193, seed=7)
    moved, shuffled = (ratio(model, ids, StateSteps(shuffled=seed)) for seed in (None, 0))
    print(f"perplexity on enciphered text, against unmoved states: {moved:.4f}, shuffled {shuffled:.4f}")
    assert moved <= 0.98 and shuffled > moved + 0.03


@pytest.mark.slow
def test_the_gain_grows_with_the_shift_and_is_more_than_a_temperature():
    model, gains = mh.open_model(), {}
    for name, shift in (("plain", str), ("renamed", renamed), ("cipher", cipher)):
        text = shift(python_topics())
        sources = [text[at : at + 30_000] for at in range(0, 12 * 30_000, 30_000)]
        ids = passages(model, sources, n=8, length=385, seed=5)

        def against(plain, how, ids=ids):
            change = (optimise_states(model, ids, how).nll - plain).mean(1)
            return [float(change.mean()), float(change.std() / len(change) ** 0.5)]

        plain = optimise_states(model, ids, StateSteps(eta=0.0)).nll
        gains[name] = {
            str(how): against(plain, how) for how in (StateSteps(), StateSteps(eta=0.1), StateSteps(shuffled=0))
        }
        logits = model.logits(ids)[:, :-1].flatten(0, 1)
        loss = {
            t: float(F.cross_entropy(logits / t, ids[:, 1:].flatten())) for t in (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)
        }
        best = min(loss, key=loss.__getitem__)
        handle = model.layout.unembedding.register_forward_hook(lambda _, __, out, t=best: out / t)
        gains[name]["on top of the best temperature"] = against(
            optimise_states(model, ids, StateSteps(eta=0.0)).nll, StateSteps()
        )
        handle.remove()
        print(name, f"best temperature {best} {loss[best] - loss[1.0]:.4f}", gains[name])
    moved, far, shuffled, calibrated = ([kind[key] for kind in gains.values()] for key in gains["plain"])
    assert math.exp(moved[2][0]) <= 0.98 and math.exp(calibrated[2][0]) <= 0.98
    assert moved[2][0] < moved[1][0] < moved[0][0] < 0.01
    assert moved[2][0] < shuffled[2][0] - 0.05 and far[0][0] > 0.1


@pytest.mark.slow
def test_on_the_toy_moved_demonstrations_answer_neither_better_nor_worse():
    toy, answers = permutation_toy(), torch.arange(16, 32)
    shown = permutation_prompts(100, shots=1, seed=9)

    def nats(how):
        scores = [
            score_answers(toy, optimise_states(toy, p[None, :4], how), p[None, 4:], answers) for p in shown.tokens
        ]
        return -torch.cat(scores).gather(1, shown.answers[:, None] - 16)[:, 0]

    plain, moved = nats(StateSteps(eta=0.0)), nats(StateSteps())
    gain = plain - moved
    error = float(gain.std()) / len(gain) ** 0.5
    print(f"nats of the answer: {plain.mean():.4f}, from moved states {moved.mean():.4f}, gain +- {error:.4f}")
    assert abs(float(gain.mean())) < 3 * error and abs(float(gain.mean())) < 0.02


def test_wrong_texts_and_models_without_states_are_refused():
    model = opened("llama")
    with pytest.raises(InputError, match="fewer than two"):
        optimise_states(model, torch.tensor([[3]]))
    with pytest.raises(InputError, match="128 positions"):
        optimise_states(model, some_ids(length=129))
    with pytest.raises(InputError, match="different lengths"):
        optimise_states(model, {"input_ids": some_ids(), "attention_mask": (torch.arange(13) > 2).expand(3, -1).long()})
    with pytest.raises(InputError, match="eta must be at least 0"):
        StateSteps(eta=-1)
    with pytest.raises(InputError, match="of 3 texts"):
        score_answers(model, optimise_states(model, some_ids()), some_ids(), torch.tensor([3]))
    with pytest.raises(UnsupportedError, match="reads both ways"):
        optimise_states(opened("bert"), some_ids())


# Conditional beam search


def random_head(model, seed=0):
    torch.manual_seed(seed)
    head = AttributeHead(AttributeSizes(model.layout.unembedding.weight.shape[1], rank=8, hidden=16))
    for parameter in head.parameters():
        parameter.data.mul_(2).requires_grad_(False)
    head.fingerprint = model.fingerprint
    return head


def padded_prompts():
    ids = some_ids(length=6)
    mask = (torch.arange(6) >= torch.tensor([[0], [2], [3]])).long()
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "bloom", "mixtral"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_weight_zero_is_transformers_own_beam_search(name, length_penalty):
    model, given = opened(name), padded_prompts()
    settings = dict(num_beams=4, max_new_tokens=7, length_penalty=length_penalty)
    settings |= dict(return_dict_in_generate=True, output_scores=True, num_return_sequences=2)
    plain = model.generate(given, do_sample=False, **settings)
    found = conditional_beam_search(model, given, random_head(model), weight=0.0, **settings)
    assert torch.equal(found.sequences, plain.sequences) and torch.equal(found.sequences_scores, plain.sequences_scores)
    other = conditional_beam_search(model, given, random_head(model), weight=3.0, **settings)
    assert not torch.equal(other.sequences_scores, plain.sequences_scores)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_beams_score_is_the_log_probability_of_text_and_attribute(name):
    model, ids = opened(name), some_ids(length=5)
    head = random_head(model)
    found = conditional_beam_search(
        model,
        ids,
        head,
        weight=2.0,
        num_beams=4,
        max_new_tokens=6,
        num_return_sequences=4,
        return_dict_in_generate=True,
        output_scores=True,
    )
    states = []
    handle = model.layout.unembedding.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
    logits = model.logits(found.sequences)
    handle.remove()
    log_p = logits[:, 4:-1].log_softmax(-1).gather(-1, found.sequences[:, 5:, None])[..., 0]
    weight = model.layout.unembedding.weight.detach()
    for row in range(12):
        new = found.sequences[row, 5:].tolist()
        n = new.index(2) + 1 if 2 in new else len([t for t in new if t])
        state, token = states[0][row, 4 + n - 1], weight[new[n - 1]]
        expected = log_p[row, :n].sum() + 2 * F.logsigmoid(head(state[None], token[None]))[0]
        assert float(found.sequences_scores[row]) == pytest.approx(expected.item(), abs=1e-3)


@cache
def planted():
    return bigram_model(bigram_table())


QUICK = HeadLearning(samples=120, max_new_tokens=12, training=replace(LEARNING, steps=300))


@cache
def learned(shuffled=False):
    return learn_attribute(planted(), prompts(), settings=replace(QUICK, shuffled=shuffled))


def texts(sequences):
    return [[token for token in row if token != END] for row in sequences[:, 1:].tolist()]


def share_of(judge: Callable[[list[int]], bool], found):
    return sum(map(judge, found)) / len(found)


def empty(found):
    return share_of(lambda text: not text, found)


def plain_search(beams, length_penalty=0.0, **kwargs):
    settings = dict(num_beams=beams, max_new_tokens=12, do_sample=False, length_penalty=length_penalty)
    return texts(planted().generate(prompts(), **settings, **kwargs))


def search(beams, head, **kwargs):
    return texts(conditional_beam_search(planted(), prompts(), head, num_beams=beams, max_new_tokens=12, **kwargs))


def test_with_planted_empty_modes_conditional_search_returns_no_empty_text_and_wider_plain_beams_get_worse():
    widths = (2, 3, 5, 10)
    plain = [empty(plain_search(beams)) for beams in widths]
    conditional = [empty(search(beams, learned())) for beams in widths]
    control = [empty(search(beams, learned(shuffled=True))) for beams in widths]
    print(f"empty texts at {widths}: plain {plain}, conditional {conditional}, shuffled labels {control}")
    assert plain == sorted(plain) and plain[-1] >= 0.5 > plain[0] and control[-1] >= 0.5
    assert not any(conditional)
    assert learned().about["held-out nats"] < learned().about["nats of the share alone"] - 0.05
    shuffled = learned(shuffled=True).about
    assert shuffled["held-out nats"] > shuffled["nats of the share alone"] - 0.01


def test_dividing_by_the_length_swaps_empty_texts_for_repeated_ones_and_divides_the_condition_too():
    plain, divided, conditional = (
        plain_search(20, 1.0),
        search(20, learned(), length_penalty=1.0),
        search(20, learned()),
    )
    good = [share_of(not_degenerate, found) for found in (plain, divided, conditional)]
    print("good at 20 beams: plain, conditional, both divided by length, and conditional as it is:", good)
    assert empty(plain) == 0 and good[0] <= 0.2
    assert good[2] == 1 > good[1]


def test_what_is_found_is_the_likeliest_text_that_is_not_degenerate():
    table, found = bigram_table(), search(10, learned())
    best = table[1:FIRST, FIRST:] * table[FIRST:, END]  # no text of two words is likelier than its own likeliest word
    wanted = best.max(1).values
    for i, text in enumerate(found):
        path = [i + 1, *text, END]
        p = torch.stack([table[a, b] for a, b in pairwise(path)]).prod()
        assert p >= 0.9 * wanted[i]
    assert share_of(not_degenerate, found) == 1


def test_degenerate_means_empty_or_said_twice():
    assert not_degenerate([4]) and not_degenerate([4, 5, 6, 4]) and not_degenerate([4, 4])
    assert not not_degenerate([]) and not not_degenerate([4] * 4) and not not_degenerate([4, 5] * 4)


def test_a_head_is_the_same_after_loading_and_only_fits_its_model(tmp_path):
    learned().save(tmp_path / "head")
    head = AttributeHead.load(tmp_path / "head")
    assert all(value.equal(learned().state_dict()[name]) for name, value in head.state_dict().items())
    assert head.about["good"] == learned().about["good"] and search(5, head) == search(5, learned())
    other = bigram_model(bigram_table(1))
    with pytest.raises(MismatchError, match="pass force"):
        conditional_beam_search(other, prompts(), head)
    conditional_beam_search(other, prompts(), head, force=True, max_new_tokens=2)
    with pytest.raises(InputError, match="already exists"):
        head.save(tmp_path / "head")
    (tmp_path / "head" / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no attribute head"):
        AttributeHead.load(tmp_path / "head")


def test_what_cannot_be_learned_or_searched_is_refused():
    model = planted()
    with pytest.raises(InputError, match=r"all 24 sampled texts are good"):
        learn_attribute(model, prompts(), good=lambda text: True, settings=HeadLearning(samples=2, max_new_tokens=3))
    with pytest.raises(InputError, match=r"all 48 sampled texts are degenerate"):
        how = HeadLearning(samples=2, max_new_tokens=3, temperatures=(1.0, 0.5))
        learn_attribute(model, prompts(), good=lambda text: False, settings=how)
    with pytest.raises(InputError, match="at least 2"):
        conditional_beam_search(model, prompts(), learned(), num_beams=1)
    with pytest.raises(UnsupportedError, match="generates no text"):
        learn_attribute(opened("bert"), some_ids())


@pytest.mark.slow
def test_a_trained_model_whose_data_are_a_twelfth_empty_has_empty_modes_that_the_condition_avoids(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = [torch.arange(10, 60)[torch.randperm(50, generator=generator)] for _ in range(8)]
    starts = torch.tensor([0.34, 0.24, 0.17, 0.12, 0.08, 0.05])

    def batch_at(number):
        generator = torch.Generator().manual_seed(number)
        rows = torch.zeros(64, 9, dtype=torch.long)
        weights = torch.zeros(64, 9)
        for row in rows:
            topic = int(torch.randint(8, (1,), generator=generator))
            row[0] = topic + 1
            if torch.rand(1, generator=generator) < 1 / 12:
                continue
            n = int(torch.randint(4, 8, (1,), generator=generator))
            row[1] = words[topic][torch.multinomial(starts, 1, generator=generator)]
            rest = words[topic][6:26]
            row[2 : n + 1] = rest[torch.randperm(20, generator=generator)[: n - 1]]
        ended = (rows[:, 1:] == END).cumsum(1)
        weights[:, 1:] = (ended <= 1).float()
        return {"input_ids": rows, "weights": weights}

    config = llama_config(
        60, 64, 2, 4, intermediate_size=128, max_position_embeddings=32, eos_token_id=END, pad_token_id=END
    )
    torch.manual_seed(0)
    trunk = LlamaForCausalLM(config)
    settings = TrainSettings(steps=400, rate=3e-3, warmup=20, decay=0.4, precision="fp32")
    fit(trunk, batch_at, settings, loss=next_token_loss)
    model = mh.open_model(trunk.eval())
    topics = torch.arange(1, 9)[:, None]
    head = learn_attribute(model, topics, settings=HeadLearning(samples=200, max_new_tokens=10))
    settings = dict(max_new_tokens=10)
    found = {}
    for beams in (2, 3, 10):
        plain = model.generate(topics, num_beams=beams, do_sample=False, length_penalty=0.0, **settings)
        found[beams] = (
            empty(texts(plain)),
            empty(texts(conditional_beam_search(model, topics, head, num_beams=beams, **settings))),
        )
    print("empty, plain and conditional, by beams:", found, head.about)
    assert found[10][0] >= 0.5 and found[10][0] >= found[2][0] and found[10][1] == 0
