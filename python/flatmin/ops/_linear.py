"""Linear algebra of whole lists: inner products, and combinations of two or three, each in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_finite
from .._devices import on_device
from ._dispatch import run, scalar

__all__ = ["axpy_", "blend_", "dot", "gram"]


@torch.no_grad()
def gram(*lists: Sequence[Tensor]) -> Tensor:
    """The inner products of two to four lists, each taken over all tensors, in one pass: a Gram matrix.

    ::

        products = ops.gram(g1, g2)              # ||g1||^2, <g1, g2>, ||g2||^2
        cosine = products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()

    Args:
        lists: as many tensors in each, of the sizes of those of the first list and of any floating type.

    Returns:
        float64 of shape (k, k), symmetric: the same bits for every instruction set and thread count. Not finite if an
        element is not. Zeros for empty lists.
    """
    if not 2 <= len(lists) <= 4:
        raise ValueError(f"lists: {len(lists)} given; give 2 to 4 lists of tensors")
    if not lists[0]:
        return torch.zeros(len(lists), len(lists), dtype=torch.float64)
    for i, tensors in enumerate(lists):
        if len(tensors) != len(lists[0]):  # an empty one would be taken for one that is not given
            raise RuntimeError(
                f"lists[{i}] has {len(tensors)} tensors and lists[0] has {len(lists[0])}; give one for each"
            )
    a, b, c, d = [list(tensors) for tensors in lists] + [[] for _ in range(4 - len(lists))]
    products: Tensor = run("dot", a=a, b=b, c=c, d=d)
    return _symmetric(products, len(lists))


def _symmetric(triangle: Tensor, k: int) -> Tensor:
    """The matrix of an upper triangle that is given row by row."""
    at = {(i, j): n for n, (i, j) in enumerate((i, j) for i in range(k) for j in range(i, k))}
    elements = triangle.unbind()
    return torch.stack([elements[at[min(i, j), max(i, j)]] for i in range(k) for j in range(k)]).view(k, k)


@torch.no_grad()
def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists, float64 0-dim. :func:`gram` has their norms too, from the same pass."""
    if not a and not b:
        return torch.zeros((), dtype=torch.float64)
    products: Tensor = run("dot", a=a, b=b, c=[], d=[])
    return products[1]


@torch.no_grad()
def blend_(
    grads: Sequence[Tensor],
    x: Sequence[Tensor],
    y: Sequence[Tensor] = (),
    *,
    coefficients: Tensor | Sequence[float],
) -> None:
    """``g <- a g + b x + c y`` for each tensor of a list, in one pass.

    Args:
        grads: ``g``, changed in place.
        x: like ``grads``, of their types or float32.
        y: likewise; empty for a sum of two.
        coefficients: ``(a, b)`` or ``(a, b, c)``, or float64[3] on the device of ``grads``, such as
            are made of :func:`gram` without a synchronisation; the third is not looked at without ``y``. A term whose
            coefficient is 0 is left out: it passes no NaN on.
    """
    if not isinstance(coefficients, Tensor):
        numbers = list(coefficients)
        if len(numbers) != (3 if y else 2) and len(numbers) != 3:
            raise ValueError(f"coefficients: {numbers} given; give {3 if y else '2 or 3'} floats")
        for value in numbers:
            check_finite("coefficients", value)
        numbers += [0.0] * (3 - len(numbers))
    if not grads:
        return
    if not isinstance(coefficients, Tensor):
        coefficients = on_device(torch.tensor(numbers, dtype=torch.float64), grads[0].device)
    run("blend_", grads=grads, x=x, y=list(y), coefficients=coefficients)


@torch.no_grad()
def axpy_(
    params: Sequence[Tensor], x: Sequence[Tensor], scale: float | Tensor, *, backup: Tensor | None = None
) -> None:
    """``w <- w + scale x`` for each tensor of a list: BLAS's axpy.

    Args:
        params: changed in place.
        x: like ``params``, of their types or float32.
        scale: finite float, or 0-dim tensor on their device; with 0 nothing moves.
        backup: from :func:`backup_like`, to save ``params`` in the same pass: a perturbation along ``x``.
    """
    if not isinstance(scale, Tensor):
        check_finite("scale", scale)
    if params:
        device = params[0].device
        saved = torch.empty(0, dtype=torch.uint8, device=device) if backup is None else backup
        run("axpy_", params=params, x=x, backup=saved, scale=scalar(scale, device))
