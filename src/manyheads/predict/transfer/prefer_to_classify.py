"""P2C (#60): a classifier that learns, beside labels, which of two examples of one class shows that class more strongly.

Kim, Shin and Kang, "Prefer to Classify", ICML 2023 (arXiv:2306.04925). On a state z [D], a linear class head gives p(y), and K
preference heads give scores r_k(z, y) = tanh MLP([z ; y 1_D]), 2 D -> D -> D -> 1. For a pair of the same class y, x1 preferred,

    P_k(x1 > x2) = sigmoid(r_k(x1) - r_k(x2))                                 between sigmoid(-2) = .119 and .881
    loss = (CE1 + CE2) / 2 + l_pref mean_k CE(P_k, preference) + l_cons max(0, gap - (p_y(x1) - p_y(x2)))
           - l_div mean over k != j of CE(P_j, P_k held fixed)

in nats, the mean over pairs. A tie wants P = 1/2 and |p_y(x1) - p_y(x2)| = 0. `gap` is 0, or, where votes say which share of
people chose y, the difference of the shares. Only the class head is used afterwards. As in the released code, the cross-entropies
of the preference heads are averaged, not that of their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, rank_correlation, register_experiment
from manyheads.inputs import check_integer, check_number
from manyheads.learning import Head, LinearHead, LinearSettings, MultiHead, Trunk
from manyheads.predict.reward.pairs import pair_target, pairs_of
from manyheads.predict.reward.rated_words import rated_words
from manyheads.predict.trunks import mlp
from manyheads.predict.words import thirds
from manyheads.training import ADAM, Batch, drawn_rows, generator_of


@dataclass(frozen=True)
class PreferSettings:
    """`width` of the states, `classes`, how many preference heads, and the weights of preference, consistency and diversity."""

    width: int
    classes: int
    heads: int = 3
    preference: float = 1.0
    consistency: float = 1.0
    diversity: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.heads, "heads", 1)
        for name in ("preference", "consistency", "diversity"):
            check_number(getattr(self, name), name, 0.0)
        if self.diversity and self.heads < 2:
            raise InputError("one preference head has none to differ from; give diversity 0, or two heads.")


class JudgedClasses(NamedTuple):
    """Logits of the classes, and the scores r_k of each preference head k for each class."""

    logits: Float[Tensor, "*N C"]
    scores: Float[Tensor, "*N K C"]


class PreferToClassifyHead(Head):
    """The class head and the preference heads, with the loss above. Targets are those of `preference_target`."""

    Settings = PreferSettings

    def __init__(self, settings: PreferSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, settings.classes, settings.seed)
        seeds = range(settings.seed + 1, settings.seed + 1 + settings.heads)
        self.preferences = nn.ModuleList(_scorer(settings.width, 10_000 + seed) for seed in seeds)

    def forward(self, states: Float[Tensor, "*N D"]) -> JudgedClasses:
        """Logits and scores."""
        labels = torch.arange(self.settings.classes).to(states)[:, None].expand(-1, states.shape[-1])
        every = states[..., None, :].expand(*states.shape[:-1], *labels.shape)
        both = torch.cat([every, labels.expand_as(every)], -1)
        return JudgedClasses(self.linear(states), torch.stack([score(both)[..., 0] for score in self.preferences], -2))

    def loss(self, output: JudgedClasses, target: Float[Tensor, "N 4"]) -> Float[Tensor, ""]:
        """The formula above, in nats."""
        first, second, side, y, gap = _pairs(target)
        own = self.settings
        p = output.logits.softmax(-1).gather(1, y[:, None])[:, 0]
        scores = output.scores.gather(2, y[:, None, None].expand(-1, own.heads, 1))[..., 0]
        difference = scores[first] - scores[second]
        wanted = (0.5 + 0.5 * side)[:, None].expand_as(difference)
        loss = F.cross_entropy(output.logits, y)
        loss = loss + own.preference * F.binary_cross_entropy_with_logits(difference, wanted)
        loss = loss + own.consistency * inconsistency(p[first], p[second], side, gap).mean()
        return loss - own.diversity * disagreement(difference).mean() if own.diversity else loss

    def metrics(self, output: JudgedClasses, target: Float[Tensor, "N 4"]) -> dict[str, float]:
        """The share of rows whose class is right, and of pairs that the preference heads' mean puts in order."""
        first, second, side, y, _ = _pairs(target)
        scores = output.scores.mean(1).gather(1, y[:, None])[:, 0]
        right = (scores[first] > scores[second])[side > 0].float().mean()
        return {"accuracy": float((output.logits.argmax(1) == y).float().mean()), "pair accuracy": float(right)}


def inconsistency(
    p1: Float[Tensor, "P"], p2: Float[Tensor, "P"], side: Float[Tensor, "P"], gap: Float[Tensor, "P"] | float = 0.0
) -> Float[Tensor, "P"]:
    """How far p_y of the preferred x1 falls short of that of x2 plus the gap; of a tie (`side` 0) how far they are apart."""
    apart = p1 - p2
    return torch.where(side > 0, (gap - apart).clamp_min(0), apart.abs())


def disagreement(difference: Float[Tensor, "P K"]) -> Float[Tensor, "P"]:
    """The mean over two heads k and j of CE(P_j, P_k held fixed), of the differences r_k(x1) - r_k(x2)."""
    fixed = difference.sigmoid().detach()[:, :, None].expand(-1, -1, difference.shape[1])
    cross = F.binary_cross_entropy_with_logits(difference[:, None].expand_as(fixed), fixed, reduction="none")
    others = ~torch.eye(difference.shape[1], dtype=torch.bool, device=difference.device)
    return cross[:, others].mean(1)


def preference_target(
    y: Int[Tensor, "P"], side: Float[Tensor, "P"], gap: Float[Tensor, "P"] | None = None
) -> Float[Tensor, "2*P 4"]:
    """Targets of 2 P rows, of which 2 i and 2 i + 1 have the class y[i], and the first is preferred (`side` 1) or neither (0).

    The columns are the class, the pair's number and signed side, and the gap.
    """
    gap = torch.zeros_like(side) if gap is None else gap
    rows = torch.stack([y.to(side), gap], 1).repeat_interleave(2, 0)
    return torch.cat([rows[:, :1], pair_target(side), rows[:, 1:]], 1)


def preference_batches(
    x: Float[Tensor, "N D"],
    y: Int[Tensor, "N"],
    share: Float[Tensor, "N"],
    pairs: int,
    seed: int = 0,
    *,
    votes: bool = True,
) -> Callable[[int], Batch]:
    """Batches of random pairs of one class. The one with the larger share of votes for its class is preferred.

    With `votes` p_y has to differ by as much as the shares do. Give rows of one split only: a pair must not cross splits.
    """
    same = [(y == label).nonzero()[:, 0] for label in range(int(y.max()) + 1)]

    def batch(number: int) -> Batch:
        one = drawn_rows(len(y), pairs, number, seed)
        draw = torch.rand(pairs, generator=generator_of(seed + 500, number))
        other = torch.stack([same[int(y[i])][int(u * len(same[int(y[i])]))] for i, u in zip(one, draw, strict=True)])
        apart = share[one] - share[other]
        first, second = torch.where(apart >= 0, one, other), torch.where(apart >= 0, other, one)
        rows = torch.stack([first, second], 1).flatten()
        gap = apart.abs() if votes else None
        return {"input": x[rows], "y": preference_target(y[first], (apart != 0).to(x), gap)}

    return batch


def _pairs(target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Preferred rows, their partners, sides, all rows' classes, and the gaps. `InputError` for a pair of two classes."""
    if target.ndim != 2 or target.shape[1] != 4:
        raise InputError(f"targets have shape [rows, 4] (`preference_target`), not {list(target.shape)}.")
    y = target[:, 0].long()
    first, second, side = pairs_of(target[:, 1:3].contiguous())
    if bool((y[first] != y[second]).any()):
        raise InputError("a pair has two classes; preferences compare two rows of one class.")
    return first, second, side, y, target[first, 3]


def _scorer(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        return nn.Sequential(*layers, nn.Tanh())


# Do votes teach a classifier more as preferences than as labels?


@dataclass(frozen=True)
class Voted:
    """Rows with the class most people chose and the share who did; test rows with their class and how strongly they show it."""

    x: Float[Tensor, "N D"]
    y: Int[Tensor, "N"]
    share: Float[Tensor, "N"]
    test_x: Float[Tensor, "R D"]
    test_y: Int[Tensor, "R"]
    strength: Float[Tensor, "R"]
    steps: int


def logistic_votes(seed: int, steps: int, n: int = 200, width: int = 32) -> Voted:
    """Ten votes a row from a logistic model. The test knows the model's own probability."""
    draw = torch.Generator().manual_seed(1000 + seed)
    w = torch.randn(width, generator=draw)
    x = torch.randn(n + 4000, width, generator=draw)
    p = (x @ w * 3 / w.norm()).sigmoid()
    ones = (torch.rand(n, 10, generator=draw) < p[:n, None]).float().mean(1)
    y = (ones > 0.5).long()
    return Voted(x[:n], y, torch.where(y > 0, ones, 1 - ones), x[n:], (p[n:] > 0.5).long(), p[n:], steps)


def voted_words(seed: int, steps: int, n: int = 200, *, graded: bool = False) -> Voted:
    """Is a word positive? Ten people's ratings are votes; a rating of 0 is half a vote for each side.

    With `graded` the strength of the mean rating takes the place of the share, 1/2 + |mean| / 8.
    """
    states, ratings = rated_words("minilm")
    positive = (ratings > 0).float().mean(1) + (ratings == 0).float().mean(1) / 2
    train, _, test = thirds(len(states), seed)
    test = test[positive[test] != 0.5]
    train = train[:n]
    y = (positive > 0.5).long()
    share = 0.5 + ratings.mean(1).abs() / 8 if graded else torch.where(y > 0, positive, 1 - positive)
    return Voted(states[train], y[train], share[train], states[test], y[test], ratings[test].mean(1), steps)


def _measured(data: Voted, logits: Tensor) -> dict[str, float]:
    p = logits.softmax(-1)[:, 1]
    within = [
        rank_correlation(p[rows].numpy(), data.strength[rows].numpy()) for rows in (data.test_y == 0, data.test_y == 1)
    ]
    return {
        "accuracy": float((logits.argmax(1) == data.test_y).float().mean()),
        "order within a class": sum(within) / 2,
    }


class _VoteShares(LinearHead):
    """Cross-entropy against the votes' shares instead of the label."""

    def loss(self, output: Float[Tensor, "N C"], target: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
        return F.cross_entropy(output, target)


def _learned(kind: str, **settings: Any) -> Callable[[Callable[[int], Voted], int], dict[str, float]]:
    def run(make: Callable[[int], Voted], seed: int) -> dict[str, float]:
        data = make(seed)
        head: Head
        if kind == "P2C":
            head = PreferToClassifyHead(PreferSettings(64, 2, seed=seed, **settings))
        else:
            head = (_VoteShares if kind == "shares" else LinearHead)(LinearSettings(64, 2, seed))
        heads = MultiHead(Trunk(mlp(data.x.shape[1], 64, seed=seed), frozen=False), {"y": head})
        pairs = preference_batches(data.x, data.y, data.share, 16, seed)

        def batch(i: int) -> Mapping[str, Any]:
            """The same rows for all methods; labels alone take the classes of the pairs' rows."""
            found = pairs(i)
            if kind == "P2C":
                return found
            rows = drawn_rows(len(data.y), 32, i, seed)
            shares = F.one_hot(data.y[rows], 2) * (2 * data.share[rows, None] - 1) + (1 - data.share[rows, None])
            return {"input": data.x[rows], "y": shares if kind == "shares" else data.y[rows]}

        heads.fit(batch, replace(ADAM, steps=data.steps, rate=1e-3), log_every=data.steps + 1)
        with torch.no_grad():
            out = heads({"input": data.test_x})["y"]
        return _measured(data, out.logits if isinstance(out, JudgedClasses) else out)

    return run


def _more(other: str, metric: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda v: v["P2C", metric] - v[other, metric]


def _datasets(quick: bool) -> dict[str, Callable[[int], Voted]]:
    steps = 30 if quick else 300
    return {
        "votes": lambda seed: logistic_votes(seed, steps),
        "words": lambda seed: voted_words(seed, steps),
        "words, graded": lambda seed: voted_words(seed, steps, graded=True),
    }


register_experiment(
    Experiment(
        "prefer-to-classify",
        (60,),
        "2306.04925",
        "Do votes teach a classifier more as preferences than as labels?",
        datasets=_datasets,
        methods={
            "labels": _learned("labels"),
            "shares of votes as labels": _learned("shares"),
            "P2C": _learned("P2C"),
            "P2C, consistency .1": _learned("P2C", consistency=0.1),
            "P2C, no consistency": _learned("P2C", consistency=0.0),
            "P2C, pairs only": _learned("P2C", preference=0.0, consistency=0.0, diversity=0.0),
        },
        baseline="labels",
        claims=(
            Claim(
                "half a point more accurate than labels alone", _more("labels", "accuracy"), at_least=0.005, on="votes"
            ),
            Claim("a better order within a class, by .015", _more("labels", "order within a class"), at_least=0.015),
            Claim(
                "no less accurate than labels alone on real words",
                _more("labels", "accuracy"),
                at_least=0.0,
                on="words",
            ),
            Claim(
                "the same where preferences are graded", _more("labels", "accuracy"), at_least=0.0, on="words, graded"
            ),
            *(
                Claim(
                    f"no less accurate than the shares of votes as soft labels, on {data}",
                    _more("shares of votes as labels", "accuracy"),
                    at_least=0.0,
                    on=data,
                )
                for data in ("votes", "words")
            ),
        ),
        minutes=4,
    )
)
