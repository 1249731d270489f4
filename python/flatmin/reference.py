"""Every operator in plain torch.

Two uses: the oracle that the tests hold the C and CUDA kernels against, and the fallback at run time for what has no
kernel (complex parameters, MPS, XPU, CUDA without the CUDA library). The signatures are those of
``torch.ops.flatmin.*``; the public, documented ones with defaults are in :mod:`flatmin.ops`.

Notation: ``w`` weights, ``g`` gradients, ``T(w)`` the adaptive scaling, ``q`` the dual exponent of the radius' p-norm
(1/p + 1/q = 1). Sums are kept in float64 where the device has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Adaptive conventions (``scaling`` of the operators).
NONE, ASAM, DAVDA54, BIG_VISION = 0, 1, 2, 3

#: Every tensor starts at a multiple of this many bytes in a backup: one cache line, any vector store.
ALIGNMENT = 64


def backup_nbytes(params: Sequence[Tensor]) -> int:
    """Bytes of the backup that holds ``params``: each rounded up to :data:`ALIGNMENT`."""
    return sum(-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in params)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _memory_order(t: Tensor) -> Tensor:
    """``t`` with its dimensions permuted to descending strides: flattening it walks memory forward."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))


def _slots(params: Sequence[Tensor], backup: Tensor) -> Iterator[Tensor]:
    """One view of ``backup`` per parameter, shaped like the parameter in memory order."""
    needed = backup_nbytes(params)
    if backup.numel() < needed:
        raise RuntimeError(f"backup: {backup.numel()} bytes given, {needed} needed; use backup_like(params)")
    start = 0
    for p in params:
        stop = start + p.numel() * p.element_size()
        yield backup[start:stop].view(p.dtype).view(_memory_order(p).shape)
        start += -(-(stop - start) // ALIGNMENT) * ALIGNMENT


def _wide(t: Tensor) -> torch.dtype:
    return torch.float32 if t.device.type == "mps" else torch.float64


def _arithmetic(t: Tensor) -> torch.dtype:
    """The type in which a parameter of this type is updated."""
    return torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32


def _scale(w: Tensor, scaling: int, eta: float) -> Tensor | float:
    """``T(w)``. ASAM leaves biases and norm layers (one dimension or none) unscaled."""
    if scaling == ASAM:
        return w.abs() + eta if w.dim() > 1 else 1.0
    return w.abs() if scaling in (DAVDA54, BIG_VISION) else 1.0


def _scaled_abs(tensors: Sequence[Tensor], weights: Sequence[Tensor], scaling: int, eta: float) -> list[Tensor]:
    """``|T(w) g|`` of each tensor, in the wide type. big_vision takes the norm of ``g`` itself."""
    out = []
    for i, g in enumerate(tensors):
        wide = _real(g).to(_wide(g))
        if scaling in (ASAM, DAVDA54):
            w = weights[i]
            t = _scale(w.to(torch.promote_types(w.dtype, _wide(w))), scaling, eta)
            if isinstance(t, Tensor):
                wide = wide * (t.unsqueeze(-1) if g.is_complex() else t)
        out.append(wide.abs())
    return out


def norm(tensors: Sequence[Tensor], weights: Sequence[Tensor], q: float, scaling: int, eta: float) -> Tensor:
    """``||T(w) g||_q`` over all tensors, max-scaled so that no power over- or underflows."""
    values = [v.flatten() for v in _scaled_abs(tensors, weights, scaling, eta) if v.numel()]
    if not values:
        return tensors[0].new_zeros((), dtype=_wide(tensors[0]))
    largest = torch.stack([v.amax() for v in values]).amax()
    if q == math.inf:
        return largest
    unit = torch.where(largest > 0, largest, 1.0)
    total = torch.stack([((v / unit) ** q).sum() for v in values]).sum() ** (1.0 / q)
    return torch.where(torch.isfinite(largest), largest * total, largest)


def ties(tensors: Sequence[Tensor], weights: Sequence[Tensor], norm: Tensor, scaling: int, eta: float) -> Tensor:
    """How many elements attain the maximum ``norm`` of ``|T(w) g|``: p = 1 shares the radius among them."""
    counts = [(v == norm).sum() for v in _scaled_abs(tensors, weights, scaling, eta)]
    return torch.stack(counts).sum().to(_wide(tensors[0]))


def sam_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    norm: Tensor,
    rho: Tensor,
    key: Tensor,
    q: float,
    scaling: int,
    eta: float,
    eps: float,
) -> None:
    """``backup <- w;  w <- w + rho T sign(g) (|T g| / (norm + eps))^(q-1)``; nothing moves if the scale is not finite.

    ``key`` (uint64[2]; empty for rounding to nearest) asks for stochastic rounding of 16-bit parameters. This
    reference rounds to nearest: the random choice belongs to the kernels and is tested by its distribution.
    """
    for p, g, old in zip(params, grads, _slots(params, backup), strict=True):
        old.copy_(_memory_order(p))
        w = p.to(torch.promote_types(_arithmetic(p), p.dtype))
        d = g.to(w.dtype)
        t = _scale(w, scaling, eta)
        inner = 1.0 if scaling == BIG_VISION else t
        step = (rho / (norm + eps)).to(p.device)
        if q == 2.0:
            e = (_real(inner * t * d) * step.to(_arithmetic(p))).to(_arithmetic(p))
        else:
            wide = torch.promote_types(p.dtype, _wide(p))  # as the norm saw T g: ties are exact comparisons
            t = _scale(p.to(wide), scaling, eta)
            x = _real(g.to(wide) if scaling == BIG_VISION else t * g.to(wide))
            if q == math.inf:
                e = rho * x.sign() * (x.abs() == norm)
            else:
                e = rho * x.sign() * (x.abs() / (norm + eps)) ** (q - 1.0)
            if isinstance(t, Tensor):
                e = e * (t.unsqueeze(-1) if p.is_complex() else t)
        moved = (_real(w) + e).to(_real(p).dtype)
        usable = torch.isfinite(norm) & torch.isfinite(step.to(_arithmetic(p))) & (step != 0)
        _real(p).copy_(torch.where(usable, moved, _real(p)))


def restore_(params: Sequence[Tensor], backup: Tensor) -> None:
    """``w <- backup``, byte for byte."""
    for p, old in zip(params, _slots(params, backup), strict=True):
        _memory_order(p).copy_(old)


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
) -> None:
    """``w <- backup``, then one step of :class:`torch.optim.SGD`. No buffers are given if ``momentum`` is 0."""
    restore_(params, backup)
    for i, p in enumerate(params):
        w = p.to(torch.promote_types(_arithmetic(p), p.dtype))
        g = grads[i].to(w.dtype)
        g = -g if maximize else g
        g = g + weight_decay * w if weight_decay else g
        if momentum:
            old = momentum_buffers[i].to(w.dtype)
            buf = g if first_step else momentum * old + (1.0 - dampening) * g
            momentum_buffers[i].copy_(buf)
            g = g + momentum * buf if nesterov else buf
        p.copy_(w - lr.to(_arithmetic(p)) * g)


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
) -> None:
    """``w <- backup``, then one step of :class:`torch.optim.Adam`, or of AdamW if ``decoupled``."""
    restore_(params, backup)
    for i, p in enumerate(params):
        steps[i].add_(1)
        step = steps[i].to(device=p.device, dtype=_wide(p))
        real = _arithmetic(p)
        w = _real(p).to(real)
        g = _real(grads[i]).to(real)
        rate = lr.to(device=p.device, dtype=_wide(p))
        g = -g if maximize else g
        if decoupled:
            w = w * (1.0 - rate * weight_decay).to(real)
        elif weight_decay:
            g = g + weight_decay * w
        m, v = _real(exp_avgs[i]), _real(exp_avg_sqs[i])
        new_m = m.to(real) + (1.0 - beta1) * (g - m.to(real))
        new_v = beta2 * v.to(real) + (1.0 - beta2) * g * g
        m.copy_(new_m)
        v.copy_(new_v)
        if amsgrad:
            largest = _real(max_exp_avg_sqs[i])
            new_v = torch.maximum(largest.to(real), new_v)
            largest.copy_(new_v)
        denominator = new_v.sqrt() / (1.0 - beta2**step).sqrt().to(real) + eps
        _real(p).copy_(w - (rate / (1.0 - beta1**step)).to(real) * new_m / denominator)
