"""Head tuning (#25), its claims: on a chain whose risk is known exactly, on a hidden Markov model, and on ladon's states.

n is 60 throughout. Real states are those after the first, the third and the last block of ladon, at random places of the prose
that ships with Python; the target is how many letters the next token has.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.model.opening import open_model
from manyheads.predict.transfer.head_tuning import Fit, min_norm_head, ridge_head, risk_by_width, width_sweep
from manyheads.predict.transfer.small_sets import StateChain, belief_states, next_word_states

N, WIDTHS = 60, (0, 10, 30, 50, 58, 60, 62, 90, 150, 200)
HEADS: dict[str, Fit] = {"min-norm": min_norm_head, "ridge": ridge_head}


def _chain(head: Fit, latent: int, seed: int) -> dict[str, float]:
    chain = StateChain(latent=latent, width=latent, seed=seed)
    sweep = risk_by_width(lambda i: chain.sample(N, i), chain.population, (*WIDTHS, latent), head=head)
    return {f"risk {p}": sweep.risk(p) for p in WIDTHS} | {"risk last": sweep.risk(latent)}


def _real(head: Fit, data: tuple[np.ndarray, np.ndarray], seed: int) -> dict[str, float]:
    sweep = width_sweep(*data, N, sorted({*WIDTHS, data[0].shape[1]}), head=head, seed=seed)
    below = sweep.table[sweep.table["p"] < N]
    return {
        "peak / n": sweep.peak / N,
        "risk at peak": sweep.table["risk"].max(),
        "best below n": float(below.loc[below["risk"].idxmin(), "p"]),
        "risk last": sweep.risk(data[0].shape[1]),
    }


def _states(quick: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    model = open_model()
    layers = (3,) if quick else (1, 3, 6)
    return {"beliefs": belief_states(800)} | {f"ladon layer {i}": next_word_states(model, i) for i in layers}


def _rising(v: Values) -> float:
    risks = [v["min-norm", f"risk {p}"] for p in (0, 10, 30, 50)]
    return min(b - a for a, b in pairwise(risks))


CLAIMS = (
    Claim("risk rises strictly over p = 0, 10, 30, 50", _rising, at_least=0.0),
    Claim(
        "risk at p = 58 is 20 times that of p = 0",
        lambda v: v["min-norm", "risk 58"] / v["min-norm", "risk 0"],
        at_least=20,
    ),
    Claim("and at p = 62", lambda v: v["min-norm", "risk 62"] / v["min-norm", "risk 0"], at_least=20),
    Claim("but at p = k at most twice", lambda v: v["min-norm", "risk last"] / v["min-norm", "risk 0"], at_most=2),
    Claim("ridge has no peak", lambda v: v["ridge", "risk 60"] / v["ridge", "risk 0"], at_most=2),
)
register_experiment(
    Experiment(
        "head-tuning",
        (25,),
        "2410.00699",
        "Does the risk of a least-squares head peak where the width of frozen states is the number of samples?",
        datasets=lambda quick: {"chain of 600": 600} if not quick else {"chain of 300": 300},
        methods={name: partial(_chain, head) for name, head in HEADS.items()},
        baseline="ridge",
        claims=CLAIMS,
        minutes=1.0,
    )
)
register_experiment(
    Experiment(
        "head-tuning-real",
        (25,),
        "2410.00699",
        "Does it on states of a trained model, and of a hidden Markov model?",
        datasets=_states,
        methods={name: partial(_real, head) for name, head in HEADS.items()},
        baseline="ridge",
        claims=(
            Claim("the peak is at p = n within 5 %", lambda v: abs(v["min-norm", "peak / n"] - 1), at_most=0.05),
            Claim(
                "risk at the peak over that of all states, log10",
                lambda v: float(np.log10(v["min-norm", "risk at peak"] / v["min-norm", "risk last"])),
                at_least=1,
            ),
            Claim("the best width below n is 0", lambda v: v["min-norm", "best below n"], at_most=0),
            Claim(
                "ridge over all states beats the last",
                lambda v: v["ridge", "risk last"] / v["min-norm", "risk last"],
                at_most=1,
            ),
        ),
        minutes=1.0,
    )
)
