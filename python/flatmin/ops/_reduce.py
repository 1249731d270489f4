"""Sums over whole lists: norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._codes import scaling_code
from ._dispatch import run

__all__ = ["filter_norm", "norm", "ties"]


@torch.no_grad()
def norm(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    *,
    q: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.01,
) -> Tensor:
    """Global norm ``||T(w) g||_q`` over a list, deterministic and free of overflow.

    Args:
        tensors: gradients ``g``, any shapes.
        weights: parameters ``w`` of the same shapes; needed by ``adaptive`` True/"asam" and "davda54" only.
        q: exponent in [1, inf]; for a radius in the p-norm use the dual, ``1/p + 1/q = 1``.
        adaptive: ``T = 1`` (False), ``|w| + eta`` where ``w`` has more than one dimension (True, "asam"; Kwon et al.
            2021, arXiv 2102.11600), ``|w|`` ("davda54"); "big_vision" takes the norm without ``T``.
        eta: ASAM's offset.

    Returns:
        float64 0-dim tensor on the device of ``tensors``: the same bits for every instruction set and thread count.
        Not finite if any element is not. 0 for an empty list.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    result: Tensor = run("norm", tensors=tensors, weights=list(weights), q=q, scaling=scaling_code(adaptive), eta=eta)
    return result


@torch.no_grad()
def ties(
    tensors: Sequence[Tensor],
    norm: Tensor,
    weights: Sequence[Tensor] = (),
    *,
    adaptive: bool | str = False,
    eta: float = 0.01,
) -> Tensor:
    """How many elements of ``|T(w) g|`` equal ``norm``, the maximum (``q = inf``): float64 0-dim.

    A radius in the 1-norm goes to the largest gradient; k exact ties get ``rho / k`` each (the limit of Eq. 2 of
    Foret et al. 2020, arXiv 2010.01412, as p -> 1).
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    result: Tensor = run(
        "ties", tensors=tensors, weights=list(weights), norm=norm, scaling=scaling_code(adaptive), eta=eta
    )
    return result


@torch.no_grad()
def filter_norm(tensors: Sequence[Tensor], *, whole: bool = False) -> list[Tensor]:
    """The 2-norm of each filter: for each tensor a float64 tensor that broadcasts against it.

    A filter is an index of the first dimension (Bisla et al. 2022, arXiv 2201.08025); tensors of fewer than two
    dimensions, and all with ``whole``, have one norm (Wu et al. 2020, arXiv 2004.05884).
    """
    if not tensors:
        return []
    flat: Tensor = run("filter_norm", tensors=tensors, whole=whole)
    counts = [1 if whole or t.dim() < 2 else t.shape[0] for t in tensors]
    shapes = [(count,) + (1,) * (t.dim() - 1) if t.dim() else () for t, count in zip(tensors, counts, strict=True)]
    return [part.view(shape) for part, shape in zip(torch.split(flat, counts), shapes, strict=True)]
