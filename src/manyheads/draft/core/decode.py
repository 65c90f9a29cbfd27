"""Decoding with guesses: the drafter proposes a tree, one pass of the trunk scores it, and the accepted tokens are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from manyheads.draft.core.acceptance import FORBIDDEN, Acceptance, Walk, accept
from manyheads.draft.core.auto import RANKS, Planner
from manyheads.draft.core.costs import clock, pass_costs
from manyheads.draft.core.drafter import Drafter
from manyheads.draft.core.growth import Growth
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.rules import Ends, ends_of, generation_config, governed
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Proposal
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError, UnsupportedError
from manyheads.model.editing.edits import Ablate, Affine, Offset, Scale
from manyheads.model.generating import check_padding
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import Text
from manyheads.model.packing import Packed
from manyheads.model.tree_pass import Seen, TreePass


@dataclass
class Tally:
    """Counts and times of a generation, in seconds. `seconds` are the clock's. `drafting` (guesses) and `verifying` (passes after
    the prompt's, and what is made of them) are processor time where one thread computes; on an accelerator only rough shares.

    `reached[d]` counts rounds (of all rows) in which a node at depth d + 1 was offered below accepted ones, `accepted[d]` those
    in which one was accepted. The first token of a round is the trunk's own, no guess, and not counted.
    """

    tokens: int = 0
    passes: int = 0
    rounds: int = 0
    drafted: int = 0
    drafting: float = 0.0
    verifying: float = 0.0
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
    growth: Growth | Literal["auto"] | None = "auto",
    max_new_tokens: int = 128,
    acceptance: Acceptance = "lossless",
    stop: Sequence[int | str] | str | None = None,
    trunk: DraftTrunk | None = None,
    packed: bool | None = None,
    **sampling: Any,
) -> Generation:
    """Continue `inputs` as the model's own `generate` would, in fewer passes.

    `sampling` are `Target`'s settings: temperature (0: greedy), top_k, top_p, repetition_penalty, no_repeat_ngram,
    processors, seed. What they leave open, and every other rule (`rules.py`), is as the model's generation config says; a
    config that cannot be followed is refused by name. Greedy output equals `generate(do_sample=False)` token for token where
    the arithmetic of one and of several tokens at a time agrees (float32; in half precision near-ties may fall differently,
    as with any change of batch size). Sampled output has the model's own distribution unless `acceptance="typical"`; where
    guesses were chosen, not drawn, the same seed gives the same text whatever the drafter.

    `stop` are what ends a row: token ids in place of the generation config's, strings in place of its stop strings, or `[]`
    for nothing but the limit. `trunk` defaults to the model's own readout. Prompts are padded on the left, if at all, and each
    row is what it would be alone.

    `growth="auto"` picks in every round the tree that promises most tokens a second, or plain decoding (`core/auto.py`); what
    passes cost is measured at the first call for a model. None: the drafter's own growth. `packed`: whether the linear layers of
    model and drafter run on packed copies of their weights (`model/packing.py`); None: where that is faster on this processor
    and the copies take little memory.
    """
    settings: dict[str, Any] = {
        "growth": growth,
        "max_new_tokens": max_new_tokens,
        "acceptance": acceptance,
        "stop": stop,
        "trunk": trunk,
        "packed": packed,
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
    growth: Growth | Literal["auto"] | None = "auto",
    max_new_tokens: int = 128,
    acceptance: Acceptance = "lossless",
    stop: Sequence[int | str] | str | None = None,
    trunk: DraftTrunk | None = None,
    packed: bool | None = None,
    **sampling: Any,
) -> Iterator[Generation]:
    """As `generate`, yielding the state after every pass: the same lists and tally, which grow."""
    started = time.perf_counter()
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; give a whole number, at least 1.")
    if acceptance not in get_args(Acceptance):
        raise InputError(f"acceptance is {acceptance!r}; choose {' or '.join(get_args(Acceptance))}.")
    if growth is not None and growth != "auto" and not isinstance(growth, Growth):
        raise InputError(f"growth is {growth!r}; give a growth, None for the drafter's own, or 'auto'.")
    _check_edits(model)
    reader, trunk = TreePass(model), trunk or DraftTrunk(model)
    ids, mask = _prompt(model, inputs)
    prompts = [
        row if mask is None else [t for t, m in zip(row, mask[b].tolist(), strict=True) if m]
        for b, row in enumerate(ids.tolist())
    ]
    config = generation_config(model)
    ends = ends_of(model, config, stop)
    target = governed(model, ends, config, sampling, prompts, max_new_tokens, trunk.device)
    reader.check_length(max(map(len, prompts)) + max_new_tokens)
    rows = _Rows(prompts, max_new_tokens, ends)

    packing = Packed(model.plain, drafter, wanted=packed)
    now = clock(model.device)

    with torch.inference_mode(), packing:
        planner = None
        if growth == "auto" and Planner.plans(drafter):
            ranks = min(RANKS, trunk.vocab_size) if reader.takes_trees else 1
            planner = Planner(drafter, pass_costs(model, len(prompts), packing.on), ranks=ranks)
        own = None if growth == "auto" else growth
        drafter.start(trunk, len(prompts))
        seen = reader.prompt(ids, mask)
        accepted = _from_prompt(seen, ids, mask, target, rows)
    yield rows.generation(model, started)
    while rows.open and (ends.seconds is None or time.perf_counter() - started < ends.seconds):
        with torch.inference_mode(), packing:
            at = now()
            if planner is None:
                proposal = drafter.propose(trunk, accepted, own, target)
            else:
                proposal = planner.propose(trunk, accepted, target, rows.room)
            drafting = now() - at
            seen = _read(reader, accepted, proposal)
            # `text` ends with the root, so that rules on the text so far (repetition) see exactly what plain decoding shows them.
            scores = target.scores(seen.logits, rows.text, proposal.trees, proposal.tokens)
            walks = accept(scores, proposal, target, [len(text) for text in rows.text], acceptance)
            _check_scores(scores, [[0, *path] if on else [] for (path, _), on in zip(walks, rows.active, strict=True)])
            rows.tally.count(proposal, walks, rows.active)
            active = list(rows.active)
            accepted = _settle(reader, seen, proposal, walks, rows)
            whole = now() - at
            rows.tally.drafting += drafting
            rows.tally.verifying += whole - drafting
            if planner is not None:
                planner.observe(proposal, walks, active, drafting, whole)
        yield rows.generation(model, started)


def _prompt(model: HeadModel, inputs: Text | Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Token ids and their mask; `InputError` for a prompt that drafting would misread."""
    batch = model.inputs(inputs)
    if unknown := set(batch) - {"input_ids", "attention_mask", "position_ids"}:
        raise UnsupportedError(f"drafting reads only tokens, and got {sorted(unknown)[0]}; leave it out.")
    if "input_ids" not in batch:
        raise InputError("drafting goes on from token ids, and got none; give input_ids.")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is not None:
        check_padding(mask, gaps=False)
    if isinstance(inputs, Mapping) and inputs.get("position_ids") is not None:
        real = torch.ones_like(ids) if mask is None else mask
        apart = batch["position_ids"] != (real.cumsum(-1) - 1)
        if bool((apart & real.bool()).any()):
            raise UnsupportedError(
                "drafting counts positions from each row's first token, and got others; use generate."
            )
    return ids, mask


def _check_edits(model: HeadModel) -> None:
    """`UnsupportedError` for an active edit that asks where a token stands: the columns of a tree are no places in the text."""
    for edit in model._dispatch.edits:
        if isinstance(edit, Ablate):
            fixed = edit.reference is not None and edit.reference.ndim == 3
            anywhere = edit.mode in ("zero", "uniform") or (edit.mode == "mean" and fixed)
        else:
            anywhere = isinstance(edit, Scale | Affine | Offset)
        if edit.positions is not None or not anywhere:
            raise UnsupportedError(
                f"this {type(edit).__name__} depends on where a token stands, and the tokens of a drafted tree stand "
                "elsewhere; use generate under this edit, or bake it."
            )


def _check_scores(scores: Tensor, nodes: list[list[int]]) -> None:
    """`UnsupportedError` where nothing may follow one of a row's `nodes`: the best of no tokens would be token 0."""
    for row, own in zip(scores, nodes, strict=True):
        if not bool((row[own].amax(-1) > -torch.inf).all()):  # NaN is not greater either
            raise UnsupportedError(FORBIDDEN)


class _Rows:
    """The texts being generated: tokens so far, which rows are still active, and when a row is done."""

    def __init__(self, prompts: list[list[int]], limit: int, ends: Ends) -> None:
        self.prompts, self.limit, self.ends = prompts, limit, ends
        self.text = [list(prompt) for prompt in prompts]
        self.new: list[list[int]] = [[] for _ in prompts]
        self.active = [True] * len(prompts)
        self.tally = Tally()

    @property
    def open(self) -> bool:
        return any(self.active)

    @property
    def room(self) -> int:
        """The most tokens that an open row may still get after the next one."""
        return max(self.limit - len(new) for new, on in zip(self.new, self.active, strict=True) if on) - 1

    def write(self, row: int, tokens: list[int]) -> None:
        """Add tokens to an open row, up to the first that ends it or the limit."""
        for token in tokens:
            self.new[row].append(token)
            self.text[row].append(token)
            self.tally.tokens += 1
            if len(self.new[row]) == self.limit or self.ends.here(self.text[row]):
                self.active[row] = False
                return

    def generation(self, model: HeadModel, started: float) -> Generation:
        self.tally.seconds = time.perf_counter() - started
        return Generation(self.prompts, self.new, self.tally, model.tokenizer)


def _from_prompt(seen: Seen, ids: Tensor, mask: Tensor | None, target: Target, rows: _Rows) -> Accepted:
    """The prompt's states and the first new token, chosen by the trunk alone."""
    lengths = torch.tensor([[len(text)] for text in rows.text], device=ids.device)
    scores = target.scores(seen.logits, rows.text)[:, -1:]
    _check_scores(scores, [[0]] * len(scores))
    first = target.choose(scores, lengths)[:, 0]
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
