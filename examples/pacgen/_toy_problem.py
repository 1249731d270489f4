"""The surfaces of toy_surface.py: data, the network with two free weights, its exact Hessians, PACGen and the bound."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from _common.runs import seed_of
from flatmin import ops

GAMMA = EPS = 0.1
LAYERS, POINTS, DELTA = 5, 100, 0.05
HELD = 6.0  # and held values within +-HELD: larger ones make steps of the sigmoids
# Which entries of the matrix are free: its diagonal, a row, a column, or its other diagonal.
FREE = ((0, 3), (0, 1), (0, 2), (1, 2))

FINE = 141  # points along each axis of the relief, which needs no Hessian
REAL = torch.float64


class Problem(NamedTuple):
    """A surface. ``x`` [n, 2], ``y`` [n] in {0, 1}, mixture ``means`` and ``scales`` [3, 2], ``level`` of the density
    that separates the labels, ``free`` positions in the matrix, and ``held`` values at the other two."""

    number: int
    x: Tensor
    y: Tensor
    means: Tensor
    scales: Tensor
    level: Tensor
    free: tuple[int, int]
    held: tuple[float, float]

    def density(self, x: Tensor) -> Tensor:
        """Of the mixture at ``x`` [..., 2], up to a constant factor."""
        z = (x.unsqueeze(-2) - self.means) / self.scales
        return (torch.exp(-0.5 * z.square().sum(-1)) / self.scales.prod(-1)).mean(-1)


def make_problem(seed: int, number: int) -> Problem:
    """The ``number``-th problem of a search: data, free entries and held values all follow from the two integers."""
    g = torch.Generator().manual_seed(seed_of("toy", seed, number))
    means = 4.0 * torch.rand(3, 2, generator=g, dtype=REAL) - 2.0
    scales = 0.4 + 0.6 * torch.rand(3, 2, generator=g, dtype=REAL)
    component = torch.randint(0, 3, (POINTS,), generator=g)
    x = means[component] + scales[component] * torch.randn(POINTS, 2, generator=g, dtype=REAL)
    held = (2.0 * HELD * torch.rand(2, generator=g, dtype=REAL) - HELD).tolist()
    free = FREE[int(torch.randint(0, len(FREE), (), generator=g))]
    problem = Problem(number, x, torch.zeros(POINTS), means, scales, torch.zeros(()), free, (held[0], held[1]))
    density = problem.density(x)
    level = density.quantile(0.5)
    return problem._replace(y=(density > level).to(x.dtype), level=level)


# ---- the network ----


def margin(w: Tensor, problem: Problem, x: Tensor) -> Tensor:
    """Logit of label 1 less logit of label 0: [..., n] for weights [..., 2] and points [n, 2]."""
    held = iter(problem.held)
    entries = (w[..., problem.free.index(i), None] if i in problem.free else next(held) for i in range(4))
    a, b, c, d = entries
    # written out: a batched product of 2x2 matrices takes ten times as long
    h0, h1 = a * x[:, 0] + b * x[:, 1], c * x[:, 0] + d * x[:, 1]
    for _ in range(LAYERS - 1):
        h0, h1 = torch.sigmoid(h0), torch.sigmoid(h1)
        h0, h1 = a * h0 + b * h1, c * h0 + d * h1
    return h1 - h0


def loss(w: Tensor, problem: Problem) -> Tensor:
    """Mean cross-entropy in nats, [...] for weights [..., 2]."""
    sign = 2.0 * problem.y.to(w.dtype) - 1.0
    return F.softplus(-sign * margin(w, problem, problem.x.to(w.dtype))).mean(-1)


def gradients(w: Tensor, problem: Problem) -> Tensor:
    """[n, 2] for weights [n, 2]."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(w, problem).sum(), w)[0]


def hessians(w: Tensor, problem: Problem, chunk: int = 512) -> Tensor:
    """Exact, [n, 2, 2] for weights [n, 2], by differentiating twice.

    No two of the n losses share a weight, so the gradient of their sum holds the gradient of each. In chunks whose
    temporaries stay in the cache: all at once takes twice as long.
    """
    rows = []
    for v in w.detach().split(chunk):
        v.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(v, problem).sum(), v, create_graph=True)
        parts = [torch.autograd.grad(gradient[:, i].sum(), v, retain_graph=i == 0)[0] for i in range(2)]
        rows.append(torch.stack(parts, 1))
    return torch.cat(rows) if rows else w.new_zeros(0, 2, 2)


# ---- PACGen ----


def neighbourhood(w: Tensor) -> Tensor:
    """``N_i = gamma |w_i| + eps``."""
    return GAMMA * w.abs() + EPS


def lipschitz(w: Tensor, hessian: Tensor, problem: Problem, steps: int = 9) -> Tensor:
    """Lipschitz constant of the Hessian in the neighbourhood of each of the weights [n, 2].

    The largest ``||H(w + u) - H(w)||_2 / ||u||_2`` over a grid of ``steps`` x ``steps`` points of the box
    ``|u_i| <= N_i``, all with exact Hessians.
    """
    axis = torch.linspace(-1.0, 1.0, steps, dtype=REAL)
    u = torch.cartesian_prod(axis, axis)
    u = u[u.abs().sum(1) > 0] * neighbourhood(w).unsqueeze(1)
    there = hessians((w.unsqueeze(1) + u).flatten(0, 1), problem).unflatten(0, u.shape[:2])
    return (spectral_norm(there - hessian.unsqueeze(1)) / u.norm(dim=-1)).amax(1)


def spectral_norm(a: Tensor) -> Tensor:
    """Of symmetric 2x2 matrices, from the closed form of their eigenvalues: 20 times as fast as an SVD of each."""
    mean, half = (a[..., 0, 0] + a[..., 1, 1]) / 2, (a[..., 0, 0] - a[..., 1, 1]) / 2
    return mean.abs() + torch.hypot(half, a[..., 0, 1])


def pacgen(w: Tensor, problem: Problem) -> dict[str, Tensor]:
    """The metric at each of the weights [n, 2], with what it is made of.

    Every point is a list entry of :func:`flatmin.ops.pacgen`, so one call does the whole surface. "pressure" is
    ``c_i N_i^2``: above 1, curvature limits the noise of a weight; below, the edge of the neighbourhood does.
    """
    hessian = hessians(w, problem)
    rho = lipschitz(w, hessian, problem)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    rhos = rho.unsqueeze(1).expand_as(w).contiguous()
    psi = ops.pacgen(list(w), list(diagonal.contiguous()), gamma=GAMMA, eps=EPS, lipschitz=list(rhos))[:, 0]
    n = neighbourhood(w)
    pressure = (diagonal + rhos * n).clamp(min=0.0) * n.square()
    return {"hessian": hessian, "lipschitz": rho, "psi": psi, "pressure": pressure}


def bound(loss_values: Any, psi: Any, eta: float) -> Any:
    """``L + (Psi + log(1 / delta)) / eta + eta / (2 n)``: loss and metric-based bound, for n points."""
    return loss_values + (psi + math.log(1.0 / DELTA)) / eta + eta / (2.0 * POINTS)


def best_eta(loss_values: Any, psi: Any) -> float:
    """The eta that makes the lowest point of the bound's surface lowest: ``sqrt(2 n (Psi + log(1 / delta)))`` at the
    point where the bound, at its own best eta, is lowest."""
    best = np.sqrt(2.0 * POINTS * (psi + math.log(1.0 / DELTA)))
    lowest = np.unravel_index(np.argmin(loss_values + best / POINTS), best.shape)
    return float(best[lowest])
