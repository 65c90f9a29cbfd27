"""Vision heads as a page: which heads matter, how far they look, what CLS sees, and the map of their patterns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.vision.heads import VisionHeads
from manyheads.atlas.vision.patterns import NAMES
from manyheads.atlas.vision.pruning import ABOUTS, METRICS, PruningCheck
from manyheads.atlas.vision.strength import DISTANCE
from manyheads.heads import Head, HeadScores
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, Strip, grid_css, heat_table, hue, strips
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table, with_links
from manyheads.report.numbers import count, number, p_equals, plus_minus

_DOTS = 1500  # of the map, at most
_CSS = """
.small-multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); gap: .9rem 1.1rem }
.small-multiples > div { font: .76rem/1.4 var(--sans); color: var(--soft) } .small-multiples b { color: var(--ink) }
.small-multiples svg { display: block; width: 100%; height: auto }
.curve .line { fill: none; stroke: var(--hue); stroke-width: 2; vector-effect: non-scaling-stroke }
.curve .even { fill: none; stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 2; vector-effect: non-scaling-stroke }
.curve .base { stroke: var(--rule); stroke-width: 1; vector-effect: non-scaling-stroke }
.raster { background: var(--zero) }
.scatter { display: block; width: 100%; max-width: 34rem; height: auto; background: var(--panel) }
.scatter circle { fill: var(--hue); fill-opacity: .55 }
"""

_TERMS = {
    "L4H2": "Head 2 of layer 4; both are counted from 0.",
    "Pruning": "Puts zero in place of a head's output. What the classifier then loses is the head's importance.",
    "Distance": "How far, in patches, a patch attends on average.",
    "CLS": "The token that the class is read from.",
    "p": "How often random heads of the same layers cost as much. With 20 random sets it cannot be below 0.048.",
}


@page_of(VisionHeads)
def vision_page(found: VisionHeads) -> str:
    """Which heads of a vision transformer matter, how far they look, what CLS sees, and the map of their patterns."""
    body = join(
        _top(found),
        el("main", _importance(found), _sets(found), _classes(found), _strength(found), _cls(found), _patterns(found)),
    )
    css = grid_css(found.importance["probability_drop"].shape[1]) + _CSS
    return page(f"{found.name}: heads of a vision transformer", body, css=css)


def _top(found: VisionHeads) -> Html:
    grid, n = found.strength.grid, found.importance["changed"].n
    n_layers, n_heads = found.importance["changed"].shape
    facts = {
        "Layers": n_layers,
        "Heads a layer": n_heads,
        "Patches": f"{grid.rows} × {grid.columns}",
        "Other tokens": grid.special,
        "Images": n,
        "Accuracy": number(found.importance.accuracy, 3),
        "Fingerprint": el("code", found.fingerprint),
    }
    return masthead("Heads of a vision transformer", found.name, _summary(found), facts, how_to_read(_TERMS))


def _summary(found: VisionHeads) -> str:
    check, strength = found.checks["most important"], found.strength
    frame = found.patterns.to_frame()["pattern"].value_counts()
    kinds = ", ".join(f"{n} {name}" for name, n in frame.items())
    return (
        f"Pruned together, {check.heads} cost {number(check.effect)} of the true class's probability, random heads of the "
        f"same layers {number(float(np.mean(check.random_effects)) if check.random_effects else float('nan'))}. Heads look "
        f"{number(float(strength.distance.values.mean()))} patches far on average, where even attention would look "
        f"{number(strength.uniform_distance)}. Commonest patterns: {kinds}."
    )


def _section(title: str, *inner: object, i: int = 0) -> Html:
    return el("section", el("h2", title), *inner, class_=f"behaviour {hue(i)}")


def _heat(scores: HeadScores, about: About, i: int) -> Html:
    scale = ColourScale.holding(scores.values)
    label = f"{about.title}: {about.formula}, in {about.unit}"
    caption = el("figcaption", label, el("span", scale.key(), class_="keys"))
    return el("figure", heat_table(scores, scale, label=label), caption, class_=hue(i))


def _importance(found: VisionHeads) -> Html:
    figures = [_heat(found.importance[name], ABOUTS[name], i) for i, name in enumerate(METRICS)]
    return _section(
        "What pruning one head costs",
        el("p", "After ", with_links(f"Li et al., {DISTANCE.paper}"), class_="small soft"),
        el("div", *figures, class_="trio"),
        el(
            "p",
            "A head that another one can replace costs nothing alone, so sets of heads are pruned below.",
            class_="small soft",
        ),
    )


def _sets(found: VisionHeads) -> Html:
    rows = [
        Strip(name.capitalize(), check.effect, check.stderr, check.random_effects, _verdict(check))
        for name, check in found.checks.items()
    ]
    caption = (
        "Heads chosen on one half of the images, pruned together on the other: diamonds, ± standard error; dots are random "
        "sets with as many heads in each layer."
    )
    figure = strips(rows, axis="drop of the true class's probability", label="Sets of heads beside random ones")
    return _section("Sets, not single heads", el("figure", figure, el("figcaption", caption)))


def _verdict(check: PruningCheck) -> Html:
    sets = count(len(check.random_effects), "random set")
    more = f"{check.heads}; {sets}; one by one they cost {number(sum(check.alone))} in all."
    return join(p_equals(check.p_value), f": {more}")


def _classes(found: VisionHeads) -> Html:
    frame = found.importance.classes()
    rows = []
    for label, group in frame[frame["n"] > 0].groupby("class"):
        best = group.nlargest(3, "probability_drop")
        heads = ", ".join(f"{h} {number(d)}" for h, d in zip(best["head"], best["probability_drop"], strict=True))
        rows.append((label, int(group["n"].iloc[0]), heads))
    return _section(
        "Class by class", _table("Class by class", ("Class", "Images", "Largest drops of its probability"), rows)
    )


def _strength(found: VisionHeads) -> Html:
    strength = found.strength
    most = float(max(strength.share.max(), strength.uniform.max()))
    shape = strength.distance.shape
    curves = [
        el(
            "div",
            el("b", str(head)),
            f" {number(strength.distance[head])}",
            _curve(strength.share[head], strength.uniform, most, f"{head}: share of attention by distance"),
        )
        for head in (Head(layer, i) for layer in range(shape[0]) for i in range(shape[1]))
    ]
    far = strength.sum.shape[-1] - 1
    caption = (
        f"Share of patches' attention at Chebyshev distance 0 to {far} (left to right; the frame's height is {number(most)}), "
        "and mean distance. Dashed: even attention on this grid, which falls at the end because rings there leave the image."
    )
    layers = strength.layers()
    rows = [
        tuple(int(v) if c == "layer" else number(v) for c, v in zip(layers, row, strict=True)) for row in layers.values
    ]
    trend = f"Trend: {plus_minus(strength.trend, strength.trend_stderr)} patches a layer."
    return _section(
        "How far heads look",
        el("div", _heat(strength.distance, DISTANCE, 2), class_="trio"),
        el("figure", el("div", *curves, class_="small-multiples"), el("figcaption", caption), class_=hue(2)),
        el("p", trend),
        _table("How far heads look, by layer", [c.capitalize() for c in layers], rows),
        i=2,
    )


def _curve(share: Float[np.ndarray, "K"], uniform: Float[np.ndarray, "K"], most: float, label: str) -> Html:
    def line(values: Float[np.ndarray, "K"]) -> str:
        x = np.linspace(2, 98, len(values))
        return " ".join(f"{a:.1f},{58 - 54 * b / most:.1f}" for a, b in zip(x, values, strict=True))

    return el(
        "svg",
        el("line", x1=0, x2=100, y1=58, y2=58, class_="base"),
        el("polyline", points=line(uniform), class_="even"),
        el("polyline", points=line(share), class_="line"),
        viewBox="0 0 100 60",
        class_="curve",
        role="img",
        aria_label=label,
    )


def _cls(found: VisionHeads) -> Html | None:
    maps = found.strength.cls
    if maps is None:
        return None
    pictures = [
        el("div", el("b", f"L{layer}H{i}"), _raster(maps[layer, i], f"L{layer}H{i}: what CLS attends to"))
        for layer in range(maps.shape[0])
        for i in range(maps.shape[1])
    ]
    caption = "Mean attention from CLS to each patch; each map from 0 to its own maximum."
    figure = el("figure", el("div", *pictures, class_="small-multiples"), el("figcaption", caption), class_=hue(3))
    return _section("What CLS attends to", figure, i=3)


def _raster(values: Float[np.ndarray, "Y X"], label: str) -> Html:
    """A picture from 0 to its maximum, a path for each colour."""
    scale = ColourScale(0.0, max(float(values.max()), 1e-12))
    strokes: dict[str, list[str]] = {}
    for y, row in enumerate(values):
        x = 0
        for step, run in groupby(scale.step(float(v)) for v in row):
            width = len(list(run))
            strokes.setdefault(step, []).append(f"M{x} {y}.5h{width}")
            x += width
    paths = [el("path", d="".join(d), class_=step) for step, d in sorted(strokes.items())]
    size = f"0 0 {values.shape[1]} {values.shape[0]}"
    return el("svg", el("g", *paths, class_="cells"), viewBox=size, class_="raster", role="img", aria_label=label)


def _patterns(found: VisionHeads) -> Html:
    learned = found.patterns.map
    hues = {name: hue(i) for i, name in enumerate(NAMES)}
    clusters = [
        el(
            "div",
            el("span", class_=f"dot-mark {hues[name]}"),
            el("b", name),
            f" {count(int((learned.cluster == c).sum()), 'map')}",
            el("div", _raster(learned.pictures[c], f"mean profile of a cluster named {name}"), class_=hues[name]),
        )
        for c, name in sorted(enumerate(learned.names), key=lambda pair: NAMES.index(pair[1]))
    ]
    caption = (
        "The autoencoder's two numbers for every head and image, coloured by the name of the cluster. It restores "
        f"{number(learned.restored)} of the variance, two principal components {number(learned.restored_linearly)}."
    )
    about = (
        "Mean profile of each cluster: the middle is the patch that attends, other places are patches that far away."
    )
    frame = found.patterns.to_frame()
    rows = [
        (row["head"], row["pattern"], ", ".join(f"{name} {number(row[name])}" for name in NAMES if row[name] > 0))
        for _, row in frame.iterrows()
    ]
    return _section(
        "What attention looks like",
        el("figure", _scatter(learned.latent, [hues[name] for name in learned.name]), el("figcaption", caption)),
        el("figure", el("div", *clusters, class_="small-multiples"), el("figcaption", about)),
        _heads(found.patterns.profiles, frame, hues),
        _table("Patterns by head", ("Head", "Pattern", "Share of images"), rows),
        i=4,
    )


def _heads(profiles: Float[np.ndarray, "L H Y X"], frame: pd.DataFrame, hues: dict[str, str]) -> Html:
    pictures = [
        el(
            "div",
            el("b", row["head"]),
            f" {row['pattern']}",
            el(
                "div",
                _raster(profiles[row["layer"], row["index"]], f"{row['head']}: mean profile"),
                class_=hues[row["pattern"]],
            ),
        )
        for _, row in frame.iterrows()
    ]
    caption = "Mean profile of each head, over images; each from 0 to its own maximum."
    return el("figure", el("div", *pictures, class_="small-multiples"), el("figcaption", caption))


def _scatter(latent: Float[np.ndarray, "M 2"], hues: list[str]) -> Html:
    low, high = latent.min(0), latent.max(0)
    places = 10 + 380 * (latent - low) / np.maximum(high - low, 1e-12)
    shown = np.linspace(0, len(latent) - 1, min(_DOTS, len(latent))).astype(int)
    dots = [
        el("circle", cx=round(places[i, 0], 1), cy=round(400 - places[i, 1], 1), r=3, class_=hues[i]) for i in shown
    ]
    label = "Map of attention patterns: a dot a head and image"
    return el("svg", *dots, viewBox="0 0 400 400", class_="scatter", role="img", aria_label=label)


def _table(label: str, titles: Sequence[str], rows: Sequence[tuple[object, ...]]) -> Html:
    body = [el("tr", [el("td", str(cell)) for cell in row]) for row in rows]
    return plain_table(titles, body, class_="plain overview", label=label)
