"""What a smaller model costs and what it lost, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from manyheads.report import page_of
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.scatter import Point, scatter
from manyheads.shrink.measuring import Cost, Shrunk


def costs_table(found: Shrunk) -> Table:
    """A row a cost, at the longest context; the page has all of them."""
    longest = max(found.before.kv_bytes)
    title = f"{found.model}, made smaller; cache and speed at {longest} tokens of context, beside the model as it is"
    table = Table(title=title, title_justify="left")
    titles = ("method", "ratio", "MB of weights", "MB of cache", "prefill", "decode", "loss", "needles", "tasks")
    for i, name in enumerate(titles):
        table.add_column(name, justify="left" if i == 0 else "right")
    for cost in (found.before, *found.after):
        table.add_row(
            cost.method,
            "" if cost is found.before else f"{cost.ratio:g}",
            f"{cost.weight_bytes / 1e6:.1f}",
            f"{cost.kv_bytes[longest] / 1e6:.2f}",
            f"{cost.prefill[longest]:.2f}",
            f"{cost.decode[longest]:.2f}",
            f"{cost.loss:.3f}",
            f"{cost.needles:.0%}",
            f"{sum(cost.tasks.values()) / len(cost.tasks):.0%}" if cost.tasks else "-",
        )
    return table


def _titles(found: Shrunk) -> list[str]:
    lengths = list(found.before.kv_bytes)
    return [
        "method",
        "ratio",
        "M parameters",
        "MB of weights",
        *[f"MB of cache at {length}" for length in lengths],
        *[f"prefill {length}" for length in lengths],
        *[f"decode {length}" for length in lengths],
        "loss",
        "needles",
        *found.before.tasks,
    ]


def _cells(found: Shrunk, cost: Cost) -> list[str]:
    return [
        cost.method,
        "" if cost is found.before else f"{cost.ratio:g}",
        f"{cost.parameters / 1e6:.2f}",
        f"{cost.weight_bytes / 1e6:.1f}",
        *[f"{value / 1e6:.2f}" for value in cost.kv_bytes.values()],
        *[f"{value:.2f}" for value in cost.prefill.values()],
        *[f"{value:.2f}" for value in cost.decode.values()],
        f"{cost.loss:.3f}",
        f"{cost.needles:.0%}",
        *[f"{cost.tasks[name]:.0%}" if name in cost.tasks else "-" for name in found.before.tasks],
    ]


_TERMS = {
    "As it is": "The model before anything was done to it: what the others are compared with.",
    "Cache": "Keys and values that attention reads again for every new token; they grow with the context.",
    "Prefill, decode": "Seconds to read a context, and seconds of one more token, divided by those of the model as it is: "
    "below 1 is faster. Measured in turns on one machine.",
    "Loss": "Nats a token of the text that follows a context; lower is better.",
    "Needles": "Sentences in a context that the model says word for word when it is asked for them afterwards.",
    "-": "Not measured: the prompts of these tasks are too short for a cache to be cut.",
}


@page_of(Shrunk)
def shrunk_page(found: Shrunk) -> str:
    """Pictures of what is saved against what is lost, then the table."""
    longest = max(found.before.kv_bytes)
    costs = [found.before, *found.after]
    # Apart, since what cut weights lose would hide all differences between caches.
    same = [cost for cost in costs if cost.parameters == found.before.parameters]
    cut = [found.before, *(cost for cost in costs if cost not in same)]

    def picture(
        some: list[Cost], x_name: str, x: Callable[[Cost], float], y_name: str, y: Callable[[Cost], float]
    ) -> Html | None:
        points = [Point(cost.method, x(cost), y(cost), f"ratio {cost.ratio:g}") for cost in some]
        return scatter(points, x_name=x_name, y_name=y_name) if len({point.x for point in points}) > 1 else None

    def cache(cost: Cost) -> float:
        return cost.kv_bytes[longest] / 1e6

    in_cache = f"MB of cache at {longest} tokens"
    pictures = [
        picture(same, in_cache, cache, "loss", lambda cost: cost.loss),
        picture(same, in_cache, cache, "needles", lambda cost: cost.needles),
        picture(cut, "MB of weights", lambda cost: cost.weight_bytes / 1e6, "loss", lambda cost: cost.loss),
        picture(cut, in_cache, cache, "loss", lambda cost: cost.loss),
    ]
    rows = [el("tr", *[el("td", cell) for cell in _cells(found, cost)]) for cost in costs]
    lede = f"What each method saves, and what is lost with it. The loss is of the tokens after a context of {found.context}."
    methods = ", ".join(dict.fromkeys(cost.method for cost in found.after)) or "none"
    body = join(
        masthead("Smaller models", found.model, lede, {"methods": methods}, how_to_read(_TERMS)),
        el("main", *pictures, el("section", el("h2", "All figures"), plain_table(_titles(found), rows, label="costs"))),
    )
    return page(f"{found.model}, made smaller", body)
