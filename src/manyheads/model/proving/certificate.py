"""A certificate of what is read: every site's largest error against the plain model, under each way to run it.

For each number format, kernel (eager, SDPA) and run (plain, padded left or right, cached), relative to the largest number:

    logits            with every reader active = the plain model's
    projection        z W_O + b_O = what the output projection puts out
    writes            resid[l] + attention_write + mlp_write = resid[l + 1]
    resid             = the hidden states that Transformers returns
    patterns          = the attentions that Transformers returns; None where it returns none
    row sums          1 - sum of a pattern's row (sinks may take some)

With padding every site at a row's own tokens is also compared with the row alone, with a cache with the whole pass; the error
is the larger one. `open_model` proves less, on six tokens (`door`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from manyheads.files import write_atomically
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.inputs import positions_of, takes
from manyheads.model.layouts.inputs import decoded
from manyheads.model.linear import bias_of, is_plain, number_format, projection_matrix
from manyheads.model.offloading import own_copy
from manyheads.model.proving.door import probe_inputs, relative_error
from manyheads.model.reading.readers import Keep, ReadAttention, Site
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.model.weights.copies import layout_in
from manyheads.progress import Bar
from manyheads.version import __version__

TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
COARSE = 0.1  # of half precision, whose errors grow with depth, and of quantised activations
ALL = slice(None)
SITES = ("logits", "projection", "writes", "resid", "patterns", "row sums")


@dataclass(frozen=True)
class Condition:
    """One way to run the model, and the largest error of each site in any layer; None where a site does not exist there.

    `tolerance` is what rounding may do: by number format. Where weights or activations are quantised, at least ten times what
    the plain model's own logits differ by between this run and a plain one, or one by eager attention. `own` is that
    difference. Where it is larger than rounding, the model itself (not our reading) answers otherwise in this run, and its sites
    are compared with the plain model in the same run alone.
    """

    dtype: str
    kernel: str
    run: str
    errors: dict[str, float | None]
    tolerance: float
    own: float

    @property
    def differs(self) -> bool:
        """Whether the plain model answers otherwise in this run than in a plain one."""
        return self.own > self.tolerance

    @property
    def wrong(self) -> list[str]:
        """The sites whose error is larger."""
        return [site for site, error in self.errors.items() if error is not None and not error <= self.tolerance]


@dataclass(frozen=True)
class Certificate:
    """What was measured of one model, and what it was. `refused[site]` says why a site is not read at all."""

    model: str
    fingerprint: str
    version: str
    n_tokens: int
    seed: int
    refused: dict[str, str]
    conditions: tuple[Condition, ...]

    @property
    def ok(self) -> bool:
        """Whether every site that is read is right under every condition."""
        return not any(condition.wrong for condition in self.conditions)

    def to_frame(self) -> pd.DataFrame:
        """One row for each condition, one column for each site."""
        rows = [{"dtype": c.dtype, "kernel": c.kernel, "run": c.run, **c.errors} for c in self.conditions]
        return pd.DataFrame(rows)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write it as JSON."""
        text = json.dumps({**asdict(self), "ok": self.ok}, indent=1) + "\n"
        return write_atomically(path, lambda into: into.write_text(text, "utf-8"), force=force)


def certify(
    model: HeadModel, *, n_tokens: int = 24, every_dtype: bool = True, seed: int = 0, bar: Bar = Bar()
) -> Certificate:
    """Measure `model` under every condition (above), on two rows of random tokens, or two pictures of noise.

    With `every_dtype` it is also converted: from half precision to float32, from float32 to bfloat16. That takes a second copy
    of its weights. Quantised weights are measured as they are.
    """
    dtype = str(next(p.dtype for p in model.plain.parameters() if p.is_floating_point())).removeprefix("torch.")
    others = ["bfloat16"] if dtype in ("float32", "float64") else ["float32"]
    odd = next((p for p in _projections(model) if not is_plain(p)), None)
    dtypes = [dtype, *(others if odd is None and every_dtype else [])]
    kernels = ["eager", "sdpa"] if _has_kernels(model) else ["as it is"]
    conditions: list[Condition] = []
    for one in dtypes:
        opened = model if one == dtype else _converted(model, getattr(torch, one))
        for kernel in kernels:
            with _kernel(opened.plain, kernel) as possible:
                if possible:
                    name = one if odd is None else f"{one}, {number_format(odd)}"
                    tolerance = TOLERANCE.get(one, COARSE) if odd is None else COARSE
                    batch = probe_inputs(opened.plain, n_tokens, seed)
                    conditions += _Measuring(opened, batch, tolerance, odd is not None).conditions(name, kernel, bar)
    return Certificate(
        type(model.plain).__name__,
        model.fingerprint,
        __version__,
        n_tokens,
        seed,
        dict(model.proof.failed),
        tuple(conditions),
    )


def _projections(model: HeadModel) -> list[nn.Module]:
    return [model.layout.blocks[layer].projection for layer in model.layout.attention_layers]


def _converted(model: HeadModel, dtype: torch.dtype) -> HeadModel:
    """A copy with parameters of another format. Buffers stay: rotary frequencies in half precision move far positions."""
    module = own_copy(model.plain)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    module.config.dtype = dtype
    return HeadModel(module, model.tokenizer, layout_in(module, model))


@contextlib.contextmanager
def _kernel(module: Any, kernel: str) -> Iterator[bool]:
    """Run the model with this attention kernel, if it has it."""
    if kernel == "as it is":
        yield True
        return
    before = module.config._attn_implementation
    try:
        module.set_attn_implementation(kernel)
    except (ValueError, ImportError):
        yield False
        return
    try:
        yield True
    finally:
        module.set_attn_implementation(before)


@dataclass(frozen=True)
class _Run:
    """A pass over `batch` after `before` is in the cache; its positions `here` hold the tokens `there` of the plain run.

    `answers` are the positions of its logits that belong to those of the plain run.
    """

    name: str
    batch: dict[str, Tensor]
    before: dict[str, Tensor] | None = None
    here: slice = field(default_factory=lambda: ALL)
    there: slice = field(default_factory=lambda: ALL)
    answers: slice = field(default_factory=lambda: ALL)


def _has_kernels(model: HeadModel) -> bool:
    return model.layout.has_interface and hasattr(model.plain, "set_attn_implementation")


class _Measuring:
    """One model under one kernel."""

    def __init__(self, model: HeadModel, batch: dict[str, Tensor], tolerance: float, quantised: bool) -> None:
        if "input_ids" in batch:  # the decoder of two reads as many tokens as the encoder
            batch = decoded(model.plain, {name: v for name, v in batch.items() if name != "decoder_input_ids"})
        self.model, self.batch, self.tolerance, self.quantised = model, batch, tolerance, quantised
        self.part = _part(model, self.batch)
        self.failed, self.layers = model.proof.failed, model.layout.attention_layers
        self.sinks = any(hasattr(block.core, "sinks") for block in model.layout.blocks)

    def conditions(self, dtype: str, kernel: str, bar: Bar) -> Iterator[Condition]:
        plain = _Run("plain", self.batch)
        whole, whole_logits = self._sites(plain), first_logits(self._plain(plain))
        with _kernel(self.model.plain, "eager" if _has_kernels(self.model) else "as it is") as possible:
            eager_logits = first_logits(self._plain(plain)) if possible else whole_logits
        for run in (plain, *self._other_runs()):
            sites = whole if run is plain else self._sites(run)
            output = self._plain(run, output_hidden_states=True)
            errors = self._against_plain(run, sites, output)
            logits = first_logits(output)[:, run.answers]
            own = relative_error(logits, whole_logits[:, run.there])
            tolerance = self.tolerance
            if self.quantised:
                tolerance = max(tolerance, 10 * max(own, relative_error(logits, eager_logits[:, run.there])))
            if run is not plain and own <= tolerance:
                self._against_whole(run, sites, whole, errors)
            yield Condition(dtype, kernel, run.name, errors, tolerance, own)
            bar(1)

    def _other_runs(self) -> Iterator[_Run]:
        ids = self.batch.get("input_ids")
        if ids is None:
            return
        pads, length, half = 3, ids.shape[1], ids.shape[1] // 2
        filling, none = ids[:, :1].expand(-1, pads), torch.zeros(len(ids), pads, dtype=torch.long, device=ids.device)
        for side, here in (("left", slice(pads, None)), ("right", slice(0, length))):
            if f"padding on the {side}" not in self.failed:
                parts = [[filling, ids], [none, torch.ones_like(ids)]]
                tokens, mask = (torch.cat(part if side == "left" else part[::-1], 1) for part in parts)
                batch = {**self.batch, "input_ids": tokens, "attention_mask": mask}
                mine = self.part in (None, "encoder")
                yield _Run(
                    f"padded {side}", batch, here=here if mine else ALL, answers=here if self.part is None else ALL
                )
        if not no_cache(self.model.plain) or "attention" in self.failed or self.part == "encoder":
            return
        if self.part is not None:
            first_half, rest_half = (
                {**self.batch, "decoder_input_ids": self.batch["decoder_input_ids"][:, some]}
                for some in (slice(0, half), slice(half, None))
            )
            yield _Run("cached", rest_half, before=first_half, there=slice(half, None))
        elif self.model.is_causal:
            rest = {"input_ids": ids[:, half:]}
            if takes(self.model.plain, "position_ids"):
                first = self.model.proof.first_position or 0
                rest["position_ids"] = positions_of(torch.ones_like(ids), first)[:, half:]
            yield _Run("cached", rest, before={"input_ids": ids[:, :half]}, there=slice(half, None))

    def _named(self, what: str) -> str:
        """Under which name Transformers returns hidden states or attentions of this part."""
        if self.part is None:
            return what
        return f"{'decoder' if self.part == 'cross' and what == 'hidden_states' else self.part}_{what}"

    @torch.no_grad()
    def _plain(self, run: _Run, **kwargs: Any) -> Any:
        """What the module returns by itself, with nothing of ours active."""
        return self.model.plain(**self.model.inputs(run.batch), **self._cache(run), **kwargs)

    def _cache(self, run: _Run) -> dict[str, Any]:
        if run.before is None:
            return dict(no_cache(self.model.plain))
        first = self.model.plain(**self.model.inputs(run.before), use_cache=True)
        return {"use_cache": True, "past_key_values": first.past_key_values}

    @torch.no_grad()
    def _sites(self, run: _Run) -> dict[str, Any]:
        """Each site by layer, of one pass with every reader active; and what the projections put out, by a hook of their own."""
        model = self.model
        names: tuple[Site, ...] = ("z", "resid", "attention_write", "mlp_write")
        keeps = {site: Keep(site) for site in names if site not in self.failed}
        patterns: dict[int, Tensor] = {}
        see = ReadAttention(lambda call: patterns.update({call.layer: call.pattern}))
        readers = [*keeps.values(), *([] if "attention" in self.failed else [see])]
        kwargs = self._cache(run)
        projections = [model.layout.blocks[layer].projection for layer in self.layers]
        with caught(*projections) as calls, model.reading(*readers):
            logits = first_logits(model(run.batch, **kwargs))
        projected = dict(zip(self.layers, calls, strict=True))
        values: dict[str, Any] = {site: keep.values for site, keep in keeps.items()}
        return {**values, "patterns": patterns, "projected": projected, "logits": logits}

    def _against_plain(self, run: _Run, sites: dict[str, Any], plain: Any) -> dict[str, float | None]:
        """The errors at the run's own tokens: what padding attends to is nobody's business, and kernels differ there."""
        here, resid, patterns = run.here, sites["resid"], sites["patterns"]
        errors: dict[str, float | None] = dict.fromkeys(SITES)
        pair = sites["logits"], first_logits(plain)
        errors["logits"] = relative_error(*(x[:, run.answers] if x.ndim == 3 else x for x in pair))
        errors["projection"] = max(self._projection(layer, sites) for layer in self.layers)
        writes = [self.model.layout.blocks[layer] for layer in self.layers]
        if "attention_write" in sites and all(len(b.additions) == 2 and b.post_norms is None for b in writes):
            after = {i: resid[i] + sites["attention_write"][i] + sites["mlp_write"][i] for i in self.layers}
            errors["writes"] = max(relative_error(after[i], resid[i + 1]) for i in self.layers)
        hidden = getattr(plain, self._named("hidden_states"), None) or ()
        if len(hidden) == len(resid) and all(h.shape == resid[0].shape for h in hidden):
            errors["resid"] = max(relative_error(resid[i][:, here], hidden[i][:, here]) for i in self.layers)
        if patterns:
            errors["row sums"] = max(_off_one(pattern, self.sinks) for pattern in patterns.values())
            attentions = self._attentions(run)
            pairs = [(patterns[i][:, :, here], attentions[i][:, :, here]) for i in self.layers] if attentions else []
            errors["patterns"] = max((_apart(a, b) for a, b in pairs), default=None)
        return errors

    def _against_whole(self, run: _Run, sites: Any, whole: Any, errors: dict[str, float | None]) -> None:
        """Raise `errors` to what differs from the plain run at the same tokens."""
        pairs = [("logits", sites["logits"], whole["logits"])]
        for site, name in (("z", "projection"), ("resid", "resid")):
            pairs += [(name, value, whole[site][layer]) for layer, value in sites[site].items()]
        for name, here, there in pairs:
            gap = relative_error(here[:, run.answers if name == "logits" else run.here], there[:, run.there])
            errors[name] = max(gap, errors[name] or 0.0)
        if run.before is not None:
            cut = [(p, whole["patterns"][i][:, :, run.there, -p.shape[-1] :]) for i, p in sites["patterns"].items()]
            errors["patterns"] = max(_apart(a, b) for a, b in cut)

    def _projection(self, layer: int, sites: dict[str, Any]) -> float:
        projection = self.model.layout.blocks[layer].projection
        with torch.no_grad():
            z = sites["z"][layer].flatten(-2)
            expected, bias = z @ projection_matrix(projection).to(z), bias_of(projection)
        return relative_error(expected if bias is None else expected + bias.to(expected), sites["projected"][layer])

    def _attentions(self, run: _Run) -> Any:
        """Patterns as Transformers returns them, by its eager attention; None where it returns none of this shape."""
        model = self.model
        with _kernel(model.plain, "eager" if _has_kernels(model) else "as it is") as possible:
            if not possible:
                return None
            output = self._plain(run, output_attentions=True)
        found = getattr(output, self._named("attentions"), None)
        if not isinstance(found, tuple):
            return None
        found = [pattern for pattern in found if isinstance(pattern, Tensor)]  # a hybrid's other layers give None
        if len(found) != len(self.layers):
            return None
        fits = all(isinstance(a, Tensor) and a.ndim == 4 and a.shape[1] == model.n_heads for a in found)
        # Falcon returns scores before the softmax, or computes something else once it is asked for patterns.
        sums = max(_off_one(a[:, :, run.here], self.sinks) for a in found) if fits else 1.0
        same = relative_error(*(first_logits(x)[:, run.answers] for x in (output, self._plain(run))))
        return (
            dict(zip(self.layers, found, strict=True)) if sums < COARSE and same < min(self.tolerance, 0.03) else None
        )


def _part(model: HeadModel, batch: dict[str, Tensor]) -> str | None:
    """Which heads of an encoder-decoder these are; None for any other model."""
    if "decoder_input_ids" not in batch:
        return None
    if model.layout.crosses:
        return "cross"
    return "encoder" if model.layout.blocks[0].module in set(model.plain.get_encoder().modules()) else "decoder"


def _off_one(pattern: Tensor, sinks: bool) -> float:
    """How far a row's sum is from one; with sinks, how far above."""
    over = pattern.float().sum(-1) - 1
    return float((over if sinks else over.abs()).max())


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two patterns, whose numbers are shares."""
    return relative_error(a, b, torch.ones((), device=a.device))
