"""Hidden chain of thought (#96): a chain of steps compressed into one hidden state, from which a second model answers.

Liu et al., arXiv:2409.08561. A worked problem is a prefix x, a chain c and an answer y. Two copies of a model share the work.
The *compressor* reads x and a new token [CoT]; its hidden state there is u. The *answerer* reads x and, where [CoT] stood, the
projected u, and continues with y: the chain is never written.

    stage 1   u_i = h(x_i, [CoT])   t_i = M mean over the tokens of c_i of h_0(c_i)                [D] each
              loss = CE(c | x, [CoT]) + contrast * (L(S) + L(S^T)) / 2                             nats
              S_ij = cos(u_i, t_j) / tau,   L(S) = mean_i -log softmax_j(S_ij)[i]   over j with c_j != c_i, and i
    stage 2   loss = CE(y | x, P u)   with the compressor frozen, P a linear map [D] -> [E]         nats

h are the compressor's states, h_0 those of the original model, unchanged; M is a linear map, learned in stage 1.

Our choices where the paper is silent: h_0 reads the chain alone, without x and [CoT]. After [CoT] the chain's states could copy
u, and would match although u predicts nothing. A reader that learns would adapt to what u holds already, while u should come to
hold the chain. Equal chains are not negatives of each other; tau is 0.05; both copies learn all of their weights that require
gradients (the paper: LoRA); [CoT] has its own embedding and is not in the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from manyheads.draft.hidden_cot.data import (
    Rows,
    Worked,
    batch_with_answer,
    batch_with_chain,
    drawn,
    right_padded,
)
from manyheads.draft.hidden_cot.loss import contrastive_loss, cross_entropy, same_chain
from manyheads.draft.hidden_cot.reading import continued, readout_width, states_and_logits
from manyheads.errors import InputError
from manyheads.learning import Card, fill, load, save
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.progress import Bar
from manyheads.training import Batch, Progress, TrainSettings, fit

KIND = "hidden chain of thought"
TRAINING = TrainSettings(steps=1000, rows=128, rate=1e-3, warmup=50, weight_decay=0.01, precision="fp32")


class HiddenCot(nn.Module):
    """A compressor and an answerer, both copies of `model` at first, the [CoT] embedding and the maps M and P.

    `model` is any causal language model that takes `inputs_embeds`; it stays unchanged. Weights of it that require no gradient
    are not trained in the copies either. `UnsupportedError` for other models.
    """

    def __init__(self, model: HeadModel) -> None:
        super().__init__()
        width = readout_width(model)
        self._join(copy.deepcopy(model.plain), copy.deepcopy(model.plain), model.tokenizer)
        self._reader = [model.plain]  # in a list, so that it is no part of this module
        self.base = model.fingerprint
        table = model.plain.get_input_embeddings().weight.detach()
        size = table.float().pow(2).mean().sqrt()
        self.token = nn.Parameter(table.mean(0).clone())
        self.match = nn.Linear(width, width, bias=False, device=table.device, dtype=table.dtype)
        self.project = nn.Linear(width, table.shape[1], device=table.device, dtype=table.dtype)
        with torch.no_grad():
            nn.init.eye_(self.match.weight)
            nn.init.orthogonal_(self.project.weight).mul_(size)
            self.project.bias.zero_()

    def _join(self, compressor: Any, answerer: Any, tokenizer: Any) -> None:
        self.compressor, self.answerer, self.tokenizer = compressor.eval(), answerer.eval(), tokenizer

    @property
    def device(self) -> torch.device:
        """The device for token ids."""
        return self.token.device

    # Training

    def train_compressor(
        self,
        data: Worked,
        *,
        contrast: float = 1.0,
        tau: float = 0.05,
        settings: TrainSettings = TRAINING,
        folder: str | Path | None = None,
        on_step: Callable[[Progress], object] | None = None,
        bar: Bar = Bar(),
    ) -> Progress:
        """Stage 1. With `contrast` 0 only the chain's tokens are learned. With a `folder` an interrupted call resumes."""
        if contrast < 0 or tau <= 0:
            raise InputError(f"contrast {contrast} and tau {tau} make no loss; give contrast >= 0 and tau > 0.")
        lesson = _Lesson(
            lambda batch: self.compressor_loss(batch, contrast, tau),
            model=self.compressor,
            token=self.token,
            match=self.match,
        )
        return self._learn(
            lesson, drawn(data, settings.rows, settings.seed, batch_with_chain), settings, folder, on_step, bar
        )

    def compressor_loss(self, batch: Batch, contrast: float, tau: float) -> Float[Tensor, ""]:
        """The loss of stage 1 (formula above)."""
        states, logits = self._read(self.compressor, batch, self.token)
        loss = cross_entropy(logits, batch)
        if not contrast:
            return loss
        u = states[torch.arange(len(states)), batch["slot"]]
        t = self._pooled(batch["chain"], batch["chain_mask"])
        return loss + contrast * contrastive_loss(u, t, same_chain(batch["chain"], batch["chain_mask"]), tau)

    def train_answerer(
        self,
        data: Worked,
        *,
        settings: TrainSettings = TRAINING,
        folder: str | Path | None = None,
        on_step: Callable[[Progress], object] | None = None,
        bar: Bar = Bar(),
    ) -> Progress:
        """Stage 2; the compressor stays bit for bit unchanged."""
        lesson = _Lesson(self.answerer_loss, model=self.answerer, project=self.project)
        self.compressor.eval()
        return self._learn(
            lesson, drawn(data, settings.rows, settings.seed, batch_with_answer), settings, folder, on_step, bar
        )

    def answerer_loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The loss of stage 2 (formula above)."""
        self.compressor.to(batch["input_ids"].device)
        with torch.no_grad():
            states = self._read(self.compressor, batch, self.token.to(batch["input_ids"].device))[0]
            u = states[torch.arange(len(states)), batch["slot"]]
        return cross_entropy(self._read(self.answerer, batch, self.project(u))[1], batch)

    def _learn(
        self,
        lesson: _Lesson,
        batch_at: Callable[[int], Batch],
        settings: TrainSettings,
        folder: str | Path | None,
        on_step: Callable[[Progress], object] | None,
        bar: Bar,
    ) -> Progress:
        after = None if on_step is None else lambda progress, _: on_step(progress)
        done = fit(lesson, batch_at, settings, folder, after_step=after, bar=bar)
        self.eval().to(next(lesson.parameters()).device)
        return done

    # Using

    @torch.no_grad()
    def hidden(self, prefixes: Rows) -> Float[Tensor, "B D"]:
        """The state u of each prefix: one pass of the compressor."""
        ids, mask = right_padded([[*prefix, 0] for prefix in prefixes], self.device)
        slot = mask.sum(1) - 1
        batch = {"input_ids": ids, "slot": slot}
        return self._read(self.compressor, batch, self.token)[0][torch.arange(len(ids)), slot]

    @torch.no_grad()
    def chain_states(self, chains: Rows) -> Float[Tensor, "B D"]:
        """The state t of each chain: M times the mean of the original model's states over the chain alone."""
        return self._pooled(*right_padded(chains, self.device))

    def generate(
        self,
        prefixes: Rows,
        *,
        hidden: Float[Tensor, "B D"] | None = None,
        max_new_tokens: int = 64,
        stop: int | None = None,
    ) -> list[list[int]]:
        """Greedy answers, up to the token `stop` or the model's own end token, which is left out.

        `hidden` replaces u by other states, such as another problem's or a mean, to test what u contributes.
        """
        u = self.hidden(prefixes) if hidden is None else hidden
        if u.shape[0] != len(prefixes):
            raise InputError(f"{len(prefixes)} prefixes need as many hidden states; got {u.shape[0]}.")
        with torch.no_grad():
            return self._written(self.answerer, prefixes, self.project(u), max_new_tokens, stop)

    def decode_chain(self, prefixes: Rows, *, max_new_tokens: int = 64, stop: int | None = None) -> list[list[int]]:
        """The chain that the compressor writes after [CoT], for inspection. It reads the prefix as well as u."""
        slot = self.token.detach().expand(len(prefixes), -1)
        with torch.no_grad():
            return self._written(self.compressor, prefixes, slot, max_new_tokens, stop)

    # Reading

    def _read(self, model: Any, batch: Batch, slot: Float[Tensor, "*B E"]) -> tuple[Tensor, Tensor]:
        """States and logits of a text in which column `batch["slot"]` has the embedding `slot`."""
        ids = batch["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        here = torch.arange(ids.shape[1], device=ids.device) == batch["slot"][:, None]
        embeds = torch.where(here[..., None], (slot if slot.ndim == 1 else slot[:, None]).to(embeds.dtype), embeds)
        return states_and_logits(model, inputs_embeds=embeds)

    def _pooled(self, chain: Int[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        (reader,) = self._reader
        with torch.no_grad():
            states = states_and_logits(reader, input_ids=chain.to(reader.device))[0].to(chain.device)
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out: Tensor = self.match(mean)
        return out

    def _written(
        self, model: Any, prefixes: Rows, slot: Float[Tensor, "B E"], new: int, stop: int | None
    ) -> list[list[int]]:
        table = model.get_input_embeddings()
        texts = [table(torch.tensor(list(prefix), device=self.device)) for prefix in prefixes]
        return continued(model, [torch.cat([text, u[None]]) for text, u in zip(texts, slot, strict=True)], new, stop)

    # Keeping

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write both models as ordinary checkpoints, and [CoT], M and P. An existing folder is replaced only with `force`."""

        def models(into: Path) -> None:
            for name, model in (("compressor", self.compressor), ("answerer", self.answerer)):
                model.save_pretrained(into / name)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(into / name)

        own = {k: v for k, v in self.state_dict().items() if not k.startswith(("compressor.", "answerer."))}
        return save(
            folder,
            Card("hidden chain of thought (#96)", fingerprint=self.base, kind=KIND),
            own,
            also=models,
            force=force,
        )

    @classmethod
    def load(cls, folder: str | Path, model: HeadModel, *, force: bool = False) -> HiddenCot:
        """Read what `save` wrote. `MismatchError` if it was made from another model than `model`, unless forced."""
        folder = Path(folder)
        card, own = load(folder, KIND, KIND, fingerprint=model.fingerprint, force=force)
        found = cls(model)
        found.base = card.fingerprint
        compressor, answerer = (
            open_model(folder / name, dtype=model.plain.dtype).plain.to(found.device)
            for name in ("compressor", "answerer")
        )
        found._join(compressor, answerer, model.tokenizer)
        fill(found, found.state_dict() | own, folder)
        return found


class _Lesson(nn.Module):
    """The parts that a stage trains, and its loss, as one module."""

    def __init__(self, loss: Callable[[Batch], Tensor], **trained: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in trained.items():
            setattr(self, name, part)
        self._loss = loss

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        return self._loss(batch)
