from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from architectures import opened, padded
from torch.nn import functional as F
from toys import braided_ceiling, braided_heads, markov_trunk
from transformers import LlamaForCausalLM

from manyheads.draft.core.decode import generate
from manyheads.draft.core.growth import BestFirst, Chain, Fixed
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.chimera import Chimera, trigrams_of
from manyheads.draft.drafters.medusa import Medusa
from manyheads.draft.training.corpus import Corpus, trunk_states
from manyheads.draft.training.heads import TRAINING, Recipe, train
from manyheads.errors import InputError
from manyheads.lab.markov import ceiling, markov_text
from manyheads.lab.small_llama import llama_config
from manyheads.model.opening import open_model

TREES = {
    "chain": Chain(4),
    "fixed": Fixed([(0, 0, 0, 0), (0, 1, 0), (1, 0, 0, 1), (2,), (1, 1)]),
    "best": BestFirst(nodes=9, beam=3, children=3, levels=4),
}


def shaken(trunk, seed=0, size=0.3, kind=Chimera, **settings):
    """Heads whose every weight matters: the zeros that they start with would hide mistakes."""
    torch.manual_seed(seed)
    chimera = kind(trunk, **settings)
    with torch.no_grad():
        for parameter in chimera.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return chimera.eval()


def some_text(rows=3, length=12, vocabulary=61, seed=0):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def said(trunk, chimera, ids):
    with torch.no_grad():
        return chimera.teacher_forced(trunk, trunk_states(trunk.model, ids)[0], ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_changing_a_token_moves_no_guess_of_it_or_of_one_before_and_moves_the_next_heads(name):
    trunk = DraftTrunk(opened(name))
    chimera, ids = shaken(trunk), some_text()
    before = said(trunk, chimera, ids)
    for place in range(2, ids.shape[1]):
        other = ids.clone()
        other[:, place] = (ids[:, place] + 1) % 61
        for k, (old, new) in enumerate(zip(before, said(trunk, chimera, other), strict=True)):
            moved = (old - new).abs().amax((0, 2))
            predicted = torch.arange(len(moved)) + 2 + k
            assert moved[predicted <= place].eq(0).all()
            assert moved[predicted > place].gt(1e-5).all()


def test_changing_a_state_moves_only_guesses_made_from_it_or_after_it():
    trunk = DraftTrunk(opened("llama"))
    chimera, ids = shaken(trunk), some_text()
    hidden = trunk_states(trunk.model, ids)[0]
    with torch.no_grad():
        before = chimera.teacher_forced(trunk, hidden, ids)
        for place in range(ids.shape[1]):
            other = hidden.clone()
            other[:, place] += 1
            for old, new in zip(before, chimera.teacher_forced(trunk, other, ids), strict=True):
                moved = (old - new).abs().amax((0, 2))
                assert moved[:place].eq(0).all() and moved[place:].gt(0).all()


def test_a_head_hears_of_every_token_drafted_on_its_way():
    """Also of tokens that have left its trigram: through the outputs that stand in for missing states."""
    trunk = DraftTrunk(opened("llama"))
    chimera, ids = shaken(trunk), some_text()
    hidden = trunk_states(trunk.model, ids)[0]
    other = ids.clone()
    other[:, 3] = (ids[:, 3] + 1) % 61
    with torch.no_grad():
        old, new = (chimera.teacher_forced(trunk, hidden, text)[3][:, 2] for text in (ids, other))
    assert (trigrams_of(ids)[:, 6] == trigrams_of(other)[:, 6]).all()
    assert (old - new).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "stablelm"])
def test_untrained_heads_add_what_the_trunk_would_say_of_their_output_to_what_it_says(name):
    trunk = DraftTrunk(opened(name))
    chimera, ids = Chimera(trunk).eval(), some_text()
    hidden = trunk_states(trunk.model, ids)[0]
    with torch.no_grad():
        features = chimera.trigrams.out(trunk.embed(trigrams_of(ids)).flatten(-2))
        for k, logits in enumerate(chimera.teacher_forced(trunk, hidden, ids)):
            n = ids.shape[1] - 2 - k
            expected = F.linear(hidden[:, :n] + features[:, 1 + k : 1 + k + n], trunk.readout, trunk.readout_bias)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_trigrams_repeat_the_first_token_where_there_is_none_before():
    assert trigrams_of(torch.tensor([[5, 6, 7, 8]])).tolist() == [[[5, 5, 5], [5, 5, 6], [5, 6, 7], [6, 7, 8]]]


def test_the_output_is_what_a_layer_over_states_stand_ins_and_one_feature_gives_in_its_last_column():
    """The formula, spelt out for every column by plain causal passes over as many columns as it names."""
    trunk = DraftTrunk(opened("llama"))
    chimera, ids = shaken(trunk), some_text()
    hidden = trunk_states(trunk.model, ids)[0]
    with torch.no_grad():
        found = chimera.teacher_forced(trunk, hidden, ids)
        features = chimera.trigrams(trunk.embed(trigrams_of(ids)))
        for t in range(ids.shape[1] - 5):
            known = hidden[:, : t + 1]
            for k in range(4):
                output = chimera.context(torch.cat([known, features[:, t + 1 + k : t + 2 + k]], 1))[:, -1:]
                known = torch.cat([known, output], 1)
                logits = F.linear(torch.cat([hidden[:, t : t + 1], output], -1), chimera.readouts[k])
                torch.testing.assert_close(found[k][:, t], logits[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_tables_give_the_same_features_as_the_product_and_follow_the_weights(name):
    trunk = DraftTrunk(opened(name))
    chimera, ids = shaken(trunk, tables=True), some_text(5, 40)
    grams = trigrams_of(ids)
    for _ in range(2):
        chimera.start(trunk, 5)
        with torch.no_grad():
            words = trunk.embed(grams)
            direct, cached = chimera.trigrams(words), chimera.trigrams.looked_up(words, grams)
            scale = direct.abs().max().clamp(min=1)
            assert (direct - cached).abs().max() / scale < 1e-5
            made = chimera.trigrams._tables
            chimera.start(trunk, 5)
            assert chimera.trigrams._tables is made
            chimera.trigrams.block.linear.weight.mul_(1.5)


def test_a_step_of_the_optimizer_makes_the_tables_anew():
    trunk = DraftTrunk(opened("llama"))
    chimera = shaken(trunk, tables=True)
    chimera.start(trunk, 1)
    made = chimera.trigrams._tables
    optimizer = torch.optim.AdamW(chimera.parameters(), lr=1e-2)
    ids = some_text()
    chimera.teacher_forced(trunk, trunk_states(trunk.model, ids)[0], ids)[0].logsumexp(-1).mean().backward()
    optimizer.step()
    chimera.start(trunk, 1)
    assert chimera.trigrams._tables is not made


class Watched(Chimera):
    """Keeps what it says while drafting, and after which tokens of which text, of rows that are not finished."""

    def start(self, trunk, rows):
        super().start(trunk, rows)
        self.log = getattr(self, "log", [])

    def first(self, trunk, accepted):
        logits = super().first(trunk, accepted)
        going = accepted.valid.any(-1).tolist()
        self.texts = {row: list(text) for row, text in enumerate(accepted.text) if going[row]}
        self.paths = {row: [[]] for row in self.texts}
        self.log += [(text, [], logits[row, 0]) for row, text in self.texts.items()]
        return logits

    def next(self, trunk, nodes):
        logits = super().next(trunk, nodes)
        for row in self.texts:
            parents = nodes.parents[row if len(nodes.parents) > 1 else 0].tolist()
            tokens = nodes.tokens[row].tolist()
            self.paths[row] = [[*self.paths[row][p], token] for p, token in zip(parents, tokens, strict=True)]
            self.log += [(self.texts[row], path, logits[row, i]) for i, path in enumerate(self.paths[row])]
        return logits


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_drafted_is_what_was_trained(name, tree, tables):
    """Through rounds of ragged acceptance, in a left-padded batch, along every path of the tree."""
    model = opened(name)
    trunk, inputs = DraftTrunk(model), padded(name, "left")
    watched = shaken(trunk, seed=1, size=0.05, kind=Watched, tables=tables)
    out = generate(model, watched, inputs, growth=TREES[tree], max_new_tokens=10, stop=())
    assert sum(out.tally.accepted) > 0 and any(len(path) == 3 for _, path, _ in watched.log)
    for text in {tuple(text) for text, _, _ in watched.log}:
        here = [(path, logits) for seen, path, logits in watched.log if tuple(seen) == text]
        ids = torch.tensor([[*text, *path, *[3] * (4 - len(path))] for path, _ in here])
        trained = said(trunk, watched, ids)
        for row, (path, logits) in enumerate(here):
            expected = trained[len(path)][row, len(text) - 2]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def fifty_prompts(vocabulary=61):
    """Of 3 to 12 tokens, left-padded."""
    ids = some_text(50, 12, vocabulary, seed=5)
    lengths = torch.arange(50) % 10 + 3
    mask = (torch.arange(12) >= 12 - lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("untrained", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_greedy_text_is_the_models_own_whatever_the_heads_say(name, untrained):
    model, prompts = opened(name), fifty_prompts()
    expected = model.plain.generate(**prompts, max_new_tokens=12, do_sample=False, eos_token_id=None)
    chimera = Chimera(DraftTrunk(model)).eval() if untrained else shaken(DraftTrunk(model), size=0.3)
    for growth in [None, *TREES.values()]:
        out = generate(model, chimera, prompts, growth=growth, max_new_tokens=12, stop=())
        assert out.tokens == expected[:, 12:].tolist()


def test_the_distillation_term_is_the_distance_to_the_state_that_the_output_stands_in_for():
    trunk = DraftTrunk(opened("llama"))
    chimera, ids = shaken(trunk, distil=0.5), some_text()
    hidden = trunk_states(trunk.model, ids)[0]
    outputs = chimera._outputs(trunk, hidden, ids, 1)[0]
    expected = 0.5 * (outputs - hidden[:, 1:-1]).pow(2).mean()
    torch.testing.assert_close(chimera.extra_loss(trunk, hidden, ids), expected)
    assert shaken(trunk).extra_loss(trunk, hidden, ids) == 0
    optimizer = torch.optim.AdamW([*chimera.trigrams.parameters(), *chimera.context.parameters()], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = chimera.extra_loss(trunk, hidden, ids)
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * expected


def test_stand_ins_are_detached_so_that_each_output_is_trained_by_its_own_head():
    trunk = DraftTrunk(opened("llama"))
    chimera, ids = shaken(trunk), some_text()
    hidden = trunk_states(trunk.model, ids)[0]
    outputs = chimera._outputs(trunk, hidden, ids, 2)
    (inner,) = torch.autograd.grad(outputs[1].sum(), outputs[0], allow_unused=True)
    assert inner is None


def test_the_trunk_is_neither_held_nor_trained():
    trunk = DraftTrunk(opened("llama"))
    chimera = Chimera(trunk)
    own = {p.data_ptr() for p in chimera.parameters()}
    assert not own & {p.data_ptr() for p in trunk.model.module.parameters()}
    assert len({p.data_ptr() for p in chimera.readouts}) == 4
    again = Chimera.build(trunk, **chimera.settings)
    again.load_state_dict(chimera.state_dict())
    assert torch.equal(said(trunk, again.eval(), some_text())[3], said(trunk, chimera.eval(), some_text())[3])


def test_texts_too_short_for_a_head_give_it_nothing():
    trunk = DraftTrunk(opened("llama"))
    assert [out.shape[1] for out in said(trunk, Chimera(trunk), some_text(2, 4))] == [2, 1, 0, 0]


def test_no_heads_and_negative_weights_are_refused():
    trunk = DraftTrunk(opened("llama"))
    with pytest.raises(InputError, match="at least 1 head"):
        Chimera(trunk, heads=0)
    with pytest.raises(InputError, match="negative"):
        Chimera(trunk, distil=-1)


def sixteen_words():
    """A random trunk of 16 tokens whose next-token distributions are neither flat nor sharp."""
    torch.manual_seed(3)
    config = llama_config(16, 16, 1, 2, intermediate_size=32, max_position_embeddings=32, initializer_range=0.5)
    return open_model(LlamaForCausalLM(config).eval())


def enumerated(model, prompt, temperature):
    """The distributions of the first three tokens after the prompt, from every way there."""
    pairs = torch.tensor(list(product(range(16), repeat=2)))
    texts = torch.cat([prompt.expand(256, -1), pairs], 1)
    odds = (model.logits(texts)[:, prompt.shape[1] - 1 :] / temperature).double().softmax(-1)
    first = odds[0, 0]
    joint = first[pairs[:, 0]] * odds[:, 1].gather(1, pairs[:, 1:])[:, 0]
    second = joint.view(16, 16).sum(0)
    return first, second, (joint[:, None] * odds[:, 2]).sum(0)


def marginals(model, chimera, prompt, runs, **settings):
    """Shares of each token in each of three places, and the acceptance of the first guesses."""
    out = generate(model, chimera, prompt.expand(runs, -1), max_new_tokens=3, stop=(), **settings)
    tokens = torch.tensor(out.tokens)
    return [torch.bincount(tokens[:, i], minlength=16).double() / runs for i in range(3)], out.tally.acceptance


def distance(p, q):
    """Total variation."""
    return float((p - q).abs().sum() / 2)


GROWTHS = {"best": BestFirst(nodes=8, beam=3, children=3, levels=2), "drawn": Chain(2, sample=True)}


@pytest.mark.slow
@pytest.mark.parametrize("growth", GROWTHS)
def test_sampled_text_has_the_models_own_distribution(growth):
    model, prompt = sixteen_words(), torch.tensor([[3, 9, 1, 14]])
    trunk = DraftTrunk(model)
    chimera = Chimera(trunk, heads=2)
    ids = some_text(400, 12, 16)
    train(
        trunk,
        chimera,
        Corpus(ids, torch.ones_like(ids, dtype=torch.bool), model.fingerprint),
        Recipe(settings=replace(TRAINING, steps=200)),
    )
    true = enumerated(model, prompt, 0.8)
    settings = {"growth": GROWTHS[growth], "temperature": 0.8, "seed": 1}
    found, acceptance = marginals(model, chimera, prompt, runs=20_000, **settings)
    apart = [distance(f, t) for f, t in zip(found, true, strict=True)]
    print(growth, [round(x, 4) for x in apart], acceptance)
    assert acceptance[0] > 0.2
    assert max(apart[1:]) < 0.02
    typical, _ = marginals(model, chimera, prompt, runs=4000, acceptance="typical", **settings)
    print("typical", distance(typical[1], true[1]))
    assert distance(typical[1], true[1]) > 0.05


def markov_corpus(model, n=4000, seed=0):
    ids = markov_text(n, 48, seed=1000 + seed)
    return Corpus(ids, torch.ones_like(ids, dtype=torch.bool), model.fingerprint)


@pytest.mark.slow
def test_on_markov_text_three_heads_stay_at_the_ceiling_of_one_step_and_medusas_fall_to_their_own():
    model = markov_trunk()
    trunk, corpus = DraftTrunk(model), markov_corpus(model)
    recipe = Recipe(data=1.0, teacher=0.0, settings=replace(TRAINING, steps=400, rows=32, rate=2e-3))
    torch.manual_seed(0)
    chimera, medusa = Chimera(trunk, heads=3), Medusa(trunk, heads=3)
    fused = train(trunk, chimera, corpus, recipe).top(1)
    alone = train(trunk, medusa, corpus, recipe).top(1)
    print("chimera", fused, "medusa", alone)
    assert all(abs(a - ceiling(k)) < 0.02 for k, a in enumerate(alone, start=2))
    assert min(fused) >= 0.68
    prompts = markov_text(32, 8, seed=9)
    drafts = [
        generate(model, d, prompts, growth=Chain(3), max_new_tokens=60, temperature=1.0, stop=()).tally.tokens_a_pass
        for d in (chimera, medusa)
    ]
    print("tokens a pass", drafts)
    assert drafts[0] > 1.1 * drafts[1]


class WithoutContext(Chimera):
    """Chimera whose outputs are its trigram features: no layer reads the trunk's states."""

    def _outputs(self, trunk, hidden, ids, heads):
        features = self.trigrams(trunk.embed(trigrams_of(ids)))
        return [features[:, ahead : max(ahead, ids.shape[1] - 1)] for ahead in range(1, 1 + heads)]


class WithoutTrigrams(Chimera):
    """Chimera whose encoder is told nothing of the last three tokens."""

    def _outputs(self, trunk, hidden, ids, heads):
        return super()._outputs(trunk, hidden, torch.zeros_like(ids), heads)


@pytest.mark.slow
def test_where_a_token_follows_the_one_four_back_chimera_needs_the_context_that_its_trigram_does_not_hold():
    """#33: heads 1 and 2 must know x_{t-2} and x_{t-1}, which stand in earlier states alone; head 3 x_t, which h_t holds."""
    best = braided_ceiling(4)
    kinds = {"chimera": Chimera, "no context": WithoutContext}
    found = {
        name: braided_heads(lambda t, kind=kind: kind(t, heads=3), strands=4, steps=300, rate=3e-3)
        for name, kind in kinds.items()
    }
    print(found, best)
    assert all(a >= b - 0.03 for a, b in zip(found["chimera"], best, strict=True))
    assert max(found["no context"][:2]) < 0.1 and found["no context"][2] >= best[2] - 0.03


@pytest.mark.slow
def test_on_markov_text_chimera_falls_to_medusas_ceilings_without_its_trigrams():
    """#33: the other half of the two; in texts of one strand only the drafted tokens tell more than the state."""
    blind = braided_heads(lambda t: WithoutTrigrams(t, heads=3), strands=1, steps=300, rate=3e-3)
    fused = braided_heads(lambda t: Chimera(t, heads=3), strands=1, steps=300, rate=3e-3)
    print(fused, blind)
    assert min(fused) >= 0.68
    assert all(a < ceiling(k) + 0.02 for k, a in enumerate(blind, start=2))
