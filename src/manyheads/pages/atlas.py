"""The atlas as a page: what was found, how strong it is, whether it matters, and a card a head. One HTML file."""

from __future__ import annotations

import base64
import json
import math
import shlex
from typing import Any

import numpy as np

from manyheads.atlas.core.result import Atlas, CausalCheck, PatternExample
from manyheads.atlas.core.roles import HeadRoles, Role, roles_of
from manyheads.heads import Head, HeadSet
from manyheads.pages.atlas_tables import (
    SIGNIFICANT,
    behaviour_verdict,
    best_heads,
    chance_of,
    checks_of,
    claims_of,
    families,
    found_heads,
    model_name,
    q_of,
    random_effect,
    refuse_empty,
    score_of,
    screened,
    stands,
    sure,
    threshold_of,
    title_of,
)
from manyheads.report import page_of
from manyheads.report.families import Family
from manyheads.report.figures import (
    ColourScale,
    Finding,
    Strip,
    findings_map,
    found_key,
    grid_css,
    heat_table,
    hue,
    pattern_figure,
    score_bar,
    strips,
    strongest_keys,
)
from manyheads.report.html import (
    Html,
    el,
    how_to_read,
    join,
    markdown,
    masthead,
    page,
    plain_table,
    table_head,
    unfold,
    with_links,
)
from manyheads.report.numbers import count, format_p, number, or_dash, p_equals, plus_minus, visible

_FACTS = {
    "architecture": "Architecture",
    "n_layers": "Layers",
    "n_heads": "Heads a layer",
    "n_kv_heads": "KV heads a layer",
    "head_dim": "Head dimension",
    "parameters": "Parameters",
    "dtype": "Precision",
    "seed": "Seed",
    "version": "manyheads",
    "seconds": "Time",
    "fingerprint": "Fingerprint",
}


@page_of(Atlas)
def atlas_page(atlas: Atlas) -> str:
    """What every head was found to do, behaviour by behaviour, with the causal checks."""
    refuse_empty(atlas)
    model = model_name(atlas)
    body = join(
        el("a", "Skip to the findings", href="#overview", class_="skip"),
        _top(atlas, model),
        _contents(atlas),
        el(
            "main",
            _overview(atlas),
            _roles(atlas),
            [_family(atlas, family) for family in _shown_families(atlas)],
            _nothing_found(atlas),
            _alone(atlas) if atlas.effects else None,
            _heads(atlas),
        ),
        _footer(atlas),
    )
    version = str(atlas.card.get("version", ""))
    return page(
        f"{model}: atlas of heads",
        body,
        data=_data(atlas),
        version=version,
        css=grid_css(atlas.shape[1]),
    )


def _top(atlas: Atlas, model: str) -> Html:
    card = atlas.card
    facts = {name: _fact(key, card[key]) for key, name in _FACTS.items() if card.get(key) is not None}
    settings = card.get("settings")
    return masthead(
        "Atlas of attention heads",
        model,
        _summary(atlas),
        facts,
        how_to_read(_terms(atlas)),
        unfold("Settings of this survey", _settings(settings)) if settings else None,
        unfold("The model's own card", markdown(str(card["card_markdown"]))) if card.get("card_markdown") else None,
    )


def _summary(atlas: Atlas) -> str:
    n_layers, n_heads = atlas.shape
    found = {head for name in atlas.scores for head in found_heads(atlas, name)}
    text = (
        f"{count(n_layers * n_heads, 'attention head')} in {count(n_layers, 'layer')}, scored for "
        f"{count(len(atlas.scores), 'behaviour')}. {count(len(found), 'head reaches', 'heads reach')} the threshold of at "
        "least one."
    )
    checked = [checks for name in atlas.scores if (checks := checks_of(atlas, name))]
    if checked:
        passed = sum(all(map(stands, checks)) for checks in checked)
        surely = sum(all(sure(atlas, check) for check in checks) for checks in checked)
        text += (
            f" For {passed} of the {count(len(checked), 'behaviour')} checked, ablating the top heads costs the model "
            f"more than ablating random heads of the same layers (p ≤ {SIGNIFICANT}, or more than every random set "
            f"that there is, in each mode of ablation); for {surely or 'none'} also with all claims counted (q ≤ {SIGNIFICANT})."
        )
    return text


def _fact(key: str, value: Any) -> Html | str:
    if key == "parameters" and isinstance(value, int):
        return f"{value:,}"
    if key == "seconds":
        return f"{float(value):.1f} s"
    return el("code", str(value)) if key == "fingerprint" else str(value)


def _settings(settings: dict[str, Any]) -> Html:
    rows = [
        el("tr", el("th", name, scope="row"), el("td", el("code", _plain(value)))) for name, value in settings.items()
    ]
    return el("table", el("tbody", *rows))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _terms(atlas: Atlas) -> dict[str, Html | str]:
    tried = [check for check in atlas.checks if not math.isnan(check.p_value)]
    terms: dict[str, Html | str] = {
        "L4H2": "Head 2 of layer 4; both are counted from 0.",
        "Score": "How much a head does what the behaviour is named after, by the formula beside it. Its pattern is "
        "how much each token attends to each other one; z is what the head reads there and passes on.",
        "Found": "Heads whose score reaches the threshold of the behaviour and that write anything. No threshold is below the "
        "highest score by chance.",
        "Chance": "The highest score of heads that have nothing to find: those of an untrained model of the same shape, and this "
        "model's on tokens that do not repeat, where a behaviour needs repetition.",
        "Ablation": "Takes heads out: puts zero, or their mean, in place of z, or makes their pattern uniform. Its effect is how "
        "much of a task's metric is lost.",
    }
    if tried:
        sets = max(len(check.random_effects) for check in tried)
        least = format_p(min(check.least_p for check in tried))
        surely = sum(sure(atlas, check) for check in tried)
        terms["p"] = (
            f"How often random heads of the same layers cost as much as those found. {count(sets, 'random set')} "
            f"cannot show less than {least}, so p = {least} says that none of them did."
        )
        terms["q"] = join(
            f"p corrected for the {count(len(tried), 'claim')} tried on this page: the share of false claims to "
            f"expect among all with a p as small. Numbers are bold where q ≤ {SIGNIFICANT}: here {surely or 'none'}.",
            None if surely else " More random sets (--n-random 100) can show a smaller p, and so a smaller q.",
        )
    return terms


def _contents(atlas: Atlas) -> Html:
    entries = [el("a", "Overview", href="#overview"), el("a", "Roles", href="#roles")]
    entries += [
        el("a", family.mark(), family.title, href=f"#{_family_anchor(family)}") for family in _shown_families(atlas)
    ]
    entries += [el("a", "Nothing found", href="#nothing")] if _empty_names(atlas) else []
    entries += [el("a", "Each head alone", href="#alone")] if atlas.effects else []
    entries += [el("a", "All heads", href="#heads")]
    return el("nav", el("ul", *[el("li", entry) for entry in entries]), aria_label="Contents")


def _family_anchor(family: Family) -> str:
    return _anchor(f"family {family.kind}", "")


def _anchor(name: str, kind: str = "behaviour-") -> str:
    return kind + "".join(c if c.isalnum() else "-" for c in name)


def _shown_families(atlas: Atlas) -> list[Family]:
    """The families with a behaviour that a head was found for."""
    return list(dict.fromkeys(family for name, family in families(atlas).items() if not _empty(atlas, name)))


def _empty_names(atlas: Atlas) -> list[str]:
    return [name for name in families(atlas) if _empty(atlas, name)]


def _empty(atlas: Atlas, name: str) -> bool:
    """Whether a behaviour has a threshold and no head reaches it."""
    return threshold_of(atlas, name) is not None and not found_heads(atlas, name)


def _overview(atlas: Atlas) -> Html:
    names = list(families(atlas))
    titles = ["Behaviour", "Top heads", "Found", "Ablating them", "Random heads", "p", "q"]
    titles += ["Seeds agree"] if atlas.agreement else []

    def table(some: list[str], label: str) -> Html:
        rows = [_overview_row(atlas, name) for name in some]
        return plain_table(titles, rows, class_="plain overview", label=label)

    empty = _empty_names(atlas)
    full = [name for name in names if name not in empty]
    skipped = [
        el("li", el("strong", name.replace("_", " ").capitalize()), ": ", reason)
        for name, reason in atlas.skipped.items()
    ]
    return el(
        "section",
        el("h2", "Overview"),
        _map(atlas),
        table(full, "Behaviours for which heads were found") if full else None,
        el(
            "p",
            "Ablating them: how much of the metric is lost with the top heads ablated, ± standard error over "
            "examples. Random heads: the same for random sets with as many heads in each layer, mean ± standard deviation "
            "over sets. "
            f"{claims_of(atlas)}".rstrip(),
            class_="small soft",
        ),
        unfold(
            f"Nothing found: {count(len(empty), 'behaviour')}", table(empty, "Behaviours for which no head was found")
        )
        if empty
        else None,
        join(el("h3", "Left out"), el("ul", *skipped, class_="small")) if skipped else None,
        _abilities(atlas),
        id="overview",
    )


def _abilities(atlas: Atlas) -> Html | None:
    """What the model can do of each task, before heads are looked for."""
    asked = atlas.card.get("families", {})
    if not asked:
        return None
    rows = [
        el(
            "tr",
            el("th", name, scope="row"),
            el("td", str(one["how"])),
            el("td", _share(one["answered"])),
            el("td", _share(one["preferred"])),
            el("td", "blind: at chance" if one["verdict"] == "at chance" else str(one["verdict"])),
        )
        for name, one in asked.items()
    ]
    titles = ("Task", "Put to the model", "Answered", "Preferred", "Verdict")
    return join(
        el("h3", "What the model can do"),
        el(
            "p",
            "Answered: the model's own next tokens are the whole answer. Preferred: the answer is likelier than a wrong one "
            "(half of the prompts by chance). Where a model is no better than chance, no head is looked for: there is nothing "
            "to lose.",
            class_="small soft",
        ),
        plain_table(titles, rows, class_="plain overview", label="What the model can do, task by task"),
    )


def _share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.0%}"


def _map(atlas: Atlas) -> Html:
    of = families(atlas)
    found = [
        Finding(title_of(atlas, name), found_heads(atlas, name), family.hue, family.letter)
        for name, family in of.items()
    ]
    rows = [
        el(
            "tr",
            el("th", family.mark(), family.title, scope="row"),
            el("td", [el("div", title_of(atlas, name), ": ", _listed(atlas, name, heads)) for name, heads in has]),
        )
        for family in dict.fromkeys(of.values())
        if (has := [(name, heads) for name in of if of[name] == family and (heads := found_heads(atlas, name))])
    ]
    none = [finding.name for name, finding in zip(of, found, strict=True) if _empty(atlas, name)]
    label = "Layers by heads: which behaviours each head was found to show."
    beside = " beside" if atlas.shape[1] <= 20 else ""
    return el(
        "figure",
        el(
            "div",
            findings_map(atlas.shape, found, label=label),
            el(
                "div",
                el("table", el("tbody", *rows), class_="does", aria_label="The heads found for each behaviour"),
                el("p", f"No head reaches the threshold of: {', '.join(none)}.", class_="small soft") if none else None,
            ),
            class_=f"pair{beside}",
        ),
        el(
            "figcaption",
            "Which head does what. Each square is a head, with the colour and letter of each family of behaviours in "
            "which its score reaches a threshold; pale squares reach none.",
        ),
    )


def _listed(atlas: Atlas, name: str, found: HeadSet, most: int = 12) -> Html | str:
    best = [head for head in best_heads(atlas, name, len(found)) if head in found]
    if not best:
        return "none"
    rest = f" and {len(best) - most} more" if len(best) > most else None
    return join([[", " if i else None, _head(head)] for i, head in enumerate(best[:most])], rest)


def _overview_row(atlas: Atlas, name: str) -> Html:
    checks = checks_of(atlas, name)
    threshold = threshold_of(atlas, name)
    heads = [
        el("div", _head(head), " ", el("span", score_of(atlas, name, head), class_="soft"))
        for head in best_heads(atlas, name, 3)
    ]
    found = (
        "no threshold"
        if threshold is None
        else join(
            len(found_heads(atlas, name)),
            el("span", f"≥ {number(threshold)}", class_="more"),
            el("div", behaviour_verdict(atlas, name)),
            el("div", chance_of(atlas, name), class_="soft"),
        )
    )
    return el(
        "tr",
        el(
            "th",
            families(atlas)[name].mark(),
            el("a", title_of(atlas, name), href=f"#{_anchor(name)}"),
            scope="row",
        ),
        el("td", *heads),
        el("td", found),
        el(
            "td",
            [el("div", f"{plus_minus(c.effect, c.stderr)} ", el("span", c.mode, class_="soft")) for c in checks]
            or "not checked",
        ),
        el(
            "td",
            [
                el("div", random_effect(c), el("span", f" {count(len(c.random_effects), 'set')}", class_="soft"))
                for c in checks
            ],
        ),
        el("td", [el("div", _strong(atlas, c, format_p(c.p_value))) for c in checks]),
        el("td", [el("div", _strong(atlas, c, format_p(q_of(atlas, c)))) for c in checks]),
        el("td", _agreement(atlas, name)) if atlas.agreement else None,
    )


def _agreement(atlas: Atlas, name: str) -> Html | None:
    agreement = atlas.agreement.get(name)
    if agreement is None:
        return None
    top = el("div", f"{or_dash(agreement.top)} top heads", class_="soft")
    return join(el("div", or_dash(agreement.rank), el("span", " rank", class_="soft")), top)


def _roles(atlas: Atlas) -> Html:
    held = [roles_of(atlas, head) for head in _every_head(atlas)]
    rows = [
        el(
            "tr",
            el("th", _head(has.head), scope="row"),
            el("td", [el("div", _role(atlas, role)) for role in has.roles]),
            el("td", [el("div", or_dash(role.confidence)) for role in has.roles]),
            el("td", "several families" if has.polysemantic else None),
        )
        for has in held
        if has.roles
    ]
    titles = ("Head", "Roles", "Sure", "Polysemantic")
    several = sum(has.polysemantic for has in held)
    has_role = f"{count(len(rows), 'head has a role', 'heads have a role')}"
    return el(
        "section",
        el("h2", "Roles"),
        el(
            "p",
            f"{has_role}: its score reaches a behaviour's threshold. {several} of them have roles in several "
            "families (polysemantic). Sure: the chance that new examples would put the head above the threshold again. p: of "
            "the check in which the head was ablated together with the others of its behaviour.",
            class_="small soft",
        ),
        el("p", " ".join(beside), class_="small") if (beside := _beside_roles(held)) else None,
        unfold("Head by head", plain_table(titles, rows, class_="plain overview", label="Roles, head by head"))
        if rows
        else None,
        id="roles",
    )


def _beside_roles(held: list[HeadRoles]) -> list[str]:
    """What is no role: where heads rest, and heads that write nothing."""
    resting = sum(bool(has.traits) for has in held)
    alone = sum(bool(has.traits) and not has.roles for has in held)
    silent = [str(has.head) for has in held if has.silent]
    said = []
    if resting:
        said.append(
            f"{count(resting, 'head rests', 'heads rest')} on the first token on random text, {alone} of them without any role. "
            "That is a trait, not a role: such a head may act where it finds what it looks for."
        )
    if silent:
        said.append(f"Silent, wherever they look, since they write next to nothing: {', '.join(silent)}.")
    return said


def _role(atlas: Atlas, role: Role) -> Html:
    p = join(", ", p_equals(role.p_value)) if role.p_value is not None else None
    score = plus_minus(role.score, role.stderr, exact=role.stderr == 0)
    return join(
        families(atlas)[role.behaviour].mark(),
        f"{title_of(atlas, role.behaviour)} ",
        el("span", score, p, class_="soft"),
    )


def _every_head(atlas: Atlas) -> list[Head]:
    n_layers, n_heads = atlas.shape
    return [Head(layer, i) for layer in range(n_layers) for i in range(n_heads)]


def _alone(atlas: Atlas) -> Html:
    figures = []
    for judge, effects in atlas.effects.items():
        scale = ColourScale.holding(effects.values)
        label = f"{judge.replace('_', ' ').capitalize()}: loss in {effects.meta.get('metric', judge)}"
        heat = heat_table(effects, scale, label=f"{label}, by head ablated alone")
        figures.append(
            el(
                "figure",
                heat,
                el("figcaption", label, el("span", scale.key(), class_="keys"), el("div", screened(atlas, judge))),
                class_=hue(0),
            )
        )
    return el(
        "section",
        el("h2", "Each head alone"),
        el(
            "p",
            "How much of each metric is lost when one head is mean-ablated. A head that others can replace costs nothing alone, "
            "so the checks above ablate sets.",
            class_="small soft",
        ),
        unfold(f"{count(len(figures), 'metric')}, head by head", el("div", *figures, class_="trio"), late=True),
        id="alone",
    )


def _strong(atlas: Atlas, check: CausalCheck, text: str) -> Html:
    """Bold where the check stands among all that were tried; pale where it does not even stand alone."""
    return el("b", text) if sure(atlas, check) else el("span", text, class_=None if stands(check) else "soft")


def _head(head: Head | str) -> Html:
    return el("a", str(head), href=f"#{head}", class_="head")


def _family(atlas: Atlas, family: Family) -> Html:
    """The behaviours of one family that heads were found for."""
    names = [name for name, of in families(atlas).items() if of == family and not _empty(atlas, name)]
    found = [
        el(
            "article",
            el("h3", title_of(atlas, n), class_="name"),
            _behaviour(atlas, n),
            id=_anchor(n),
            class_="behaviour",
        )
        for n in names
    ]
    return el("section", el("h2", family.title), *found, id=_family_anchor(family), class_=f"family {family.hue}")


def _nothing_found(atlas: Atlas) -> Html | None:
    """The behaviours that no head reached, folded."""
    folded = [
        unfold(_nothing(atlas, n), _behaviour(atlas, n), late=True, id=_anchor(n), class_=families(atlas)[n].hue)
        for n in _empty_names(atlas)
    ]
    return el("section", el("h2", "Nothing found"), *folded, id="nothing") if folded else None


def _nothing(atlas: Atlas, name: str) -> Html:
    best = [f"; best {head} {score_of(atlas, name, head)}" for head in best_heads(atlas, name, 1)]
    threshold = number(threshold_of(atlas, name) or 0.0)
    return join(
        families(atlas)[name].mark(), el("b", title_of(atlas, name)), f": no head reaches {threshold}", *best, "."
    )


def _behaviour(atlas: Atlas, name: str) -> Html:
    about = atlas.about.get(name, {})
    scores, threshold, title = atlas[name], threshold_of(atlas, name), title_of(atlas, name)
    scale = _scale(atlas, name)
    over = "read off the weights" if scores.n == 0 else f"mean over {count(scores.n, 'example')}"
    unit = f", in {about['unit']}" if about.get("unit") else ""
    series = list(atlas.scores).index(name)
    heat = el(
        "figure",
        heat_table(
            scores, scale, label=f"{title}: score of each head, layers by heads", threshold=threshold, series=series
        ),
        el(
            "figcaption",
            f"{title} score of each head ({over}{unit}).",
            el("span", scale.key(), found_key(threshold), class_="keys"),
        ),
    )
    formula = [
        el("code", str(about["formula"]), class_="formula") if about.get("formula") else None,
        el("p", "After ", with_links(str(about["paper"])), class_="small soft") if about.get("paper") else None,
    ]
    beside = " beside" if scores.shape[1] <= 20 else ""
    return join(
        el("p", str(about["what"])) if about.get("what") else None,
        el(
            "div",
            heat,
            el("div", _best(atlas, name, scale), unfold("Formula and paper", *formula)),
            class_=f"pair{beside}",
        ),
        _checks(atlas, name),
        el("div", _in_numbers(atlas, name), _examples(atlas, name), class_="folds"),
    )


def _examples(atlas: Atlas, name: str) -> Html | None:
    shown = [
        _pattern(example, index, title_of(atlas, name))
        for index, example in enumerate(atlas.patterns)
        if example.behaviour == name
    ]
    if not shown:
        return None
    how = "A row is a token that attends, a column a token that is attended to."
    return unfold(
        f"What they attend to: {count(len(shown), 'example')}",
        el("p", how, " ", ColourScale(0.0, 1.0).key(), class_="small soft"),
        el("div", *shown, class_="patterns"),
        late=True,
    )


def _scale(atlas: Atlas, name: str) -> ColourScale:
    about = atlas.about.get(name, {})
    return ColourScale.holding(atlas[name].values, about.get("low"), about.get("high"))


def _best(atlas: Atlas, name: str, scale: ColourScale) -> Html:
    scores, threshold, found = atlas[name], threshold_of(atlas, name), found_heads(atlas, name)
    checked = {head for check in checks_of(atlas, name) for head in check.heads}

    def notes(head: Head) -> Html | None:
        notes = ["found"] * (head in found) + ["ablated below"] * (str(head) in checked)
        return el("span", ", ".join(notes), class_="more") if notes else None

    rows = [
        el(
            "tr",
            el("th", _head(head), scope="row"),
            el(
                "td",
                score_bar(float(scores.values[head]), float(scores.stderr[head]), scale, threshold),
                class_="bar-cell",
            ),
            el("td", score_of(atlas, name, head), notes(head), class_="nowrap"),
        )
        for head in best_heads(atlas, name, 5)
    ]
    titles = ("Head", "", "Score ± standard error")
    return el("table", table_head(titles), el("tbody", *rows), class_="plain", aria_label="The highest scores")


def _checks(atlas: Atlas, name: str) -> Html:
    checks = checks_of(atlas, name)
    title = title_of(atlas, name)
    if not checks:
        return el("p", "No causal check was made for this behaviour.", class_="small soft")
    return join(
        _check_figure(atlas, [c for c in checks if c.metric == metric], title)
        for metric in dict.fromkeys(c.metric for c in checks)
    )


def _in_numbers(atlas: Atlas, name: str) -> Html | None:
    checks = checks_of(atlas, name)
    return unfold("In numbers", *[_in_words(atlas, check) for check in checks]) if checks else None


def _check_figure(atlas: Atlas, checks: list[CausalCheck], title: str) -> Html:
    metric = checks[0].metric
    rows = [
        Strip(f"{c.mode.capitalize()} ablation", c.effect, c.stderr, c.random_effects, _verdict(atlas, c))
        for c in checks
    ]
    legend = [
        el(
            "span",
            el("svg", el("path", d="M7-1L15 7L7 15L-1 7Z", class_="diamond")),
            "top heads ± standard error",
            class_="legend",
        ),
        el("span", el("svg", el("circle", cx=7, cy=7, r=3.5, class_="dot")), "a random set", class_="legend"),
        el(
            "span",
            el("svg", Html('<line x1="0" x2="14" y1="7" y2="7"/><line x1="7" x2="7" y1="3" y2="11"/>')),
            "random sets: mean ± standard deviation",
            class_="legend",
        ),
    ]
    return el(
        "figure",
        strips(rows, axis=f"loss in {metric}", label=f"{title}: effect of ablating the top heads beside random heads"),
        el(
            "figcaption",
            "Do these heads matter? How much ",
            el("em", metric),
            " is lost when they are ablated.",
            el("span", *legend, class_="keys"),
        ),
    )


def _verdict(atlas: Atlas, check: CausalCheck) -> Html:
    sets = len(check.random_effects)
    if not sets:
        return join("No random sets to compare with.")
    reach = round(check.p_value * (1 + sets)) - 1 if math.isfinite(check.p_value) else sets
    how_many = "None" if not reach else "All" if reach == sets else str(reach)
    cost = "costs" if reach == 1 else "cost"
    q = p_equals(q_of(atlas, check), "q")
    return join(
        _strong(atlas, check, f"{p_equals(check.p_value)}, {q}"),
        f". {how_many} of {count(sets, 'random set')} {cost} as much.",
    )


def _in_words(atlas: Atlas, check: CausalCheck) -> Html:
    heads = [[", " if i else None, _head(head)] for i, head in enumerate(check.heads)]
    text = (
        f": {check.metric} goes from {number(check.clean, 3)} to {number(check.ablated, 3)} over "
        f"{count(check.n, 'example')}, an effect of {plus_minus(check.effect, check.stderr)}. "
    )
    if sets := len(check.random_effects):
        text += (
            f"{count(sets, 'random set')} of as many heads in each layer: {random_effect(check)}; "
            f"{p_equals(check.p_value)} (the least that {sets} sets can show is {number(check.least_p, 3)}), "
            f"{p_equals(q_of(atlas, check), 'q')}."
        )
    return el("p", el("strong", f"{check.mode.capitalize()} ablation"), " of ", heads or "no heads", text)


def _pattern(example: PatternExample, index: int, title: str) -> Html:
    label = f"Attention of {example.head} on an example of {len(example.tokens)} tokens"
    figure = el(
        "figure",
        pattern_figure(example.pattern, example.tokens, label=label, index=index),
        el("figcaption", [_head(example.head), " on an example."]),
    )
    table = strongest_keys(example.pattern, example.tokens, label=f"{title}: {label}, as a table {index}")
    return el("div", figure, unfold("As a table", table))


def _heads(atlas: Atlas) -> Html:
    orders = [el("option", "layer and head", value="")]
    orders += [el("option", title_of(atlas, name), value=i) for i, name in enumerate(atlas.scores)]
    finder = el(
        "div",
        el(
            "div",
            el(
                "label",
                "Find",
                el(
                    "input",
                    type="search",
                    id="query",
                    placeholder="L4H2, L4, or a behaviour",
                    autocomplete="off",
                    spellcheck="false",
                ),
            ),
            el("label", "Order by", el("select", *orders, id="order")),
            el("label", el("input", type="checkbox", id="only"), "only heads that reach a threshold", class_="check"),
            class_="search",
            role="search",
        ),
        el("p", id="tally", class_="small soft", role="status"),
        el("div", id="cards", class_="cards"),
        el("p", el("button", "Show more", type="button", id="more"), class_="more-heads"),
        id="finder",
        hidden=True,
    )
    return el(
        "section",
        el("h2", "All heads"),
        el(
            "p",
            "A card a head: its scores ± standard error, with a dashed tick at the threshold, and the checks it took "
            "part in.",
        ),
        finder,
        el(
            "noscript",
            el(
                "p",
                "The cards, and some of what folds, are made by a script, which is switched off; scores.parquet has every score.",
            ),
        ),
        id="heads",
    )


def _footer(atlas: Atlas) -> Html:
    card = atlas.card
    seed = f" --seed {card['seed']}" if card.get("seed") is not None else ""
    command = str(card.get("command") or f"manyheads atlas {shlex.quote(str(card.get('model', 'MODEL')))}{seed}")
    return el(
        "footer",
        el("h3", "How to make this page again"),
        el("pre", el("code", command)),
        el(
            "p",
            f"Made with manyheads {card.get('version', '')}".rstrip() + ". ",
            "A standard error is over examples; a score read off the weights has none. An effect is the metric of the "
            "whole model less that of the model with the heads ablated. p = (1 + the number of random sets whose "
            "effect is at least that of the found heads) / (1 + the number of random sets); a random set has as many "
            "heads in each layer as the found one, and leaves the found heads out where a layer has enough others. "
            "Where the layers have too few heads for so many different sets, all that there are make the control, and "
            "p cannot fall below what they allow. Effects that differ by rounding count as equal. q corrects p for the "
            "number of claims, that is of behaviours and modes.",
        ),
    )


def _p_and_q(atlas: Atlas, check: CausalCheck) -> str:
    return f"{p_equals(check.p_value)}, {p_equals(q_of(atlas, check), 'q')}"


def _data(atlas: Atlas) -> dict[str, Any]:
    """The numbers that the page's script shows in cards and under the pointer."""
    n_layers, n_heads = atlas.shape
    return {
        "heads": [str(Head(layer, i)) for layer in range(n_layers) for i in range(n_heads)],
        "series": [_series(atlas, name) for name in atlas.scores],
        "checks": [
            {"title": title_of(atlas, c.behaviour), "mode": c.mode, "heads": c.heads, "p": _p_and_q(atlas, c)}
            for c in atlas.checks
        ],
        "patterns": [_weights(example) for example in atlas.patterns],
    }


def _series(atlas: Atlas, name: str) -> dict[str, Any]:
    scores, scale = atlas[name], _scale(atlas, name)
    return {
        "name": name,
        "title": title_of(atlas, name),
        "hue": families(atlas)[name].hue,
        "low": scale.low,
        "high": scale.high,
        "threshold": threshold_of(atlas, name),
        "n": scores.n,
        "scores": _numbers(scores.values),
        "stderr": _numbers(scores.stderr),
    }


def _numbers(values: np.ndarray[Any, np.dtype[Any]]) -> list[float | None]:
    return [round(x, 4) if math.isfinite(x) else None for x in values.ravel().tolist()]


def _weights(example: PatternExample) -> dict[str, Any]:
    """A pattern in one byte a weight: as text a long prompt would make the page several times as large."""
    pattern = np.nan_to_num(np.asarray(example.pattern, dtype=np.float64))
    weights = np.clip(np.round(255 * pattern), 0, 255).astype(np.uint8)
    return {
        "tokens": [visible(token) for token in example.tokens],
        "weights": base64.b64encode(weights.tobytes()).decode(),
    }
