"""What makes a matrix of the second order: its product with a vector, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._hvp import moves_along
from ._measurement import Measurement, refuse_once_differentiable, second

__all__ = ["Matrix", "directional_differences", "jacobian_product", "transposed_product"]

#: ``batch(m, inputs, targets, vectors)``: the product with the matrix of one batch, a list like the parameters.
BatchProduct = Callable[[Measurement, Any, Any, Sequence[Tensor]], Sequence["Tensor | None"]]
#: ``difference(m, vectors, h)``: the product with the matrix of all of the data, with steps of ``h v``.
DifferenceProduct = Callable[[Measurement, Sequence[Tensor], float], "list[Tensor]"]


class Matrix(NamedTuple):
    """A symmetric matrix, the mean over the data of matrices of its batches.

    Attributes:
        name: for people.
        batch: its product by automatic differentiation.
        difference: its product by finite differences, which differentiates nothing twice.
        passes: over the data that one ``difference`` makes.
    """

    name: str
    batch: BatchProduct
    difference: DifferenceProduct
    passes: int


def jacobian_product(outputs: Tensor, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """``J v``, J the derivative of ``outputs`` by the parameters. The graph of ``outputs`` is kept.

    ``J' u`` is linear in u, and its derivative by u, transposed, is J: two backward passes, and neither forward mode
    nor another forward pass, which would draw other dropout masks.
    """
    if not outputs.requires_grad:
        return torch.zeros_like(outputs)
    refuse_once_differentiable(outputs)
    u = torch.zeros_like(outputs, requires_grad=True)
    transposed = torch.autograd.grad(outputs, list(params), u, create_graph=True, allow_unused=True)
    pairs = [(g, v.to(g.dtype)) for g, v in zip(transposed, vectors, strict=True) if g is not None and g.requires_grad]
    product = second([g for g, _ in pairs], [u], [v for _, v in pairs])[0] if pairs else None
    return torch.zeros_like(outputs) if product is None else product


def directional_differences(
    m: Measurement, vectors: Sequence[Tensor], h: float, function: Callable[[Any, Any], Tensor]
) -> list[Tensor]:
    """``(f(w + h v) - f(w - h v)) / (2 h)`` of each batch, where ``f = function(inputs, targets)``: two passes, whose
    results are held for all of the data."""
    plus, minus = moves_along(m, vectors, h)
    with torch.no_grad():
        with m.moved(plus):
            ahead = [function(inputs, targets) for inputs, targets, _ in m.batches()]
        with m.moved(minus):
            for i, (inputs, targets, _) in enumerate(m.batches()):
                ahead[i] = (ahead[i] - function(inputs, targets)) / (2.0 * h)
    return ahead


def transposed_product(outputs: Tensor, params: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    """``J' u``."""
    if not outputs.requires_grad:
        return [None] * len(params)
    return list(torch.autograd.grad(outputs, list(params), cotangent.to(outputs.dtype), allow_unused=True))
