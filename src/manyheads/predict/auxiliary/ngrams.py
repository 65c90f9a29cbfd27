"""ERNIE-Gram (#92): a whole n-gram hides behind one mask, and is predicted as one thing and token by token.

Xiao et al., arXiv:2010.12148. N-grams worth a name are those whose tokens meet more often than chance would have it,

    t  =  (p(w_1 .. w_n) - p(w_1) .. p(w_n)) / sqrt(p(w_1 .. w_n) / N)

A text is cut into the longest ones (left to right) and single tokens. About 15 % of these units are masked, each by one mask
token at the place of its first token; all other tokens keep their true places. Two heads read an encoder of Transformers:

    coarse   at the mask: which token or n-gram, of V + G
    fine     at n slots behind the text, at the n-gram's true places: which token, of V. A slot sees the text and itself; no token
             of the text sees a slot, so the text's states are the same with and without slots

Their losses add up. The paper's third part, a small generator whose n-grams stand in place of masks, is not built. Slots are mask
tokens here; the paper has a symbol of their own for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer, check_number
from manyheads.learning import LinearHead
from manyheads.tasks.texts import bundled_prose
from manyheads.training import ADAM, TrainSettings, fit, generator_of

Gram = tuple[int, ...]


def ngram_lexicon(
    rows: Iterable[Sequence[int]], most: int = 10_000, *, longest: int = 3, least_count: int = 5, least_t: float = 2.6
) -> list[Gram]:
    """The n-grams of 2 to `longest` tokens with the highest t (formula above), at most `most`, best first.

    `least_t` of 2.6 is a chance of one in two hundred that the tokens meet by accident. N counts tokens.
    """
    check_integer(longest, "longest", 2)
    counts: Counter[Gram] = Counter()
    total = 0
    for row in rows:
        total += len(row)
        for n in range(1, longest + 1):
            counts.update(tuple(row[i : i + n]) for i in range(len(row) - n + 1))
    scored = []
    for gram, count in counts.items():
        if len(gram) > 1 and count >= least_count:
            chance = 1.0
            for token in gram:
                chance *= counts[(token,)] / total
            p = count / total
            scored.append(((p - chance) / (p / total) ** 0.5, gram))
    return [gram for t, gram in sorted(scored, reverse=True) if t >= least_t][:most]


def units(row: Sequence[int], lexicon: Mapping[Gram, int]) -> list[Gram]:
    """A text as n-grams of the lexicon and single tokens: at every place the longest that fits."""
    longest, found, i = max(map(len, lexicon), default=1), [], 0
    while i < len(row):
        n = next((n for n in range(longest, 1, -1) if tuple(row[i : i + n]) in lexicon and i + n <= len(row)), 1)
        found.append(tuple(row[i : i + n]))
        i += n
    return found


@dataclass(frozen=True)
class Masked:
    """Texts with masks and slots. `text` counts the columns before the slots.

    `coarse` and `fine` are targets at every column, -100 where there is none: numbers below V are tokens, V + g is n-gram g.
    """

    input_ids: Int[Tensor, "B S"]
    position_ids: Int[Tensor, "B S"]
    attention: Float[Tensor, "B 1 S S"]
    coarse: Int[Tensor, "B S"]
    fine: Int[Tensor, "B S"]
    text: int


def masked(
    rows: Sequence[Sequence[int]],
    lexicon: Mapping[Gram, int],
    mask_id: int,
    vocabulary: int,
    *,
    share: float = 0.15,
    whole: bool = True,
    generator: torch.Generator | None = None,
) -> Masked:
    """Mask `share` of the units of each text, at least one. `whole` False: a mask for every token of a unit, and no slots."""
    check_number(share, "share", 0.0, 1.0, above=True)
    texts = [_masked(units(row, lexicon), lexicon, mask_id, vocabulary, share, whole, generator) for row in rows]
    text = max(len(one["ids"]) for one in texts)
    slots = max(len(one["slots"]) for one in texts)
    size = text + slots
    ids, places = torch.full((len(rows), size), mask_id), torch.zeros(len(rows), size, dtype=torch.long)
    coarse, fine = (torch.full((len(rows), size), -100) for _ in range(2))
    sees = torch.eye(size, dtype=torch.bool).repeat(len(rows), 1, 1)
    for b, one in enumerate(texts):
        n = len(one["ids"])
        ids[b, :n], places[b, :n], coarse[b, :n] = (torch.tensor(one[name]) for name in ("ids", "places", "coarse"))
        sees[b, :, :n] = True
        for j, (place, token) in enumerate(one["slots"]):
            places[b, text + j], fine[b, text + j] = place, token
    attention = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    return Masked(ids, places, attention, coarse, fine, text)


def _masked(
    row: list[Gram],
    lexicon: Mapping[Gram, int],
    mask_id: int,
    vocabulary: int,
    share: float,
    whole: bool,
    generator: torch.Generator | None,
) -> dict[str, list[Any]]:
    chosen = set(torch.randperm(len(row), generator=generator)[: max(1, round(share * len(row)))].tolist())
    out: dict[str, list[Any]] = {"ids": [], "places": [], "coarse": [], "slots": []}
    place = 0
    for i, unit in enumerate(row):
        one_mask = i in chosen and whole
        for j, token in enumerate(unit[:1] if one_mask else unit):
            out["ids"].append(mask_id if i in chosen else token)
            out["places"].append(place + j)
            target = (vocabulary + lexicon[unit] if len(unit) > 1 else token) if one_mask else token
            out["coarse"].append(target if i in chosen else -100)
        if one_mask:
            out["slots"] += [(place + j, token) for j, token in enumerate(unit)]
        place += len(unit)
    return out


class MaskedNgrams(nn.Module):
    """Coarse and fine heads on an encoder of Transformers, which trains with them. The encoder is what is left afterwards."""

    def __init__(
        self, encoder: nn.Module, lexicon: Sequence[Gram], *, mask_id: int, vocabulary: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.encoder, self.mask_id = encoder, mask_id
        config: Any = getattr(encoder, "config", None)
        if config is None or getattr(config, "is_decoder", False) or not hasattr(config, "hidden_size"):
            raise InputError(f"{type(encoder).__name__} is no encoder of Transformers; give one, such as BertModel.")
        self.vocabulary = vocabulary or int(config.vocab_size)
        self.lexicon = {gram: i for i, gram in enumerate(lexicon)}
        self.coarse = LinearHead.seeded(config.hidden_size, self.vocabulary + len(self.lexicon), seed)
        self.fine = LinearHead.seeded(config.hidden_size, self.vocabulary, seed + 1)

    def states(self, batch: Masked) -> Float[Tensor, "B S D"]:
        """The encoder's last states, of text and slots."""
        out: Any = self.encoder(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention
        )
        states: Tensor = out.last_hidden_state
        return states

    def forward(self, batch: Masked) -> Float[Tensor, ""]:
        """The sum of both losses, in nats a mask and a token."""
        states = self.states(batch)
        loss = _cross_entropy(self.coarse, states, batch.coarse)
        return loss + _cross_entropy(self.fine, states, batch.fine) if bool((batch.fine >= 0).any()) else loss

    def masked(self, rows: Sequence[Sequence[int]], **options: Any) -> Masked:
        """`masked`, with this lexicon."""
        return masked(rows, self.lexicon, self.mask_id, self.vocabulary, **options)

    def fit(self, rows: Sequence[Sequence[int]], settings: TrainSettings, *, whole: bool = True, **options: Any) -> Any:
        """Train encoder and heads in place on texts of tokens; the options are those of `training.fit`."""

        def batch(number: int) -> Masked:
            draw = generator_of(settings.seed, number)
            chosen = torch.randint(len(rows), (settings.rows,), generator=draw).tolist()
            return self.masked([rows[i] for i in chosen], whole=whole, generator=draw)

        return fit(self, batch, settings, **options)

    @torch.no_grad()
    def accuracy(self, rows: Sequence[Sequence[int]], *, whole: bool = True, seed: int = 0) -> dict[int, float]:
        """By length of the masked n-gram: how often the coarse head names it.

        Without `whole` it is the product of how often each of its tokens is named; as many masks as tokens give its length away.
        """
        draw = torch.Generator().manual_seed(seed)
        right: dict[int, list[list[float]]] = {}
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            batch = self.masked(part, whole=whole, generator=draw)
            hit = (self.coarse(self.states(batch)).argmax(-1) == batch.coarse).float()
            for b in range(len(part)):
                for columns in _groups(batch, b, self.lexicon, self.vocabulary, whole):
                    right.setdefault(len(columns) if not whole else columns[0][1], []).append(
                        [float(hit[b, c]) for c, _ in columns]
                    )
        return {n: float(torch.tensor(found).mean(0).prod()) for n, found in sorted(right.items())}


def _groups(
    batch: Masked, b: int, lexicon: Mapping[Gram, int], vocabulary: int, whole: bool
) -> list[list[tuple[int, int]]]:
    """The columns of each masked unit, with the unit's length."""
    lengths = {i: len(gram) for gram, i in lexicon.items()}
    columns = [c for c in range(batch.text) if int(batch.coarse[b, c]) >= 0]
    if whole:
        return [[(c, lengths.get(int(batch.coarse[b, c]) - vocabulary, 1))] for c in columns]
    groups: list[list[tuple[int, int]]] = []
    for unit in _runs(columns, [int(batch.coarse[b, c]) for c in columns], lexicon):
        groups.append([(c, len(unit)) for c in unit])
    return groups


def _runs(columns: list[int], tokens: list[int], lexicon: Mapping[Gram, int]) -> list[list[int]]:
    """Neighbouring masked columns, cut into units as the text was."""
    out, i = [], 0
    while i < len(columns):
        j = i
        while j + 1 < len(columns) and columns[j + 1] == columns[j] + 1:
            j += 1
        for unit in units(tokens[i : j + 1], lexicon):
            out.append(columns[i : i + len(unit)])
            i += len(unit)
    return out


def _cross_entropy(head: nn.Module, states: Tensor, target: Tensor) -> Tensor:
    given = target >= 0
    return F.cross_entropy(head(states[given]), target[given])


# Is an n-gram known better as one thing?


@dataclass(frozen=True)
class _Texts:
    rows: list[list[int]]
    vocabulary: int  # tokens; the mask is one more
    planted: set[Gram]
    steps: int


def _planted(seed: int, steps: int) -> _Texts:
    """60 tokens; every text begins with one of 10 topics, each with two n-grams of its own, strewn among other tokens."""
    draw = torch.Generator().manual_seed(17)
    tokens = (20 + torch.randperm(40, generator=draw)).tolist()
    grams = [tuple(tokens[2 * i : 2 * i + 2 + i % 2]) for i in range(19)] + [(tokens[38], tokens[0])]
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(3000):
        topic = int(torch.randint(10, (1,), generator=draw))
        row = [topic]
        for kind in torch.rand(6, generator=draw).tolist():
            row += grams[2 * topic + int(kind < 0.25)] if kind < 0.5 else [10 + int(20 * kind) % 10]
        rows.append(row)
    return _Texts(rows, 60, set(grams), steps)


def _prose(seed: int, steps: int) -> _Texts:
    """The prose that comes with Python, in words: the 1,500 commonest, and one for all others."""
    words = [passage.lower().split() for passage in bundled_prose()]
    common = [word for word, _ in Counter(word for row in words for word in row).most_common(1499)]
    number = {word: i + 1 for i, word in enumerate(common)}
    flat = [number.get(word, 0) for row in words for word in row]
    rows = [flat[i : i + 24] for i in range(0, len(flat) - 24, 24)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return _Texts([rows[i] for i in order], 1500, set(), steps)


def _tried(whole: bool) -> Callable[[Callable[[int], _Texts], int], dict[str, float]]:
    def run(make: Callable[[int], _Texts], seed: int) -> dict[str, float]:
        data = make(seed)
        cut = len(data.rows) * 9 // 10
        lexicon = ngram_lexicon(data.rows[:cut], 400)
        config = BertConfig(
            vocab_size=data.vocabulary + 1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = BertModel(config, add_pooling_layer=False)
        heads = MaskedNgrams(encoder, lexicon, mask_id=data.vocabulary, vocabulary=data.vocabulary, seed=seed)
        settings = replace(ADAM, steps=data.steps, rows=64, rate=1e-3, warmup=100, decay=0.5, clip=1.0, seed=seed)
        heads.fit(data.rows[:cut], settings, whole=whole)
        heads.eval()
        found = heads.accuracy(data.rows[cut:], whole=whole, seed=seed)
        names = {"single tokens": 1, "bigrams": 2, "trigrams": 3}
        out = {name: found.get(n, float("nan")) for name, n in names.items()}
        if data.planted:
            out["recall"] = len(data.planted & set(lexicon)) / len(data.planted)
        return out

    return run


def _beyond(values: Mapping[tuple[str, str], float]) -> float:
    gains = [values["one mask", name] - values["a mask a token", name] for name in ("bigrams", "trigrams")]
    return float(np.nanmean(gains))


register_experiment(
    Experiment(
        "ngrams",
        (92,),
        "2010.12148",
        "Is an n-gram predicted better as one thing than token by token?",
        datasets=lambda quick: {
            "planted": lambda seed: _planted(seed, 60 if quick else 1500),
            "prose": lambda seed: _prose(seed, 60 if quick else 800),
        },
        methods={"a mask a token": _tried(False), "one mask": _tried(True)},
        baseline="a mask a token",
        claims=(
            Claim(
                "planted n-grams are in the lexicon",
                lambda v: v["one mask", "recall"],
                at_least=0.95,
                on="planted",
            ),
            Claim("planted n-grams are named 10 points more often", _beyond, at_least=0.1, on="planted"),
            Claim("n-grams of real prose are named more often", _beyond, at_least=0.0, on="prose"),
        ),
        minutes=6,
    )
)
