"""Attention trained by descent selects tokens as a support vector machine does (#73): where its direction goes.

Tarzanagh et al., arXiv:2308.16898. A sequence has tokens x_t and a query z, a label Y = +-1, and a fixed v reads the attention:

    f = v^T X^T softmax(X W z)        loss = mean log(1 + e^(-Y f))        W <- W - rate G / ||G||_F
    factored: W = K Q^T, with K and Q each moved by rate against their normalised gradient

The norm of W grows without end, and attention goes to one token a sequence, `chosen`. Claim: the direction of W converges to
that of

    minimise ||W||_F (factored: the nuclear norm)   such that   (x_chosen - x_t)^T W z >= 1 for all t != chosen

Theory's figure is a cosine of 1; refuted by a cosine that stays below, or by a factored run that is nearer to the Frobenius
solution than to the nuclear one. Both references are solved apart from the descent: least norm under inequalities as non-negative
least squares (Lawson and Hanson), and the nuclear norm by ADMM, with a duality gap: how far from the optimum it can be.

Departures: as descent is normalised, the gradient is taken up to its length, from differences to the most attended token. So it
is exact when the attention to the others is below what float64 can hold, and needs no penalty. Several chosen tokens of
equal score (an equality among them and a finite part) are not treated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.data.real import digits, needed
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.training import generator_of

GAP = 1e-4  # relative duality gap at which the nuclear solution is taken


@dataclass(frozen=True)
class Selections:
    """R problems of n sequences each, in float64."""

    x: Float[Tensor, "R n T d"]
    z: Float[Tensor, "R n d"]
    v: Float[Tensor, "R d"]
    y: Float[Tensor, "R n"]

    @property
    def scores(self) -> Float[Tensor, "R n T"]:
        """Y v . x_t: how much each token helps if it is selected."""
        return self.y[..., None] * torch.einsum("rntd,rd->rnt", self.x, self.v)


def random_selections(
    problems: int = 10, *, sequences: int = 6, tokens: int = 8, width: int = 10, seed: int = 0
) -> Selections:
    """Tokens, queries and v uniform on the unit sphere, labels +-1 at random."""
    _check(problems, sequences, tokens, width)
    draw = generator_of(check_seed(seed), 0)
    size = (problems, sequences, tokens + 1, width)
    x = F.normalize(torch.randn(size, generator=draw, dtype=torch.float64), dim=-1)
    v = F.normalize(torch.randn(problems, width, generator=draw, dtype=torch.float64), dim=-1)
    y = torch.randint(2, (problems, sequences), generator=draw) * 2.0 - 1
    return Selections(x[:, :, 1:], x[:, :, 0], v, y.double())


def digit_selections(problems: int = 10, *, sequences: int = 6, tokens: int = 8, seed: int = 0) -> Selections:
    """Tokens and queries are images of digits (scikit-learn's), centred and of length 1; v points from the mean 3 to the mean 8.

    A sequence's label is +1 if there are more 8s than 3s in it. `InputError` without scikit-learn.
    """
    _check(problems, sequences, tokens, 64)
    found = digits()
    images = torch.from_numpy(found.x).double().flatten(1)
    images = F.normalize(images - images.mean(0), dim=-1)
    kinds = torch.from_numpy(np.asarray(found.y))
    order = torch.rand(problems, sequences, len(images), generator=generator_of(check_seed(seed), 0))
    rows = order.topk(tokens + 1).indices  # no image twice in a sequence: equal tokens cannot be told apart
    v = F.normalize(images[kinds == 8].mean(0) - images[kinds == 3].mean(0), dim=0).expand(problems, -1)
    shown = kinds[rows[..., 1:]]
    y = torch.where((shown == 8).sum(-1) > (shown == 3).sum(-1), 1.0, -1.0).double()
    return Selections(images[rows[..., 1:]], images[rows[..., 0]], v, y)


def _check(*sizes: int) -> None:
    for value, name, least in zip(sizes, ("problems", "sequences", "tokens", "width"), (1, 1, 2, 1), strict=True):
        check_integer(value, name, least)


def selection_gradient(given: Selections, w: Float[Tensor, "R d d"]) -> Float[Tensor, "R d d"]:
    """The gradient of the loss divided by its Frobenius norm (0 where nothing is left to gain).

    With s the attention, g the scores and g' = s . g, sum_t s_t (g_t - g') = 0, so the chosen token drops out of

        G = -mean sigmoid(-g') sum_t s_t (g_t - g') (x_t - x_chosen) z^T
    """
    logits = torch.einsum("rntd,rde,rne->rnt", given.x, w, given.z)
    log_s = logits.log_softmax(-1)
    chosen = logits.argmax(-1, keepdim=True)
    scores = given.scores
    mean = (log_s.exp() * scores).sum(-1, keepdim=True)
    others = log_s.scatter(-1, chosen, -torch.inf)
    part = (others - others.amax((1, 2), keepdim=True)).exp() * (scores - mean) * (-mean).sigmoid()
    away = given.x - given.x.gather(2, chosen[..., None].expand(-1, -1, -1, given.x.shape[-1]))
    gradient = -torch.einsum("rnt,rntd,rne->rde", part, away, given.z)
    return _unit(gradient)


def _unit(w: Float[Tensor, "R a b"]) -> Float[Tensor, "R a b"]:
    return w / torch.linalg.matrix_norm(w)[:, None, None].clamp_min(1e-300)


@dataclass(frozen=True)
class SelectionRun:
    """Where descent arrived: `w`, the most attended token of each sequence, and the attention to it."""

    w: Float[Tensor, "R d d"]
    chosen: Int[Tensor, "R n"]
    attention: Float[Tensor, "R n"]


def select_tokens(
    given: Selections, *, steps: int = 2000, rate: float = 0.1, factored: bool = False, seed: int = 0
) -> SelectionRun:
    """Normalised descent from W = 0, or with `factored` from small random K and Q (formula above)."""
    check_integer(steps, "steps", 1)
    check_number(rate, "rate", 0.0, above=True)
    problems, d = given.v.shape
    if factored:
        size = (2, problems, d, d)
        key, query = 0.1 / d**0.5 * torch.randn(size, generator=generator_of(check_seed(seed), 1), dtype=torch.float64)
        for _ in range(steps):
            gradient = selection_gradient(given, key @ query.mT)
            key, query = key - rate * _unit(gradient @ query), query - rate * _unit(gradient.mT @ key)
        w = key @ query.mT
    else:
        w = torch.zeros(problems, d, d, dtype=torch.float64)
        for _ in range(steps):
            w = w - rate * selection_gradient(given, w)
    attention, chosen = torch.einsum("rntd,rde,rne->rnt", given.x, w, given.z).softmax(-1).max(-1)
    return SelectionRun(w, chosen, attention)


def margins(x: Float[Tensor, "n T d"], z: Float[Tensor, "n d"], chosen: Int[Tensor, " n"]) -> Float[np.ndarray, "C D"]:
    """The constraints of one problem: a row (x_chosen - x_t) z^T, flat, for each sequence and t != chosen."""
    each = torch.arange(len(x))
    away = x[each, chosen][:, None] - x
    rows = torch.einsum("ntd,ne->ntde", away, z)
    other = F.one_hot(chosen, x.shape[1]) == 0
    return rows[other].flatten(1).numpy()


def nearest_above(
    a: Float[np.ndarray, "C D"], start: Float[np.ndarray, " D"] | None = None
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " C"]]:
    """The w with A w >= 1 nearest to `start` (0: the one of least norm), and multipliers u >= 0 with w = start + A^T u.

    Least-distance programming of Lawson and Hanson by non-negative least squares. `InputError` where no w has A w >= 1.
    """
    missing = 1.0 - (0.0 if start is None else a @ start)
    system = np.vstack([a.T, np.broadcast_to(missing, len(a))])
    target = np.zeros(len(system))
    target[-1] = 1.0
    u, residual = needed("scipy.optimize").nnls(system, target)
    left = 1.0 - system[-1] @ u
    if residual < 1e-9:
        raise InputError(
            "these tokens cannot all be selected: no W separates them; give a larger width, or fewer tokens."
        )
    u = u / left
    return (0.0 if start is None else start) + a.T @ u, u


def least_nuclear(
    a: Float[np.ndarray, "C D"], *, gap: float = GAP, steps: int = 5000
) -> tuple[Float[np.ndarray, " D"], float]:
    """The square matrix (flat) of least nuclear norm with A w >= 1, and its relative duality gap, by ADMM.

    The gap is that to u . 1 for multipliers u >= 0 with largest singular value of A^T u at most 1: no matrix is below it.
    """
    d = round(a.shape[1] ** 0.5)
    w, _ = nearest_above(a)
    singular = np.linalg.svd(w.reshape(d, d), compute_uv=False)
    pull, left, step = np.zeros_like(w), np.inf, 10 * float(singular.mean())  # the step decides how fast, not where to
    for _ in range(check_integer(steps, "steps", 1)):
        left_v, size, right_v = np.linalg.svd((w - pull).reshape(d, d))
        shrunk = ((left_v * np.maximum(size - step, 0)) @ right_v).ravel()
        w, u = nearest_above(a, shrunk + pull)
        pull = pull + shrunk - w
        u = u / max(np.linalg.norm((a.T @ u).reshape(d, d), 2), 1e-300)
        norm = np.linalg.norm(w.reshape(d, d), "nuc")
        left = (norm - u.sum()) / norm
        if left < gap:
            break
    return w, float(left)


def cosine_to(
    given: Selections, w: Float[Tensor, "R d d"], chosen: Int[Tensor, "R n"], *, nuclear: bool = False
) -> Float[np.ndarray, " R"]:
    """The cosine of each problem's w and its reference for the `chosen` tokens: the Frobenius solution, or the nuclear one."""
    out = []
    for x, z, one, tokens in zip(given.x, given.z, w, chosen, strict=True):
        reference, _ = (least_nuclear if nuclear else nearest_above)(margins(x, z, tokens))
        flat = one.flatten().numpy()
        out.append(reference @ flat / np.linalg.norm(reference) / np.linalg.norm(flat))
    return np.array(out)


def _rank(w: Float[Tensor, "R d d"]) -> float:
    """The mean of (nuclear norm / Frobenius norm)^2: 1 for rank one, d for d equal singular values."""
    values = torch.linalg.svdvals(w)
    return float((values.sum(-1).square() / values.square().sum(-1)).mean())


def _selected(factored: bool, steps: int = 2000) -> Any:
    def run(data: Any, seed: int) -> dict[str, float]:
        given = data(seed)
        found = select_tokens(given, steps=steps, factored=factored, seed=seed)
        frobenius = cosine_to(given, found.w, found.chosen)
        out = {"Frobenius": frobenius.mean(), "least": frobenius.min(), "attention": float(found.attention.min())}
        out["nuclear"] = cosine_to(given, found.w, found.chosen, nuclear=True).mean()
        out["rank"] = _rank(found.w)
        return out | {"best token": float((found.chosen == given.scores.argmax(-1)).double().mean())}

    return run


def _problems(make: Any, **sizes: int) -> Any:
    return lambda seed: make(seed=seed, **sizes)


register_experiment(
    Experiment(
        "token-selection",
        (73,),
        "2308.16898",
        "Does trained attention go in the direction of a support vector machine that separates the chosen tokens?",
        datasets=lambda quick: {
            "random tokens": _problems(random_selections, problems=4 if quick else 10),
            "random, width 40": _problems(random_selections, problems=4 if quick else 10, width=40),
            "digits": _problems(digit_selections, problems=4 if quick else 10),
        },
        methods={"combined": _selected(False), "factored": _selected(True), "first step": _selected(False, 1)},
        baseline="first step",
        claims=(
            Claim("attention to the chosen token is above .99", lambda v: v["combined", "attention"], at_least=0.99),
            Claim(
                "the least cosine of 10 problems with the Frobenius solution is above .99",
                lambda v: v["combined", "least"],
                at_least=0.99,
                on="random tokens",
            ),
            Claim("the mean cosine is, on all data", lambda v: v["combined", "Frobenius"], at_least=0.99),
            Claim(
                "the first step's direction is not there yet",
                lambda v: v["first step", "Frobenius"],
                at_most=0.9,
            ),
            Claim(
                "a factored run is nearer to the nuclear solution than to the Frobenius one",
                lambda v: v["factored", "nuclear"] - v["factored", "Frobenius"],
                at_least=0.0,
            ),
            Claim(
                "and nearer to it than a combined run",
                lambda v: v["factored", "nuclear"] - v["combined", "nuclear"],
                at_least=0.0,
            ),
            Claim("and of lower rank", lambda v: v["factored", "rank"] / v["combined", "rank"], at_most=0.9),
            Claim(
                "with width 40 almost all select the token that helps most",
                lambda v: v["combined", "best token"],
                at_least=0.99,
                on="random, width 40",
            ),
        ),
        minutes=1,
        room="lab",
    )
)
