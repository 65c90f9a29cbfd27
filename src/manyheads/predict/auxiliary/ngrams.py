"""ERNIE-Gram (#92): a whole n-gram hides behind one mask, and is predicted as one thing and token by token.

Xiao et al., arXiv:2010.12148. N-grams worth a name are those whose tokens meet more often than chance would have it,

    t  =  (p(w_1 .. w_n) - p(w_1) .. p(w_n)) / sqrt(p(w_1 .. w_n) / N)

A text is cut into the longest ones (left to right) and single tokens. About 15 % of these units are masked, each by one mask
token at the place of its first token; all other tokens keep their true places. Two heads read an encoder of Transformers:

    coarse   at the mask: which token or n-gram, of V + G
    fine     at n slots behind the text, at the n-gram's true places: which token, of V. A slot sees the text and itself; no token
             of the text sees a slot, so the text's states are the same with and without slots

Their losses add up. `ReplacedNgrams` adds a small generator: an encoder with a coarse head of its own that learns as above. An
identity drawn from it stands in a mask's place, as one symbol with an embedding, and the model

    recovers     the original, coarse and fine, as behind a mask
    detects      for every unit of the text that is no mask, whether it was replaced: binary cross-entropy, nats a unit

    L  =  generator's  +  coarse  +  fine  +  weight * detection

What the generator draws right counts as not replaced. No gradient runs from the model to the generator. Slots are mask tokens
here; the paper has a symbol of their own for them.
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

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number
from manyheads.learning import LinearHead
from manyheads.training import TrainSettings, fit, generator_of

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

    def without_slots(self) -> Masked:
        """The texts alone."""
        n, short = self.text, {}
        for name in ("input_ids", "position_ids", "coarse", "fine"):
            short[name] = getattr(self, name)[:, :n]
        return replace(self, attention=self.attention[..., :n, :n], **short)


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

    def states(self, batch: Masked, embeds: Float[Tensor, "B S E"] | None = None) -> Float[Tensor, "B S D"]:
        """The encoder's last states, of text and slots; of other embeddings than those of the tokens, if given."""
        given = {"input_ids": batch.input_ids} if embeds is None else {"inputs_embeds": embeds}
        out: Any = self.encoder(**given, position_ids=batch.position_ids, attention_mask=batch.attention)
        states: Tensor = out.last_hidden_state
        return states

    def forward(self, batch: Masked) -> Float[Tensor, ""]:
        """The sum of both losses, in nats a mask and a token."""
        return self.loss(self.states(batch), batch)

    def loss(self, states: Float[Tensor, "B S D"], batch: Masked) -> Float[Tensor, ""]:
        """The same, of states."""
        loss = _cross_entropy(self.coarse, states, batch.coarse)
        return loss + _cross_entropy(self.fine, states, batch.fine) if bool((batch.fine >= 0).any()) else loss

    def masked(self, rows: Sequence[Sequence[int]], **options: Any) -> Masked:
        """`masked`, with this lexicon."""
        return masked(rows, self.lexicon, self.mask_id, self.vocabulary, **options)

    def fit(self, rows: Sequence[Sequence[int]], settings: TrainSettings, *, whole: bool = True, **options: Any) -> Any:
        """Train encoder and heads in place on texts of tokens; the options are those of `training.fit`."""

        return fit(self, self.batches(rows, settings, whole=whole), settings, **options)

    def batches(
        self, rows: Sequence[Sequence[int]], settings: TrainSettings, *, whole: bool = True
    ) -> Callable[[int], Masked]:
        """Batches of `settings.rows` texts, drawn and masked at random, by number."""

        def batch(number: int) -> Masked:
            draw = generator_of(settings.seed, number)
            chosen = torch.randint(len(rows), (settings.rows,), generator=draw).tolist()
            return self.masked([rows[i] for i in chosen], whole=whole, generator=draw)

        return batch

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


@dataclass(frozen=True)
class Replaced:
    """What stands in place of masks: `drawn` numbers below V are tokens, V + g n-grams, -100 where nothing was drawn.

    `labels` are 1 where what stands there is not the original, 0 where it is, -100 at masks, slots and beyond the text's end.
    """

    drawn: Int[Tensor, "B S"]
    labels: Int[Tensor, "B S"]


class ReplacedNgrams(nn.Module):
    """A generator draws n-grams in place of masks, and `heads` learn to recover and to detect (see above).

    Each mask is replaced with probability `share`; the others stay, so that the model also knows masks. `weight` is that of
    detection. The generator is another encoder of the same tokens, smaller as a rule. Afterwards `heads.encoder` alone is left.
    """

    def __init__(
        self, heads: MaskedNgrams, generator: nn.Module, *, share: float = 0.5, weight: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.share = check_number(share, "share", 0.0, 1.0, above=True)
        self.weight = check_number(weight, "weight", 0.0)
        self.heads = heads
        self.generator = MaskedNgrams(
            generator, list(heads.lexicon), mask_id=heads.mask_id, vocabulary=heads.vocabulary, seed=seed + 2
        )
        self.generator.fine.requires_grad_(False)  # it predicts identities alone
        self.grams = nn.Embedding(len(heads.lexicon), self._words.embedding_dim)
        with torch.no_grad():
            draw = torch.Generator().manual_seed(seed + 3)
            self.grams.weight.copy_(torch.randn(self.grams.weight.shape, generator=draw) * self._words.weight.std())
        self.detector = LinearHead.seeded(heads.coarse.in_features, 1, seed + 4)

    def forward(self, batch: Masked) -> Float[Tensor, ""]:
        """The sum of all losses. What is drawn is drawn by torch's random state."""
        bare = batch.without_slots()
        guesses = self.generator.coarse(self.generator.states(bare))
        given = bare.coarse >= 0
        learned = F.cross_entropy(guesses[given], bare.coarse[given])
        found = self.replaced(batch, guesses.detach())
        states = self.heads.states(batch, self.embeds(batch, found))
        return learned + self.heads.loss(states, batch) + self.weight * self._detection(states, found)

    def replaced(self, batch: Masked, guesses: Float[Tensor, "B T U"]) -> Replaced:
        """Draw what stands in place of masks from the generator's logits."""
        drawn, labels = torch.full_like(batch.coarse, -100), torch.full_like(batch.coarse, -100)
        real = batch.attention[:, 0, 0, : batch.text] == 0  # the first unit sees the text, and nothing beyond its end
        mask = batch.coarse[:, : batch.text] >= 0
        chosen = mask & (torch.rand(mask.shape, device=mask.device) < self.share)
        drawn[:, : batch.text][chosen] = torch.multinomial(guesses[chosen].softmax(-1), 1)[:, 0]
        labels[:, : batch.text][real & ~mask] = 0
        labels[:, : batch.text][chosen] = (drawn != batch.coarse)[:, : batch.text][chosen].long()
        return Replaced(drawn, labels)

    def embeds(self, batch: Masked, found: Replaced) -> Float[Tensor, "B S E"]:
        """The model's input: the tokens' embeddings, with those of what was drawn."""
        token, gram = (found.drawn >= 0) & (found.drawn < self.heads.vocabulary), found.drawn >= self.heads.vocabulary
        ids = torch.where(token, found.drawn, batch.input_ids)
        out: Tensor = self._words(ids)
        return out.masked_scatter(gram[..., None], self.grams(found.drawn[gram] - self.heads.vocabulary))

    @property
    def _words(self) -> Any:
        return self.heads.encoder.get_input_embeddings()  # type: ignore[operator]

    def _detection(self, states: Tensor, found: Replaced) -> Tensor:
        asked = found.labels >= 0
        return F.binary_cross_entropy_with_logits(self.detector(states[asked])[:, 0], found.labels[asked].float())

    def fit(self, rows: Sequence[Sequence[int]], settings: TrainSettings, **options: Any) -> Any:
        """Train generator and model together in place, on texts of tokens; the options are those of `training.fit`."""
        return fit(self, self.heads.batches(rows, settings), settings, **options)

    @torch.no_grad()
    def detection(
        self, rows: Sequence[Sequence[int]], seed: int = 0
    ) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"]]:
        """Of every unit of masked and replaced texts: whether it was replaced, and the detector's logit."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batch = self.heads.masked(rows)
            found = self.replaced(batch, self.generator.coarse(self.generator.states(batch.without_slots())))
        asked = found.labels >= 0
        states = self.heads.states(batch, self.embeds(batch, found))[asked]
        return found.labels[asked].numpy(), self.detector(states)[:, 0].numpy()


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
