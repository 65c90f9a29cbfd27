"""Exact direct attribution: what each head, MLP and bias adds to an answer's logit, or to any readout of the final state.

With every norm's denominator held at the value it had in the pass, a pre-norm model's final state is a sum of writes:

    <readout, norm(x_L)> = <d, x_0> + sum_l ( sum_h <d, z_lh W_O[l,h]> + <d, b_l> + <d, mlp_l> ) + <readout, bias>,
    d = readout folded through the final norm                                            (units: those of the readout, logits)

Norms inside a branch (Gemma 2, OLMo 2) fold the head's own share; norms after each addition (BERT) fold `d` on its way down. The
sum is checked against the pass itself: where an architecture adds anything else, that is an error and not a remainder.

A head's share splits further, by the tokens it reads: z_lh = sum_s A[t, s] v_s, so with the same direction d

    share of source s = A[t, s] <d, v_s W_O[l,h]>
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.linear import bias_of, output_rows
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Activation, Reader, Site


@dataclass(frozen=True)
class Attribution:
    """Contributions to one readout, one row each, in the readout's unit. All parts sum to `total`."""

    heads: Float[Tensor, "B L H"]
    attention_bias: Float[Tensor, "B L"]
    mlp: Float[Tensor, "B L"]
    embedding: Float[Tensor, "B"]
    constant: Float[Tensor, "B"]
    directions: tuple[Float[Tensor, "B H Dh"], ...] = field(repr=False)
    """What each layer's z is multiplied with: `heads[:, l] = (z_l * directions[l]).sum(-1)`."""

    @property
    def total(self) -> Float[Tensor, "B"]:
        parts = self.heads.sum((1, 2)) + self.attention_bias.sum(1) + self.mlp.sum(1)
        return parts + self.embedding + self.constant


def logit_attribution(
    model: HeadModel,
    inputs: Any,
    answers: Int[Tensor, "B"],
    foils: Int[Tensor, "B"] | None = None,
    *,
    position: int | Int[Tensor, "B"] = -1,
) -> Attribution:
    """Attribute `logit[answer] - logit[foil]` (or `logit[answer]`) at `position` to every component.

    Logits are those before a final softcap (Gemma 2). `UnsupportedError` where the logits are no linear readout of the final
    norm (BERT's masked-token head is not): attribute a readout of your own there.
    """
    head = model.layout.unembedding
    if head is None:
        raise UnsupportedError(f"{type(model.plain).__name__} has no unembedding; give attribute() a readout.")
    answers = torch.as_tensor(answers, device=model.device)
    scale = 1.0 / float(getattr(model.config, "logits_scaling", 1.0) or 1.0)
    readout = output_rows(head, answers).double()
    bias = bias_of(head)
    constant = torch.zeros(len(answers), dtype=torch.float64) if bias is None else bias[answers].double()
    if foils is not None:
        foils = torch.as_tensor(foils, device=model.device)
        readout = readout - output_rows(head, foils).double()
        constant = constant if bias is None else constant - bias[foils].double()
    parts, logits = _attribute(model, inputs, readout.detach() * scale, position)
    constant = parts.constant + constant.detach().to(parts.constant) * scale
    result = replace(parts, constant=constant)
    rows = torch.arange(len(answers), device=logits.device)
    logits = _uncapped(model, logits[rows, torch.as_tensor(position, device=logits.device)].double())
    measured = logits[rows, answers.to(logits.device)]
    if foils is not None:
        measured = measured - logits[rows, foils.to(logits.device)]
    _check(model, result.total, measured.to(result.total), "its logits are no linear readout of the final norm")
    return result


def attribute(
    model: HeadModel, inputs: Any, readout: Float[Tensor, "B D"], *, position: int | Int[Tensor, "B"] = -1
) -> Attribution:
    """Attribute `<readout, final state>` at `position`, the final state taken after the final norm, to every component."""
    return _attribute(model, inputs, readout, position)[0]


def source_attribution(
    model: HeadModel,
    inputs: Any,
    answers: Int[Tensor, "B"],
    foils: Int[Tensor, "B"] | None = None,
    *,
    position: int = -1,
) -> Float[Tensor, "B L H S"]:
    """Split each head's part of `logit_attribution` at `position` by the tokens whose values it read (formula above)."""
    batch = model.inputs(inputs)
    parts = logit_attribution(model, batch, answers, foils, position=position)
    reader = _BySource(parts.directions, position)
    model.look(batch, reader)
    by_source = torch.stack([reader.values[layer] for layer in range(model.n_layers)], 1)
    _check(model, by_source.sum(-1), parts.heads, "its heads write more than the values they attend to")
    return by_source


def _attribute(model: HeadModel, inputs: Any, readout: Tensor, position: int | Tensor) -> tuple[Attribution, Tensor]:
    model.require_alike("exact attribution")
    sites: tuple[Site, ...] = ("z", "resid", "attention_write", "mlp_write")
    at = {site: _AtPosition(site, position) for site in sites}
    logits = model.read(inputs, *at.values())
    resid = {layer: value.double() for layer, value in at["resid"].values.items()}
    attn = {layer: value.double() for layer, value in at["attention_write"].values.items()}
    mlp = {layer: value.double() for layer, value in at["mlp_write"].values.items()}
    d = readout.double().to(resid[0].device)
    if d.shape != resid[0].shape:
        raise InputError(f"the readout has shape {list(d.shape)}, this pass needs {list(resid[0].shape)} [B, D].")
    layout, n_layers = model.layout, model.n_layers
    constant = torch.zeros(len(d), dtype=d.dtype, device=d.device)
    final = resid[n_layers]
    if layout.final_norm is not None:
        norm = FoldedNorm.of(layout.final_norm, layout.hidden_size)
        constant = constant + d @ norm.bias
        d = norm.fold(d, final)
    measured = (d * final).sum(-1) + constant
    heads: list[Tensor] = [torch.empty(0)] * n_layers
    biases, mlps, directions = list(heads), list(heads), list(heads)
    for layer in reversed(range(n_layers)):
        block = layout.blocks[layer]
        if block.post_norms is not None:
            after_attention, after_mlp = (FoldedNorm.of(norm, layout.hidden_size) for norm in block.post_norms)
            middle = after_attention.apply(resid[layer] + attn[layer])
            constant = constant + d @ after_mlp.bias
            d = after_mlp.fold(d, middle + mlp[layer])
            mlps[layer] = (d * mlp[layer]).sum(-1)
            constant = constant + d @ after_attention.bias
            d = after_attention.fold(d, resid[layer] + attn[layer])
        else:
            mlps[layer] = (d * mlp[layer]).sum(-1)
        z = at["z"].values[layer].double()
        directions[layer] = _direction(model, layer, z, d)
        heads[layer] = (z * directions[layer]).sum(-1)
        biases[layer] = (d * attn[layer]).sum(-1) - heads[layer].sum(-1)
    embedding = (d * resid[0]).sum(-1)
    result = Attribution(
        heads=torch.stack(heads, 1),
        attention_bias=torch.stack(biases, 1),
        mlp=torch.stack(mlps, 1),
        embedding=embedding,
        constant=constant,
        directions=tuple(directions),
    )
    if layout.blocks[0].post_norms is None:
        _check(model, result.total, measured, "its layers add more than attention and MLP write")
    return result, logits


def _direction(
    model: HeadModel, layer: int, z: Float[Tensor, "B H Dh"], d: Float[Tensor, "B D"]
) -> Float[Tensor, "B H Dh"]:
    """`d` pulled back to z, through whatever stands between the output projection and the residual stream."""
    block, layout = model.layout.blocks[layer], model.layout
    W_O = model.W_O(layer).detach().double().to(z.device)
    d = d * layout.residual_scale
    if block.attention_write is not block.projection:
        projected = torch.einsum("bhd,hde->be", z, W_O)
        bias = model.bias_O(layer)
        projected = projected if bias is None else projected + bias.detach().double()
        d = _through(block.attention_write, d, projected)
    return torch.einsum("hde,be->bhd", W_O, d)


def _through(module: nn.Module, d: Float[Tensor, "B D"], x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """`d` pulled back through a norm (denominator of `x`) or an elementwise scale."""
    try:
        return FoldedNorm.of(module, x.shape[-1]).fold(d, x)
    except UnsupportedError:
        ones = torch.ones(1, x.shape[-1], device=x.device)
        with torch.no_grad():
            gain, twice = module(ones), module(2 * ones)
        if not torch.allclose(2 * gain, twice):
            raise
        return d * gain.double()


def _uncapped(model: HeadModel, logits: Tensor) -> Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if not cap else torch.atanh((logits / cap).clamp(-1 + 1e-12, 1 - 1e-12)) * cap


def _check(model: HeadModel, total: Tensor, measured: Tensor, reason: str) -> None:
    scale = measured.abs().max() + 1.0
    exact = {torch.float32: 1e-3, torch.float64: 1e-6}.get(next(model.plain.parameters()).dtype, 0.2)
    if (total - measured).abs().max() > exact * scale:
        raise UnsupportedError(f"attribution is not exact for {type(model.plain).__name__}: {reason}.")


class _AtPosition(Reader):
    """Keeps one position of each row: `values[layer]` `[B, ...]`."""

    def __init__(self, site: Site, position: int | Tensor) -> None:
        self.site, self.position = site, position  # type: ignore[misc]
        self.values: dict[int, Tensor] = {}

    def read(self, call: Activation) -> None:
        rows = torch.arange(call.value.shape[0], device=call.value.device)
        at = torch.as_tensor(self.position, device=call.value.device)
        self.values[call.layer] = call.value.detach()[rows, at.expand(len(rows))].clone()


class _BySource(Reader):
    """Each head's write at one position along a direction, by source: `values[layer]` `[B, H, S]`."""

    site = "attention"

    def __init__(self, directions: tuple[Tensor, ...], position: int) -> None:
        self.directions, self.position = directions, position
        self.values: dict[int, Tensor] = {}

    def read(self, call: AttentionCall) -> None:
        """Weigh the values by the pattern's row."""
        length = call.query.shape[2]
        row = call.pattern_rows(torch.tensor([self.position % length], device=call.query.device))[:, :, 0].detach()
        values = call.values_of(list(range(row.shape[1]))).detach().double()
        along = torch.einsum("bhsd,bhd->bhs", values, self.directions[call.layer].to(values))
        self.values[call.layer] = row.double() * along
