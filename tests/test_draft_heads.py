"""Draft heads: what they may see, that what is drafted is what was trained, and that they learn."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from architectures import opened, padded, shared
from toys import braided_heads, markov_trunk

import manyheads as mh
from manyheads.draft.core.decode import generate
from manyheads.draft.core.growth import BestFirst, Chain, Fixed
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.chimera import Chimera
from manyheads.draft.drafters.clover import Clover
from manyheads.draft.drafters.draft_model import DraftModel
from manyheads.draft.drafters.eagle import Eagle
from manyheads.draft.drafters.hydra import Hydra
from manyheads.draft.drafters.medusa import Medusa
from manyheads.draft.files.saving import load_drafter, save_drafter
from manyheads.draft.multi_token.drafter import MultiTokenDrafter
from manyheads.draft.multi_token.model import MultiToken
from manyheads.draft.output.flash_head import FlashHead
from manyheads.draft.training.corpus import (
    Corpus,
    frequent,
    greedy_texts,
    own_texts,
    sampled_and_greedy,
    trunk_states,
    with_states,
)
from manyheads.draft.training.heads import TRAINING, Recipe, drafting_loss, rank_acceptance, rows_of, train
from manyheads.errors import InputError, MismatchError
from manyheads.lab.markov import ceiling, markov_text

SOME = list(range(1, 60, 2))
KINDS = {
    "medusa": lambda trunk: Medusa(trunk, heads=3, layers=2),
    "medusa, some tokens": lambda trunk: Medusa(trunk, heads=3, vocabulary=SOME),
    "hydra, some tokens": lambda trunk: Hydra(trunk, heads=3, vocabulary=SOME),
    "medusa, trunk's readout": lambda trunk: Medusa(trunk, heads=3, own_readout=False),
    "hydra": lambda trunk: Hydra(trunk, heads=3),
    "hydra++": lambda trunk: Hydra.plus_plus(trunk, heads=3),
    "clover": lambda trunk: Clover(trunk, heads=3),
    "chimera": lambda trunk: Chimera(trunk, heads=3),
    "eagle": lambda trunk: Eagle(trunk, heads=3),
}
GROWTHS = [Chain(3), Fixed([(0, 0), (1,), (2, 1, 0), (0, 1, 0)]), BestFirst(nodes=8, beam=3, children=3, levels=3)]


def made(kind, name="llama", noise=0.2):
    """A drafter with random weights, far from the point where it starts."""
    trunk = DraftTrunk(opened(name))
    torch.manual_seed(0)
    drafter = KINDS[kind](trunk).eval()
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(noise * torch.randn_like(weight))
    return trunk, drafter


def ids_of(rows, length, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_sees_nothing_it_will_not_know_when_it_drafts(kind):
    """Head k at column t: states up to t and tokens up to t + 1 + k, whatever comes later; and it does see the last of them."""
    trunk, drafter = made(kind)
    ids = ids_of(2, 10)
    hidden = trunk_states(trunk.model, ids)[0]
    with torch.no_grad():
        before = drafter.teacher_forced(trunk, hidden, ids)
        for t in (2, 5):
            for k, out in enumerate(before):
                assert out.shape == (2, 8 - k, len(SOME) if kind.endswith("some tokens") else trunk.vocab_size)
                states, tokens = hidden.clone(), ids.clone()
                states[:, t + 1 :] = torch.randn_like(states[:, t + 1 :])
                tokens[:, t + 2 + k :] = ids_of(2, 8 - k - t, seed=9)
                after = drafter.teacher_forced(trunk, states, tokens)[k]
                assert torch.equal(after[:, t], out[:, t]) or (after[:, t] - out[:, t]).abs().max() < 1e-5
                tokens = ids.clone()
                tokens[:, t + 1 + k] = (tokens[:, t + 1 + k] + 1) % 61
                moved = (drafter.teacher_forced(trunk, hidden, tokens)[k][:, t] - out[:, t]).abs().max()
                assert moved < 1e-6 if kind.startswith("medusa") else moved > 1e-4


class Recorder:
    """Keeps what a drafter said in each round, and of which text."""

    def __init__(self, drafter):
        self.said = []
        first, following = drafter.first, drafter.next

        def see_first(trunk, accepted):
            out = first(trunk, accepted)
            self.rounds_text = [list(row) for row in accepted.text]
            self.paths = [[[]] for _ in accepted.text]
            self.said.append((self.rounds_text, [[[]] for _ in accepted.text], out, accepted.valid.any(1).tolist()))
            return out

        def see_next(trunk, nodes):
            parents = nodes.parents.expand(len(nodes.tokens), -1).tolist()
            self.paths = [
                [self.paths[b][p] + [token] for p, token in zip(parents[b], row, strict=True)]
                for b, row in enumerate(nodes.tokens.tolist())
            ]
            out = following(trunk, nodes)
            self.said.append((self.rounds_text, self.paths, out, self.said[-1][3]))
            return out

        drafter.first, drafter.next = see_first, see_next


@pytest.mark.parametrize("growth", GROWTHS, ids=["chain", "fixed", "best"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drafted_is_what_was_trained(kind, growth):
    """In every round of a padded batch whose rows accept different numbers, at every node: the logits of `teacher_forced`."""
    trunk, drafter = made(kind, noise=0.02)
    recorder = Recorder(drafter)
    got = generate(trunk.model, drafter, padded("llama", "left"), growth=growth, max_new_tokens=10, stop=[])
    assert got.tally.passes > 3
    checked = 0
    for text, paths, out, live in recorder.said:
        for row, nodes in enumerate(paths):
            for i, path in enumerate(nodes):
                if not live[row]:
                    continue
                ids = torch.tensor([[*text[row], *path, 0]])
                with torch.no_grad():
                    hidden = trunk_states(trunk.model, ids)[0]
                    taught = drafter.teacher_forced(trunk, hidden, ids)[len(path)][0, -1]
                told = out[row, i if out.shape[1] > 1 else 0]
                if drafter.vocabulary is not None:
                    others = torch.ones_like(told, dtype=torch.bool)
                    others[drafter.vocabulary] = False
                    assert (told[others] == -torch.inf).all()
                    told = told[drafter.vocabulary]
                assert (told - taught).abs().max() < 1e-4 * taught.abs().max()
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_words_are_the_models_own(kind, name):
    trunk, drafter = made(kind, name, noise=0.05)
    ids = ids_of(1, 9)
    wanted = shared(name).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    for growth in GROWTHS:
        assert generate(trunk.model, drafter, ids, growth=growth, max_new_tokens=16).tokens == wanted[:, 9:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_layers_share_their_weights_and_the_trunk_has_none_among_them(kind):
    trunk, drafter = made(kind)
    own = [weight.data_ptr() for weight in drafter.parameters()]
    assert len(set(own)) == len(own) == len(list(drafter.named_parameters(remove_duplicate=False)))
    assert not set(own) & {weight.data_ptr() for weight in trunk.model.plain.parameters()}


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_untrained_heads_say_what_the_trunk_says(kind):
    trunk = DraftTrunk(opened("llama"))
    drafter = KINDS[kind](trunk)
    ids = ids_of(2, 8)
    hidden, logits = trunk_states(trunk.model, ids)
    for k, out in enumerate(drafter.teacher_forced(trunk, hidden, ids)):
        assert (out - logits[:, : 6 - k]).abs().max() < 1e-5


def test_a_draft_model_that_is_the_model_is_always_right():
    ids = ids_of(1, 9)
    for name in ("llama", "bloom", "mistral"):
        got = generate(opened(name), DraftModel(opened(name)), ids, growth=Chain(3), max_new_tokens=17, stop=[])
        assert got.tally.acceptance == [1.0, 1.0, 1.0] and got.tally.passes == 5
    batch = padded("mistral", "left")
    small = DraftModel(opened("mistral"))
    for growth in GROWTHS:
        got = generate(opened("mistral"), small, batch, growth=growth, max_new_tokens=14, stop=[])
        wanted = shared("mistral").generate(**batch, max_new_tokens=14, do_sample=False, eos_token_id=None)
        assert got.tokens == wanted[:, batch["input_ids"].shape[1] :].tolist()
    assert isinstance(GROWTHS[1], Fixed) and got.tally.acceptance[0] > 0.9


def test_a_draft_model_of_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="one vocabulary"):
        generate(mh.open_model(), DraftModel(opened("llama")), ids_of(1, 4))


# Learning


def corpus_of(model, texts):
    return Corpus(texts, torch.ones_like(texts, dtype=torch.bool), model.fingerprint)


@pytest.mark.parametrize("kind", ["hydra", "hydra, some tokens"])
def test_the_loss_is_the_weighted_sum_of_cross_entropies_of_the_tokens_that_count(kind):
    """Among the tokens that the heads know, where these are not all."""
    trunk, drafter = made(kind)
    known = list(range(61)) if drafter.vocabulary is None else SOME
    ids = ids_of(3, 9)
    counts = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    batch = {"input_ids": ids, "counts": counts}
    recipe = Recipe(data=0.3, teacher=0.7, decay=0.5)
    hidden, logits = trunk_states(trunk.model, ids)
    total = 0.0
    for k, out in enumerate(drafter.teacher_forced(trunk, hidden, ids)):
        data, teacher = [], []
        for b in range(3):
            for t in range(7 - k):
                if counts[b, t + 2 + k]:
                    said, token = out[b, t].log_softmax(-1), int(ids[b, t + 2 + k])
                    data += [-said[known.index(token)]] if token in known else []
                    teacher.append(-(logits[b, t + 1 + k][known].softmax(-1) * said).sum())
        assert 0 < len(data) < len(teacher) or kind == "hydra"
        total = total + 0.5**k * (0.3 * torch.stack(data).mean() + 0.7 * torch.stack(teacher).mean())
    assert drafting_loss(trunk, drafter, batch, recipe).item() == pytest.approx(total.item() / 1.75, rel=1e-5)


def test_training_resumes_to_the_same_weights_and_leaves_the_trunk_alone(tmp_path):
    model = opened("llama")
    trunk = DraftTrunk(model)
    before = {name: weight.clone() for name, weight in model.plain.state_dict().items()}
    corpus = corpus_of(model, ids_of(40, 16))

    def run(folder, stops=()):
        torch.manual_seed(0)
        drafter = Hydra(trunk, heads=2)
        for stop in (*stops, None):
            found = train(
                trunk,
                drafter,
                corpus,
                Recipe(settings=replace(TRAINING, steps=6, rows=8)),
                folder=folder,
                on_step=lambda p, stop=stop: p.step != stop,
            )
        return drafter, found

    (whole, found), (parted, _) = run(tmp_path / "a"), run(tmp_path / "b", stops=(3,))
    for a, b in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(a, b)
    assert found.steps == 6 and found.acceptance.shape == (2, 10)
    assert all(torch.equal(weight, before[name]) for name, weight in model.plain.state_dict().items())


def test_kept_states_train_the_same_heads(tmp_path):
    model = opened("llama")
    trunk, corpus = DraftTrunk(model), corpus_of(model, ids_of(20, 12))
    with_states(model, corpus).save(tmp_path / "corpus")
    kept = Corpus.load(tmp_path / "corpus", model)
    weights = []
    for text in (corpus, kept):
        drafter = Medusa(trunk, heads=2)
        train(trunk, drafter, text, Recipe(settings=replace(TRAINING, steps=4, rows=8)))
        weights.append(torch.cat([w.detach().flatten() for w in drafter.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-5
    with pytest.raises(MismatchError):
        Corpus.load(tmp_path / "corpus", opened("qwen2"))
    with pytest.raises(MismatchError):
        train(DraftTrunk(opened("qwen2")), drafter, kept)


def test_own_texts_are_the_models_and_count_up_to_the_end():
    model = opened("llama")
    corpus = own_texts(model, 6, 20, temperature=0.0, seed=1)
    wanted = shared("llama").generate(
        torch.tensor([[1]]), max_new_tokens=19, do_sample=False, attention_mask=torch.ones(1, 1)
    )
    length = wanted.shape[1]
    assert corpus.ids[:, :length].tolist() == wanted.expand(6, -1).tolist()
    assert corpus.counts[0].tolist() == [0 < i < length for i in range(20)]
    sampled = own_texts(model, 6, 20, seed=1, through_stops=True)
    assert len({tuple(row) for row in sampled.ids.tolist()}) == 6 and sampled.counts[:, 1:].all()
    assert torch.equal(sampled.ids, own_texts(model, 6, 20, seed=1, through_stops=True).ids)


def test_some_texts_go_on_greedily_from_sampled_openings():
    model = opened("llama")
    corpus = sampled_and_greedy(model, 10, 20, greedy=0.4, seed=1, through_stops=True)
    greedy = []
    for row in corpus.ids:
        wanted = shared("llama").generate(row[None, :5], max_new_tokens=15, do_sample=False, eos_token_id=None)
        greedy.append(torch.equal(wanted[0], row))
    assert len(corpus) == 10 and sum(greedy) == 4 and greedy[:8] != sorted(greedy[:8])
    assert len({tuple(row[:5]) for row in corpus.ids.tolist()}) == 10
    stopping = sampled_and_greedy(model, 40, 40, greedy=1.0, seed=1)
    assert 0 < len(stopping) <= 40 and (stopping.ids[:, 1:10] != model.config.eos_token_id).all()
    assert all(counts[10] and not counts[0] for counts in stopping.counts.tolist())


def test_frequent_tokens_are_those_that_count_most_often():
    ids = torch.tensor([[5, 5, 5, 9, 9, 2], [7, 2, 2, 2, 2, 2]])
    counts = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    corpus = Corpus(ids, counts, "")
    assert frequent(corpus, 2) == [5, 9] and frequent(corpus, 9) == [2, 5, 7, 9]


def test_texts_written_in_one_batch_are_the_models_own_with_the_states_of_all_their_tokens():
    model, module = opened("llama"), shared("llama")
    prompts = [ids_of(1, n)[0].tolist() for n in (5, 2, 7)]
    found = greedy_texts(model, prompts, new=6, length=14)
    ends = module.generation_config.eos_token_id
    for row, prompt in enumerate(prompts):
        alone = module.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0].tolist()
        text = found.ids[row][: len(alone)].tolist()
        assert text == alone and (len(alone) == len(prompt) + 6 or alone[-1] == ends)
        assert found.counts[row].nonzero()[:, 0].tolist() == list(range(len(prompt), len(alone)))
        states = trunk_states(model, torch.tensor([alone]))[0][0]
        assert torch.allclose(found.hidden[row, : len(alone)], states, atol=1e-5)
    both = Corpus.of_parts([found, found])
    assert len(both) == 6 and torch.equal(both.hidden[3:], found.hidden)
    drawn = greedy_texts(model, prompts[:1] * 8, new=6, length=14, sampled=(0, 3))
    texts = [tuple(row) for row in drawn.ids.tolist()]
    assert len(set(texts[::2])) == 1 and len(set(texts[1::2])) > 1
    with pytest.raises(InputError, match="the longest has 7"):
        greedy_texts(model, prompts, new=8, length=14)


def test_heads_of_no_or_unknown_tokens_are_refused():
    trunk = DraftTrunk(opened("llama"))
    for words, own in (([], True), ([3, 61], True), ([], False), ([61], False)):
        with pytest.raises(InputError, match="some of the 61"):
            Hydra(trunk, vocabulary=words, own_readout=own)


def test_heads_that_share_rows_of_the_output_matrix_train_and_save_none(tmp_path):
    trunk = DraftTrunk(opened("llama"))
    hydra = Hydra(trunk, 2, vocabulary=[3, 9, 12], own_readout=False)
    assert not any("readout" in name or "shared" in name for name in hydra.state_dict())
    states = torch.randn(1, 4, trunk.width)
    wanted = trunk.unembed(states)[..., [3, 9, 12]]
    assert torch.allclose(hydra.readouts(trunk, 1, states), wanted, atol=1e-6)
    save_drafter(hydra, trunk, tmp_path / "hydra")
    again = load_drafter(tmp_path / "hydra", trunk).drafter
    assert again.vocabulary.tolist() == [3, 9, 12]
    assert torch.equal(again.readouts(trunk, 0, states), hydra.readouts(trunk, 0, states))


@pytest.mark.parametrize("kind", ["hydra", "hydra, some tokens"])
def test_acceptance_by_rank_is_what_decoding_measures(kind):
    """Greedy text of the model, judged by teacher forcing, against the tally of decoding it again with a chain."""
    model = opened("llama")
    trunk, drafter = made(kind, noise=0.05)
    text = own_texts(model, 1, 60, temperature=0.0, through_stops=True)
    found = rank_acceptance(trunk, drafter, text, ranks=3)
    said = drafter.teacher_forced(trunk, trunk_states(model, text.ids)[0], text.ids)
    for k, out in enumerate(said):
        best = out.argmax(-1) if drafter.vocabulary is None else drafter.vocabulary[out.argmax(-1)]
        assert found[k, 0] == (best == text.ids[:, 2 + k :]).double().mean()
    assert all(a >= b >= 0 for row in found.tolist() for a, b in pairwise(row)) or found.sum() <= 3
    assert rows_of(text, torch.tensor([0]))["input_ids"].shape == (1, 60)


@pytest.fixture(scope="module")
def markov():
    model = markov_trunk()
    trunk = DraftTrunk(model)
    corpus = with_states(model, corpus_of(model, markov_text(1200, 48, seed=5)))
    heads = {}
    for kind, drafter in {
        "medusa": Medusa(trunk, heads=3),
        "hydra": Hydra(trunk, heads=3),
        "eagle": Eagle(trunk, 3),
    }.items():
        recipe = Recipe(data=1.0, teacher=0.0, settings=replace(TRAINING, steps=400, rows=32, rate=2e-3))
        heads[kind] = drafter, train(trunk, drafter, corpus, recipe, held_out=0.15)
    return model, heads


@pytest.mark.slow
def test_on_markov_text_heads_reach_what_can_be_known(markov):
    _, heads = markov
    for k in range(3):
        assert abs(heads["medusa"][1].acceptance[k, 0] - ceiling(k + 2)) < 0.02
        assert heads["hydra"][1].acceptance[k, 0] >= 0.68
        assert heads["eagle"][1].acceptance[k, 0] >= 0.68


class Stateless(Hydra):
    """Hydra without h_t: the tokens between are all that it knows."""

    def teacher_forced(self, trunk, hidden, ids):
        return super().teacher_forced(trunk, torch.zeros_like(hidden), ids)


@pytest.mark.slow
def test_hydra_needs_the_state_where_the_tokens_between_do_not_tell_and_these_where_the_state_does_not():
    """#59: what comes follows the token two back. For head 1 that is x_t, which h_t alone holds; for the others x_{t+1} and
    x_{t+2}, drafted by then, which no state holds."""
    made = {"hydra": lambda t: Hydra(t, heads=3), "no state": lambda t: Stateless(t, heads=3)}
    made["no tokens"] = lambda t: Medusa(t, heads=3)
    found = {name: braided_heads(make, strands=2, steps=300, rate=2e-3) for name, make in made.items()}
    print(found)
    assert min(found["hydra"]) >= 0.68
    assert found["no state"][0] < 0.1 and min(found["no state"][1:]) >= 0.68
    assert found["no tokens"][0] >= 0.68 and max(found["no tokens"][1:]) < ceiling(2) + 0.02


@pytest.mark.slow
def test_on_sampled_markov_text_hydra_drafts_a_third_more_than_medusa(markov):
    """Drafts of three, root sampled: 1.55 accepted a round for Hydra in theory; for Medusa 1.09 if roots were like any token, but
    a root is mostly what replaced a rejected guess, which Medusa's next guesses do not know."""
    model, heads = markov
    ids = markov_text(150, 8, seed=77)  # texts stay as long as those the heads learnt from
    accepted = {}
    for kind in ("medusa", "hydra"):
        got = generate(model, heads[kind][0], ids, growth=Chain(3), max_new_tokens=38, temperature=1.0)
        accepted[kind] = sum(got.tally.accepted) / got.tally.reached[0]
    assert accepted["hydra"] > 1.3 * accepted["medusa"]
    assert accepted["hydra"] == pytest.approx(1.55, abs=0.12)
    assert accepted["medusa"] < 1.09


def test_a_flash_head_may_draft_and_the_words_stay():
    model = opened("llama")
    flash = FlashHead.of(model, clusters=12, texts=(), seed=0)
    trunk = DraftTrunk(model, unembed=flash.unembed)
    torch.manual_seed(0)
    for drafter in (Medusa(trunk, heads=3, own_readout=False), Clover(trunk, heads=3), Eagle(trunk, heads=3)):
        for growth in GROWTHS:
            got = generate(model, drafter.eval(), ids_of(1, 9), growth=growth, max_new_tokens=16, trunk=trunk)
            wanted = generate(model, drafter, ids_of(1, 9), growth=growth, max_new_tokens=16)
            assert got.tokens == wanted.tokens


def test_heads_of_multi_token_training_draft_what_they_were_trained_to_say():
    """The drafter's level k is head k + 2, and at the start all heads are the trunk."""
    model = opened("llama")
    heads = MultiToken(model, n=4).heads
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    drafter, trunk = MultiTokenDrafter(heads), DraftTrunk(model)
    recorder = Recorder(drafter)
    got = generate(model, drafter, ids_of(1, 9), growth=GROWTHS[1], max_new_tokens=12, stop=[])
    plain = shared("llama").generate(ids_of(1, 9), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert got.tokens == plain[:, 9:].tolist() and drafter.depth == 3
    for text, paths, out, _ in recorder.said:
        z = trunk_states(model, torch.tensor([text[0][:-1]]))[0][0, -1]
        wanted = trunk.unembed(heads.hidden(2 + len(paths[0][0]), z))
        assert (out[0, 0] - wanted).abs().max() < 1e-4
    with pytest.raises(InputError, match="guesses nothing"):
        MultiTokenDrafter(MultiToken(model, n=1).heads)
