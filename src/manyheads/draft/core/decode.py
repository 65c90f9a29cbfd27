"""Decoding with guesses: the drafter proposes a tree, one pass of the trunk scores it, and the accepted tokens are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from manyheads.draft.core.acceptance import Acceptance, Walk, accept
from manyheads.draft.core.drafter import Drafter
from manyheads.draft.core.growth import Growth
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Proposal
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import Text
from manyheads.model.tree_pass import Seen, TreePass


@dataclass
class Tally:
    """Counts and times of a generation. Times are in seconds; on an accelerator `drafting` is only a rough share of `seconds`.

    `reached[d]` counts rounds (of all rows) in which a node at depth d + 1 was offered below accepted ones, `accepted[d]` those
    in which one was accepted. The first token of a round is the trunk's own, no guess, and not counted.
    """

    tokens: int = 0
    passes: int = 0
    rounds: int = 0
    drafted: int = 0
    drafting: float = 0.0
    seconds: float = 0.0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_a_pass(self) -> float:
        """New tokens of one row for each pass of the trunk; the prompt's pass counts."""
        return self.tokens / max(self.rounds, 1)

    @property
    def acceptance(self) -> list[float]:
        """How often a guess at each depth is accepted, given that those above it were."""
        return [a / max(r, 1) for a, r in zip(self.accepted, self.reached, strict=True)]

    def count(self, proposal: Proposal, walks: Sequence[Walk], active: Sequence[bool]) -> None:
        """Add one round; rows that are not `active` do not count."""
        self.passes += 1
        for tree, (path, _), on in zip(proposal.trees, walks, active, strict=True):
            if not on:
                continue
            self.rounds += 1
            self.drafted += len(tree)
            node = 0
            for depth, child in enumerate([*path, 0]):
                if not tree.children[node]:
                    break
                while len(self.reached) <= depth:
                    self.reached.append(0)
                    self.accepted.append(0)
                self.reached[depth] += 1
                self.accepted[depth] += bool(child)
                node = child


@dataclass(frozen=True)
class Generation:
    """New tokens of each row, without the prompt, a stop token included; `prompts` are the rows they continue."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    tally: Tally
    tokenizer: Any = field(default=None, repr=False)

    @property
    def text(self) -> list[str]:
        """The new tokens decoded. `InputError` without a tokenizer."""
        if self.tokenizer is None:
            raise InputError("this model was opened without a tokenizer; open it with tokenizer= to get text.")
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in self.tokens]


def generate(
    model: HeadModel,
    drafter: Drafter,
    inputs: Text | Int[Tensor, "B T"] | Mapping[str, Any],
    *,
    growth: Growth | None = None,
    max_new_tokens: int = 128,
    acceptance: Acceptance = "lossless",
    stop: Sequence[int] | None = None,
    trunk: DraftTrunk | None = None,
    **sampling: Any,
) -> Generation:
    """Continue `inputs` as the model's own `generate` would, in fewer passes.

    `sampling` are `Target`'s settings: temperature (0: greedy), top_k, top_p, repetition_penalty, no_repeat_ngram, processors,
    seed. Greedy output equals `generate(do_sample=False)` token for token where the arithmetic of one and of several tokens at a
    time agrees (float32; in half precision near-ties may fall differently, as with any change of batch size). Sampled output has
    the model's own distribution unless `acceptance="typical"`; where guesses were chosen, not drawn, the same seed gives the same
    text whatever the drafter. `stop` are token ids that end a row (default: the generation config's). `growth` defaults to what
    suits the drafter; `trunk` to the model's own readout.
    """
    settings: dict[str, Any] = {
        "growth": growth,
        "max_new_tokens": max_new_tokens,
        "acceptance": acceptance,
        "stop": stop,
        "trunk": trunk,
    }
    *_, last = rounds(model, drafter, inputs, **settings, **sampling)
    return last


def stream(
    model: HeadModel,
    drafter: Drafter,
    inputs: Text | Int[Tensor, "1 T"] | Mapping[str, Any],
    **settings: Any,
) -> Iterator[list[int]]:
    """As `generate` for one prompt, yielding the new tokens after every pass."""
    sent = 0
    for generation in rounds(model, drafter, inputs, **settings):
        if len(generation.tokens) > 1:
            raise InputError(f"stream got {len(generation.tokens)} prompts; give one at a time.")
        yield generation.tokens[0][sent:]
        sent = len(generation.tokens[0])


def rounds(
    model: HeadModel,
    drafter: Drafter,
    inputs: Text | Int[Tensor, "B T"] | Mapping[str, Any],
    *,
    growth: Growth | None = None,
    max_new_tokens: int = 128,
    acceptance: Acceptance = "lossless",
    stop: Sequence[int] | None = None,
    trunk: DraftTrunk | None = None,
    **sampling: Any,
) -> Iterator[Generation]:
    """As `generate`, yielding the state after every pass: the same lists and tally, which grow."""
    started = time.perf_counter()
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1.")
    batch = model.inputs(inputs)
    if unknown := set(batch) - {"input_ids", "attention_mask", "position_ids"}:
        raise UnsupportedError(f"drafting reads only tokens, and got {sorted(unknown)[0]}; leave it out.")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    reader, trunk = TreePass(model), trunk or DraftTrunk(model)
    target = _target(model, sampling).on(trunk.device)
    stops = _stops(model) if stop is None else set(stop)
    prompts = [
        row if mask is None else [t for t, m in zip(row, mask[b].tolist(), strict=True) if m]
        for b, row in enumerate(ids.tolist())
    ]
    rows = _Rows(prompts, max_new_tokens, stops)
    reader.check_length(max(map(len, prompts)) + max_new_tokens)

    with torch.inference_mode():
        drafter.start(trunk, len(prompts))
        seen = reader.prompt(ids, mask)
        accepted = _from_prompt(seen, ids, mask, target, rows)
    yield rows.generation(model, started)
    while rows.open:
        with torch.inference_mode():
            begun = time.perf_counter()
            proposal = drafter.propose(trunk, accepted, growth, target)
            rows.tally.drafting += time.perf_counter() - begun
            seen = _read(reader, accepted, proposal)
            # `text` ends with the root, so that rules on the text so far (repetition) see exactly what plain decoding shows them.
            scores = target.scores(seen.logits, rows.text, proposal.trees, proposal.tokens)
            walks = accept(scores, proposal, target, [len(text) for text in rows.text], acceptance)
            rows.tally.count(proposal, walks, rows.active)
            accepted = _settle(reader, seen, proposal, walks, rows)
        yield rows.generation(model, started)


class _Rows:
    """The texts being generated: tokens so far, which rows are still active, and when a row is done."""

    def __init__(self, prompts: list[list[int]], limit: int, stops: set[int]) -> None:
        self.prompts, self.limit, self.stops = prompts, limit, stops
        self.text = [list(prompt) for prompt in prompts]
        self.new: list[list[int]] = [[] for _ in prompts]
        self.active = [True] * len(prompts)
        self.tally = Tally()

    @property
    def open(self) -> bool:
        return any(self.active)

    def write(self, row: int, tokens: list[int]) -> None:
        """Add tokens to an open row, up to the first stop token or the limit."""
        tokens = tokens[: self.limit - len(self.new[row])]
        end = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        if end is not None:
            tokens = tokens[: end + 1]
        self.new[row] += tokens
        self.text[row] += tokens
        self.tally.tokens += len(tokens)
        if end is not None or len(self.new[row]) == self.limit:
            self.active[row] = False

    def generation(self, model: HeadModel, started: float) -> Generation:
        self.tally.seconds = time.perf_counter() - started
        return Generation(self.prompts, self.new, self.tally, model.tokenizer)


def _from_prompt(seen: Seen, ids: Tensor, mask: Tensor | None, target: Target, rows: _Rows) -> Accepted:
    """The prompt's states and the first new token, chosen by the trunk alone."""
    lengths = torch.tensor([[len(text)] for text in rows.text], device=ids.device)
    first = target.choose(target.scores(seen.logits, rows.text)[:, -1:], lengths)[:, 0]
    for row, token in enumerate(first.tolist()):
        rows.write(row, [token])
        rows.tally.rounds += 1
    rows.tally.passes += 1
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return Accepted(
        hidden=seen.hidden,
        tokens=torch.cat([ids[:, 1:], first[:, None]], 1),
        positions=(valid.cumsum(-1) - 1).clamp(min=0),
        valid=valid,
        last=torch.full((len(ids),), ids.shape[1] - 1, device=ids.device),
        text=rows.text,
    )


def _read(reader: TreePass, accepted: Accepted, proposal: Proposal) -> Seen:
    """One pass of the trunk over every row's root and tree."""
    device = accepted.tokens.device
    tokens = torch.cat([accepted.root[:, None], proposal.tokens], 1)
    # One shared shape needs one mask on the device instead of one a row, built once and reused.
    if all(tree is proposal.trees[0] for tree in proposal.trees):
        one, below = proposal.trees[0].on(device)
        return reader.tree(tokens, one[None], below[None])
    size = tokens.shape[1]
    within = torch.eye(size, dtype=torch.bool, device=device).repeat(len(tokens), 1, 1)
    depths = torch.zeros(len(tokens), size, dtype=torch.long, device=device)
    for row, tree in enumerate(proposal.trees):
        own, below = tree.on(device)
        within[row, : len(own), : len(own)] = own
        depths[row, : len(own)] = below
    return reader.tree(tokens, within, depths)


def _settle(reader: TreePass, seen: Seen, proposal: Proposal, walks: list[Walk], rows: _Rows) -> Accepted:
    """Write the accepted tokens, keep their keys and values in the cache, and return their states for the drafter."""
    kept: list[list[int]] = []
    tokens: list[list[int]] = []
    drafted = proposal.tokens.tolist()
    for row, (path, following) in enumerate(walks):
        new = [*(drafted[row][node - 1] for node in path), following]
        # A finished row keeps no states: its cache stops growing, though the batch still carries it.
        if rows.active[row]:
            rows.write(row, new)
        kept.append([0, *path] if rows.active[row] else [])
        tokens.append(new if rows.active[row] else [])
    starts = reader.cache.lengths  # before `keep` moves them on
    reader.cache.keep(kept)
    width = max(1, *map(len, kept))
    columns = torch.tensor([row + [0] * (width - len(row)) for row in kept], device=seen.hidden.device)
    step = torch.arange(width, device=columns.device)
    counts = torch.tensor([len(row) for row in kept], device=columns.device)
    return Accepted(
        hidden=seen.hidden[torch.arange(len(kept), device=columns.device)[:, None], columns],
        tokens=torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=columns.device),
        positions=torch.tensor(starts, device=columns.device)[:, None] + step,
        valid=step < counts[:, None],
        last=(counts - 1).clamp(min=0),
        text=rows.text,
    )


def _stops(model: HeadModel) -> set[int]:
    config = getattr(model.plain, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    return set() if ends is None else set(ends if isinstance(ends, list | tuple) else [ends])


def _target(model: HeadModel, sampling: Mapping[str, Any]) -> Target:
    """Sampling settings, with the repetition rules that the model's own generation config sets."""
    config = getattr(model.plain, "generation_config", None)
    own = {
        "repetition_penalty": getattr(config, "repetition_penalty", None) or 1.0,
        "no_repeat_ngram": getattr(config, "no_repeat_ngram_size", None) or 0,
    }
    if (getattr(config, "num_beams", None) or 1) > 1:
        raise UnsupportedError("this model's generation config asks for beam search; set num_beams=1 there to draft.")
    try:
        return Target(**{**own, **sampling})
    except TypeError as error:
        known = ", ".join(name for name in Target.__dataclass_fields__ if name != "generator")
        raise InputError(f"{str(error).split('__init__() ')[-1]}; sampling knows {known}.") from None
