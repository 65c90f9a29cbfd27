"""What an autoencoder's features stand for (#10): dashboards, families, and how many things a head does.

Kissane et al., arXiv:2406.17759. A dashboard shows where a feature fires most and on what prompt, what it writes to the logits
by itself, whose heads' it is (decoder norms) and which tokens those heads read it from (direct feature attribution).

A family is a rule that a feature's strongest examples obey, judged at the token s that its activation is read from most and the
token t where it fires:

    induction        the token before s is the token t, and s is no neighbour of t            in >= `SHARE` of the examples
    previous token   s = t - 1
    same token       the token at s is the token t, s < t
    first token      s = 0
    short context    s lies within `NEAR` tokens of t                                          (and none of the above)
    long context     s lies further back

A head is a *candidate* for doing one thing only if its `TOP` features (by decoder share) that fire are of one family; the rest is
polysemantic. This is a rule in place of the paper's reading by eye, and coarser: features of one family may still mean
different things, so it counts too many candidates rather than too few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.heads import Head
from manyheads.model.circuits import readout
from manyheads.model.headmodel import HeadModel
from manyheads.report.figures import Scale, token_strip
from manyheads.report.html import Html, el, join, page
from manyheads.report.numbers import number, visible
from manyheads.trace.attention_sae import AttentionSae
from manyheads.trace.sae_attribution import attribute_feature

FAMILIES = ("induction", "previous token", "same token", "first token", "short context", "long context")
SHARE, NEAR, TOP = 0.5, 5, 10
ROWS = 32


@dataclass(frozen=True)
class Example:
    """A prompt on which a feature fires: `activations` of every token, where it is strongest, and how much of that each token
    gave it (`sources`, summed over heads)."""

    tokens: Int[Tensor, "T"]
    activations: Float[Tensor, "T"]
    position: int
    sources: Float[Tensor, "T"]

    @property
    def family(self) -> str:
        """The rule that this example obeys."""
        t, s = self.position, int(self.sources[: self.position + 1].argmax())
        if s == 0:
            return "first token"
        if s == t - 1:
            return "previous token"
        if s < t and self.tokens[s] == self.tokens[t]:
            return "same token"
        if s < t and self.tokens[s - 1] == self.tokens[t]:
            return "induction"
        return "short context" if t - s <= NEAR else "long context"


@dataclass(frozen=True)
class Dashboard:
    """One feature: how often it fires, its strongest examples, the tokens it raises and lowers most, its heads' shares."""

    feature: int
    layer: int
    density: float
    examples: list[Example]
    raised: list[tuple[int, float]]
    lowered: list[tuple[int, float]]
    heads: Float[Tensor, "H"]

    @property
    def family(self) -> str:
        """The family of at least half of its examples, else "mixed"."""
        if not self.examples:
            return "dead"
        name, count = Counter(example.family for example in self.examples).most_common(1)[0]
        return name if count >= SHARE * len(self.examples) else "mixed"


@dataclass(frozen=True)
class HeadMeaning:
    """What one head's strongest features are: `families` by count, `candidate` for doing a single thing."""

    head: Head
    features: list[int]
    families: dict[str, int]

    @property
    def candidate(self) -> bool:
        """Whether all of them are of one family, "mixed" being none."""
        return len(self.families) == 1 and "mixed" not in self.families


@torch.no_grad()
def dashboards(
    sae: AttentionSae, model: HeadModel, tokens: Int[Tensor, "N T"], features: Sequence[int], *, examples: int = 8
) -> list[Dashboard]:
    """The dashboards of `features` on prompts `tokens`. `InputError` for a feature that is not there."""
    sae.check(model)
    missing = [i for i in features if not 0 <= i < sae.n_features]
    if missing:
        raise InputError(f"there is no feature {missing[0]}; this autoencoder has 0-{sae.n_features - 1}.")
    chosen = torch.as_tensor(list(features))
    active = torch.cat([sae.read(model, rows)[..., chosen].cpu() for rows in tokens.split(ROWS)])
    logits = _logits(sae, model, chosen)
    shares = sae.head_shares()
    return [
        _dashboard(sae, model, tokens, i, active[..., k], logits[k], shares[i], examples)
        for k, i in enumerate(features)
    ]


def _logits(sae: AttentionSae, model: HeadModel, features: Int[Tensor, "K"]) -> Float[Tensor, "K V"]:
    """What each decoder row writes, through the final norm's gain, by token."""
    W_O = model.W_O(sae.layer).detach().flatten(0, 1).double()
    writes = sae.W_dec[features].double().to(W_O.device) @ W_O
    everything = readout(model, torch.arange(model.vocab_size, device=model.device)).double()
    return (writes @ everything.T).cpu()


def _dashboard(
    sae: AttentionSae,
    model: HeadModel,
    tokens: Int[Tensor, "N T"],
    feature: int,
    active: Float[Tensor, "N T"],
    logits: Float[Tensor, "V"],
    heads: Float[Tensor, "H"],
    n: int,
) -> Dashboard:
    strongest, places = active.max(1)
    rows = [int(r) for r in strongest.argsort(descending=True)[:n] if strongest[r] > 0]
    shown = []
    for row in rows:
        position = int(places[row])
        terms = attribute_feature(model, sae, tokens[row : row + 1], feature, position=position).terms
        shown.append(Example(tokens[row], active[row], position, terms.sum(0)))
    order = logits.argsort(descending=True).tolist()
    return Dashboard(
        feature=feature,
        layer=sae.layer,
        density=float((active > 0).float().mean()),
        examples=shown,
        raised=[(i, float(logits[i])) for i in order[:TOP]],
        lowered=[(i, float(logits[i])) for i in order[: -TOP - 1 : -1]],
        heads=heads,
    )


def head_meanings(
    sae: AttentionSae, model: HeadModel, tokens: Int[Tensor, "N T"], *, top: int = TOP
) -> list[HeadMeaning]:
    """Every head of the layer by the families of its `top` features that fire on `tokens`."""
    with torch.no_grad():
        fires = torch.cat([(sae.read(model, rows) > 0).flatten(0, 1).any(0)[None].cpu() for rows in tokens.split(ROWS)])
    alive = fires.any(0)
    shares = torch.where(alive[:, None], sae.head_shares(), -1.0)
    found = []
    for h in range(sae.n_heads):
        best = [int(i) for i in shares[:, h].argsort(descending=True)[:top] if alive[i]]
        families = Counter(board.family for board in dashboards(sae, model, tokens, best))
        found.append(HeadMeaning(Head(sae.layer, h), best, dict(families)))
    return found


def features_frame(boards: Sequence[Dashboard]) -> pd.DataFrame:
    """A row a feature: feature, family, density, its strongest head and that head's share."""
    rows = [
        (b.feature, b.family, b.density, str(Head(b.layer, int(b.heads.argmax()))), float(b.heads.max()))
        for b in boards
    ]
    return pd.DataFrame(rows, columns=["feature", "family", "density", "head", "share"])


def write_dashboards(boards: Sequence[Dashboard], model: HeadModel, path: str | Path, *, force: bool = False) -> Path:
    """Write the dashboards as one page. `InputError` if `path` exists and `force` is not set."""
    layer = boards[0].layer if boards else 0
    counts = ", ".join(f"{n} {family}" for family, n in Counter(b.family for b in boards).most_common())
    body = join(
        el(
            "header",
            el("p", "Features of attention outputs", class_="eyebrow"),
            el("h1", f"Layer {layer}"),
            el("p", f"{len(boards)} features: {counts}.", class_="lede"),
            class_="top",
        ),
        el("main", *[_section(board, model, i) for i, board in enumerate(boards)]),
    )
    text = page(f"Features of layer {layer}", body)
    return write_atomically(path, lambda file: file.write_text(text, "utf-8", newline="\n"), force=force)


def _section(board: Dashboard, model: HeadModel, i: int) -> Html:
    heads = ", ".join(
        f"{Head(board.layer, int(h))} {number(float(board.heads[h]))}" for h in board.heads.argsort(descending=True)[:4]
    )
    return el(
        "section",
        el("h2", f"Feature {board.feature}"),
        el(
            "p",
            f"{board.family}; fires on {number(100 * board.density)} % of tokens. Heads: {heads}.",
            class_="small soft",
        ),
        el("p", "Raises ", _words(board.raised, model), "; lowers ", _words(board.lowered, model), ".", class_="small"),
        *[_shown(example, model) for example in board.examples],
        class_=f"behaviour b{i % 8}",
    )


def _words(ranked: Sequence[tuple[int, float]], model: HeadModel) -> str:
    return ", ".join(f"{_text(model, i)} {number(value)}" for i, value in ranked[:5])


def _shown(example: Example, model: HeadModel) -> Html:
    texts = [_text(model, int(i)) for i in example.tokens]
    fires = example.activations.numpy().astype(np.float64)
    read = example.sources.numpy().astype(np.float64)[: example.position + 1]
    read = np.pad(read, (0, len(fires) - len(read)))
    most = max(float(np.abs(read).max()), 1e-9)
    peak = f"{number(float(fires.max()))} at {texts[example.position]}"
    return join(
        el("h3", f"{peak} · {example.family}"),
        token_strip(texts, fires, Scale(0.0, max(float(fires.max()), 1e-9))),
        el("p", "read from", class_="small soft"),
        token_strip(texts, read, Scale(-most if (read < 0).any() else 0.0, most)),
    )


def _text(model: HeadModel, token: int) -> str:
    return f"[{token}]" if model.tokenizer is None else visible(model.tokenizer.decode([token]))
