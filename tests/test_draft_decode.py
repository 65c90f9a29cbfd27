"""Decoding with guesses says what the model would have said, whatever is guessed."""

from collections import Counter
from itertools import product

import pytest
import torch
import transformers as tf
from architectures import DECODERS, opened, padded, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import manyheads as mh
from manyheads.draft.core.acceptance import accept, follow, reject, typical
from manyheads.draft.core.decode import generate, stream
from manyheads.draft.core.drafter import Stepwise
from manyheads.draft.core.growth import BestFirst, Chain, Fixed
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Proposal, Ranks, Tree, joined
from manyheads.draft.core.trees import best_ranks, expected_tokens
from manyheads.draft.drafters.prompt_lookup import PromptLookup
from manyheads.draft.drafters.together import CombinedDrafter
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.tree_pass import TreePass

NO_TREES = ("bloom", "mpt")
TREES = [name for name in DECODERS if name not in NO_TREES]
GROWTHS = [Chain(3), Fixed([(0, 0), (1,), (2, 1, 0)]), BestFirst(nodes=8, beam=3, children=4, levels=3)]


class Wild(Stepwise):
    """Guesses at random."""

    kind = "wild"

    def start(self, trunk, rows):
        self.generator = torch.Generator().manual_seed(0)

    def first(self, trunk, accepted):
        return self.logits(trunk, len(accepted.last), 1)

    def next(self, trunk, nodes):
        return self.logits(trunk, *nodes.tokens.shape)

    def logits(self, trunk, rows, nodes):
        return torch.randn(rows, nodes, trunk.vocab_size, generator=self.generator)


class Oracle(Stepwise):
    """Asks the model itself, by plain passes over the whole text; its i-th best guess is the model's."""

    kind = "oracle"

    def first(self, trunk, accepted: Accepted):
        self.paths = [[row] for row in accepted.text]
        return self.logits(trunk, self.paths)

    def next(self, trunk, nodes: Nodes):
        rows = nodes.tokens.shape[0]
        parents = nodes.parents.expand(rows, -1).tolist()
        self.paths = [
            [self.paths[b][p] + [t] for p, t in zip(parents[b], nodes.tokens[b].tolist(), strict=True)]
            for b in range(rows)
        ]
        return self.logits(trunk, self.paths)

    def logits(self, trunk, paths):
        module = trunk.model.module
        return torch.stack([torch.stack([module(torch.tensor([p])).logits[0, -1] for p in row]) for row in paths])


def ids_of(length=9, rows=1, seed=0, vocab=61):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(module, ids, **kwargs):
    out = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **kwargs)
    return out[0, ids.shape[1] :].tolist()


# The pass


@pytest.mark.parametrize("name", TREES)
def test_every_node_sees_its_own_path_and_nothing_else(name):
    model = opened(name)
    tree = Tree((0, 0, 1, 1, 2, 3))
    prompt, nodes = ids_of(14), ids_of(7, seed=1)
    with torch.inference_mode():
        reader = TreePass(model)
        assert reader.takes_trees
        reader.prompt(prompt)
        seen = reader.tree(nodes, *(x[None] for x in tree.on(torch.device("cpu"))))
        for node in range(7):
            path = nodes[:, [0, *tree.path(node)]]
            alone = model.module(torch.cat([prompt, path], 1)).logits[0, -1]
            assert (seen.logits[0, node] - alone).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt"])
def test_the_cache_holds_what_was_kept_row_by_row(name):
    """Two rounds with different numbers kept in each row, then one more pass: as if only the kept tokens had been read."""
    model = opened(name)
    batch = padded(name, "left")
    tree = Ranks([(0, 0, 0), (1, 0)]).tree
    within, depths = (x[None] for x in tree.on(torch.device("cpu")))
    with torch.inference_mode():
        reader = TreePass(model)
        reader.prompt(batch["input_ids"], batch["attention_mask"])
        texts = [r[m.bool()].tolist() for r, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        for kept in ([[0, 1, 3], [0], [0, 2, 4]], [[0], [0, 2], []]):
            nodes = ids_of(6, rows=3, seed=len(kept[0]))
            reader.tree(nodes, within, depths)
            reader.cache.keep(kept)
            for row, columns in enumerate(kept):
                texts[row] += nodes[row, columns].tolist()
        last = ids_of(1, rows=3, seed=5)
        seen = reader.tree(last, torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long))
        for row, text in enumerate(texts):
            alone = model.module(torch.tensor([[*text, int(last[row])]])).logits[0, -1]
            assert (seen.logits[row, 0] - alone).abs().max() < 1e-4 * alone.abs().max()


def test_models_that_take_no_tree_mask_are_found_by_trying_and_say_so():
    for name in NO_TREES:
        model = opened(name)
        assert not TreePass(model).takes_trees
        with pytest.raises(UnsupportedError, match="draft chains"):
            generate(model, Wild(), ids_of(), growth=Fixed([(0,), (1,)]))
        with pytest.raises(UnsupportedError, match="one prompt at a time"):
            generate(model, Wild(), padded(name, "left"), growth=Chain(2))


def test_what_cannot_be_decoded_is_refused_in_a_sentence():
    model = opened("llama")
    with pytest.raises(UnsupportedError, match="causal"):
        generate(opened("bert"), Wild(), ids_of())
    with pytest.raises(InputError, match="positions"):
        generate(model, Wild(), ids_of(), max_new_tokens=10_000)
    with pytest.raises(InputError, match="at least 1"):
        generate(model, Wild(), ids_of(), max_new_tokens=0)
    with pytest.raises(InputError, match="temperature"):
        generate(model, Wild(), ids_of(), temperature=-1.0)
    with pytest.raises(InputError, match="sampling knows"):
        generate(model, Wild(), ids_of(), warmth=1.0)
    model.module.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            generate(model, Wild(), ids_of())
    finally:
        model.module.eval()


# Greedy


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_words_are_the_models_own_whatever_is_guessed(name):
    module = shared(name)
    wanted = plain(module, ids_of(), max_new_tokens=24)
    for growth in [GROWTHS[0], "auto"] if name in NO_TREES else [*GROWTHS, "auto"]:
        assert generate(opened(name), Wild(), ids_of(), growth=growth, max_new_tokens=24).tokens == [wanted]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_rows_of_a_padded_batch_are_what_each_would_be_alone(name):
    module, batch = shared(name), padded(name, "left")
    got = generate(opened(name), PromptLookup(), batch, max_new_tokens=24, stop=[])
    wanted = module.generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert got.tokens == wanted[:, batch["input_ids"].shape[1] :].tolist()
    assert len({len(p) for p in got.prompts}) > 1


def test_right_guesses_are_all_accepted_and_wrong_ones_cost_nothing_but_time():
    ids = ids_of()
    told = generate(opened("llama"), Oracle(), ids, growth=Chain(3), max_new_tokens=25, stop=[])
    assert told.tally.passes == 1 + 24 / 4
    assert told.tally.acceptance == [1.0, 1.0, 1.0]
    assert told.tally.drafted == 3 * 6
    wild = generate(opened("llama"), Wild(), ids, growth=Chain(3), max_new_tokens=25, stop=[])
    assert wild.tokens == told.tokens
    assert wild.tally.tokens == 25 and wild.tally.tokens_a_pass < 1.5


@pytest.mark.parametrize("limit", range(1, 12))
def test_limits_and_stop_tokens_cut_inside_a_round(limit):
    ids = ids_of()
    model, module = opened("llama"), shared("llama")
    whole = plain(module, ids, max_new_tokens=16, eos_token_id=None)
    got = generate(model, Oracle(), ids, growth=Chain(4), max_new_tokens=limit, stop=[])
    assert got.tokens == [whole[:limit]]
    stop = whole[limit]
    ended = generate(model, Oracle(), ids, growth=Chain(4), max_new_tokens=16, stop=[stop])
    assert ended.tokens == [whole[: whole.index(stop) + 1]]


def test_a_batch_ends_row_by_row():
    module, model = shared("llama"), opened("llama")
    ids = ids_of(rows=4, seed=3)
    rows = [plain(module, row[None], max_new_tokens=12, eos_token_id=None) for row in ids]
    stops = [rows[0][2], rows[1][7]]
    got = generate(model, Wild(), ids, growth=GROWTHS[1], max_new_tokens=12, stop=stops)
    cut = [next((i + 1 for i, t in enumerate(row) if t in stops), 12) for row in rows]
    assert got.tokens == [row[:n] for row, n in zip(rows, cut, strict=True)]
    assert len(set(cut)) > 1


def test_rules_that_depend_on_the_text_are_applied_along_every_path():
    ids = ids_of(12, vocab=12)
    for rules, same in (
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    ):
        wanted = plain(shared("llama"), ids, max_new_tokens=20, **same)
        for growth in GROWTHS:
            assert generate(opened("llama"), Wild(), ids, growth=growth, max_new_tokens=20, **rules).tokens == [wanted]
        assert wanted != plain(shared("llama"), ids, max_new_tokens=20)


def test_streaming_gives_the_same_tokens_pass_by_pass():
    pieces = list(stream(opened("llama"), Oracle(), ids_of(), growth=Chain(3), max_new_tokens=10, stop=[]))
    assert [token for piece in pieces for token in piece] == generate(
        opened("llama"), Wild(), ids_of(), max_new_tokens=10, stop=[]
    ).tokens[0]
    assert [len(piece) for piece in pieces] == [1, 4, 4, 1]


# Sampling


def small_model(vocab=8):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return mh.open_model(tf.LlamaForCausalLM(config).eval())


def joint(model, prompt, n, temperature):
    """The exact distribution of the next n tokens, by enumeration."""
    vocab = model.vocab_size
    paths = torch.tensor(list(product(range(vocab), repeat=n)))
    ids = torch.cat([prompt.expand(len(paths), -1), paths], 1)
    with torch.inference_mode():
        odds = (model.module(ids).logits[:, prompt.shape[1] - 1 : -1] / temperature).log_softmax(-1)
    return odds.gather(2, paths[:, :, None]).sum((1, 2)).exp().double()


def fit_of(counts, odds, draws):
    """p-value of the counts of outcomes; those expected fewer than five times are taken together."""
    wanted = odds / odds.sum() * draws
    rare = wanted < 5
    pairs = [(counts[i], float(wanted[i])) for i in range(len(wanted)) if not rare[i]]
    pairs.append((sum(counts[i] for i in range(len(wanted)) if rare[i]), float(wanted[rare].sum())))
    seen, expected = zip(*(pair for pair in pairs if pair[1] > 0), strict=True)
    return chisquare(seen, expected).pvalue


def counts_of(tokens, vocab):
    counter = Counter(tuple(row) for row in tokens)
    n = len(next(iter(counter)))
    return [counter[path] for path in product(range(vocab), repeat=n)]


@pytest.mark.parametrize(
    "growth",
    [
        Fixed([(0, 0), (1, 0), (2,), (0, 1)]),
        BestFirst(nodes=6, beam=2, children=3, levels=2),
        Chain(3),
        Chain(3, sample=True),
    ],
    ids=["fixed", "best", "chain", "drawn"],
)
def test_sampling_loses_nothing_in_the_joint_distribution_of_later_tokens(growth):
    """The first new token is the target's own; tokens two to four come from guesses."""
    model, prompt, draws = small_model(5), torch.tensor([[1, 4, 2]]), 6_000
    ids = prompt.expand(draws, -1)
    got = generate(model, Wild(), ids, growth=growth, max_new_tokens=4, temperature=0.8, seed=3)
    odds = joint(model, prompt, 4, 0.8)
    assert fit_of(counts_of(got.tokens, 5), odds, draws) > 0.01
    assert 0.02 < got.tally.acceptance[0] < 0.98
    uniform = torch.full_like(odds, 1.0)
    assert fit_of(counts_of(got.tokens, 5), uniform, draws) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_seed_gives_the_same_text_whatever_is_guessed(name):
    model, batch = opened(name), padded(name, "left")
    settings = {"max_new_tokens": 20, "stop": [], "temperature": 0.9}
    drafters = (Wild(), PromptLookup(), CombinedDrafter(PromptLookup(), Wild()), Oracle())
    texts = [
        generate(model, drafter, batch, growth=growth, seed=5, **settings).tokens
        for growth in GROWTHS
        for drafter in drafters
    ]
    assert all(text == texts[0] for text in texts)
    assert generate(model, Wild(), batch, seed=6, **settings).tokens != texts[0]
    assert len({tuple(row) for row in texts[0]}) == len(texts[0])


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000))
def test_drawing_without_replacement_and_rejecting_gives_the_targets_token(seed):
    """Three children of the root drawn from q without replacement, one step: the token that comes out is p's."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, 5, generator=generator).pow(2)
    p, q = p / p.sum(), q / q.sum()
    tree, draws = Tree((0, 0, 0)), 3000
    guesses = torch.multinomial(q.expand(draws, -1), 3, generator=generator).tolist()
    said = Counter()
    for tokens in guesses:
        path, following = reject(p.expand(4, -1), q.expand(4, -1), tree, tokens, generator)
        said[tokens[path[0] - 1] if path else following] += 1
    assert fit_of([said[i] for i in range(5)], p.double(), draws) > 1e-4


def test_typical_acceptance_takes_the_longest_typical_path_and_is_not_the_targets_distribution():
    generator = torch.Generator().manual_seed(0)
    tree, tokens = Tree((0, 0, 1, 2, 4)), [3, 1, 2, 0, 4]
    for _ in range(50):
        p = (3 * torch.randn(6, 5, generator=generator)).softmax(-1)
        bound = [min(0.09, 0.3 * float(torch.exp((row * row.log()).sum()))) for row in p]
        fine = {0}
        for node, parent in enumerate(tree.parents, start=1):
            if parent in fine and p[parent, tokens[node - 1]] > bound[parent]:
                fine.add(node)
        path, following = typical(p, tree, tokens)
        assert len(path) == max(tree.depths[n] for n in fine) and set(path) <= fine
        assert following == int(p[path[-1] if path else 0].argmax())
    model, prompt = small_model(6), torch.tensor([[1, 4, 2]])
    got = generate(
        model, Wild(), prompt.expand(3000, -1), growth=Chain(2), max_new_tokens=3, temperature=1.0, acceptance="typical"
    )
    assert fit_of(counts_of(got.tokens, 6), joint(model, prompt, 3, 1.0), 3000) < 1e-6


def test_temperature_top_k_and_top_p_mean_what_they_mean_in_transformers():
    scores = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
    odds = Target(temperature=0.7, top_k=5, top_p=0.8).probabilities(scores)
    flat = scores.flatten(0, 1)
    for warper in (tf.TemperatureLogitsWarper(0.7), tf.TopKLogitsWarper(5), tf.TopPLogitsWarper(0.8)):
        flat = warper(None, flat)
    assert torch.allclose(odds.flatten(0, 1), flat.softmax(-1))


def test_following_stops_at_the_first_choice_that_was_not_guessed():
    tree, tokens = Tree((0, 0, 1, 3)), [7, 8, 9, 5]
    assert follow([7, 9, 0, 4, 0], tree, tokens) == ([1, 3], 4)
    assert follow([8, 0, 6, 0, 0], tree, tokens) == ([2], 6)
    assert follow([1, 0, 0, 0, 0], tree, tokens) == ([], 1)
    scores = torch.nn.functional.one_hot(torch.tensor([[7, 9, 0, 4, 0]]), 10).float()
    proposal = Proposal((tree,), torch.tensor([tokens]))
    assert accept(scores, proposal, Target(), [1]) == [([1, 3], 4)]


# Trees


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_the_greedy_tree_is_the_best_of_all_trees_of_its_size(seed, nodes):
    """Against every prefix-closed set of nodes of a 2 x 3 table of acceptances."""
    a = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    found = best_ranks(a, nodes)
    assert len(found) == nodes
    single = [float(x) for x in a[0]]
    worth = {(i,): single[i] for i in range(3)} | {
        (i, j): single[i] * float(a[1, j]) for i in range(3) for j in range(3)
    }
    best = 0.0
    for bits in range(1 << 12):
        if bits.bit_count() != nodes:
            continue
        chosen = [path for i, path in enumerate(worth) if bits >> i & 1]
        if all(len(path) == 1 or path[:1] in chosen for path in chosen):
            best = max(best, sum(worth[path] for path in chosen))
    assert expected_tokens(a, found) == pytest.approx(1 + best)


def test_every_level_of_a_fixed_tree_is_told_in_whole_numbers_and_of_one_shape_also_the_last_which_is_empty():
    *_, last = Ranks([(0, 0), (1,)]).levels(torch.device("cpu"))
    assert last.expanded.shape == (0,) and last.grandparents.shape == (1, 0) and last.within.shape == (1, 0, 1)
    assert last.grandparents.dtype == last.expanded.dtype == torch.long and last.within.dtype == torch.bool
    first, *_ = Ranks([(0, 0), (1, 0), (2,)]).levels(torch.device("cpu"))
    assert first.grandparents.tolist() == [[0, 0]] and first.within.tolist() == [[[True, False], [False, True]]]


def test_ranks_close_their_prefixes_and_name_their_tree():
    ranks = Ranks([(2, 1, 0), (0,)])
    assert ranks.paths == ((0,), (2,), (2, 1), (2, 1, 0))
    assert ranks.tree.parents == (0, 0, 2, 3) and ranks.tree.depths == (0, 1, 1, 2, 3)
    assert ranks.tree.path(4) == [2, 3, 4]
    with pytest.raises(InputError, match="at least one path"):
        Ranks([()])


def test_best_keeps_the_likeliest_nodes_of_the_whole_tree():
    """Independent levels: the joint probability of every node is known, and the kept ones are the top ones."""
    odds = [torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.4, 0.1])]

    class Fixed2(Stepwise):
        kind, depth = "fixed2", 2

        def first(self, trunk, accepted):
            return odds[0].log()[None, None]

        def next(self, trunk, nodes):
            return odds[1].log()[None, None]

    accepted = Accepted(
        *(torch.zeros(1, 1, 4), *torch.zeros(2, 1, 1).long(), torch.ones(1, 1).bool()), torch.zeros(1).long(), [[0]]
    )
    made = BestFirst(nodes=5, beam=3, children=3, levels=2).grow(Fixed2(), None, accepted, Target())
    tree, tokens = made.trees[0], made.tokens[0].tolist()
    paths = {tuple(tokens[i - 1] for i in tree.path(node)) for node in range(1, 6)}
    assert paths == {(0,), (1,), (0, 0), (0, 1), (1, 0)}
    few = BestFirst(nodes=5, beam=3, children=3, levels=2, floor=0.4).grow(Fixed2(), None, accepted, Target())
    assert {tuple(few.tokens[0, i - 1].item() for i in few.trees[0].path(n)) for n in range(1, 6)} <= paths


def test_a_child_that_is_as_likely_as_its_parent_never_comes_without_it():
    """A drafter that is certain: joint probabilities tie along a path."""
    joint = torch.tensor([[-0.5, -1.0, -0.5, -9.0, -0.5]])
    parents = torch.tensor([[0, 0, 1, 1, 3]])
    for nodes in range(1, 6):
        made = BestFirst(nodes=nodes)._best(joint, torch.arange(5)[None], parents)
        assert len(made.trees[0]) == nodes and made.trees[0].parents[0] == 0


def test_trees_are_joined_where_their_words_agree():
    bush, chain = Ranks([(0, 0), (1,)]).tree, Ranks.chain(3).tree
    assert bush.parents == (0, 0, 1)
    parents, tokens, places = joined([(bush, [5, 6, 7]), (chain, [5, 8, 9])])
    assert (parents, tokens) == ([0, 0, 1, 1, 4], [5, 6, 7, 8, 9])
    assert places == [[0, 1, 2, 3], [0, 1, 4, 5]]
    assert joined([(bush, [5, 6, 7]), (chain, [5, 7, 9])])[:2] == ([0, 0, 1, 3], [5, 6, 7, 9])
    assert joined([(Tree(()), []), (chain, [4, 4, 4])])[:2] == ([0, 1, 2], [4, 4, 4])
    assert joined([(chain, [1, 2, 3, 0, 0]), (Tree(()), [])])[:2] == ([0, 1, 2], [1, 2, 3])  # a row that was padded


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_together_drafters_write_the_models_own_texts_and_accept_what_either_foresaw(name):
    batch = padded(name, "left")
    wanted = shared(name).generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None)
    settings = {"growth": Fixed([(0, 0), (1,), (2, 1, 0)]), "max_new_tokens": 24, "stop": []}
    got = {
        drafter: generate(opened(name), drafter, batch, **settings)
        for drafter in (
            Wild(),
            PromptLookup(),
            CombinedDrafter(PromptLookup(), Wild()),
            CombinedDrafter(Wild(), Oracle()),
        )
    }
    assert all(each.tokens == wanted[:, batch["input_ids"].shape[1] :].tolist() for each in got.values())
    wild, lookup, both, told = (each.tally.passes for each in got.values())
    twice = generate(opened(name), CombinedDrafter(PromptLookup(), PromptLookup()), batch, **settings)
    assert twice.tokens == got.popitem()[1].tokens and twice.tally.passes == lookup
    assert both <= min(wild, lookup) and told == 1 + 8 < both  # 23 tokens, three a round


def test_guesses_that_were_drawn_cannot_be_joined():
    both = CombinedDrafter(PromptLookup(), Wild())
    with pytest.raises(UnsupportedError, match="draw their guesses"):
        generate(opened("llama"), both, ids_of(), growth=Chain(2, sample=True), temperature=1.0, max_new_tokens=8)
    with pytest.raises(InputError, match="two drafters"):
        CombinedDrafter(Wild())


def test_prompt_lookup_finds_what_followed_last_time():
    lookup = PromptLookup(length=3, longest=2)
    assert lookup.continuation([1, 2, 3, 4, 9, 1, 2]) == [3, 4, 9]
    assert lookup.continuation([1, 2, 3, 5, 2, 7, 1, 2]) == [3, 5, 2]
    assert lookup.continuation([5, 2, 7, 1, 2]) == [7, 1, 2]
    assert lookup.continuation([1, 2, 3]) == []
