"""The tangent kernel of a model with a linear head, split into what the head learns and what the features learn (#42).

Tomihari and Sato, arXiv:2405.16747. For logits f = V phi(x) + b with C classes, phi in R^D, theta the trunk's parameters,

    Theta = P + F      P(x, x') = (<phi(x), phi(x')> + 1) I_C        the head's part: V and b
                       F(x, x') = V J(x) J(x')^T V^T,  J = d phi / d theta [D, |theta|]        the features' part
    one step of gradient descent of rate eta on sum_i nll_i moves, with delta_i = onehot(y_i) - softmax(f(x_i)),
                       logits by eta sum_i Theta(x, x_i) delta_i,    features by eta sum_i J(x) J(x_i)^T V^T delta_i
    LoRA, W + B A with B = 0 and A [r, in] from N(0, s^2):   E F_LoRA = s^2 r F, F of the adapted matrices

F is quadratic in the size of V, the move of the features is linear in it (at the same delta). `kernel_split` makes the kernels,
for a few examples; `step_parts` makes the two sums alone, by one backward pass and one product with J, for models of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from manyheads.learning import LinearHead

Features = Callable[[], Tensor]  # phi of the examples [N, D], with gradients


@dataclass(frozen=True)
class KernelSplit:
    """`head` P and `features` F, each [N, N, C, C]: the effect on logit c of example i of pushing logit d of example j."""

    head: Float[Tensor, "N N C C"]
    features: Float[Tensor, "N N C C"]

    @property
    def whole(self) -> Float[Tensor, "N N C C"]:
        """Theta."""
        return self.head + self.features


@dataclass(frozen=True)
class StepParts:
    """What one step of rate 1 moves, to first order: logits through the head, logits through the features, and the features."""

    by_head: Float[Tensor, "N C"]
    by_features: Float[Tensor, "N C"]
    features: Float[Tensor, "N D"]

    @property
    def ft_ratio(self) -> float:
        """mean_x |sum_i F delta_i| / |sum_i Theta delta_i|: 1 where only the features move the logits."""
        whole = (self.by_head + self.by_features).norm(dim=1).clamp_min(1e-30)
        return float((self.by_features.norm(dim=1) / whole).mean())


def kernel_split(features: Features, parameters: Sequence[nn.Parameter], head: LinearHead) -> KernelSplit:
    """P and F of the examples whose features `features()` returns. N D backward passes, and N D |theta| numbers in memory.

    Dropout must be off.
    """
    phi, jacobian = _jacobian(features, parameters)
    flat = torch.cat([part.flatten(2) for part in jacobian], 2)  # [N, D, |theta|]
    weight, classes = head.linear.weight.detach(), head.linear.weight.shape[0]
    through = torch.einsum("cd,ndp->ncp", weight, flat)
    own = torch.einsum("nm,cd->nmcd", _inner(phi, head), torch.eye(classes).to(phi))
    return KernelSplit(own, torch.einsum("ncp,mdp->nmcd", through, through))


def lora_kernel(
    features: Features, weights: Sequence[nn.Parameter], head: LinearHead, *, rank: int, std: float, seed: int = 0
) -> Float[Tensor, "N N C C"]:
    """F of LoRA at its start on the matrices `weights` [out, in]: only B learns then, through a random A."""
    _, jacobian = _jacobian(features, weights)
    draw = torch.Generator().manual_seed(seed)
    down = [std * torch.randn(rank, part.shape[-1], generator=draw).to(part) for part in jacobian]
    flat = torch.cat([(part @ A.T).flatten(2) for part, A in zip(jacobian, down, strict=True)], 2)
    through = torch.einsum("cd,ndp->ncp", head.linear.weight.detach(), flat)
    return torch.einsum("ncp,mdp->nmcd", through, through)


def step_parts(
    features: Features, parameters: Sequence[nn.Parameter], head: LinearHead, labels: Int[Tensor, "N"]
) -> StepParts:
    """The two sums over all examples, without the kernels. Dropout must be off."""
    weight = head.linear.weight.detach()
    with _differentiable():
        phi = features()
        logits = head(phi.detach()).detach()
        delta = F.one_hot(labels, logits.shape[1]).to(logits) - logits.softmax(1)
        # J^T u for u = V^T delta, and then J of that. J^T is linear in u, so J v is the gradient of <J^T u, v> by u.
        u = (delta @ weight).requires_grad_()
        back = torch.autograd.grad(phi, parameters, u, create_graph=True, allow_unused=True)
        inner = sum((g * g.detach()).sum() for g in back if g is not None)
        moved = torch.autograd.grad(inner, u)[0] if isinstance(inner, Tensor) else torch.zeros_like(phi)
    phi = phi.detach()
    return StepParts(_inner(phi, head) @ delta, moved @ weight.T, moved)


def _inner(phi: Tensor, head: LinearHead) -> Tensor:
    """<phi, phi'>, and 1 for the bias where there is one."""
    return phi @ phi.T + (head.linear.bias is not None)


def _jacobian(features: Features, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Phi [N, D], and of every parameter d phi / d parameter [N, D, *shape]."""
    phi = features()
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in phi.flatten()]
    return phi.detach(), [torch.stack(parts).unflatten(0, phi.shape) for parts in zip(*rows, strict=True)]


@contextmanager
def _differentiable() -> Iterator[None]:
    """Second derivatives: PyTorch's fused attention has none."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield
