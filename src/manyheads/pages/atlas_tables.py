"""The atlas in a terminal: a row a behaviour, or the heads of one behaviour."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table
from rich.text import Text

from manyheads.atlas.core.result import Atlas, CausalCheck
from manyheads.atlas.core.roles import roles
from manyheads.atlas.surveys.diff import CALLS, AtlasDiff
from manyheads.errors import InputError
from manyheads.heads import Head, HeadSet
from manyheads.report.families import Family, families_of
from manyheads.report.numbers import count, format_p, number, or_dash, plus_minus

SIGNIFICANT = 0.05


def families(atlas: Atlas) -> dict[str, Family]:
    """The family of each behaviour of an atlas; one without a kind is a family by itself."""
    return families_of({name: str(atlas.about.get(name, {}).get("kind") or name) for name in atlas.scores})


def refuse_empty(atlas: Atlas) -> None:
    """`InputError` if there is nothing to show."""
    if not atlas.scores:
        why = "; ".join(f"{name}: {reason}" for name, reason in atlas.skipped.items()) or "none was asked for"
        raise InputError(f"this atlas has no scores to show: every behaviour was left out ({why}).")


def model_name(atlas: Atlas) -> str:
    """What the model is called: its hub id, or the last part of the path it was opened from."""
    name = str(atlas.card.get("model") or "unnamed model")
    return Path(name).name if Path(name).is_absolute() else name


def title_of(atlas: Atlas, behaviour: str) -> str:
    """A behaviour's title, or its name where it has none."""
    return str(atlas.about.get(behaviour, {}).get("title") or behaviour.replace("_", " ").capitalize())


def threshold_of(atlas: Atlas, behaviour: str) -> float | None:
    """The score from which on a head counts as found; None where the behaviour has no such score."""
    threshold = atlas.about.get(behaviour, {}).get("threshold")
    return None if threshold is None or math.isnan(threshold) else float(threshold)


def found_heads(atlas: Atlas, behaviour: str) -> HeadSet:
    """The heads at the threshold or above it, none where there is no threshold."""
    threshold = threshold_of(atlas, behaviour)
    return HeadSet() if threshold is None else atlas.found(behaviour)


def best_heads(atlas: Atlas, behaviour: str, k: int) -> list[Head]:
    """The `k` heads with the highest scores, best first; heads without a score (NaN) are left out."""
    return [head for head, value in atlas[behaviour].ranked() if not math.isnan(value)][:k]


def score_of(atlas: Atlas, behaviour: str, head: Head) -> str:
    """A head's score ± its standard error; without one where the score is read off the weights."""
    scores = atlas[behaviour]
    return plus_minus(float(scores.values[head]), float(scores.stderr[head]), exact=scores.n == 0)


def checks_of(atlas: Atlas, behaviour: str) -> list[CausalCheck]:
    """The causal checks of one behaviour, one a mode."""
    return [check for check in atlas.checks if check.behaviour == behaviour]


def q_of(atlas: Atlas, check: CausalCheck) -> float:
    """The q-value of one of the atlas's checks."""
    return atlas.q_values()[atlas.checks.index(check)]


def claims_of(atlas: Atlas) -> str:
    """How many claims were tried, and what p and q mean for them; nothing where there are no checks."""
    tried = [check for check in atlas.checks if not math.isnan(check.p_value)]
    if not tried:
        return ""
    return (
        f"{count(len(tried), 'claim was', 'claims were')} tried, one a behaviour and kind of ablation. With so many random "
        f"sets no p can be below {format_p(min(check.least_p for check in tried))}; such a p means that no random set cost as "
        "much. q: the share of false claims to be expected among all with a p as small (Benjamini-Hochberg)."
    )


def sure(atlas: Atlas, check: CausalCheck) -> bool:
    """Whether the check stands among all that were tried: q <= 0.05."""
    return q_of(atlas, check) <= SIGNIFICANT


def stands(check: CausalCheck) -> bool:
    """Whether the found heads did more than chance: p <= 0.05, or more than every random set that there is."""
    return check.p_value <= max(SIGNIFICANT, check.least_p) and bool(check.random_effects)


def behaviour_verdict(atlas: Atlas, behaviour: str) -> str:
    """In a few words: were heads found, and did the model miss them more than random ones of the same layers?"""
    if not found_heads(atlas, behaviour):
        return "no threshold" if threshold_of(atlas, behaviour) is None else "not found"
    checks = checks_of(atlas, behaviour)
    if not checks:
        family = atlas.card.get("families", {}).get(atlas.about[behaviour].get("judge"), {})
        return "not checked: blind" if family.get("verdict") == "at chance" else "not checked"
    if all(sure(atlas, check) for check in checks):
        return "causal"
    return "causal by p alone" if all(map(stands, checks)) else "not shown to be causal"


def chance_of(atlas: Atlas, behaviour: str) -> str:
    """The highest score of heads that have nothing to find, and how many of them there were; empty where none were scored."""
    null = atlas.about.get(behaviour, {}).get("null")
    return f"chance ≤ {number(null['highest'])} ({null['heads']} heads)" if null else ""


def screened(atlas: Atlas, judge: str) -> str:
    """What was ablated how, where not every head was ablated alone; empty otherwise."""
    report = atlas.effects[judge].meta.get("screening")
    if not report:
        return ""
    heads = sum(len(group["heads"]) for group in report["groups"])
    sizes = [abs(group["effect"]) for group in report["groups"] if group["effect"] is not None]
    unseen = [group for group in report["groups"] if group["effect"] is None]
    largest = f"no group costs more than {number(max(sizes))}" if sizes else ""
    rest = f"{count(len(unseen), 'group was', 'groups were')} not ablated" if unseen else ""
    return (
        f"{count(report['alone'], 'head')} ablated alone, {heads} in {count(len(report['groups']), 'group')} "
        f"({'; '.join(filter(None, (largest, rest)))})."
    )


def summary_table(atlas: Atlas, *, k: int = 3) -> Table:
    """A row a behaviour: its top `k` heads, how many were found, and what ablating them does beside random heads."""
    refuse_empty(atlas)
    n_layers, n_heads = atlas.shape
    table = Table(
        title=f"{model_name(atlas)}: {n_layers} layers of {n_heads} heads",
        title_justify="left",
        caption="found: at the threshold or above it, and whether the model misses these heads more than random ones. Effect: "
        "how much of the metric is lost when the heads are ablated, ± standard error; random: the same for so many sets of "
        f"random heads of the same layers, ± standard deviation. {claims_of(atlas)}".rstrip(),
        caption_justify="left",
    )
    table.add_column("behaviour", style="bold")
    table.add_column("top heads (score ± stderr)")
    table.add_column("found", justify="right")
    for title in ("ablation", "effect", "random", "sets", "p", "q"):
        table.add_column(title, justify="left" if title == "ablation" else "right", no_wrap=True)
    for name in atlas.scores:
        checks = checks_of(atlas, name)
        table.add_row(
            Text(title_of(atlas, name)),
            Text("\n".join(f"{head} {score_of(atlas, name, head)}" for head in best_heads(atlas, name, k))),
            Text(
                f"{'' if threshold_of(atlas, name) is None else len(found_heads(atlas, name))}\n{behaviour_verdict(atlas, name)}"
            ),
            Text("\n".join(check.mode for check in checks) or "not checked"),
            "\n".join(plus_minus(check.effect, check.stderr) for check in checks),
            "\n".join(random_effect(check) for check in checks),
            "\n".join(str(len(check.random_effects)) for check in checks),
            Text("\n").join(_p(check) for check in checks),
            "\n".join(format_p(q_of(atlas, check)) for check in checks),
            end_section=True,
        )
    for name, reason in atlas.skipped.items():
        table.add_row(Text(name.replace("_", " ").capitalize(), style="dim"), Text(f"left out: {reason}", style="dim"))
    return table


def _found(atlas: Atlas, behaviour: str) -> str:
    return "–" if threshold_of(atlas, behaviour) is None else str(len(found_heads(atlas, behaviour)))


def head_table(atlas: Atlas, behaviour: str, k: int = 10) -> Table:
    """The `k` heads that score highest on one behaviour."""
    found = found_heads(atlas, behaviour)
    checked = {head for check in checks_of(atlas, behaviour) for head in check.heads}
    table = Table(title=title_of(atlas, behaviour), title_justify="left")
    table.add_column("head", style="bold")
    table.add_column("score ± stderr", justify="right")
    table.add_column("found")
    table.add_column("ablated in the check")
    for head in best_heads(atlas, behaviour, k):
        table.add_row(
            str(head),
            score_of(atlas, behaviour, head),
            "yes" if head in found else "",
            "yes" if str(head) in checked else "",
        )
    return table


def roles_table(atlas: Atlas) -> Table:
    """A row a head that has a role: what it does, whether it does more than one kind of thing."""
    refuse_empty(atlas)
    table = Table(title=f"{model_name(atlas)}: what each head does", title_justify="left")
    table.add_column("head", style="bold")
    table.add_column("roles (score ± stderr)")
    table.add_column("sure", justify="right")
    table.add_column("polysemantic")
    held = roles(atlas)
    for head, has in held.items():
        if has.roles:
            table.add_row(
                str(head),
                Text("\n".join(str(role) for role in has.roles)),
                "\n".join(or_dash(role.confidence) for role in has.roles),
                "yes" if has.polysemantic else "",
                end_section=True,
            )
    idle = [str(head) for head, has in held.items() if not has.roles]
    table.caption = "sure: the chance that new examples would put the head above the threshold again."
    table.caption_justify = "left"
    if idle:
        table.add_row("others", Text(f"{len(idle)} heads reach no threshold: {', '.join(idle)}", style="dim"))
    return table


def diff_table(diff: AtlasDiff, *, most: int = 6) -> Table:
    """A row a behaviour: how well the rankings agree, and which heads appeared, strengthened, weakened or vanished."""
    table = Table(
        title=f"{model_name(diff.a)} (A) and {model_name(diff.b)} (B)",
        title_justify="left",
        caption="agreement: Spearman's correlation of all heads' scores. In brackets: changes below two standard errors.",
        caption_justify="left",
    )
    table.add_column("behaviour", style="bold")
    table.add_column("agreement", justify="right")
    for call in CALLS:
        table.add_column(call)
    for name in diff.agreement:
        cells = [called(diff, name, call, most) for call in CALLS]
        table.add_row(Text(title_of(diff.a, name)), or_dash(diff.agreement[name]), *[Text(cell) for cell in cells])
    return table


def called(diff: AtlasDiff, behaviour: str, call: str, most: int = 6) -> str:
    """The heads of one call, those whose change is within chance in brackets."""
    rows = diff.of(call)
    rows = rows[rows["behaviour"] == behaviour]
    shown = [row.head if row.surely else f"({row.head})" for row in rows.head(most).itertuples()]
    return ", ".join(shown) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def random_effect(check: CausalCheck) -> str:
    """The random sets' effects: mean ± standard deviation."""
    if not check.random_effects:
        return "none tried"
    return f"{number(check.random_mean)} ± {number(check.random_spread)}"


def _p(check: CausalCheck) -> Text:
    return Text(format_p(check.p_value), style="green" if stands(check) else "dim")
