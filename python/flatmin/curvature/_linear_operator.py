"""The matrix of a model as a linear operator: what Lanczos, quadrature and traces are written for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_int, check_one_of
from .._devices import on_device
from ._fisher import FISHER
from ._ggn import GGN
from ._hessian import HESSIAN
from ._hvp import check_method
from ._matrix import Matrix
from ._measurement import LossFn, Measurement, check_tensors, names_of, refuse_not_finite, shared_by
from ._microbatches import micro_batches

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CurvatureOperator", "SymmetricOperator", "linear_operator", "operator_of", "random_vector"]

_MATRICES: dict[str, Matrix] = {"hessian": HESSIAN, "ggn": GGN, "fisher": FISHER}


class SymmetricOperator(Protocol):
    """What the methods take: a symmetric matrix that can be multiplied by a vector. A square tensor is one too."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __matmul__(self, other: Any, /) -> Any: ...


class CurvatureOperator:
    """The Hessian, the generalised Gauss-Newton matrix or the empirical Fisher matrix of a mean loss, as an operator.

    Vectors are flat, ``A @ v`` with v of shape (n,), or (n, k) for k vectors; or lists of tensors like the parameters,
    ``A.matvec(list)``. The type of the answer is that of the question; NumPy's arrays are taken too.

    As a context manager (``with A:``) it saves the state of the model once for all products and restores it at the
    end; the weights must not change meanwhile. Outside of a ``with`` block every product does so for itself.

    See :func:`linear_operator` for the arguments.

    Attributes:
        shape: (n, n), n the number of elements of the parameters.
        dtype: of flat vectors: float32, or float64 if a parameter is.
        device: of flat vectors: that of the first parameter.
        params: the parameters, in order.
        names: theirs, as in ``model.named_parameters()``.
        products: with a vector, so far.
    """

    device: torch.device
    dtype: Any
    shape: tuple[int, int]

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        *,
        params: Iterable[Tensor] | None = None,
        matrix: str = "hessian",
        method: str = "autograd",
        step: float | None = None,
        micro_batch: int | None = None,
        process_group: ProcessGroup | None = None,
        progress: bool | None = None,
        label: str = "",
        planned: int = 1,
    ) -> None:
        check_one_of("matrix", matrix, tuple(_MATRICES))
        self.matrix = _MATRICES[matrix]
        self._difference, self._step = check_method(method, step), step
        model, self.process_group = shared_by(model, process_group)
        if micro_batch is not None:
            check_int("micro_batch", micro_batch, 1)
            data = micro_batches(data, micro_batch)
        passes = planned * (self.matrix.passes if self._difference else 1)
        if params is not None and not isinstance(params, Tensor):
            params = list(params)
        checked = Measurement(model, loss_fn, data, params, "", progress=False)
        label = label or f"{self.matrix.name} v"
        self._make = partial(Measurement, model, loss_fn, data, params, label, passes, progress)
        self.params, self.parts = checked.params, checked.parts
        self.names = names_of(model, self.params)
        self.work_dtype = torch.float32
        for p in self.params:
            self.work_dtype = torch.promote_types(self.work_dtype, p.dtype)
        self.device = self.params[0].device
        self._sizes = [p.numel() for p in self.params]
        self._open: Measurement | None = None
        self.products = 0
        n = sum(self._sizes)
        self._describe(n)

    def _describe(self, n: int) -> None:
        self.shape, self.dtype = (n, n), self.work_dtype

    # -- the state of the model ------------------------------------------------------------------------------------

    def __enter__(self) -> CurvatureOperator:
        if self._open is not None:
            raise RuntimeError("linear_operator: its with block is entered already")
        self._open = self._make().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        measurement, self._open = self._open, None
        if measurement is not None:
            measurement.__exit__(*exception)

    def _measuring(self) -> AbstractContextManager[Measurement]:
        return self._make() if self._open is None else nullcontext(self._open)

    def note(self, text: str) -> None:
        """Show ``text`` beside the progress bar."""
        if self._open is not None:
            self._open.note(text)

    # -- vectors ---------------------------------------------------------------------------------------------------

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """A list like the parameters as one vector."""
        return torch.cat([on_device(t.detach(), self.device).reshape(-1).to(self.work_dtype) for t in tensors])

    def unflatten(self, v: Tensor, *, device: torch.device | None = None) -> list[Tensor]:
        """A vector as a list like the parameters, on their devices or on ``device``: views where they can be."""
        parts = torch.split(v, self._sizes)
        return [on_device(part, device or p.device).view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def probe(self, seed: int, draw: int, purpose: int = 0, law: str = "rademacher") -> Tensor:
        """The ``draw``-th random vector for ``purpose``, the one that :func:`hutchinson_trace` uses for purpose 0."""
        with torch.no_grad():
            tensors = [torch.empty_like(p, dtype=self.work_dtype) for p in self.params]
        for part in self.parts:
            ops.probe_(part.of(tensors), part.key(seed, draw, purpose), distribution=law)
        return self.flatten(tensors)

    # -- products --------------------------------------------------------------------------------------------------

    def matvec(self, v: Any) -> Any:
        """The product with one vector: a list like the parameters, or flat; the answer is of the same kind."""
        if isinstance(v, list | tuple):
            with self._measuring() as m:
                return self.unflatten(self._product(m, check_tensors("v", v, m.params)))
        if not isinstance(v, Tensor):
            return self._from_numpy(v)
        if v.shape != self.shape[:1]:
            raise ValueError(
                f"v: a tensor of shape {tuple(v.shape)} given; give {self.shape[0]} elements in one dimension, or a "
                "list like the parameters"
            )
        with self._measuring() as m:
            wide = on_device(v.detach(), self.device).to(self.work_dtype).contiguous()
            return on_device(self._product(m, self.unflatten(wide)), v.device)

    def __matmul__(self, v: Any) -> Any:
        if isinstance(v, Tensor) and v.dim() == 2:
            return torch.stack([self.matvec(column) for column in v.unbind(1)], dim=1)
        return self.matvec(v)

    def _from_numpy(self, v: Any) -> Any:
        x = torch.as_tensor(v)
        return (self @ (x.squeeze(1) if x.dim() == 2 and x.shape[1] == 1 else x)).view(x.shape).cpu().numpy()

    def _product(self, m: Measurement, vectors: Sequence[Tensor]) -> Tensor:
        """Flat, of all of the data on all of the ranks."""
        if self._difference:
            length = m.norm(vectors)
            if length == 0.0:
                return self.flatten(m.zeros())
            local = self.matrix.difference(m, vectors, self._step or m.step_size(length))
        else:
            local = m.mean(lambda inputs, targets: self.matrix.batch(m, inputs, targets, vectors))
        product = self.flatten(local)
        if self.process_group is not None:
            # a rank counts as many times as it has samples
            count = torch.tensor([float(m.count)], device=self.device)
            product.mul_(count.to(product.dtype))
            torch.distributed.all_reduce(product, group=self.process_group)
            torch.distributed.all_reduce(count, group=self.process_group)
            product.div_(count.to(product.dtype))
        self.products += 1
        if not bool(product.isfinite().all()):
            refuse_not_finite(f"product with the {self.matrix.name}", self.unflatten(product), self.names)
        return product

    def agree(self, numbers: Tensor) -> Tensor:
        """``numbers`` of the group's first rank: what decides when to stop must not differ in the last bit."""
        if self.process_group is None:
            return numbers
        shared = on_device(numbers, self.device)
        source = torch.distributed.get_global_rank(self.process_group, 0)
        torch.distributed.broadcast(shared, source, group=self.process_group)
        return on_device(shared, numbers.device)

    def __getattr__(self, name: str) -> Any:
        if name in ("adjoint", "dot", "matmat", "rmatmat", "rmatvec", "transpose", "H", "T"):
            raise AttributeError(f"{name}: SciPy's LinearOperator has it; pip install scipy")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@cache
def _operator_class() -> type[CurvatureOperator]:
    """The operator that SciPy knows as one of its own, where SciPy is installed."""
    try:
        linalg = importlib.import_module("scipy.sparse.linalg")
    except ImportError:
        return CurvatureOperator
    numpy = importlib.import_module("numpy")

    class ScipyCurvatureOperator(CurvatureOperator, linalg.LinearOperator):  # type: ignore[misc, name-defined]
        """A :class:`CurvatureOperator` that is a ``scipy.sparse.linalg.LinearOperator`` too; its dtype is NumPy's."""

        def _describe(self, n: int) -> None:
            kind = numpy.dtype(str(self.work_dtype).removeprefix("torch."))
            linalg.LinearOperator.__init__(self, kind, (n, n))

        def matvec(self, v: Any) -> Any:
            if isinstance(v, list | tuple | Tensor):
                return super().matvec(v)
            return linalg.LinearOperator.matvec(self, v)

        def __matmul__(self, other: Any) -> Any:
            if isinstance(other, list | tuple | Tensor):
                return CurvatureOperator.__matmul__(self, other)
            return linalg.LinearOperator.__matmul__(self, other)

        def _matvec(self, x: Any) -> Any:
            return self._from_numpy(x)

        def _rmatvec(self, x: Any) -> Any:
            return self._from_numpy(x)

        def _matmat(self, x: Any) -> Any:
            return self._from_numpy(x)

        def _adjoint(self) -> Any:
            return self

        def _transpose(self) -> Any:
            return self

    return ScipyCurvatureOperator


def linear_operator(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    matrix: str = "hessian",
    method: str = "autograd",
    step: float | None = None,
    micro_batch: int | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> CurvatureOperator:
    """A matrix of second derivatives of the mean loss over the data, as an operator that is never formed.

    It is what :func:`eigenvalues`, :func:`spectral_density` and :func:`trace` work with; they also take one in place of
    model, loss and data. Where SciPy is installed it is a ``scipy.sparse.linalg.LinearOperator`` too, for all that
    SciPy can do with one (its NumPy vectors are copied to the model's device and back)::

        with curvature.linear_operator(model, loss_fn, loader, matrix="ggn") as A:
            step, _ = scipy.sparse.linalg.cg(A + 1e-2 * scipy.sparse.linalg.aslinearoperator(scipy.sparse.eye(n)), g)

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. A ``DistributedDataParallel`` brings its
            process group.
        matrix: "hessian"; "ggn", the generalised Gauss-Newton matrix ``J' (d^2 loss / d outputs^2) J`` of models that
            return one tensor; "fisher", the empirical Fisher matrix, the mean over the samples of ``g g'`` with g the
            gradient of one sample's loss (a sample is one item of the targets, with the item of the outputs at the same
            place; ``loss_fn`` is called with batches of one).
        method, step: as in :func:`hvp`. Finite differences take two passes for the Hessian and three for the others,
            hold the change of all outputs (GGN) or losses (Fisher) in memory, and differentiate nothing twice.
        micro_batch: largest number of samples at a time, which bounds the memory; batches are cut along their first
            dimension. In training mode BatchNorm then sees smaller batches, which is another function.
        process_group: each of its ranks brings its share of the data, at least one sample, and all call at the same
            time; a product is the mean over all samples of all ranks. Weights must be the same on all.

    Returns:
        A :class:`CurvatureOperator`.

    Raises:
        RuntimeError: in a product, an operator of the model cannot be differentiated twice.
        TypeError, ValueError: an argument cannot be used; the message names it.
    """
    return _operator_class()(
        model,
        loss_fn,
        data,
        params=params,
        matrix=matrix,
        method=method,
        step=step,
        micro_batch=micro_batch,
        process_group=process_group,
        progress=progress,
    )


@contextmanager
def operator_of(
    model: Any, loss_fn: LossFn | None, data: Any, label: str, planned: int = 1, **options: Any
) -> Iterator[SymmetricOperator]:
    """The operator that a method is called for: of model, loss and data, or ``model`` itself if it is one already.

    ``options`` are those of :func:`linear_operator`, None for what is not given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(model, nn.Module):
        if loss_fn is None or data is None:
            missing = "loss_fn" if loss_fn is None else "data"
            raise TypeError(f"{missing}: not given; a model needs a loss and data to be measured with")
        with CurvatureOperator(model, loss_fn, data, label=label, planned=planned, **given) as entered:
            yield entered
        return
    superfluous = [name for name, value in {"loss_fn": loss_fn, "data": data, **given}.items() if value is not None]
    if isinstance(model, CurvatureOperator):
        _refuse(superfluous)
        with nullcontext() if model._open is not None else model:
            yield model
    elif isinstance(model, Tensor):
        _refuse([name for name in superfluous if name != "progress"])
        if model.dim() != 2 or model.shape[0] != model.shape[1] or not model.is_floating_point():
            raise ValueError(
                f"model: a tensor of shape {tuple(model.shape)} and type {model.dtype} given; a matrix of real numbers "
                "is square"
            )
        yield model.detach()
    else:
        raise TypeError(
            f"model: {type(model).__name__} given; give the torch.nn.Module that is measured, a linear_operator, or a "
            "symmetric matrix as a tensor"
        )


def _refuse(superfluous: Sequence[str]) -> None:
    if superfluous:
        raise TypeError(f"{superfluous[0]}: given beside an operator, which has its own; leave it out")


def random_vector(A: SymmetricOperator, seed: int, draw: int, purpose: int, law: str) -> Tensor:
    """A function of the numbers alone, of unit variance."""
    if isinstance(A, CurvatureOperator):
        return A.probe(seed, draw, purpose, law)
    v = torch.empty(A.shape[0], dtype=A.dtype, device=A.device)
    ops.probe_([v], ops.random_key(seed, draw, purpose << 8, A.device), distribution=law)
    return v
