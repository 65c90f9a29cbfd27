"""Continual inference (#78): one more time step of an encoder for the cost of a step, with the outputs of the whole window.

Hedegaard et al., Continual Transformers, arXiv:2201.06268; thesis arXiv:2306.13474. A window of N steps moves over an endless
sequence. Bidirectional attention would be computed anew, N^2, at every step. Here the newest output costs N, and so does keeping
all N outputs up to date: with s the scores of a row's query, m a number of the row's own,

    single output   z_n = softmax(q_n K^T / sqrt(Dh)) V                                  for the newest n alone
    retroactive     d_i  <-  d_i + exp(s_i,new - m_i) - exp(s_i,old - m_i)                for each row i of the window
                    AV_i <- AV_i + exp(s_i,new - m_i) v_new - exp(s_i,old - m_i) v_old,   z_i = AV_i / d_i

One layer is single-output; of two, the first is retroactive and the second single-output. More than two layers cannot be exact:
what left the window would still have shaped what is in it.

Departure: the paper sums raw exponentials, which overflow for large scores. Here every row has the largest score it has met as
m_i (the sums are rescaled when it grows), the sums are float64, and a row is computed anew where the key that leaves held
nearly all of its sum. Positions are recycled: step t has row t mod P of the table, P >= 2N - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_integer

_LEFT = 1e-7  # share of a row's sum below which what is left of it has lost too many digits


class SingleOutputAttention:
    """The newest output of attention over the last `window` steps. `step` takes `[B, H, Dh]`."""

    def __init__(self, window: int) -> None:
        self.window = check_integer(window, "window", 1)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.count = 0

    def step(
        self, query: Float[Tensor, "B H Dk"], key: Float[Tensor, "B H Dk"], value: Float[Tensor, "B H Dv"]
    ) -> Float[Tensor, "B H Dv"] | None:
        """The newest output; None until the window is full."""
        if self.keys is None or self.values is None:
            self.keys = key.new_zeros(*key.shape[:2], self.window, key.shape[2])
            self.values = value.new_zeros(*value.shape[:2], self.window, value.shape[2])
        at = self.count % self.window  # a ring: attention does not ask in what order keys lie
        self.keys[:, :, at], self.values[:, :, at] = key, value
        self.count += 1
        if self.count < self.window:
            return None
        return F.scaled_dot_product_attention(query[:, :, None], self.keys, self.values)[:, :, 0]


class RetroactiveAttention:
    """All outputs of attention over the last `window` steps, oldest first, kept up to date. `step` takes `[B, H, Dh]`."""

    def __init__(self, window: int) -> None:
        self.window = check_integer(window, "window", 1)
        self.count = 0
        self._rows: dict[str, Tensor] = {}

    def step(
        self, query: Float[Tensor, "B H Dk"], key: Float[Tensor, "B H Dk"], value: Float[Tensor, "B H Dv"]
    ) -> Float[Tensor, "B H N Dv"] | None:
        """The outputs of all rows in the window; None until it is full."""
        new = {"query": query * query.shape[-1] ** -0.5, "key": key, "value": value}
        new = {name: one.double() for name, one in new.items()}
        if not self._rows:
            self._rows = self._empty(new)
        rows, at = self._rows, self.count % self.window
        if self.count >= self.window:
            self._forget(at)
        for name, one in new.items():
            rows[name][:, :, at] = one
        self.count += 1
        held = min(self.count, self.window)
        self._meet(at, held)
        if self.count < self.window:
            return None
        order = (torch.arange(self.window, device=query.device) + self.count) % self.window
        return (rows["sum"] / rows["total"][..., None])[:, :, order].to(value.dtype)

    def _empty(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        batch, heads, width = new["value"].shape
        rows = {name: one.new_zeros(batch, heads, self.window, one.shape[-1]) for name, one in new.items()}
        zeros = new["value"].new_zeros(batch, heads, self.window)
        return rows | {"sum": zeros[..., None].repeat(1, 1, 1, width), "total": zeros, "top": zeros - torch.inf}

    def _scores(self, at: int) -> Float[Tensor, "B H N"]:
        """Every row's score of the key at one place of the ring."""
        return torch.einsum("bhnd,bhd->bhn", self._rows["query"], self._rows["key"][:, :, at])

    def _forget(self, at: int) -> None:
        """Take the key that leaves out of every row's sums."""
        rows = self._rows
        weight = (self._scores(at) - rows["top"]).exp()
        left = rows["total"] - weight
        rows["sum"] -= weight[..., None] * rows["value"][:, :, at][:, :, None]
        lost = left < _LEFT * rows["total"]
        rows["total"] = left
        if bool(lost.any()):
            others = torch.arange(self.window, device=left.device) != at
            self._anew(lost, others)

    def _meet(self, at: int, held: int) -> None:
        """Add the new key to the sums of the rows that were there, and begin the new row."""
        rows = self._rows
        scores = self._scores(at)
        top = torch.maximum(rows["top"], scores)
        old = (rows["top"] - top).exp()  # 0 for a row that met nothing yet
        weight = (scores - top).exp()
        rows["total"] = rows["total"] * old + weight
        rows["sum"] = rows["sum"] * old[..., None] + weight[..., None] * rows["value"][:, :, at][:, :, None]
        rows["top"] = top
        new = torch.zeros_like(scores, dtype=torch.bool)
        new[:, :, at] = True
        self._anew(new, torch.arange(self.window, device=scores.device) < held)

    def _anew(self, which: Tensor, keys: Tensor) -> None:
        """The sums of some rows from all keys there are: those that are new, and those that lost their digits."""
        rows = self._rows
        b, h, n = which.nonzero(as_tuple=True)
        scores = torch.einsum("rd,rkd->rk", rows["query"][b, h, n], rows["key"][b, h][:, keys])
        top = scores.amax(-1) if scores.shape[1] else scores.new_full((len(b),), -torch.inf)
        weight = (scores - top[:, None]).exp()
        rows["top"][b, h, n], rows["total"][b, h, n] = top, weight.sum(-1)
        rows["sum"][b, h, n] = torch.einsum("rk,rkd->rd", weight, rows["value"][b, h][:, keys])


class ContinualEncoder(nn.Module):
    """An `nn.TransformerEncoder` of one or two layers that reads an endless sequence step by step.

    `forward` computes a whole window anew, `forward_step` the same from one more step. `positions` `[P, D]` is added to the
    inputs, P >= 2 * window - 1 (None: nothing is added). Weights are the encoder's own, which may be trained by `forward`.

    `UnsupportedError` for more than two layers; `InputError` for too few positions and for steps in training mode.
    """

    def __init__(
        self, encoder: nn.TransformerEncoder, window: int, positions: Float[Tensor, "P D"] | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.window = encoder, check_integer(window, "window", 2)
        layers: list[Any] = list(encoder.layers)
        if len(layers) > 2:
            raise UnsupportedError(
                f"this encoder has {len(layers)} layers; step by step only one or two have the outputs of the whole window."
            )
        if not all(type(layer) is nn.TransformerEncoderLayer and layer.self_attn.batch_first for layer in layers):
            raise UnsupportedError(
                "continual inference takes layers nn.TransformerEncoderLayer(..., batch_first=True)."
            )
        if positions is not None and len(positions) < 2 * window - 1:
            raise InputError(
                f"a window of {window} steps needs at least {2 * window - 1} positions, not {len(positions)}."
            )
        self.positions = None if positions is None else nn.Parameter(positions.clone())
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.count = 0
        self._first = RetroactiveAttention(self.window) if len(self.encoder.layers) == 2 else None
        self._last = SingleOutputAttention(self.window)
        self._inputs: list[Tensor] = []

    def forward(self, x: Float[Tensor, "B N D"], start: int = 0) -> Float[Tensor, "B D"]:
        """The newest output of the window whose first step is step `start` of the sequence, all computed anew."""
        if self.positions is not None:
            steps: Int[Tensor, "N"] = torch.arange(start, start + x.shape[1], device=x.device)
            x = x + self.positions[steps % len(self.positions)]
        out: Tensor = self.encoder(x)[:, -1]
        return out

    @torch.no_grad()
    def forward_step(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"] | None:
        """The same after one more step; None until the window is full."""
        if self.training:
            raise InputError("steps have no dropout and no gradients; call eval() first.")
        if self.positions is not None:
            x = x + self.positions[self.count % len(self.positions)]
        self.count += 1
        layers: list[Any] = list(self.encoder.layers)
        if self._first is None:
            out = self._newest(layers[0], x)
        else:
            states = self._all(layers[0], x)
            out = None if states is None else self._rest(layers[1], states)
        if out is None or self.encoder.norm is None:
            return out
        normed: Tensor = self.encoder.norm(out)
        return normed

    def _newest(self, layer: Any, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"] | None:
        z = self._last.step(*_projected(layer, layer.norm1(x) if layer.norm_first else x))
        return None if z is None else _finished(layer, x, z.flatten(1))

    def _all(self, layer: Any, x: Float[Tensor, "B D"]) -> Float[Tensor, "B N D"] | None:
        assert self._first is not None
        z = self._first.step(*_projected(layer, layer.norm1(x) if layer.norm_first else x))
        self._inputs = [*self._inputs[-self.window + 1 :], x]
        return None if z is None else _finished(layer, torch.stack(self._inputs, 1), z.transpose(1, 2).flatten(2))

    def _rest(self, layer: Any, states: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        """The last layer's newest output; all its inputs have changed, so that its keys and values are new."""
        query, key, value = _projected(layer, layer.norm1(states) if layer.norm_first else states)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        z = F.scaled_dot_product_attention(query[:, -1][:, :, None], key, value)[:, :, 0]
        return _finished(layer, states[:, -1], z.flatten(1))


def _projected(layer: Any, x: Float[Tensor, "B *N D"]) -> list[Float[Tensor, "B *N H Dh"]]:
    attention = layer.self_attn
    parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    return [part.unflatten(-1, (attention.num_heads, -1)) for part in parts]


def _finished(layer: Any, x: Float[Tensor, "B *N D"], z: Float[Tensor, "B *N D"]) -> Float[Tensor, "B *N D"]:
    """What the layer makes of its input and the heads' outputs: projection, residuals, norms, MLP."""
    out: Tensor = x + layer.self_attn.out_proj(z)
    out = out if layer.norm_first else layer.norm1(out)
    inner = layer.norm2(out) if layer.norm_first else out
    out = out + layer.linear2(layer.activation(layer.linear1(inner)))
    return out if layer.norm_first else layer.norm2(out)
