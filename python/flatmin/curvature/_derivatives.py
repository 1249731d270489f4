"""First and second derivatives of the loss of one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _double_backward
from .._double_backward import explained_double_backward

__all__ = ["MEASURING", "batch_hvp", "gradient", "refuse_once_differentiable", "second"]

#: What to do where a measurement cannot differentiate twice.
MEASURING = (
    "Give method='finite_difference' (every function of flatmin.curvature that takes a method, and pacgen, has it)"
)


def gradient(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """Of a batch; None for parameters that the loss does not use."""
    if not loss.requires_grad:
        return [None] * len(params)
    if create_graph:
        refuse_once_differentiable(loss)
    return list(torch.autograd.grad(loss, list(params), create_graph=create_graph, allow_unused=True))


def second(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    vectors: Sequence[Tensor],
    retain_graph: bool = False,
    advice: str = MEASURING,
) -> list[Tensor | None]:
    """Derivative of ``<grads, vectors>``. ``RuntimeError`` that names the way out where it does not exist."""
    with explained_double_backward(advice):
        return list(
            torch.autograd.grad(grads, list(params), list(vectors), retain_graph=retain_graph, allow_unused=True)
        )


def refuse_once_differentiable(result: Tensor) -> None:
    """``RuntimeError`` that names the way out if ``result`` has no second derivative and torch would not say so."""
    _double_backward.refuse_once_differentiable(result, MEASURING)


def batch_hvp(loss: Tensor, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    """``H v`` of a batch. In a function of its own, so that a batch's graph is gone before the next one is built."""
    pairs = [
        (g, v.to(g.dtype))
        for g, v in zip(gradient(loss, params, create_graph=True), vectors, strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs:  # linear in every parameter
        return [None] * len(params)
    return second([g for g, _ in pairs], params, [v for _, v in pairs])
