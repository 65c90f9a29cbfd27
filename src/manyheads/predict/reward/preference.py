"""Reward heads from ratings and preferences (#110): HelpSteer2-Preference.

Wang et al., arXiv:2410.01257 (ICLR 2025). A reward is r = W h of the state h of an answer's last token. It learns ratings, or
which of two answers to a prompt is preferred and how strongly, m in {1, 2, 3}; with D = r(chosen) - r(rejected), in nats,

    rating     mean of (r - rating)^2, over the attributes that are given        a missing one is -100
    regular    -log sigmoid(D)
    margin     -log sigmoid(D - m)
    scaled     -m log sigmoid(D)                                                  the mean over pairs; ties, m = 0, do not count

The paper's recipe: ratings first, then `scaled` from that checkpoint, head and all. ExPO goes on in the direction of the second
stage,  theta = rated + a (preferred - rated),  with a > 1 chosen on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_choice, check_integer
from manyheads.learning import Attached, LinearSettings, MultiHead, Pool, ScalarHead, Trunk
from manyheads.learning.attached import MISSING
from manyheads.learning.trunk import Layer
from manyheads.predict.reward.pairs import pair_accuracy, pair_batches, pairs_of
from manyheads.predict.reward.rated_words import compared, rated_words
from manyheads.predict.reward.ridge import best_penalty, ridge
from manyheads.predict.words import thirds
from manyheads.training import ADAM, TrainSettings, row_batches

RewardLoss = Literal["rating", "regular", "margin", "scaled"]
LOSSES = ("rating", "regular", "margin", "scaled")
FACTORS = tuple(1 + i / 10 for i in range(11))


@dataclass(frozen=True)
class RewardSettings(LinearSettings):
    """`width` of the states, the loss, and the seed of the initial weights.

    `outputs` are attributes (helpfulness, correctness, ...); pairs compare the one with the number `overall`. Without a bias, a
    head of one output can be exported as a classifier of Transformers.
    """

    outputs: int = 1
    bias: bool = False
    objective: RewardLoss = "scaled"
    overall: int = 0

    def __post_init__(self) -> None:
        check_choice(self.objective, "objective", LOSSES)
        check_integer(self.overall, "overall", 0, self.outputs - 1)


class RewardHead(ScalarHead):
    """A linear reward and its four losses (above). Targets are ratings `[N]` or `[N, A]`, or pairs (`pairs.pair_target`)."""

    settings: RewardSettings

    Settings = RewardSettings

    def learns(self, objective: RewardLoss) -> RewardHead:
        """From now on another loss, with the weights as they are."""
        self.settings = replace(self.settings, objective=objective)
        return self

    def loss(self, output: Float[Tensor, "N A"], target: Float[Tensor, "N *two"]) -> Float[Tensor, ""]:
        """The loss of the settings."""
        if self.settings.objective == "rating":
            return rating_loss(output, target[:, None] if target.ndim == 1 else target)
        gap, strength = self._gaps(output, target)
        return preference_loss(gap, strength, self.settings.objective)

    def metrics(self, output: Float[Tensor, "N A"], target: Float[Tensor, "N *two"]) -> dict[str, float]:
        """Of ratings the root of the mean squared error, of pairs the share in the right order and the mean gap."""
        if self.settings.objective == "rating":
            return {"rmse": float(self.loss(output, target).detach().sqrt())}
        gap, strength = self._gaps(output, target)
        return {"accuracy": pair_accuracy(gap, strength), "gap": float(gap[strength > 0].detach().mean())}

    def _gaps(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected, strength = pairs_of(target)
        reward = output[:, self.settings.overall]
        return reward[chosen] - reward[rejected], strength


def rating_loss(output: Float[Tensor, "N A"], rating: Float[Tensor, "N A"]) -> Float[Tensor, ""]:
    """The mean squared error of the ratings that are given; -100 stands where one is missing. 0 where all are."""
    if rating.shape != output.shape:
        raise InputError(f"it has outputs of shape {list(output.shape)} and ratings of shape {list(rating.shape)}.")
    given = rating != MISSING
    return torch.where(given, output - rating.to(output), 0).square().sum() / given.sum().clamp_min(1)


def preference_loss(
    gap: Float[Tensor, "P"], strength: Float[Tensor, "P"], objective: RewardLoss = "scaled"
) -> Float[Tensor, ""]:
    """One of the three losses of pairs, by their gaps D and strengths m."""
    strength = strength.to(gap)
    loss = -F.logsigmoid(gap - strength if objective == "margin" else gap)
    weight = strength if objective == "scaled" else (strength > 0).to(gap)
    return (weight * torch.where(strength > 0, loss, 0)).sum() / (strength > 0).sum().clamp_min(1)


def reward_heads(
    trunk: Trunk | Any, settings: RewardSettings, *, layer: Layer = -1, pool: Pool = "last", name: str = "reward"
) -> MultiHead:
    """A reward head on a trunk, at a layer's last token."""
    return MultiHead(trunk, {name: Attached(RewardHead(settings), layer=layer, pool=pool)})


State = Mapping[str, Tensor]


@dataclass(frozen=True)
class TwoStages:
    """What was learned after ratings, and after preferences from there on: heads, and the trunk if it is tuned."""

    rated: State
    preferred: State


def rate_then_prefer(
    heads: MultiHead,
    ratings: Callable[[int], Mapping[str, Any]],
    pairs: Callable[[int], Mapping[str, Any]],
    first: TrainSettings,
    second: TrainSettings,
    *,
    objective: RewardLoss = "scaled",
    name: str = "reward",
    judge: Callable[[], float] | None = None,
) -> TwoStages:
    """The recipe: train the `RewardHead` called `name` on ratings, then on pairs. `heads` ends as the second stage leaves it.

    `judge` is a loss on other data, by which both stages stop early. For the paper's runs: AdamW at 2e-6 with 10 steps of warm-up
    for 317 steps of 128 rows, then 1e-6 for 105.
    """
    head = heads.attached[name].head if name in heads.attached else None
    if not isinstance(head, RewardHead):
        raise InputError(f"{name!r} is no RewardHead of these heads; the heads are {', '.join(heads.attached)}.")
    head.learns("rating")
    heads.fit(ratings, first, judge=judge)
    rated = _kept(heads)
    head.learns(objective)
    heads.fit(pairs, second, judge=judge)
    return TwoStages(rated, _kept(heads))


def extrapolated(rated: State, preferred: State, factor: float) -> dict[str, Tensor]:
    """A checkpoint, rated + a (preferred - rated): at 0 and 1 exactly these two. What is no number is that of `preferred`."""
    if set(rated) != set(preferred):
        raise InputError("the two checkpoints hold different parameters; give two of the same heads.")
    return {
        name: torch.lerp(rated[name], after, factor) if after.is_floating_point() else after
        for name, after in preferred.items()
    }


@torch.no_grad()
def expo(heads: nn.Module, stages: TwoStages, judge: Callable[[], float], factors: Sequence[float] = FACTORS) -> float:
    """Leave `heads` at the factor a whose `judge` is lowest, and return a. Of equal ones the first counts."""
    worth = []
    for factor in factors:
        heads.load_state_dict(extrapolated(stages.rated, stages.preferred, factor))
        worth.append(judge())
    best = factors[worth.index(min(worth))]
    heads.load_state_dict(extrapolated(stages.rated, stages.preferred, best))
    return best


def _kept(heads: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in heads.state_dict().items()}


# Do strengths help, and is it better to begin with ratings?


@dataclass(frozen=True)
class _Data:
    """Rated rows, pairs with strengths for training and validation, and test pairs whose order is known."""

    rated: Float[Tensor, "N D"]
    rating: Float[Tensor, "N"]
    pairs: Float[Tensor, "P 2 D"]
    strength: Float[Tensor, "P"]
    valid: Float[Tensor, "V 2 D"]
    valid_strength: Float[Tensor, "V"]
    test: Float[Tensor, "R 2 D"]
    raters: float = float("nan")
    steps: int = 400


def linear_rewards(seed: int, n: int = 300, width: int = 32, steps: int = 400) -> _Data:
    """A linear reward with unit spread. Comparisons see its gap with noise of its own size, and grade it in thirds."""
    draw = torch.Generator().manual_seed(1000 + seed)
    w = torch.randn(width, generator=draw)
    w = w / w.norm()

    def pairs(count: int, noise: float) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 2, width, generator=draw)
        gap = (x[:, 0] - x[:, 1]) @ w + noise * torch.randn(count, generator=draw)
        cuts = torch.tensor([0.431, 0.967]) * (2 + noise**2) ** 0.5  # thirds of |gap|
        return torch.where((gap < 0)[:, None, None], x.flip(1), x), 1.0 + torch.bucketize(gap.abs(), cuts)

    rated = torch.randn(n, width, generator=draw)
    rating = (2 + rated @ w + 0.7 * torch.randn(n, generator=draw)).round().clamp(0, 4) - 2
    train, valid, test = pairs(n, 1.0), pairs(n, 1.0), pairs(4000, 0.0)
    return _Data(rated, rating, *train, *valid, test[0], steps=steps)


def word_rewards(trunk: str, seed: int, steps: int = 400) -> _Data:
    """Real words: one person's rating of each, and other people's comparisons; the test is what all ten say on average."""
    states, ratings = rated_words(trunk)
    draw = torch.Generator().manual_seed(seed)
    train, valid, test = thirds(len(states), seed)
    one = ratings[train, torch.randint(10, (len(train),), generator=draw)]

    def by_people(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        found = [compared(ratings[rows, person], count // 10, draw) for person in range(10)]
        return states[rows[torch.cat([pairs for pairs, _ in found])]], torch.cat([strength for _, strength in found])

    order = torch.randperm(10, generator=draw)
    half, other = ratings[test][:, order[:5]].mean(1), ratings[test][:, order[5:]].mean(1)
    pairs, gap = compared(ratings[test].mean(1), 5000, draw)
    halves, half_gap = compared(half, 5000, draw)
    raters = pair_accuracy(other[halves[:, 0]] - other[halves[:, 1]], half_gap)
    kept = states[test[pairs[gap > 0]]]
    return _Data(
        states[train],
        one,
        *by_people(train, len(train)),
        *by_people(valid, len(valid)),
        kept,
        raters,
        steps,
    )


def _scored(data: _Data, reward: Callable[[Tensor], Tensor]) -> dict[str, float]:
    gap = reward(data.test[:, 0]) - reward(data.test[:, 1])
    return {"pair accuracy": pair_accuracy(gap)}


def _ridge(make: Callable[[int], _Data], seed: int) -> dict[str, float]:
    data = make(seed)
    y = data.rating[:, None]
    weight, _ = ridge(data.rated, y, best_penalty(data.rated, y, seed=seed))
    return _scored(data, lambda x: (x.double() @ weight)[:, 0])


def _random(make: Callable[[int], _Data], seed: int) -> dict[str, float]:
    data = make(seed)
    return _scored(data, lambda x: RewardHead(RewardSettings(x.shape[-1], seed=500 + seed))(x)[:, 0])


def _raters(make: Callable[[int], _Data], seed: int) -> dict[str, float]:
    return {"pair accuracy": make(seed).raters}


def _learned(kind: str) -> Callable[[Callable[[int], _Data], int], dict[str, float]]:
    def run(make: Callable[[int], _Data], seed: int) -> dict[str, float]:
        data = make(seed)
        head = RewardHead(RewardSettings(data.rated.shape[1]))
        heads = MultiHead(Trunk(nn.Identity()), {"reward": head})
        nn.init.zeros_(head.linear.weight)  # a random start would stay where states do not vary
        own: RewardLoss = kind if kind in ("regular", "margin") else "scaled"  # type: ignore[assignment]

        def judge() -> float:
            gap = head(data.valid[:, 0]) - head(data.valid[:, 1])
            return float(preference_loss(gap[:, 0], data.valid_strength, own))

        settings = replace(ADAM, steps=data.steps, rate=2e-3, every=max(1, data.steps // 40))
        rated = row_batches({"input": data.rated, "reward": data.rating - data.rating.mean()}, 64, seed)
        pairs = pair_batches(data.pairs, data.strength, 64, seed)
        if kind in LOSSES:
            head.learns(kind)  # type: ignore[arg-type]
            heads.fit(rated if kind == "rating" else pairs, settings, judge=judge)
        else:
            stages = rate_then_prefer(heads, rated, pairs, settings, replace(settings, rate=1e-3), judge=judge)
            if kind == EXPO:
                expo(heads, stages, judge)
        with torch.no_grad():
            return _scored(data, lambda x: head(x)[:, 0])

    return run


RECIPE, EXPO = "rating, then scaled", "rating, then scaled, ExPO"


def _more(one: str, other: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda v: v[one, "pair accuracy"] - v[other, "pair accuracy"]


def _datasets(quick: bool) -> dict[str, Callable[[int], _Data]]:
    steps = 40 if quick else 400
    made: dict[str, Callable[[int], _Data]] = {
        "linear": lambda seed: linear_rewards(seed, steps=steps),
        "words, MiniLM": lambda seed: word_rewards("minilm", seed, 2 * steps),
    }
    return made if quick else made | {"words, SmolLM2": lambda seed: word_rewards("smollm2", seed, 2 * steps)}


register_experiment(
    Experiment(
        "reward",
        (110,),
        "2410.01257",
        "Do strengths of preferences help a reward head, and is it better to begin with ratings?",
        datasets=_datasets,
        methods={
            "random head": _random,
            "ridge on ratings": _ridge,
            **{kind: _learned(kind) for kind in (*LOSSES, RECIPE, EXPO)},
            "five raters for the other five": _raters,
        },
        baseline="regular",
        claims=(
            Claim(
                "scaled beats regular by half a point where rewards are linear",
                _more("scaled", "regular"),
                at_least=0.005,
                on="linear",
            ),
            Claim("scaled is no worse than regular", _more("scaled", "regular"), at_least=0.0),
            Claim(
                "ratings first are no worse than scaled alone (paper: 92.7 to 93.7)",
                _more(RECIPE, "scaled"),
                at_least=0.0,
            ),
            Claim("ExPO is no worse than without (paper: 93.7 to 94.1)", _more(EXPO, RECIPE), at_least=0.0),
            Claim("the recipe beats ridge on the ratings alone", _more(RECIPE, "ridge on ratings"), at_least=0.0),
        ),
        minutes=9,
    )
)
