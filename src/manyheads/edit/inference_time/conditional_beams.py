"""Conditional beam search (#83): the likeliest text *that is not degenerate*.

Yoshida's thesis, arXiv:2408.16241, and Yoshida, Goyal and Gimpel, arXiv:2311.08817. A little low-entropy noise in training text -
some texts that are empty, some that repeat themselves - is enough for the likeliest text of all to be one of these, so that the
better a search, the worse what it finds. Searched instead is what is likeliest given A, "not degenerate": a small head on the
frozen model's hidden states h (what the unembedding reads, [D]) predicts A for every next token v at once,

    p(A | x[:t], v) = sigmoid(f(h[t-1]) . g(W_U[v]))           f an MLP to `rank`, g linear, W_U the unembedding's row of v
    score(x[:t])    = log p(x[:t]) + weight * log p(A | x[:t])    nats; beams, running and finished, are ranked by it

Weight 0 is Transformers' own beam search, token for token: the head enters as a logits processor that adds, at each step, what
the new token changes in weight * log p(A | prefix). A step costs one product [beams, rank] x [rank, V] more.

The head learns from texts that the model itself samples: every token of a text is an example, labelled by whether the whole text
came out good (cross-entropy). Ours: predicting all next tokens at once instead of running the model on each candidate; and
`length_penalty` 0, since the score is that of a mode, where Transformers divides by the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.learning import Card, Head, at_readout, fill, load, save
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import Text
from manyheads.progress import Bar
from manyheads.training import TrainSettings, drawn_rows, fit

PAPER = "arXiv:2311.08817"
KIND = "attribute head"
Good = Callable[[list[int]], bool]
LEARNING = TrainSettings(
    steps=500, rows=512, rate=3e-3, warmup=10, decay=0.5, weight_decay=0.01, precision="fp32", every=50
)


@dataclass(frozen=True)
class AttributeSizes:
    """Of states and rows of the unembedding (`width`), of their product (`rank`) and of the MLP's layer (`hidden`)."""

    width: int
    rank: int = 32
    hidden: int = 128


class AttributeHead(Head):
    """Foretells A from a prefix's last state and each token that may come next. `about` says what it learned."""

    def __init__(self, settings: AttributeSizes) -> None:
        super().__init__(settings)
        width, rank, hidden = settings.width, settings.rank, settings.hidden
        self.states = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, rank))
        self.tokens = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, rank))
        self.fingerprint = ""
        self.about: dict[str, Any] = {}

    def forward(self, states: Float[Tensor, "N D"], tokens: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """The logit of A for each pair of a state and the unembedding's row of the token that follows it."""
        return (self.states(states) * self.tokens(tokens)).sum(-1)

    def loss(self, output: Float[Tensor, "N"], target: Float[Tensor, "N"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats; targets are 1 where A."""
        return F.binary_cross_entropy_with_logits(output, target)

    def log_p(self, states: Float[Tensor, "N D"], tokens: Float[Tensor, "V D"]) -> Float[Tensor, "N V"]:
        """The log-probability log p(A | prefix, v) for all pairs, in nats."""
        return F.logsigmoid(self.states(states) @ self.tokens(tokens).T)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the head into a folder. `InputError` if it exists and `force` is not set."""
        card = Card(
            "conditional beam search",
            settings=self.described(),
            fingerprint=self.fingerprint,
            kind=KIND,
            about=self.about,
        )
        return save(folder, card, self, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> AttributeHead:
        """Read what `save` wrote. `InputError` if it is no such folder."""
        card, tensors = load(folder, KIND, KIND)
        try:
            head = cls(AttributeSizes(**card.settings))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder} holds no {KIND}: {' '.join(str(error).split())}") from None
        fill(head, tensors, folder)
        head.fingerprint, head.about = card.fingerprint, card.about
        return head.eval().requires_grad_(False)


@dataclass(frozen=True)
class HeadLearning:
    """How the head learns: for each prompt `samples` texts of at most `max_new_tokens` at each of `temperatures`, then AdamW.

    A fifth of the texts is held out; the state that is best on them, judged every `training.every` steps, counts. Lower
    temperatures than 1 bring degenerate texts in where the model's own samples have next to none; p(A) is then that of the
    mixture. `shuffled` is a control: labels are dealt out anew among the texts.
    """

    samples: int = 16
    max_new_tokens: int = 32
    temperatures: tuple[float, ...] = (1.0,)
    rank: int = 32
    hidden: int = 128
    shuffled: bool = False
    training: TrainSettings = LEARNING


def not_degenerate(tokens: list[int]) -> bool:
    """A, as default: at least one token, and not more than half of the pairs of neighbours are there a second time."""
    pairs = list(pairwise(tokens))
    return bool(tokens) and (len(pairs) < 2 or 2 * len(set(pairs)) >= len(pairs))


def learn_attribute(
    model: HeadModel,
    prompts: Text | Int[Tensor, "B T"] | Mapping[str, Any],
    *,
    good: Good = not_degenerate,
    settings: HeadLearning = HeadLearning(),
    bar: Bar = Bar(),
) -> AttributeHead:
    """Sample continuations of `prompts`, judge each by `good` (its tokens, without the end of text), and learn to predict that.

    `about` holds the share of good texts, and the head's held-out cross-entropy beside that of the share alone. `bar` is
    called with the number of prompts read. `InputError` if all texts are good or none is.
    """
    weight = _unembedding(model).weight.detach().float()
    texts = _sampled(model, prompts, good, settings, bar)
    if texts.good.all() or not texts.good.any():
        which = "good" if texts.good.all() else "degenerate"
        raise InputError(
            f"all {len(texts.good)} sampled texts are {which}; sample more, or judge by another attribute."
        )
    training = settings.training
    torch.manual_seed(training.seed)
    head = AttributeHead(AttributeSizes(weight.shape[1], settings.rank, settings.hidden))
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(texts.good), generator=generator)
    label = texts.good[order[torch.randperm(len(order), generator=generator)]] if settings.shuffled else texts.good
    held = torch.zeros_like(label)
    held[order[: max(1, len(order) // 5)]] = True
    learning, checked = (torch.nonzero(mask[texts.text])[:, 0] for mask in (~held, held))

    def batch_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return texts.state[rows], weight[texts.token[rows].to(weight.device)], label[texts.text[rows]].float()

    def batch_at(number: int) -> tuple[Tensor, Tensor, Tensor]:
        return batch_of(learning[drawn_rows(len(learning), training.rows, training.seed + number)])

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        states, tokens, labels = (part.to(weight.device) for part in batch)
        return head.loss(module(states, tokens), labels)

    def judge() -> float:
        parts = [(batch_of(rows), len(rows)) for rows in checked.split(4096)]
        return sum(float(loss(head, part)) * n for part, n in parts) / len(checked)

    done = fit(head, batch_at, training, loss=loss, judge=judge, device=weight.device)
    head.eval().requires_grad_(False)
    head.fingerprint = model.fingerprint
    truth = label[texts.text[checked]].float()
    share = label[texts.text[learning]].float().mean().expand_as(truth)
    head.about = {
        "method": "conditional beam search",
        "paper": PAPER,
        "settings": asdict(settings),
        "texts": len(label),
        "good": float(texts.good.float().mean()),
        "held-out nats": min(done.judged.values()),
        "nats of the share alone": float(F.binary_cross_entropy(share, truth)),
    }
    return head


def conditional_beam_search(
    model: HeadModel,
    inputs: Text | Int[Tensor, "B T"] | Mapping[str, Any],
    head: AttributeHead,
    *,
    weight: float = 1.0,
    num_beams: int = 5,
    max_new_tokens: int = 32,
    length_penalty: float = 0.0,
    force: bool = False,
    **kwargs: Any,
) -> Any:
    """Beam search by log p(prefix) + weight * log p(A | prefix); text in, text out; ids in, ids out.

    `kwargs` go to Transformers' `generate`. `MismatchError` if the head was learned on another model, unless `force`.
    """
    if num_beams < 2:
        raise InputError(f"num_beams is {num_beams}; a beam search needs at least 2.")
    if head.fingerprint != model.fingerprint and not force:
        raise MismatchError(
            f"this head was learned on model {head.fingerprint}, not on this one, {model.fingerprint}; pass force to use it."
        )
    with at_readout(_unembedding(model)) as seen, torch.no_grad():
        conditional = _Conditional(head, _unembedding(model).weight.float(), weight, num_beams, seen)
        processors = LogitsProcessorList([*kwargs.pop("logits_processor", []), conditional])
        return model.generate(
            inputs,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            logits_processor=processors,
            **{"do_sample": False, **kwargs},
        )


class _Conditional(LogitsProcessor):  # type: ignore[misc]
    """Adds what the new token changes in weight * log p(A | prefix), so that a beam's sum of scores ends in its last value."""

    def __init__(self, head: AttributeHead, tokens: Tensor, weight: float, beams: int, seen: list[Tensor]) -> None:
        self.head, self.tokens, self.weight, self.beams, self.seen = head, tokens, weight, beams, seen
        self.rows: dict[tuple[int, ...], int] = {}
        self.terms = torch.zeros(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        terms = self.weight * self.head.log_p(self.seen[-1][:, -1].float(), self.tokens).to(scores)
        prefixes = [(i // self.beams, *ids) for i, ids in enumerate(input_ids.tolist())]
        before = scores.new_zeros(len(scores))
        if self.rows:
            parents = torch.tensor([self.rows[prefix[:-1]] for prefix in prefixes], device=scores.device)
            before = self.terms[parents, input_ids[:, -1]]
        self.seen.clear()
        self.rows, self.terms = {prefix: i for i, prefix in enumerate(prefixes)}, terms
        return scores + terms - before[:, None]


@dataclass
class _Texts:
    """Sampled texts as examples: the state before each token, the token, and which text it is of; `good` is each text's label."""

    state: Float[Tensor, "M D"]
    token: Int[Tensor, "M"]
    text: Int[Tensor, "M"]
    good: Bool[Tensor, "N"]


def _sampled(model: HeadModel, prompts: Any, good: Good, settings: HeadLearning, bar: Bar) -> _Texts:
    batch = model.inputs(prompts)
    ids, mask = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    ends = _ends(model)
    states, tokens, texts = [], [], []
    labels: list[bool] = []
    for i in range(len(ids)):
        prompt = ids[i : i + 1][:, mask[i].bool()]
        rows = _sampled_rows(model, prompt, settings, settings.training.seed + i)
        with at_readout(_unembedding(model)) as seen:
            model.logits(rows)
        before, new = seen[-1].detach().float()[:, prompt.shape[1] - 1 : -1], rows[:, prompt.shape[1] :]
        ended = torch.isin(new, torch.tensor(ends, device=new.device))
        real = ended.cumsum(1) - ended.long() == 0
        texts.append((len(labels) + torch.arange(len(rows)))[:, None].expand(new.shape)[real.cpu()])
        labels += [good(row[use].tolist()) for row, use in zip(new, real & ~ended, strict=True)]
        states.append(before[real].cpu())
        tokens.append(new[real].cpu())
        bar(1)
    return _Texts(torch.cat(states), torch.cat(tokens), torch.cat(texts), torch.tensor(labels))


def _sampled_rows(model: HeadModel, prompt: Tensor, settings: HeadLearning, seed: int) -> Tensor:
    """Sampled continuations of one prompt, with it, ends filled up with the end of text."""
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for temperature in settings.temperatures:
            sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "num_return_sequences": settings.samples}
            rows = model.generate(prompt, do_sample=True, max_new_tokens=settings.max_new_tokens, **sampling)
            parts.append(
                F.pad(rows, (0, prompt.shape[1] + settings.max_new_tokens - rows.shape[1]), value=_ends(model)[0])
            )
    return torch.cat(parts)


def _ends(model: HeadModel) -> list[int]:
    ends = model.plain.generation_config.eos_token_id
    if ends is None:
        raise InputError("the model's generation config names no end of text (eos_token_id); set one.")
    return [ends] if isinstance(ends, int) else list(ends)


def _unembedding(model: HeadModel) -> Any:
    if model.layout.unembedding is None or not hasattr(model.plain, "generate"):
        raise UnsupportedError(f"{type(model.plain).__name__} generates no text; conditional search needs a causal LM.")
    return model.layout.unembedding
