"""AutoInt (#124): columns of a table as tokens, whose attention heads make and show feature crosses.

Song et al., arXiv:1810.11921. Column m becomes a vector e_m: a row of a table for a kind, x_m v_m for a number. In every layer,
without positions and without a mask, each of H heads attends over columns, and all of them together give

    e'_m  =  ReLU(concat over h of sum_k softmax_k(<Q_h e_m, K_h e_k>) V_h e_k  +  R e_m)

A column of the next layer is a cross of up to twice as many columns. The trunk hands on all columns side by side, [B, M d'].
`variant="paper"` is this; "code" is the authors' program: ReLU on all four projections, scores over sqrt(d' / H), a layer norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Labelled, table
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, auc, register_experiment
from manyheads.inputs import check_choice, check_integer
from manyheads.learning import Attached, LinearHead, LinearSettings, MultiHead, Trunk
from manyheads.training import ADAM, TrainSettings, row_batches

DEFAULT = replace(ADAM, epochs=60, rows=64, rate=1e-3, decay=0.5, patience=10)


class FieldAttention(nn.Module):
    """The trunk: `numbers` columns of numbers, and a column of kinds for each entry of `kinds`, which says how many there are.

    `dim` is the width of a column before the first layer, `width` behind every layer, shared by `heads` attention heads.
    """

    def __init__(
        self,
        numbers: int,
        kinds: Sequence[int] = (),
        *,
        dim: int = 16,
        width: int = 32,
        heads: int = 2,
        layers: int = 3,
        variant: Literal["paper", "code"] = "paper",
        start: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice(variant, "variant", ("paper", "code"))
        if numbers + len(kinds) < 1 or width % check_integer(heads, "heads", 1):
            raise InputError(
                f"{numbers + len(kinds)} columns and {width} / {heads} heads; give a column, and heads that divide it."
            )
        self.heads, self.variant = heads, variant
        self.fields = numbers + len(kinds)
        draw = torch.Generator().manual_seed(seed)
        self.directions = nn.Parameter(start * torch.randn(numbers, dim, generator=draw))
        tables = [nn.Embedding(count + 1, dim) for count in kinds]  # the last row is a kind never seen
        sizes = [dim, *[width] * check_integer(layers, "layers", 1)]
        projections = [nn.Linear(size, 4 * width, bias=False) for size in sizes[:-1]]
        self.norms = nn.ModuleList(nn.LayerNorm(width) if variant == "code" else nn.Identity() for _ in sizes[1:])
        with torch.no_grad():
            for look in tables:
                look.weight.copy_(start * torch.randn(look.weight.shape, generator=draw))
            for layer in projections:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) / layer.in_features**0.5)
        self.tables, self.projections = nn.ModuleList(tables), nn.ModuleList(projections)

    def forward(self, numbers: Float[Tensor, "B Mn"], kinds: Int[Tensor, "B Mk"] | None = None) -> Float[Tensor, "B F"]:
        """All columns behind the last layer, side by side; columns of numbers come first."""
        return self._run(numbers, kinds)[0].flatten(1)

    def patterns(
        self, numbers: Float[Tensor, "B Mn"], kinds: Int[Tensor, "B Mk"] | None = None
    ) -> Float[Tensor, "L B H M M"]:
        """Attention of every layer and head, from columns (rows) to columns."""
        return torch.stack(self._run(numbers, kinds)[1])

    def _run(self, numbers: Tensor, kinds: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        parts = [numbers[..., None] * self.directions]
        if kinds is not None:
            parts += [look(column)[:, None] for look, column in zip(self.tables, kinds.unbind(1), strict=True)]
        e, seen = torch.cat(parts, 1), []
        for project, norm in zip(self.projections, self.norms, strict=True):
            projected = project(e).relu() if self.variant == "code" else project(e)
            q, k, v, residual = projected.chunk(4, -1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
            scores = q @ k.mT / (q.shape[-1] ** 0.5 if self.variant == "code" else 1.0)
            pattern = scores.softmax(-1)
            e = norm(F.relu((pattern @ v).transpose(1, 2).flatten(2) + residual))
            seen.append(pattern)
        return e, seen


@dataclass
class AutoInt:
    """A classifier of tables: `fit(X, y)`, `predict_proba(X)`, and `interactions(X)`, which says what columns it crosses.

    X is a data frame or an array. Columns of text, categories or booleans are kinds; a kind never seen has a row of its own.
    Columns of numbers are scaled to a mean of 0 and a standard deviation of 1. A fifth of the rows judges: the best state is
    kept.
    """

    settings: TrainSettings = DEFAULT
    dim: int = 16
    width: int = 32
    heads: int = 2
    layers: int = 3
    variant: Literal["paper", "code"] = "paper"

    def fit(self, X: pd.DataFrame | np.ndarray, y: Any) -> AutoInt:
        """Learn from rows and their classes."""
        frame, y = pd.DataFrame(X), np.asarray(y)
        if len(frame) != len(y) or len(frame) < 5:
            raise InputError(f"X has {len(frame)} rows and y {len(y)}; give as many of both, at least 5.")
        self.columns_ = list(frame.columns)
        self.kinds_ = {
            name: pd.Index(frame[name].astype(str).unique())
            for name in frame.columns
            if not pd.api.types.is_numeric_dtype(frame[name]) or pd.api.types.is_bool_dtype(frame[name])
        }
        numeric = frame.drop(columns=list(self.kinds_))
        self.mean_, self.scale_ = numeric.mean(), numeric.std(ddof=0).replace(0, 1)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        seed = self.settings.seed
        counts = [len(kinds) for kinds in self.kinds_.values()]
        shape = {
            "dim": self.dim,
            "width": self.width,
            "heads": self.heads,
            "layers": self.layers,
            "variant": self.variant,
        }
        trunk = FieldAttention(numeric.shape[1], counts, **shape, seed=seed)  # type: ignore[arg-type]
        head = LinearHead(LinearSettings(self.width * trunk.fields, len(self.classes_), seed))
        self.heads_ = MultiHead(Trunk(trunk, frozen=False), {"y": Attached(head)})
        rows = self._rows(frame) | {"y": torch.tensor(numbers)}
        order = torch.randperm(len(frame), generator=torch.Generator().manual_seed(seed))
        held = max(1, len(frame) // 5)
        learned, judged = (
            {name: values[part] for name, values in rows.items()} for part in (order[held:], order[:held])
        )
        settings = self.settings.for_examples(len(frame) - held)
        batches = row_batches(learned, settings.rows, seed)
        self.heads_.fit(batches, settings, judge=lambda: float(self.heads_.losses(judged)["y"]), log_every=1_000_000)
        return self

    @torch.no_grad()
    def predict_proba(self, X: pd.DataFrame | np.ndarray) -> Float[np.ndarray, "N C"]:
        """The probability of each class, in the order of `classes_`."""
        return self.heads_(self._rows(X))["y"].softmax(-1).numpy()

    def predict(self, X: pd.DataFrame | np.ndarray) -> np.ndarray:
        """The likeliest class of each row."""
        return self.classes_[self.predict_proba(X).argmax(-1)]

    @torch.no_grad()
    def interactions(self, X: pd.DataFrame | np.ndarray, layer: int = 0) -> pd.DataFrame:
        """A row a pair of columns, a, b and the attention between them (both directions, all heads, mean over rows), most first.

        What attention shows is where a layer looks, and not what a prediction needs: ablate columns to know that.
        """
        rows = self._rows(X)
        pattern = self.heads_.trunk.module.patterns(rows["numbers"], rows.get("kinds"))[layer].mean((0, 1))
        names = [name for name in self.columns_ if name not in self.kinds_] + list(self.kinds_)
        n = len(names)
        pairs = [(names[i], names[j], float(pattern[i, j] + pattern[j, i])) for i in range(n) for j in range(i + 1, n)]
        found = pd.DataFrame(pairs, columns=["a", "b", "attention"])
        return found.sort_values("attention", ascending=False, ignore_index=True)

    def _rows(self, X: pd.DataFrame | np.ndarray) -> dict[str, Tensor]:
        frame = pd.DataFrame(X)
        if list(frame.columns) != self.columns_:
            raise InputError(f"X has the columns {list(frame.columns)}; it was fitted on {self.columns_}.")
        numeric = (frame.drop(columns=list(self.kinds_)) - self.mean_) / self.scale_
        values = numeric.to_numpy(dtype=np.float32)
        if not np.isfinite(values).all():
            raise InputError("X holds NaN or infinity; fill these in, or leave the rows out.")
        rows = {"numbers": torch.tensor(values)}
        if self.kinds_:
            codes = [kinds.get_indexer(pd.Index(frame[name].astype(str))) for name, kinds in self.kinds_.items()]
            codes = [
                np.where(code < 0, len(kinds), code) for code, kinds in zip(codes, self.kinds_.values(), strict=True)
            ]
            rows["kinds"] = torch.tensor(np.stack(codes, 1))
        return rows


def log_squared(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The paper's scaling of counts: floor(ln(x)^2) where x > 2, and x as it is below."""
    x = np.asarray(x, dtype=np.float64)
    return np.where(x > 2, np.floor(np.log(np.maximum(x, 2)) ** 2), x)


# Does it find crosses that a linear model cannot have, and what is it worth on real tables?


def _xor(seed: int, n: int = 4000) -> Labelled:
    """Ten random bits; the class is the exclusive or of the third and the eighth, wrong one time in twenty."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (n, 10))
    y = (bits[:, 2] ^ bits[:, 7]) ^ (rng.random(n) < 0.05)
    return Labelled(2.0 * bits - 1, y.astype(int))


def _fitted(make: Callable[[int], Any]) -> Callable[[Callable[[int], Labelled], int], dict[str, float]]:
    def run(data: Callable[[int], Labelled], seed: int) -> dict[str, float]:
        rows = data(seed)
        order = np.random.default_rng(seed).permutation(len(rows))
        cut = round(0.7 * len(rows))
        train, test = rows[order[:cut]], rows[order[cut:]]
        model = make(seed).fit(train.x, train.y)
        found = {"auc": auc(model.predict_proba(test.x)[:, 1], test.y == 1)}
        if isinstance(model, AutoInt) and test.x.shape[1] == 10:
            first = model.interactions(test.x).iloc[0]
            found["pair first"] = float({first["a"], first["b"]} == {2, 7})
        return found

    return run


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _network(seed: int) -> Any:
    from manyheads.predict.estimators import HeadClassifier

    return HeadClassifier(hidden=(64, 64), epochs=30, random_state=seed)


def _beyond(values: Mapping[tuple[str, str], float]) -> float:
    return values["attention", "auc"] - values["logistic", "auc"]


register_experiment(
    Experiment(
        "autoint",
        (124,),
        "1810.11921",
        "Do attention heads over columns find crosses of features?",
        datasets=lambda quick: {
            "xor": lambda seed: _xor(seed, 1500 if quick else 4000),
            "breast_cancer": lambda seed: table("breast_cancer"),
        },
        methods={
            "logistic": _fitted(_logistic),
            "network": _fitted(_network),
            "attention": _fitted(lambda seed: AutoInt(replace(DEFAULT, seed=seed))),
        },
        baseline="logistic",
        claims=(
            Claim("it finds the cross (AUC)", lambda v: v["attention", "auc"], at_least=0.93, on="xor"),
            Claim("a linear model cannot", lambda v: v["logistic", "auc"], at_most=0.55, on="xor"),
            Claim(
                "the planted pair has the most attention",
                lambda v: v["attention", "pair first"],
                at_least=1.0,
                on="xor",
            ),
            Claim(
                "it is worth more than a plain network",
                lambda v: v["attention", "auc"] - v["network", "auc"],
                at_least=0.0,
            ),
            Claim("on a real table it is no worse than a linear model", _beyond, at_least=-0.005, on="breast_cancer"),
        ),
        minutes=2,
    )
)
