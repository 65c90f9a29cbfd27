"""What a uniformly random policy meets in an environment: the data from which proto-value features are learned.

Any environment with gymnasium's interface will do: `reset(seed=...)` gives (observation, info), `step(action)` gives
(observation, reward, ended, cut off, info), and `action_space.n` counts the actions. gymnasium itself is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_seed
from manyheads.progress import Bar

LARGEST = 4 << 30  # bytes of all observations of a walk


@dataclass(frozen=True)
class RandomWalk:
    """T steps. Observations stand once each: step t went from `observations[at[t]]` to `observations[then[t]]`.

    `ended` says whether the episode was over after step t, in which case nothing counts after it; where an episode was only cut
    off it is false, and the next step begins elsewhere.
    """

    observations: Any  # [M, ...], as the environment gives them
    at: Int[np.ndarray, "T"]
    then: Int[np.ndarray, "T"]
    actions: Int[np.ndarray, "T"]
    rewards: Float[np.ndarray, "T"]
    ended: Bool[np.ndarray, "T"]
    n_actions: int


def random_walk(env: Any, steps: int = 20_000, *, seed: int = 0, bar: Bar = Bar()) -> RandomWalk:
    """Act at random for `steps` steps, over as many episodes as that takes.

    Of an observation that is a mapping its "image" is taken. `InputError` for what is no such environment, for observations that
    are no arrays of finite numbers of one shape, and where all of them together would pass 4 GiB.
    """
    check_integer(steps, "steps", 1, 100_000_000)
    draw = np.random.default_rng(check_seed(seed))
    n = getattr(getattr(env, "action_space", None), "n", None)
    if not (hasattr(env, "reset") and hasattr(env, "step")) or n is None:
        raise InputError(
            f"{type(env).__name__} is no environment with counted actions; give one with reset, step and action_space.n."
        )
    n = int(n)
    start = _array(env.reset(seed=seed)[0])
    if start.nbytes * (steps + 1) > LARGEST:
        raise InputError(
            f"{steps} observations of {list(start.shape)} pass 4 GiB; give fewer steps or smaller observations."
        )
    seen, at, then = [start], [], []
    rewards, ended, actions = [], [], draw.integers(n, size=steps)
    step = bar.step("steps of a random policy", steps)
    for action in actions:
        observation, reward, over, cut, _ = env.step(int(action))
        at.append(len(seen) - 1)
        seen.append(_array(observation, start.shape))
        then.append(len(seen) - 1)
        rewards.append(float(reward))
        ended.append(bool(over))
        if over or cut:
            seen.append(_array(env.reset()[0], start.shape))
        step(1)
    found = np.array(rewards)
    if not np.isfinite(found).all():
        raise InputError("a reward is not finite; scale the environment's rewards.")
    return RandomWalk(np.stack(seen), np.array(at), np.array(then), actions, found, np.array(ended), n)


def _array(observation: Any, shape: tuple[int, ...] | None = None) -> Any:
    if isinstance(observation, dict):
        if "image" not in observation:
            raise InputError(
                f"an observation has {', '.join(map(str, observation))} and no image; wrap it into an array."
            )
        observation = observation["image"]
    found = np.asarray(observation)
    if found.ndim == 0 or found.dtype.kind not in "biuf":
        raise InputError(
            f"an observation is {type(observation).__name__}, not an array of numbers; wrap the environment."
        )
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise InputError("an observation has NaN or infinity; wrap the environment.")
    if shape is not None and found.shape != shape:
        raise InputError(f"observations have the shapes {list(shape)} and {list(found.shape)}; give one shape.")
    return found.astype(np.float32) if found.dtype == np.float64 else found
