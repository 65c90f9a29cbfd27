"""Balances: how the losses of several heads add up to what trains the trunk they share.

With weighted losses l_1 .. l_H, the heads' gradients g_h at the trunk's parameters and their Gram matrix G_hk = <g_h, g_k>,

    Equal            sum_h l_h
    Uncertainty      sum_h exp(-s_h) l_h + s_h / 2,   s learned            Kendall et al., arXiv:1705.07115
    GradNorm         w_h so that w_h |g_h| comes near  mean(w |g|) r_h^alpha,   r_h = (l_h / l_h(0)) / mean of these
                                                                           Chen et al., arXiv:1711.02257
    PCGrad           each g_h less its part along every g_k with <g_h, g_k> < 0, in a random order, then their sum
                                                                           Yu et al., arXiv:2001.06782

What needs gradients gets only their Gram matrix, and answers by a coefficient a head: the trunk's gradient is sum_h c_h g_h. So a
new balance is a few lines, and those of TorchJD work through `Weighting`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.inputs import check_number


class Balance(nn.Module):
    """Adds the losses up as they are. Others override `total`, or `coefficients` with `needs_gradients` set.

    `which` are the numbers of the heads that the losses belong to: not every head trains at every step.
    """

    needs_gradients = False

    def begin(self, heads: int) -> None:
        """Called once before training, with the number of all heads."""

    def total(self, losses: Float[Tensor, "H"], which: list[int]) -> Float[Tensor, ""]:
        """What is minimised."""
        return losses.sum()

    def coefficients(
        self, losses: Float[Tensor, "H"], gram: Float[Tensor, "H H"], which: list[int]
    ) -> Float[Tensor, "H"]:
        """c_h of the formulas above."""
        return torch.ones_like(losses)


class Equal(Balance):
    """The weighted losses as they are."""


class Uncertainty(Balance):
    """Learned weights exp(-s_h). A squared error has twice the weight here that the paper gives it, which only shifts s.

    `s_h` (`log_variances`) start at 0 and are learned at the run's rate, so 1e-3 moves them by about .001 a step.
    """

    def begin(self, heads: int) -> None:
        """One s_h for each head."""
        self.log_variances = nn.Parameter(torch.zeros(heads))

    def total(self, losses: Float[Tensor, "H"], which: list[int]) -> Float[Tensor, ""]:
        """The formula above."""
        s = self.log_variances[which]
        return (torch.exp(-s) * losses + s / 2).sum()


class GradNorm(Balance):
    """Weights that bring the heads' gradients to one size. `alpha` is how much faster heads that lag behind train.

    w moves by signed steps of `rate`, whose gradient is that of sum_h |w_h |g_h| - target_h|, and is brought back to the sum H.
    The paper uses the last shared layer and Adam; here it is all of the trunk, and plain steps. The heads' own layers train on
    unweighted losses, which under Adam makes no difference.
    """

    needs_gradients = True
    weights: Tensor
    first: Tensor

    def __init__(self, alpha: float = 1.5, rate: float = 0.025) -> None:
        super().__init__()
        self.alpha, self.rate = check_number(alpha, "alpha", 0.0), check_number(rate, "rate", 0.0)

    def begin(self, heads: int) -> None:
        """Weights of 1, and no first losses yet."""
        self.register_buffer("weights", torch.ones(heads))
        self.register_buffer("first", torch.zeros(heads))

    def coefficients(
        self, losses: Float[Tensor, "H"], gram: Float[Tensor, "H H"], which: list[int]
    ) -> Float[Tensor, "H"]:
        """The weights of this step; then they move."""
        first: Tensor = self.first[which]
        self.first[which] = torch.where(first > 0, first, losses)
        used: Tensor = self.weights[which]
        sizes = used * gram.diagonal().clamp_min(0).sqrt()
        pace = losses / self.first[which].clamp_min(1e-12)
        target = sizes.mean() * (pace / pace.mean()) ** self.alpha
        self.weights[which] = (used - self.rate * torch.sign(sizes - target)).clamp_min(1e-3)
        self.weights.mul_(len(self.weights) / self.weights.sum())
        return used


class PCGrad(Balance):
    """Projects each head's gradient onto the normal plane of every original one that conflicts with it, in random order."""

    needs_gradients = True

    def coefficients(
        self, losses: Float[Tensor, "H"], gram: Float[Tensor, "H H"], which: list[int]
    ) -> Float[Tensor, "H"]:
        """The projected gradients stay in the span of the given ones: row h of `c` has their coordinates."""
        size = len(gram)
        c = torch.eye(size, dtype=gram.dtype, device=gram.device)
        for h in range(size):
            for k in torch.randperm(size).tolist():
                along = c[h] @ gram[:, k]  # <the projected g_h, the original g_k>
                if k != h and along < 0:
                    c[h, k] -= along / gram[k, k]
        return c.sum(0)


class Weighting(Balance):
    """Any function of the Gram matrix `[H, H]` to coefficients `[H]`, such as TorchJD's Gramian weightings.

    from torchjd.aggregation import UPGradWeighting
    heads.fit(..., balance=Weighting(UPGradWeighting()))
    """

    needs_gradients = True

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weigh = weigh

    def coefficients(
        self, losses: Float[Tensor, "H"], gram: Float[Tensor, "H H"], which: list[int]
    ) -> Float[Tensor, "H"]:
        """What the function says. `InputError` unless it says one number a head."""
        found = self.weigh(gram)
        if found.shape != losses.shape:
            raise InputError(
                f"the weighting gave shape {list(found.shape)}; expected one number for each of {len(gram)} heads."
            )
        return found.to(losses)
