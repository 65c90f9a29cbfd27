"""Several objectives beside one reward (#105): MULTI-TAP, a closed-form layer on a trunk whose reward head is trained already.

arXiv:2510.00766 (2025). Stage 1 trains a scalar reward on overall scores: by squared error or by pairs (`preference.RewardHead`).
Then everything is frozen. Stage 2 takes the states X [n, D] that this head reads and M scores Y [n, M], and solves

    W = (X^T X + lam I)^-1 X^T Y        on centred data, in double precision, the intercept unpenalised (`ridge`)

with lam from a grid of 1e-2 to 1e4 by cross-validation inside the rows that are given. It is measured, for each objective, by
R^2, by Kendall's tau_c and by the share of pairs in the right order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from manyheads.data.real import needed
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.learning import Attached, LinearSettings, MultiHead, ScalarHead, Trunk
from manyheads.predict.reward.preference import RewardHead, RewardSettings
from manyheads.predict.reward.rated_words import rated_words
from manyheads.predict.reward.ridge import PENALTIES, best_penalty, ridge
from manyheads.predict.words import thirds
from manyheads.training import ADAM, row_batches


@dataclass(frozen=True)
class ObjectivesSettings(LinearSettings):
    """`width` of the states, the objectives' names (`outputs` is their number), and the penalty they were solved with."""

    names: tuple[str, ...] = ()
    penalty: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if len(self.names) != self.outputs or len(set(self.names)) < self.outputs:
            raise InputError(f"{self.outputs} objectives are called {list(self.names)}; give each a name of its own.")


class ObjectivesHead(ScalarHead):
    """A linear head whose weights are solved for, not trained. Its metrics are those of each objective."""

    Settings = ObjectivesSettings
    settings: ObjectivesSettings

    @classmethod
    def solved(
        cls,
        states: Float[Tensor, "n D"],
        scores: Float[Tensor, "n M"],
        names: Sequence[str],
        penalty: float | None = None,
        *,
        seed: int = 0,
    ) -> ObjectivesHead:
        """The head of the formula above; without a `penalty` it is chosen by cross-validation on these rows."""
        penalty = best_penalty(states, scores, seed=seed) if penalty is None else penalty
        weight, bias = ridge(states, scores, penalty)
        head = cls(ObjectivesSettings(states.shape[1], scores.shape[1], seed=seed, names=tuple(names), penalty=penalty))
        with torch.no_grad():
            head.linear.weight.copy_(weight.T)
            head.linear.bias.copy_(bias)
        return head

    def metrics(self, output: Float[Tensor, "N M"], target: Float[Tensor, "N M"]) -> dict[str, float]:
        """R^2, tau_c and pair accuracy, each by objective and as the mean over them."""
        return objective_metrics(output, target, self.settings.names)


def with_objectives(
    heads: MultiHead,
    states: Float[Tensor, "n D"],
    scores: Float[Tensor, "n M"],
    names: Sequence[str],
    penalty: float | None = None,
    *,
    beside: str = "reward",
    seed: int = 0,
) -> MultiHead:
    """`heads` with one more, "objectives", that reads what the head `beside` reads; `states` are those. Nothing else changes.

    Take `states` of a frozen trunk (`learning.features`, at the layer and pool of that head). `InputError` for another
    width, for NaN, and without a `penalty` for fewer than five rows.
    """
    if beside not in heads.attached:
        raise InputError(f"there is no head {beside!r}; the heads are {', '.join(heads.attached)}.")
    one = heads.attached[beside]
    width = getattr(one.head.settings, "width", states.shape[1])
    if states.shape[1] != width:
        raise InputError(f"states have width {states.shape[1]}, and head {beside!r} reads {width}; read its layer.")
    solved = ObjectivesHead.solved(states, scores, names, penalty, seed=seed)
    return MultiHead(heads.trunk, {**heads.attached, "objectives": Attached(solved, layer=one.layer, pool=one.pool)})


def objective_metrics(
    output: Float[Tensor, "N M"], target: Float[Tensor, "N M"], names: Sequence[str]
) -> dict[str, float]:
    """R^2, tau_c and pair accuracy of each objective, and their means."""
    found: dict[str, list[float]] = {"r2": [], "tau_c": [], "pair accuracy": []}
    out: dict[str, float] = {}
    for i, name in enumerate(names):
        a, b = (side[:, i].detach().double().numpy() for side in (output, target))
        values = (1 - float(((a - b) ** 2).mean() / b.var()), tau_c(a, b), ordered(a, b))
        for (metric, all_values), value in zip(found.items(), values, strict=True):
            all_values.append(value)
            out[f"{metric} of {name}"] = value
    return {metric: float(np.mean(values)) for metric, values in found.items()} | out


def tau_c(a: Real[np.ndarray, "N"], b: Real[np.ndarray, "N"]) -> float:
    """Kendall's rank correlation, variant c (Stuart, 1953), which divides by what the number of different values allows."""
    return float(needed("scipy.stats").kendalltau(a, b, variant="c").statistic)


def ordered(a: Real[np.ndarray, "N"], b: Real[np.ndarray, "N"]) -> float:
    """The share of pairs with different b that a puts in the same order; equal a are half right. NaN without any."""
    right = total = 0.0
    for i in range(1, len(a)):
        wanted = np.sign(b[i] - b[:i])
        agreed = wanted * np.sign(a[i] - a[:i])
        right += float(((agreed > 0) + (agreed == 0) / 2)[wanted != 0].sum())
        total += float((wanted != 0).sum())
    return right / total if total else float("nan")


# Does a layer that is solved for read more out of the same states than the reward says already?


@dataclass(frozen=True)
class _Scores:
    """States with scores of several objectives, the first of which is the overall one, for training and for the test."""

    x: Float[Tensor, "N D"]
    y: Float[Tensor, "N M"]
    test_x: Float[Tensor, "R D"]
    test_y: Float[Tensor, "R M"]
    names: tuple[str, ...]
    steps: int


def _linear(seed: int, steps: int) -> _Scores:
    """Seven linear functions of 256 features, with noise of their own size; 200 rows, so the penalty counts."""
    draw = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(1200, 256, generator=draw) * torch.logspace(0, -1, 256)
    y = x @ torch.randn(256, 7, generator=draw)
    y = y / y.std(0) + torch.randn(1200, 7, generator=draw)
    return _Scores(x[:200], y[:200], x[200:], y[200:], tuple(f"y{i}" for i in range(7)), steps)


WORD_OBJECTIVES = ("mean", "spread", "lowest", "highest", "share positive", "share negative", "share of 0")


def word_objectives(ratings: Float[Tensor, "N 10"]) -> Float[Tensor, "N 7"]:
    """Seven things that ten people's ratings of a word say."""
    return torch.stack(
        [
            ratings.mean(1),
            ratings.std(1),
            ratings.amin(1),
            ratings.amax(1),
            *((ratings > 0).float().mean(1), (ratings < 0).float().mean(1), (ratings == 0).float().mean(1)),
        ],
        1,
    )


def _words(trunk: str, seed: int, steps: int) -> _Scores:
    states, ratings = rated_words(trunk)
    train, valid, test = thirds(len(states), seed)
    train = torch.cat([train, valid])
    y = word_objectives(ratings)
    test = test[:1000]  # pairs are counted one by one
    return _Scores(states[train], y[train], states[test], y[test], WORD_OBJECTIVES, steps)


def _measured(data: _Scores, guess: Tensor) -> dict[str, float]:
    found = objective_metrics(guess, data.test_y, data.names)
    means = {name: found[name] for name in ("r2", "tau_c", "pair accuracy")}
    overall = data.names[0]
    return means | {"overall r2": found[f"r2 of {overall}"], "overall pairs": found[f"pair accuracy of {overall}"]}


def _stage_one(data: _Scores, seed: int) -> MultiHead:
    """A reward head trained on the overall score, on frozen states."""
    head = RewardHead(RewardSettings(data.x.shape[1], objective="rating", seed=seed))
    heads = MultiHead(Trunk(nn.Identity()), {"reward": head})
    batches = row_batches({"input": data.x, "reward": data.y[:, 0] - data.y[:, 0].mean()}, 64, seed)
    heads.fit(batches, replace(ADAM, steps=data.steps, rate=1e-3, decay=0.5))
    return heads


@torch.no_grad()
def _reward_alone(make: Callable[[int], _Scores], seed: int) -> dict[str, float]:
    """What the reward says of each objective: a line through it."""
    data = make(seed)
    heads = _stage_one(data, seed)
    reward = [heads({"input": x})["reward"].double() for x in (data.x, data.test_x)]
    weight, bias = ridge(reward[0], data.y, 1e-6)
    return _measured(data, reward[1] @ weight + bias)


def _closed_form(penalty: float | None) -> Callable[[Callable[[int], _Scores], int], dict[str, float]]:
    def run(make: Callable[[int], _Scores], seed: int) -> dict[str, float]:
        data = make(seed)
        heads = with_objectives(_stage_one(data, seed), data.x, data.y, data.names, penalty, seed=seed)
        return _measured(data, heads({"input": data.test_x})["objectives"])

    return run


def _best_of_test(make: Callable[[int], _Scores], seed: int) -> dict[str, float]:
    """What no choice of the penalty can beat: the one that is best on the test itself."""
    data = make(seed)
    found = []
    for penalty in PENALTIES:
        weight, bias = ridge(data.x, data.y, penalty)
        found.append(_measured(data, data.test_x.double() @ weight + bias))
    return max(found, key=lambda one: one["r2"])


def _trained(make: Callable[[int], _Scores], seed: int) -> dict[str, float]:
    """The same layer by Adam, stopped early on a fifth of the rows."""
    data = make(seed)
    cut = len(data.x) * 4 // 5
    head = ScalarHead(LinearSettings(data.x.shape[1], data.y.shape[1], seed))
    nn.init.zeros_(head.linear.weight)
    mean, scale = data.y[:cut].mean(0), data.y[:cut].std(0)
    heads, y = MultiHead(Trunk(nn.Identity()), {"y": head}), (data.y - mean) / scale
    batches = row_batches({"input": data.x[:cut], "y": y[:cut]}, 64, seed)
    settings = replace(ADAM, steps=data.steps, rate=1e-3, every=max(1, data.steps // 40))
    heads.fit(batches, settings, judge=lambda: float(head.loss(head(data.x[cut:]), y[cut:])))
    return _measured(data, heads({"input": data.test_x})["y"] * scale + mean)


def _datasets(quick: bool) -> dict[str, Callable[[int], _Scores]]:
    steps = 60 if quick else 600
    made: dict[str, Callable[[int], _Scores]] = {
        "linear": lambda seed: _linear(seed, steps),
        "words, MiniLM": lambda seed: _words("minilm", seed, steps),
    }
    return made if quick else made | {"words, SmolLM2": lambda seed: _words("smollm2", seed, steps)}


def _more(other: str, metric: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda v: v["ridge", metric] - v[other, metric]


_METHODS: dict[str, Any] = {
    "reward alone": _reward_alone,
    "ridge": _closed_form(None),
    "ridge, penalty 1": _closed_form(1.0),
    "ridge, best on the test": _best_of_test,
    "trained by Adam": _trained,
}

register_experiment(
    Experiment(
        "multi-tap",
        (105,),
        "2510.00766",
        "Does a layer solved in closed form read several objectives out of a reward model's states?",
        datasets=_datasets,
        methods=_METHODS,
        baseline="reward alone",
        claims=(
            Claim("R^2 is within .02 of the best penalty's", _more("ridge, best on the test", "r2"), at_least=-0.02),
            Claim(
                "tau_c is .02 above what the reward says of all objectives",
                _more("reward alone", "tau_c"),
                at_least=0.02,
            ),
            Claim("R^2 is no worse than that of the same layer trained", _more("trained by Adam", "r2"), at_least=0.0),
        ),
        minutes=6,
    )
)
