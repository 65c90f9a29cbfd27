"""Maps of a class prompt (#119) as a page: where each head looks, and where the runner-up's prompt does."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from manyheads.heads import Head
from manyheads.report import page_of
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table, with_links
from manyheads.report.images import png_uri
from manyheads.report.numbers import number
from manyheads.trace.prompts.maps import PromptMaps
from manyheads.trace.prompts.prompt_cam import PAPER

_CSS = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem }
.maps div { font: .8rem/1.4 var(--sans); color: var(--soft) } .maps b { color: var(--ink); font-weight: 600 }
.maps svg { display: block; width: 100%; height: auto; margin-bottom: .35rem } .maps image { image-rendering: pixelated }
.maps .veil { fill: var(--paper) } .maps .peak { fill: none; stroke: var(--hue) }
"""

_TERMS = {
    "Class prompt": "A learned token of one class; a class wins when its prompt finds what it looks for in the image.",
    "Map": "How much one head of the prompt attends to each patch: clear where most, veiled where least.",
    "p": "The probability of the class (not a p-value).",
    "Blurred": "The head's attention made the same for all patches. Heads are blurred one by one, the one that costs "
    "least first; the rank is the reverse order.",
    "Runner-up": "The class with the next highest probability, for comparison.",
}


@page_of(PromptMaps)
def prompt_page(maps: PromptMaps, *, survivors: int = 4) -> str:
    """The image, each head's map, the best first, and the same heads for the runner-up's prompt."""
    k = survivors
    frame = maps.to_frame()
    alone = maps.clean if k >= len(frame) else float(frame.p_blurred[k])
    agreeing = int(frame.rival_peaks_there.sum())
    facts = {
        "Class": maps.classes[maps.target],
        "p": number(maps.clean, 3),
        f"p with {min(k, len(frame))} heads left": number(alone, 3),
        "p with all blurred": number(float(maps.p[0]), 3),
        "Runner-up": maps.classes[maps.rival],
        "Its p": number(float(maps.probabilities[maps.rival]), 3),
    }
    lede = f"Where the heads of layer {maps.layer} look that make the prompt of class {maps.classes[maps.target]} win. "
    if maps.predicted != maps.target:
        lede = (
            f"Where the prompt of class {maps.classes[maps.target]} looks; the image is called "
            f"{maps.classes[maps.predicted]}. "
        )
    image = png_uri(maps.pixels)
    best = [
        el("div", _picture(maps, image, maps.values[h]), el("b", str(Head(maps.layer, int(h)))), " " + _rank(i, k))
        for i, h in enumerate(maps.order)
    ]
    rivals = [
        el("div", _picture(maps, image, maps.rival_values[h]), el("b", str(Head(maps.layer, int(h)))))
        for h in maps.order[:k]
    ]
    plain = el("div", _picture(maps, image, None), el("b", "the image"))
    caption = (
        "Clear where the head's weight on a patch is highest, veiled where it is lowest; the peak is outlined. Heads in "
        "the order in which greedy blurring spared them. "
    )
    warning = (
        f"The same heads for the prompt of the runner-up, {maps.classes[maps.rival]}. Its peak lies on the same patch in "
        f"{agreeing} of {len(frame)} heads: a map does not show evidence that its class alone has."
    )
    columns = ("rank", "head", "p_blurred", "on_patches", "peak")
    cells = frame.loc[:, list(columns)].itertuples(index=False)
    rows = [el("tr", *[el("td", number(v, 3) if isinstance(v, float) else v) for v in row]) for row in cells]
    titles = ("Rank", "Head", "p, it and all below blurred", "Weight on patches", "Highest weight")
    main = el(
        "main",
        el("figure", el("div", plain, *best, class_="maps b0"), el("figcaption", caption, with_links(PAPER))),
        el("figure", el("div", *rivals, class_="maps b1"), el("figcaption", warning)),
        plain_table(titles, rows, label="Heads in the order in which they were spared"),
    )
    title = f"Prompt-CAM: {maps.classes[maps.target]}"
    return page(
        title, join(masthead("Prompt-CAM", "What the class looks at", lede, facts, how_to_read(_TERMS)), main), css=_CSS
    )


def _rank(i: int, k: int) -> str:
    return f"rank {i + 1}" + (", kept" if i < k else "")


def _picture(maps: PromptMaps, image: str, values: Float[np.ndarray, "rows columns"] | None) -> Html:
    """The image, veiled by how far below the map's peak each patch is."""
    height, width = maps.pixels.shape[1:]
    cells = []
    if values is not None:
        rows, columns = values.shape
        high, wide = height // rows, width // columns
        span = max(float(values.max() - values.min()), 1e-12)
        for at, value in np.ndenumerate(values):
            place = {"x": at[1] * wide, "y": at[0] * high, "width": wide, "height": high}
            veil = 0.85 * (1 - float(value - values.min()) / span)
            cells.append(el("rect", class_="veil", fill_opacity=f"{veil:.2f}", data_tip=f"{value:.3f}", **place))
        row, column = divmod(int(values.argmax()), columns)
        edge = max(height, width) / 80
        cells.append(
            el(
                "rect",
                class_="peak",
                stroke_width=f"{edge:.3g}",
                x=column * wide,
                y=row * high,
                width=wide,
                height=high,
            )
        )
    shown = el("image", href=image, width=width, height=height)
    return el(
        "svg", shown, *cells, viewBox=f"0 0 {width} {height}", role="img", aria_label="the image and where it looks"
    )
