"""Machine learning or a statistical model? (#35): five predictors of a table under one protocol, with what may be concluded.

After Pichler and Hartig, arXiv:2204.05023 (Methods in Ecology and Evolution 14, 2023). A regularised linear model, nearest
neighbours, a random forest, boosted trees and a small network are tuned and judged in nested folds: what tunes a model never sees
the rows that judge it. Rows of one block (a site, a person, a patch of land) stay in one fold, inside and outside; the same with
random folds stands beside it, and the difference is what random folds would have promised too much.

    score       accuracy of classes; of a number 1 - mean squared error / variance of all rows: R^2 when folds are averaged
                (R^2 inside a fold explodes where its rows differ little); beside that of the mean, or of the commonest class
    gap         score on its training rows minus score on its test rows: complexity that was found in the data and is not there
    p           of the mean difference d of K folds from the linear model, t = d / sqrt((1 / K + n_test / n_train) s^2), K - 1
                degrees of freedom (Nadeau and Bengio, 2003: folds share training rows: the plain test is too sure); q over all
    importance  how much of the score is lost when a column is permuted among the test rows
    together    the same for columns that correlate by .7 or more (ranks), permuted with each other

Importance is what a model uses. It is no causal effect: of two columns that say the same, a model may use either.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from manyheads.errors import InputError
from manyheads.evaluation.controls import q_values
from manyheads.evaluation.metrics import rank_correlation
from manyheads.inputs import check_choice, check_integer, check_seed
from manyheads.progress import Bar

try:
    from scipy.stats import t as student
    from sklearn.cluster import KMeans
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.ensemble import (
        HistGradientBoostingClassifier,
        HistGradientBoostingRegressor,
        RandomForestClassifier,
        RandomForestRegressor,
    )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError:
    raise InputError("judging predictors needs scikit-learn; install it: pip install 'manyheads[judge]'.") from None

LINEAR = "linear"
RIVALS = ("neighbours", "forest", "boosted trees", "network")
ALIKE = 0.7  # from which rank correlation on two columns may share an importance
GRID = 20  # points of a curve
Scoring = Callable[[Any, np.ndarray, np.ndarray], float]
MOST_CLASSES = 20


@dataclass(frozen=True)
class PredictorComparison:
    """What was found, as frames.

    `scores`: a row a model, kind of folds ("blocks" or "random") and fold, with `train` and `test`. `importance`: a row a model
    and column, with the loss and its standard error over folds. `together`: a row a model and pair of like columns, with the loss
    of each and of both. `curves`: partial dependence, a row a model, column and value, with the mean prediction (of the last
    class). `kind` is "number" or "classes".
    """

    kind: str
    scores: pd.DataFrame
    importance: pd.DataFrame
    together: pd.DataFrame
    curves: pd.DataFrame

    @property
    def folds(self) -> str:
        """The folds that count: blocks where there are any."""
        return "blocks" if (self.scores["folds"] == "blocks").any() else "random"

    @property
    def summary(self) -> pd.DataFrame:
        """A row a model, the best first: score, its spread over folds, the gap, p and q beside the linear model."""
        own = self.scores[self.scores["folds"] == self.folds]
        wide = own.pivot(index="fold", columns="model", values="test")
        gap = (own["train"] - own["test"]).groupby(own["model"]).mean()
        share = own.groupby("fold")["ratio"].first().mean()
        p = {name: _corrected_p(wide[name] - wide[LINEAR], share) for name in wide if name not in (LINEAR, "none")}
        table = pd.DataFrame({"score": wide.mean(), "spread": wide.std(ddof=1), "gap": gap, "p": pd.Series(p)})
        table["q"] = pd.Series(dict(zip(p, q_values(list(p.values())), strict=True)))
        return table.sort_values("score", ascending=False)

    @property
    def promised(self) -> pd.Series:
        """How much more each model scores in random folds than in folds of blocks; empty without blocks."""
        means = self.scores.pivot_table(index="model", columns="folds", values="test")
        return means["random"] - means["blocks"] if "blocks" in means else pd.Series(dtype=float)

    @property
    def remarks(self) -> list[str]:
        """What one should know before concluding anything, in sentences."""
        best = self.summary.index[0]
        said = []
        for row in self.together[self.together["model"] == best].itertuples():
            if row.both > 0:
                said.append(
                    f"{row.a} and {row.b} rise together (rank correlation {row.correlation:.2f}): their importance is shared, "
                    f"{row.alone_a:.3f} and {row.alone_b:.3f} alone, {row.both:.3f} together."
                )
        for name, more in self.promised.items():
            if name != "none" and more > 0.1:
                said.append(f"Random folds would have promised {name} {more:.2f} too much.")
        summary = self.summary
        if best not in (LINEAR, "none") and not summary.loc[best, "q"] <= 0.05:
            said.append(f"{best} is not clearly better than the linear model (q = {summary.loc[best, 'q']:.2g}).")
        if summary.index[0] == "none":
            said.append("No model is better than none.")
        return [*said, "Importance is what a model uses, not what causes the target."]


def spatial_blocks(places: Float[np.ndarray, "N 2"], blocks: int = 10, *, seed: int = 0) -> Shaped[np.ndarray, "N"]:
    """The patch, 0 to `blocks` - 1, of each place: k-means of the coordinates."""
    check_integer(blocks, "blocks", 2, 1000)
    if len(np.unique(places, axis=0)) < blocks:
        raise InputError(f"there are fewer than {blocks} different places; ask for fewer blocks.")
    return KMeans(blocks, n_init=3, random_state=check_seed(seed)).fit_predict(places)


def compare_predictors(
    x: Float[np.ndarray, "N D"],
    y: Shaped[np.ndarray, "N"],
    *,
    columns: Sequence[str] | None = None,
    blocks: Shaped[np.ndarray, "N"] | None = None,
    models: Sequence[str] = RIVALS,
    folds: int = 5,
    seed: int = 0,
    bar: Bar = Bar(),
) -> PredictorComparison:
    """Compare predictors of `y` under nested folds (formulas above). Words, or at most 20 whole numbers, are classes.

    The linear model is always among them, and so is "none", the mean or the commonest class.

    `InputError` for too few rows, rows of a class or blocks for the folds, and for a target with one value.
    """
    check_integer(folds, "folds", 2, 50)
    for model in models:
        check_choice(model, "a model", (LINEAR, *RIVALS))
    tried = {"none", LINEAR, *models}
    names = list(columns) if columns is not None else [f"x{j}" for j in range(x.shape[1])]
    classes = _is_classes(y)
    if len(np.unique(y)) < 2:
        raise InputError("the target has one value; there is nothing to predict.")
    if len(y) < 10 * folds:
        raise InputError(f"{len(y)} rows are too few for {folds} folds; give {10 * folds} at least.")
    if classes and np.unique(y, return_counts=True)[1].min() < 2 * folds:
        raise InputError(f"a class has fewer than {2 * folds} rows; leave it out, or take fewer folds.")
    if blocks is not None and len(np.unique(blocks)) < folds + 1:
        raise InputError(
            f"{len(np.unique(blocks))} blocks are too few for {folds} folds inside folds; take fewer folds."
        )
    target = np.unique(y, return_inverse=True)[1] if classes else y.astype(float)
    kinds = [("random", None)] if blocks is None else [("blocks", blocks), ("random", None)]
    step = bar.step("folds", folds * len(kinds))
    scores, losses, pairs, curves = [], [], [], []
    alike, score = _alike(x), _scoring(None if classes else float(target.var()))
    generator = np.random.default_rng(check_seed(seed))
    for kind, groups in kinds:
        for fold, (train, test) in enumerate(_folds(classes, groups, folds, seed).split(x, target, groups)):
            for name, model in _models(classes, seed, len(train), None if groups is None else groups[train]).items():
                if name not in tried:
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", ConvergenceWarning
                    )  # a network that could go on learning is a fair rival
                    found = model.fit(x[train], target[train], **_grouped(model, groups, train))
                got = score(found, x[test], target[test])
                ratio = len(test) / len(train)
                scores.append((name, kind, fold, score(found, x[train], target[train]), got, ratio))
                if kind == kinds[0][0] and name != "none":
                    lost = [_lost(score, found, x[test], target[test], [j], got, generator) for j in range(x.shape[1])]
                    losses += [(name, names[j], fold, one) for j, one in enumerate(lost)]
                    for a, b, how in alike:
                        both = _lost(score, found, x[test], target[test], [a, b], got, generator)
                        pairs.append((name, names[a], names[b], how, lost[a], lost[b], both))
                    if fold == 0:
                        curves += [
                            (name, names[j], *one) for j in range(x.shape[1]) for one in _curve(found, x, j, classes)
                        ]
            step(1)
    importance = pd.DataFrame(losses, columns=["model", "column", "fold", "loss"])
    grouped = importance.groupby(["model", "column"], sort=False)["loss"]
    together = pd.DataFrame(pairs, columns=["model", "a", "b", "correlation", "alone_a", "alone_b", "both"])
    return PredictorComparison(
        "classes" if classes else "number",
        pd.DataFrame(scores, columns=["model", "folds", "fold", "train", "test", "ratio"]),
        pd.DataFrame({"loss": grouped.mean(), "stderr": grouped.sem()}).reset_index(),
        together.groupby(["model", "a", "b", "correlation"], sort=False).mean().reset_index(),
        pd.DataFrame(curves, columns=["model", "column", "value", "prediction"]),
    )


def _is_classes(y: Shaped[np.ndarray, "N"]) -> bool:
    if not np.issubdtype(y.dtype, np.number):
        return True
    return bool((y == np.round(y)).all()) and len(np.unique(y)) <= min(MOST_CLASSES, len(y) // 10)


def _models(classes: bool, seed: int, rows: int, groups: Shaped[np.ndarray, "M"] | None) -> dict[str, Any]:
    """Fresh models by name, each tuned by inner folds of the same kind; "none" predicts the mean or the commonest class."""
    inner = _folds(classes, groups, 3, seed)

    def tuned(model: Any, **grid: Sequence[Any]) -> GridSearchCV:
        whole = make_pipeline(StandardScaler(), model)
        step = whole.steps[-1][0]
        return GridSearchCV(whole, {f"{step}__{name}": values for name, values in grid.items()}, cv=inner)

    near = [n for n in (3, 7, 15, 31) if n <= max(3, rows // 3)]
    trees = {"n_estimators": 100, "random_state": seed, "n_jobs": 1}
    net: dict[str, Any] = {"hidden_layer_sizes": (32,), "max_iter": 300, "random_state": seed}
    return {
        "none": DummyClassifier() if classes else DummyRegressor(),
        LINEAR: (
            tuned(LogisticRegression(max_iter=1000), C=[0.01, 0.1, 1, 10])
            if classes
            else tuned(Ridge(), alpha=[0.1, 1, 10, 100])
        ),
        "neighbours": tuned(KNeighborsClassifier() if classes else KNeighborsRegressor(), n_neighbors=near),
        "forest": tuned(
            RandomForestClassifier(**trees) if classes else RandomForestRegressor(**trees), min_samples_leaf=[1, 5, 20]
        ),
        "boosted trees": tuned(
            HistGradientBoostingClassifier(random_state=seed)
            if classes
            else HistGradientBoostingRegressor(random_state=seed),
            learning_rate=[0.03, 0.1],
            max_leaf_nodes=[7, 31],
        ),
        "network": (
            tuned(MLPClassifier(**net), alpha=[1e-3, 0.1, 1])
            if classes
            else tuned(
                TransformedTargetRegressor(MLPRegressor(**net), transformer=StandardScaler()),
                regressor__alpha=[1e-3, 0.1, 1],
            )
        ),
    }


def _folds(classes: bool, groups: Shaped[np.ndarray, "M"] | None, folds: int, seed: int) -> Any:
    if groups is not None:
        n = min(folds, len(np.unique(groups)))
        return StratifiedGroupKFold(n) if classes else GroupKFold(n)
    return (StratifiedKFold if classes else KFold)(folds, shuffle=True, random_state=seed)


def _grouped(model: Any, groups: Shaped[np.ndarray, "N"] | None, train: np.ndarray) -> dict[str, Any]:
    return {"groups": groups[train]} if groups is not None and isinstance(model, GridSearchCV) else {}


def _alike(x: Float[np.ndarray, "N D"]) -> list[tuple[int, int, float]]:
    varies = [j for j in range(x.shape[1]) if x[:, j].std() > 0]
    found = [(a, b, rank_correlation(x[:, a], x[:, b])) for i, a in enumerate(varies) for b in varies[i + 1 :]]
    return [(a, b, how) for a, b, how in found if abs(how) >= ALIKE]


def _scoring(variance: float | None) -> Scoring:
    """Accuracy, or with the variance of all rows the share of it that is predicted."""
    if variance is None:
        return lambda model, x, y: float(model.score(x, y))
    return lambda model, x, y: float(1 - np.mean((y - model.predict(x)) ** 2) / variance)


def _lost(
    score: Scoring,
    model: Any,
    x: Float[np.ndarray, "N D"],
    y: Shaped[np.ndarray, "N"],
    columns: list[int],
    whole: float,
    generator: np.random.Generator,
    times: int = 5,
) -> float:
    """How much of a score is lost when columns are permuted together."""
    lost = []
    for _ in range(times):
        moved = x.copy()
        moved[:, columns] = moved[generator.permutation(len(x))][:, columns]
        lost.append(whole - score(model, moved, y))
    return float(np.mean(lost))


def _curve(model: Any, x: Float[np.ndarray, "N D"], j: int, classes: bool) -> list[tuple[float, float]]:
    rows = x[:: max(1, len(x) // 200)]
    found = []
    for value in np.unique(np.quantile(x[:, j], np.linspace(0.02, 0.98, GRID))):
        moved = rows.copy()
        moved[:, j] = value
        out = model.predict_proba(moved)[:, -1] if classes else model.predict(moved)
        found.append((float(value), float(out.mean())))
    return found


def _corrected_p(differences: pd.Series, ratio: float) -> float:
    """Two-sided p of a mean difference over folds that share training rows (formula above); `ratio` = n_test / n_train."""
    k, spread = len(differences), float(differences.var(ddof=1))
    if spread == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    t = float(differences.mean()) / np.sqrt((1 / k + ratio) * spread)
    return float(2 * student.sf(abs(t), k - 1))
