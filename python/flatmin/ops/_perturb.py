"""Away from the weights and back: the backup, the ascent of SAM, restore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._checks import check_finite_radius
from ._codes import scaling_code
from ._dispatch import empty_key, run, scalar

__all__ = ["backup_like", "restore_", "sam_ascend_", "sam_norm_ascend_", "save_"]


def backup_like(params: Sequence[Tensor]) -> Tensor:
    """An uninitialised backup for ``params``: one uint8 tensor on their device.

    Keep it from step to step: fresh memory costs page faults, and a CUDA graph needs one address.
    """
    device = params[0].device if params else torch.device("cpu")
    return torch.empty(reference.backup_nbytes(params), dtype=torch.uint8, device=device)


@torch.no_grad()
def sam_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    norm: Tensor,
    rho: float | Tensor,
    *,
    q: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.01,
    eps: float = 1e-12,
    key: Tensor | None = None,
) -> None:
    """Save the parameters and move them to the adversarial point ``w + e``.

    ``e = rho T sign(g) (|T g| / (norm + eps))^(q-1)``, which for ``q = 2`` is ``rho T^2 g / (norm + eps)``: Eq. 2 of
    Foret et al. 2020 (arXiv 2010.01412). With "big_vision" the inner ``T`` is 1.

    Args:
        params: changed in place. Their old bytes go to ``backup``.
        grads: same shapes, same length.
        backup: from :func:`backup_like`.
        norm: float64 0-dim, from :func:`norm` over every tensor of the perturbed set.
        rho: radius >= 0, float or 0-dim tensor; or float64[n], one for each parameter. For ``q = inf`` give
            ``rho / ties(...)``. The value of a tensor on a GPU is unknown to the host, so a negative one is not refused
            there.
        q: the dual exponent, as given to :func:`norm`.
        adaptive, eta: as given to :func:`norm`.
        eps: added to the norm.
        key: uint64[2] ``(seed, step)``: round 16-bit parameters stochastically with Philox4x32-10, so that steps far
            below half a unit in the last place survive on average. None rounds to nearest.

    If ``rho`` is 0, or ``norm`` or the scale is not finite, the weights keep their bits; they are backed up all the
    same.
    """
    check_finite_radius("rho", rho)
    if not params:
        return
    ascent = _ascent(params[0].device, rho, key, q, adaptive, eta, eps)
    run("sam_ascend_", params=params, grads=grads, backup=backup, norm=norm, **ascent)


@torch.no_grad()
def sam_norm_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    rho: float | Tensor,
    *,
    q: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.01,
    eps: float = 1e-12,
    key: Tensor | None = None,
) -> Tensor:
    """:func:`norm` of ``grads`` and :func:`sam_ascend_` by it, where the list is the whole perturbed set.

    One crossing from Python instead of two. Arguments are those of
    :func:`sam_ascend_`, with ``q`` finite. Where the gradients have the strides and types of their parameters, the
    bits are those of the two calls.

    Returns:
        The norm: float64 0-dim tensor on the device of ``params``.
    """
    check_finite_radius("rho", rho)
    if not params:
        return torch.zeros((), dtype=torch.float64)
    ascent = _ascent(params[0].device, rho, key, q, adaptive, eta, eps)
    result: Tensor = run("sam_norm_ascend_", params=params, grads=grads, backup=backup, **ascent)
    return result


def _ascent(
    device: torch.device,
    rho: float | Tensor,
    key: Tensor | None,
    q: float,
    adaptive: bool | str,
    eta: float,
    eps: float,
) -> dict[str, Any]:
    """What the raw operators of an ascent take beside the lists."""
    return {
        "rho": scalar(rho, device),
        "key": empty_key(device) if key is None else key,
        "q": q,
        "scaling": scaling_code(adaptive),
        "eta": eta,
        "eps": eps,
    }


@torch.no_grad()
def save_(params: Sequence[Tensor], backup: Tensor) -> None:
    """Copy the bytes of ``params`` to ``backup``, from which :func:`restore_` and the steps bring them back."""
    if params:
        run("save_", params=params, backup=backup)


@torch.no_grad()
def restore_(params: Sequence[Tensor], backup: Tensor) -> None:
    """Copy the saved bytes back into ``params``, the same list in the same order."""
    if params:
        run("restore_", params=params, backup=backup)
