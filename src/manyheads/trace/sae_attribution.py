"""Where a feature of an attention-output autoencoder comes from (#10): direct feature attribution, and one step further up.

Kissane et al., arXiv:2406.17759. Before the relu everything is linear in what heads read, once patterns stand:

    pre_i[t] = sum_h sum_s A[h, t, s] <v[h, s], w_i[h]> + b_enc,i - <b_dec, w_i>         DFA[h, s]; w_i[h]: head h's part of W_enc
    v[h, s]  = sum_u (what component u wrote to the stream at s, through the norm as it was) W_V[h] + b_V      recursive DFA[u]

Terms sum to the feature before its relu. The value map is the model's own: it is read off the attention module, with the norm's
denominator held at its value in the pass, so that it works wherever values are linear in the normed stream, under grouped-query
attention too. Where they are not, the sum fails its check and an `UnsupportedError` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head
from manyheads.model.attention import AttentionCall
from manyheads.model.headmodel import HeadModel
from manyheads.model.input_norm import input_norm
from manyheads.model.qkv_weights import head_weights
from manyheads.model.reading import Keep, Reader
from manyheads.model.streaming import hidden_of
from manyheads.trace.attention_sae import AttentionSae


@dataclass(frozen=True)
class FeatureAttribution:
    """One feature at one position of one prompt: `terms[h, s]` by head and source token, and the `constant` of the biases."""

    feature: int
    position: int
    terms: Float[Tensor, "H S"]
    constant: float

    @property
    def pre(self) -> float:
        """The feature before its relu: what everything sums to."""
        return float(self.terms.sum()) + self.constant

    def to_frame(self) -> pd.DataFrame:
        """A row a head and source, largest magnitude first."""
        rows = [(h, s, float(v)) for h, row in enumerate(self.terms) for s, v in enumerate(row)]
        frame = pd.DataFrame(rows, columns=["head", "source", "value"])
        return frame.sort_values("value", key=abs, ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True)
class RecursiveAttribution:
    """One head's reading of one source, by what wrote it there: `terms` by component (`embedding`, `L0H3`, `M0`, `bias`)."""

    head: Head
    source: int
    terms: dict[str, float]

    @property
    def total(self) -> float:
        """The term of direct attribution that this splits."""
        return sum(self.terms.values())


def attribute_feature(
    model: HeadModel, sae: AttentionSae, inputs: Any, feature: int, *, position: int = -1, row: int = 0
) -> FeatureAttribution:
    """Direct feature attribution of one feature at `position` of batch row `row` (formula above).

    `InputError` for a feature that is not there; `UnsupportedError` where the terms do not sum to the feature.
    """
    sae.check(model, force=True)
    _known(sae, feature)
    reader, keep = _Row(sae.layer, row, position), Keep("z", layers=[sae.layer])
    model.look(inputs, reader, keep)
    w = sae.W_enc[:, feature].unflatten(0, (sae.n_heads, -1)).to(reader.values)
    terms = reader.pattern * torch.einsum("hsd,hd->hs", reader.values, w)
    constant = float(sae.b_enc[feature]) - float(sae.b_dec.double() @ sae.W_enc[:, feature].double())
    place = position % keep.values[sae.layer].shape[1]
    pre = float(sae.pre(keep.values[sae.layer][row, place].flatten())[feature])
    found = FeatureAttribution(feature, place, terms.cpu(), constant)
    if abs(found.pre - pre) > 1e-3 * (1 + float(terms.abs().sum())):
        raise UnsupportedError(f"heads of {type(model.plain).__name__} write more than the values they attend to.")
    return found


def attribute_source(
    model: HeadModel,
    sae: AttentionSae,
    inputs: Any,
    feature: int,
    head: int,
    source: int,
    *,
    position: int = -1,
    row: int = 0,
) -> RecursiveAttribution:
    """Split one term of `attribute_feature`, head `head` reading token `source`, by what wrote to the stream there.

    Patterns, and the denominator of the layer's norm, are held where they were. `UnsupportedError` where the residual stream is
    no plain sum of writes (BERT), or values are not linear in it.
    """
    if model.layout.blocks[0].post_norms is not None:
        raise UnsupportedError(
            f"{type(model.plain).__name__} normalises its stream after each addition; sources cannot be split."
        )
    batch = model.inputs(inputs)
    direct = attribute_feature(model, sae, batch, feature, position=position, row=row)
    weight = _pattern_weight(model, sae, batch, head, direct.position, source, row)
    w = sae.W_enc[:, feature].unflatten(0, (sae.n_heads, -1))[head]
    writes = _writes(model, batch, sae.layer, source, row)
    onto, bias = _value_along(model, batch, sae.layer, head, row, w)
    norm, x = input_norm(model, sae.layer), torch.stack(list(writes.values())).sum(0)
    for name, write in writes.items():
        normed = write if norm is None else norm.direction(write) / norm.sigma(x)
        writes[name] = normed
    terms = {name: weight * float(write @ onto) for name, write in writes.items()}
    terms["bias"] += weight * (bias + (0.0 if norm is None else float(norm.bias @ onto)))
    wanted = float(direct.terms[head, source])
    if abs(sum(terms.values()) - wanted) > 1e-3 * (1e-3 + sum(map(abs, terms.values()))):
        raise UnsupportedError(f"values of {type(model.plain).__name__} are not linear in what components wrote.")
    return RecursiveAttribution(Head(sae.layer, head), source, terms)


def _known(sae: AttentionSae, feature: int) -> None:
    if not 0 <= feature < sae.n_features:
        raise InputError(f"there is no feature {feature}; this autoencoder has 0-{sae.n_features - 1}.")


class _Row(Reader):
    """One query's pattern and the values its heads read: `pattern` `[H, S]`, `values` `[H, S, Dh]`, in double precision."""

    site = "attention"

    def __init__(self, layer: int, row: int, position: int) -> None:
        self.layers, self.row, self.position = [layer], row, position
        self.pattern = self.values = torch.zeros(0)

    def read(self, call: AttentionCall) -> None:
        length = call.query.shape[2]
        at = torch.tensor([self.position % length], device=call.query.device)
        self.pattern = call.pattern_rows(at)[self.row, :, 0].detach().double()
        self.values = call.values_of(list(range(call.query.shape[1])))[self.row].detach().double()


def _pattern_weight(
    model: HeadModel, sae: AttentionSae, batch: Any, head: int, position: int, source: int, row: int
) -> float:
    reader = _Row(sae.layer, row, position)
    model.look(batch, reader)
    return float(reader.pattern[head, source])


def _writes(model: HeadModel, batch: Any, layer: int, source: int, row: int) -> dict[str, Float[Tensor, "D"]]:
    """What every component below `layer` wrote to the residual stream at one token; biases apart."""
    resid, z = Keep("resid", layers=[0, layer]), Keep("z", layers=range(layer))
    attention, mlp = Keep("attention_write", layers=range(layer)), Keep("mlp_write", layers=range(layer))
    model.look(batch, *([resid] if layer == 0 else [resid, z, attention, mlp]))
    at = (row, source)
    writes = {"embedding": resid.values[0][at].double()}
    bias = torch.zeros_like(writes["embedding"])
    for below in range(layer):
        W_O = model.W_O(below).detach().double() * model.layout.residual_scale
        heads = torch.einsum("hd,hde->he", z.values[below][at].double(), W_O)
        if model.layout.blocks[below].attention_write is not model.layout.blocks[below].projection:
            raise UnsupportedError(
                f"{type(model.plain).__name__} norms what attention writes; its sources cannot be split."
            )
        writes |= {str(Head(below, h)): heads[h] for h in range(model.n_heads)}
        writes[f"M{below}"] = mlp.values[below][at].double()
        bias = bias + attention.values[below][at].double() - heads.sum(0)
    writes["bias"] = bias
    whole = torch.stack(list(writes.values())).sum(0)
    if (whole - resid.values[layer][at].double()).abs().max() > 1e-3 * (1 + whole.abs().max()):
        raise UnsupportedError(f"{type(model.plain).__name__}'s stream is not the sum of what its components write.")
    return writes


def _value_along(
    model: HeadModel, batch: Any, layer: int, head: int, row: int, w: Float[Tensor, "Dh"]
) -> tuple[Float[Tensor, "D"], float]:
    """The vector that what attention reads is multiplied with to give <value of a head, w>, and the constant beside it."""
    onto = head_weights(model, fold=False)[layer].W_V[head].detach().double() @ w.double()
    reader, read = _Row(layer, row, 0), list[Tensor]()

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.append(hidden_of(args, kwargs).detach()[row].double())

    handle = model.layout.blocks[layer].attention.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.look(batch, reader)
    finally:
        handle.remove()
    rest = reader.values[head] @ w.double() - read[0] @ onto
    if (rest - rest.mean()).abs().max() > 1e-3 * (1 + rest.abs().max()):
        raise UnsupportedError(f"values of {type(model.plain).__name__} are not linear in what attention reads.")
    return onto, float(rest.mean())
