"""What is proved of a model when it is opened, before anything is read from it.

Five passes over a few tokens (or two pictures) measure, in every layer, the largest error of

    projection       sum_h z_h W_O[h] + b_O = what the output projection puts out
    attention_write, mlp_write
                     resid[l] + attention_write + mlp_write = resid[l + 1] (through the norms after each addition, if any)
    attention        each row of a pattern sums to one, or to less where a sink takes the rest; pattern @ values is what attention
                     returns; reading it changes no logit
    padding          a padded row gets the logits it has alone, on the left and on the right

each relative to the largest number it is compared with. A site that fails is not read: asking for it is an error that says why.
Without a projection that fits, nothing can be read, and the model is not opened.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.hooks import caught, first_tensor
from manyheads.model.inputs import first_positions, with_positions
from manyheads.model.layout import Layout, embedding_of, tiny_inputs
from manyheads.model.layouts.inputs import plain_pass
from manyheads.model.linear import bias_of, is_plain, projection_matrix
from manyheads.model.proof import UNPROVED, Proof
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Keep, ReadAttention
from manyheads.model.replay.dispatch import Dispatch
from manyheads.model.replay.recording import first_logits, no_cache

_N_TOKENS, _N_PADS = 6, 3  # an odd number: pooling by two would hide what padding moves
_HALVES = (torch.float16, torch.bfloat16)
_WRITES = ("attention_write", "mlp_write")


def prove(module: nn.Module, layout: Layout) -> Proof:
    """The proof (formulas above). `UnsupportedError` if no site can be read, `InputError` for a model whose passes are random."""
    coarse = [name for name, value in module.named_buffers() if "inv_freq" in name and value.dtype in _HALVES]
    if coarse:
        warnings.warn(
            f"{coarse[0]} is in half precision, which moves far positions; load the model with dtype=, or convert its "
            "parameters alone.",
            stacklevel=3,
        )
    return _Trial(module, layout).proof()


class _Trial:
    """The passes, and what they showed."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self.module, self.layout = module, layout
        self.name = type(module).__name__
        self.inputs = probe_inputs(module)
        self.errors: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        exact = {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 0.05)
        # Quantised weights may round the activations too.
        self.tolerance = (
            exact if all(is_plain(layout.blocks[at].projection) for at in layout.attention_layers) else max(exact, 0.1)
        )

    def proof(self) -> Proof:
        seen = self._plain_pass()
        self._same_again(seen)
        self._projections(seen)
        self._writes(seen)
        gated = self._attention(seen)
        first = self._padding(seen) if "input_ids" in self.inputs else None
        return Proof(self.name, self.errors, self.failed, first, gated)

    def _run(self, inputs: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            return first_logits(self.module(**inputs, **no_cache(self.module)))

    def _plain_pass(self) -> _Seen:
        layout = self.layout
        with contextlib.ExitStack() as stack:

            def note(modules: list[nn.Module], side: Any = "output") -> list[list[Tensor]]:
                keep = (lambda t: t.clone()) if side == "input" else (lambda out: first_tensor(out).clone())
                return [stack.enter_context(caught(module, side=side, keep=keep)) for module in modules]

            blocks = [block.module for block in layout.blocks]
            projections = [block.projection for block in layout.blocks]
            z, projected = note(projections, "input"), note(projections)
            before, after = note(blocks, "input"), note(blocks)
            written = {
                at: note([module for module, _ in layout.blocks[at].additions]) for at in layout.attention_layers
            }
            with plain_pass(self.module, self.inputs):
                logits = self._run(self.inputs)
        rows = _rows(self.inputs)
        for layer in layout.attention_layers:
            saw = [int(call.shape[-1]) for call in z[layer]]
            if len(saw) != 1 or saw[0] % layout.heads_in(layer):
                raise UnsupportedError(
                    f"cannot read {self.name}: expected layer {layer} to call its output projection once with a multiple of "
                    f"{layout.heads_in(layer)} features, its heads, saw {saw or 'no call'}."
                )
        if layout.n_heads % layout.n_kv_heads:
            raise UnsupportedError(
                f"cannot read {self.name}: its {layout.n_heads} query heads do not share {layout.n_kv_heads} KV heads evenly."
            )
        # Pictures cut up and put one after the other (Qwen2-VL's vision) have no rows: [positions, features].
        odd = next((c[0] for c in z if c and c[0].ndim != 2 and (c[0].ndim != 3 or c[0].shape[0] != rows)), None)
        if odd is not None:
            raise UnsupportedError(
                f"cannot read {self.name}: its heads' outputs come as {list(odd.shape)} for {rows} rows, not as "
                "[rows, positions, features]."
            )
        return _Seen(logits, {at: z[at][0] for at in layout.attention_layers}, projected, before, after, written)

    def _same_again(self, seen: _Seen) -> None:
        off = relative_error(self._run(self.inputs), seen.logits)
        if off <= (1e-5 if self.tolerance < 0.01 else self.tolerance):
            return
        if self.module.training:
            raise InputError(
                "the model is in training mode, and two passes of it differ; call model.eval() before opening it."
            )
        raise UnsupportedError(
            f"cannot read {self.name}: two passes over the same inputs differ (by {off:.2g}): it draws at random."
        )

    def _projections(self, seen: _Seen) -> None:
        for layer in self.layout.attention_layers:
            block = self.layout.blocks[layer]
            with torch.no_grad():
                expected = seen.z[layer] @ projection_matrix(block.projection).to(seen.z[layer])
            bias = bias_of(block.projection)
            expected = expected if bias is None else expected + bias.to(expected)
            self._note("projection", layer, expected, seen.projected[layer][0])
        if "projection" in self.failed:
            raise UnsupportedError(f"cannot read {self.name}: {self.failed['projection']}.")

    def _writes(self, seen: _Seen) -> None:
        for layer in self.layout.attention_layers:
            block = self.layout.blocks[layer]
            if not block.additions:
                self._fail(_WRITES, f"in layer {layer} resid plus what attention and MLP return is not the next resid")
                return
            calls = [seen.before[layer], seen.after[layer], *seen.written[layer]]
            if any(len(call) != 1 for call in calls):
                self._fail(_WRITES, f"layer {layer} does not call its attention and its MLP once each")
                return
            before, after, *written = (call[0] for call in calls)
            if layer + 1 < self.layout.n_layers and len(seen.before[layer + 1]) == 1:
                after = seen.before[layer + 1][0]  # what is read as the next resid: YOLOS adds to it between layers
            stream = before
            for write, (_, norm) in zip(written, block.additions, strict=True):
                if (
                    write.numel() != before.numel()
                    or write.shape[-1] != before.shape[-1]
                    or after.shape != before.shape
                ):
                    self._fail(_WRITES, f"layer {layer} writes {list(write.shape)} to a stream of {list(before.shape)}")
                    return
                stream = stream + self.layout.residual_scale * write.reshape(before.shape)
                try:
                    with torch.no_grad():
                        stream = stream if norm is None else first_tensor(norm(stream))
                except Exception:  # I-BERT's takes a scale besides
                    self._fail(_WRITES, f"the norm after each addition of layer {layer} takes more than the stream")
                    return
            moved = (after - before).abs().max()
            for site in _WRITES:
                self._note(site, layer, stream, after, scale=torch.maximum(moved, 1e-2 * after.abs().max()))

    def _attention(self, seen: _Seen) -> bool:
        """Whether z is something else than what attention returns."""
        returned: dict[int, Tensor] = {}
        z_reader = Keep("z")

        def look(call: AttentionCall) -> None:
            n = self.layout.heads_in(call.layer)
            pattern, z = call.pattern[:, :n], call.z[:, :, :n]
            sums = pattern.float().sum(-1)
            over = (sums - 1).clamp(min=0).max() if self._has_sinks else (sums - 1).abs().max()
            low = pattern.float().min()
            self.errors["attention"] = max(self.errors.get("attention", 0.0), float(over), float(-low.clamp(max=0)))
            value = call.value.repeat_interleave(call.pattern.shape[1] // call.value.shape[1], 1)[:, :n]
            mixed = relative_error((pattern.to(value) @ value).transpose(1, 2), z)
            self.errors["attention"] = max(self.errors["attention"], mixed)
            returned[call.layer] = z.flatten(-2).clone()
            made = seen.z[call.layer]
            if call.query.shape[1] != self.layout.n_heads or returned[call.layer].numel() != made.numel():
                raise UnsupportedError(
                    f"{call.query.shape[1]} heads attend, and the output projection reads {self.layout.n_heads}"
                )

        sites = ("attention", "q", "k", "v")
        try:
            with Dispatch(self.module, self.layout, UNPROVED).active(readers=[ReadAttention(look), z_reader]):
                logits = self._run(self.inputs)
        except Exception as error:  # an attention of another kind fails in its own way
            reason = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
            self._fail(sites, f"watching its attention fails ({reason})")
            return False
        missing = [layer for layer in self.layout.attention_layers if layer not in returned]
        if missing:
            self._fail(sites, f"layer {missing[0]} does not compute attention in a way that can be watched")
            return False
        off = self.errors["attention"] = max(self.errors["attention"], relative_error(logits, seen.logits))
        # Two kernels round differently, and in half precision that grows from layer to layer.
        allowed = self.tolerance if self.tolerance < 0.01 else 0.25
        if off > allowed:
            self._fail(sites, f"patterns or logits are off by {off:.2g} when its attention is watched")
        seen_z = {at: self.layout.side_by_side(value, at) for at, value in z_reader.values.items()}
        return max(relative_error(returned[at], value) for at, value in seen_z.items()) > self.tolerance

    @property
    def _has_sinks(self) -> bool:
        return any(hasattr(block.core, "sinks") for block in self.layout.blocks)

    def _padding(self, seen: _Seen) -> int | None:
        ids, n = self.inputs["input_ids"], self.inputs["input_ids"].shape[1]
        pads = ids.new_full((len(ids), _N_PADS), _pad_id(self.module))
        none, some = ids.new_zeros(len(ids), _N_PADS), torch.ones_like(ids)
        padded = {
            "left": (torch.cat([pads, ids], 1), torch.cat([none, some], 1), slice(_N_PADS, None)),
            "right": (torch.cat([ids, pads], 1), torch.cat([some, none], 1), slice(0, n)),
        }
        # One rule for both sides: the first that is right on both, else the one that is right on most.
        tried: list[tuple[int, float, int | None, dict[str, float]]] = []
        for first in first_positions(self.module):
            errors = {side: self._off_when_padded(seen, *given, first) for side, given in padded.items()}
            right = sum(error <= self.tolerance for error in errors.values())
            tried.append((-right, min(errors.values()), first, errors))
            if right == len(errors):
                break
        _, _, first, errors = min(tried, key=lambda one: one[:2])
        for side, error in errors.items():
            self.errors[f"padding on the {side}"] = error
            if error > self.tolerance:
                self._fail(
                    [f"padding on the {side}"],
                    "a padded row does not get the logits it has alone; give rows of one length",
                )
        return first

    def _off_when_padded(self, seen: _Seen, tokens: Tensor, mask: Tensor, where: slice, first: int | None) -> float:
        """How far a padded row's logits are from those it has alone, if a row's first token stands at `first`."""
        batch = with_positions(self.module, {**self.inputs, "input_ids": tokens, "attention_mask": mask}, first)
        try:
            logits = self._run(batch)
        except Exception:  # it takes no such positions
            return float("inf")
        whole = logits.ndim != 3 or logits.shape == seen.logits.shape  # a class, or what a decoder answers
        return relative_error(logits if whole else logits[:, where], seen.logits)

    def _note(self, site: str, layer: int, value: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
        error = relative_error(value, truth, scale)
        self.errors[site] = max(self.errors.get(site, 0.0), error)
        if not error <= self.tolerance:
            what = "sum_h z_h W_O[h] + b_O" if site == "projection" else "resid + attention_write + mlp_write"
            is_ = "what its output projection puts out" if site == "projection" else "the next resid"
            self.failed.setdefault(site, f"in layer {layer} {what} is not {is_} (error {error:.2g})")

    def _fail(self, sites: Any, reason: str) -> None:
        for site in sites:
            self.failed.setdefault(site, reason)
            self.errors[site] = float("inf")


@dataclass
class _Seen:
    logits: Tensor
    z: dict[int, Tensor]
    projected: list[list[Tensor]]
    before: list[list[Tensor]]
    after: list[list[Tensor]]
    written: dict[int, list[list[Tensor]]]


def relative_error(value: Tensor, truth: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference, relative; infinite where either is not finite."""
    value, truth = value.detach().float(), truth.detach().float()
    if value.shape != truth.shape:
        return float("inf")
    scale = truth.abs().max() if scale is None else scale.float()
    error = float((value - truth).abs().max() / scale.clamp(min=1e-12))
    return error if error == error else float("inf")


def _rows(inputs: Mapping[str, Tensor]) -> int:
    return len(next(iter(inputs.values())))


def probe_inputs(module: nn.Module, n_tokens: int = _N_TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of ordinary tokens, or two pictures of noise."""
    inputs = tiny_inputs(module)
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: _two_rows(name, value, generator) for name, value in inputs.items()}
    if "input_ids" not in inputs:
        return inputs
    room = _n_positions(module) - _N_PADS
    n_tokens = min(n_tokens, max(2, room))
    special = set(_special_ids(module))
    size = _n_ids(module)
    known = [i for i in range(min(size, 4096)) if i not in special] or [0]
    chosen = torch.randint(len(known), (2, n_tokens), generator=generator)
    return {**inputs, "input_ids": torch.tensor(known)[chosen].to(inputs["input_ids"].device)}


def _n_positions(module: Any) -> int:
    """How long a row may be, where the config says so."""
    config = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    most = min((value for value in stated if isinstance(value, int) and value > 0), default=1 << 30)
    return most - max(first or 0 for first in first_positions(module))  # RoBERTa's first positions are nobody's


def _two_rows(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Two rows of noise, or of the same ids; what has no rows (pictures cut up) keeps its length."""
    rows = (2, *value.shape[1:]) if value.shape[0] == 1 and not name.endswith("_thw") else tuple(value.shape)
    if not value.is_floating_point() or name.endswith("_mask"):
        return value.expand(rows)
    return torch.randn(rows, generator=generator).to(value)


def _special_ids(module: Any) -> Iterator[int]:
    for config in (module.config, getattr(module.config, "get_text_config", lambda: module.config)()):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                yield from [value] if isinstance(value, int) else [v for v in value or [] if isinstance(v, int)]


def _n_ids(module: Any) -> int:
    weight = getattr(embedding_of(module), "weight", None)
    table = isinstance(weight, Tensor) and weight.ndim == 2
    # CANINE has no table: it hashes its ids.
    return int(weight.shape[0]) if table else getattr(module.config, "vocab_size", None) or 256  # type: ignore[union-attr]


def _pad_id(module: Any) -> int:
    value = getattr(module.config, "pad_token_id", None)
    size = _n_ids(module)
    return value if isinstance(value, int) and 0 <= value < size else 0
