"""Keskar's sharpness: the largest loss in a small box around the weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_int, check_size
from ..curvature._arguments import check_seed
from ..curvature._measurement import LossFn, Measurement, shared_by
from ._passes import DIRECTIONS, STARTS, loss_and_gradient, shift

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Keskar", "keskar"]


class Keskar(NamedTuple):
    """What :func:`keskar` found.

    Attributes:
        value: ``100 (worst - loss) / (1 + loss)``, per cent.
        loss: at the weights.
        worst: the largest loss found in the box.
        evaluations: of the loss and its gradient over the data.
    """

    value: float
    loss: float
    worst: float
    evaluations: int


def keskar(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    eps: float = 1e-3,
    *,
    params: Iterable[Tensor] | None = None,
    dim: int | None = None,
    iterations: int = 10,
    restarts: int = 1,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> Keskar:
    """``100 (max_{w + d in C} L - L(w)) / (1 + L(w))`` with the box ``C: |d_i| <= eps (|w_i| + 1)``, by L-BFGS-B
    (Keskar et al. 2017, arXiv 1609.04836, metric 2.1).

    The maximum is over the points tried, ``w`` among them, hence a lower bound and never negative. The search is in
    units of the box, with the slope at its start scaled to 1: otherwise the optimizer takes the small gradient of a
    trained net for a stationary point.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. The loss should be >= 0.
        eps: size of the box > 0; the paper has 1e-3 and 5e-4.
        dim: search in a random subspace of that many dimensions, ``w + A z`` with ``|z_j| <= eps (|(A^+ w)_j| + 1)``
            and A of independent standard normal elements (the paper has 100 and does not state their size). It keeps
            ``dim`` copies of the parameters. None: in the whole space, which keeps about 25 copies in float64 on the
            CPU.
        iterations: of L-BFGS-B, >= 1; the paper has 10. Each takes one pass over the data or a few.
        restarts: searches, >= 1; the first is from ``w``, the others from random points of the box.
        seed: of the subspace and the points.
        process_group: as in :func:`flatmin.curvature.linear_operator`: each rank brings its share of the data.

    Returns:
        ``(value, loss, worst, evaluations)``; ``value`` is NaN if a loss is.

    Raises:
        ImportError: SciPy is not installed.
    """
    check_size("eps", eps)
    if not eps:
        raise ValueError("eps: 0 given; give the size of the box, 1e-3 as in the paper")
    check_int("iterations", iterations, 1)
    check_int("restarts", restarts, 1)
    check_seed(seed)
    if dim is not None:
        check_int("dim", dim, 1)
    try:
        optimize = importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise ImportError("keskar() searches with SciPy: pip install scipy") from error
    model, process_group = shared_by(model, process_group)
    passes = restarts * (iterations + 1)
    with Measurement(model, loss_fn, data, params, "Keskar sharpness", passes, progress, process_group) as m:
        space: _Whole | _Subspace = _Whole(m, eps) if dim is None else _Subspace(m, eps, dim, seed)
        search = _Search(m, space)
        clean = search.losses[0]
        for restart in range(restarts):
            search.start(restart, seed)
            if not math.isfinite(search.largest):
                break
            optimize.minimize(
                search,
                search.z0,
                jac=True,
                method="L-BFGS-B",
                bounds=optimize.Bounds(-1.0, 1.0),
                options={"maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
            )
        worst = search.largest
        return Keskar(100.0 * (worst - clean) / (1.0 + clean), clean, worst, len(search.losses))


class _Whole:
    """All weights, in units of the box: ``d_i = half_i z_i``."""

    def __init__(self, m: Measurement, eps: float) -> None:
        self.m = m
        self.half = torch.cat([_vector(p).abs().add_(1.0).mul_(eps) for p in m.params])
        self.sizes = [p.numel() for p in m.params]

    def offsets(self, z: Tensor) -> list[Tensor]:
        pieces = torch.split(z * self.half, self.sizes)
        return [d.to(o.dtype).view(o.shape) for d, o in zip(pieces, self.m.zeros(), strict=True)]

    def gradient(self, gradient: list[Tensor]) -> Tensor:
        return torch.cat([_vector(g) for g in gradient]).mul_(self.half)

    def random(self, seed: int, draw: int) -> Tensor:
        u = self.m.zeros()
        for part in self.m.parts:
            ops.probe_(part.of(u), part.key(seed, draw, STARTS), distribution="uniform")
        return torch.cat([_vector(t) for t in u])


class _Subspace:
    """``d = A (half o z)``."""

    def __init__(self, m: Measurement, eps: float, dim: int, seed: int) -> None:
        self.m, self.dim = m, dim
        self.columns = [m.zeros() for _ in range(dim)]
        for j, column in enumerate(self.columns):
            for part in m.parts:
                ops.probe_(part.of(column), part.key(seed, j, DIRECTIONS), distribution="normal")
        gram = torch.stack([self._products(column) for column in self.columns])
        # rank-deficient where there are more columns than weights
        coordinates = torch.linalg.pinv(gram, hermitian=True) @ self._products([p.detach() for p in m.params])
        self.half = eps * (coordinates.abs() + 1.0)

    def _products(self, x: list[Tensor]) -> Tensor:
        """``A^T x``."""
        found = [sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(c, x, strict=True)) for c in self.columns]
        return torch.tensor(found, dtype=torch.float64)

    def offsets(self, z: Tensor) -> list[Tensor]:
        d = self.m.zeros()
        for amount, column in zip((z * self.half).tolist(), self.columns, strict=True):
            for t, c in zip(d, column, strict=True):
                t.add_(c, alpha=amount)
        return d

    def gradient(self, gradient: list[Tensor]) -> Tensor:
        products: Tensor = self._products(gradient) * self.half
        return products

    def random(self, seed: int, draw: int) -> Tensor:
        z = torch.zeros(self.dim, dtype=torch.float64)
        ops.probe_([z], ops.random_key(seed, draw, STARTS << 8), distribution="uniform")
        return z


class _Search:
    """The function that SciPy minimises: the loss with its sign changed and its slope at the start scaled to 1."""

    def __init__(self, m: Measurement, space: _Whole | _Subspace) -> None:
        self.m, self.space = m, space
        self.losses: list[float] = []
        self.z0 = torch.zeros_like(space.half).numpy()
        self.scale = 1.0
        self._here = self._at(self.z0)

    @property
    def largest(self) -> float:
        return math.nan if any(map(math.isnan, self.losses)) else max(self.losses)

    def start(self, restart: int, seed: int) -> None:
        """From ``w``, which is evaluated already, or from a random point."""
        if restart:
            self.z0 = self.space.random(seed, restart).numpy()
            self._here = self._at(self.z0)
        slope = self._here[1]
        size = float(slope.norm()) / math.sqrt(len(slope))
        self.scale = 1.0 / size if 0.0 < size < math.inf else 1.0

    def __call__(self, z: Any) -> tuple[float, Any]:
        loss, slope = self._here if (z == self.z0).all() else self._at(z)
        return -self.scale * loss, (-self.scale * slope).numpy()

    def _at(self, z: Any) -> tuple[float, Tensor]:
        with torch.no_grad():
            offsets = self.space.offsets(torch.from_numpy(z))
        with self.m.moved(lambda part, backup: shift(part.of(self.m.params), part.of(offsets))):
            loss, gradient = loss_and_gradient(self.m, self.m.batches())
        self.losses.append(loss)
        return loss, self.space.gradient(gradient)


def _vector(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).to("cpu", torch.float64)
