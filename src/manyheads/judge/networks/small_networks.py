"""Small convolutional networks that were really trained (#104): 150 of them on handwritten digits, with what each reached.

Three families, each block a convolution and something beside it, on images of 8 x 8:

    plain        conv k, batchnorm, relu, conv 1, and a skip over both or none
    depthwise    conv k and relu beside a depthwise conv 3, concat, conv 1
    branches     convs 1, 3 and 5, those that were drawn, concat, conv 1

`python recipes/network_accuracies.py` drew them, trained each with three seeds (120 updates of 64 images, Adam at 2e-3) and wrote
digits_networks.json: the accuracy on 500 images that it never saw, and what would have cost no training: parameters, the norm of
the gradient at the start, and synflow (Tanaka et al., arXiv:2006.05467): sum |w dR/dw|, R the sum of outputs for an image of ones
with all weights positive.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.inputs import check_choice
from manyheads.judge.networks.graphs import NetworkGraph, graph_of

KINDS = ("plain", "depthwise", "branches")


@dataclass(frozen=True)
class DesignBlock:
    """Width inside, window, whether there is a skip, whether pooling follows, and which branches there are."""

    width: int
    kernel: int
    skip: bool
    pool: bool
    branches: tuple[int, ...]


@dataclass(frozen=True)
class NetworkDesign:
    """A family, the stem's width, and the blocks."""

    family: str
    stem: int
    blocks: tuple[DesignBlock, ...]

    def build(self, seed: int = 0) -> nn.Module:
        """The network, with weights drawn by a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _Network(self)


def drawn_design(family: str, draw: np.random.Generator) -> NetworkDesign:
    """One to three blocks of a family, at most two of them followed by pooling."""
    check_choice(family, "family", KINDS)
    blocks, pools = [], 0
    for _ in range(int(draw.integers(1, 4))):
        pool = bool(pools < 2 and draw.random() < 0.5)
        pools += pool
        chosen = tuple(size for size in (1, 3, 5) if draw.random() < 0.6) or (1,)
        width, kernel = int(draw.choice([4, 8, 16, 24])), int(draw.choice([1, 3, 5]))
        blocks.append(DesignBlock(width, kernel, bool(draw.random() < 0.5), pool, chosen))
    return NetworkDesign(family, int(draw.choice([4, 8, 12, 16])), tuple(blocks))


class _Network(nn.Module):
    def __init__(self, design: NetworkDesign) -> None:
        super().__init__()
        c = design.stem
        self.stem = nn.Sequential(nn.Conv2d(1, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())
        self.blocks = nn.ModuleList(_Block(_path(design.family, c, block), block) for block in design.blocks)
        self.last, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.flat(self.last(x)))


class _Block(nn.Module):
    """What a family does, with a skip over it or none, and pooling after it or none."""

    def __init__(self, path: nn.Module, block: DesignBlock) -> None:
        super().__init__()
        self.path, self.skip = path, block.skip
        self.pool = nn.MaxPool2d(2) if block.pool else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        found = self.path(x)
        return self.pool(x + found if self.skip else found)


class _Joined(nn.Module):
    """Paths side by side, joined by a convolution of one pixel."""

    def __init__(self, paths: list[nn.Module], wide: int, c: int) -> None:
        super().__init__()
        self.paths, self.joined = nn.ModuleList(paths), nn.Conv2d(wide, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(torch.cat([path(x) for path in self.paths], 1))


def _path(family: str, c: int, block: DesignBlock) -> nn.Module:
    k, w = block.kernel, block.width
    if family == "plain":
        return nn.Sequential(nn.Conv2d(c, w, k, padding=k // 2), nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, c, 1))
    if family == "depthwise":
        wide = nn.Sequential(nn.Conv2d(c, w, k, padding=k // 2), nn.ReLU())
        return _Joined([wide, nn.Conv2d(c, c, 3, padding=1, groups=c)], w + c, c)
    paths = [nn.Sequential(nn.Conv2d(c, w, size, padding=size // 2), nn.ReLU()) for size in block.branches]
    return _Joined([*paths], w * len(paths), c)


def proxies(network: nn.Module, x: Float[Tensor, "B 1 H W"], y: Int[Tensor, "B"]) -> dict[str, float]:
    """What tells something of a network before any training (see above)."""
    model = copy.deepcopy(network).eval()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    norm = float(sum(one.square().sum() for one in slopes).sqrt())  # type: ignore[union-attr]
    with torch.no_grad():
        for one in model.parameters():
            one.abs_()
    weights = list(model.parameters())
    flow = torch.autograd.grad(model(torch.ones_like(x[:1])).sum(), weights)
    synflow = float(sum((w * g).abs().sum() for w, g in zip(weights, flow, strict=True)))  # type: ignore[arg-type]
    return {
        "parameters": float(sum(one.numel() for one in weights)),
        "gradient norm": norm,
        "synflow": float(np.log10(synflow + 1)),
    }


@dataclass(frozen=True)
class TrainedNetworks:
    """Graphs of the networks, their family, the accuracy of each (mean over three seeds), and their `proxies` by name."""

    graphs: list[NetworkGraph]
    families: np.ndarray
    accuracy: Float[np.ndarray, "G"]
    proxies: dict[str, Float[np.ndarray, "G"]]


@cache
def digits_networks() -> TrainedNetworks:
    """The 150 that were trained, as they are kept in the package."""
    rows = json.loads(files("manyheads.judge.networks").joinpath("digits_networks.json").read_text("utf-8"))
    found = [design_of(row["design"]) for row in rows]
    graphs = [graph_of(one.build(), torch.zeros(1, 1, 8, 8), one.family) for one in found]
    names = rows[0]["proxies"]
    return TrainedNetworks(
        graphs,
        np.array([one.family for one in found]),
        np.array([float(np.mean(row["accuracy"])) for row in rows]),
        {name: np.array([row["proxies"][name] for row in rows]) for name in names}
        | {"GFLOPs": np.array([one.cost for one in graphs])},
    )


def design_of(row: dict) -> NetworkDesign:  # type: ignore[type-arg]
    """A design from its form in the file (`dataclasses.asdict`)."""
    blocks = tuple(DesignBlock(**block | {"branches": tuple(block["branches"])}) for block in row["blocks"])
    return NetworkDesign(row["family"], row["stem"], blocks)


def row_of(design: NetworkDesign) -> dict:  # type: ignore[type-arg]
    """The form in the file."""
    return asdict(design)
