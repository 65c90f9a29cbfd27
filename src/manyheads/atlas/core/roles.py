"""Roles: what a head does, in one line, with how sure that is. Read off an atlas; nothing is run.

A head has a role for each behaviour whose threshold it reaches. With score s and standard error e over examples,

    confidence = Phi((s - threshold) / e)        the chance that fresh examples would again put the head above the threshold

(1 where a score is read off the weights; unknown, NaN, where it is of a single example). `p_value` is that of the behaviour's
first causal check, mean ablation, if the head was of the ablated set: it is of the set, since ablating one of several
redundant heads shows nothing. A head with roles of more than one kind is polysemantic. Where a head rests when it finds nothing
is a trait, not a role; and a silent head, whose write is next to nothing, has neither, wherever it looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from manyheads.atlas.core.result import Atlas
from manyheads.heads import Head, HeadLike

MANY = 3  # roles named in a line before "and 2 more"


@dataclass(frozen=True)
class Role:
    """One behaviour of one head. `effect` is what ablating the head alone costs the behaviour's judge, in the judge's unit."""

    behaviour: str
    kind: str
    score: float
    stderr: float
    confidence: float
    p_value: float | None
    effect: float | None

    def __str__(self) -> str:
        error = f" ± {self.stderr:.2f}" if self.stderr > 0 else ""
        p = "" if self.p_value is None else f", ablation p = {self.p_value:.3f}"
        return f"{self.behaviour.replace('_', ' ')} ({self.score:.2f}{error}{p})"


@dataclass(frozen=True)
class HeadRoles:
    """Everything one head was found to do, the surest first; traits beside the roles."""

    head: Head
    roles: tuple[Role, ...]
    traits: tuple[Role, ...] = ()
    silent: bool = False

    @property
    def polysemantic(self) -> bool:
        """Whether its roles are of more than one kind."""
        return len({role.kind for role in self.roles}) > 1

    def __str__(self) -> str:
        if self.silent:
            return f"{self.head}: silent (it writes next to nothing)"
        traits = "".join(f"; {trait}" for trait in self.traits)
        if not self.roles:
            return f"{self.head}: no role found{traits}"
        first, *others = self.roles
        also = f"; also {', '.join(str(role) for role in others[: MANY - 1])}" if others else ""
        rest = f" and {len(self.roles) - MANY} more" if len(self.roles) > MANY else ""
        return f"{self.head}: {first}{also}{rest}{' [polysemantic]' if self.polysemantic else ''}{traits}"


def roles(atlas: Atlas) -> dict[Head, HeadRoles]:
    """The roles of every head of an atlas, heads in order of layer and index."""
    n_layers, n_heads = atlas.shape
    return {
        head: roles_of(atlas, head) for head in (Head(layer, i) for layer in range(n_layers) for i in range(n_heads))
    }


def roles_of(atlas: Atlas, head: HeadLike) -> HeadRoles:
    """The roles of one head."""
    head = Head.of(head)
    if str(head) in atlas.card.get("silent", ()):
        return HeadRoles(head, (), silent=True)
    found = [name for name in atlas.scores if atlas[name].values[head] >= _threshold(atlas, name)]
    parts: tuple[list[Role], list[Role]] = ([], [])
    for name in found:
        parts[bool(atlas.about[name].get("trait"))].append(_role(atlas, name, head))
    roles_, traits = (tuple(sorted(part, key=_sureness)) for part in parts)
    return HeadRoles(head, roles_, traits)


def roles_frame(atlas: Atlas) -> pd.DataFrame:
    """A row a head and role: head, behaviour, kind, score, stderr, confidence, p_value, effect, polysemantic."""
    rows = [
        {"head": str(head), **vars(role), "polysemantic": held.polysemantic}
        for head, held in roles(atlas).items()
        for role in held.roles
    ]
    columns = ["head", *Role.__dataclass_fields__, "polysemantic"]
    return pd.DataFrame(rows, columns=columns)


def _threshold(atlas: Atlas, name: str) -> float:
    """The score from which on a head counts as found; infinite where the behaviour has no such score."""
    threshold = atlas.about.get(name, {}).get("threshold")
    return math.inf if threshold is None else float(threshold)


def _role(atlas: Atlas, name: str, head: Head) -> Role:
    scores, about = atlas[name], atlas.about.get(name, {})
    score, stderr = float(scores.values[head]), float(scores.stderr[head])
    check = next((check for check in atlas.checks if check.behaviour == name), None)
    effects = atlas.effects.get(about.get("judge", ""))
    return Role(
        behaviour=name,
        kind=about.get("kind") or name,
        score=score,
        stderr=stderr,
        confidence=_above(score - _threshold(atlas, name), stderr, scores.n),
        p_value=check.p_value if check is not None and str(head) in check.heads else None,
        effect=None if effects is None else float(effects.values[head]),
    )


def _above(margin: float, stderr: float, n: int) -> float:
    """The normal distribution's share above the threshold."""
    if math.isnan(stderr) or (stderr == 0 and n == 1):  # one example has no spread
        return float("nan")
    if stderr == 0:
        return 1.0
    return 0.5 * (1 + math.erf(margin / stderr / math.sqrt(2)))


def _sureness(role: Role) -> tuple[bool, float, float]:
    """The causally checked first, then by p, then by score."""
    return role.p_value is None, role.p_value or 0.0, -role.score
