"""Random perturbations (Wang et al. 2018, arXiv 1809.07402), and the random numbers that they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._memory import arithmetic_type, backup_views, memory_order, wide_type

__all__ = [
    "CURVATURE",
    "GIVEN",
    "NEIGHBOURHOOD",
    "NORMAL",
    "RADEMACHER",
    "TRUNCATED",
    "UNIFORM",
    "curved",
    "draw_like",
    "draws",
    "noise_size",
    "probe_",
    "quad_words",
    "random_words",
    "scaled_noise_",
]

#: How the size of the noise is given, in the C core: scale * N_i, from curvatures, or scale * sizes.
NEIGHBOURHOOD, CURVATURE, GIVEN = 0, 1, 2

#: Distributions of the noise, each with mean 0 and, but for the cut, size 1.
UNIFORM, NORMAL, TRUNCATED, RADEMACHER = 0, 1, 2, 3


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower word of the 64-bit product of two words. int64 wraps, which leaves both right."""
    product = b * a
    return product >> 32 & 0xFFFFFFFF, product & 0xFFFFFFFF


def random_words(n: int, key: Tensor, tensor: int | Tensor) -> Tensor:
    """The word (int64 in [0, 2^32)) of each of ``n`` elements: Philox4x32-10 (Salmon et al. 2011) in int64 arithmetic.

    Element i has word i % 4 of the block with counter (quad, stream, tensor, draw), quad = i // 4. ``key`` is
    uint64[2]: the seed, and the draw (lower 32 bits) with its stream (upper 32).
    """
    return quad_words(torch.arange(-(-n // 4), dtype=torch.int64, device=key.device), key, tensor).flatten()[:n]


def quad_words(quads: Tensor, key: Tensor, tensor: int | Tensor) -> Tensor:
    """The four words [n, 4] of each of the blocks ``quads`` [n]."""
    words = key.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    k0, k1, draw, stream = words.unbind()
    c0, c1 = quads & 0xFFFFFFFF, quads >> 32 ^ stream << 16 & 0xFFFFFFFF
    c2, c3 = torch.zeros_like(quads) + tensor, draw.expand_as(quads)
    for _ in range(10):
        high0, low0 = _mul_hi_lo(0xD2511F53, c0)
        high1, low1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return torch.stack([c0, c1, c2, c3], dim=1)


def draws(n: int, key: Tensor, tensor: int | Tensor, law: int) -> Tensor:
    """``n`` independent draws of a law of size 1, in the wide type; of TRUNCATED its uniform variable.

    Uniform: 23 bits of the word, the centre of each of 2^23 cells of (-1, 1). Normal: Box and Muller (1958) on the two
    words of a pair, 31 bits for the radius and 32 for the angle. Rademacher: the word's top bit.
    """
    return draws_of(random_words(-(-n // 4) * 4, key, tensor).view(-1, 4), law).flatten()[:n]


def draws_of(words: Tensor, law: int) -> Tensor:
    """What a law makes of the four words of each block: [n, 4], in the wide type."""
    wide = wide_type(words)
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


def draw_like(t: Tensor, key: Tensor, tensor: int | Tensor, law: int) -> Tensor:
    """The draws of a tensor's elements, which are counted in memory order."""
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    inverse = sorted(range(t.dim()), key=order.__getitem__)
    return draws(t.numel(), key, tensor, law).view([t.shape[d] for d in order]).permute(inverse)


def curved(
    w: Tensor,
    h: Tensor,
    lipschitz: Tensor | float,
    constant: Tensor,
    curvature_scale: Tensor,
    gamma: float | Tensor,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """``N_i = gamma |w_i| + eps`` and ``c_i = max(h_i + rho_i N_i, 0)``, NaN where that sum is not finite."""
    n = gamma * w.abs() + eps
    c = curvature_scale * h + constant * lipschitz * n
    return n, c.clamp(min=0.0) + (c - c)


def noise_size(c: Tensor, n: Tensor, scale: Tensor | float) -> Tensor:
    """``sigma_i = min(scale / sqrt(c_i), N_i)``."""
    most = torch.where(torch.as_tensor(scale) != 0, n, 0.0)  # 0 / 0 where c is 0 too
    return torch.where(n * c.sqrt() <= scale, most, scale / c.sqrt())


def scaled_noise_(
    params: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    sizes: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    key: Tensor,
    scale: Tensor,
    lipschitz_constant: Tensor,
    curvature_scale: Tensor,
    law: int,
    gamma: float,
    eps: float,
) -> Tensor:
    """``backup <- w;  w <- w + sigma_i xi_i`` where sigma_i is finite. (sum of sigma_i, capped, not finite)."""
    wide = wide_type(params[0])
    tally = torch.zeros(3, dtype=wide, device=params[0].device)
    own: list[tuple[Tensor, Tensor | float, Tensor | float]] = [(scale.reshape(-1)[0], gamma, eps)] * len(params)
    if scale.numel() == 3 * len(params):
        own = [(each[0], each[1], each[2]) for each in scale.reshape(-1, 3)]
    for i, (p, old) in enumerate(zip(params, backup_views(params, backup), strict=True)):
        old.copy_(memory_order(p))
        real = arithmetic_type(p)
        w = p.to(real)
        k, constant = own[i][0].to(real), lipschitz_constant.to(real)
        size = [value.to(real) if isinstance(value, Tensor) else value for value in own[i][1:]]
        if curvatures:
            rho = lipschitz[i].to(real) if lipschitz else 1.0
            n, c = curved(w, curvatures[i].to(real), rho, constant, curvature_scale.to(real), *size)
            sigma = noise_size(c, n, k)
            tally[1] += (n * c.sqrt() <= k).sum()
        else:
            n = sizes[i].to(real) if sizes else size[0] * w.abs() + size[1]
            sigma = n = k * n
        its_key, number = (key, i) if key.dim() == 1 else (key[i, :2], key[i, 2].view(torch.int64))
        xi = draw_like(p, its_key, number, law).to(real)
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
        t.copy_(draw_like(t, key, i, law))
