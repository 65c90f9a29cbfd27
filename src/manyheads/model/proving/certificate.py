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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from manyheads.files import write_atomically
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.inputs import positions_of, takes
from manyheads.model.layout import find_layout
from manyheads.model.linear import base_of, is_plain, projection_matrix
from manyheads.model.offloading import own_copy, present
from manyheads.model.proving.door import probe_inputs, relative_error
from manyheads.model.reading.readers import Keep, ReadAttention
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.progress import Bar
from manyheads.version import __version__

TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
HALF = 0.1  # errors of half precision grow with depth
SITES = ("logits", "projection", "writes", "resid", "patterns", "row sums")


@dataclass(frozen=True)
class Condition:
    """One way to run the model, and the largest error of each site in any layer; None where a site does not exist there."""

    dtype: str
    kernel: str
    run: str
    errors: dict[str, float | None]

    @property
    def tolerance(self) -> float:
        """What rounding may do in this number format."""
        return TOLERANCE.get(self.dtype, HALF)

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
    plain = all(is_plain(base_of(block.projection)) for block in model.layout.blocks)
    dtypes = [dtype, *(others if plain and every_dtype else [])]
    kernels = ["eager", "sdpa"] if hasattr(model.plain, "set_attn_implementation") else ["as it is"]
    conditions = []
    for one in dtypes:
        opened = model if one == dtype else _converted(model, getattr(torch, one))
        for kernel in kernels:
            with _kernel(opened.plain, kernel) as possible:
                if possible:
                    conditions += _Measuring(opened, n_tokens, seed).conditions(one, kernel, bar)
    return Certificate(
        type(model.plain).__name__,
        model.fingerprint,
        __version__,
        n_tokens,
        seed,
        dict(model.proof.failed),
        tuple(conditions),
    )


def _converted(model: HeadModel, dtype: torch.dtype) -> HeadModel:
    """A copy with parameters of another format. Buffers stay: rotary frequencies in half precision move far positions."""
    module = own_copy(model.plain)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    module.config.dtype = dtype
    return HeadModel(module, model.tokenizer, find_layout(module))


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


class _Measuring:
    """One model under one kernel."""

    def __init__(self, model: HeadModel, n_tokens: int, seed: int) -> None:
        self.model = model
        self.batch = probe_inputs(model.plain, n_tokens, seed)
        self.failed = model.proof.failed

    def conditions(self, dtype: str, kernel: str, bar: Bar) -> list[Condition]:
        whole = self._sites(self.batch)
        errors = self._against_plain(self.batch, whole)
        found = [Condition(dtype, kernel, "plain", errors)]
        bar(1)
        if "input_ids" not in self.batch:
            return found
        for side in ("left", "right"):
            if f"padding on the {side}" not in self.failed:
                found.append(Condition(dtype, kernel, f"padded {side}", self._padded(side, whole)))
                bar(1)
        if self.model.is_causal and no_cache(self.model.plain):
            found.append(Condition(dtype, kernel, "cached", self._cached(whole)))
            bar(1)
        return found

    def _sites(self, batch: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        """Each site by layer, of one pass with every reader active; and what the projections put out, by a hook of their own."""
        model = self.model
        keeps = {site: Keep(site) for site in ("z", "resid", "attention_write", "mlp_write") if site not in self.failed}  # type: ignore[arg-type]
        patterns: dict[int, Tensor] = {}
        see = ReadAttention(lambda call: patterns.update({call.layer: call.pattern.detach()}))
        readers = [*keeps.values(), *([] if "attention" in self.failed else [see])]
        projections = [block.projection for block in model.layout.blocks]
        with caught(*projections) as projected, model.reading(*readers), torch.no_grad():
            output = model(batch, **{**no_cache(model.plain), **kwargs})
        values: dict[str, Any] = {site: keep.values for site, keep in keeps.items()}
        return {
            **values,
            "patterns": patterns,
            "projected": projected,
            "logits": first_logits(output),
            "output": output,
        }

    def _against_plain(
        self, batch: dict[str, Tensor], sites: dict[str, Any], where: slice = slice(None)
    ) -> dict[str, float | None]:
        """The errors at the positions `where`: what padding itself attends to is nobody's business, and kernels differ there."""
        model, layers = self.model, range(self.model.n_layers)
        with torch.no_grad():
            plain = model.plain(**model.inputs(batch), **no_cache(model.plain), output_hidden_states=True)
        errors: dict[str, float | None] = dict.fromkeys(SITES)
        logits, resid, patterns = first_logits(plain), sites["resid"], sites["patterns"]
        errors["logits"] = relative_error(*(x[:, where] if x.ndim == 3 else x for x in (sites["logits"], logits)))
        errors["projection"] = max(self._projection(layer, sites) for layer in layers)
        if "attention_write" in sites and model.layout.blocks[0].post_norms is None:
            attention, mlp = sites["attention_write"], sites["mlp_write"]
            errors["writes"] = max(relative_error(resid[i] + attention[i] + mlp[i], resid[i + 1]) for i in layers)
        hidden = getattr(plain, "hidden_states", None) or ()
        if len(hidden) == len(resid) and all(h.shape == resid[0].shape for h in hidden):
            errors["resid"] = max(relative_error(resid[i][:, where], hidden[i][:, where]) for i in layers)
        if patterns:
            sums = torch.stack([(p.float().sum(-1) - 1).cpu() for p in patterns.values()])
            errors["row sums"] = float((sums if hasattr(model.layout.blocks[0].core, "sinks") else sums.abs()).max())
            attentions = self._attentions(batch)
            if attentions is not None:
                one = torch.ones(())
                pairs = [(patterns[layer][:, :, where], attentions[layer][:, :, where]) for layer in layers]
                errors["patterns"] = max(relative_error(a, b, one.to(a.device)) for a, b in pairs)
        return errors

    def _projection(self, layer: int, sites: dict[str, Any]) -> float:
        projection = self.model.layout.blocks[layer].projection
        z, put_out = sites["z"][layer].flatten(-2), sites["projected"][layer]
        with torch.no_grad(), present(projection):
            expected = z @ projection_matrix(projection).to(z)
            bias = getattr(base_of(projection), "bias", None)
            return relative_error(expected if bias is None else expected + bias.to(expected), put_out)

    def _attentions(self, batch: dict[str, Tensor]) -> Any:
        """Patterns as Transformers returns them, by its eager attention; None where it returns none of this shape."""
        model = self.model
        kernel = "eager" if hasattr(model.plain, "set_attn_implementation") else "as it is"
        with _kernel(model.plain, kernel) as possible, torch.no_grad():
            if not possible:
                return None
            output = model.plain(**model.inputs(batch), **no_cache(model.plain), output_attentions=True)
        found = getattr(output, "attentions", None)
        if not isinstance(found, tuple) or len(found) != model.n_layers:
            return None
        fits = all(isinstance(a, Tensor) and a.ndim == 4 and a.shape[1] == model.n_heads for a in found)
        return found if fits else None

    def _padded(self, side: str, whole: dict[str, Any]) -> dict[str, float | None]:
        ids, pads = self.batch["input_ids"], 3
        filling, none = ids[:, :1].expand(-1, pads), torch.zeros(len(ids), pads, dtype=torch.long, device=ids.device)
        one = torch.ones_like(ids)
        parts = ([filling, ids], [none, one]) if side == "left" else ([ids, filling], [one, none])
        tokens, mask = (torch.cat(part, 1) for part in parts)
        where = slice(pads, None) if side == "left" else slice(0, ids.shape[1])
        batch = {"input_ids": tokens, "attention_mask": mask}
        sites = self._sites(batch)
        errors = self._against_plain(batch, sites, where)
        return self._beside(errors, sites, whole, lambda value: value[:, where])

    def _cached(self, whole: dict[str, Any]) -> dict[str, float | None]:
        model, ids = self.model, self.batch["input_ids"]
        half = ids.shape[1] // 2
        with torch.no_grad():
            first = model({"input_ids": ids[:, :half]}, use_cache=True)
        rest: dict[str, Tensor] = {"input_ids": ids[:, half:]}
        if takes(model.plain, "position_ids"):
            rest["position_ids"] = positions_of(torch.ones_like(ids), model.proof.first_position or 0)[:, half:]
        sites = self._sites(rest, past_key_values=first.past_key_values, use_cache=True)
        errors: dict[str, float | None] = dict.fromkeys(SITES)
        errors["projection"] = max(self._projection(layer, sites) for layer in range(model.n_layers))
        errors = self._beside(errors, sites, whole, lambda value: value, lambda value: value[:, half:])
        if sites["patterns"]:
            gaps = []
            for layer, pattern in sites["patterns"].items():
                width = pattern.shape[-1]
                gaps.append(relative_error(pattern, whole["patterns"][layer][:, :, half:, -width:], torch.ones(())))
            errors["patterns"] = max(gaps)
        return errors

    def _beside(
        self, errors: Any, sites: Any, whole: Any, here: Any, there: Any = lambda value: value
    ) -> dict[str, float | None]:
        """`errors`, with what differs from the whole pass at the same tokens."""
        for site, name in (("logits", "logits"), ("z", "projection"), ("resid", "resid")):
            if isinstance(sites[site], Tensor):
                pairs = [(sites[site], whole[site])]
            else:
                pairs = [(sites[site][layer], whole[site][layer]) for layer in sites[site]]
            gap = max(relative_error(here(a), there(b)) for a, b in pairs)
            errors[name] = max(gap, errors[name] or 0.0)
        return errors
