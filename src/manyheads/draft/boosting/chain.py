"""LLMBoost (#13): a chain of models of one kind; each reads the states of the one before and is tuned to correct it.

Chen et al., arXiv:2512.22309. With h_j[l] what layer l of model j is given and s_(j-1)[l] what layer l of the one before it gave

    h_j[l] <- h_j[l] + lam * CrossAttention(h_j[l], stop_gradient(s_(j-1)[l]))        output projection zero at the start
    loss of model j = cross-entropy + suppression of the predecessor's mistakes (`objective.py`)
    answer = the models' log-probabilities, fused over the tokens that any finds likely (`decoding.py`)

Models are tuned one after another, their predecessors frozen: readers and LoRA learn, no weight of a model changes. In decoding,
layer l of model j runs as soon as layer l of model j - 1 has (`pipelined`).

No code of the paper was found, and its formulas were read from summaries: where in the layer the attention stands, its slopes
over distance and its size, LoRA on every linear map, and the mean of log-probabilities in the fusion are our reading.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from manyheads.draft.boosting.cross_attention import Corrector, linear_parts
from manyheads.draft.boosting.decoding import ChainMemory, ChainPass, fused_logits
from manyheads.draft.boosting.objective import BOOSTING, boosting_loss, boosting_rows
from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.learning import Card, fill, load, save
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor, frozen, hidden_of, hooked, with_hidden
from manyheads.model.inputs import Text
from manyheads.model.offloading import is_away
from manyheads.model.opening import open_model
from manyheads.model.weights.copies import layout_in, settled
from manyheads.progress import Bar
from manyheads.training import Batch, Progress, TrainSettings, fit, row_batches


class BoostedChain(nn.Module):
    """Models of one class, depth, width and vocabulary, and what they learn beside each other (formulas above).

    The models stay as they are: the chain works on copies of their modules that share their weights, so the same model may be
    there several times at no cost of memory. Edits that are active when the chain runs do not reach the copies. `rank` is LoRA's
    (0: none), `heads` and `head_dim` are the size of each reader, `strength` is lam. Answers are fused over each model's `top_k`
    likeliest tokens with weights `shares` (None: equal ones; (0, 1) is the last of two models alone).

    `InputError` for fewer than two models, or models that differ; `UnsupportedError` for models that are no decoders of text.
    """

    def __init__(
        self,
        models: Sequence[HeadModel | PreTrainedModel],
        *,
        rank: int = 8,
        heads: int = 4,
        head_dim: int = 32,
        strength: float = 1.0,
        top_k: int = 10,
        shares: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer(rank, "rank", 0)
        for name, value in {"heads": heads, "head_dim": head_dim, "top_k": top_k}.items():
            check_integer(value, name, 1)
        self.top_k, self.strength = top_k, check_number(strength, "strength")
        self._settings = {"rank": rank, "heads": heads, "head_dim": head_dim, "strength": strength, "top_k": top_k}
        opened = [open_model(model) for model in models]
        _check_alike(opened)
        self.shares = _checked_shares(shares, len(opened))
        self._given, self._models = tuple(opened), tuple(map(_twin, opened))  # in tuples: their parameters are not ours
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(check_seed(seed))
            self.correctors = nn.ModuleList(Corrector(model, rank, heads, head_dim) for model in self._models[1:])
        self._now: ChainPass | None = None
        self._install()
        self.eval()

    def __len__(self) -> int:
        return len(self._models)

    @property
    def fingerprint(self) -> str:
        """Those of its models, in order."""
        return "+".join(model.fingerprint for model in self._given)

    # Running

    @torch.no_grad()
    def each_logits(
        self, inputs: Text | Int[Tensor, "B T"] | Mapping[str, Any], *, pipelined: bool = False
    ) -> list[Float[Tensor, "B T V"]]:
        """The logits of every model of the chain. `pipelined`: in a thread each (`decoding.py`)."""
        given = {**self._models[0].inputs(inputs), "use_cache": False}
        with self._threads(pipelined) as pool:
            return self._run(len(self) - 1, given, pool)

    def logits(
        self, inputs: Text | Int[Tensor, "B T"] | Mapping[str, Any], *, pipelined: bool = False
    ) -> Float[Tensor, "B T V"]:
        """The chain's answer: log-probabilities fused over the models' likeliest tokens, -inf for others (`decoding.py`)."""
        return fused_logits(self.each_logits(inputs, pipelined=pipelined), self.top_k, self.shares)

    @torch.no_grad()
    def generate(self, inputs: Text | Tensor | Mapping[str, Any], *, pipelined: bool = False, **kwargs: Any) -> Any:
        """`HeadModel.generate`, with the chain's answer for each token; every model keeps a cache.

        All settings of `generate` that act on one text at a time apply. `UnsupportedError` for beams, assistants, and caches that
        are given or of a kind of their own.
        """
        self._check_generation(kwargs)
        with self._threads(pipelined) as pool, self._driving(pool):
            return self._models[-1].generate(inputs, **kwargs)

    # Learning

    def fit(
        self,
        data: Sequence[str] | Int[Tensor, "N T"] | Mapping[str, Tensor],
        settings: TrainSettings = BOOSTING,
        folder: str | Path | None = None,
        *,
        beta: float = 1.0,
        length: int = 128,
        bar: Bar = Bar(),
    ) -> list[Progress]:
        """Tune each model but the first, in order, to correct the one before; `settings` are for each.

        `data` are texts (cut into pieces of `length` tokens), token ids, or `input_ids` with an `attention_mask` and `weights` of
        the same shape: the weight of each token as a target. `beta` weighs suppression. With a `folder` the same call goes on.
        """
        check_number(beta, "beta", 0.0)
        check_integer(length, "length", 2)
        rows = boosting_rows(self._models[0], data, length)
        settings = settings.for_examples(len(rows["input_ids"]))
        batch, done = row_batches(rows, settings.rows, settings.seed), []
        for j in range(1, len(self)):
            into = None if folder is None else Path(folder) / f"model-{j + 1}"
            with ExitStack() as stack:
                for model in self._models:
                    stack.enter_context(frozen(model.plain))
                done.append(
                    fit(_Learning(self, j, beta), batch, settings, into, device=self._models[0].device, bar=bar)
                )
        self.eval()
        return done

    # Files

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write what was learned and a card into a new folder; the models are not in it."""
        settings = {**self._settings, "shares": list(self.shares)}
        card = Card("LLMBoost", "arXiv:2512.22309", settings, fingerprint=self.fingerprint, kind="boosted chain")
        return save(folder, card, self.correctors, force=force)

    @classmethod
    def load(cls, folder: str | Path, models: Sequence[HeadModel | PreTrainedModel], *, force: bool = False) -> Self:
        """What `save` wrote, beside the same models. `MismatchError` for others, `InputError` for a folder that holds none."""
        opened = [open_model(model) for model in models]
        found = "+".join(model.fingerprint for model in opened)
        card, tensors = load(folder, "boosted chain", "chain", fingerprint=found, force=force)
        try:
            chain = cls(opened, **card.settings)
        except TypeError as error:
            raise InputError(f"{folder} holds no chain: {error}.") from None
        fill(chain.correctors, tensors, folder)
        return chain

    # Inside

    def _run(self, last: int, given: Mapping[str, Any], pool: ThreadPoolExecutor | None = None) -> list[Tensor]:
        """Logits of models 0 .. `last`; gradients flow in the last one only."""
        with self._ahead(last, given, pool) as now:
            own = self._models[last].plain(**given).logits
            return [*(promise.result() for promise in now.logits), own]

    @contextmanager
    def _ahead(
        self,
        last: int,
        given: Mapping[str, Any],
        pool: ThreadPoolExecutor | None,
        memory: ChainMemory | None = None,
    ) -> Iterator[ChainPass]:
        """The models before `last` have run on the same inputs, or run in threads of `pool` meanwhile."""
        self._now = now = ChainPass(last, self._models[0].n_layers, given, memory)
        try:
            for j, own in enumerate([given if memory is None else memory.given_to(j, given) for j in range(last)]):
                if pool is None:
                    self._predecessor(j, own, now)
                else:
                    pool.submit(self._predecessor, j, own, now)
            yield now
        finally:
            wait(now.logits)  # whoever still runs looks at `_now`
            self._now = None

    def _predecessor(self, j: int, given: Mapping[str, Any], now: ChainPass) -> None:
        try:
            with torch.no_grad():  # of this thread
                now.logits[j].set_result(self._models[j].plain(**given).logits)
        except BaseException as error:
            now.failed(j, error)  # to be raised in the model that waits

    def _threads(self, pipelined: bool) -> AbstractContextManager[ThreadPoolExecutor | None]:
        return ThreadPoolExecutor(len(self) - 1) if pipelined else nullcontext()

    @contextmanager
    def _driving(self, pool: ThreadPoolExecutor | None) -> Iterator[None]:
        """While this lasts, a pass of the last model is one of the chain, and its logits are the chain's."""
        memory, passing = ChainMemory(), ExitStack()

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cached = memory if kwargs.get("past_key_values") is not None else None
            passing.enter_context(self._ahead(len(self) - 1, kwargs, pool, cached))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            assert self._now is not None
            each = [*(promise.result() for promise in self._now.logits), output.logits]
            passing.close()
            output.logits = fused_logits(each, self.top_k, self.shares)
            return output

        with passing, hooked(self._models[-1].plain, before, after):
            yield

    def _install(self) -> None:
        """Hooks on our own copies, for good: before a layer its reader, after it its state, around linear maps LoRA."""
        for j, model in enumerate(self._models):
            for layer, block in enumerate(model.layout.blocks):
                block.module.register_forward_hook(partial(self._leave, j, layer))
                if j:
                    block.module.register_forward_pre_hook(partial(self._enter, j, layer), with_kwargs=True)
            corrected = self._corrector(j).low_rank if j else ()
            for part, low_rank in zip(linear_parts(model), corrected, strict=False):  # none at rank 0
                part.register_forward_hook(partial(_add, low_rank), with_kwargs=True)

    def _corrector(self, j: int) -> Any:
        return self.correctors[j - 1]

    def _enter(self, j: int, layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (now := self._now) is None:
            return None
        hidden, reader = hidden_of(args, kwargs), self._corrector(j).readers[layer]
        kept = reader.keys_values(now.states[j - 1][layer].result())
        if now.memory is not None:
            kept = now.memory.extended((j, layer), kept)
        return with_hidden(args, kwargs, hidden + self.strength * reader(hidden, kept, now.apart, now.seen))

    def _leave(self, j: int, layer: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (now := self._now) is not None and j < now.last:
            now.states[j][layer].set_result(first_tensor(output))

    def _check_generation(self, kwargs: Mapping[str, Any]) -> None:
        own = getattr(self._models[-1].plain, "generation_config", None)
        config = copy.deepcopy(kwargs.get("generation_config") or own or GenerationConfig())
        config.update(**{name: value for name, value in kwargs.items() if name != "generation_config"})
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        wrong = mode.value if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) else None
        if config.cache_implementation not in (None, "dynamic"):
            wrong = f"a cache of the kind {config.cache_implementation}"
        if kwargs.get("past_key_values") is not None:
            wrong = "a cache that is given"
        if wrong:
            raise UnsupportedError(f"a chain decodes greedily or by sampling, from the prompt on, and not by {wrong}.")


class _Learning(nn.Module):
    """The loss of a batch for one model of a chain, whose corrector is all that learns."""

    def __init__(self, chain: BoostedChain, j: int, beta: float) -> None:
        super().__init__()
        self._chain, self.j, self.beta = (chain,), j, beta
        self.corrector = chain.correctors[j - 1]

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        chain, ids = self._chain[0], batch["input_ids"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        *_, before, logits = chain._run(self.j, {**chain._models[0].inputs(inputs), "use_cache": False})
        return boosting_loss(logits[:, :-1], before[:, :-1], ids[:, 1:], batch["weights"][:, 1:], self.beta)


def _add(low_rank: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    return output + low_rank(hidden_of(args, kwargs))


def _twin(model: HeadModel) -> HeadModel:
    """The same parameters in modules of our own, whose hooks nobody else meets."""
    base = settled(model)
    module = copy.deepcopy(base.plain, {id(parameter): parameter for parameter in base.plain.parameters()})
    return HeadModel(module, model.tokenizer, layout_in(module, base))


def _check_alike(models: Sequence[HeadModel]) -> None:
    if len(models) < 2:
        raise InputError(f"a chain has two models or more, and got {len(models)}.")
    for number, model in enumerate(models, 1):
        name = f"model {number}, a {type(model.plain).__name__},"
        if (
            getattr(model.config, "is_encoder_decoder", False)
            or not model.is_causal
            or model.layout.unembedding is None
        ):
            raise UnsupportedError(f"{name} is no decoder that writes text from left to right; a chain needs such.")
        if is_away(model.plain):
            raise UnsupportedError(f"{name} has weights that are offloaded; open it without offloading.")
        if len({id(block.module) for block in model.layout.blocks}) < model.n_layers:
            raise UnsupportedError(
                f"{name} runs one module as several layers, and a chain changes each layer by itself."
            )
        if model._dispatch.edits or model._dispatch.readers:
            raise InputError(f"{name} is being edited or read; make the chain outside of that block, or bake the edit.")
        for what, own, first in zip(_ALIKE, _kind(model), _kind(models[0]), strict=True):
            if own != first:
                raise InputError(f"{name} has {what} {own}, and model 1 {first}; a chain needs models of one kind.")
        if (
            None not in (model.tokenizer, first := models[0].tokenizer)
            and model.tokenizer.get_vocab() != first.get_vocab()
        ):
            raise InputError(f"{name} has another tokenizer than model 1; a chain needs models of one kind.")


_ALIKE = ("class", "layers:", "width", "tokens:", "device")


def _kind(model: HeadModel) -> tuple[Any, ...]:
    layout = model.layout
    return type(model.plain).__name__, layout.n_layers, layout.hidden_size, model.vocab_size, str(model.device)


def _checked_shares(shares: Sequence[float] | None, n: int) -> tuple[float, ...]:
    given = (1.0,) * n if shares is None else tuple(check_number(share, "a share", 0.0) for share in shares)
    if len(given) != n or not sum(given):
        raise InputError(f"shares are {list(given)} for {n} models; give one a model, and not zeros alone.")
    return given
