"""The generalised Gauss-Newton matrix: the Hessian without the curvature of the model.

``G = mean over the batches of J' (d^2 loss / d outputs^2) J``, with J the derivative of the model's outputs by its
parameters (Schraudolph 2002; Martens, arXiv 1412.1193, section 8). Positive semi-definite where the loss is convex in
the outputs, as the cross-entropy and the squared error are; for the cross-entropy it is also the Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._matrix import Matrix, directional_differences, jacobian_product, transposed_product
from ._measurement import Measurement, refuse_once_differentiable, second

__all__ = ["GGN"]


def _outputs(m: Measurement, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
    outputs, targets = m.outputs(inputs, targets)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise TypeError(
            f"model: returned a {type(outputs).__name__}; matrix='ggn' needs one tensor of real numbers, by which the "
            "loss is differentiated (where it is part of something else, curvature.Batches(data, forward=...) takes it "
            "out)"
        )
    return outputs, targets


def _loss_gradient(m: Measurement, outputs: Tensor, targets: Any, create_graph: bool) -> Tensor | None:
    """By the outputs; None if the loss does not depend on them."""
    loss = m.loss_of(outputs, targets)
    if not loss.requires_grad:
        return None
    if create_graph:
        refuse_once_differentiable(loss)
    return torch.autograd.grad(loss, outputs, create_graph=create_graph, allow_unused=True)[0]


def _batch(m: Measurement, inputs: Any, targets: Any, vectors: Sequence[Tensor]) -> list[Tensor | None]:
    outputs, targets = _outputs(m, inputs, targets)
    tangent = jacobian_product(outputs, m.params, vectors)
    free = outputs.detach().requires_grad_()
    slope = _loss_gradient(m, free, targets, create_graph=True)
    if slope is None or not slope.requires_grad:  # linear in the outputs
        return [None] * len(m.params)
    cotangent = second([slope], [free], [tangent])[0]
    if cotangent is None:
        return [None] * len(m.params)
    return transposed_product(outputs, m.params, cotangent)


def _difference(m: Measurement, vectors: Sequence[Tensor], h: float) -> list[Tensor]:
    """The outputs along ``v`` in two passes, and in a third the gradient of the loss along that change of the outputs:
    the loss need not be differentiable twice either."""
    tangents = iter(directional_differences(m, vectors, h, lambda *batch: _wide(_outputs(m, *batch)[0])))

    def term(inputs: Any, targets: Any) -> list[Tensor | None]:
        outputs, targets = _outputs(m, inputs, targets)
        tangent = next(tangents)
        length = float(torch.linalg.vector_norm(tangent))
        if length == 0.0:
            return [None] * len(m.params)
        at = _wide(outputs.detach())
        t = torch.finfo(at.dtype).eps ** (1.0 / 3.0) * (1.0 + float(torch.linalg.vector_norm(at))) / length
        slopes = [
            _loss_gradient(m, (at + s * t * tangent).requires_grad_(), targets, create_graph=False) for s in (1, -1)
        ]
        if slopes[0] is None or slopes[1] is None:
            return [None] * len(m.params)
        return transposed_product(outputs, m.params, (slopes[0] - slopes[1]) / (2.0 * t))

    return m.mean(term)


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


GGN = Matrix("generalised Gauss-Newton matrix", _batch, _difference, 3)
