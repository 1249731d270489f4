"""Products with the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_one_of, is_number
from ._measurement import LossFn, Measurement, Part, check_tensors

__all__ = ["check_method", "hvp", "moves_along"]


def hvp(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    v: Sequence[Tensor],
    *,
    params: Iterable[Tensor] | None = None,
    method: str = "autograd",
    step: float | None = None,
    progress: bool | None = None,
) -> list[Tensor]:
    """Product ``H v`` of the Hessian of the mean loss and a vector.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        v: tensors like the parameters.
        method: "autograd" differentiates twice. "finite_difference" takes ``(g(w + h v) - g(w - h v)) / (2 h)``: for
            models with operators that cannot be differentiated twice, as fused attention. It costs two gradients, errs
            by O(h^2), and sees the kinks of ReLU that lie within the step.
        step: ``h`` > 0; default ``cbrt(eps) (1 + ||w||) / ||v||`` with the machine epsilon of the parameters' type.

    Returns:
        Tensors like the parameters.

    Raises:
        RuntimeError: an operator of the model cannot be differentiated twice.
        TypeError, ValueError: an argument cannot be used; the message names it.
    """
    difference = check_method(method, step)
    with Measurement(model, loss_fn, data, params, "H v", 2 if difference else 1, progress) as m:
        vectors = check_tensors("v", v, m.params)
        if not difference:
            return m.hvp(vectors)
        length = m.norm(vectors)
        if length == 0.0:
            return m.zeros()
        h = float(step or m.step_size(length))
        return m.difference(*moves_along(m, vectors, h), h)


Move = Callable[[Part, Tensor], object]


def moves_along(m: Measurement, vectors: Sequence[Tensor], h: float) -> tuple[Move, Move]:
    """What :meth:`Measurement.moved` takes to go to ``w + h v`` and to ``w - h v``."""

    def plus(part: Part, backup: Tensor) -> None:
        one = torch.ones((), dtype=torch.float64, device=part.device)
        ops.sam_ascend_(part.of(m.params), part.of(vectors), backup, one, h, eps=0.0)

    def minus(part: Part, backup: Tensor) -> None:  # a step of SGD along v: an ascent has no negative radius
        ops.restore_sgd_(part.of(m.params), part.of(vectors), (), backup, h)

    return plus, minus


def check_method(method: str, step: float | None) -> bool:
    """Whether ``method`` is that of finite differences."""
    check_one_of("method", method, ("autograd", "finite_difference"))
    if step is not None and not (is_number(step) and 0.0 < step < math.inf):
        raise ValueError(f"step: {step!r} given; give a finite float > 0, or None for the default")
    return method == "finite_difference"
