"""Feature cards (#10) as a page: where a feature is active, what it reads, which heads make it, what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from manyheads.heads import Head
from manyheads.model.headmodel import HeadModel
from manyheads.report import page_of
from manyheads.report.figures import ColourScale, hue, score_bar, token_strip
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import count, number, visible
from manyheads.trace.sae.features import FeatureCard, FeatureExample, FeatureReport, Polysemanticity

SHOWN, BEFORE, AFTER = 5, 24, 4  # examples of a feature, tokens of context

_TERMS = {
    "L4H2": "Head 2 of layer 4; both are counted from 0.",
    "Feature": "A direction that a sparse autoencoder found in the attention output of this layer. Its activation is "
    "how much of it is in that output at a token.",
    "Share of decoder": "How much of the direction lies in that head's output.",
    "Attribution": "How much of the activation that head made in the examples.",
    "Raises, Lowers": "The next tokens whose logits (scores before the softmax) the direction moves most.",
    "Short context, induction": "What the feature needs: only the last few tokens, or an earlier occurrence of the same token.",
}


@page_of(FeatureReport)
def features_page(found: FeatureReport) -> str:
    """Where each feature is active, what it reads, which heads make it, what it writes."""
    cards, sae, name = found.cards, found.sae, token_names(found.model)
    body = join(
        masthead(
            "Features of attention outputs",
            f"Layer {sae.layer}: {count(len(cards), 'feature')} of {sae.n_features}",
            _summary(cards),
            None,
            how_to_read(_TERMS),
        ),
        el(
            "main",
            _heads(found.heads) if found.heads is not None else None,
            *[_card(card, sae.layer, name, i) for i, card in enumerate(cards)],
        ),
    )
    return page(f"Features of layer {sae.layer}", body)


def token_names(model: HeadModel) -> Callable[[int], str]:
    """Tokens as text, or as numbers where the model has no tokenizer."""
    tokenizer = model.tokenizer
    return str if tokenizer is None else lambda i: str(tokenizer.decode([i]))


def _summary(cards: Sequence[FeatureCard]) -> str:
    families = [family for card in cards for family in card.families]
    found = ", ".join(f"{families.count(name)} {name}" for name in ("induction", "short context", "long context"))
    return f"By what they need: {found}. Blue tokens raise a feature, orange ones lower it."


def _heads(found: Polysemanticity) -> Html:
    rows = [
        el(
            "tr",
            el("th", str(Head(found.layer, h)), scope="row"),
            el("td", int(n)),
            el("td", ", ".join(map(str, features))),
        )
        for h, (n, features) in enumerate(zip(found.concepts, found.features, strict=True))
    ]
    summary = (
        f"{number(100 * found.share, 0)}% of heads have top features of more than one concept; of random sets of features "
        f"{number(100 * found.random_share, 0)}% do, with {number(float(np.mean(found.random)), 1)} concepts on average."
    )
    return el(
        "section",
        el("h2", "Heads"),
        el("p", summary, class_="small soft"),
        plain_table(("Head", "Concepts", "Its top features"), rows, label="Concepts of each head"),
    )


def _card(card: FeatureCard, layer: int, name: Callable[[int], str], i: int) -> Html:
    families = ", ".join(card.families) or "no family"
    facts = (
        f"Active on {number(100 * card.density, 2)}% of tokens; {families} (short context {number(card.short)}, induction "
        f"{number(card.induction)})."
    )
    shown = [_example(example, name) for example in card.examples[:SHOWN]]
    return el(
        "section",
        el("h2", f"Feature {card.feature}"),
        el("p", facts),
        el("div", _shares(card, layer), _logits(card, name), class_="pair beside"),
        el("h3", "Most active"),
        *(shown or [el("p", "Nowhere in these texts.", class_="small soft")]),
        id=f"feature-{card.feature}",
        class_=f"behaviour {hue(i)}",
    )


def _shares(card: FeatureCard, layer: int) -> Html:
    """Heads by decoder norm, beside what they did in the examples."""
    acted = np.mean([e.heads for e in card.examples], 0) if card.examples else np.full(len(card.head_shares), np.nan)
    scale = ColourScale(0.0, max(float(card.head_shares.max()), 1e-9))
    rows = [
        el(
            "tr",
            el("th", str(Head(layer, h)), scope="row"),
            el("td", score_bar(float(card.head_shares[h]), 0.0, scale), class_="bar-cell"),
            el("td", number(float(card.head_shares[h]))),
            el("td", number(float(acted[h]))),
        )
        for h in np.argsort(-card.head_shares, kind="stable")[:8]
    ]
    titles = ("Head", "", "Share of decoder", "Attribution")
    return plain_table(titles, rows, label=f"Heads that make feature {card.feature}")


def _logits(card: FeatureCard, name: Callable[[int], str]) -> Html:
    rows = [
        el(
            "tr",
            el("td", visible(name(up))),
            el("td", number(high)),
            el("td", visible(name(down))),
            el("td", number(low)),
        )
        for (up, high), (down, low) in zip(card.top, card.bottom, strict=True)
    ]
    return plain_table(("Raises", "by", "Lowers", "by"), rows, label=f"What feature {card.feature} writes")


def _example(example: FeatureExample, name: Callable[[int], str]) -> Html:
    at = example.position
    start = max(0, at - BEFORE)
    near = slice(start, at + AFTER + 1)
    tokens = [name(int(i)) for i in example.ids[near]]
    most = max(float(np.abs(example.sources).max()), 1e-9)
    cut = f" (the first {count(start, 'token')} left out)" if start else ""
    caption = f"{number(example.activation)} at “{visible(name(int(example.ids[at])))}”{cut}"
    return el(
        "figure",
        el("figcaption", caption),
        token_strip(tokens, example.activations[near], ColourScale(0.0, max(example.activation, 1e-9))),
        el("p", "The tokens it was read from", class_="small soft"),
        token_strip(tokens, example.sources[near], ColourScale(-most, most)),
    )
