"""Proto-value features (#98): a picture of four rooms for the documentation, and what they know of MiniGrid.

python recipes/proto_values.py picture --out docs/images/proto-values.png      about a minute on one core
python recipes/proto_values.py minigrid                                        about four minutes; pip install minigrid
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Bool, Float

from manyheads.control import ProtoValues, RandomWalk, four_rooms, learn_proto_values, random_walk
from manyheads.control.environments import open_environment
from manyheads.control.proto_values import ProtoValueNetwork, sets_of_states
from manyheads.files import check_output, write_atomically

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GAMMA, SHARE, SCALE, GAP = 0.9, 0.05, 10, 6
LIGHT, DARK = np.array([244.0, 247.0, 251.0]), np.array([18.0, 70.0, 140.0])


@app.command()
def picture(
    out: Annotated[Path, typer.Option(help="The picture to write.")],
    force: Annotated[bool, typer.Option("--force", help="Write over an older one.")] = False,
) -> None:
    """Three rows, a column each for five rewards never trained: exact values, what a linear head on the features gives, and on
    those of a random network."""
    from PIL import Image

    check_output(out, folder=False, force=force)
    env = four_rooms()
    walk = random_walk(env, 100_000, seed=0)
    found = learn_proto_values(walk, share=SHARE, gamma=GAMMA, seed=0)
    untrained = _untrained(walk, found, 0)
    goals = [env.index[cell] for cell in ((2, 2), (3, 6), (2, 10), (10, 3), (9, 9))]
    exact = env.successor_measure(GAMMA)[:, goals]
    fits = [_design(one.features(env.images)) for one in (found, untrained)]
    rows = [exact, *(phi @ np.linalg.lstsq(phi, exact, rcond=None)[0] for phi in fits)]
    print(f"R2, features and random network: {_r2(rows[1], exact):.2f} {_r2(rows[2], exact):.2f}")
    side = 13 * SCALE
    canvas = np.full((3 * side + 2 * GAP, 5 * side + 4 * GAP, 3), 255, dtype=np.uint8)
    for i, values in enumerate(rows):
        for j in range(5):
            # The square root: values fall by a factor at each step away from the goal.
            height = np.sqrt(np.clip(values[:, j] / exact[:, j].max(), 0, 1))
            image = np.full((13, 13, 3), 60.0)
            image[env.cells[:, 0], env.cells[:, 1]] = LIGHT + height[:, None] * (DARK - LIGHT)
            tile = np.kron(image, np.ones((SCALE, SCALE, 1))).astype(np.uint8)
            top, left = i * (side + GAP), j * (side + GAP)
            canvas[top : top + side, left : left + side] = tile
    write_atomically(out, lambda file: Image.fromarray(canvas).save(file, "PNG"), force=force)


@app.command()
def minigrid(seeds: int = 3, walked: int = 20_000) -> None:
    """How well a linear head gives the discounted visits to sets never trained, in episodes of a second walk (R2, over seeds)."""
    table = []
    for seed in range(seeds):
        walk, other = (
            random_walk(open_environment("MiniGrid-FourRooms-v0", "minigrid"), walked, seed=one)
            for one in (seed, 1000 + seed)
        )
        found = learn_proto_values(walk, share=SHARE, gamma=GAMMA, seed=seed)
        random = _untrained(walk, found, 5000 + seed)
        torch.manual_seed(9000 + seed)  # networks of their own, not the untrained one's
        sets = sets_of_states(np.concatenate([walk.observations, other.observations]), found.scale, 50, SHARE)
        visits = _visits(walk, sets[: len(walk.observations)]), _visits(other, sets[len(walk.observations) :])
        scores = []
        for network in (found, random):
            phi, held = (_design(network.features(one.observations)[one.at]) for one in (walk, other))
            guess = held @ np.linalg.lstsq(phi, visits[0], rcond=None)[0]
            scores.append(_r2(guess, visits[1]))
        table.append(scores)
        print(f"seed {seed}: features {scores[0]:.3f}, random network {scores[1]:.3f}", flush=True)
    errors = np.std(table, 0, ddof=1) / np.sqrt(seeds)
    print("means:", np.mean(table, 0).round(3), "standard errors:", errors.round(3))


def _design(phi: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N E"]:
    return np.column_stack([phi, np.ones(len(phi))]).astype(np.float64)


def _r2(guess: Float[np.ndarray, "N K"], truth: Float[np.ndarray, "N K"]) -> float:
    return float((1 - ((guess - truth) ** 2).sum(0) / ((truth - truth.mean(0)) ** 2).sum(0)).mean())


def _untrained(walk: RandomWalk, like: ProtoValues, seed: int) -> ProtoValues:
    """The same network before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ProtoValueNetwork(like.shape, like.settings["features"], 1, walk.n_actions)
    return replace(like, network=network)


def _visits(walk: RandomWalk, sets: Bool[np.ndarray, "M K"]) -> Float[np.ndarray, "T K"]:
    """Discounted visits from each step to the end of its episode, or of the walk."""
    found = sets[walk.at].astype(np.float64)
    for t in range(len(found) - 2, -1, -1):
        if walk.at[t + 1] == walk.then[t]:
            found[t] += GAMMA * found[t + 1]
    return found


if __name__ == "__main__":
    app()
