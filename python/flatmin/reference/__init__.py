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


def sam_norm_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    rho: Tensor,
    key: Tensor,
    q: float,
    scaling: int,
    eta: float,
    eps: float,
) -> Tensor:
    """:func:`norm`, which is returned, and :func:`sam_ascend_` by it."""
    gradient_norm = norm(grads, params, q, scaling, eta)
    sam_ascend_(params, grads, backup, gradient_norm, rho, key, q, scaling, eta, eps)
    return gradient_norm


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


# ---- noise by curvature: PACGen and Perturbed OPT (Wang et al. 2018, arXiv 1809.07402) ----

#: How the size of the noise is given (``sizing``): scale * N_i, from curvatures, or scale * sizes.
NEIGHBOURHOOD, CURVATURE, GIVEN = 0, 1, 2

#: Laws of the noise, each with mean 0 and, but for the cut, size 1.
UNIFORM, NORMAL, TRUNCATED, RADEMACHER = 0, 1, 2, 3

#: What a curvature average is fed with: the square of a source, the source, or probe * source (Hutchinson).
SQUARE, PLAIN, PROBED = 0, 1, 2


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower word of the 64-bit product of two words. int64 wraps, which leaves both right."""
    product = b * a
    return product >> 32 & 0xFFFFFFFF, product & 0xFFFFFFFF


def random_words(n: int, key: Tensor, tensor: int) -> Tensor:
    """The word (int64 in [0, 2^32)) of each of ``n`` elements: Philox4x32-10 (Salmon et al. 2011) in int64 arithmetic.

    Element i has lane i % 4 of the block with counter (quad, stream, tensor, draw), quad = i // 4. ``key`` is
    uint64[2]: the seed, and the draw (lower 32 bits) with its stream (upper 32).
    """
    return quad_words(torch.arange(-(-n // 4), dtype=torch.int64, device=key.device), key, tensor).flatten()[:n]


def quad_words(quads: Tensor, key: Tensor, tensor: int) -> Tensor:
    """The four words [n, 4] of each of the blocks ``quads`` [n]."""
    words = key.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    k0, k1, draw, stream = words.unbind()
    c0, c1 = quads & 0xFFFFFFFF, quads >> 32 ^ stream << 16 & 0xFFFFFFFF
    c2, c3 = torch.full_like(quads, tensor), draw.expand_as(quads)
    for _ in range(10):
        high0, low0 = _mul_hi_lo(0xD2511F53, c0)
        high1, low1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return torch.stack([c0, c1, c2, c3], dim=1)


def draws(n: int, key: Tensor, tensor: int, law: int) -> Tensor:
    """``n`` independent draws of a law of size 1, in the wide type; of TRUNCATED its uniform variable.

    Uniform: 23 bits of the word, the centre of each of 2^23 cells of (-1, 1). Normal: Box and Muller (1958) on the two
    words of a pair, 31 bits for the radius and 32 for the angle. Rademacher: the word's top bit.
    """
    return draws_of(random_words(-(-n // 4) * 4, key, tensor).view(-1, 4), law).flatten()[:n]


def draws_of(words: Tensor, law: int) -> Tensor:
    """What a law makes of the four words of each block: [n, 4], in the wide type."""
    wide = _wide(words)
    if law == RADEMACHER:
        x = 1.0 - 2.0 * (words >> 31).to(wide)
    elif law == NORMAL:
        first, second = words.view(-1, 2, 2).unbind(2)
        radius = (-2.0 * (((first >> 1).to(wide) + 0.5) * 2.0**-31).log()).sqrt()
        angle = second.to(wide) * (2.0 * math.pi * 2.0**-32)
        x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)
    else:
        x = ((words >> 9).to(wide) + 0.5) * 2.0**-22 - 1.0
    return x


def _draw_like(t: Tensor, key: Tensor, tensor: int, law: int) -> Tensor:
    """The draws of a tensor's elements, which are counted in memory order."""
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    inverse = sorted(range(t.dim()), key=order.__getitem__)
    return draws(t.numel(), key, tensor, law).view([t.shape[d] for d in order]).permute(inverse)


def _curved(
    w: Tensor,
    h: Tensor,
    lipschitz: Tensor | float,
    constant: Tensor,
    curvature_scale: Tensor,
    gamma: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``N_i = gamma |w_i| + eps`` and ``c_i = max(h_i + rho_i N_i, 0)``. NaN stays NaN."""
    n = gamma * w.abs() + eps
    return n, (curvature_scale * h + constant * lipschitz * n).clamp(min=0.0)


def noise_size(c: Tensor, n: Tensor, scale: Tensor | float) -> Tensor:
    """``sigma_i = min(scale / sqrt(c_i), N_i)``."""
    most = torch.where(torch.as_tensor(scale) != 0, n, 0.0)  # 0 / 0 where c is 0 too
    return torch.where(n * c.sqrt() <= scale, most, scale / c.sqrt())


def scaled_noise_(
    params: Sequence[Tensor],
    sizes: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    key: Tensor,
    scale: Tensor,
    lipschitz_constant: Tensor,
    curvature_scale: Tensor,
    sizing: int,
    law: int,
    gamma: float,
    eps: float,
) -> Tensor:
    """``backup <- w;  w <- w + sigma_i xi_i`` where sigma_i is finite. (sum of sigma_i, capped, not finite)."""
    wide = _wide(params[0])
    tally = torch.zeros(3, dtype=wide, device=params[0].device)
    for i, (p, old) in enumerate(zip(params, _slots(params, backup), strict=True)):
        old.copy_(_memory_order(p))
        real = _arithmetic(p)
        w = p.to(real)
        k, constant = scale.to(real), lipschitz_constant.to(real)
        if sizing == CURVATURE:
            rho = lipschitz[i].to(real) if lipschitz else 1.0
            n, c = _curved(w, sizes[i].to(real), rho, constant, curvature_scale.to(real), gamma, eps)
            sigma = noise_size(c, n, k)
            tally[1] += (n * c.sqrt() <= k).sum()
        else:
            n = gamma * w.abs() + eps if sizing == NEIGHBOURHOOD else sizes[i].to(real)
            sigma = n = k * n
        xi = _draw_like(p, key, i, law).to(real)
        if law == TRUNCATED:
            a = n / sigma
            u = sigma * math.sqrt(2.0) * torch.erfinv(xi * torch.erf(a / math.sqrt(2.0)))
            u = torch.where(sigma != 0, torch.minimum(torch.maximum(u, -n.abs()), n.abs()), 0.0)
        else:
            u = sigma * xi
        finite = sigma.isfinite()
        tally[0] += torch.where(finite, sigma, 0.0).to(wide).sum()
        tally[2] += (~finite).sum()
        p.copy_(torch.where(finite, (w + u).to(p.dtype), p))
    return tally


def probe_(tensors: Sequence[Tensor], key: Tensor, law: int) -> None:
    """Fill with independent draws of a law of size 1."""
    for i, t in enumerate(tensors):
        t.copy_(_draw_like(t, key, i, law))


def curvature_(
    curvatures: Sequence[Tensor],
    sources: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    params: Sequence[Tensor],
    backup: Tensor,
    key: Tensor,
    corrections: Tensor,
    source: int,
    source_scale: float,
    decay: float,
    lipschitz_decay: float,
    min_step: float,
) -> Tensor:
    """``h <- decay h + (1 - decay) source_scale T(x)``; with ``params`` also the difference quotients of h and w.

    ``q_i = |k' h'_i - k h_i| / |w'_i - w_i|`` where the weight moved by more than ``min_step``, (k, k') =
    ``corrections`` and w is in ``backup``; k = 0 means that h holds nothing yet: no quotient. ``lipschitz`` becomes
    ``lipschitz_decay rho_i + (1 - lipschitz_decay) q_i`` there. Returns the largest q_i, or 0; NaN if an average is not
    finite.
    """
    wide = _wide(curvatures[0])
    largest = torch.zeros((), dtype=wide, device=curvatures[0].device)
    slots = _slots(params, backup) if params else iter(())
    before, after = corrections.unbind()
    for i, h in enumerate(curvatures):
        real = torch.promote_types(_arithmetic(params[i] if params else h), _arithmetic(sources[i]))
        old, x = h.to(real, copy=True), sources[i].to(real)
        if source == SQUARE:
            x = x * x
        elif source == PROBED:
            x = x * _draw_like(params[i] if params else h, key, i, RADEMACHER).to(real)
        new = decay * old + (1.0 - decay) * (source_scale * x)
        h.copy_(new)
        if h.numel():
            largest = torch.maximum(largest, (new - new).max().to(wide))  # 0, or NaN
        if not params:
            continue
        w = torch.empty_like(params[i])
        _memory_order(w).copy_(next(slots))
        step = (params[i].to(real) - w.to(real)).abs()
        moved = (step > min_step) & (before != 0)
        q = torch.where(moved, (after.to(real) * new - before.to(real) * old).abs() / step, 0.0)
        if lipschitz:
            rho = lipschitz[i].to(real)
            mixed = lipschitz_decay * rho + (1.0 - lipschitz_decay) * q
            lipschitz[i].copy_(torch.where(moved, mixed, rho))
        if q.numel():
            largest = torch.maximum(largest, q.max().to(wide))
    return largest


def restore_sgd_curvature_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    lr: Tensor,
    corrections: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    decay: float,
    lipschitz_decay: float,
    min_step: float,
) -> Tensor:
    """:func:`restore_sgd_`, then :func:`curvature_` of the squared gradients, over the displacement of the step."""
    restore_sgd_(
        params, grads, momentum_buffers, backup, lr, momentum, dampening, weight_decay, nesterov, maximize, first_step
    )
    options = (SQUARE, 1.0, decay, lipschitz_decay, min_step)
    return curvature_(curvatures, grads, lipschitz, params, backup, _no_key(backup), corrections, *options)


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
    beta1: float,
    beta2: float,
    adam_eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    decay: float,
    lipschitz_decay: float,
    min_step: float,
) -> Tensor:
    """:func:`restore_adam_`, then :func:`curvature_` of the squared gradients, over the displacement of the step."""
    moments = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    betas = (beta1, beta2, adam_eps, weight_decay)
    restore_adam_(params, grads, *moments, steps, backup, lr, *betas, decoupled, amsgrad, maximize)
    options = (SQUARE, 1.0, decay, lipschitz_decay, min_step)
    return curvature_(curvatures, grads, lipschitz, params, backup, _no_key(backup), corrections, *options)


def _no_key(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint64, device=like.device)


def pacgen(
    params: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    lipschitz_constant: Tensor,
    curvature_scale: Tensor,
    gamma: float,
    eps: float,
) -> Tensor:
    """For each tensor ``sum_i log((|w_i| + N_i) max(sqrt(c_i), 1 / N_i))`` and the number of i with c_i N_i^2 <= 1.

    A weight of 0 without neighbourhood (N_i = 0) adds log 1. Wide type, shape (len(params), 2).
    """
    rows = []
    for i, p in enumerate(params):
        w = p.to(_wide(p))
        rho = lipschitz[i].to(w.dtype) if lipschitz else 1.0
        n, c = _curved(w, curvatures[i].to(w.dtype), rho, lipschitz_constant, curvature_scale, gamma, eps)
        capped = c * n * n <= 1.0
        terms = torch.where(n > 0, (w.abs() + n).log() + 0.5 * torch.where(capped, n**-2.0, c).log(), 0.0)
        rows.append(torch.stack([(terms + 0.0 * c).sum(), capped.sum().to(w.dtype)]))
    return torch.stack(rows)


def filter_norm(tensors: Sequence[Tensor], whole: bool) -> Tensor:
    """The 2-norm of each filter (index of the first dimension) of each tensor, or of each tensor if ``whole`` or of
    fewer than two dimensions: one wide vector."""
    norms = []
    for t in tensors:
        rows = t.reshape(1, -1) if whole or t.dim() < 2 else t.flatten(1)
        norms.append(torch.linalg.vector_norm(rows.to(_wide(t)), dim=1))
    return torch.cat(norms)


# ---- label noise ----

from ._labels import corrupt_labels as corrupt_labels  # noqa: E402 - it is made of the random numbers above
from ._labels import draw_samples as draw_samples  # noqa: E402
