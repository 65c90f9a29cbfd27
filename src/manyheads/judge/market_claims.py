"""What markets are worth (#36): specialists that are found, and real tables beside the usual ways to combine models.

**Specialists.** A row has one of five domains and one of three classes. Five experts are right in 90 % of the rows of their own
domain and silent elsewhere, five are right in 55 % of all rows, five guess; each gives .8 to the class it names. 2,000 rows to
settle, 5,000 to test. **Prediction:** the budgets find the experts, and the log loss falls to .50 at most, the error to .12, from
.85 and .32 with equal budgets.

**Tables** (digits, breast cancer): a linear model, naive Bayes, neighbours and a forest bet on rows of other folds, and are
compared with their mean, stacking by a linear model, a log-opinion pool, and the one that is best in the same folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.judge.market import market_price, settle_bets
from manyheads.judge.market_classifier import MarketClassifier

PASSES = 50


def specialists(n: int, seed: int) -> tuple[Float[np.ndarray, "M N K"], Int[np.ndarray, "N"]]:
    """Beliefs of the fifteen, and the classes."""
    draw = np.random.default_rng(seed)
    domain, y = draw.integers(5, size=n), draw.integers(3, size=n)
    beliefs = np.zeros((15, n, 3))
    for m in range(15):
        right = draw.random(n) < (0.9, 0.55, 1 / 3)[m // 5]
        named = np.where(right, y, (y + draw.integers(1, 3, size=n)) % 3)
        beliefs[m] = 0.1
        beliefs[m, np.arange(n), named] = 0.8
        if m < 5:
            beliefs[m, domain != m] = 0
    return beliefs, y


def _specialists(way: str, seed: int) -> Mapping[str, float]:
    (beliefs, y), (test, labels) = specialists(2000, 2 * seed), specialists(5000, 2 * seed + 1)
    budgets = np.full(15, 1 / 15)
    betting: Any = "linear" if way == "linear market" else "constant"
    if way == "log-opinion pool":
        pool = np.exp(np.log(np.where(test > 0, test, 1.0)).mean(0))
        return _scored(pool / pool.sum(1, keepdims=True), labels)
    if way in ("constant market", "linear market"):
        for _ in range(PASSES):
            budgets = settle_bets(budgets, beliefs, y, betting)
    found = market_price(budgets, test, betting)
    return {**_scored(found, labels), "wealth of experts": float(budgets[:5].sum())}


def _table(way: str, name: str, seed: int) -> Mapping[str, float]:
    from sklearn.datasets import load_breast_cancer, load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict, train_test_split

    x, y = (load_digits if name == "digits" else load_breast_cancer)(return_X_y=True)
    x, test, y, labels = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
    betting: Any = "linear" if way == "linear market" else "constant"
    market = MarketClassifier(betting=betting, passes=PASSES if "market" in way else 0, random_state=seed).fit(x, y)
    if "market" in way or way == "mean":
        return _scored(market.predict_proba(test), labels)
    beliefs = np.clip(market.beliefs(test), 1e-6, 1)
    if way == "log-opinion pool":
        pool = np.exp(np.log(beliefs).mean(0))
        return _scored(pool / pool.sum(1, keepdims=True), labels)
    folds = [cross_val_predict(one, x, y, cv=5, method="predict_proba") for one in market.estimators_]
    logs = np.clip(np.stack(folds), 1e-6, 1)
    if way == "best single":
        best = int(np.argmax([np.log(one[np.arange(len(y)), y]).mean() for one in logs]))
        return _scored(beliefs[best], labels)
    stacked = LogisticRegression(C=0.1, max_iter=2000).fit(np.concatenate(list(np.log(logs)), 1), y)
    return _scored(stacked.predict_proba(np.concatenate(list(np.log(beliefs)), 1)), labels)


def _scored(p: Float[np.ndarray, "N K"], y: Int[np.ndarray, "N"]) -> dict[str, float]:
    right = np.maximum(p[np.arange(len(y)), y], 1e-12)
    return {"log loss": float(-np.log(right).mean()), "error": float((p.argmax(1) != y).mean())}


def _run(way: str, data: str, seed: int) -> Mapping[str, float]:
    if data == "specialists":
        return _specialists(way, seed) if way not in ("stacking", "best single") else {}
    return _table(way, data, seed)


def _difference(rival: str, v: Values) -> float:
    return v["constant market", "log loss"] - v[rival, "log loss"]


_TABLES = ("digits", "breast cancer")
register_experiment(
    Experiment(
        "market",
        (36,),
        "1102.1465",
        "Does a market find who should be believed, and is it a better ensemble?",
        datasets=lambda quick: {name: name for name in ("specialists", *(() if quick else _TABLES))},
        methods={
            name: partial(_run, name)
            for name in ("mean", "constant market", "linear market", "log-opinion pool", "stacking", "best single")
        },
        baseline="mean",
        claims=(
            Claim("log loss at most .50", lambda v: v["constant market", "log loss"], at_most=0.50, on="specialists"),
            Claim("error at most .12", lambda v: v["constant market", "error"], at_most=0.12, on="specialists"),
            Claim(
                "experts own .95 of the wealth",
                lambda v: v["constant market", "wealth of experts"],
                at_least=0.95,
                on="specialists",
            ),
            *(
                Claim(
                    f"on {name} its log loss is below that of the {rival}",
                    partial(_difference, rival),
                    at_most=0.0,
                    on=name,
                )
                for name in _TABLES
                for rival in ("mean", "best single", "stacking", "log-opinion pool")
            ),
        ),
        minutes=2.0,
        lower=frozenset({"log loss", "error"}),
        room="judge",
    )
)
