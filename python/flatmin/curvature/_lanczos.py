"""Extreme eigenvalues by the Lanczos method with restarts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_int, check_one_of, check_size
from .._devices import on_device
from ._arguments import check_seed
from ._basis import Basis, norm
from ._linear_operator import CurvatureOperator, SymmetricOperator, operator_of, random_vector
from ._measurement import LossFn, check_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Eigenvalues", "check_basis", "eigenvalues", "lanczos", "next_vector"]

#: Random numbers for vectors that start a run, and for those that go on after a breakdown. See docs/random.md.
STARTS, BREAKDOWNS = 4, 5

_WHICH = ("largest", "smallest", "both", "magnitude")


@dataclass(frozen=True, repr=False)
class Eigenvalues:
    """Some eigenvalues of a symmetric matrix, in descending algebraic order.

    Attributes:
        values: the eigenvalues, in units of the loss over those of the weights squared.
        residuals: ``||A x - theta x||`` for each, x of norm 1: an eigenvalue of A lies within this distance of
            ``theta``.
        converged: for each, whether the residual is within the tolerance.
        which: what was asked for.
        products: with a vector, that it took.
        vectors: for each value its vector, a list like the parameters (one tensor for a matrix); None if not asked for.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    which: str
    products: int
    vectors: list[Any] | None = None

    @property
    def lambda_1(self) -> float:
        """The largest value."""
        return self.values[0]

    @property
    def lambda_1_over_lambda_5(self) -> float:
        """How far the largest stands out (Foret et al. 2021, arXiv 2010.01412, figure 3). For which = "largest" or
        "both" and k >= 5."""
        if self.which not in ("largest", "both") or len(self.values) < (5 if self.which == "largest" else 10):
            raise ValueError("lambda_1_over_lambda_5: needs the five largest; ask for k >= 5 of which='largest'")
        return self.values[0] / self.values[4] if self.values[4] else math.inf

    def __repr__(self) -> str:
        rows = "\n".join(
            f"  {value: .6e}  +- {residual:.1e}{'' if done else '  not converged'}"
            for value, residual, done in zip(self.values, self.residuals, self.converged, strict=True)
        )
        return f"Eigenvalues ({self.which}, {self.products} products, value and residual):\n{rows}"


def eigenvalues(
    model: nn.Module | SymmetricOperator,
    loss_fn: LossFn | None = None,
    data: Any = None,
    *,
    k: int = 5,
    which: str = "largest",
    vectors: bool = False,
    tol: float = 1e-3,
    params: Iterable[Tensor] | None = None,
    matrix: str | None = None,
    method: str | None = None,
    step: float | None = None,
    micro_batch: int | None = None,
    process_group: ProcessGroup | None = None,
    start: Any = None,
    basis_size: int | None = None,
    basis_device: Any = None,
    basis_dtype: torch.dtype | None = None,
    max_products: int | None = None,
    check: bool | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Eigenvalues:
    """Extreme eigenvalues of the Hessian, or of another matrix, each with an error bound.

    Lanczos with full reorthogonalisation and thick restarts (Wu and Simon 2000). It asks after every product whether it
    may stop. Of an eigenvalue that the matrix has several times, all are found where the Krylov space is exhausted, as
    it is where there are few distinct eigenvalues; else, as with every Krylov method of single vectors, it may be
    listed once.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. Or ``model`` is a :func:`linear_operator`,
            or a symmetric matrix as a tensor; then what belongs to the operator is left out.
        k: how many >= 1.
        which: "largest" or "smallest", algebraically; "both", k of each; "magnitude", k of the largest absolute value.
        vectors: return them too: k copies of the parameters.
        tol: a value has converged when its residual is at most ``tol`` times its absolute value, or of the size of
            the products' rounding.
        matrix, method, step, micro_batch, process_group: as in :func:`linear_operator`; by default the Hessian, by
            automatic differentiation.
        start: where to start: an earlier result with its vectors, or a list of vectors, or one. Near the new ones they
            save most of the products: about k are left.
        basis_size: how many vectors are kept between restarts; default the larger of 40 and 2 k + 20.
        basis_device, basis_dtype: where and as what they are kept, for models whose basis does not fit: "cpu",
            ``torch.bfloat16``. Products and coefficients keep the type of the parameters, or float32. In bfloat16 no
            residual gets far below 0.001 of the largest eigenvalue, and below 0.008 of it counts as converged; the
            error of a value is of the order of its residual squared over its distance to the others.
        max_products: stop after so many; default ten times ``basis_size``.
        check: compute the residuals from one more product for each value, instead of from the recurrence. Default:
            only for a ``basis_dtype`` of 16 bits, whose rounding the recurrence does not see.
        seed: of the start.

    Returns:
        :class:`Eigenvalues`. Where not all have converged, they say so and a ``RuntimeWarning`` is given.

    Raises:
        RuntimeError: an operator of the model cannot be differentiated twice.
        TypeError, ValueError: an argument cannot be used, or a product is not finite; the message names it.
    """
    check_one_of("which", which, _WHICH)
    check_int("k", k, 1)
    check_size("tol", tol)
    check_seed(seed)
    for name, count in (("basis_size", basis_size), ("max_products", max_products)):
        if count is not None:
            check_int(name, count, 1)
    options: dict[str, Any] = {"params": params, "matrix": matrix, "method": method, "step": step}
    options |= {"micro_batch": micro_batch, "process_group": process_group, "progress": progress}
    planned = max_products or 10 * (basis_size or max(40, 2 * k + 20))
    with operator_of(model, loss_fn, data, "Lanczos", planned, **options) as A:
        return lanczos(
            A,
            k,
            which,
            tol,
            vectors=vectors,
            start=start,
            basis_size=basis_size,
            basis_device=basis_device,
            basis_dtype=basis_dtype,
            max_products=max_products,
            check=check,
            seed=seed,
        )


def check_basis(basis_dtype: torch.dtype | None) -> None:
    if basis_dtype is not None and not (isinstance(basis_dtype, torch.dtype) and basis_dtype.is_floating_point):
        raise TypeError(f"basis_dtype: {basis_dtype!r} given; give a floating-point torch.dtype, as torch.bfloat16")


def lanczos(
    A: SymmetricOperator,
    k: int,
    which: str,
    tol: float,
    *,
    vectors: bool = False,
    start: Any = None,
    basis_size: int | None = None,
    basis_device: Any = None,
    basis_dtype: torch.dtype | None = None,
    max_products: int | None = None,
    check: bool | None = None,
    seed: int = 0,
) -> Eigenvalues:
    """:func:`eigenvalues` of an operator."""
    n, wanted = A.shape[0], 2 * k if which == "both" else k
    if wanted > n:
        raise ValueError(f"k: {wanted} eigenvalues asked for of a matrix of {n}; ask for fewer")
    check_basis(basis_dtype)
    size = min(n, max(40, 2 * wanted + 20)) if basis_size is None else basis_size
    if size < min(n, wanted + 2):
        raise ValueError(f"basis_size: {size} given; {wanted} eigenvalues need at least {min(n, wanted + 2)} vectors")
    if max_products is not None:
        check_int("max_products", max_products, wanted)
    size = min(size, n)
    run = _Run(A, k, which, tol, Basis(A, size, basis_dtype, basis_device), seed)
    run.begin(start)
    limit = max_products or 10 * size
    while not run.step():
        if run.products >= limit:
            break
    if check is None:
        check = run.basis.rows.dtype in (torch.bfloat16, torch.float16)
    return run.result(vectors, check)


class _Run:
    """A Lanczos run: the basis V, and ``T = V A V'`` of which all but the last residual is known."""

    def __init__(self, A: SymmetricOperator, k: int, which: str, tol: float, basis: Basis, seed: int) -> None:
        self.A, self.k, self.which, self.tol, self.basis, self.seed = A, k, which, tol, basis, seed
        size = len(basis.rows)
        self.t = torch.zeros(size, size, dtype=torch.float64)
        self.products = self.breakdowns = 0
        self.scale = 0.0
        epsilon = torch.finfo(basis.dtype).eps
        # Relative to ||A||: what rounding leaves of a vector that is 0; what counts as converged whatever ``tol`` says.
        self.nothing = 50.0 * epsilon * (A.shape[0] ** 0.5 if epsilon < 1e-10 else 1.0)
        self.floor = max(2.0 * self.nothing, torch.finfo(basis.rows.dtype).eps)
        self.dropped = 0.0
        # how much of each vector belongs to the Krylov space since the last one was exhausted
        self.current = torch.ones(size, dtype=torch.float64)

    def begin(self, start: Any) -> None:
        v = random_vector(self.A, self.seed, 0, STARTS, "normal")
        if start is not None:
            # a sum of eigenvectors spans them all; the random part finds what has come up since
            v = _sum_of(self.A, start) + v * (_FRESH / norm(v))
        self._append(v, norm(v))

    def _append(self, v: Tensor, length: float) -> None:
        if not 0.0 < length < math.inf:
            raise ValueError(f"start: has norm {length:g}; give vectors that are finite and not 0")
        self.basis.append(v, length)

    def step(self) -> bool:
        """One product. Whether all that is wanted has converged."""
        basis, t = self.basis, self.t
        if self.products and not self._room():
            return True
        j = basis.count - 1
        w, coefficients, beta = next_vector(self.A, basis)
        self.products += 1
        t[j, j] = coefficients[j]
        self.scale = max(self.scale, float(torch.linalg.vector_norm(coefficients)), beta)
        self.beta, self.w = beta, w
        self.values, self.y = torch.linalg.eigh(t[: j + 1, : j + 1])
        self.own = beta * self.y[-1].abs()  # without what breakdowns have left out of the vectors before them
        self.residuals = torch.hypot(self.own, torch.tensor(self.dropped, dtype=torch.float64))
        self.broken = basis.count == self.A.shape[0]
        found = self._wanted()
        done = self._within()[found]
        if hasattr(self.A, "note"):
            worst = float(self.residuals[found].max())
            self.A.note(f"{int(done.sum())} of {len(found)} converged, largest residual {worst:.1e}")
        complete = bool(done.all()) and len(found) == min(len(self._keys()) * self.k, self.A.shape[0])
        self.broken = self.broken or beta <= self.nothing * self.scale
        # what is left of the last vector may be rounding, and more than nothing: then all that there is has converged
        self.exhausted = self.broken or bool((self.own <= self._allowed(self.values)).all())
        return (complete and self._no_more()) or basis.count == self.A.shape[0]

    def _room(self) -> bool:
        """Put the next vector into the basis, which a restart shortens where it is full; False if there is none."""
        basis, t = self.basis, self.t
        j = basis.count
        border = torch.zeros(j, dtype=torch.float64)
        border[-1] = 1.0
        if j == len(basis.rows):
            keep = self._kept()
            basis.combine(self.y[:, keep])
            j = basis.count
            t.zero_()
            t[:j, :j] = torch.diag(self.values[keep])
            border = self.y[-1, keep]
            self.current[:j] = self.current[: len(self.y)] @ self.y[:, keep] ** 2
        if self.exhausted:
            self.current[:j] = 0.0
        if self.broken:
            self.breakdowns += 1
            self.dropped = math.hypot(self.dropped, self.beta)
            if not self._fresh_vector():
                return False
        else:
            basis.append(self.w, self.beta)
            del self.w  # a product needs memory of its own
            t[j, :j] = t[:j, j] = self.beta * border
        self.current[j] = 1.0
        return True

    def _fresh_vector(self) -> bool:
        """A random vector orthogonal to all so far: A leaves the space of the others as it is."""
        v = random_vector(self.A, self.seed, self.breakdowns, BREAKDOWNS, "normal")
        whole = norm(v)
        _, length = self.basis.orthogonalise(v)
        for _ in range(2):  # the first may leave little of it, and rounding in that
            if length <= self.nothing * whole:
                return False
            v /= length
            _, length = self.basis.orthogonalise(v)
        self.basis.append(v, length)
        return True

    # -- what is wanted --------------------------------------------------------------------------------------------

    def _keys(self) -> list[Tensor]:
        """What is to be largest."""
        keys = {"largest": [self.values], "smallest": [-self.values], "magnitude": [self.values.abs()]}
        return keys.get(self.which, [self.values, -self.values])

    def _best(self, count: int) -> list[int]:
        """The positions of the ``count`` best of each kind, ascending."""
        size = len(self.values)
        count = min(count, size)
        if self.which == "magnitude":
            return sorted(self.values.abs().argsort(descending=True)[:count].tolist())
        high = range(size - count, size) if self.which != "smallest" else range(0)
        low = range(count) if self.which != "largest" else range(0)
        return sorted({*high, *low})

    def _wanted(self) -> list[int]:
        """The positions of the values asked for, from the largest to the smallest."""
        return self._best(self.k)[::-1]

    def _kept(self) -> list[int]:
        """What goes on after a restart: what is wanted, and of the rest the next ones."""
        size, kinds = len(self.values), 2 if self.which == "both" else 1
        wanted = kinds * self.k
        return self._best(max(self.k, min(wanted + (2 * (size - wanted)) // 5, size - 1) // kinds))

    def _allowed(self, values: Tensor) -> Tensor:
        """The largest residuals at which they have converged."""
        return torch.clamp(self.tol * values.abs(), min=math.hypot(self.floor * self.scale, self.dropped))

    def _within(self) -> Tensor:
        return self.residuals <= self._allowed(self.values)

    def _no_more(self) -> bool:
        """Whether what is wanted is not only a part of what the whole space holds.

        Where a Krylov space is exhausted the rest of the space may hold more of the same, or better: the best that the
        run has found there must have converged too, and where that is exhausted as well be less than what is wanted.
        """
        mass = self.current[: len(self.values)] @ self.y**2
        here = (mass > 0.5).nonzero().flatten()
        for key in self._keys():
            if not len(here):
                return False
            top = int(here[key[here].argmax()])
            if self.own[top] > self._allowed(self.values[top]):
                return False
            if self.exhausted:
                least = float(key.sort(descending=True).values[self.k - 1])
                if float(key[top]) > least + self.floor * self.scale:
                    return False
        return True

    # -- the result ------------------------------------------------------------------------------------------------

    def result(self, vectors: bool, check: bool) -> Eigenvalues:
        del self.w
        found = self._wanted()
        values, residuals = self.values[found], self.residuals[found]
        x = self._empty(len(found)) if vectors else None
        if x is not None:
            self.basis.combine(self.y[:, found], out=x)
        if check:
            # one vector at a time where none is asked for
            pairs = [self._residual(self._vector(i) if x is None else x[j]) for j, i in enumerate(found)]
            values = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
            residuals = torch.tensor([residual for _, residual in pairs], dtype=torch.float64)
            order = values.argsort(descending=True)
            values, residuals = values[order], residuals[order]
            if x is not None and order.tolist() != list(range(len(found))):
                x = x[order.to(x.device)]
        within = residuals <= self._allowed(values)
        if not bool(within.all()):
            warnings.warn(
                f"eigenvalues: {int((~within).sum())} of {len(found)} have not converged to tol={self.tol:g} after "
                f"{self.products} products; give more max_products, a larger tol or basis_size",
                RuntimeWarning,
                stacklevel=4,
            )
        return Eigenvalues(
            tuple(values.tolist()),
            tuple(residuals.tolist()),
            tuple(within.tolist()),
            self.which,
            self.products,
            [self._shaped(row) for row in x] if vectors and x is not None else None,
        )

    def _empty(self, count: int) -> Tensor:
        """Room for vectors, where and at least as finely as the basis is kept."""
        kept = self.basis.rows
        dtype = torch.promote_types(kept.dtype, torch.float32)
        return torch.empty(count, kept.shape[1], dtype=dtype, device=kept.device)

    def _vector(self, i: int) -> Tensor:
        return self.basis.combine(self.y[:, [i]], out=self._empty(1))[0]

    def _residual(self, row: Tensor) -> tuple[float, float]:
        """The value and its residual. ``row`` is what is normalised, where the operator takes it as it is."""
        v = on_device(row, self.basis.device).to(self.basis.dtype)
        v.div_(norm(v))
        w = self.A @ v
        self.products += 1
        value = float((v.to(torch.float64) @ w.to(torch.float64)) if v.device.type != "mps" else v @ w)
        return value, norm(w.sub_(v, alpha=value))

    def _shaped(self, row: Tensor) -> Any:
        return self.A.unflatten(row, device=row.device) if isinstance(self.A, CurvatureOperator) else row


def next_vector(A: SymmetricOperator, basis: Basis) -> tuple[Tensor, Tensor, float]:
    """``A v`` of the last vector without its parts along the basis, these parts, and the norm of what is left."""
    w = A @ basis.row(basis.count - 1)
    coefficients, beta = basis.orthogonalise(w)
    if not math.isfinite(beta):
        raise ValueError("model: a product with the matrix is not finite; check it for NaN and infinity")
    return w, coefficients, beta


#: Norm of the random part of a start, beside that of the vectors given.
_FRESH = 0.1


def _sum_of(A: SymmetricOperator, start: Any) -> Tensor:
    """Of vectors to start from, each scaled to norm 1, over the root of their number."""
    if isinstance(start, Eigenvalues):
        if start.vectors is None:
            raise ValueError("start: holds no vectors; compute them with vectors=True")
        start = start.vectors
    dtype = getattr(A, "work_dtype", None) or A.dtype
    total, count = None, 0
    for given in _flat_vectors(A, start):
        v = on_device(given.detach(), A.device, dtype)
        length = norm(v)
        if not 0.0 < length < math.inf:
            raise ValueError(f"start: a vector has norm {length:g}; give vectors that are finite and not 0")
        total = v / length if total is None else total.add_(v / length)
        count += 1
    assert total is not None
    return total.div_(count**0.5)


def _flat_vectors(A: SymmetricOperator, start: Any) -> Iterator[Tensor]:
    """One at a time: they may be as many as the basis holds."""
    n = A.shape[0]
    if isinstance(start, Tensor):
        if start.shape[-1:] != (n,) or start.dim() > 2:
            raise ValueError(f"start: a tensor of shape {tuple(start.shape)} given; give ({n},) or (k, {n})")
        yield from start.reshape(-1, n)
        return
    if not isinstance(start, Sequence) or not start:
        raise TypeError("start: give an earlier result of eigenvalues, a vector, or a list of vectors")
    if (
        isinstance(start[0], Tensor)
        and isinstance(A, CurvatureOperator)
        and len(start) == len(A.params)
        and (start[0].shape == A.params[0].shape)
    ):
        on_devices = [t.to(p.device) for t, p in zip(start, A.params, strict=True)]
        yield A.flatten(check_tensors("start", on_devices, A.params))
        return
    for item in start:
        yield from _flat_vectors(A, item)
