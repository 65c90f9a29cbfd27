"""Multi-token prediction: train a trunk to predict the n next tokens, each with a small head of its own.

Gloeckle et al., arXiv:2404.19737, as used for planning by VideoPlan, arXiv:2507.15130 (#1). With z [B, T, D] what the output
matrix W_lm [V, D] reads, and heads f_k: D -> D that share that one matrix,

    logits_k = W_lm f_k(z)      head k at position t predicts token t + k, k = 1..n
    loss     = sum_k w_k mean_t CE(logits_k[t], y[t + k])                                   in nats, w_k = 1 unless given

where the mean is over positions t whose tokens t + 1 .. t + k all belong to the answer: predictions are made at the prompt's last
token and at answer tokens, and no target is prompt or padding. f_1 is the identity, every other f_k residual blocks
`y + SiLU(W y + b)`, W and b zero at first. So head 1 *is* the model, and without the others it is an ordinary checkpoint.

Logits are computed by the model's own code, its scale or cap after W_lm included. `one_at_a_time` saves memory as in the paper:
each head's logits and their gradient are dropped before the next head's are made, so that [N, V] numbers are held, not [n N, V].
Gradients are summed at z, and the trunk's backward pass runs once. The gradients are the same.

Departure: in 2404.19737 a head is a transformer layer (n - 1 layers fewer in the trunk) and the loss is unmasked; number, weights
and shape of VideoPlan's heads are not known to us.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.draft.core.drafter import residual_blocks
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError, UnsupportedError
from manyheads.learning import at_readout
from manyheads.model import hooks
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.progress import Bar
from manyheads.training import Batch, TrainSettings, fit


class FutureHeads(nn.Module):
    """f_1..f_n on states of width `width`: `layers` residual blocks each, except the first, which is the identity."""

    def __init__(self, width: int, n: int = 4, layers: int = 1) -> None:
        super().__init__()
        if n < 1 or layers < 1:
            raise InputError(f"{n} heads of {layers} blocks predict nothing; give at least 1 of each.")
        self.settings = {"width": width, "n": n, "layers": layers}
        self.blocks = nn.ModuleList(residual_blocks(width, layers) for _ in range(n - 1))

    @property
    def n(self) -> int:
        """The number of heads 1..n; head n predicts n tokens ahead."""
        return 1 + len(self.blocks)

    def hidden(self, k: int, z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """f_k(z); the trunk's output matrix turns it into the logits of the token k ahead. `InputError` unless 1 <= k <= n."""
        if not 1 <= k <= self.n:
            raise InputError(f"there are heads 1 to {self.n}; got {k}.")
        return z if k == 1 else self.blocks[k - 2](z)


class MultiToken(nn.Module):
    """A trunk, its heads and their loss (formula above) as one module to train.

    `weights` are w_1..w_n. A frozen trunk stays in evaluation mode. `InputError` unless each head has a weight,
    `UnsupportedError` for a model that does not predict the next token.
    """

    def __init__(
        self,
        model: HeadModel,
        n: int = 4,
        *,
        layers: int = 1,
        weights: Sequence[float] | None = None,
        one_at_a_time: bool = False,
    ) -> None:
        super().__init__()
        trunk = DraftTrunk(model)
        if not model.is_causal:
            raise UnsupportedError(
                f"{type(model.plain).__name__} attends to later tokens; give a causal language model."
            )
        self.weights = [1.0] * n if weights is None else list(weights)
        if len(self.weights) != n:
            raise InputError(f"got {len(self.weights)} weights for {n} heads; give one for each.")
        self.trunk = model.plain
        self.heads = FutureHeads(trunk.width, n, layers).to(trunk.device, trunk.dtype)
        self.one_at_a_time = one_at_a_time
        self._model = (model,)

    @property
    def model(self) -> HeadModel:
        """The trunk as a `HeadModel`."""
        return self._model[0]

    def train(self, mode: bool = True) -> MultiToken:
        """As in torch, but a frozen trunk stays in evaluation mode."""
        super().train(mode)
        self.trunk.train(mode and any(p.requires_grad for p in self.trunk.parameters()))
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The loss. `batch` is what the model takes, and `answers` [B, T]: where the answer's tokens are (default: all)."""
        seen = _Seen.of(self.model, batch)
        z = states_of(self.model, seen.inputs)
        if not bool(seen.in_answer(1).any()):
            raise InputError("this batch marks no token to predict; mark the answers in `answers`.")
        if self.one_at_a_time and torch.is_grad_enabled():
            output: Any = self.model.layout.unembedding
            learned = [p for module in (self.heads, output) for p in module.parameters() if p.requires_grad]
            loss: Tensor = _OneAtATime.apply(lambda k, z: self._loss(k, z, seen), self.heads.n, z, *learned)
            return loss
        return torch.stack([self._loss(k, z, seen) for k in range(1, self.heads.n + 1)]).sum()

    def _loss(self, k: int, z: Float[Tensor, "B T D"], seen: _Seen) -> Float[Tensor, ""]:
        """Head k's share of the loss; 0 if no answer is that long."""
        here = seen.in_answer(k)
        if not bool(here.any()):
            return z.new_zeros((), dtype=torch.float32)
        logits = logits_of(self.model, self.heads.hidden(k, z[:, : z.shape[1] - k][here]))
        return self.weights[k - 1] * F.cross_entropy(logits.float(), seen.ids[:, k:][here])

    @torch.no_grad()
    def logits(self, inputs: Any) -> Float[Tensor, "n B T V"]:
        """Logits of every head; entry 0 is the model's own."""
        batch = self.model.inputs(inputs)
        with at_readout(self.model.layout.unembedding) as caught:
            own = first_logits(self.trunk(**batch, **no_cache(self.trunk)))
        later = (logits_of(self.model, self.heads.hidden(k, caught[0])) for k in range(2, self.heads.n + 1))
        return torch.stack([own, *later])

    @torch.no_grad()
    def accuracy(self, batch: Mapping[str, Tensor]) -> list[float]:
        """How often each head's best guess is right, over the positions of the loss (nan where there are none)."""
        seen = _Seen.of(self.model, batch)
        z = states_of(self.model, seen.inputs)
        right = []
        for k in range(1, self.heads.n + 1):
            here = seen.in_answer(k)
            best = logits_of(self.model, self.heads.hidden(k, z[:, : z.shape[1] - k][here])).argmax(-1)
            right.append(float((best == seen.ids[:, k:][here]).float().mean()))
        return right


def train_multi_token(
    model: HeadModel,
    batch_at: Callable[[int], Batch],
    settings: TrainSettings,
    *,
    n: int = 4,
    layers: int = 1,
    weights: Sequence[float] | None = None,
    frozen: bool = False,
    one_at_a_time: bool = False,
    folder: Path | None = None,
    bar: Bar = Bar(),
) -> MultiToken:
    """Train `model` in place with n heads (or with `frozen` the heads alone) on `batch_at(i)`, see `MultiToken`.

    The model stays an ordinary one: saving it leaves out the further heads. With a `folder` an interrupted run resumes.
    `bar` counts steps.
    """
    both = MultiToken(model, n, layers=layers, weights=weights, one_at_a_time=one_at_a_time)
    with hooks.frozen(model.plain) if frozen else contextlib.nullcontext():
        fit(both, batch_at, settings, folder, bar=bar)
    return both.eval()


@dataclass(frozen=True)
class _Seen:
    """A batch as the loss reads it."""

    inputs: dict[str, Any]
    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    answers: Bool[Tensor, "B T"]

    @classmethod
    def of(cls, model: HeadModel, batch: Mapping[str, Tensor]) -> _Seen:
        inputs = model.inputs({name: value for name, value in batch.items() if name != "answers"})
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        answers = batch["answers"].to(ids.device).bool() if "answers" in batch else mask
        if answers.shape != ids.shape:
            raise InputError(
                f"`answers` has the shape {tuple(answers.shape)}; give the tokens' shape {tuple(ids.shape)}."
            )
        return cls(inputs, ids, mask, answers & mask)

    def in_answer(self, k: int) -> Bool[Tensor, "B S"]:
        """Positions t whose tokens t + 1 .. t + k all belong to the answer."""
        until = max(0, self.ids.shape[1] - k)
        run = torch.stack([self.answers[:, j : until + j] for j in range(1, k + 1)]).all(0)
        return run & self.mask[:, :until]


def states_of(model: HeadModel, inputs: Any) -> Float[Tensor, "B T D"]:
    """z, the states that the output matrix reads in a pass over `inputs`; no logits are computed."""
    with at_readout(model.layout.unembedding, lambda z: z[:, :0]) as caught:
        model.plain(**model.inputs(inputs), **no_cache(model.plain))
    return caught[0]


def logits_of(model: HeadModel, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """The model's logits of these states, scale or cap included: put in at the output matrix of a pass over one token."""
    with at_readout(model.layout.unembedding, lambda _: hidden.reshape(1, -1, hidden.shape[-1])):
        one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits = first_logits(model.plain(**model.inputs(one), **no_cache(model.plain)))
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


class _OneAtATime(torch.autograd.Function):
    """sum_k loss(k, z), each head's gradient computed in the forward pass, and only the sums kept."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[[int, Tensor], Tensor], n: int, z: Tensor, *learned: Tensor) -> Tensor:
        state = z.detach().requires_grad_(ctx.needs_input_grad[2])
        wanted = [tensor for tensor in (state, *learned) if tensor.requires_grad]
        sums = [torch.zeros_like(tensor) for tensor in wanted]
        total = z.new_zeros((), dtype=torch.float32)
        for k in range(1, n + 1):
            with torch.enable_grad():
                part = loss(k, state)
            total = total + part.detach()
            if part.requires_grad:
                for kept, grad in zip(sums, torch.autograd.grad(part, wanted, allow_unused=True), strict=True):
                    if grad is not None:
                        kept += grad
        ctx.save_for_backward(*sums)
        ctx.of_state = state.requires_grad
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        sums = [kept * grad for kept in ctx.saved_tensors]
        return None, None, *(sums if ctx.of_state else [None, *sums])
