"""Sparse autoencoders of attention outputs (#10): the output of a layer's heads as a sum of few features.

Kissane et al., arXiv:2406.17759. With x the concatenated head outputs before the output projection, x = concat_h z[h] in
R^(H Dh), one autoencoder of F features a layer is

    f = relu((x - b_dec) W_enc + b_enc)        x' = f W_dec + b_dec        rows of W_dec of unit length

Its quality: how many features are active (L0), how many never are (dead), and the model's loss when it reads x' instead of x:

    recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean)                                      1: no loss; baseline z = 0

Spliced in with its error, x' + (x - x'), it leaves the model unchanged; features can then be ablated one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError, MismatchError
from manyheads.inputs import check_integer
from manyheads.model.editing.edits import Ablate, Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Activation, Keep

PAPER = "arXiv:2406.17759"


@dataclass(frozen=True, eq=False)
class AttentionSae:
    """An autoencoder of layer `layer` of a model with `n_heads` heads. `meta` holds how it was trained, and on what."""

    layer: int
    n_heads: int
    W_enc: Float[Tensor, "HDh F"]
    b_enc: Float[Tensor, "F"]
    W_dec: Float[Tensor, "F HDh"]
    b_dec: Float[Tensor, "HDh"]
    fingerprint: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer(self.layer, "layer")
        check_integer(self.n_heads, "n_heads", 1)
        width, features = self.W_enc.shape
        shapes = [list(part.shape) for part in (self.b_enc, self.W_dec, self.b_dec)]
        if shapes != [[features], [features, width], [width]] or width % self.n_heads:
            raise InputError(
                f"an autoencoder of {self.n_heads} heads has W_enc [H Dh, F], b_enc [F], W_dec [F, H Dh], b_dec [H Dh]; got "
                f"{[width, features]}, {', '.join(map(str, shapes))}."
            )
        if not all(bool(part.isfinite().all()) for part in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)):
            raise InputError("the numbers of an autoencoder must be finite; train it anew.")

    @property
    def n_features(self) -> int:
        """Number of features."""
        return int(self.W_enc.shape[1])

    @property
    def head_dim(self) -> int:
        """Width of one head's z."""
        return int(self.W_enc.shape[0]) // self.n_heads

    def check(self, model: HeadModel, *, force: bool = False) -> None:
        """`MismatchError` if it was trained on another model: other weights (unless `force`), or other heads (always)."""
        if self.layer >= model.n_layers or (self.n_heads, self.head_dim) != (model.n_heads, model.head_dim):
            raise MismatchError(
                f"this autoencoder reads layer {self.layer} of {self.n_heads} heads of width {self.head_dim}; the model has "
                f"{model.n_layers} layers of {model.n_heads} heads of width {model.head_dim}."
            )
        if self.fingerprint and self.fingerprint != model.fingerprint and not force:
            raise MismatchError(
                f"this autoencoder was trained on model {self.fingerprint}, not on {model.fingerprint}; open its own model."
            )

    # x is z with the heads side by side, [..., H Dh]

    def pre(self, x: Float[Tensor, "... HDh"]) -> Float[Tensor, "... F"]:
        """Features before the relu."""
        return (x - self.b_dec.to(x)) @ self.W_enc.to(x) + self.b_enc.to(x)

    def encode(self, x: Float[Tensor, "... HDh"]) -> Float[Tensor, "... F"]:
        """Feature activations f (formula above)."""
        return torch.relu(self.pre(x))

    def decode(self, features: Float[Tensor, "... F"]) -> Float[Tensor, "... HDh"]:
        """The reconstruction x' (formula above)."""
        return features @ self.W_dec.to(features) + self.b_dec.to(features)

    def head_shares(self) -> Float[Tensor, "F H"]:
        """Each head's share of each decoder row, by norm; rows sum to 1. For a head's effect use `attribute_feature`."""
        norms = self.W_dec.unflatten(-1, (self.n_heads, -1)).norm(dim=-1)
        return norms / norms.sum(-1, keepdim=True).clamp_min(1e-12)

    # In the model

    def read(self, model: HeadModel, inputs: Any) -> Float[Tensor, "B T F"]:
        """Feature activations in a forward pass, which stops after this layer's attention."""
        keep = Keep("z", layers=[self.layer])
        model.look(inputs, keep)
        return self.encode(keep.values[self.layer].flatten(-2))

    def splice(self, *, ablate: Collection[int] = (), error: bool = True) -> Edit:
        """An edit that replaces z by its reconstruction, without the features `ablate`.

        With `error`, the reconstruction error is added back, so that only the ablated features are missing.
        """
        return Splice([(self.layer, h) for h in range(self.n_heads)], sae=self, gone=tuple(ablate), error=error)


@dataclass(frozen=True, eq=False)
class Splice(Edit):
    """`x -> x' (+ x - x')`, without the features `gone`."""

    sae: AttentionSae | None = None
    gone: tuple[int, ...] = ()
    error: bool = True

    def edit_z(self, z: Activation) -> Tensor:
        """Replace z of all heads of the layer."""
        assert self.sae is not None
        x = z.value.flatten(-2)
        features = self.sae.encode(x)
        kept = features.clone()
        kept[..., list(self.gone)] = 0
        restored = self.sae.decode(kept)
        if self.error:
            restored = restored + (x - self.sae.decode(features))
        return self._set(
            z.value, list(range(self.sae.n_heads)), restored.unflatten(-1, (self.sae.n_heads, -1)), z.offset
        )


@dataclass(frozen=True)
class SaeQuality:
    """`l0`: mean active features a token; `dead`: share of features never active; `explained`: share of x's variance explained;
    cross-entropies in nats a token: plain, with the reconstruction, and with z = 0; `n`: tokens."""

    l0: float
    dead: float
    explained: float
    ce: float
    ce_sae: float
    ce_zero: float
    n: int

    @property
    def recovered(self) -> float:
        """The share of the loss increase of z = 0 that the reconstruction avoids (formula above)."""
        return (self.ce_zero - self.ce_sae) / (self.ce_zero - self.ce)


def each_batch(batches: Iterable[Int[Tensor, "B T"]]) -> Iterable[Int[Tensor, "B T"]]:
    """`batches`, one by one. `InputError` for one tensor, whose rows would be taken for batches."""
    if isinstance(batches, Tensor):
        raise InputError(
            f"got one tensor of shape {list(batches.shape)} for batches; give several token ids [B, T]: [ids]."
        )
    return batches


def quality(
    model: HeadModel,
    sae: AttentionSae,
    batches: Iterable[Int[Tensor, "B T"]],
    *,
    scored: Callable[[Tensor], Bool[Tensor, "B T"]] | None = None,
) -> SaeQuality:
    """Measure an autoencoder on token batches. `scored(ids)` marks the tokens that count as targets (None: all but the first)."""
    sae.check(model, force=True)
    layer = [(sae.layer, h) for h in range(model.n_heads)]
    edits: dict[str, list[Edit]] = {"plain": [], "sae": [sae.splice(error=False)], "zero": [Ablate(layer, "zero")]}
    sums = dict.fromkeys(edits, 0.0)
    active, total = torch.zeros(sae.n_features), torch.zeros(sae.n_heads * sae.head_dim, dtype=torch.float64)
    targets, tokens, squared, squares = 0, 0, 0.0, 0.0
    for ids in each_batch(batches):
        counts = torch.ones_like(ids, dtype=torch.bool) if scored is None else scored(ids)
        keep = counts[:, 1:]
        targets += int(keep.sum())
        for name, edit in edits.items():
            with model.editing(*edit):
                logits = model.logits(ids)[:, :-1].cpu()
            sums[name] += float(F.cross_entropy(logits[keep].float(), ids[:, 1:][keep], reduction="sum"))
        x = head_outputs(model, sae.layer, ids).cpu()
        features = sae.encode(x)
        active += (features > 0).sum(0)
        squared += float((sae.decode(features) - x).square().sum(dtype=torch.float64))
        squares += float(x.square().sum(dtype=torch.float64))
        total += x.sum(0)
        tokens += len(x)
    if not targets:
        raise InputError("these batches have no token to predict; give token ids [B, T] with T of 2 or more.")
    ce, ce_sae, ce_zero = (sums[name] / targets for name in edits)
    return SaeQuality(
        l0=float(active.sum()) / tokens,
        dead=float((active == 0).float().mean()),
        explained=1 - squared / (squares - float(total.square().sum()) / tokens),
        ce=ce,
        ce_sae=ce_sae,
        ce_zero=ce_zero,
        n=tokens,
    )


def head_outputs(model: HeadModel, layer: int, ids: Int[Tensor, "B T"], first: int = 0) -> Float[Tensor, "N HDh"]:
    """The inputs x of an autoencoder of `layer` on these tokens, without the `first` tokens of each row."""
    keep = Keep("z", layers=[layer])
    model.look(ids, keep)
    return keep.values[layer][:, first:].flatten(-2).flatten(0, 1).float()


def with_unit_rows(sae: AttentionSae) -> AttentionSae:
    """The same function with decoder rows of unit length: their norms move into the encoder."""
    norms = sae.W_dec.norm(dim=-1).clamp_min(1e-12)
    return replace(sae, W_enc=sae.W_enc * norms, b_enc=sae.b_enc * norms, W_dec=F.normalize(sae.W_dec, dim=-1))


def refitted(sae: AttentionSae, x: Float[Tensor, "N HDh"], ridge: float = 1e-2) -> AttentionSae:
    """The same features, with the decoder that restores `x` from them best: rows that fire solve

        min over W, b of mean ||f(x) W + b - x||^2 + ridge mean var(f) ||W - W_dec||^2

    and `b_enc` takes up the change of `b_dec`, so that the same features are active everywhere.
    """
    f, x = sae.encode(x).double(), x.double()
    g, y = f - f.mean(0), x - x.mean(0)
    A = g.T @ g / len(x)
    hold = ridge * A.diagonal().mean() * torch.eye(len(A)).to(A)
    W = torch.linalg.solve(A + hold, g.T @ y / len(x) + hold @ sae.W_dec.to(A))
    W = torch.where((f > 0).any(0)[:, None], W, sae.W_dec.to(A))
    b = (x.mean(0) - f.mean(0) @ W).to(sae.b_dec)
    moved = sae.b_enc + (b - sae.b_dec) @ sae.W_enc
    return with_unit_rows(replace(sae, W_dec=W.to(sae.W_dec), b_dec=b, b_enc=moved))


def projection_sae(
    layer: int, n_heads: int, directions: Float[Tensor, "R HDh"], mean: Float[Tensor, "HDh"]
) -> AttentionSae:
    """The projection of x - mean onto orthonormal `directions` as an autoencoder: two features each, one of them active."""
    both = torch.cat([directions, -directions])
    return AttentionSae(layer, n_heads, both.T.contiguous(), torch.zeros(len(both)), both, mean)


def principal_components(x: Float[Tensor, "N HDh"], rank: int) -> Float[Tensor, "R HDh"]:
    """The `rank` orthonormal directions of most variance of x."""
    centred = x.double() - x.double().mean(0)
    return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:].T.flip(0).to(x)
