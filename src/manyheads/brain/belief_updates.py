"""One observation of a network of beliefs (#43): predict, observe, update. On floats or tensors `[B]` alike.

Weber et al., arXiv:2305.10937, as pyhgf 0.2.12 computes it (Legrand et al., arXiv:2410.09206). With the time t since the last
observation, parents before children:

    mu^ = lambda mu + t (rho + sum_b alpha_b g_b(mu^_b))       Omega = t exp(omega + sum_v kappa_v mu^_v)
    pi^ = 1 / (1/pi + Omega)                                   gamma = Omega pi^
    binary leaf: p = sigmoid(sum_b mu^_b), v = p (1 - p)

Then children before parents, with delta = mu - mu^ and Delta = (pi^/pi + pi^ delta^2 - 1) / (number of volatility parents):

    from a child whose value it drives    precision += pi^_j (alpha^2 g'^2 - alpha g'' delta_j)     pull += alpha g' pi^_j delta_j
    from a binary child                   precision += v_j                                          pull += u_j - p_j
    from a child whose volatility it is   precision += (k g)^2 (1/2 + Delta_j) - k^2 g Delta_j / 2   pull += k g Delta_j / 2

    standard     pi = pi^ + precision, mu = mu^ + pull / pi
    ehgf         volatility parents: mu = mu^ + pull / pi^, then pi as above; the others as in "standard"
    unbounded    volatility parents: below; the precision cannot become negative

**Unbounded.** Of a volatility parent x with one child, s = 1/pi before the prediction, m = 1/pi_j + delta_j^2 and e(x) =
t exp(omega + kappa x), the variational energy is I(x) = -log(s + e)/2 - m / (2 (s + e)) - pi^ (x - mu^)^2 / 2. It is expanded
to second order twice: at mu^, and at the mode that I has for s = 0, which Lambert's W gives. The two Gaussians are mixed with
weights exp(I) at their means, and the mixture's mean and variance are kept.

**We differ from pyhgf 0.2.12** in four things, none of which its own examples meet. A leaf reads its parents as they are: pyhgf
multiplies what it reads, and its noise, by the time gap. Where nothing below a node was observed its belief is the prediction;
in pyhgf volatility parents still grow more certain. g' and g'' are taken at mu^, not at the last mean. kappa = 0 under
"unbounded" changes nothing above, where pyhgf divides by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from manyheads.brain.belief_arithmetic import BeliefArithmetic
from manyheads.brain.network import BeliefEdge, BeliefNetwork

CAP = 1e10  # of precisions
EDGE = 1e-6  # probabilities are kept this far from 0 and 1


@dataclass
class BeliefState:
    """Lists with a number (or a tensor `[B]`) for each node of a network, in the order of its nodes."""

    mean: list[Any]
    precision: list[Any]
    expected_mean: list[Any]
    expected_precision: list[Any]
    gamma: list[Any] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)  # 1 / pi, before the prediction
    told: list[Any] = field(default_factory=list)  # whether anything below was observed


class BeliefStep:
    """What happens at one observation of `network`, whose numbers are `numbers`, in an arithmetic."""

    def __init__(self, network: BeliefNetwork, numbers: dict[str, Any], maths: BeliefArithmetic) -> None:
        place = {node.name: i for i, node in enumerate(network.nodes)}
        self.maths, self.update, self.numbers = maths, network.update, numbers
        self.order = [place[node.name] for node in network.parents_first()]
        self.kinds = [node.kind for node in network.nodes]
        names = [node.name for node in network.nodes]
        self.values_up = [[self._edge(e, place) for e in network.edges_up(name, "value")] for name in names]
        self.volatility_up = [[self._edge(e, place) for e in network.edges_up(name, "volatility")] for name in names]
        down = [network.edges_down(name) for name in names]
        self.values_down = [[self._edge(e, place) for e in edges if e.kind == "value"] for edges in down]
        self.volatility_down = [[self._edge(e, place) for e in edges if e.kind == "volatility"] for edges in down]
        self.omega = [numbers[f"omega {name}"] for name in names]
        self.rho = [numbers[f"rho {name}"] for name in names]
        self.lam = [numbers[f"lambda {name}"] for name in names]
        self.leaves = [place[leaf.name] for leaf in network.leaves]
        self.names = names

    def _edge(self, edge: BeliefEdge, place: dict[str, int]) -> tuple[int, int, Any, str]:
        letter = "alpha" if edge.kind == "value" else "kappa"
        return place[edge.child], place[edge.parent], self.numbers[f"{letter} {edge.parent} {edge.child}"], edge.shape

    def start(self) -> BeliefState:
        """The beliefs before the first observation."""
        mean = [self.numbers[f"mean {name}"] for name in self.names]
        precision = [self.numbers[f"precision {name}"] for name in self.names]
        n = len(self.names)
        return BeliefState(mean, precision, list(mean), list(precision), [0.0] * n, [0.0] * n, [True] * n)

    def predict(self, state: BeliefState, gap: Any) -> None:
        """Set `expected_mean`, `expected_precision` and `gamma` of all nodes."""
        maths, s = self.maths, state
        for i in self.order:
            pull = sum(alpha * self._shape(s.expected_mean[b], shape)[0] for _, b, alpha, shape in self.values_up[i])
            if self.kinds[i] == "binary":
                p = maths.least(maths.most(maths.sigmoid(pull), EDGE), 1 - EDGE)
                s.expected_mean[i], s.expected_precision[i] = p, p * (1.0 - p)
                continue
            phasic = sum(kappa * s.expected_mean[v] for _, v, kappa, _ in self.volatility_up[i])
            s.before[i] = 1.0 / s.precision[i]
            if self.kinds[i] == "continuous":
                s.expected_mean[i], s.expected_precision[i] = pull, s.precision[i]
                if not self.volatility_up[i]:
                    continue
                more = maths.exp(phasic)
            else:
                s.expected_mean[i] = self.lam[i] * s.mean[i] + gap * (self.rho[i] + pull)
                more = gap * maths.exp(self.omega[i] + phasic)
            s.expected_precision[i] = 1.0 / (s.before[i] + more)
            s.gamma[i] = more * s.expected_precision[i]

    def observe(self, state: BeliefState, values: list[Any], seen: list[Any], gap: Any) -> None:
        """Take one value a leaf, `seen` or missing, and update all beliefs."""
        s = state
        for leaf, value, is_seen in zip(self.leaves, values, seen, strict=True):
            s.mean[leaf], s.told[leaf] = self.maths.where(is_seen, value, s.expected_mean[leaf]), is_seen
        for i in reversed(self.order):
            if self.kinds[i] == "hidden":
                self._update(s, i, gap)

    def _update(self, s: BeliefState, i: int, gap: Any) -> None:
        maths, expected, sure = self.maths, s.expected_mean[i], s.expected_precision[i]
        more: Any = 0.0
        pull: Any = 0.0
        told: Any = False
        for j, _, alpha, shape in self.values_down[i]:
            delta = s.mean[j] - s.expected_mean[j]  # 0 where the child was not observed
            told = told | s.told[j]
            if self.kinds[j] == "binary":
                more, pull = more + maths.where(s.told[j], s.expected_precision[j], 0.0), pull + delta
                continue
            _, slope, bend = self._shape(expected, shape)
            gained = s.expected_precision[j] * (alpha * alpha * slope * slope - alpha * bend * delta)
            more = more + maths.where(s.told[j], gained, 0.0)
            pull = pull + alpha * slope * s.expected_precision[j] * delta
        for j, _, kappa, _ in self.volatility_down[i]:
            told = told | s.told[j]
            g, wrong = s.gamma[j], self._volatility_error(s, j)
            kg = kappa * g
            more = more + maths.where(s.told[j], kg * kg * (0.5 + wrong) - 0.5 * kappa * kg * wrong, 0.0)
            pull = pull + maths.where(s.told[j], 0.5 * kg * wrong, 0.0)
        if self.volatility_down[i] and self.update == "unbounded":
            mean, precision = self._unbounded(s, i, gap)
        else:
            precision = maths.least(sure + more, CAP)
            mean = expected + pull / (sure if self.volatility_down[i] and self.update == "ehgf" else precision)
        s.mean[i] = maths.where(told, mean, expected)
        s.precision[i] = maths.where(told, precision, sure)
        s.told[i] = told

    def _volatility_error(self, s: BeliefState, j: int) -> Any:
        delta, sure = s.mean[j] - s.expected_mean[j], s.expected_precision[j]
        return (sure / s.precision[j] + sure * delta * delta - 1.0) / len(self.volatility_up[j])

    def _unbounded(self, s: BeliefState, i: int, gap: Any) -> tuple[Any, Any]:
        maths, expected, sure = self.maths, s.expected_mean[i], s.expected_precision[i]
        ((j, _, strength, _),) = self.volatility_down[i]
        kappa = maths.where(strength == 0.0, 1.0, strength)  # 0 would be divided by; what it gives is thrown away below
        # The variance of the child: before the step, and what the observation leaves (with what it missed by).
        prior = maths.most(s.before[j], 1e-128)
        moment = 1.0 / s.precision[j] + (s.mean[j] - s.expected_mean[j]) * (s.mean[j] - s.expected_mean[j])
        tonic = (0.0 if self.kinds[j] == "continuous" else self.omega[j]) + _log(maths, gap)
        half = 0.5 * kappa

        def share(x: Any) -> tuple[Any, Any]:
            """How much of the child's predicted variance is new, and the relative error of that variance."""
            new = maths.exp(tonic + kappa * x)
            return new / (prior + new), moment / (prior + new) - 1.0

        def energy(x: Any) -> Any:
            total = prior + maths.exp(tonic + kappa * x)
            return -0.5 * maths.log(total) - 0.5 * moment / total - 0.5 * sure * (x - expected) * (x - expected)

        w = share(expected)[0]
        wrong = s.expected_precision[j] * moment - 1.0
        near_precision = sure + half * kappa * w * (1.0 - w)
        near = expected + half * w * wrong / near_precision
        # For s = 0, I'(x) = 0 is y exp(y) = b m exp(b) / e(mu^) with y = kappa (x - mu^) + b and b = kappa^2 / (2 pi^).
        b = half * kappa / sure
        y = maths.lambert(_log(maths, moment) + _log(maths, b) + b - (tonic + kappa * expected))
        mode = expected + (y - b) / kappa
        w, wrong = share(mode)
        curved = sure + half * kappa * w * (w + (2.0 * w - 1.0) * wrong)
        far_precision = maths.where(curved > 0.0, curved, sure + half * kappa * w * (1.0 - w))
        far = mode + (half * w * wrong - sure * (mode - expected)) / far_precision
        weight = maths.sigmoid(energy(far) - energy(near))
        mean = near + weight * (far - near)
        variance = (1.0 - weight) / near_precision + weight / far_precision
        variance = variance + weight * (1.0 - weight) * (near - far) * (near - far)
        nothing = strength == 0.0
        return maths.where(nothing, expected, mean), maths.where(nothing, sure, maths.least(1.0 / variance, CAP))

    def _shape(self, x: Any, shape: str) -> tuple[Any, Any, Any]:
        """g, g' and g'' at x."""
        if shape == "linear":
            return x, 1.0, 0.0
        if shape == "tanh":
            y = self.maths.tanh(x)
            return y, 1.0 - y * y, -2.0 * y * (1.0 - y * y)
        y = self.maths.sigmoid(x)
        return y, y * (1.0 - y), y * (1.0 - y) * (1.0 - 2.0 * y)


def _log(maths: BeliefArithmetic, x: Any) -> Any:
    """The logarithm, also of a time gap that is a plain number among tensors."""
    return math.log(x) if isinstance(x, float) else maths.log(x)
