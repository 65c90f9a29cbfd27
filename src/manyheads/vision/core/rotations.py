"""Rotations in space: angles of a head, six numbers, distances, and the matrix-Fisher distribution over SO(3).

A rotation `R` `[3, 3]` takes the head's own axes to the camera's: x to the right of the picture, y up, z towards the viewer. So
a picture that is turned in its plane has `M R`, and the nose points to `R e_z`. In 300W-LP's convention, as its users draw it,

    R = Rx(-pitch) Ry(-yaw) Rz(-roll)

a positive pitch lifts the nose, a positive yaw turns it to the left of the picture, a positive roll turns the head clockwise.

The matrix-Fisher distribution with parameter `A` `[3, 3]` has the density `p(R) = exp(tr(A^T R)) / c(s)` against the uniform
distribution, where `A = U diag(s) V^T` with rotations U and V, so that `s3` has the sign of det A. With I0 a Bessel function

    c(s) = int_{-1}^{1} 1/2 I0[(s1-s2)(1-u)/2] I0[(s1+s2)(1+u)/2] exp(s3 u) du
    d_i = d log c / d s_i;   E[R] = U diag(d) V^T;   entropy = log c - sum_i s_i d_i   (0 nats if uniform, negative otherwise)

Mohlin et al., arXiv:2006.11087; Lee, arXiv:1710.03746. The integral is taken by Gauss-Legendre quadrature in double precision
over t, u = 1 - 2 t^2, whose nodes lie close where the integrand of a sure distribution has its peak.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

NODES = 96  # of the quadrature: log c is right to 1e-8 up to a concentration of 1000
OVER = 1.025  # weight of log c in the loss: keeps the network from being surer than it should be (SemiUHPE's code)


def rotation_of_euler(degrees: Float[Tensor, "*B 3"]) -> Float[Tensor, "*B 3 3"]:
    """The rotation of (pitch, yaw, roll) in degrees."""
    c, s = torch.deg2rad(degrees).cos().unbind(-1), torch.deg2rad(degrees).sin().unbind(-1)
    (cp, cy, cr), (sp, sy, sr) = c, s
    rows = [
        [cy * cr, cy * sr, -sy],
        [-cp * sr + sp * sy * cr, cp * cr + sp * sy * sr, sp * cy],
        [sp * sr + cp * sy * cr, -sp * cr + cp * sy * sr, cp * cy],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def euler_of_rotation(rotation: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B 3"]:
    """(pitch, yaw, roll) in degrees, yaw and roll in (-180, 180]; of the two solutions the one with a pitch within 90 degrees.

    Where the head looks straight to a side (yaw of 90 degrees) only pitch and roll together are known: then pitch is 0.
    """
    sy = -rotation[..., 0, 2]
    cy = rotation[..., 1:, 2].norm(dim=-1)
    # |pitch| <= 90 means cos(pitch) >= 0, so cos(yaw) has the sign of R[2, 2]
    sign = torch.where(rotation[..., 2, 2] < 0, -1.0, 1.0)
    free = cy > 1e-6
    yaw = torch.atan2(sy, cy * sign)
    pitch = torch.where(free, torch.atan2(sign * rotation[..., 1, 2], sign * rotation[..., 2, 2]), 0.0)
    roll = torch.where(
        free,
        torch.atan2(sign * rotation[..., 0, 1], sign * rotation[..., 0, 0]),
        torch.atan2(-rotation[..., 1, 0], rotation[..., 1, 1]),
    )
    return torch.rad2deg(torch.stack([pitch, yaw, roll], -1))


def rotation_of_six(six: Float[Tensor, "*B 6"]) -> Float[Tensor, "*B 3 3"]:
    """The rotation whose first two columns are the six numbers, made orthonormal in turn (Zhou et al., arXiv:1812.07035)."""
    a, b = six[..., :3], six[..., 3:]
    x = F.normalize(a, dim=-1)
    y = F.normalize(b - (x * b).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], -1)


def six_of_rotation(rotation: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B 6"]:
    """The first two columns, one after the other."""
    return torch.cat([rotation[..., 0], rotation[..., 1]], -1)


def geodesic(a: Float[Tensor, "*B 3 3"], b: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B"]:
    """The angle of the rotation from a to b, in degrees, 0 to 180. For measuring: it has no useful gradient at 0."""
    # by the chord, |a - b| = 2 sqrt(2) sin(angle / 2), which is exact for small angles where the arc cosine is not
    chord = (a - b).flatten(-2).norm(dim=-1) / 8**0.5
    return torch.rad2deg(2 * torch.asin(chord.clamp(max=1.0)))


def random_rotations(n: int, generator: torch.Generator) -> Float[Tensor, "{n} 3 3"]:
    """Rotations drawn uniformly from all of SO(3)."""
    q = F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=-1)
    w, x, y, z = q.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2).float()


def in_plane(degrees: Float[Tensor, "*B"]) -> Float[Tensor, "*B 3 3"]:
    """The rotation of a picture in its plane, anticlockwise as one sees it: the head then has `in_plane(t) @ R`."""
    c, s, zero = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin(), torch.zeros_like(degrees)
    rows = [[c, -s, zero], [s, c, zero], [zero, zero, zero + 1]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def proper_svd(
    a: Float[Tensor, "*B 3 3"],
) -> tuple[Float[Tensor, "*B 3 3"], Float[Tensor, "*B 3"], Float[Tensor, "*B 3 3"]]:
    """U, s, V^T with rotations U and V^T and s1 >= s2 >= |s3|. Without the signs, the mode might be a reflection."""
    u, s, vt = torch.linalg.svd(a)
    sign_u, sign_v = torch.linalg.det(u).sign(), torch.linalg.det(vt).sign()
    u = torch.cat([u[..., :2], u[..., 2:] * sign_u[..., None, None]], -1)
    vt = torch.cat([vt[..., :2, :], vt[..., 2:, :] * sign_v[..., None, None]], -2)
    return u, torch.cat([s[..., :2], s[..., 2:] * (sign_u * sign_v)[..., None]], -1), vt


def fisher_log_c(s: Float[Tensor, "*B 3"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B 3"]]:
    """Log c(s) and its derivatives d, for proper singular values; both in double precision, without a gradient of their own."""
    s1, s2, s3 = (part[..., None] for part in s.detach().double().unbind(-1))
    u, log_weight = (part.to(s.device) for part in _nodes())
    minus, plus = (1 - u) / 2, (1 + u) / 2
    x, y = (s1 - s2) * minus, (s1 + s2) * plus
    i0x, i0y = torch.special.i0e(x), torch.special.i0e(y)  # scaled by exp(-|.|): nothing overflows
    terms = i0x.log() + x.abs() + i0y.log() + y.abs() + s3 * u + log_weight
    log_c = terms.logsumexp(-1)
    p = (terms - log_c[..., None]).exp()
    rx, ry = torch.special.i1e(x) / i0x, torch.special.i1e(y) / i0y
    d1, d2, d3 = minus * rx + plus * ry, plus * ry - minus * rx, u
    return log_c, torch.stack([(p * d).sum(-1) for d in (d1, d2, d3)], -1)


class _LogC(torch.autograd.Function):
    """log c of A. Its gradient is E[R], which needs no gradient of a singular value decomposition: that has none at ties."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        log_c, mean = _log_c_and_mean(a)
        ctx.save_for_backward(mean)
        return log_c

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mean,) = ctx.saved_tensors
        return grads[0][..., None, None] * mean


def fisher_log_normaliser(a: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B"]:
    """Log c of the parameter A, with the gradient E[R], also where singular values are equal."""
    return _LogC.apply(a)


def fisher_mode(a: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B 3 3"]:
    """The likeliest rotation, `U V^T`."""
    u, _, vt = proper_svd(a.detach())
    return u @ vt


def fisher_mean(a: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B 3 3"]:
    """E[R], which is no rotation: the less is known, the shorter it is."""
    return _log_c_and_mean(a)[1]


def fisher_entropy(a: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B"]:
    """The entropy in nats, 0 for the uniform distribution and negative otherwise. Without gradient."""
    _, s, _ = proper_svd(a.detach().double())
    log_c, d = fisher_log_c(s)
    return (log_c - (s * d).sum(-1)).to(a.dtype)


def fisher_nll(
    a: Float[Tensor, "*B 3 3"], rotation: Float[Tensor, "*B 3 3"], over: float = OVER
) -> Float[Tensor, "*B"]:
    """`over * log c - tr(A^T R)`, in nats: with `over=1` the negative log-likelihood of R against the uniform distribution."""
    return over * fisher_log_normaliser(a) - (a * rotation).sum((-1, -2))


def fisher_cross_entropy(teacher: Float[Tensor, "*B 3 3"], student: Float[Tensor, "*B 3 3"]) -> Float[Tensor, "*B"]:
    """The cross-entropy of the student under the teacher, in nats; no gradient reaches the teacher."""
    return fisher_nll(student, fisher_mean(teacher), over=1.0)


def _log_c_and_mean(a: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vt = proper_svd(a.detach().double())
    log_c, d = fisher_log_c(s)
    return log_c.to(a.dtype), (u @ (d[..., None] * vt)).to(a.dtype)


@cache
def _nodes() -> tuple[Tensor, Tensor]:
    """U at the nodes, and the logarithm of the weights: 1/2 du = 2 t dt, with t between 0 and 1."""
    x, w = np.polynomial.legendre.leggauss(NODES)
    t = (x + 1) / 2
    return torch.from_numpy(1 - 2 * t**2), torch.from_numpy(np.log(2 * t * w / 2))
