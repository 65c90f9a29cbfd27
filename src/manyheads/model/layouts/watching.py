"""One pass, watched: which module computes attention in each layer, which projects its output, and what is added to what.

Names differ from one architecture to the next; what happens does not. Inside each layer of a stack

    core         the innermost module in which a softmax over keys (or PyTorch's fused attention) is computed
    projection   the linear map that is called next and reads what came out of it, `H x Dh` features
    writes       modules whose outputs are added to the stream: `y = x + s (a + ... + m)`, or, with a norm after each addition,
                 `y = n2(n1(x + a) + m)`; x is what the layer was given, y what it returned

Only a sample of each tensor's numbers is kept, so that a pass of a large model can be watched.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manyheads.model.hooks import hooked, uncompiled
from manyheads.model.layouts.inputs import plain_pass
from manyheads.model.linear import features_of

_SAMPLE = 2048
_PRODUCTS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm, torch.einsum)
_SOFTMAXES = (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)
_FUSED = torch.nn.functional.scaled_dot_product_attention
# Where several modules return what is added (a block, and the last map in it), the one of these names is meant.
_MLPS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "fc2", "output.dense", "feedforward")


def has_interface(core: nn.Module) -> bool:
    """Whether attention of this class goes through Transformers' `AttentionInterface`."""
    forward = type(core).forward
    codes = [getattr(f, "__code__", None) for f in (forward, getattr(forward, "__wrapped__", None))]
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes if code is not None)


@dataclass
class Call:
    """One module's call inside a layer: samples of what it was given and what it returned, and when."""

    path: str
    module: nn.Module
    given: Tensor | None
    shape: tuple[int, ...]
    begun: int
    made: Tensor | None = None
    ended: int = 0


@dataclass
class Product:
    """One attention: in which module, when, and of what shape."""

    path: str
    module: nn.Module
    time: int
    heads: int
    queries: int
    keys: int
    width: int
    made: Tensor | None


@dataclass
class SeenAttention:
    """One attention of a layer, found: `write` is the module whose output is added to the stream."""

    module: nn.Module
    core: nn.Module
    projection: nn.Module
    heads: int
    head_dim: int
    crosses: bool
    direct: bool
    positions_first: bool
    write: nn.Module
    core_path: str = ""
    projection_path: str = ""


@dataclass
class SeenLayer:
    """What was seen of one layer: no `attentions` where it has none, no `mlp_write` where it has no MLP or no sum was found."""

    module: nn.Module
    attentions: list[SeenAttention] = field(default_factory=list)
    mlp_write: nn.Module | None = None
    post_norms: tuple[nn.Module, ...] | None = None
    scale: float = 1.0
    explained: bool = False  # what it returned is what it was given plus what was written
    calls: int = 1
    frame: _Frame | None = field(default=None, repr=False)
    made: Tensor | None = field(default=None, repr=False)


@dataclass
class _Frame:
    """A layer while it runs."""

    stack: str
    index: int
    module: nn.Module
    given: Tensor | None
    calls: list[Call] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)


@dataclass
class Stack:
    """A list of layers in which attention was computed: its layers in order, and the norm that reads what the last returned."""

    path: str
    layers: list[SeenLayer]
    final_norm: nn.Module | None = None


def watched(module: nn.Module, inputs: Mapping[str, Any]) -> list[Stack]:
    """Every list of layers in which attention was computed."""
    watch = _Watch(module)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for path, part in module.named_modules():
            stack.enter_context(hooked(part, before=watch.before(path), after=watch.after))
        stack.enter_context(_plain_kernels(module))
        stack.enter_context(uncompiled(module))
        stack.enter_context(watch)
        stack.enter_context(plain_pass(module, inputs))
        module(**inputs)
    for layers in watch.found.values():
        _complete(layers)
    return [
        Stack(path, [layers[i] for i in sorted(layers)], watch.final.get(path))
        for path, layers in watch.found.items()
        if _has_attention(layers)
    ]


@contextlib.contextmanager
def _plain_kernels(module: nn.Module) -> Iterator[None]:
    """Attention by PyTorch's own functions, which can be watched, in place of other kernels."""
    configs = {id(c): c for part in module.modules() if (c := getattr(part, "config", None)) is not None}
    with contextlib.ExitStack() as stack:
        for config in configs.values():
            before = getattr(config, "_attn_implementation", None)
            if isinstance(before, str) and before not in ("sdpa", "eager"):
                stack.callback(setattr, config, "_attn_implementation_internal", before)
                config._attn_implementation_internal = "eager"
        yield


class _Watch(TorchFunctionMode):
    """Sees every module called and every attention computed, and makes a `SeenLayer` of each layer when it returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.lists = {path for path, part in module.named_modules() if isinstance(part, nn.ModuleList)}
        self.found: dict[str, dict[int, SeenLayer]] = {}
        self.time = 0
        self.last: dict[str, Tensor | None] = {}
        self.final: dict[str, nn.Module] = {}
        self.open: list[tuple[str, nn.Module, list[Call], _Frame | None]] = []
        self.frames: list[_Frame] = []
        self.scores: tuple[str, nn.Module, torch.Size, int, int, int] | None = None

    # Modules

    def before(self, path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.time += 1
            given = next(
                (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()), None
            )
            if "norm" in type(module).__name__.lower():
                self._note_final(module, given)
            frame = None
            stack, _, index = path.rpartition(".")
            if stack in self.lists:
                frame = _Frame(stack, int(index), module, _sample(given))
            calls = []
            for outer in self.frames:
                call = Call(
                    _below(path, f"{outer.stack}.{outer.index}"), module, _sample(given), _shape(given), self.time
                )
                outer.calls.append(call)
                calls.append(call)
            if frame is not None:
                self.frames.append(frame)
            self.open.append((path, module, calls, frame))

        return note

    def after(self, module: nn.Module, _: Any, output: Any) -> None:
        self.time += 1
        _, _, calls, frame = self.open.pop()
        made = output if isinstance(output, Tensor) else _first(output)
        for call in calls:
            call.made, call.ended = _sample(made), self.time
        if frame is not None:
            self.frames.pop()
            layers = self.found.setdefault(frame.stack, {})
            self.last[frame.stack] = _sample(made)
            inner = [path for path in self.found if path.startswith(f"{frame.stack}.{frame.index}.")]
            if frame.index in layers:
                layers[frame.index].calls += 1
            else:
                kinds = {(p.path, _crosses(p)) for p in frame.products}
                several = len(kinds) > len({crosses for _, crosses in kinds})
                if several and any(_are_layers(self.found[path]) for path in inner):
                    layers[frame.index] = SeenLayer(frame.module)  # a list of lists of layers
                else:
                    layers[frame.index] = _layer(frame, _sample(made))
            if layers[frame.index].attentions:
                for path in inner:
                    del self.found[path]  # a layer that keeps its parts in a list (T5)

    def _note_final(self, module: nn.Module, given: Tensor | None) -> None:
        running = {frame.stack for frame in self.frames}
        for stack, made in self.last.items():
            if stack not in running and stack not in self.final and _same(_sample(given), made):
                self.final[stack] = module

    # Attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is _FUSED:
            query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
            heads = query.shape[-3]
            self._attention(heads, query.shape[-2], key.shape[-2], heads * value.shape[-1], output)
        elif func in _SOFTMAXES and isinstance(output, Tensor) and output.ndim in (3, 4) and self.open:
            path, module = self.open[-1][:2]
            self.scores = path, module, output.shape, output.shape[-3], output.shape[-2], output.shape[-1]
        elif func in _PRODUCTS and self.scores is not None and isinstance(output, Tensor):
            operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            operands = operands or [a for group in args if isinstance(group, (tuple, list)) for a in group]
            if operands and _is_pattern(operands[0], self.scores[2]):
                heads, queries, _ = self.scores[3:]
                self._attention(heads, queries, operands[0].shape[-1], heads * output.shape[-1], output)
                self.scores = None
        return output

    def _attention(self, heads: int, queries: int, keys: int, width: int, made: Tensor) -> None:
        if not self.frames or not self.open:
            return
        path, module = next(
            ((p, m) for p, m, *_ in reversed(self.open) if not isinstance(m, nn.Softmax)), self.open[-1][:2]
        )
        frame = self.frames[-1]
        inner = _below(path, f"{frame.stack}.{frame.index}")
        by_position = _sample(made.transpose(-3, -2)) if made.ndim > 2 else None
        frame.products.append(Product(inner, module, self.time, heads, queries, keys, width, by_position))
        for outer in self.frames[:-1]:
            below = _below(path, f"{outer.stack}.{outer.index}")
            outer.products.append(Product(below, module, self.time, heads, queries, keys, width, by_position))


def _is_pattern(operand: Tensor, scores: torch.Size) -> bool:
    """Whether this is the softmax's output, also where batch and heads were made one dimension, or an attention sink left out."""
    rows = operand.numel() // max(1, operand.shape[-1]) == scores.numel() // max(1, scores[-1])
    return rows and operand.shape[-2] == scores[-2] and operand.shape[-1] in (scores[-1], scores[-1] - 1)


def _first(output: Any) -> Tensor | None:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _sample(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point() or tensor.is_meta:
        return None
    flat = tensor.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // _SAMPLE)]
    return torch.cat([picked.double().cpu(), torch.tensor([float(flat.numel())], dtype=torch.float64)])


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.shape)


def _below(path: str, top: str) -> str:
    return path[len(top) + 1 :] if path != top else ""


# What a layer did


def _layer(frame: _Frame, made: Tensor | None) -> SeenLayer:
    layer = SeenLayer(frame.module, frame=frame, made=made)
    if not frame.products:
        return layer
    by_core: dict[str, Product] = {}
    for product in frame.products:
        by_core[product.path] = product
    projected = []
    for product in by_core.values():
        projection = _projection(frame, product, {p.path for p in frame.products})
        if projection is None:
            continue
        features = features_of(projection.module)
        assert features is not None
        at = _common(product.path, projection.path)
        attention = frame.module.get_submodule(at) if at else frame.module
        found = SeenAttention(
            attention,
            product.module,
            projection.module,
            product.heads,
            features[0] // product.heads,
            _crosses(product),
            _same(projection.given, product.made),
            len(projection.shape) == 3 and projection.shape[1] == 1 < projection.shape[0],
            projection.module,
        )
        found.core_path, found.projection_path = product.path, projection.path
        projected.append((found, projection))
    layer.attentions = [found for found, _ in projected]
    if projected:
        _writes(layer, frame, made, projected)
    return layer


def _crosses(product: Product) -> bool:
    """Whether its keys are another sequence's: by name, or by their number where no name says that they are its own."""
    path = product.path.lower()
    named = any(word in path for word in ("cross", "encoder_attn", "encdec"))
    return named or (product.keys != product.queries and "self" not in path)


def _has_attention(layers: Mapping[int, SeenLayer]) -> bool:
    return any(layer.attentions for layer in layers.values())


def _complete(layers: Mapping[int, SeenLayer]) -> None:
    """Attention that cannot be watched in a layer is where it is in the others, if it is of their class and made from it."""
    like = next((found for layer in layers.values() if len(layer.attentions) == 1 for found in layer.attentions), None)
    if like is None:
        return
    for layer in layers.values():
        if layer.attentions or layer.frame is None:
            continue
        calls = {call.path: call for call in layer.frame.calls}
        core, projection = calls.get(like.core_path), calls.get(like.projection_path)
        features = None if projection is None else features_of(projection.module)
        if core is None or projection is None or features is None or not isinstance(core.module, type(like.core)):
            continue
        at = _common(like.core_path, like.projection_path)
        module = layer.module.get_submodule(at) if at else layer.module
        dim = features[0] // like.heads
        found = SeenAttention(
            module, core.module, projection.module, like.heads, dim, like.crosses, False, False, projection.module
        )
        layer.attentions = [found]
        _writes(layer, layer.frame, layer.made, [(found, projection)])


def _are_layers(layers: Mapping[int, SeenLayer]) -> bool:
    """Whether attention is a part of these, and not all they are."""
    return any(found.core is not layer.module for layer in layers.values() for found in layer.attentions)


def _projection(frame: _Frame, product: Product, cores: set[str]) -> Call | None:
    """The linear map that reads what this attention made."""
    linear = [
        call
        for call in frame.calls
        if call.begun > product.time and call.shape[-1:] == (product.width,) and features_of(call.module) is not None
    ]
    linear = [call for call in linear if not any(_inside(call, outer) for outer in linear)]  # an adapter's own parts
    inside = [call for call in linear if call.path.startswith(f"{product.path}." if product.path else "")]
    # The last inside: a gate may be made of the layer's input between the two. The first outside: an MLP may be as wide.
    mine = [call for call in inside if not any(c != product.path and call.path.startswith(f"{c}.") for c in cores)]
    if product.path and mine:
        return mine[-1]
    return next((call for call in linear if _same(call.given, product.made)), None)


def _common(first: str, second: str) -> str:
    pairs = zip(first.split("."), second.split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _same(first: Tensor | None, second: Tensor | None, tolerance: float = 2e-4) -> bool:
    if first is None or second is None or first.shape != second.shape or first[-1] != second[-1]:
        return False
    size = max(float(second[:-1].abs().max()), float(first[:-1].abs().max()), 1e-12)
    return bool((first[:-1] - second[:-1]).abs().max() <= tolerance * size)


def _plus(first: Tensor, *others: Tensor) -> Tensor:
    total = sum((other[:-1] for other in others), first[:-1])
    return torch.cat([total, first[-1:]])


def _writes(
    layer: SeenLayer, frame: _Frame, made: Tensor | None, projected: Sequence[tuple[SeenAttention, Call]]
) -> None:
    """Fill in what each attention and the MLP add to the stream, where a sum of module outputs explains it."""
    given, dtype = (
        frame.given,
        next((p.dtype for p in frame.module.parameters() if p.is_floating_point()), torch.float32),
    )
    if given is None or made is None or given.shape != made.shape or given[-1] != made[-1]:
        return
    tolerance, rounding = (2e-4, 5e-7) if dtype in (torch.float32, torch.float64) else (2e-2, 1e-2)
    counts: dict[int, int] = {}
    for call in frame.calls:
        counts[id(call.module)] = counts.get(id(call.module), 0) + 1
    calls = [
        c
        for c in frame.calls
        if c.path
        and counts[id(c.module)] == 1
        and c.made is not None
        and c.made.shape == given.shape
        and c.made[-1] == given[-1]
    ]
    starts = [[p, *(c for c in calls if c is not p and c.ended >= p.ended)][:12] for _, p in projected]
    if any(p not in calls for _, p in projected):
        return
    mlps = sorted((c for c in calls), key=lambda c: (not _hinted(c.path), c.path.count("."), -c.ended))
    if not _sum(layer, projected, starts, mlps, given, made, (tolerance, rounding)):
        _normed_sum(layer, projected, calls, mlps, given, made, tolerance)
    if not layer.explained:  # what stands for an MLP, though it is not what is added
        rest = [c for c in mlps if "." not in c.path and not any(_inside(p, c) or p is c for _, p in projected)]
        layer.mlp_write = next((c.module for c in rest), None)


def _hinted(path: str) -> bool:
    return path in _MLPS


def _sum(
    layer: SeenLayer,
    projected: Any,
    starts: Any,
    mlps: Any,
    given: Tensor,
    made: Tensor,
    tolerance: tuple[float, float],
) -> bool:
    change = _plus(made, torch.cat([-given[:-1], given[-1:]]))

    def fits(scale: float, *calls: Call) -> bool:
        # By the size of the least that is added: beside a large stream anything would do.
        size = min(float(call.made[:-1].abs().max()) for call in calls)  # type: ignore[index]
        bound = tolerance[0] * abs(scale) * size + tolerance[1] * float(made[:-1].abs().max())
        return float((scale * total - change[:-1]).abs().max()) <= bound

    for solved in (False, True):
        for attentions in itertools.product(*(s[: 6 if len(starts) > 1 else 12] for s in starts)):
            for mlp in mlps:
                if any(mlp is a or _inside(a, mlp) or _inside(mlp, a) for a in attentions):
                    continue
                total = _plus(*(a.made for a in attentions), mlp.made)[:-1]
                scale = 1.0
                if solved:
                    scale = float(total @ change[:-1] / (total @ total).clamp(min=1e-12))
                    if scale < 1e-3:
                        continue
                if fits(scale, *attentions, mlp):
                    layer.mlp_write, layer.scale, layer.explained = mlp.module, scale, True
                    for (found, _), call in zip(projected, attentions, strict=True):
                        found.write = call.module
                    return True
        if solved:
            break
        # A layer without an MLP (Nemotron-H): before a scale is solved for, since half of attention and its dropout fits, too.
        alone = [[c for c in s if c is s[0] or _inside(s[0], c)] for s in starts]
        for attentions in itertools.product(*alone):
            total = _plus(attentions[0].made, *(a.made for a in attentions[1:]))[:-1]
            if fits(1.0, *attentions):
                layer.explained = True
                for (found, _), call in zip(projected, attentions, strict=True):
                    found.write = call.module
                return True
    return False


def _inside(inner: Call, outer: Call) -> bool:
    return inner.path.startswith(f"{outer.path}.")


def _normed_sum(
    layer: SeenLayer, projected: Any, calls: list[Call], mlps: list[Call], given: Tensor, made: Tensor, tolerance: float
) -> None:
    """`y = n(h + m)`, backwards from what the layer returned to what it was given."""
    norms: list[nn.Module] = []
    writes: list[Call] = []
    stream = made
    for _ in range(len(projected) + 1):
        step = _step_back(calls, mlps, given, stream, tolerance)
        if step is None:
            return
        norm, write, stream = step
        norms.insert(0, norm.module)
        writes.insert(0, write)
    if not _same(stream, given, tolerance):
        return
    for (found, projection), write in zip(projected, writes[:-1], strict=True):
        if write is not projection and write.ended < projection.ended:
            return
        found.write = projection.module if _same(projection.made, write.made, tolerance) else write.module
    layer.mlp_write, layer.post_norms, layer.explained = writes[-1].module, tuple(norms), True


def _step_back(
    calls: list[Call], mlps: list[Call], given: Tensor, stream: Tensor, tolerance: float
) -> tuple[Call, Call, Tensor] | None:
    """The innermost module that returned `stream`, and the two that its input is the sum of."""
    for norm in sorted((c for c in calls if _same(c.made, stream, tolerance)), key=lambda c: -c.path.count(".")):
        if norm.given is None or norm.given.shape != stream.shape or _same(norm.given, stream, tolerance):
            continue
        for write in mlps:
            if write is norm or write.ended > norm.begun:
                continue
            # What is written is computed from the stream, and so later.
            before = [given, *(c.made for c in reversed(calls) if c.ended <= write.begun and c.made is not None)]
            for earlier in before:
                if _same(_plus(earlier, write.made), norm.given, tolerance):  # type: ignore[arg-type]
                    return norm, write, earlier
    return None
