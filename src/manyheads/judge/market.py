"""Artificial prediction markets (#36): predictors bet on classes, the price is the probability, and who was right gets richer.

Barbu and Lay, arXiv:1102.1465 (JMLR 13, 2012). Participant m has a budget beta_m and believes h_m(x) in class k, with
sum_k h_m^k <= 1; all zero: it stays silent. At prices c it puts the share phi_m^k(x, c) of its budget on class k. Prices are such
that what is paid out is what was staked, whatever the class turns out to be:

    B_k(c) = sum_m beta_m phi_m^k(x, c)                       B_k(c) = c_k sum_j B_j(c),  sum_k c_k = 1
    constant      phi^k = h^k                                 c = sum_m beta_m h_m / sum of those: a weighted mean
    linear        phi^k = (1 - c_k) h^k                       c_k = H_k / (T + H_k),  H = sum_m beta_m h_m,  sum_k c_k = 1
    aggressive    phi^k = h^k min(max((h^k - c_k) / .01, 0), 1)     it bets while the price is below its belief
    logistic      two classes, x_m = logit h_m^1:             logit c_1 = sum_m beta_m x_m / sum_m beta_m: a log-opinion pool

After the class y is known, beta_m += eta beta_m (phi_m^y / c_y - sum_k phi_m^k), which leaves the sum of budgets as it is. With
constant bets of participants that all take part and eta = 1, a step over all rows is a step of expectation maximisation for the
weights of a mixture, so the mean log probability never falls.

Linear bets take about the square root of the odds, so such prices are less sure: compare log losses within one way to bet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_number

Betting = Literal["constant", "linear", "aggressive", "logistic"]
BETTINGS: tuple[Betting, ...] = ("constant", "linear", "aggressive", "logistic")
EAGER = 0.01  # of the aggressive way: how far below its belief the price must be until all is bet
HALVINGS = 60
_SURE = 30.0  # logits of a belief of 0 or 1


def market_price(
    budgets: Float[np.ndarray, "M"] | Float[np.ndarray, "M N"],
    beliefs: Float[np.ndarray, "M N K"],
    betting: Betting = "constant",
    *,
    prior: Float[np.ndarray, "K"] | None = None,
) -> Float[np.ndarray, "N K"]:
    """Prices of the classes for each row. Where nobody bets: `prior`, or all alike.

    `budgets` are of the participants, or of those at each row (a forest's leaves). `InputError` for beliefs or budgets that are
    none.
    """
    stakes = _checked(budgets, beliefs, betting)
    if betting == "logistic":
        found = _log_pool(stakes, beliefs)
    elif betting == "aggressive":
        found = solved_price(stakes, beliefs, betting)
    else:
        held = np.einsum("mn,mnk->nk", stakes, beliefs)
        total = held.sum(1, keepdims=True)
        if betting == "linear":
            found = _linear(held)
        else:
            found = np.divide(held, total, out=np.zeros_like(held), where=total > 0)
    silent = np.einsum("mn,mnk->n", stakes, beliefs) <= 0
    found[silent] = 1 / beliefs.shape[2] if prior is None else prior
    return found


def solved_price(
    budgets: Float[np.ndarray, "M"] | Float[np.ndarray, "M N"], beliefs: Float[np.ndarray, "M N K"], betting: Betting
) -> Float[np.ndarray, "N K"]:
    """Prices by two nested halvings, for any way to bet in which phi^k depends on c_k alone and does not rise with it.

    For a given turnover n each class has one price at which B_k(c_k) = n c_k, and their sum falls as n rises.
    """
    stakes = _checked(budgets, beliefs, betting)
    if betting == "logistic":
        raise InputError("logistic bets depend on both prices; their price has a formula.")

    def per_class(turnover: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N K"]:
        low, high = np.zeros(beliefs.shape[1:]), np.ones(beliefs.shape[1:])
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            over = np.einsum("mn,mnk->nk", stakes, _bets(beliefs, middle, betting)) > turnover[:, None] * middle
            low, high = np.where(over, middle, low), np.where(over, high, middle)
        return (low + high) / 2

    most = np.einsum("mn,mnk->n", stakes, _bets(beliefs, np.zeros(beliefs.shape[1:]), betting))
    low, high = np.zeros(beliefs.shape[1]), np.maximum(most, 1e-300)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = per_class(middle).sum(1) > 1
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    found = per_class(high)
    return found / np.maximum(found.sum(1, keepdims=True), 1e-300)


@dataclass(frozen=True)
class Bets:
    """At given prices: what each participant put on the class that came true, and on all, as shares of its budget."""

    right: Float[np.ndarray, "M N"]
    staked: Float[np.ndarray, "M N"]
    price: Float[np.ndarray, "N"]  # of the class that came true

    @property
    def gains(self) -> Float[np.ndarray, "M N"]:
        """What is won or lost, as a share of the budget: phi^y / c_y - sum_k phi^k."""
        return self.right / np.maximum(self.price, 1e-300) - self.staked


def bets_on(
    budgets: Float[np.ndarray, "M"] | Float[np.ndarray, "M N"],
    beliefs: Float[np.ndarray, "M N K"],
    y: Int[np.ndarray, "N"],
    betting: Betting = "constant",
) -> Bets:
    """The bets on each row whose class `y` (a number from 0 on) is known."""
    stakes = _checked(budgets, beliefs, betting)
    prices = market_price(budgets, beliefs, betting)
    if betting == "logistic":
        total = np.maximum((stakes * _speaking(beliefs)).sum(0), 1e-300)
        x = _scores(beliefs)
        p = np.clip(prices, 1e-12, 1)
        one = p[:, 1] * (np.maximum(x, 0) / total - np.log(p[:, 1]) / total)
        zero = p[:, 0] * (np.maximum(-x, 0) / total - np.log(p[:, 0]) / total)
        phi = np.stack([zero, one], -1) * _speaking(beliefs)[..., None]
    else:
        phi = _bets(beliefs, prices, betting)
    rows = np.arange(len(y))
    return Bets(phi[:, rows, y], phi.sum(-1), prices[rows, y])


def settle_bets(
    budgets: Float[np.ndarray, "M"],
    beliefs: Float[np.ndarray, "M N K"],
    y: Int[np.ndarray, "N"],
    betting: Betting = "constant",
    *,
    eta: float = 1.0,
) -> Float[np.ndarray, "M"]:
    """Budgets after the mean gain of all rows: one batch step. Their sum stays; none falls below zero.

    Logistic bets may stake more than is owned; the step is then shortened for all alike.
    """
    check_number(eta, "eta", 0.0, 1.0, above=True)
    bets = bets_on(budgets, beliefs, y, betting)
    most = float(bets.staked.mean(1).max(initial=0.0))
    return budgets * (1 + min(eta, 1 / most if most > 1 else eta) * bets.gains.mean(1))


def _checked(budgets: np.ndarray, beliefs: Float[np.ndarray, "M N K"], betting: str) -> Float[np.ndarray, "M N"]:
    check_choice(betting, "betting", BETTINGS)
    if not np.isfinite(beliefs).all() or (beliefs < 0).any() or (beliefs.sum(-1) > 1 + 1e-6).any():
        raise InputError("beliefs are probabilities of classes: finite, not below 0, and at most 1 together.")
    if betting == "logistic" and beliefs.shape[2] != 2:
        raise InputError(
            f"logistic bets are on two classes, and there are {beliefs.shape[2]}; choose constant or linear."
        )
    if budgets.shape[0] != beliefs.shape[0] or not np.isfinite(budgets).all() or (budgets < 0).any():
        raise InputError(f"there are {beliefs.shape[0]} participants; give each a budget, finite and not below 0.")
    return np.broadcast_to(budgets if budgets.ndim == 2 else budgets[:, None], beliefs.shape[:2])


def _bets(
    beliefs: Float[np.ndarray, "M N K"], prices: Float[np.ndarray, "N K"], betting: str
) -> Float[np.ndarray, "M N K"]:
    if betting == "constant":
        return beliefs
    if betting == "linear":
        return beliefs * (1 - prices)
    return beliefs * np.clip((beliefs - prices) / EAGER, 0, 1)


def _linear(held: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    low, high = np.zeros(len(held)), (held.shape[1] - 1) * np.maximum(held.max(1), 1e-300)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = (held / np.maximum(middle[:, None] + held, 1e-300)).sum(1) > 1
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    found = held / np.maximum(high[:, None] + held, 1e-300)
    return found / np.maximum(found.sum(1, keepdims=True), 1e-300)


def _speaking(beliefs: Float[np.ndarray, "M N K"]) -> np.ndarray:
    return beliefs.sum(-1) > 0


def _scores(beliefs: Float[np.ndarray, "M N 2"]) -> Float[np.ndarray, "M N"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(beliefs[..., 1]) - np.log(beliefs[..., 0])
    return np.clip(np.where(_speaking(beliefs), x, 0.0), -_SURE, _SURE)


def _log_pool(stakes: Float[np.ndarray, "M N"], beliefs: Float[np.ndarray, "M N 2"]) -> Float[np.ndarray, "N 2"]:
    weights = stakes * _speaking(beliefs)
    score = (weights * _scores(beliefs)).sum(0) / np.maximum(weights.sum(0), 1e-300)
    p = 1 / (1 + np.exp(-score))
    return np.stack([1 - p, p], 1)
