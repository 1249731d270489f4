"""Orthonormal vectors as the rows of one matrix: the vector work of every method here is a product with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._devices import on_device
from ._linear_operator import SymmetricOperator

__all__ = ["Basis", "norm"]

#: Columns at a time: a piece of a vector stays in cache between the two products, a conversion needs no second basis,
#: and sums in float32 stay short.
_COLUMNS_CPU, _COLUMNS = 1 << 16, 1 << 22
#: At most, of Gram-Schmidt after the second with vectors in 16 bits.
_PASSES = 8


def norm(v: Tensor) -> float:
    """Accumulated in float64 where the device has it."""
    return float(ops.norm([v]))


class Basis:
    """Up to ``size`` orthonormal vectors.

    Args:
        A: the operator whose vectors these are: it has their length, type and device.
        size: how many at most.
        dtype: that of what is kept; the vectors are rounded to it. None for that of the operator.
        device: of what is kept, None for that of the operator.
    """

    def __init__(self, A: SymmetricOperator, size: int, dtype: torch.dtype | None = None, device: Any = None) -> None:
        self.dtype, self.device = _dtype(A), A.device
        kept = torch.device(device) if device is not None else A.device
        self.rows = torch.empty(size, A.shape[0], dtype=dtype or self.dtype, device=kept)
        self.coarse = self.rows.element_size() < 4
        self.count = 0
        self._agree = getattr(A, "agree", lambda numbers: numbers)
        self._columns = _COLUMNS_CPU if kept.type == "cpu" else _COLUMNS

    def row(self, i: int) -> Tensor:
        """As the operator takes it."""
        return on_device(self.rows[i], self.device).to(self.dtype)

    def start(self, v: Tensor) -> None:
        """Anew, from ``v / ||v||``."""
        self.count = 0
        self.append(v, norm(v))

    def append(self, v: Tensor, length: float) -> None:
        """``v / length``, of norm 1."""
        self.rows[self.count].copy_(v / length)
        self.count += 1

    def orthogonalise(self, w: Tensor) -> tuple[Tensor, float]:
        """Take the basis out of ``w``, in place: its coefficients (float64, on the CPU) and the norm of what is left.

        Gram-Schmidt in two passes (Parlett 1998, section 6.9: twice is enough), each a product with the matrix and one
        with its transpose. Vectors that are kept in 16 bits are orthonormal to their rounding only, and a pass leaves
        that share of what it takes out: passes go on until one leaves the length as it is.
        """
        if self.count == 0:
            return torch.zeros(0, dtype=torch.float64), self._number(norm(w))
        v = on_device(w, self.rows.device)
        coefficients = self._take_out(v)
        coefficients += self._take_out(v)
        if self.coarse:
            before, after = math.inf, self._number(norm(v))
            for _ in range(_PASSES):
                if not 0.0 < after < 0.7 * before:
                    break
                coefficients += self._take_out(v)
                before, after = after, self._number(norm(v))
        if v is not w:
            w.copy_(v)
        shared = self._agree(torch.cat([coefficients, torch.tensor([norm(w)], dtype=torch.float64)]))
        return shared[:-1], float(shared[-1])

    def coefficients(self, w: Tensor) -> Tensor:
        """Of ``w``, float64, on the CPU."""
        v = on_device(w, self.rows.device)
        sums = [block @ v[columns] for block, columns in self._blocks(v.dtype)]
        return torch.stack(sums).to("cpu", torch.float64).sum(0)

    def combine(self, y: Tensor, out: Tensor | None = None) -> Tensor:
        """``y' V`` as rows, for y of shape (count, k), float64 on the CPU. Into ``out``, or in place of the first k."""
        target = self.rows if out is None else out
        y = on_device(y.t().contiguous(), self.rows.device).to(self.dtype)
        for block, columns in self._blocks(self.dtype):
            target[: len(y), columns] = (y @ block).to(target.device, target.dtype)
        if out is None:
            self.count = len(y)
        return target[: len(y)]

    def _take_out(self, v: Tensor) -> Tensor:
        coefficients = self.coefficients(v)
        narrow = on_device(coefficients.to(v.dtype), v.device)
        for block, columns in self._blocks(v.dtype):
            v[columns].addmv_(block.t(), narrow, alpha=-1.0)
        return coefficients

    def _blocks(self, dtype: torch.dtype) -> Any:
        n = self.rows.shape[1]
        for start in range(0, n, self._columns):
            columns = slice(start, min(start + self._columns, n))
            yield self.rows[: self.count, columns].to(dtype), columns

    def _number(self, x: float) -> float:
        return float(self._agree(torch.tensor([x], dtype=torch.float64))[0])


def _dtype(A: SymmetricOperator) -> torch.dtype:
    """Of the operator's vectors: that of a SciPy operator is NumPy's."""
    return getattr(A, "work_dtype", None) or A.dtype
