"""Restore and base step, with or without averages of a curvature beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._curvature import SQUARE, curvature_
from ._memory import arithmetic_type, as_real, backup_nbytes, backup_views, memory_order, wide_type
from ._perturb import restore_

__all__ = ["restore_adam_", "restore_adam_curvature_", "restore_lion_", "restore_sgd_", "restore_sgd_curvature_"]


def _averages(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    corrections: Tensor | None,
    decay: float,
    lipschitz_decay: float,
    min_step: float,
) -> Tensor:
    """:func:`curvature_` of the squared gradients over the displacement of a step; empty without curvatures."""
    if not curvatures:
        return params[0].new_empty(0, dtype=wide_type(params[0]))
    if corrections is None:
        raise RuntimeError("corrections: missing, but averages of curvatures have a bias; give float64[2]")
    key = torch.empty(0, dtype=torch.uint64, device=backup.device)
    options = (SQUARE, 1.0, decay, lipschitz_decay, min_step)
    return curvature_(curvatures, grads, lipschitz, params, backup, key, corrections, *options)


def _start(params: Sequence[Tensor], backup: Tensor, keep: bool) -> Tensor:
    """Bring the weights to where the step starts; with an empty backup they are there. Returns a backup of them if they
    are to be kept."""
    if backup.numel():
        restore_(params, backup)
    elif keep:
        backup = torch.empty(backup_nbytes(params), dtype=torch.uint8, device=params[0].device)
        for p, old in zip(params, backup_views(params, backup), strict=True):
            old.copy_(memory_order(p))
    return backup


def _rates(lr: Tensor, weight_decay: float, count: int) -> list[tuple[Tensor, float | Tensor]]:
    """Rate and weight decay of each parameter: ``lr`` has one for all, or both for each."""
    if lr.numel() == 2 * count > 1:
        return [(own[0], own[1]) for own in lr.reshape(count, 2)]
    return [(lr.reshape(()), weight_decay)] * count


def restore_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    backup: Tensor,
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    curvatures: Sequence[Tensor] = (),
    lipschitz: Sequence[Tensor] = (),
    corrections: Tensor | None = None,
    decay: float = 0.0,
    lipschitz_decay: float = 0.0,
    min_step: float = 0.0,
) -> Tensor:
    """``w <- backup``, then one step of :class:`torch.optim.SGD`. No buffers are given if ``momentum`` is 0.

    Then :func:`curvature_` of the squared gradients, if there are ``curvatures``; returns the largest quotient."""
    backup = _start(params, backup, bool(curvatures))
    for i, (p, (rate, decay_of_w)) in enumerate(zip(params, _rates(lr, weight_decay, len(params)), strict=True)):
        w = p.to(torch.promote_types(arithmetic_type(p), p.dtype))
        g = grads[i].to(w.dtype)
        g = -g if maximize else g
        g = g + decay_of_w * w if decay_of_w else g
        if momentum:
            old = momentum_buffers[i].to(w.dtype)
            buf = g if first_step else momentum * old + (1.0 - dampening) * g
            momentum_buffers[i].copy_(buf)
            g = g + momentum * buf if nesterov else buf
        p.copy_(w - rate.to(arithmetic_type(p)) * g)
    return _averages(params, grads, backup, curvatures, lipschitz, corrections, decay, lipschitz_decay, min_step)


def restore_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    backup: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    curvatures: Sequence[Tensor] = (),
    lipschitz: Sequence[Tensor] = (),
    corrections: Tensor | None = None,
    decay: float = 0.0,
    lipschitz_decay: float = 0.0,
    min_step: float = 0.0,
) -> Tensor:
    """``w <- backup``, then one step of :class:`torch.optim.Adam`, or of AdamW if ``decoupled``.

    Then :func:`curvature_` as in :func:`restore_sgd_`."""
    backup = _start(params, backup, bool(curvatures))
    for i, (p, (rate, decay_of_w)) in enumerate(zip(params, _rates(lr, weight_decay, len(params)), strict=True)):
        steps[i].add_(1)
        step = steps[i].to(device=p.device, dtype=wide_type(p))
        real = arithmetic_type(p)
        w = as_real(p).to(real)
        g = as_real(grads[i]).to(real)
        rate = rate.to(device=p.device, dtype=wide_type(p))
        g = -g if maximize else g
        if decoupled:
            w = w * (1.0 - rate * decay_of_w).to(real)
        elif decay_of_w:
            g = g + decay_of_w * w
        m, v = as_real(exp_avgs[i]), as_real(exp_avg_sqs[i])
        new_m = m.to(real) + (1.0 - beta1) * (g - m.to(real))
        new_v = beta2 * v.to(real) + (1.0 - beta2) * g * g
        m.copy_(new_m)
        v.copy_(new_v)
        if amsgrad:
            largest = as_real(max_exp_avg_sqs[i])
            new_v = torch.maximum(largest.to(real), new_v)
            largest.copy_(new_v)
        denominator = new_v.sqrt() / (1.0 - beta2**step).sqrt().to(real) + eps
        as_real(p).copy_(w - (rate / (1.0 - beta1**step)).to(real) * new_m / denominator)
    return _averages(params, grads, backup, curvatures, lipschitz, corrections, decay, lipschitz_decay, min_step)


def restore_lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    backup: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    curvatures: Sequence[Tensor] = (),
    lipschitz: Sequence[Tensor] = (),
    corrections: Tensor | None = None,
    decay: float = 0.0,
    lipschitz_decay: float = 0.0,
    min_step: float = 0.0,
) -> Tensor:
    """``w <- backup``, then one step of Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    Then :func:`curvature_` as in :func:`restore_sgd_`."""
    backup = _start(params, backup, bool(curvatures))
    for i, (p, (rate, decay_of_w)) in enumerate(zip(params, _rates(lr, weight_decay, len(params)), strict=True)):
        real = arithmetic_type(p)
        w, g, m = as_real(p).to(real), as_real(grads[i]).to(real), as_real(exp_avgs[i])
        g = -g if maximize else g
        rate = rate.to(device=p.device, dtype=wide_type(p))
        old = m.to(real)
        mixed = beta1 * old + (1.0 - beta1) * g
        update = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign of NaN is 0
        m.copy_(beta2 * old + (1.0 - beta2) * g)
        as_real(p).copy_(w * (1.0 - rate * decay_of_w).to(real) - rate.to(real) * update)
    return _averages(params, grads, backup, curvatures, lipschitz, corrections, decay, lipschitz_decay, min_step)


def restore_sgd_curvature_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    lr: Tensor,
    corrections: Tensor,
    **options: Any,
) -> Tensor:
    """:func:`restore_sgd_` with ``curvatures``: its older name."""
    averages: dict[str, Any] = {"curvatures": curvatures, "lipschitz": lipschitz, "corrections": corrections}
    return restore_sgd_(params, grads, momentum_buffers, backup, lr, **averages, **options)


def restore_adam_curvature_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    lr: Tensor,
    corrections: Tensor,
    **options: Any,
) -> Tensor:
    """:func:`restore_adam_` with ``curvatures``: its older name."""
    averages: dict[str, Any] = {"curvatures": curvatures, "lipschitz": lipschitz, "corrections": corrections}
    return restore_adam_(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, backup, lr, **averages, **options
    )
