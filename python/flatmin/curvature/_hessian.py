"""The Hessian of the mean loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._hvp import moves_along
from ._matrix import Matrix
from ._measurement import Measurement, batch_hvp

__all__ = ["HESSIAN"]


def _batch(m: Measurement, inputs: Any, targets: Any, vectors: Sequence[Tensor]) -> list[Tensor | None]:
    return batch_hvp(m.loss(inputs, targets), m.params, vectors)


def _difference(m: Measurement, vectors: Sequence[Tensor], h: float) -> list[Tensor]:
    return m.difference(*moves_along(m, vectors, h), h)


HESSIAN = Matrix("Hessian", _batch, _difference, 2)
