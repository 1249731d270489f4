"""The density of all eigenvalues, and sums over them, by stochastic Lanczos quadrature."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_int
from ._arguments import check_seed
from ._basis import Basis
from ._lanczos import check_basis, next_vector
from ._linear_operator import SymmetricOperator, operator_of, random_vector
from ._measurement import LossFn
from ._probes import ScalarEstimate, scalar_estimate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SpectralDensity", "quadrature", "spectral_density"]

#: From the ends of the spectrum to those of the grid, in widths of a bump.
_MARGIN = 5.0


@dataclass(frozen=True, repr=False)
class SpectralDensity:
    """The spectrum of a symmetric matrix as nodes and weights, one set for each random probe.

    For any function f the sum of ``weights f(nodes)`` of a probe v estimates ``v' f(A) v / ||v||^2``, whose
    mean over v is ``trace f(A) / n``. It is exact for polynomials up to a degree of 2 steps - 1 (Golub and Meurant
    1994).

    Attributes:
        nodes: for each probe, ascending, float64; in units of the loss over those of the weights squared.
        weights: the same; those of a probe sum to 1.
        dimension: n, the number of eigenvalues.
        products: with a vector, that it took.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    dimension: int
    products: int

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> ScalarEstimate:
        """``trace f(A)``, the sum of f over all eigenvalues, with its standard error over the probes.

        ``f`` takes and returns a float64 tensor::

            density.trace_of(lambda x: x)                                  # the trace
            density.trace_of(lambda x: torch.log(x + 1e-3))                # log-determinant of A + 0.001
            density.trace_of(lambda x: -torch.log(1 - lr * x / 2) / (2 * lr))  # R(theta) of label noise, at rate lr

        The last is the regulariser of Damian et al. 2021 (arXiv 2106.06530); it is NaN or infinite where
        ``lr lambda_1 >= 2``. Where f is not smooth on the spectrum, as the logarithm near 0, the quadrature errs too:
        compare with more steps.
        """
        return scalar_estimate([self.dimension * x for x in self._means(f)])

    def mass_below(self, threshold: float) -> ScalarEstimate:
        """The share of the eigenvalues below ``threshold``, with its standard error over the probes."""
        return scalar_estimate(self._means(lambda x: (x < threshold).to(torch.float64)))

    @property
    def negative_mass(self) -> ScalarEstimate:
        """The share of the eigenvalues below 0: by more than a millionth of the largest absolute value, so that the
        rounding of those that are 0 does not count.

        Where most eigenvalues are near 0, as in a large net, one node of few steps stands for all of these and may lie
        on either side: take more steps, or ``mass_below(-0.01 * lambda_1)``, which does not see them.
        """
        return self.mass_below(-1e-6 * max(float(x.abs().max()) for x in self.nodes))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest node of all probes: within the spectrum, and near its ends."""
        return min(float(x[0]) for x in self.nodes), max(float(x[-1]) for x in self.nodes)

    def on_grid(self, points: int = 1000, sigma: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The density as a function, each node a Gaussian bump: for a plot.

        Args:
            points: of the grid, which leaves five widths on both sides.
            sigma: the width of the bumps; default 0.01 of the range of the nodes.

        Returns:
            Where, the density there (it integrates to 1), and its standard error over the probes (NaN of one probe).
        """
        check_int("points", points, 2)
        low, high = self.range
        if sigma is None:
            sigma = 0.01 * (high - low) or 0.01 * abs(high) or 1.0
        if not 0.0 < sigma < math.inf:
            raise ValueError(f"sigma: {sigma} given; give a finite float > 0, or None for the default")
        grid = torch.linspace(low - _MARGIN * sigma, high + _MARGIN * sigma, points, dtype=torch.float64)
        scale = 1.0 / (sigma * math.sqrt(2.0 * math.pi))
        each = torch.stack(
            [
                scale * torch.exp(-0.5 * ((grid[:, None] - x) / sigma) ** 2) @ tau
                for x, tau in zip(self.nodes, self.weights, strict=True)
            ]
        )
        spread = each.std(0) / len(each) ** 0.5 if len(each) > 1 else torch.full_like(grid, math.nan)
        return grid, each.mean(0), spread

    def plot(self, path: Any = None, *, points: int = 1000, sigma: float | None = None) -> Any:
        """Draw the density, on a linear and on a logarithmic axis.

        Args:
            path: of a file to write, any type that matplotlib knows; None for none.
            points, sigma: as in :meth:`on_grid`.

        Returns:
            The :class:`matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            figure_module = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError("plot() draws with matplotlib: pip install matplotlib") from error
        grid, value, stderr = (x.numpy() for x in self.on_grid(points, sigma))
        figure = figure_module.Figure(figsize=(11.0, 4.2), dpi=150, layout="constrained")
        for axis, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
            axis.plot(grid, value, color="#33658a", linewidth=1.4)
            if len(self.nodes) > 1:
                axis.fill_between(
                    grid, (value - 1.96 * stderr).clip(min=0.0), value + 1.96 * stderr, color="#86bbd8", alpha=0.6,
                    linewidth=0.0, label="95 % interval over the probes",
                )  # fmt: skip
            axis.axvline(0.0, color="#444444", linewidth=0.8, linestyle=":")
            axis.set_xlabel("eigenvalue / (loss / weight$^2$)")
            axis.set_yscale(scale)
            axis.spines[["top", "right"]].set_visible(False)
        left, right = figure.axes
        left.set_ylim(bottom=0.0)
        right.set_ylim(bottom=0.1 / self.dimension * float(value.max()) if self.dimension > 1 else None)
        left.set_ylabel("density / (weight$^2$ / loss)")
        below = self.negative_mass
        left.set_title(
            f"{self.dimension:,} eigenvalues, {len(self.nodes)} probe{'s' if len(self.nodes) > 1 else ''}", fontsize=11
        )
        spread = "" if math.isnan(below.stderr) else rf" $\pm$ {100.0 * below.stderr:.2g}"
        right.set_title(f"below 0: {100.0 * below.value:.3g}{spread} % of the eigenvalues", fontsize=11)
        if len(self.nodes) > 1:
            left.legend(fontsize=8, frameon=False)
        if path is not None:
            figure.savefig(path)
        return figure

    def __repr__(self) -> str:
        low, high = self.range
        trace, below = self.trace_of(lambda x: x), self.negative_mass
        return (
            f"SpectralDensity ({self.dimension} eigenvalues, {len(self.nodes)} probes, {self.products} products):\n"
            f"  range  {low:.6g} to {high:.6g}\n"
            f"  trace  {trace.value:.6g} +- {trace.stderr:.2g}\n"
            f"  below 0  {100.0 * below.value:.3g} % +- {100.0 * below.stderr:.2g} %"
        )

    def _means(self, f: Callable[[Tensor], Tensor]) -> list[float]:
        """Of f over the eigenvalues, from each probe."""
        results = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            values = f(nodes.clone())
            if not isinstance(values, Tensor) or values.shape != nodes.shape:
                raise TypeError(f"f: returned a {type(values).__name__} for a tensor; return a tensor of its shape")
            # a node of weight 0 is none: there f may be infinite
            results.append(float(torch.where(weights > 0.0, weights * values, 0.0).sum()))
        return results


def spectral_density(
    model: nn.Module | SymmetricOperator,
    loss_fn: LossFn | None = None,
    data: Any = None,
    *,
    probes: int = 10,
    steps: int = 50,
    params: Iterable[Tensor] | None = None,
    matrix: str | None = None,
    method: str | None = None,
    step: float | None = None,
    micro_batch: int | None = None,
    process_group: ProcessGroup | None = None,
    basis_device: Any = None,
    basis_dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues of the Hessian, or of another matrix, by stochastic Lanczos quadrature.

    For each probe, ``steps`` steps of Lanczos with full reorthogonalisation from a Rademacher vector; the eigenvalues
    of the tridiagonal matrix are the nodes, the squared first components of its eigenvectors the weights (Ghorbani et
    al. 2019, arXiv 1901.10159). It takes ``probes`` times ``steps`` products, fewer where a Krylov space is exhausted.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. Or ``model`` is a :func:`linear_operator`,
            or a symmetric matrix as a tensor; then what belongs to the operator is left out.
        probes: random vectors >= 1; the standard errors are over them.
        steps: of Lanczos for each, >= 1: how finely the spectrum is resolved.
        matrix, method, step, micro_batch, process_group: as in :func:`linear_operator`.
        basis_device, basis_dtype: as in :func:`eigenvalues`; ``steps`` vectors are kept.
        seed: of the probes.

    Returns:
        :class:`SpectralDensity`.
    """
    check_int("probes", probes, 1)
    check_int("steps", steps, 1)
    check_seed(seed)
    check_basis(basis_dtype)
    options: dict[str, Any] = {"params": params, "matrix": matrix, "method": method, "step": step}
    options |= {"micro_batch": micro_batch, "process_group": process_group, "progress": progress}
    with operator_of(model, loss_fn, data, "spectral density", probes * steps, **options) as A:
        basis = Basis(A, min(steps, A.shape[0]), basis_dtype, basis_device)
        rules = []
        for draw in range(probes):
            if hasattr(A, "note"):
                A.note(f"probe {draw + 1} of {probes}")
            basis.start(random_vector(A, seed, draw, 0, "rademacher"))
            rules.append(quadrature(A, basis))
        products = sum(count for _, _, count in rules)
        return SpectralDensity(
            tuple(nodes for nodes, _, _ in rules), tuple(weights for _, weights, _ in rules), A.shape[0], products
        )


def quadrature(A: SymmetricOperator, basis: Basis) -> tuple[Tensor, Tensor, int]:
    """Nodes and weights of the Gauss rule of A and the only vector of ``basis``, with as many steps as that has room
    for, and the products that it took."""
    size = len(basis.rows)
    t = torch.zeros(size, size, dtype=torch.float64)
    scale, epsilon = 0.0, torch.finfo(basis.dtype).eps
    for j in range(size):
        w, coefficients, beta = next_vector(A, basis)
        t[j, j] = coefficients[j]
        scale = max(scale, float(torch.linalg.vector_norm(coefficients)), beta)
        if j + 1 == size or beta <= 10.0 * epsilon * scale:  # the Krylov space is exhausted, and the rule exact
            break
        t[j, j + 1] = t[j + 1, j] = beta
        basis.append(w, beta)
        del w  # a product needs memory of its own
    nodes, vectors = torch.linalg.eigh(t[: j + 1, : j + 1])
    return nodes, vectors[0] ** 2, j + 1
