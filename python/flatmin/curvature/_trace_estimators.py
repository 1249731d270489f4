"""The trace of any operator within a budget of products, and the traces of a model's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_int, check_one_of
from ._arguments import check_seed
from ._basis import Basis
from ._lanczos import check_basis
from ._linear_operator import SymmetricOperator, operator_of, random_vector
from ._measurement import LossFn
from ._probes import ScalarEstimate, scalar_estimate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["estimate_trace", "trace"]


def trace(
    model: nn.Module | SymmetricOperator,
    loss_fn: LossFn | None = None,
    data: Any = None,
    *,
    products: int = 100,
    estimator: str = "hutchinson",
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
) -> ScalarEstimate:
    """The trace of the Hessian, or of another matrix, with its error.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. Or ``model`` is a :func:`linear_operator`,
            or a symmetric matrix as a tensor; then what belongs to the operator is left out.
        products: with a vector, all in all.
        estimator: "hutchinson", the mean of ``<v, A v>`` over Rademacher vectors, whose standard error falls with the
            root of their number; it keeps no vectors. "hutch++" (Meyer et al. 2021, arXiv 2010.09649) takes the trace
            on the range of A times a third of the vectors as it is and samples only the rest. "xtrace" (Epperly, Tropp
            and Webber 2024, arXiv 2301.07825) leaves each of its vectors out once. These two keep ``products`` / 3 and
            / 2 vectors, and err far less where a few eigenvalues carry the trace; of a matrix with no more rows than
            ``products`` they sum the diagonal.
        matrix, method, step, micro_batch, process_group: as in :func:`linear_operator`.
        basis_device, basis_dtype: where and as what the vectors are kept, as in :func:`eigenvalues`.
        seed: of the vectors.

    Returns:
        ``(value, stderr, samples)``, floats; ``.interval()`` is the 95 % confidence interval. ``samples`` counts what
        the standard error is over: the vectors of Hutchinson and XTrace, those of the rest for Hutch++.
    """
    check_one_of("estimator", estimator, tuple(_ESTIMATORS))
    least, _ = _ESTIMATORS[estimator]
    check_int("products", products, least)
    check_seed(seed)
    check_basis(basis_dtype)
    options: dict[str, Any] = {"params": params, "matrix": matrix, "method": method, "step": step}
    options |= {"micro_batch": micro_batch, "process_group": process_group, "progress": progress}
    with operator_of(model, loss_fn, data, f"trace ({estimator})", products, **options) as A:
        return estimate_trace(A, products, estimator, seed, basis_dtype, basis_device)


def estimate_trace(
    A: SymmetricOperator,
    products: int,
    estimator: str,
    seed: int,
    basis_dtype: torch.dtype | None = None,
    basis_device: Any = None,
) -> ScalarEstimate:
    """:func:`trace` of an operator."""

    def probe(draw: int) -> Tensor:
        return random_vector(A, seed, draw, 0, "rademacher")

    def basis(size: int) -> Basis:
        return Basis(A, min(size, A.shape[0]), basis_dtype, basis_device)

    if estimator != "hutchinson" and A.shape[0] <= products:
        return _exact(A)
    return _ESTIMATORS[estimator][1](A, products, probe, basis)


Probe = Callable[[int], Tensor]
NewBasis = Callable[[int], Basis]


def _hutchinson(A: SymmetricOperator, products: int, probe: Probe, basis: NewBasis) -> ScalarEstimate:
    return scalar_estimate([_inner(v, A @ v) for v in map(probe, range(products))])


def _exact(A: SymmetricOperator) -> ScalarEstimate:
    """Element by element: there are no more of them than products."""
    v = torch.zeros_like(random_vector(A, 0, 0, 0, "rademacher"))
    elements = []
    for i in range(len(v)):
        v[i] = 1.0
        elements.append(float((A @ v)[i]))
        v[i] = 0.0
    rounding = 10.0 * torch.finfo(v.dtype).eps * math.fsum(map(abs, elements))
    return ScalarEstimate(math.fsum(elements), rounding, len(v))


def _hutch_pp(A: SymmetricOperator, products: int, probe: Probe, basis: NewBasis) -> ScalarEstimate:
    q = basis(products // 3)
    size = len(q.rows)
    _range(A, q, probe, range(size))
    return _hutch_pp_from(A, q, products, probe, size)


def _hutch_pp_from(A: SymmetricOperator, q: Basis, products: int, probe: Probe, used: int) -> ScalarEstimate:
    """The trace in the span of ``q``, on which ``used`` products are spent, and by Hutchinson's estimator that of the
    rest, with as many as are left."""
    if q.coarse and used < products // 3:  # there is more than rounding to find in the range
        _range(A, q, probe, range(used, products // 3))
        used = products // 3
    h, _ = _compressed(A, q)
    rest = []
    for draw in range(used, products - q.count):
        g = probe(draw)
        q.orthogonalise(g)
        rest.append(_inner(g, A @ g))
    found, inside = scalar_estimate(rest), h.diagonal().tolist()
    return _rounded(found._replace(value=found.value + math.fsum(inside)), inside, q)


def _compressed(A: SymmetricOperator, q: Basis) -> tuple[Tensor, Tensor]:
    """``A`` in the span of ``q``, and the Cholesky factor L of its Gram matrix: vectors in 16 bits are orthonormal to
    their rounding only. ``inv(L) q`` are orthonormal, and what the first result is in terms of."""
    k = q.count
    h = torch.stack([q.coefficients(A @ q.row(i)) for i in range(k)]) if k else torch.zeros(0, 0, dtype=torch.float64)
    h = 0.5 * (h + h.t())
    factor = torch.eye(k, dtype=torch.float64)
    if q.coarse and k:
        gram = torch.stack([q.coefficients(q.row(i)) for i in range(k)])
        factor = torch.linalg.cholesky(0.5 * (gram + gram.t()))
        h = torch.linalg.solve_triangular(factor, h, upper=False)
        h = torch.linalg.solve_triangular(factor, h.t(), upper=False)
    return h, factor


def _xtrace(A: SymmetricOperator, products: int, probe: Probe, basis: NewBasis) -> ScalarEstimate:
    """The mean of estimates that each leave one vector out of the basis and sample with it, all in the space of Q.

    With ``A w_i = Q r_i``, the span of the r_j without r_i is the complement of s_i, the i-th vector of the dual basis.
    Where one adds nothing to the range, that is known, and the rest is sampled as Hutch++ does.
    The estimates share vectors, so their spread alone understates the error of their mean. As each has the right mean
    whatever the other vectors are, the covariance of two is the mean of the product of what w_j does to the i-th and
    w_i to the j-th, which is known too.
    """
    q = basis(products // 2)
    k = len(q.rows)
    r = _range(A, q, probe, range(k), stop=True)
    if q.count < k:
        return _hutch_pp_from(A, q, products, probe, q.count + 1)
    h, factor = _compressed(A, q)
    r = factor.t() @ r
    w = torch.stack([q.coefficients(probe(i)) for i in range(k)], dim=1)
    w = torch.linalg.solve_triangular(factor, w, upper=False)
    inside = h.diagonal().tolist()
    dual = torch.linalg.solve(r.t(), torch.eye(k, dtype=torch.float64)).t()
    dual = dual / torch.linalg.vector_norm(dual, dim=1, keepdim=True)
    single = torch.stack([_without(h, w[:, i], r[:, i], dual[i].expand(1, 1, k)) for i in range(k)]).flatten()
    change = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        others = torch.arange(k) != i
        second = dual[others] - (dual[others] @ dual[i])[:, None] * dual[i]
        second = second - (second @ dual[i])[:, None] * dual[i]
        second = second / torch.linalg.vector_norm(second, dim=1, keepdim=True)
        pairs = torch.stack([dual[i].expand_as(second), second], dim=1)
        change[i, others] = single[i] - _without(h, w[:, i], r[:, i], pairs)
    covariance = float((change * change.t()).sum()) / (k * (k - 1))
    variance = float(single.var()) / k + max(covariance, 0.0)
    return _rounded(ScalarEstimate(float(single.mean()), variance**0.5, k), inside, q)


def _without(h: Tensor, w: Tensor, r: Tensor, e: Tensor) -> Tensor:
    """``trace(P h) + w' (1 - P) A (1 - P) w``, where P leaves out the span of orthonormal vectors: ``e`` of shape
    (sets, vectors in one, dimension). ``A w = r`` in the space of h."""
    along_w, along_r = e @ w, e @ r
    rest = w - (along_w.unsqueeze(-1) * e).sum(-2)
    kept = h.trace() - ((e @ h) * e).sum((-2, -1))
    return kept - w @ r + 2.0 * (along_w * along_r).sum(-1) + ((rest @ h) * rest).sum(-1)


#: The least number of products, and the function.
_ESTIMATORS: dict[str, tuple[int, Callable[[SymmetricOperator, int, Probe, NewBasis], ScalarEstimate]]] = {
    "hutchinson": (1, _hutchinson),
    "hutch++": (6, _hutch_pp),
    "xtrace": (6, _xtrace),
}


def _range(A: SymmetricOperator, q: Basis, probe: Probe, draws: range, stop: bool = False) -> Tensor:
    """Fill ``q`` with an orthonormal basis of ``A w``, a w for each of the draws: the coefficients of these, one column
    each. What is a combination of those before, but for rounding, adds no vector. With ``stop`` it is the last one, and
    rounding is that of the vectors as they are kept, to which the coefficients of those before are known."""
    columns = torch.zeros(len(q.rows), len(draws), dtype=torch.float64)
    least = 100.0 * torch.finfo(q.dtype).eps
    if stop:
        least = max(least, 4.0 * torch.finfo(q.rows.dtype).eps)
    for i, draw in enumerate(draws):
        y = A @ probe(draw)
        coefficients, rest = q.orthogonalise(y)
        columns[: q.count, i] = coefficients
        if rest > least * float(torch.linalg.vector_norm(coefficients)):
            columns[q.count, i] = rest
            q.append(y, rest)
        elif stop:
            break
        del y  # a product needs memory of its own
    return columns[: q.count]


def _rounded(found: ScalarEstimate, inside: Sequence[float], q: Basis) -> ScalarEstimate:
    """With at least the error of rounding, which is left where the vectors hold all of the range."""
    rounding = 10.0 * torch.finfo(q.dtype).eps * math.fsum(map(abs, inside))
    return found._replace(stderr=max(found.stderr, rounding))


def _inner(v: Tensor, w: Tensor) -> float:
    wide = torch.float32 if v.device.type == "mps" else torch.float64
    return float((v * w).sum(dtype=wide))
