"""A drafting benchmark in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from manyheads.draft.bench import DraftBench, OfKind, Outcome
from manyheads.draft.training.heads import TrainedHeads
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, hue, score_bar
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table

TITLES = (
    "",
    "tokens/s",
    "x generate",
    "tokens a pass",
    "draft ms",
    "verify ms",
    "accepted at depth 1, 2, ...",
    "MiB",
    "same tokens",
)


def bench_table(found: DraftBench) -> Table:
    """A row a contender."""
    table = Table(title="Decoding the same prompts, one at a time", title_justify="left")
    for title in TITLES:
        table.add_column(title, justify="left" if title in ("", TITLES[6]) else "right", overflow="fold")
    for outcome in found.outcomes:
        table.add_row(*_cells(outcome))
    return table


def kinds_table(found: DraftBench) -> Table:
    """Speed over plain `generate` by kind of prompt: over all, its standard deviation over prompts, the lowest, tokens a pass."""
    table = Table(title="x generate, +- sd over prompts (lowest), tokens a pass", title_justify="left")
    table.add_column("")
    for kind, result in found.outcomes[0].kinds.items():
        table.add_column(f"{kind} ({result.prompts})", justify="right")
    for outcome in found.outcomes[1:]:
        table.add_row(outcome.name, *(_of_kind(result) for result in outcome.kinds.values()))
    return table


def _of_kind(result: OfKind) -> str:
    told = f"{result.ratio:.2f} +- {result.spread:.2f} ({result.lowest:.2f})"
    return told if result.tokens_a_pass is None else f"{told}, {result.tokens_a_pass:.2f}"


def _cells(outcome: Outcome) -> list[str]:
    return [
        outcome.name,
        f"{outcome.speed:.0f}",
        f"{outcome.ratio:.2f}",
        "" if outcome.tokens_a_pass is None else f"{outcome.tokens_a_pass:.2f}",
        "" if outcome.draft_ms is None else f"{outcome.draft_ms:.1f}",
        "" if outcome.verify_ms is None else f"{outcome.verify_ms:.1f}",
        "" if outcome.acceptance is None else " ".join(f"{a:.2f}".lstrip("0") for a in outcome.acceptance),
        "" if outcome.peak is None else f"{outcome.peak:.0f}",
        "" if outcome.same is None else f"{outcome.same:.0%}",
    ]


def acceptance_table(learned: TrainedHeads) -> Table:
    """How often the next token is among a head's best guesses, on held-out text."""
    table = Table(title=f"On held-out text, after {learned.steps} steps", title_justify="left")
    for title in ("head", "best guess", "best 2", "best 5", "best 10"):
        table.add_column(title, justify="left" if title == "head" else "right")
    for head in range(len(learned.acceptance)):
        table.add_row(str(head + 1), *(f"{learned.top(k)[head]:.3f}" for k in (1, 2, 5, 10)))
    return table


_TERMS = {
    "Drafting": "A cheap drafter guesses the next tokens, and one pass of the model checks all of them. In the "
    "table: the milliseconds that each takes, a pass.",
    "generate": "Plain decoding with Transformers, one token a pass: what the others are compared with (x generate).",
    "Tokens a pass": "How many new tokens one pass of the model gives on average; 1 without drafting.",
    "Accepted at depth": "How often the first, second, ... guess of a round is what the model itself writes, given "
    "that those before it were.",
    "MiB": "Memory of the drafter's weights and of decoding.",
    "Same tokens": "The share of prompts with exactly plain generate's output (greedy decoding).",
}


@page_of(DraftBench)
def bench_page(found: DraftBench) -> str:
    """Speeds as bars, and the table."""
    fastest = max(found.outcomes, key=lambda outcome: outcome.ratio)
    name = fastest.name[:1].upper() + fastest.name[1:]
    lede = f"{name} writes {fastest.ratio:.2f} times as many tokens a second as plain generate. {found.about}"
    body = join(
        masthead("Drafting", "Tokens a second", lede, None, how_to_read(_TERMS)),
        el("main", _bars(found.outcomes), _kinds(found.outcomes), _acceptance(found.outcomes)),
    )
    return page("Drafting", body)


def _bars(outcomes: Sequence[Outcome]) -> Html:
    scale = ColourScale(0.0, max(outcome.ratio for outcome in outcomes))
    rows = [
        el(
            "tr",
            *(el("td", cell) for cell in _cells(outcome)),
            el("td", score_bar(outcome.ratio, 0.0, scale, threshold=1.0), class_="bar-cell"),
        )
        for outcome in outcomes
    ]
    return el(
        "section",
        el("h2", "Side by side"),
        plain_table((*TITLES, ""), rows, label="Speed and acceptance of every contender"),
        el("p", "Bars: speed as a multiple of plain generate, which the tick marks.", class_="small soft"),
        class_=hue(0),
    )


def _kinds(outcomes: Sequence[Outcome]) -> Html | None:
    """Speed by kind of prompt, where there are kinds."""
    kinds = list(outcomes[0].kinds)
    if not kinds:
        return None
    rows = [
        el("tr", el("td", each.name), *(el("td", _of_kind(each.kinds[kind])) for kind in kinds))
        for each in outcomes[1:]
    ]
    told = "Speed over plain generate's, its standard deviation over prompts, the lowest, and tokens a pass."
    return el(
        "section",
        el("h2", "By kind of prompt"),
        plain_table(("", *kinds), rows, label="Speed of every contender by kind of prompt"),
        el("p", told, class_="small soft"),
        class_=hue(2),
    )


def _acceptance(outcomes: Sequence[Outcome]) -> Html | None:
    """How many of a round's guesses are accepted to each depth, as a table of bars."""
    drafted = [outcome for outcome in outcomes if outcome.acceptance]
    if not drafted:
        return None
    deepest = max(len(outcome.acceptance or []) for outcome in drafted)
    scale = ColourScale(0.0, 1.0)
    rows = []
    for outcome in drafted:
        reached, cells = 1.0, []
        for depth in range(deepest):
            share = outcome.acceptance[depth] if outcome.acceptance and depth < len(outcome.acceptance) else None
            reached = 0.0 if share is None else reached * share
            bar = None if share is None else join(score_bar(reached, 0.0, scale), f" {reached:.2f}")
            cells.append(el("td", bar, class_="bar-cell"))
        rows.append(el("tr", el("td", outcome.name), *cells))
    return el(
        "section",
        el("h2", "How far guesses are accepted"),
        plain_table(("", *(f"{d + 1} deep" for d in range(deepest))), rows, label="Share of rounds by accepted depth"),
        el("p", "The share of rounds in which at least that many guesses in a row were accepted.", class_="small soft"),
        class_=hue(1),
    )
