"""Atlas: every score of one model, each with its causal check; what `survey` returns and the report shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors.numpy import save_file

from manyheads.errors import InputError, MismatchError
from manyheads.evaluation.controls import Control, p_value, q_values
from manyheads.files import write_folder_atomically
from manyheads.heads import HeadScores, HeadSet
from manyheads.inputs import clause, read_object, read_tensors

if TYPE_CHECKING:
    from manyheads.model.headmodel import HeadModel
from manyheads.report import Reported

FORMAT = 2


@dataclass(frozen=True)
class CausalCheck:
    """What ablating a behaviour's top heads does to a task, beside random heads matched by layer.

    `effect` is `clean - ablated` of `metric` (mean over `n` examples, in the metric's unit; positive: the heads helped) with its
    standard error over examples; `random_effects` the same for each of the R different random sets; `p_value` how rarely one of
    them is as large (see `evaluation/controls.py`).
    """

    behaviour: str
    mode: str
    heads: tuple[str, ...]
    metric: str
    n: int
    clean: float
    ablated: float
    effect: float
    stderr: float
    random_effects: tuple[float, ...]
    p_value: float

    @classmethod
    def of(
        cls,
        behaviour: str,
        mode: str,
        heads: HeadSet,
        metric: str,
        clean: Float[np.ndarray, "N"],
        ablated: Float[np.ndarray, "S N"],
        *,
        sign: Literal[1, -1] = 1,
    ) -> CausalCheck:
        """From the metric of each example, clean and with each set ablated: `heads` first, then R random sets.

        With `sign` -1 the claim is that the effect is small or negative, and p counts random sets that are as small.
        """
        control = Control.of(clean[None] - ablated)
        return cls(
            behaviour=behaviour,
            mode=mode,
            heads=tuple(str(h) for h in heads),
            metric=metric,
            n=len(clean),
            clean=float(clean.mean()),
            ablated=float(ablated[0].mean()),
            effect=control.effect,
            stderr=control.stderr,
            random_effects=control.random,
            p_value=p_value(sign * control.effect, sign * np.array(control.random)),
        )

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> CausalCheck:
        """From what `asdict` gave. `KeyError`, `TypeError` or `ValueError` for anything else."""
        heads, random = (str(head) for head in saved["heads"]), (float(effect) for effect in saved["random_effects"])
        return cls(**{**saved, "heads": tuple(heads), "random_effects": tuple(random)})

    def __str__(self) -> str:
        sets = f"{len(self.random_effects)} random sets {self.random_mean:.2f} ± {self.random_spread:.2f}"
        return (
            f"{self.behaviour}, {self.mode} ablation of {', '.join(self.heads)}: {self.metric} {self.clean:.2f} -> "
            f"{self.ablated:.2f}, effect {self.effect:.2f} ± {self.stderr:.2f}, {sets}, p = {self.p_value:.3f}"
        )

    @property
    def random_mean(self) -> float:
        """Mean effect of the random sets; NaN if the layers allow no other set."""
        return self._control.mean

    @property
    def random_spread(self) -> float:
        """Standard deviation of the random sets' effects; NaN for fewer than two."""
        return self._control.spread

    @property
    def least_p(self) -> float:
        """The smallest p that so many random sets can show."""
        return self._control.least_p

    @property
    def _control(self) -> Control:
        return Control(self.effect, self.stderr, self.random_effects)


@dataclass(frozen=True)
class Agreement:
    """How well rankings of one behaviour agree over `seeds` draws of its inputs (see `stability`)."""

    rank: float
    top: float
    seeds: int


@dataclass(frozen=True)
class PatternExample:
    """One head's attention on one example, to be looked at: `pattern` `[T, T]`, rows are queries."""

    behaviour: str
    head: str
    tokens: tuple[str, ...]
    pattern: Float[np.ndarray, "T T"]


@dataclass(frozen=True)
class Atlas(Reported):
    """Scores, checks and example patterns of one model.

    `effects[judge]` is what ablating each head alone costs that judge (`clean - ablated` of its metric); `agreement[name]` how
    well fresh inputs rank the heads as these do, if more than one seed was asked for.
    `about[name]` is what a behaviour's score means (title, formula, unit, threshold); `skipped[name]` why a behaviour was
    left out; `card` what the model is and how the atlas was made (fingerprint, settings, seed, version, seconds).
    """

    scores: dict[str, HeadScores]
    checks: list[CausalCheck] = field(default_factory=list)
    patterns: list[PatternExample] = field(default_factory=list)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    effects: dict[str, HeadScores] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_layers, n_heads)`."""
        return next(iter(self.scores.values())).shape

    def __getitem__(self, behaviour: str) -> HeadScores:
        if behaviour not in self.scores:
            raise InputError(f"this atlas has no {behaviour!r}; it has {', '.join(self.scores)}.")
        return self.scores[behaviour]

    def found(self, behaviour: str) -> HeadSet:
        """The heads whose score reaches the behaviour's threshold, without silent ones, which write next to nothing."""
        return self[behaviour].above(self.about[behaviour]["threshold"]) - HeadSet(self.card.get("silent", ()))

    def q_values(self) -> tuple[float, ...]:
        """The q-value of each of `checks`, in their order: they are one family of claims (see `evaluation/controls.py`)."""
        return tuple(map(float, q_values([check.p_value for check in self.checks])))

    def checks_frame(self) -> pd.DataFrame:
        """A row a check: behaviour, mode, heads, metric, n, clean, ablated, effect, stderr, random (mean), spread, sets, p, q."""
        rows = [
            (
                check.behaviour,
                check.mode,
                ", ".join(check.heads),
                *(check.metric, check.n, check.clean, check.ablated, check.effect, check.stderr),
                *(check.random_mean, check.random_spread, len(check.random_effects), check.p_value),
            )
            for check in self.checks
        ]
        columns = "behaviour mode heads metric n clean ablated effect stderr random spread sets p".split()
        return pd.DataFrame(rows, columns=columns).assign(q=self.q_values())

    def to_frame(self) -> pd.DataFrame:
        """All scores, a row a behaviour and head."""
        return _frame(self.scores)

    def save(
        self,
        folder: str | Path,
        *,
        report: bool = False,
        also: Callable[[Path], object] | None = None,
        force: bool = False,
    ) -> Path:
        """Write scores, effects, checks, patterns (Parquet, JSON, safetensors) and `report.html` to `folder`, all or nothing.

        `also(folder)` adds other files.
        """

        def write(into: Path) -> None:
            self.to_frame().to_parquet(into / "scores.parquet", index=False)
            _frame(self.effects).to_parquet(into / "effects.parquet", index=False)
            (into / "atlas.json").write_text(json.dumps(self._json(), indent=1), "utf-8")
            arrays = {str(i): np.ascontiguousarray(p.pattern) for i, p in enumerate(self.patterns)}
            save_file(arrays, into / "patterns.safetensors")
            if report:
                self.report(into / "report.html")
            if also is not None:
                also(into)

        return write_folder_atomically(folder, write, force=force)

    def _json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "card": self.card,
            "about": self.about,
            "skipped": self.skipped,
            "scores": {name: _about(scores) for name, scores in self.scores.items()},
            "effects": {name: _about(scores) for name, scores in self.effects.items()},
            "agreement": {name: asdict(agreement) for name, agreement in self.agreement.items()},
            "checks": [asdict(check) for check in self.checks],
            "patterns": [{"behaviour": p.behaviour, "head": p.head, "tokens": p.tokens} for p in self.patterns],
        }

    @classmethod
    def load(cls, folder: str | Path, model: HeadModel | None = None) -> Atlas:
        """Read what `save` wrote. With `model`, `MismatchError` if the atlas is of another one."""
        folder = Path(folder)
        if not (folder / "atlas.json").is_file():
            raise InputError(f"{folder} is not an atlas: there is no atlas.json in it.")
        try:
            about = read_object(folder / "atlas.json")
            frame = pd.read_parquet(folder / "scores.parquet")
            effects = pd.read_parquet(folder / "effects.parquet")
            arrays = {name: array.numpy() for name, array in read_tensors(folder / "patterns.safetensors").items()}
            atlas = cls(
                scores={name: _scores(name, frame, **saved) for name, saved in about["scores"].items()},
                checks=[CausalCheck.from_json(saved) for saved in about["checks"]],
                patterns=[
                    PatternExample(p["behaviour"], p["head"], tuple(p["tokens"]), arrays[str(i)])
                    for i, p in enumerate(about["patterns"])
                ],
                effects={name: _scores(name, effects, **saved) for name, saved in about["effects"].items()},
                agreement={name: Agreement(**saved) for name, saved in about["agreement"].items()},
                about=about["about"],
                skipped=about["skipped"],
                card=about["card"],
            )
        except Exception as error:
            raise InputError(
                f"{folder} is damaged or not an atlas of format {FORMAT} ({clause(error)}); make it again."
            ) from error
        if model is not None and atlas.card.get("fingerprint") != model.fingerprint:
            raise MismatchError(
                f"{folder} is an atlas of {atlas.card.get('model')} ({atlas.card.get('fingerprint')}), not of this model "
                f"({model.fingerprint}); open that model, or survey this one."
            )
        return atlas


def _frame(scores: dict[str, HeadScores]) -> pd.DataFrame:
    """A row a key of `scores`, called its behaviour, and head."""
    frames = [one.to_frame().assign(behaviour=name) for name, one in scores.items()]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"behaviour": []})


def _about(scores: HeadScores) -> dict[str, Any]:
    return {"name": scores.name, "n": scores.n, "shape": scores.shape, "meta": scores.meta}


def _scores(key: str, frame: pd.DataFrame, name: str, n: int, shape: list[int], meta: dict[str, Any]) -> HeadScores:
    rows = frame[frame["behaviour"] == key].sort_values(["layer", "index"])
    values, stderr = (rows[column].to_numpy().reshape(shape) for column in ("score", "stderr"))
    return HeadScores(name, values, stderr, n, meta)
