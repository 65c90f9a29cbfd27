"""What is claimed of seq-JEPA (#103), on dots that turn by the whole circle and real digits that turn by a quarter to each side.

Three encoders of one shape, 64 features, and as many steps: seq-JEPA on three views and the next; the same with all actions
0; and VICReg, a two-view baseline. Read off: the relative angle of two views from [z_1, z_2] by a small network; and the
class, by a linear classifier on one z, and on s of 1 to 5 views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.vision.core.probes import linear_accuracy
from manyheads.vision.core.turned import TurnedThings
from manyheads.vision.views.seq_jepa import TRAINING, NextView, NextViewSettings, fit_next_view
from manyheads.vision.views.sie import SplitSettings, fit_split
from manyheads.vision.views.sie_claims import TurnedData, read_off, turned_data

VIEWS = 3  # M


@torch.no_grad()
def _summed_up(model: NextView, things: TurnedThings, seed: int) -> dict[str, float]:
    """Linear accuracy on s, by the number of views."""
    draw = torch.Generator().manual_seed(seed + 6000)
    seen, actions, y = things.sample(things.train, 4000, 5, draw)
    test, test_actions, test_y = things.sample(things.test, 2000, 5, draw)
    found = {}
    for n in range(1, 6):
        s, test_s = (
            model.summary(seen[:, :n], actions[:, : n - 1]),
            model.summary(test[:, :n], test_actions[:, : n - 1]),
        )
        found[f"accuracy, s of {n}"] = linear_accuracy(s, y, test_s, test_y, seed)
    return found


def _run_next(acting: bool, data: TurnedData, seed: int) -> Mapping[str, float]:
    things, training = data.make(seed), replace(TRAINING, steps=data.steps, seed=seed)
    settings = NextViewSettings(actions=acting, seed=seed)
    batches = things.batches(training.rows, VIEWS + 1, seed)
    model = fit_next_view(data.encoder(seed), batches, None, settings, training)
    return read_off(things, {"z": model.encoder}, seed) | _summed_up(model, things, seed)


def _run_pairs(data: TurnedData, seed: int) -> Mapping[str, float]:
    things, training = data.make(seed), replace(TRAINING, steps=data.steps, seed=seed)
    settings = SplitSettings(share=1.0, seed=seed)
    model = fit_split(data.encoder(seed), things.batches(training.rows, 2, seed), None, settings, training)
    return read_off(things, {"z": model.encoder}, seed)


def _only(which: str) -> Callable[[bool], Mapping[str, TurnedData]]:
    """Dots for 1,200 steps, or digits for 600."""
    return lambda quick: {which: turned_data(quick, 1200 if which == "dots" else 600)[which]}


_R2, _ONE = "R2 of the angle, z", "accuracy, z"
_METHODS: Mapping[str, Callable[[TurnedData, int], Mapping[str, float]]] = {
    "VICReg": _run_pairs,
    "seq-JEPA": partial(_run_next, True),
    "actions 0": partial(_run_next, False),
}
_SUMMARY = (
    Claim(
        "s of three views classifies no worse than one z",
        lambda v: v["seq-JEPA", "accuracy, s of 3"] - v["seq-JEPA", _ONE],
        at_least=0.0,
    ),
    Claim(
        "s of five views classifies no worse than s of one",
        lambda v: v["seq-JEPA", "accuracy, s of 5"] - v["seq-JEPA", "accuracy, s of 1"],
        at_least=0.0,
    ),
    Claim("features do not fall together: evenness .5", lambda v: v["seq-JEPA", "evenness, z"], at_least=0.5),
    Claim("R2 of the angle is above VICReg's", lambda v: v["seq-JEPA", _R2] - v["VICReg", _R2], at_least=0.0),
)
NEXT_VIEW = register_experiment(
    Experiment(
        "next-view",
        (103,),
        "2505.03176",
        "Do features that predict the next view tell how a thing is turned, and their summary what it is?",
        datasets=_only("dots"),
        methods=_METHODS,
        baseline="VICReg",
        claims=(
            Claim("R2 of the angle is .9", lambda v: v["seq-JEPA", _R2], at_least=0.9),
            Claim(
                "1 - R2 is at most .3 of that with actions 0",
                lambda v: (1 - v["seq-JEPA", _R2]) / (1 - v["actions 0", _R2]),
                at_most=0.3,
            ),
            *_SUMMARY,
        ),
        minutes=6,
        room="vision",
    )
)
NEXT_VIEW_DIGITS = register_experiment(
    Experiment(
        "next-view-digits",
        (103,),
        "2505.03176",
        "And on real digits, beside features that two views pull together?",
        datasets=_only("digits"),
        methods={name: _METHODS[name] for name in ("VICReg", "seq-JEPA")},
        baseline="VICReg",
        claims=(
            *_SUMMARY,
            Claim(
                "s of three views classifies no worse than VICReg's one view",
                lambda v: v["seq-JEPA", "accuracy, s of 3"] - v["VICReg", _ONE],
                at_least=0.0,
            ),
        ),
        minutes=3,
        room="vision",
    )
)
