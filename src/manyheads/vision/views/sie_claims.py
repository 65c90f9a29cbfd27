"""What is claimed of SIE (#118), on dots that turn by the whole circle and real digits that turn by a quarter to each side.

Four encoders of one shape, 64 features, and as many steps: SIE; VICReg, which pulls whole vectors together (the two-view
baseline); SIE whose predictor may leave the action aside; and SIE that is told wrong actions. Read off the encoder's
features: the relative angle of two views, as (cos, sin), by a small network on [z_1, z_2]; and the class, by a linear
classifier on one view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.training import generator_of
from manyheads.vision.core.collapse import evenness
from manyheads.vision.core.encoders import ViewBatches
from manyheads.vision.core.probes import linear_accuracy, network_r2
from manyheads.vision.core.turned import TurnedThings, turned_digits, turned_dots, view_mlp
from manyheads.vision.views.sie import TRAINING, SplitSettings, fit_split

WIDTH = 64


@dataclass(frozen=True)
class TurnedData:
    """How to make the things of a seed, and how long to learn."""

    make: Callable[[int], TurnedThings]
    steps: int

    def encoder(self, seed: int) -> torch.nn.Module:
        """A new encoder for these pictures."""
        things = self.make(seed)
        seen, _, _ = things.sample(things.train, 1, 1, generator_of(seed, 0))
        return view_mlp(seen[0].numel(), WIDTH, seed)


def turned_data(quick: bool, steps: int) -> Mapping[str, TurnedData]:
    """Dots and digits."""
    n = 60 if quick else steps
    return {"dots": TurnedData(turned_dots, n), "digits": TurnedData(turned_digits, n)}


Parts = Mapping[str, Callable[[Float[Tensor, "B 1 S S"]], Float[Tensor, "B D"]]]


@torch.no_grad()
def read_off(things: TurnedThings, parts: Parts, seed: int) -> dict[str, float]:
    """R2 of the relative angle and linear accuracy, of each part of a representation; views of the test are new ones."""
    draw = torch.Generator().manual_seed(seed + 5000)
    seen, actions, y = things.sample(things.train, 4000, 2, draw)
    test, test_actions, test_y = things.sample(things.test, 2000, 2, draw)
    found: dict[str, float] = {}
    for name, read in parts.items():
        z, test_z = (read(x.flatten(0, 1)).unflatten(0, (-1, 2)) for x in (seen, test))
        of_angle = (z.flatten(1), actions[:, 0], test_z.flatten(1), test_actions[:, 0])
        found[f"R2 of the angle, {name}"] = network_r2(*of_angle, seed)
        found[f"accuracy, {name}"] = linear_accuracy(z[:, 0], y, test_z[:, 0], test_y, seed)
        found[f"evenness, {name}"] = evenness(test_z[:, 0])
    return found


def _wrong_actions(batches: ViewBatches) -> ViewBatches:
    def batch(number: int) -> Mapping[str, Tensor]:
        given = batches(number)
        return {**given, "actions": given["actions"].roll(1, 0)}

    return batch


def _run(settings: SplitSettings, wrong: bool, data: TurnedData, seed: int) -> Mapping[str, float]:
    things = data.make(seed)
    training = replace(TRAINING, steps=data.steps, seed=seed)
    batches = things.batches(training.rows, 2, seed)
    batches = _wrong_actions(batches) if wrong else batches
    model = fit_split(data.encoder(seed), batches, None, replace(settings, seed=seed), training)
    halves: Parts = {"still": lambda x: model.embed(x)[0], "moving": lambda x: model.embed(x)[1]}
    return read_off(things, halves if model.moves else {"whole": model.encoder}, seed)


_SIE = SplitSettings()
_MOVING, _STILL, _WHOLE = (f"R2 of the angle, {part}" for part in ("moving", "still", "whole"))
SPLIT = register_experiment(
    Experiment(
        "split-views",
        (118,),
        "2302.10283",
        "Does one half of the features tell what a thing is, and the other how it is turned?",
        datasets=partial(turned_data, steps=1500),
        methods={
            "VICReg": partial(_run, replace(_SIE, share=1.0), False),
            "SIE": partial(_run, _SIE, False),
            "SIE, action beside": partial(_run, replace(_SIE, predictor="concatenated"), False),
            "SIE, wrong actions": partial(_run, _SIE, True),
        },
        baseline="VICReg",
        claims=(
            *(
                Claim(
                    f"{on}: the moving half tells the angle, R2 .3 above the half that stays",
                    lambda v: v["SIE", _MOVING] - v["SIE", _STILL],
                    at_least=0.3,
                    on=on,
                )
                for on in ("dots", "digits")
            ),
            *(
                Claim(
                    f"{on}: the half that stays classifies no worse than the moving half",
                    lambda v: v["SIE", "accuracy, still"] - v["SIE", "accuracy, moving"],
                    at_least=0.0,
                    on=on,
                )
                for on in ("dots", "digits")
            ),
            Claim(
                "the moving half's R2 is .1 above that of VICReg's whole vector",
                lambda v: v["SIE", _MOVING] - v["VICReg", _WHOLE],
                at_least=0.1,
            ),
            Claim(
                "the half that stays classifies at most 5 points worse than VICReg's whole vector",
                lambda v: v["SIE", "accuracy, still"] - v["VICReg", "accuracy, whole"],
                at_least=-0.05,
            ),
            Claim(
                "with wrong actions the moving half's R2 is lower",
                lambda v: v["SIE", _MOVING] - v["SIE, wrong actions", _MOVING],
                at_least=0.0,
            ),
        ),
        minutes=10,
        room="vision",
    )
)
