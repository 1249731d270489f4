"""Noise by curvature, probes and filter norms: against closed forms in float64, golden vectors and
``flatmin.reference``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flatmin import ops, reference
from problems import (
    DTYPES,
    LAYOUTS,
    Problem,
    arithmetic_eps,
    assert_within,
    filled,
    gaps,
    large_problem,
    problems,
    same_bytes,
    same_memory,
    twins,
)

LAWS = ("uniform", "normal", "truncated_normal", "rademacher")


def memory_order(t: Tensor) -> list[int]:
    return sorted(range(t.dim()), key=t.stride, reverse=True)


def flat(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The elements as float64, in the memory order of ``like`` (or of ``t``): the order in which draws are counted."""
    return t.permute(memory_order(t if like is None else like)).reshape(-1).double()


# ---- sizes: the formula in float64, with what rounding can do to it ----


def size_bounds(
    w: Tensor, h: Tensor | None, rho: Tensor, gamma: float, eps: float, scale: float, k: float, unit: float
) -> tuple[Tensor, Tensor]:
    """The least and the largest ``sigma`` of algorithm POPT-1 when c and N are off by 4 roundings each.

    Where h and rho N cancel, c keeps few digits; sigma = min(scale / sqrt(c), N) still is continuous in c.
    """
    n = gamma * w.abs() + eps
    if h is None:
        sigma = scale * n
        return sigma * (1 - 4 * unit), sigma * (1 + 4 * unit)
    slack = 4 * unit * (k * h.abs() + rho * n)
    ends = []
    for c, room in ((k * h + rho * n + slack, 1 - 8 * unit), (k * h + rho * n - slack, 1 + 8 * unit)):
        root = c.clamp(min=0.0).sqrt()
        ends.append(torch.where(root * n * (2 - room) <= scale, n, scale / root) * room)
    return torch.minimum(*ends), torch.maximum(*ends)


def unit_draws(law: str, key: Tensor, row: int, w: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of a law in float64, and how far those of the kernels, in float32, may be off.

    Uniform and Rademacher draws are exact. Of a normal draw the radius r (up to 6.7) and the angle each have a few
    float32 roundings, and r^2 = -2 ln u has those of u, 1.2e-7 absolute: 6e-8 / r in r. A truncated draw is a quantile:
    an error of 4e-7 in its mass is worth 4e-7 / (2 pdf) there.
    """
    x = reference.draws(w.numel(), key, row, {"normal": 1, "rademacher": 3}.get(law, 0))
    if law == "normal":
        pairs = reference.draws(-(-w.numel() // 4) * 4, key, row, 1).view(-1, 2)
        radius = pairs.norm(dim=1, keepdim=True).expand_as(pairs).reshape(-1)[: w.numel()]
        return x, 2e-6 + 1.5e-7 / radius
    if law == "truncated_normal":
        a = cut.clamp(min=1.0)
        q = math.sqrt(2.0) * torch.erfinv(x * torch.erf(a / math.sqrt(2.0)))
        density = (-0.5 * q * q).exp() / math.sqrt(2.0 * math.pi)
        return q, 4e-7 * q.abs() + 4e-7 / (2 * density)
    return x, torch.zeros_like(x)


def check_noise(start: Problem, law: str, key: Tensor, **options: Any) -> Tensor:
    """One call on a copy of ``start``: weights, backup, gaps, and the tally."""
    got = start.copy()
    backup = got.backup()
    curvatures, lipschitz = options.get("curvatures"), options.get("lipschitz", 0.0)
    gamma, eps, scale = options.get("gamma", 0.0), options.get("eps", 0.0), options.get("scale", 1.0)
    tally = ops.scaled_noise_(got.params, backup, key, distribution=law, **options)
    total = capped = slack = 0.0
    for r, (p, w) in enumerate(zip(got.params, start.params, strict=True)):
        unit = arithmetic_eps(w.dtype)
        old = flat(w)
        h = None if curvatures is None else flat(curvatures[r], w)
        rho = flat(lipschitz[r], w) if isinstance(lipschitz, list) else torch.full_like(old, float(lipschitz))
        low, high = size_bounds(old, h, rho, gamma, eps, scale, options.get("curvature_scale", 1.0), unit)
        n = gamma * old.abs() + eps
        cut = torch.where(high > 0, n / high, 1.0) if h is not None else torch.ones_like(old)
        xi, off = unit_draws(law, key, r, old, cut)
        sigma = (low + high) / 2
        # sigma xi and w + it are rounded together (fma); the cut itself depends on sigma
        bound = (high - low) * xi.abs() * 2 + high * off + unit * (old.abs() + high * xi.abs())
        shape = [w.shape[d] for d in memory_order(w)]
        assert_within(p.permute(memory_order(w)), (old + sigma * xi).view(shape).to(p.dtype), bound.view(shape))
        assert torch.equal(gaps(p), gaps(w))
        total, slack = total + sigma.sum().item(), slack + (high - low).sum().item()
        capped += (n * (1 - 16 * unit) <= high).sum().item() if h is not None else 0
    assert tally[0].item() == pytest.approx(total, abs=slack, rel=1e-6)
    assert tally[1].item() <= capped and tally[2].item() == 0
    ops.restore_(got.params, backup)
    assert all(same_memory(p, w) for p, w in zip(got.params, start.params, strict=True))
    return tally


@pytest.mark.parametrize("law", LAWS)
@given(start=problems(), per_element=st.booleans(), seed=st.integers(0, 2**64 - 1))
def test_noise_from_curvatures(start: Problem, law: str, per_element: bool, seed: int) -> None:
    """Curvatures of both signs, so that c is clamped, capped and free; Lipschitz constants of both kinds."""
    lipschitz: float | list[Tensor] = [g.abs() for g in start.grads] if per_element else 2.0
    key = ops.random_key(seed, 7, 3)
    options = {"gamma": 0.5, "eps": 0.25, "scale": 0.5, "curvature_scale": 1.5, "lipschitz": lipschitz}
    check_noise(start, law, key, curvatures=start.grads, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_noise_of_large_lists(law: str, dtype: torch.dtype) -> None:
    start = large_problem(dtype)
    key = ops.random_key(1, 2)
    tally = check_noise(start, law, key, curvatures=start.grads, gamma=0.5, eps=0.25, scale=0.5, lipschitz=2.0)
    assert 0 < tally[1].item() < sum(p.numel() for p in start.params)


@pytest.mark.parametrize("law", LAWS)
@given(start=problems())
def test_noise_of_the_neighbourhood(start: Problem, law: str) -> None:
    tally = check_noise(start, law, ops.random_key(5), gamma=0.5, eps=0.125, scale=0.75)
    assert tally[1].item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_given_sizes(dtype: torch.dtype) -> None:
    """Sizes per filter are read through expanded views, which overlap; each filter has its own."""
    w = filled((6, 5, 3, 3), dtype, 1, "channels_last")
    sizes = torch.arange(1.0, 7.0).view(6, 1, 1, 1)
    params = [w.clone()]
    backup = ops.backup_like(params)
    expanded, key = [sizes.expand(w.shape)], ops.random_key(3)
    tally = ops.scaled_noise_(params, backup, key, distribution="rademacher", scale=0.5, sizes=expanded)
    moved = (params[0].double() - w.double()).abs()
    # half a unit in the last place of w + u, where |w + u| < 8
    assert (moved - 0.5 * sizes.double()).abs().max().item() <= 4 * torch.finfo(dtype).eps
    assert tally.tolist() == [0.5 * 21 * 45, 0.0, 0.0]


def test_filter_noise_has_the_norm_of_the_filter() -> None:
    """LPF-SGD: N(0, (sigma ||W_f||)^2) for each filter f. Over 4096 draws a filter's standard deviation is known to
    1.1 % (1 / sqrt(2 n)); 5 of those."""
    w = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0).view(8, 1, 1)
    norms = ops.filter_norm([w])[0]
    assert norms.shape == (8, 1, 1)
    params = [w.clone()]
    sizes = [norms.float().expand(w.shape)]
    ops.scaled_noise_(
        params, ops.backup_like(params), ops.random_key(1), distribution="normal", scale=0.01, sizes=sizes
    )
    spread = (params[0] - w).double().flatten(1).std(dim=1)
    assert ((spread / (0.01 * norms.flatten()) - 1).abs() <= 5 / math.sqrt(2 * 4096)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", ["uniform", "truncated_normal"])
def test_nothing_leaves_the_neighbourhood(law: str, dtype: torch.dtype) -> None:
    """|u_i| <= N_i, up to the rounding of w + u: 300,000 draws, capped and not."""
    w, h = filled((300_000,), dtype, 1), filled((300_000,), dtype, 2).abs() * 100
    params = [w.clone()]
    ops.scaled_noise_(
        params,
        ops.backup_like(params),
        ops.random_key(9),
        distribution=law,
        curvatures=[h],
        gamma=0.1,
        eps=0.1,
        lipschitz=1.0,
    )
    n = 0.1 * w.double().abs() + 0.1
    room = torch.finfo(dtype).eps * (w.double().abs() + n)
    assert ((params[0].double() - w.double()).abs() <= n + room).all()


@pytest.mark.parametrize("law", LAWS)
def test_a_negative_scale_is_the_other_side(law: str) -> None:
    """w + s xi and w - s xi around a weight of 0: opposite to the bit."""
    sides = []
    for scale in (0.25, -0.25):
        params = [torch.zeros(5000)]
        ops.scaled_noise_(params, ops.backup_like(params), ops.random_key(6), distribution=law, scale=scale, eps=1.0)
        sides.append(params[0])
    assert torch.equal(sides[0], -sides[1]) and sides[0].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_noise_keeps_every_bit(dtype: torch.dtype) -> None:
    """A size of 0 leaves -0, NaN and infinity as they are: scale 0, no neighbourhood, an infinite curvature."""
    w = torch.tensor([0.0, -0.0, 1.0, torch.nan, torch.inf, -torch.inf] * 50, dtype=dtype)
    h = torch.full_like(w, torch.inf)
    flat_direction = {"curvatures": [torch.zeros_like(w)], "eps": 1.0, "scale": 0.0}
    ways = ({"scale": 0.0, "eps": 1.0}, {"gamma": 0.0, "eps": 0.0}, {"curvatures": [h], "eps": 1.0}, flat_direction)
    for options in ways:
        params = [w.clone()]
        ops.scaled_noise_(params, ops.backup_like(params), ops.random_key(1), **options)
        assert same_bytes(params[0], w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_a_broken_curvature_moves_no_weight(law: str, dtype: torch.dtype) -> None:
    """What is not finite reaches the count and not the weight; its neighbours get their noise. Infinity is no small
    noise and its negative no large one: neither is a curvature."""
    w, h = filled((5000,), dtype, 1), torch.full((5000,), 4.0, dtype=dtype)
    bad = [0, 17, 4095, 4096, 4999]
    h[bad] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.inf, torch.nan], dtype=dtype)
    params = [w.clone()]
    tally = ops.scaled_noise_(
        params, ops.backup_like(params), ops.random_key(2), distribution=law, curvatures=[h], eps=10.0
    )
    assert tally.tolist() == [0.5 * 4995, 0.0, 5.0]
    assert same_bytes(params[0][bad], w[bad])
    plain, one = [w.clone()], torch.ones((), dtype=torch.float64)
    given = (ops.backup_like(params), ops.random_key(2), one, 0.0 * one, one, LAWS.index(law), 0.0, 10.0)
    assert reference.scaled_noise_(plain, [h], [], [], *given).tolist() == tally.tolist()
    assert same_bytes(plain[0][bad], w[bad])
    assert params[0].isfinite().all()
    # a draw below half a unit in the last place of w rounds away: rare, but for 8 bits of bfloat16
    assert (params[0] != w).sum().item() >= (4900 if dtype != torch.bfloat16 else 4500)


def test_golden_sizes() -> None:
    """Section 3 of the paper's bound: h = (200, 400, 50, -.3), rho = 5, gamma = eps = .1; with Rademacher draws |u| is
    sigma itself."""
    w = torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=torch.float64)
    h = torch.tensor([200.0, 400.0, 50.0, -0.3], dtype=torch.float64)
    params = [w.clone()]
    sized = {"curvatures": [h], "lipschitz": 5.0, "gamma": 0.1, "eps": 0.1}
    tally = ops.scaled_noise_(params, ops.backup_like(params), ops.random_key(0), distribution="rademacher", **sized)
    expected = torch.tensor([0.07053456, 0.04995319, 0.125, 0.1], dtype=torch.float64)
    assert ((params[0] - w).abs() - expected).abs().max().item() <= 5e-9
    assert tally[0].item() == pytest.approx(expected.sum().item(), abs=2e-8)
    assert tally[1:].tolist() == [2.0, 0.0]


# ---- probes ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", ["uniform", "normal", "rademacher"])
def test_probes_are_the_documented_draws(law: str, dtype: torch.dtype) -> None:
    lengths = (5000, 0, 3, 1027)
    tensors = [torch.full((n,), torch.nan, dtype=dtype) for n in lengths]
    key = ops.random_key(2**63 + 11, 5, 9)
    ops.probe_(tensors, key, distribution=law)
    for i, t in enumerate(tensors):
        want, off = unit_draws(law, key, i, t.double(), t.double())
        assert_within(t, want.to(dtype), off + arithmetic_eps(dtype) * want.abs())


@given(start=problems(), law=st.sampled_from(["uniform", "normal", "rademacher"]))
def test_probes_are_the_noise(start: Problem, law: str) -> None:
    """With a size of 1 the noise on a weight of 0 is the probe, in any layout: so a probe need not be kept."""
    zeros = [torch.zeros_like(p) for p in start.params]  # dense, in the order of p
    probes = twins(zeros)
    key = ops.random_key(4, 4)
    ops.scaled_noise_(zeros, ops.backup_like(zeros), key, distribution=law, eps=1.0)
    ops.probe_(probes, key, distribution=law)
    assert all(same_bytes(z, v) for z, v in zip(zeros, probes, strict=True))


# ---- filter norms ----


@given(start=problems(), whole=st.booleans())
def test_filter_norms(start: Problem, whole: bool) -> None:
    got = ops.filter_norm(start.params, whole=whole)
    for p, norms in zip(start.params, got, strict=True):
        rows = p.double().reshape(1, -1) if whole or p.dim() < 2 else p.double().flatten(1)
        want = torch.linalg.vector_norm(rows, dim=1)
        assert norms.dtype == torch.float64 and norms.dim() == p.dim()
        torch.testing.assert_close(norms.flatten(), want, rtol=64 * 2.0**-53, atol=0.0)
        assert norms.expand_as(p).shape == p.shape or p.numel() == 0


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_filter_norms_of_any_layout(layout: str) -> None:
    w = filled((7, 3, 5, 5), torch.float32, 3, layout)
    want = ops.filter_norm([w.contiguous()])[0]
    torch.testing.assert_close(ops.filter_norm([w])[0], want, rtol=64 * 2.0**-53, atol=0.0)
