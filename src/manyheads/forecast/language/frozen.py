"""Frozen language models as trunks of forecasters: what AutoTimes, SMETimes and Time-LLM share.

A series is made vectors [N, n, D] of the language model's width, which it reads in place of tokens (`inputs_embeds`); its last
states [N, n, D] are made numbers again. No weight of it is trained or saved. A saved forecaster has its fingerprint and refuses
another. `body` says what stands between the two maps, so that every claim about language has its baselines beside it:

    "language"    the model as it is
    "random"      its untrained twin: the same architecture with fresh random weights, frozen too
    "attention"   one layer of causal attention of the same width, which learns
    "none"        nothing: the vectors go through
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import MismatchError, UnsupportedError
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.windows import Shape
from manyheads.inputs import check_choice
from manyheads.learning import Trunk
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import takes
from manyheads.model.opening import open_model

BODIES = ("language", "random", "attention", "none")
ROWS = 64  # series that a language model reads at once where nothing is learned


class FrozenLanguage:
    """A causal language model whose weights stay. It is no `nn.Module`: a trunk that holds it neither trains nor saves it."""

    def __init__(self, source: str, *, random: bool = False, seed: int = 0) -> None:
        model = open_model(source)
        name = type(model.plain).__name__
        if not model.reads_tokens or not model.is_causal:
            raise UnsupportedError(f"{name} is no causal language model; give one that predicts the next token.")
        if not takes(model.plain.base_model, "inputs_embeds"):
            raise UnsupportedError(f"{name} takes token ids alone; a series needs a model that takes inputs_embeds.")
        self.model = _untrained(model, seed) if random else model
        self.model.plain.eval().requires_grad_(False)
        self._trunk, self._reader = Trunk(self.model, frozen=False), _twin(self.model.plain)
        self._read: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """D."""
        return self.embeddings.shape[1]

    @property
    def embeddings(self) -> Float[Tensor, "V D"]:
        """The table of the tokens' vectors."""
        table: Tensor = self.model.plain.get_input_embeddings().weight
        return table.detach()

    def states(self, vectors: Float[Tensor, "N n D"], mask: Int[Tensor, "N n"] | None = None) -> Float[Tensor, "N n D"]:
        """Its last states, through which gradients flow; edits and readers that are active on `model` apply."""
        return self._trunk.states({"inputs_embeds": vectors} | ({} if mask is None else {"attention_mask": mask}))

    def ids(self, text: str) -> Int[Tensor, "T"]:
        """A text's tokens."""
        if self.model.tokenizer is None:
            raise UnsupportedError(f"{type(self.model.plain).__name__} has no tokenizer, so that it reads no text.")
        return torch.tensor(self.model.tokenizer(text)["input_ids"], dtype=torch.long)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """The last token's last state of each text. A text is read once; no edit of `model` changes how it is read.

        Each is read by itself: in a batch its numbers would depend on its neighbours in the last bits.
        """
        for text in dict.fromkeys(texts):
            if text not in self._read:
                out = self._reader(input_ids=self.ids(text)[None].to(self.model.device), use_cache=False)
                self._read[text] = out.last_hidden_state[0, -1].clone()
        return torch.stack([self._read[text] for text in texts])


def _untrained(model: HeadModel, seed: int) -> HeadModel:
    """The same architecture with fresh random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(model.plain)(copy.deepcopy(model.config))
    return open_model(twin.eval(), tokenizer=model.tokenizer)


def _twin(module: Any) -> Any:
    """The same weights in modules of their own, which hooks on the first ones do not reach."""
    return copy.deepcopy(module, {id(part): part for part in (*module.parameters(), *module.buffers())}).base_model


class LanguageTrunk(nn.Module):
    """What the methods' trunks share: the body, by its name. `width` is what a head reads of a token."""

    def __init__(self, language: FrozenLanguage, body: str) -> None:
        super().__init__()
        self.language, self.kind, self.width = language, body, language.width
        if body == "attention":
            heads = language.model.n_heads
            heads = heads if language.width % heads == 0 else 1
            self.attention = nn.MultiheadAttention(language.width, heads, batch_first=True)

    def body(self, vectors: Float[Tensor, "N n D"], mask: Int[Tensor, "N n"] | None = None) -> Float[Tensor, "N n D"]:
        """What the body makes of the vectors; where `mask` is 0 there is none."""
        if self.kind == "none":
            return vectors
        if self.kind != "attention":
            return self.language.states(vectors, mask)
        later = torch.ones(2 * vectors.shape[1:2], dtype=torch.bool, device=vectors.device).triu(1)
        absent = None if mask is None else mask == 0
        if absent is not None:  # padding reads itself, so that no row of the softmax is empty
            later = later | absent[:, None, :] & ~torch.eye(len(later), dtype=torch.bool, device=later.device)
            later = later.repeat_interleave(self.attention.num_heads, 0)
        out: Tensor = self.attention(vectors, vectors, vectors, attn_mask=later, need_weights=False)[0]
        return out


@dataclass(kw_only=True, eq=False)
class LanguageForecaster(NetworkForecaster):
    """`model` is what `open_model` takes by name: "ladon", "smollm2", a folder, a hub id. `body`: see above."""

    model: str = "ladon"
    body: str = "language"

    language_: FrozenLanguage | None = field(default=None, init=False, repr=False)
    made_of_: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.body, "body", BODIES)

    @property
    def language(self) -> FrozenLanguage:
        """The frozen model; its heads are `forecaster.language.model`'s."""
        made_of = (self.model, self.body == "random", self.seed)
        if self.language_ is None or self.made_of_ != made_of:
            self.language_ = FrozenLanguage(self.model, random=self.body == "random", seed=self.seed)
            self.made_of_ = made_of
        return self.language_

    @property
    def reads_series(self) -> bool:
        """Whether the language model reads the series; a baseline does without."""
        return self.body in ("language", "random")

    def opened(self) -> HeadModel:
        """The language model by its heads: edits of it change the forecasts. `UnsupportedError` for a body without one."""
        if not self.reads_series:
            raise UnsupportedError(
                f"with body={self.body!r} no language model reads the series, so there are no heads."
            )
        return self.language.model

    def _each(self, shape: Shape) -> int:
        return max(1, ROWS // shape.channels)

    def _about(self) -> dict[str, Any]:
        return super()._about() | {"language": self.language.model.fingerprint}

    def _restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if (own := self.language.model.fingerprint) != about["language"]:
            raise MismatchError(
                f"this forecaster was learned on language model {about['language']}, and {self.model} is now {own}; put the "
                "first one there."
            )
        super()._restore(tensors, about)
