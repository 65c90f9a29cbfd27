"""Networks as graphs of primitive operations (#104): from any module that `torch.fx` can trace, or built as plain data.

A node is one operation after its weights, bias and statistics are folded into it (Mills et al., arXiv:2211.17226). Of each stands

    ops       which operation it is, a place in `OPS`; 0 is one that is not known
    sizes     height of what comes out, channels in, channels out
    kernels   the width of its window, 0 for none
    edges     (from, to)

`cost` is in GFLOPs for one input: sum over convolutions and matrix products of k^2 C_in C_out H^2 / groups.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import clause

OPS = (
    "unknown", "input", "output", "conv", "depthwise", "batchnorm", "layernorm", "relu", "gelu", "swish", "sigmoid", "tanh",
    "matmul", "softmax", "add", "mul", "concat", "max pool", "average pool", "mean", "reshape", "linear", "dropout",
)  # fmt: skip
_MODULES: dict[type, str] = {
    nn.BatchNorm1d: "batchnorm",
    nn.BatchNorm2d: "batchnorm",
    nn.LayerNorm: "layernorm",
    nn.GroupNorm: "layernorm",
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "swish",
    nn.Hardswish: "swish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softmax: "softmax",
    nn.MaxPool2d: "max pool",
    nn.AvgPool2d: "average pool",
    nn.AdaptiveAvgPool2d: "mean",
    nn.Flatten: "reshape",
    nn.Linear: "linear",
    nn.Dropout: "dropout",
}
_CALLS = {
    "relu": "relu", "gelu": "gelu", "silu": "swish", "sigmoid": "sigmoid", "tanh": "tanh", "softmax": "softmax", "add": "add",
    "iadd": "add", "mul": "mul", "imul": "mul", "cat": "concat", "matmul": "matmul", "bmm": "matmul", "max_pool2d": "max pool",
    "avg_pool2d": "average pool", "adaptive_avg_pool2d": "mean", "mean": "mean", "flatten": "reshape", "reshape": "reshape",
    "view": "reshape", "permute": "reshape", "transpose": "reshape", "scaled_dot_product_attention": "matmul",
}  # fmt: skip


@dataclass(frozen=True)
class NetworkGraph:
    """A network's operations (see above). `InputError` for edges that lead to no node, or a graph without a node."""

    ops: Int[Tensor, "N"]
    sizes: Float[Tensor, "N 3"]
    kernels: Int[Tensor, "N"]
    edges: Int[Tensor, "E 2"]
    cost: float = 0.0
    family: str = ""

    def __post_init__(self) -> None:
        n = len(self.ops)
        if n == 0 or not len(self.sizes) == len(self.kernels) == n:
            raise InputError("a graph has at least one node, and sizes and a kernel for each.")
        if len(self.edges) and not 0 <= int(self.edges.min()) <= int(self.edges.max()) < n:
            raise InputError(f"an edge leads to no node; there are {n}.")

    def __len__(self) -> int:
        return len(self.ops)

    def counts(self) -> Float[Tensor, "O"]:
        """How often each operation stands in it."""
        return torch.bincount(self.ops, minlength=len(OPS)).float()


@dataclass
class GraphMaker:
    """Puts a graph together, a node at a time."""

    family: str = ""
    rows: list[tuple[int, float, float, float, int]] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    cost: float = 0.0

    def add(self, op: str, size: tuple[float, float, float], *before: int, kernel: int = 0, cost: float = 0.0) -> int:
        """A node after others; its place."""
        if op not in OPS:
            raise InputError(f"there is no operation {op!r}; choose from {', '.join(OPS)}.")
        self.rows.append((OPS.index(op), *size, kernel))
        self.edges += [(one, len(self.rows) - 1) for one in before]
        self.cost += cost
        return len(self.rows) - 1

    def made(self) -> NetworkGraph:
        """The graph."""
        table = torch.tensor(self.rows, dtype=torch.float64)
        edges = torch.tensor(self.edges, dtype=torch.long).reshape(-1, 2)
        return NetworkGraph(
            table[:, 0].long(), table[:, 1:4].float(), table[:, 4].long(), edges, float(self.cost), self.family
        )


def graph_of(module: nn.Module, example: Tensor, family: str = "") -> NetworkGraph:
    """The graph of a network on an input such as `example` `[B, ...]`; nothing is trained, and the module stays as it is.

    `UnsupportedError` where `torch.fx` cannot follow the network (its path depends on values), or it does not take the example.
    """
    was = module.training
    try:
        traced = fx.symbolic_trace(module)
        with torch.no_grad():
            ShapeProp(traced.eval()).propagate(example)
    except Exception as error:  # whatever tracing a foreign module raises
        raise UnsupportedError(f"{type(module).__name__} cannot be traced as a graph: {clause(error)}.") from None
    finally:
        module.train(was)
    maker, places = GraphMaker(family), dict[fx.Node, int | None]()
    for node in traced.graph.nodes:
        places[node] = _added(maker, node, traced, places)
    return maker.made()


def _added(maker: GraphMaker, node: fx.Node, traced: fx.GraphModule, places: dict[fx.Node, int | None]) -> int | None:
    before = sorted({place for one in node.all_input_nodes if (place := places.get(one)) is not None})
    if node.op == "get_attr":
        return None  # weights that a call takes are part of it
    shape, given = _shape(node), _shape(node.all_input_nodes[0]) if node.all_input_nodes else ()
    size = (_height(shape), _channels(given), _channels(shape))
    if node.op in ("placeholder", "output"):
        return maker.add("input" if node.op == "placeholder" else "output", size, *before)
    if node.op == "call_module":
        target: Any = traced.get_submodule(str(node.target))
        if isinstance(target, nn.Conv2d | nn.Conv1d):
            depthwise = target.groups > 1 and target.groups == target.in_channels
            k = int(target.kernel_size[0])
            cost = target.weight.numel() * _height(shape) ** 2 / 1e9
            return maker.add("depthwise" if depthwise else "conv", size, *before, kernel=k, cost=cost)
        op = next((name for kind, name in _MODULES.items() if isinstance(target, kind)), "unknown")
        cost = target.weight.numel() / 1e9 if op == "linear" else 0.0
        kernel = getattr(target, "kernel_size", 0)
        return maker.add(op, size, *before, kernel=kernel if isinstance(kernel, int) else int(kernel[0]), cost=cost)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in (operator.getitem, getattr) or name in ("size", "dim", "contiguous", "getattr"):
        return before[0] if before else None  # reads what is there already
    op = _CALLS.get(str(name), "unknown")
    cost = size[0] ** 2 * size[1] * size[2] / 1e9 if op == "matmul" else 0.0
    return maker.add(op, size, *before, cost=cost)


def _shape(node: fx.Node) -> tuple[int, ...]:
    found = node.meta.get("tensor_meta")
    return tuple(getattr(found, "shape", ()))


def _height(shape: Sequence[int]) -> float:
    return float(shape[-1]) if len(shape) == 4 else float(shape[-2]) ** 0.5 if len(shape) == 3 else 1.0


def _channels(shape: Sequence[int]) -> float:
    return float(shape[1] if len(shape) == 4 else shape[-1]) if len(shape) > 1 else 1.0
