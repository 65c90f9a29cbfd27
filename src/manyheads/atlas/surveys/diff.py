"""Two atlases side by side: which heads appeared, strengthened, weakened or vanished between two models or checkpoints.

For each behaviour and head, with scores a and b and standard errors e_a and e_b over examples,

    change = b - a,    z = change / sqrt(e_a^2 + e_b^2)

A head *appeared* if it reaches the behaviour's threshold in b only, *vanished* if in a only, and *strengthened* or *weakened* if
it reaches it in both. A call is sure if |z| >= 2; scores read off the weights have no error, so that every change of theirs is.
Scores of a single example have an unknown one, so that no change of theirs is.
Effects are of ablating each head alone, in the judge's unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from manyheads.atlas.core.result import Atlas
from manyheads.atlas.core.roles import roles
from manyheads.atlas.surveys.stability import rank_agreement
from manyheads.errors import InputError
from manyheads.files import write_folder_atomically
from manyheads.report import Reported

CALLS = ("appeared", "strengthened", "weakened", "vanished")
SURE = 2.0  # |z| from which a change counts as more than chance


@dataclass(frozen=True)
class AtlasDiff(Reported):
    """What changed from atlas `a` to atlas `b`.

    `heads` has a row a behaviour and head (score_a, score_b, change, z, call, surely, effect_a, effect_b), `roles` a row a head
    whose roles differ, `checks` a row a behaviour and mode of ablation (effect, p and q in both); `agreement` is Spearman's
    correlation of the two models' scores, by behaviour, 1 for equal ones and NaN where only one of them has all heads equal.
    """

    a: Atlas
    b: Atlas
    heads: pd.DataFrame
    roles: pd.DataFrame
    checks: pd.DataFrame
    agreement: dict[str, float]

    def of(self, call: str) -> pd.DataFrame:
        """The rows called "appeared", "vanished", "strengthened" or "weakened", the largest changes first."""
        rows = self.heads[self.heads["call"] == call]
        return rows.reindex(rows["change"].abs().sort_values(ascending=False, kind="stable").index)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write `heads.parquet`, `roles.parquet`, `checks.parquet` and `diff.html` into `folder`, all or nothing."""

        def write(into: Path) -> None:
            for name in ("heads", "roles", "checks"):
                getattr(self, name).to_parquet(into / f"{name}.parquet", index=False)
            self.report(into / "diff.html")

        return write_folder_atomically(folder, write, force=force)


def diff(a: Atlas, b: Atlas, behaviours: Sequence[str] | None = None) -> AtlasDiff:
    """Compare two atlases of models with equally many layers and heads, in all behaviours that both have or in those named.

    `InputError` where they share nothing to compare, or one of them has no behaviour of that name.
    """
    if a.shape != b.shape:
        raise InputError(
            f"the models differ in shape, {a.shape[0]} layers of {a.shape[1]} heads and {b.shape[0]} of {b.shape[1]}: "
            "their heads cannot be compared one by one."
        )
    for name in behaviours or []:
        _ = a[name], b[name]
    shared = [name for name in a.scores if name in b.scores and (behaviours is None or name in behaviours)]
    if not shared:
        raise InputError("the two atlases have no behaviour in common; survey both for the same ones.")
    heads = pd.concat([_heads(a, b, name) for name in shared], ignore_index=True)
    agreement = {name: rank_agreement([a[name], b[name]]) for name in shared}
    return AtlasDiff(a, b, heads, _roles(a, b, set(shared)), _checks(a, b, shared), agreement)


def _heads(a: Atlas, b: Atlas, name: str) -> pd.DataFrame:
    before, after, threshold = a[name], b[name], a.about[name]["threshold"]
    change = after.values - before.values
    error = np.sqrt(before.stderr**2 + after.stderr**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(change == 0, 0.0, change / error)
    had, has = before.values >= threshold, after.values >= threshold
    call = np.select(
        [~had & has, had & ~has, had & has & (change > 0), had & has & (change < 0)],
        ["appeared", "vanished", "strengthened", "weakened"],
        "",
    )
    frame = before.to_frame()[["head", "layer", "index"]].assign(
        behaviour=name,
        score_a=before.values.ravel(),
        score_b=after.values.ravel(),
        change=change.ravel(),
        z=z.ravel(),
        call=call.ravel(),
        surely=(np.abs(z) >= SURE).ravel(),
    )
    judge = a.about[name].get("judge", "")
    for side, atlas in (("a", a), ("b", b)):
        effects = atlas.effects.get(judge)
        frame[f"effect_{side}"] = np.nan if effects is None else effects.values.ravel()
    return frame


def _roles(a: Atlas, b: Atlas, shared: set[str]) -> pd.DataFrame:
    before, after = (
        {head: shared & {role.behaviour for role in held.roles} for head, held in roles(atlas).items()}
        for atlas in (a, b)
    )
    rows = [
        {
            "head": str(head),
            "gained": ", ".join(sorted(after[head] - before[head])),
            "lost": ", ".join(sorted(before[head] - after[head])),
            "kept": ", ".join(sorted(before[head] & after[head])),
        }
        for head in before
        if before[head] != after[head]
    ]
    return pd.DataFrame(rows, columns=["head", "gained", "lost", "kept"])


def _checks(a: Atlas, b: Atlas, shared: list[str]) -> pd.DataFrame:
    columns = ["behaviour", "mode", "heads", "clean", "effect", "random", "p", "q"]
    one, other = (frame[frame["behaviour"].isin(shared)] for frame in (x.checks_frame()[columns] for x in (a, b)))
    return one.merge(other, on=["behaviour", "mode"], how="outer", suffixes=("_a", "_b"), sort=False)
