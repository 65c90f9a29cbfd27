"""What keeps embeddings from falling together, and how one sees that they did.

For z [B, D], a row a picture,

    variance     mean over d of relu(1 - sqrt(var(z_d) + 1e-4))              0 where every column has deviation 1 or more
    covariance   sum over d != e of cov(z)_de^2 / D                          0 where no column tells about another
    evenness     sqrt(D) mean over d of std((z / |z|)_d)                     1 on a sphere evenly, 0 at one point

The first two are VICReg's (Bardes et al., arXiv:2105.04906).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def variance_term(z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """How much columns lack to a deviation of 1."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance_term(z: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """How much columns tell about each other."""
    centred = z - z.mean(0)
    found = centred.T @ centred / (len(z) - 1)
    return (found.square().sum() - found.diagonal().square().sum()) / z.shape[1]


def evenness(z: Float[Tensor, "B D"]) -> float:
    """How evenly directions are spread (formula above)."""
    with torch.no_grad():
        return float(F.normalize(z, dim=1).std(0).mean() * z.shape[1] ** 0.5)
