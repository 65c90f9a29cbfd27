"""KRR-ST (#117): a few pictures, with targets, that teach a network what a large set without labels would teach it.

Lee et al., arXiv:2310.06511. A teacher without labels gives y [N, D] for the pictures x. Learned are pictures Xs and targets
Ys [m, D], which start as real ones. A pool of networks learns from (Xs, Ys) all the while, by MSE; each starts anew after a
number of steps. In an outer step one of them gives features, each with a 1 behind it, F of real pictures and Fs of Xs, and
the best linear answer is solved for at once:

    K = F Fs^T    G = Fs Fs^T    L = MSE( K (G + ridge tr(G) I)^-1 Ys , y )

whose gradient goes to Xs and Ys, not to the network; it then takes one step of its own. In the outer step networks are in
evaluation mode, so that a picture's features do not depend on the others'. No gradient goes through the networks' own
training: only the last, linear map is solved for.

Different from the paper: 160,000 steps on ResNet-like networks there, some thousand on a small one here; so the rate is larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number
from manyheads.learning import Card, load, save
from manyheads.progress import Bar
from manyheads.training import Progress, TrainSettings, drawn_rows, fit, generator_of

KIND = "distilled-set"
TRAINING = TrainSettings(
    steps=2000, rows=128, rate=3e-3, warmup=1, decay=1.0, floor=0.0, betas=(0.9, 0.999), weight_decay=0.0, clip=None,
    precision="fp32",
)  # fmt: skip
MakeNet = Callable[[int], nn.Module]
"""A seed -> a new network whose output is features [B, P]."""


@dataclass(frozen=True)
class DistilSettings:
    """`count` is m. `nets` are in the pool, learn by SGD with `inner_rate`, `momentum` and `inner_decay`, and start anew after
    `longest` steps; at first each has done a random number of them."""

    count: int = 50
    nets: int = 10
    longest: int = 300
    inner_rate: float = 0.1
    momentum: float = 0.9
    inner_decay: float = 1e-3
    ridge: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "nets", "longest"):
            check_integer(getattr(self, name), name, 1)
        for name in ("inner_rate", "ridge"):
            check_number(getattr(self, name), name, 0.0, 1.0, above=True)


def ridge_answers(
    features: Float[Tensor, "N P"], kept: Float[Tensor, "m P"], targets: Float[Tensor, "m D"], ridge: float
) -> Float[Tensor, "N D"]:
    """What the linear map fitted on `kept` and `targets` answers for `features`: K (G + ridge tr(G) I)^-1 Ys.

    Solved in double precision: G has a condition of up to 1 / ridge, which single precision does not bear.
    """
    f, fs = (F.pad(one, (0, 1), value=1.0).double() for one in (features, kept))
    gram = fs @ fs.T
    shrunk = gram + ridge * gram.trace() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (f @ (fs.T @ torch.linalg.solve(shrunk, targets.double()))).to(targets.dtype)


@dataclass(frozen=True)
class DistilledSet:
    """The learned pictures and targets, and the outer loss of each step."""

    pictures: Float[Tensor, "m C H W"]
    targets: Float[Tensor, "m D"]
    losses: Float[Tensor, "S"]
    settings: DistilSettings = DistilSettings()

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write it into a new folder."""
        card = Card("krr-st", "2310.06511", asdict(self.settings), self.settings.seed, kind=KIND)
        tensors = {"pictures": self.pictures, "targets": self.targets, "losses": self.losses}
        return save(folder, card, tensors, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> DistilledSet:
        """What `save` wrote. `InputError` where nothing of the kind was saved."""
        card, tensors = load(folder, KIND, "distilled set")
        try:
            return cls(tensors["pictures"], tensors["targets"], tensors["losses"], DistilSettings(**card.settings))
        except (TypeError, KeyError):
            raise InputError(f"the card in {folder} is damaged; save the set again.") from None


class Student(nn.Module):
    """A network of features with a linear map to the teacher's targets, and the SGD that trains it."""

    def __init__(self, make: MakeNet, width: int, outputs: int, settings: DistilSettings, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net, self.out = make(seed), nn.Linear(width, outputs)
        self.sgd = torch.optim.SGD(
            self.parameters(), settings.inner_rate, settings.momentum, weight_decay=settings.inner_decay
        )
        self.steps = 0

    def learn(self, pictures: Float[Tensor, "B C H W"], targets: Float[Tensor, "B D"], steps: int = 1) -> None:
        """Steps of SGD on the mean squared error over these pictures."""
        self.train()
        for _ in range(steps):
            self.sgd.zero_grad()
            with torch.enable_grad():
                F.mse_loss(self.out(self.net(pictures)), targets).backward()
            self.sgd.step()
            self.steps += 1


def taught(
    make: MakeNet,
    pictures: Float[Tensor, "m C H W"],
    targets: Float[Tensor, "m D"],
    settings: DistilSettings = DistilSettings(),
    *,
    steps: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A new network that learned from these alone, `steps` steps (the settings' `longest`) on all of them at once."""
    student = Student(make, _features_of(make, pictures), targets.shape[1], settings, seed)
    student.learn(pictures, targets, steps or settings.longest)
    return student.net.eval()


class _Learned(nn.Module):
    """What the outer steps change."""

    def __init__(self, pictures: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.pictures, self.targets = nn.Parameter(pictures.clone()), nn.Parameter(targets.clone())


def distil(
    pictures: Float[Tensor, "N C H W"],
    targets: Float[Tensor, "N D"],
    make: MakeNet,
    settings: DistilSettings = DistilSettings(),
    training: TrainSettings = TRAINING,
    *,
    bar: Bar = Bar(),
) -> DistilledSet:
    """Learn `count` pictures and targets from pictures of your own and what your teacher says of them.

    `make(seed)` gives a new network of the kind that is to be taught, with features [B, P] as its output. `InputError` for fewer
    pictures than `count`, targets that do not fit, or numbers that are not finite.
    """
    if len(pictures) != len(targets) or len(pictures) < settings.count:
        raise InputError(
            f"there are {len(pictures)} pictures and {len(targets)} targets; give as many of both, at least {settings.count}."
        )
    if not bool(pictures.isfinite().all() and targets.isfinite().all()):
        raise InputError("pictures or targets hold NaN or infinity; give finite numbers.")
    width, s = _features_of(make, pictures), settings
    started = iter(range(10_000 * s.seed, 10_000 * (s.seed + 1_000_000)))
    chosen = torch.randperm(len(pictures), generator=generator_of(s.seed, 0))[: s.count]
    learned = _Learned(pictures[chosen], targets[chosen])

    def student() -> Student:
        return Student(make, width, targets.shape[1], s, next(started))

    pool = [student() for _ in range(s.nets)]
    for one, age in zip(pool, torch.randint(s.longest, (s.nets,), generator=generator_of(s.seed, 1)), strict=True):
        one.learn(learned.pictures.detach(), learned.targets.detach(), int(age))
    losses: list[float] = []

    def turn(number: int) -> Tensor:
        """Whose turn it is."""
        return torch.randint(s.nets, (), generator=generator_of(s.seed + 1, number))

    def batch(number: int) -> Mapping[str, Tensor]:
        rows = drawn_rows(len(pictures), training.rows, number, training.seed)
        return {"pictures": pictures[rows], "targets": targets[rows], "net": turn(number)}

    def outer(module: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
        net = pool[int(given["net"])].net.eval().requires_grad_(False)
        answers = ridge_answers(net(given["pictures"]), net(learned.pictures), learned.targets, s.ridge)
        net.requires_grad_(True)
        return F.mse_loss(answers, given["targets"])

    def after(progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        losses.append(progress.last)
        which = int(turn(progress.step - 1))
        pool[which].learn(learned.pictures.detach(), learned.targets.detach())
        if pool[which].steps >= s.longest:
            pool[which] = student()

    fit(learned, batch, training, loss=outer, after_step=after, device=pictures.device, bar=bar)
    return DistilledSet(learned.pictures.detach(), learned.targets.detach(), torch.tensor(losses), s)


@torch.no_grad()
def _features_of(make: MakeNet, pictures: Float[Tensor, "N C H W"]) -> int:
    found = make(0).eval()(pictures[:2])
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise InputError("the networks to be taught must give features [B, P]; flatten what they put out.")
    return found.shape[1]
