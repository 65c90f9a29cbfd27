"""What a comparison of predictors must find (#35), on tables whose truth is known.

- **alike**: y = x1 + noise, x2 = x1 + little noise: importance is shared with x2, which causes nothing, and that is said;
- **interaction**: the class is whether the signs of two columns differ: no line can see it;
- **near places**: four smooth fields over a map and a fifth to predict, all independent: random folds find places again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from jaxtyping import Float, Shaped

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.judge.tables.model_comparison import LINEAR, RIVALS, compare_predictors, spatial_blocks


def known_table(kind: str, seed: int) -> tuple[Float[np.ndarray, "N D"], Shaped[np.ndarray, "N"], np.ndarray | None]:
    """Columns, target, and patches of the map, of one of the three kinds above."""
    draw = np.random.default_rng(seed)
    if kind == "alike":
        x1 = draw.normal(size=150)
        x = np.stack([x1, x1 + 0.1 * draw.normal(size=150), draw.normal(size=150)], 1)
        return x, x1 + 0.5 * draw.normal(size=150), None
    if kind == "interaction":
        x = draw.normal(size=(240, 3))
        return x, np.where((x[:, 0] > 0) ^ (x[:, 1] > 0), "yes", "no"), None
    places = draw.uniform(size=(300, 2))
    waves = [(draw.normal(scale=6, size=(12, 2)), draw.uniform(0, 2 * np.pi, 12)) for _ in range(5)]
    fields = np.stack([np.cos(places @ w.T + start).sum(1) / 6**0.5 for w, start in waves], 1)
    return fields[:, :4], fields[:, 4], spatial_blocks(places, 8, seed=seed)


def _run(model: str, kind: str, seed: int) -> Mapping[str, float]:
    x, y, blocks = known_table(kind, seed)
    columns = [f"x{j + 1}" for j in range(x.shape[1])]
    found = compare_predictors(x, y, columns=columns, blocks=blocks, models=[model], folds=4, seed=seed)
    lost = found.importance.set_index(["model", "column"])["loss"]
    return {
        "score": float(found.summary.loc[model, "score"]),
        "promised too much": float(found.promised.get(model, 0.0)),
        "lost without x1": float(lost[model, "x1"]),
        "sharing said": float(any("importance is shared" in one for one in found.remarks)),
    }


register_experiment(
    Experiment(
        "comparison",
        (35,),
        "2204.05023",
        "Does one protocol find shared importance, interactions, and what random folds promise too much?",
        datasets=lambda quick: {kind: kind for kind in ("alike", "interaction", "near places")},
        methods={name: partial(_run, name) for name in (LINEAR, *RIVALS)},
        baseline=LINEAR,
        claims=(
            Claim(
                "of two columns that say the same, sharing is said",
                lambda v: v["forest", "sharing said"],
                at_least=1.0,
                on="alike",
            ),
            Claim(
                "where only an interaction matters, boosted trees beat the line by .3 of accuracy",
                lambda v: v["boosted trees", "score"] - v[LINEAR, "score"],
                at_least=0.3,
                on="interaction",
            ),
            Claim(
                "and so does a forest",
                lambda v: v["forest", "score"] - v[LINEAR, "score"],
                at_least=0.3,
                on="interaction",
            ),
            Claim(
                "on a map random folds promise a forest .1 of R2 too much",
                lambda v: v["forest", "promised too much"],
                at_least=0.1,
                on="near places",
            ),
        ),
        minutes=2.0,
        room="judge",
    )
)
