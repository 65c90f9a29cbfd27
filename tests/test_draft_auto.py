"""`growth="auto"` drafts what pays by what passes cost, and the text stays the model's own."""

import pytest
import torch
from architectures import opened, padded, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from test_draft_decode import Oracle, Wild, ids_of, plain

from manyheads.draft.core.auto import Plan, Planner, plan_of_heads, with_copied
from manyheads.draft.core.costs import PassCosts, pass_costs
from manyheads.draft.core.decode import generate
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Ranks
from manyheads.draft.core.trees import best_ranks, expected_tokens
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.hydra import Hydra
from manyheads.draft.drafters.prompt_lookup import PromptLookup
from manyheads.draft.drafters.together import CombinedDrafter
from manyheads.errors import InputError

FLAT = PassCosts({1: 1.0, 32: 1.0})
STEEP = PassCosts({1: 1.0, 2: 2.0, 32: 32.0})
CURVE = PassCosts({1: 29.0, 2: 31.0, 4: 34.0, 8: 37.0, 16: 56.0, 32: 70.0})


def test_costs_between_sizes_lie_on_lines_and_noise_never_makes_a_larger_pass_cheaper():
    costs = PassCosts({1: 10.0, 2: 12.0, 4: 11.0, 8: 20.0})
    assert [costs(n) for n in (1, 2, 3, 4, 6, 8, 10)] == [10.0, 12.0, 12.0, 12.0, 16.0, 20.0, 24.0]
    assert PassCosts({1: 3.0})(9) == 3.0


def test_costs_are_measured_once_for_a_model_and_number_of_rows():
    model = opened("llama")
    first = pass_costs(model, 1, False)
    assert pass_costs(model, 1, False) is first and pass_costs(model, 2, False) is not first
    assert first.measured.keys() >= {1, 2} and all(seconds > 0 for seconds in first.measured.values())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.5), st.sampled_from([FLAT, STEEP, CURVE]))
def test_heads_draft_the_best_of_all_depths_and_sizes(seed, level, costs):
    table = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double) / 2

    def draft(depth):
        return level * depth * costs(1)

    found = plan_of_heads(table, costs, draft, nodes=8)
    speeds = [1 / costs(1)]
    for depth in (1, 2, 3):
        for nodes in range(1, 1 + min(8, sum(3**k for k in range(1, depth + 1)))):
            ranks = best_ranks(table[:depth], nodes)
            if ranks.depth == depth:
                speeds.append(expected_tokens(table, ranks) / (draft(depth) + costs(1 + nodes)))
    assert found.speed == pytest.approx(max(speeds))
    if found.ranks is not None:
        assert found.expected == pytest.approx(expected_tokens(table, found.ranks))
        assert sum(found.reach) == pytest.approx(found.expected - 1)


def test_guesses_that_are_never_right_are_not_drafted_and_sure_ones_to_the_end():
    never, sure = torch.zeros(4, 2), torch.eye(2)[[0, 0, 0, 0]]
    assert plan_of_heads(never, FLAT, lambda depth: 0.0) == Plan(seconds=1.0)
    found = plan_of_heads(sure, CURVE, lambda depth: 1.0 * depth)
    assert found.ranks is not None and found.ranks.paths == Ranks.chain(4).paths and found.expected == 5.0
    assert plan_of_heads(sure, STEEP, lambda depth: 0.5 * depth).ranks is None


def test_copied_tokens_are_read_as_far_as_they_pay_and_joined_to_the_heads_where_both_do():
    nothing = Plan(seconds=CURVE(1))
    assert with_copied(nothing, [], CURVE) == nothing
    assert with_copied(nothing, [0.0] * 8, CURVE) == nothing
    assert with_copied(nothing, [1.0] * 8, CURVE).copied == 8
    assert with_copied(nothing, [0.9, 0.9, 0.0, 0.9], CURVE).copied == 2
    assert (
        with_copied(nothing, [0.9] * 8, STEEP) == Plan(seconds=1.0)
        or with_copied(nothing, [0.9] * 8, STEEP).copied == 0
    )
    heads = plan_of_heads(torch.tensor([[0.6], [0.6]]), CURVE, lambda depth: 1.0)
    both = with_copied(heads, [0.5, 0.9, 0.9], CURVE)
    assert both.ranks is heads.ranks and both.copied == 3
    assert heads.expected < both.expected < heads.expected + with_copied(nothing, [0.5, 0.9, 0.9], CURVE).expected - 1
    sure = with_copied(heads, [1.0] * 8, CURVE)
    assert (sure.ranks, sure.copied, sure.expected) == (None, 8, 9.0)


class Text:
    """A generation without a model: rounds take what `costs` says, and guesses are right as `right` decides."""

    def __init__(self, drafter, costs, right, level=2.0):
        self.planner, self.costs, self.right, self.level = Planner(drafter, costs), costs, right, level
        self.trunk = DraftTrunk(opened("llama"))
        drafter.start(self.trunk, 1)
        self.text, self.seconds, self.drafted, self.rounds = [5, 6, 7, 5, 6], 0.0, 0, 0

    def round(self):
        one = torch.zeros(1, 1, dtype=torch.long)
        accepted = Accepted(torch.zeros(1, 1, 32), one + 6, one, one == 0, one[0], [self.text])
        proposal = self.planner.propose(self.trunk, accepted, Target(), 50)
        path, node = [], 0
        while (children := proposal.trees[0].children[node]) and self.right(len(path)):
            node = children[0]
            path.append(node)
        plan = self.planner.plan
        drafting = self.level * (plan.ranks.depth if plan.ranks else 0)
        whole = drafting + self.costs(1 + proposal.tokens.shape[1])
        self.planner.observe(proposal, [(path, 9)], [True], drafting, whole)
        self.seconds, self.rounds = self.seconds + whole, self.rounds + 1
        self.drafted += proposal.tokens.shape[1] > 0
        return 1 + len(path)


@pytest.mark.parametrize(
    "drafter", [Wild(), PromptLookup(), CombinedDrafter(Wild(), PromptLookup())], ids=lambda d: d.kind
)
@pytest.mark.parametrize("costs", [CURVE, STEEP], ids=["curve", "steep"])
def test_a_drafter_that_guesses_nothing_costs_little(drafter, costs):
    """The first text pays for finding out; the next one begins with what was found."""
    Text(drafter, costs, lambda depth: False).round()
    for bound in (1.06, 1.02):
        text = Text(drafter, costs, lambda depth: False)
        tokens = sum(text.round() for _ in range(300))
        assert tokens == 300 and text.seconds < bound * 300 * costs(1)
    assert 0 < text.drafted < 30 or costs is STEEP


def test_a_clock_that_sees_no_time_pass_stops_nothing():
    text = Text(PromptLookup(), CURVE, lambda depth: True)
    text.costs = lambda tokens: 0.0
    assert sum(text.round() for _ in range(20)) >= 20
    assert text.planner.scale == 1.0


def test_a_drafter_whose_guesses_come_right_later_is_found_by_trials():
    late = Text(PromptLookup(), CURVE, lambda depth: False)
    for _ in range(120):
        late.round()
    late.right = lambda depth: True
    assert sum(late.round() for _ in range(200)) > 600


def test_right_guesses_are_drafted_deeper_and_deeper():
    text = Text(Oracle(), CURVE, lambda depth: True)
    text.trunk.model.module.eval()
    for _ in range(40):
        text.round()
    plan = text.planner.plan
    assert plan.ranks is not None and plan.ranks.depth >= 6 and plan.nodes <= 15


# The text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_words_are_the_models_own_whatever_is_planned(name, packed):
    wanted = plain(shared(name), ids_of(), max_new_tokens=24)
    for drafter in (PromptLookup(), Oracle(), CombinedDrafter(Wild(), PromptLookup())):
        assert generate(opened(name), drafter, ids_of(), max_new_tokens=24, packed=packed).tokens == [wanted]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_seed_gives_the_same_text_with_and_without_plans_in_padded_batches(name):
    settings = {"max_new_tokens": 20, "stop": [], "temperature": 0.9, "seed": 5}
    model, batch = opened(name), padded(name, "left")
    wanted = generate(model, Wild(), batch, growth=None, **settings).tokens
    for drafter in (Wild(), Oracle(), CombinedDrafter(PromptLookup(), Wild())):
        assert generate(model, drafter, batch, **settings).tokens == wanted


def test_heads_guess_after_plain_rounds_what_they_guess_when_they_draft_in_every_round(monkeypatch):
    """Hydra++ keeps a cache of all accepted states: those of rounds without a draft are read before the next one."""
    model = opened("llama")
    trunk = DraftTrunk(model)
    torch.manual_seed(0)
    hydra = Hydra.plus_plus(trunk, 2).eval()
    with torch.no_grad():
        for weight in hydra.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    ranks, told = Ranks([(0, 0), (1,)]), {}

    def run(every):
        seen = {}

        def chosen(planner, found, room):
            return Plan(ranks, seconds=1.0) if planner.round % every == every - 1 else Plan(seconds=1.0)

        def merged(planner, trees, found, accepted):
            if trees[0]:
                seen[len(accepted.text[0])] = trees[0][0][1]
            return real(planner, trees, found, accepted)

        real = Planner._merged
        with monkeypatch.context() as patched:
            patched.setattr(Planner, "_chosen", chosen)
            patched.setattr(Planner, "_merged", merged)
            generate(model, hydra, ids_of(), max_new_tokens=24, stop=[])
        return seen

    told = {every: run(every) for every in (1, 3, 4)}
    assert len(told[3]) >= 5 and len(told[4]) >= 3
    for every in (3, 4):
        common = told[every].keys() & told[1].keys()
        assert common and all(told[every][n] == told[1][n] for n in common)


@pytest.mark.usefixtures("any_shape")
def test_other_names_of_growths_are_refused():
    with pytest.raises(InputError, match="'auto'"):
        generate(opened("llama"), Wild(), ids_of(), growth="best")
