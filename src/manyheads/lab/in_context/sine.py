"""Sines in context: an MLP makes features, and a layer of linear attention does a step of descent on its last layer (#54).

von Oswald et al., arXiv:2212.07677, section 4. A task is y = A sin(x + phi), A ~ U(.1, .5), phi ~ U(0, pi), x ~ U(-5, 5), with N
examples. Tokens (x, y), and (x, 0) of the query, go one by one through an embedding and an MLP, and together through a layer:

    h_j = W_2 gelu(W_1 (W_e (x_j, y_j) + b_e) + b_1) + b_2      2 -> 40 -> 160 -> 40
    h_j <- h_j + P sum_i (W_V h_i) (W_K h_i . W_Q h_j)          the layer of `gradient_descent`; prediction: - last entry of h_q
    built:  h_j = (m(x_j), y_j), since gelu(y) - gelu(-y) = y, and the layer is that of `built_descent`
    then    the prediction is w . m(x_q), w = (eta / N) sum_i y_i m(x_i): a step of descent on the MLP's last layer, from 0

**Claim.** The trained network is as good as one step of descent on the last layer of features that were learned for it, and says
the same. **Refuted by** a loss more than 10 % above that step's, or predictions whose correlation with it is below .95. Beside
them stand the mean of the examples' labels and the layer without MLP, which knows no curved function of x.

Departures: Adam at 2e-3, 2,500 steps of 256 tasks; the descent's features are 1 -> 40 -> 160 -> 39, its start w0 is learned too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer
from manyheads.lab.in_context.gradient_descent import LinearSelfAttention, built_descent, descended, half_error
from manyheads.training import ADAM, fit, generator_of

WIDTH, HIDDEN = 40, 160


@dataclass(frozen=True)
class SineTasks:
    """Sines of the formula above, with `examples` N."""

    examples: int = 10

    def __post_init__(self) -> None:
        check_integer(self.examples, "examples", 1)

    def draw(self, n: int, number: int, seed: int = 0) -> tuple[Float[Tensor, "B N1 1"], Float[Tensor, "B N1 1"]]:
        """Inputs and labels of `n` tasks, the query last. `number` and `seed` decide which."""
        generator = generator_of(seed, number)
        height, phase = torch.rand(2, n, 1, 1, generator=generator)
        x = 10 * torch.rand(n, self.examples + 1, 1, generator=generator) - 5
        return x, (0.1 + 0.4 * height) * (x + torch.pi * phase).sin()


class SineAttention(nn.Module):
    """The network of the formula above; with `mlp` False the embedding goes to the layer as it is."""

    def __init__(self, *, mlp: bool = True, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Linear(2, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) if mlp else None
        self.layer = LinearSelfAttention(WIDTH, seed=seed)

    def predict(self, x: Float[Tensor, "B N1 1"], y: Float[Tensor, "B N 1"]) -> Float[Tensor, "B 1"]:
        """What it says of the last input, of which it is not told the label."""
        tokens = self.embedding(torch.cat([x, F.pad(y, (0, 0, 0, 1))], -1))
        out: Tensor = -self.layer(tokens if self.mlp is None else self.mlp(tokens))[:, -1, -1:]
        return out


class FeatureDescent(nn.Module):
    """One step of descent from a learned w0, with a learned eta, on the last layer of learned features: 1 -> 40 -> 160 -> 39."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Linear(1, WIDTH), nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH - 1)
            )
        self.eta, self.w0 = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(1, WIDTH - 1))

    def predict(self, x: Float[Tensor, "B N1 1"], y: Float[Tensor, "B N 1"]) -> Float[Tensor, "B 1"]:
        """The step's prediction for the last input."""
        return descended(self.features(x), y, self.eta[None], w0=self.w0)


class MeanLabel(nn.Module):
    """Predicts the mean of the examples' labels."""

    def predict(self, x: Float[Tensor, "B N1 1"], y: Float[Tensor, "B N 1"]) -> Float[Tensor, "B 1"]:
        """The same for every query."""
        return y.mean(1)


def built_sine(features: nn.Sequential, eta: float, examples: int) -> SineAttention:
    """The network that does one step of descent from 0 on the last layer of `features`: Linear(1, H), GELU, Linear(H, 39).

    H is at most 158: two hidden units carry the label.
    """
    first, last = features[0], features[-1]
    if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and len(features) == 3) or (
        first.out_features > HIDDEN - 2 or (first.in_features, last.out_features) != (1, WIDTH - 1)
    ):
        raise InputError(f"the features are Linear(1, H), GELU, Linear(H, {WIDTH - 1}) with H at most {HIDDEN - 2}.")
    model, h = SineAttention(), first.out_features
    with torch.no_grad():
        up, _, down = cast(tuple[nn.Linear, nn.GELU, nn.Linear], tuple(cast(nn.Sequential, model.mlp)))
        for one in (model.embedding, up, down):
            one.weight.zero_()
            one.bias.zero_()
        model.embedding.weight[0, 0] = model.embedding.weight[-1, 1] = 1
        up.weight[:h, 0], up.bias[:h] = first.weight[:, 0], first.bias
        up.weight[-2, -1], up.weight[-1, -1] = 1, -1
        down.weight[:-1, :h], down.bias[:-1] = last.weight, last.bias
        down.weight[-1, -2], down.weight[-1, -1] = 1, -1
        model.layer.weights.copy_(built_descent(eta, examples, torch.zeros(1, WIDTH - 1)).weights)
    return model


def trained_sine(model: Any, tasks: SineTasks = SineTasks(), *, seed: int = 0, length: int = 2500) -> Any:
    """A `SineAttention` or `FeatureDescent`, trained on fresh batches of 256 tasks; about a minute on one core."""
    settings = replace(ADAM, steps=length, rate=2e-3, warmup=100, decay=0.5, clip=1.0, seed=seed)

    def loss(module: Any, number: int) -> Float[Tensor, ""]:
        x, y = tasks.draw(256, number, seed)
        return 0.5 * (module.predict(x, y[:, :-1]) - y[:, -1]).square().mean()

    fit(model, lambda i: i, settings, loss=loss, device="cpu")
    return model.eval()


def prediction_correlation(model: Any, other: Any, tasks: SineTasks, *, n: int = 10_000, seed: int = 2) -> float:
    """The correlation of both models' predictions on new tasks."""
    x, y = tasks.draw(n, 10**6 - 2, seed)
    with torch.no_grad():
        both = torch.cat([one.predict(x, y[:, :-1]) for one in (model, other)], 1)
    return float(torch.corrcoef(both.T)[0, 1])


def _trained(data: tuple[SineTasks, int], seed: int) -> dict[str, float]:
    """Both are trained here, so that the same descent is compared with."""
    tasks, length = data
    model = trained_sine(SineAttention(seed=seed), tasks, seed=seed, length=length)
    descent = trained_sine(FeatureDescent(seed=seed), tasks, seed=seed, length=length)
    return {
        "loss": half_error(model, tasks),
        "descent": half_error(descent, tasks),
        "correlation": prediction_correlation(model, descent, tasks),
    }


def _flat(data: tuple[SineTasks, int], seed: int) -> dict[str, float]:
    tasks, length = data
    return {
        "loss": half_error(trained_sine(SineAttention(mlp=False, seed=seed), tasks, seed=seed, length=length), tasks)
    }


def _mean(data: tuple[SineTasks, int], seed: int) -> dict[str, float]:
    return {"loss": half_error(MeanLabel(), data[0])}


register_experiment(
    Experiment(
        "sine",
        (54,),
        "2212.07677",
        "Is an MLP with a layer of linear attention a step of descent on the MLP's last layer?",
        datasets=lambda quick: {"sines": (SineTasks(), 60 if quick else 2500)},
        methods={"MLP and layer": _trained, "layer alone": _flat, "mean label": _mean},
        baseline="mean label",
        claims=(
            Claim(
                "the trained network's loss is at most 1.1 of one step's on learned features",
                lambda v: v["MLP and layer", "loss"] / v["MLP and layer", "descent"],
                at_most=1.1,
            ),
            Claim(
                "its predictions correlate with that step's by .95",
                lambda v: v["MLP and layer", "correlation"],
                at_least=0.95,
            ),
            Claim(
                "its loss is at most half of the mean label's",
                lambda v: v["MLP and layer", "loss"] / v["mean label", "loss"],
                at_most=0.5,
            ),
            Claim(
                "and at most half of that of the layer without MLP",
                lambda v: v["MLP and layer", "loss"] / v["layer alone", "loss"],
                at_most=0.5,
            ),
        ),
        minutes=8,
        lower=frozenset({"loss"}),
        room="lab",
    )
)
