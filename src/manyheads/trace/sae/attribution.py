"""Attribution of a feature of an attention-output autoencoder (#10): to heads and source tokens, then to what wrote there.

Kissane et al., arXiv:2406.17759. Before the relu, a feature is linear in what heads read if patterns are fixed. With w_i[h]
head h's block of the encoder column of feature i, and the denominator sigma of the layer's norm held constant,

    pre_i[t] = sum_h sum_s A[h, t, s] <v[h, s], w_i[h]> + b_enc,i - <b_dec, w_i>              direct attribution, terms [H, S]
    <v[h, s], w_i[h]> = sum_u <write_u[s], r_i[h]> / sigma[s] + c_i[h]                        recursive attribution, [C, H, S]

    r_i[h] = W_V[h] w_i[h] pulled back through the norm; c_i[h] collects the biases of value and norm

where u runs over the embedding, every head and MLP below, and their biases. Layers with an autoencoder contribute features and
reconstruction errors instead of heads. Terms sum to the feature before its relu, in its unit.

W_V is measured on the model's own modules, patterns and values are the model's own, so rotary embeddings and grouped-query
attention need no special care. If a sum fails (values not linear in the normed stream), that is an `UnsupportedError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Keep, Reader
from manyheads.model.weights.input_norm import input_norm
from manyheads.model.weights.qkv import head_weights
from manyheads.trace.sae.autoencoder import AttentionSae

TOLERANCE = 1e-3


@dataclass(frozen=True)
class FeatureAttribution:
    """One feature at one position: `terms[h, s]` by head and source token, `constant` of the autoencoder's biases."""

    feature: int
    position: int
    terms: Float[Tensor, "H S"]
    constant: float

    @property
    def pre(self) -> float:
        """The feature before its relu: what everything sums to."""
        return float(self.terms.sum()) + self.constant

    def to_frame(self) -> pd.DataFrame:
        """One row a head and source, largest magnitude first."""
        return _frame(["head", "source"], self.terms)


@dataclass(frozen=True)
class RecursiveAttribution:
    """A feature's direct terms, each split by component that wrote to the stream at its source: `terms[c, h, s]`.

    Components are `embedding`, `L0H3`, `M0`, `L0F17` (a feature of a lower autoencoder), `L0error` and `bias`.
    """

    feature: int
    position: int
    components: tuple[str, ...]
    terms: Float[Tensor, "C H S"]
    constant: float

    @property
    def pre(self) -> float:
        """The feature before its relu: what everything sums to."""
        return float(self.terms.sum()) + self.constant

    def to_frame(self) -> pd.DataFrame:
        """One row a component, head and source, largest magnitude first."""
        frame = _frame(["component", "head", "source"], self.terms)
        return frame.assign(component=[self.components[c] for c in frame["component"]])


def attribute_feature(
    model: HeadModel, sae: AttentionSae, inputs: Any, feature: int, *, position: int = -1, row: int = 0
) -> FeatureAttribution:
    """Direct attribution of `feature` at `position` of batch row `row` (formula above).

    `InputError` for a feature, row or position that is not there, `MismatchError` for a model of another shape,
    `UnsupportedError` where the terms do not sum to the feature.
    """
    _check_feature(sae, feature)
    one_row, position = _one_row(model, inputs, position, row)
    terms = source_terms(model, sae, one_row, torch.tensor([feature]), torch.tensor([position]))[0].cpu()
    return FeatureAttribution(feature, position, terms, _constant(sae, feature))


def source_terms(
    model: HeadModel, sae: AttentionSae, inputs: Any, features: Int[Tensor, "B"], positions: Int[Tensor, "B"]
) -> Float[Tensor, "B H S"]:
    """Direct attribution of one feature at one position in each row of a batch. Errors as in `attribute_feature`."""
    sae.check(model, force=True)
    reader, keep = _Sources(sae.layer, positions), Keep("z", layers=[sae.layer])
    model.look(inputs, reader, keep)
    w = sae.W_enc.T[features].unflatten(-1, (sae.n_heads, -1)).to(reader.values)
    terms = reader.pattern * torch.einsum("bhsd,bhd->bhs", reader.values, w)
    z = keep.values[sae.layer]
    heads = torch.einsum("bhd,bhd->bh", z[torch.arange(len(z)), positions].double(), w)
    _check_sum(model, terms.sum(-1), heads, terms, "heads write more than the values they attend to")
    return terms


def recursive_attribution(
    model: HeadModel,
    sae: AttentionSae,
    inputs: Any,
    feature: int,
    *,
    position: int = -1,
    row: int = 0,
    below: Sequence[AttentionSae] = (),
) -> RecursiveAttribution:
    """Direct attribution, every term split by component that wrote to the residual stream at its source (formula above).

    A layer with an autoencoder in `below` is split into its active features. Errors as in `attribute_feature`;
    `UnsupportedError` too if the stream is no plain sum of writes (BERT, norms after the attention).
    """
    _check_feature(sae, feature)
    lower = {one.layer: one for one in below}
    if any(layer >= sae.layer for layer in lower):
        raise InputError(f"got an autoencoder of layer {max(lower)} in `below`; give ones below layer {sae.layer}.")
    for one in lower.values():
        one.check(model, force=True)
    one_row, position = _one_row(model, inputs, position, row)
    reader = _Sources(sae.layer, torch.tensor([position]))
    model.look(one_row, reader)
    w = sae.W_enc[:, feature].unflatten(0, (sae.n_heads, -1)).to(reader.values)
    along = torch.einsum("hsd,hd->hs", reader.values[0], w)

    resid, writes = _writes(model, one_row, sae.layer)
    readout = torch.einsum("hde,he->hd", head_weights(model, fold=False)[sae.layer].W_V.detach().to(w), w)
    norm = input_norm(model, sae.layer)
    if norm is not None:
        readout = norm.pull(readout)
    sigma = torch.ones_like(resid[:, 0]) if norm is None else norm.sigma(resid)[:, 0]
    terms = {name: readout @ write.T / sigma for name, write in writes.items()}
    for layer, one in lower.items():
        features = one.read(model, one_row)[0].to(w)
        heads = [str(Head(layer, h)) for h in range(model.n_heads)]
        whole = torch.stack([terms.pop(name) for name in heads]).sum(0)
        W_O = model.W_O(layer).detach().to(w).flatten(0, 1) * model.layout.residual_scale
        onto = one.W_dec.to(w) @ W_O @ readout.T
        active = (features > 0).any(0).nonzero()[:, 0].tolist()
        for i in active:
            terms[f"L{layer}F{i}"] = onto[i][:, None] * features[:, i] / sigma
            whole = whole - terms[f"L{layer}F{i}"]
        terms[f"L{layer}error"] = whole
    bias = along - torch.stack(list(terms.values())).sum(0)
    _check_sum(model, bias, bias.mean(-1, keepdim=True), along, "values are not linear in what components wrote")
    terms["bias"] = terms["bias"] + bias.mean(-1, keepdim=True)
    split = torch.stack(list(terms.values())) * reader.pattern[0]
    return RecursiveAttribution(feature, position, tuple(terms), split.cpu(), _constant(sae, feature))


class _Sources(Reader):
    """For one query a row: its pattern `[B, H, S]` and the heads' values `[B, H, S, Dh]`, in double precision."""

    site = "attention"

    def __init__(self, layer: int, positions: Int[Tensor, "B"]) -> None:
        self.layers, self.positions = [layer], positions
        self.pattern = self.values = torch.zeros(0)

    def read(self, call: AttentionCall) -> None:
        wanted, where = torch.unique(self.positions.to(call.query.device), return_inverse=True)
        rows = call.pattern_rows(wanted).detach().double()
        self.pattern = rows[torch.arange(len(where), device=where.device), :, where]
        self.values = call.values_of(list(range(call.query.shape[1]))).detach().double()


def _writes(
    model: HeadModel, batch: dict[str, Any], layer: int
) -> tuple[Float[Tensor, "S D"], dict[str, Float[Tensor, "S D"]]]:
    """The stream entering `layer` in the batch's first row, and the write of every component below."""
    layout, lower = model.layout, range(layer)
    if layout.blocks[0].post_norms is not None or any(
        layout.blocks[i].attention_write is not layout.blocks[i].projection for i in lower
    ):
        raise UnsupportedError(
            f"{type(model.plain).__name__} norms what attention writes or its sum with the stream; use direct attribution there."
        )
    resid, z = Keep("resid", layers=[0, layer]), Keep("z", layers=lower)
    attention, mlp = Keep("attention_write", layers=lower), Keep("mlp_write", layers=lower)
    model.look(batch, *([resid, z, attention, mlp] if layer else [resid]))
    writes = {"embedding": resid.values[0][0].double()}
    bias = torch.zeros_like(writes["embedding"])
    for i in lower:
        W_O = model.W_O(i).detach().double() * layout.residual_scale
        heads = torch.einsum("shd,hde->hse", z.values[i][0].double(), W_O)
        writes |= {str(Head(i, h)): heads[h] for h in range(model.n_heads)}
        writes[f"M{i}"] = mlp.values[i][0].double()
        bias = bias + attention.values[i][0].double() - heads.sum(0)
    writes["bias"] = bias
    entering = resid.values[layer][0].double()
    parts = torch.stack(list(writes.values()))
    _check_sum(model, parts.sum(0), entering, parts, "the stream is not the sum of what components write")
    return entering, writes


def _one_row(model: HeadModel, inputs: Any, position: int, row: int) -> tuple[dict[str, Any], int]:
    """One row as a batch, and the position counted from its start."""
    batch = model.inputs(inputs)
    if "input_ids" not in batch:
        raise InputError("features are attributed to tokens; give text, or a batch with input_ids.")
    rows, length = batch["input_ids"].shape
    if not 0 <= row < rows or not -length <= position < length:
        raise InputError(
            f"there is no position {position} in row {row} of {rows} rows with {length} tokens; give ones within these."
        )
    kept = {k: v[row : row + 1] if isinstance(v, Tensor) and len(v) == rows else v for k, v in batch.items()}
    return kept, position % length


def _check_feature(sae: AttentionSae, feature: int) -> None:
    if not 0 <= feature < sae.n_features:
        raise InputError(f"there is no feature {feature}; give 0 to {sae.n_features - 1}.")


def _constant(sae: AttentionSae, feature: int) -> float:
    return float(sae.b_enc[feature]) - float(sae.b_dec.double() @ sae.W_enc[:, feature].double())


def _check_sum(model: HeadModel, found: Tensor, wanted: Tensor, parts: Tensor, otherwise: str) -> None:
    if float((found - wanted).abs().max()) > TOLERANCE * (1 + float(parts.abs().max())):
        raise UnsupportedError(f"attribution does not sum in {type(model.plain).__name__}: {otherwise}.")


def _frame(names: list[str], terms: Tensor) -> pd.DataFrame:
    places = torch.cartesian_prod(*(torch.arange(n) for n in terms.shape)).numpy()
    frame = pd.DataFrame(places, columns=names).assign(value=terms.flatten().numpy())
    return frame.sort_values("value", key=abs, ascending=False, kind="stable", ignore_index=True)
