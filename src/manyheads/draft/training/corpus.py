"""Training text for draft heads. The trunk's own texts work best (self-distillation): these are what the heads must guess.

A corpus is token ids `[N, T]` and a mask of those that count, saved as safetensors with the model's fingerprint. The trunk's
hidden states may be saved with it, so that training does not run the trunk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_folder_atomically
from manyheads.inputs import clause, read_object
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.packing import Packed
from manyheads.model.replay.recording import no_cache
from manyheads.model.tree_pass import TreePass
from manyheads.progress import Bar
from manyheads.tasks.texts import opening_token, passages
from manyheads.version import __version__


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows of tokens. `counts` marks those that are trained and tested on, `hidden` are the trunk's states, if kept."""

    ids: Int[Tensor, "N T"]
    counts: Bool[Tensor, "N T"]
    fingerprint: str
    hidden: Float[Tensor, "N T D"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, held_out: float = 0.1) -> tuple[Corpus, Corpus]:
        """(all but the last rows, the last rows). `InputError` if a part would be empty."""
        cut = len(self) - max(1, round(held_out * len(self))) if 0 <= held_out < 1 else 0
        if cut < 1:
            raise InputError(f"a corpus of {len(self)} rows cannot be split ({held_out} held out); make it larger.")
        return self._rows(slice(0, cut)), self._rows(slice(cut, None))

    def _rows(self, rows: slice) -> Corpus:
        kept = None if self.hidden is None else self.hidden[rows]
        return replace(self, ids=self.ids[rows], counts=self.counts[rows], hidden=kept)

    def save(self, folder: str | Path, *, request: Mapping[str, Any] | None = None, force: bool = False) -> Path:
        """Write `corpus.safetensors` and `corpus.json` into a new folder. `request` says what it was made from (JSON)."""

        def write(into: Path) -> None:
            tensors = {"ids": self.ids.int(), "counts": self.counts}
            if self.hidden is not None:
                tensors["hidden"] = self.hidden
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, into / "corpus.safetensors")
            card = {
                "fingerprint": self.fingerprint,
                "version": __version__,
                "rows": len(self),
                "request": dict(request or {}),
            }
            (into / "corpus.json").write_text(json.dumps(card, indent=2))

        return write_folder_atomically(folder, write, force=force)

    def joined(self, other: Corpus) -> Corpus:
        """Both corpora, their rows alternating while both last, so that any part of it holds both. Without states."""
        order = torch.cat([torch.arange(len(part)) * 2 + i for i, part in enumerate((self, other))]).argsort()
        ids, counts = (torch.cat([getattr(c, name) for c in (self, other)])[order] for name in ("ids", "counts"))
        return Corpus(ids, counts, self.fingerprint)

    @classmethod
    def of_parts(cls, parts: Sequence[Corpus]) -> Corpus:
        """All rows of several corpora of one model and length, in order, with their states where all have them."""
        ids, counts = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "counts"))
        states = [part.hidden for part in parts if part.hidden is not None]
        return cls(ids, counts, parts[0].fingerprint, torch.cat(states) if len(states) == len(parts) else None)

    @classmethod
    def load(cls, folder: str | Path, model: HeadModel, *, request: Mapping[str, Any] | None = None) -> Corpus:
        """Read one back; states stay on disk until they are used. `MismatchError` if another model wrote it, or if it was made
        from something else than `request`, where that is given."""
        folder = Path(folder)
        try:
            card = read_object(folder / "corpus.json")
            opened = safe_open(folder / "corpus.safetensors", "pt")
            fingerprint, made = card["fingerprint"], card.get("request") or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise InputError(f"there is no corpus at {folder}: {clause(error)}.") from None
        if fingerprint != model.fingerprint:
            raise MismatchError(
                f"the corpus at {folder} belongs to model {fingerprint}, not {model.fingerprint}; make one for it."
            )
        if request is not None and made != (wanted := json.loads(json.dumps(dict(request)))):
            other = [name for name in wanted if name not in made or made[name] != wanted[name]]
            raise MismatchError(
                f"the corpus at {folder} was not made of this request: other {' and '.join(other) or 'settings'}; remove "
                "the folder, or give another one."
            )
        try:
            hidden = opened.get_tensor("hidden") if "hidden" in opened.keys() else None  # noqa: SIM118 - not a mapping
            ids, counts = opened.get_tensor("ids"), opened.get_tensor("counts")
        except SafetensorError as error:
            raise InputError(f"the corpus at {folder} is damaged ({clause(error)}); make it anew.") from None
        whole = ids.ndim == 2 and not ids.is_floating_point() and ids.numel() > 0 and counts.shape == ids.shape
        if not whole or not 0 <= int(ids.min()) <= int(ids.max()) < model.vocab_size:
            raise InputError(
                f"the corpus at {folder} is damaged: its ids {list(ids.shape)} and counts {list(counts.shape)} are no texts of "
                "this model; make it anew."
            )
        return cls(ids.long(), counts, fingerprint, hidden)


def own_texts(
    model: HeadModel,
    n: int,
    length: int,
    *,
    prompts: Sequence[str | list[int]] | None = None,
    temperature: float = 1.0,
    through_stops: bool = False,
    rows: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Corpus:
    """`n` texts of `length` tokens that the model writes, sampled (greedy at temperature 0) after `prompts` in turn, which
    are texts or token ids.

    Without prompts, texts begin with the model's opening token. Tokens after an early end do not count, unless the text goes on
    `through_stops`, which suits models trained on concatenated documents. Prompts do not count. `InputError` for prompts that
    leave no room, and for texts longer than the model's positions.
    """
    _check_sizes(model, n, length)
    if rows < 1 or not 0 <= temperature < math.inf:
        raise InputError(
            f"rows {rows}, temperature {temperature}: give at least one row, and a finite temperature >= 0."
        )
    begin = opening_token(model)
    if (prompts is None and begin is None) or (prompts is not None and not len(prompts)):
        raise InputError("this model has no opening token to begin texts with, or no prompt was given; give prompts.")
    given = [[begin or 0]] if prompts is None else [_encoded(model, prompt, length) for prompt in prompts]
    end = None if through_stops else model.plain.generation_config.eos_token_id
    pad = model.config.pad_token_id if isinstance(model.config.pad_token_id, int) else 0
    found: list[tuple[Tensor, Tensor]] = []
    state = torch.random.get_rng_state()
    try:
        for start in range(0, n, rows):
            torch.manual_seed((1_000_003 * seed + start) % 2**63)
            batch = [given[i % len(given)] for i in range(start, min(start + rows, n))]
            found.append(_continued(model, batch, length, temperature, end, pad))
            bar(len(batch))
    finally:
        torch.random.set_rng_state(state)
    ids, counts = (torch.cat(part) for part in zip(*found, strict=True))
    return Corpus(ids, counts, model.fingerprint)


def sampled_and_greedy(model: HeadModel, n: int, length: int, *, greedy: float = 0.5, **settings: Any) -> Corpus:
    """`own_texts`, but a share `greedy` of the texts is sampled for a quarter of its length only and goes on greedily.

    For drafters that must guess greedy text too: sampled tokens alone teach this less well. Openings in which the model stopped
    are left out; `InputError` if none remains.
    """
    if not 0 <= greedy <= 1:
        raise InputError(f"greedy is {greedy}; give a share of the texts, 0 to 1.")
    some = round(n * greedy)
    parts = [own_texts(model, n - some, length, **settings)] if some < n else []
    if some:
        settings["seed"] = settings.get("seed", 0) + 1_000
        openings = own_texts(model, some, length // 4 + 1, **settings)
        going_on = openings.ids[openings.counts[:, -1]][:, :-1].tolist()
        settings |= {"prompts": going_on, "temperature": 0.0}
        parts += [own_texts(model, len(going_on), length, **settings)] if going_on else []
    if not parts:
        raise InputError("the model stopped within every opening, and none can be continued greedily; give greedy=0.")
    return parts[0] if len(parts) == 1 else parts[0].joined(parts[1])


@torch.inference_mode()
def greedy_texts(
    model: HeadModel,
    prompts: Sequence[list[int]],
    *,
    new: int,
    length: int,
    sampled: Sequence[int] = (0,),
    seed: int = 0,
    bar: Bar = Bar(),
) -> Corpus:
    """The model's greedy texts after `prompts` (token ids), read and written as one batch, with the states of all tokens.

    Rows have `length` columns and end at an end token, which counts, or after `new` tokens. `sampled` are how many first
    tokens of each row, in turn, are drawn at temperature 1 instead: the same prompt then gives other texts. Every token is read
    once, so that states cost nothing beside the texts. `InputError` if a prompt is empty or leaves no room. `bar` counts tokens.
    """
    _check_sizes(model, len(prompts), length)
    longest = max(map(len, prompts))
    if not min(map(len, prompts)) or longest + new > length:
        raise InputError(f"prompts of 1 to {length - new} tokens fit beside {new} new ones; the longest has {longest}.")
    with Packed(model.plain):
        return _written(model, prompts, new, length, sampled, seed, bar)


def _written(
    model: HeadModel, prompts: Sequence[list[int]], new: int, length: int, sampled: Sequence[int], seed: int, bar: Bar
) -> Corpus:
    longest, reader = max(map(len, prompts)), TreePass(model)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    seen = reader.prompt(ids, mask)
    states, texts = [seen.hidden], [ids]
    draws = torch.tensor([sampled[i % len(sampled)] for i in range(len(prompts))], device=model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    ends = torch.tensor(_listed(model.plain.generation_config.eos_token_id), dtype=torch.long, device=model.device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    counts = [torch.zeros_like(ids, dtype=torch.bool)]
    itself, depth = torch.ones(1, 1, 1, dtype=torch.bool, device=model.device), torch.zeros(1, 1, dtype=torch.long)
    for step in range(new):
        logits = seen.logits[:, -1].float()
        token = logits.argmax(-1)
        if bool((drawing := draws > step).any()):
            token[drawing] = torch.multinomial(logits[drawing].softmax(-1), 1, generator=generator)[:, 0]
        texts.append(token[:, None])
        counts.append(going[:, None])
        bar(int(going.sum()))
        going = going & ~torch.isin(token, ends)
        seen = reader.tree(token[:, None], itself, depth.to(model.device))
        reader.cache.keep([[0]] * len(prompts))
        states.append(seen.hidden)
        if not bool(going.any()):
            break
    columns = torch.arange(length, device=model.device) + (longest - mask.sum(-1))[:, None]
    written = sum(part.shape[1] for part in texts)
    inside, columns = columns < written, columns.clamp(max=written - 1)
    hidden = torch.cat(states, 1).gather(1, columns[..., None].expand(-1, -1, states[0].shape[-1]))
    own, counted = (torch.cat(part, 1).gather(1, columns) * inside for part in (texts, counts))
    return Corpus(own.cpu(), counted.bool().cpu(), model.fingerprint, (hidden * inside[..., None]).cpu())


def _listed(value: object) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(str(value))]


def _check_sizes(model: HeadModel, n: int, length: int) -> None:
    if n < 1 or length < 2:
        raise InputError(f"{n} texts of {length} tokens are no corpus; give at least one, of at least two tokens.")
    TreePass(model).check_length(length)


def _encoded(model: HeadModel, prompt: str | list[int], length: int) -> list[int]:
    given = prompt if isinstance(prompt, str) else torch.tensor([list(prompt)], dtype=torch.long)
    ids: list[int] = model.inputs(given)["input_ids"][0].tolist()
    if len(ids) >= length:
        raise InputError(f"a prompt of {len(ids)} tokens leaves no room in texts of {length}; give a larger length.")
    return ids


def _continued(
    model: HeadModel, batch: list[list[int]], length: int, temperature: float, end: object, pad: int
) -> tuple[Tensor, Tensor]:
    """Ids and counts of one batch: left-padded to generate, then shifted so that every row begins at column 0."""
    longest = max(map(len, batch))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in batch], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    shortest = min(map(len, batch))
    out = model.plain.generate(
        ids, attention_mask=mask, max_new_tokens=length - shortest, eos_token_id=end, pad_token_id=pad, **sampling
    )
    ends = set(end if isinstance(end, list | tuple) else [end])
    rows, counts = [], []
    for row, prompt in zip(out.tolist(), batch, strict=True):
        text = row[longest - len(prompt) :][:length]
        stop = next((i for i, token in enumerate(text[len(prompt) :], len(prompt)) if token in ends), length)
        text += [pad] * (length - len(text))
        rows.append(text)
        counts.append([len(prompt) <= i <= stop for i in range(length)])
    return torch.tensor(rows), torch.tensor(counts)


def from_texts(model: HeadModel, texts: Sequence[str] | None, n: int, length: int, *, seed: int = 0) -> Corpus:
    """At most `n` passages of `length` tokens from texts, or by default from prose that comes with Python."""
    _check_sizes(model, n, length)
    ids = passages(model, texts, n=n, length=length, seed=seed)
    return Corpus(ids, torch.ones_like(ids, dtype=torch.bool), model.fingerprint)


def frequent(corpus: Corpus, size: int) -> list[int]:
    """The `size` tokens that occur most often where the corpus counts, by id: a `vocabulary` for heads."""
    if size < 1:
        raise InputError(f"a vocabulary of {size} tokens guesses nothing; give at least 1.")
    seen = torch.bincount(corpus.ids[corpus.counts])
    order = seen.argsort(descending=True, stable=True)[:size]
    return sorted(order[seen[order] > 0].tolist())


@torch.inference_mode()
def with_states(model: HeadModel, corpus: Corpus, *, rows: int = 32, bar: Bar = Bar()) -> Corpus:
    """The corpus with the trunk's states, `N T D` numbers. After `save` and `load` they are read from disk as needed."""
    found: list[Tensor] = []
    for start in range(0, len(corpus), rows):
        ids = corpus.ids[start : start + rows].to(model.device)
        found.append(trunk_states(model, ids)[0].cpu())
        bar(len(ids))
    return replace(corpus, hidden=torch.cat(found))


@torch.no_grad()
def trunk_states(model: HeadModel, ids: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T V"]]:
    """The states that the output matrix reads, and the model's logits."""
    with caught(model.plain.get_decoder()) as states:
        logits = model.module(input_ids=ids, **no_cache(model.plain)).logits
    return states[0], logits
