"""Noise by curvature, averages of a curvature, PACGen and filter norms: against closed forms in float64, golden vectors
and ``flatmin.reference``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
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
    fill,
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


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


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


@pytest.mark.parametrize("source", ["square", "plain", "probed"])
@given(start=problems(), element=st.booleans())
def test_averages_equal_reference(start: Problem, source: str, element: bool) -> None:
    now, backup = moved_by(start, 0.5)
    corrections = torch.tensor([2.0, 1.5], dtype=torch.float64)
    key = ops.random_key(3, 1)
    code = ("square", "plain", "probed").index(source)
    results = []
    for oracle in (False, True):
        h, rho = start.state(1, positive=True), start.state(2, positive=True) if element else []
        if oracle:
            args = (now.params, backup, key, corrections, code, 2.0, 0.75, 0.25, 0.125)
            largest = reference.curvature_(h, now.grads, rho, *args)
        else:
            largest = ops.curvature_(
                h,
                now.grads,
                decay=0.75,
                source=source,
                source_scale=2.0,
                key=key,
                params=now.params,
                backup=backup,
                corrections=corrections,
                lipschitz=rho,
                lipschitz_decay=0.25,
                min_step=0.125,
            )
        results.append((largest, h, rho))
    (largest, h, rho), (want, want_h, want_rho) = results
    for a, b in zip(h, want_h, strict=True):
        assert_within(a, b, 8 * torch.finfo(torch.float32).eps * (b.double().abs() + 40.0))
    assert largest.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-2)
    for a, b in zip(rho, want_rho, strict=True):
        assert_within(a, b, 1e-2 + 1e-4 * b.double().abs())


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


# ---- averages of a curvature ----


def spread(*tensors: Tensor) -> Tensor:
    """The sum of magnitudes: what a few roundings of a sum are relative to."""
    return torch.stack([t.double().abs() for t in tensors]).sum(0)


@pytest.mark.parametrize("source", ["square", "plain", "probed"])
@given(start=problems(), decay=st.sampled_from([0.0, 0.75, 1.0]))
def test_average_of_a_source(start: Problem, source: str, decay: float) -> None:
    h, key = start.state(1), ops.random_key(3, 1)
    old = twins(h)
    largest = ops.curvature_(h, start.grads, decay=decay, source=source, source_scale=2.0, key=key)
    assert largest.item() == 0.0 and largest.dtype == torch.float64
    probes = [torch.zeros_like(t) for t in h]
    ops.probe_(probes, key)
    for new, before, x, v in zip(h, old, start.grads, probes, strict=True):
        value = x.double() ** 2 if source == "square" else x.double() * (v.double() if source == "probed" else 1.0)
        want = decay * before.double() + (1 - decay) * 2.0 * value
        # an average in float32 of a float64 gradient is computed in float64 and stored in float32
        unit = torch.finfo(torch.float64 if new.dtype == torch.float64 else torch.float32).eps
        bound = 4 * unit * spread(before, 2.0 * value)
        assert_within(new, want.to(new.dtype), bound)


def moved_by(start: Problem, fraction: float) -> tuple[Problem, Tensor]:
    """Parameters w' = w + fraction times the gradient where it is not tiny, and the backup of w."""
    now = start.copy()
    backup = now.backup()
    ops.sam_ascend_(now.params, now.grads, backup, scalar(1.0), fraction, eps=0.0)
    return now, backup


@given(start=problems(), element=st.booleans(), first=st.booleans())
def test_difference_quotients(start: Problem, element: bool, first: bool) -> None:
    """q = |k' h' - k h| / |w' - w| over the weights as they are stored; a first average has nothing to differ from."""
    now, backup = moved_by(start, 0.5)
    h, rho = start.state(1, positive=True), start.state(2, positive=True) if element else []
    old, old_rho = twins(h), twins(rho)
    k = (0.0 if first else 2.0, 1.5)
    largest = ops.curvature_(
        h,
        now.grads,
        decay=0.75,
        params=now.params,
        backup=backup,
        lipschitz=rho,
        lipschitz_decay=0.25,
        min_step=0.125,
        corrections=torch.tensor(k, dtype=torch.float64),
    )
    top, room = 0.0, 0.0
    for i, (p, w) in enumerate(zip(now.params, start.params, strict=True)):
        unit = arithmetic_eps(p.dtype)
        g = now.grads[i].double()
        step = (p.double() - w.double()).abs()
        new = 0.75 * old[i].double() + 0.25 * g * g
        counts = (step > 0.125) & (k[0] != 0.0)
        q = torch.where(counts, (k[1] * new - k[0] * old[i].double()).abs() / step.clamp(min=0.125), 0.0)
        bound = 8 * unit * spread(k[1] * new, k[0] * old[i].double()) / step.clamp(min=0.125) + 4 * unit * q
        if element:
            want = torch.where(counts, 0.25 * old_rho[i].double() + 0.75 * q, old_rho[i].double())
            assert_within(rho[i], want.to(rho[i].dtype), bound + 4 * unit * spread(old_rho[i], q))
        if q.numel():
            top, room = max(top, q.max().item()), max(room, bound.max().item())
    assert largest.item() == pytest.approx(top, abs=room)
    assert all(same_memory(p, w) for p, w in zip(now.params, moved_by(start, 0.5)[0].params, strict=True))


def test_a_broken_average_shows_in_the_quotient() -> None:
    p, h = torch.ones(5000), torch.ones(5000)
    backup = ops.backup_like([p])
    ops.sam_ascend_([p], [torch.ones(5000)], backup, scalar(1.0), 1.0)
    ones = [torch.ones(5000)]
    for bad in (torch.nan, torch.inf):
        h[4321] = bad
        assert math.isnan(ops.curvature_([h.clone()], ones, decay=0.5, params=[p], backup=backup).item())
        assert math.isnan(ops.curvature_([h.clone()], ones, decay=0.5).item())
        corrections = torch.tensor([0.0, 2.0], dtype=torch.float64)  # with no quotient to take
        fused = ops.restore_sgd_curvature_([p.clone()], [h], [], [torch.ones(5000)], [], backup, 0.1, corrections)
        assert math.isnan(fused.item())


# ---- the step that does both ----

SGD = {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1, "nesterov": False}
AVERAGE = {"decay": 0.75, "lipschitz_decay": 0.25, "min_step": 1e-3}


def wide_problem(start: Problem) -> Problem:
    """The step takes float32 and float64 only: 16-bit tensors become float32."""

    def convert(t: Tensor) -> Tensor:
        return t if t.element_size() > 2 else t.float()

    params, grads = [convert(p) for p in start.params], [convert(g) for g in start.grads]
    return Problem(params, grads, [p.dtype for p in params], start.seed)


@pytest.mark.parametrize("element", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "amsgrad", "lion"])
@given(start=problems())
def test_one_pass_equals_two(start: Problem, optimizer: str, element: bool) -> None:
    """The step and the average give the bits of restore_sgd_ (restore_adam_) followed by curvature_: in registers there
    is the weight that is stored."""
    start = wide_problem(start)
    results = []
    corrections = torch.tensor([2.0, 1.5], dtype=torch.float64)
    for fused in (True, False):
        now, backup = moved_by(start, 0.5)
        h, rho = start.state(3, positive=True), start.state(4, positive=True) if element else []
        buffers = start.state(1) if optimizer == "momentum" else []
        means, squares = start.state(5), start.state(6, positive=True)
        largest = start.state(7, positive=True) if optimizer == "amsgrad" else []
        steps = [torch.tensor(3.0) for _ in now.params]
        averaged: dict[str, Any] = {"curvatures": h, "lipschitz": rho, "corrections": corrections} | AVERAGE
        averaged = averaged if fused else {}
        sgd = SGD | ({"momentum": 0.0} if optimizer == "sgd" else {})
        adam = {"weight_decay": 0.1, "decoupled": True, "amsgrad": optimizer == "amsgrad"}
        if optimizer in ("sgd", "momentum"):
            q = ops.restore_sgd_(now.params, now.grads, buffers, backup, 0.5, **sgd, **averaged)
        elif optimizer == "lion":
            q = ops.restore_lion_(now.params, now.grads, means, backup, 0.5, weight_decay=0.1, **averaged)
        else:
            moments = (means, squares, largest)
            q = ops.restore_adam_(now.params, now.grads, *moments, steps, backup, 0.5, **adam, **averaged)
        if not fused:
            q = ops.curvature_(
                h, now.grads, params=now.params, backup=backup, lipschitz=rho, corrections=corrections, **AVERAGE
            )
        results.append([q, *now.params, *buffers, *means, *squares, *largest, *steps, *h, *rho])
    assert all(same_bytes(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_have_no_displacement(dtype: torch.dtype) -> None:
    t = [torch.ones(4, dtype=dtype)]
    corrections = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"params\[0\] is of 16 bits.*then curvature_"):
        ops.restore_sgd_curvature_(t, t, [], [torch.ones(4)], [], ops.backup_like(t), 0.1, corrections)


# ---- PACGen ----

GOLDEN_W = (1.0, -0.5, 0.25, 0.0)
GOLDEN_PSI = [((200.0, 400.0, 50.0, -0.3), 5.0, 6.4984722791, 2.0), ((2.0, 0.1, 0.0, -0.3), 0.5, 4.3567088267, 4.0)]


@pytest.mark.parametrize(("h", "rho", "psi", "capped"), GOLDEN_PSI)
@pytest.mark.parametrize("per_element", [False, True])
def test_golden_pacgen(h: tuple[float, ...], rho: float, psi: float, capped: float, per_element: bool) -> None:
    w = torch.tensor(GOLDEN_W, dtype=torch.float64)
    lipschitz: float | list[Tensor] = [torch.full_like(w, rho)] if per_element else rho
    got = ops.pacgen([w], [torch.tensor(h, dtype=torch.float64)], gamma=0.1, eps=0.1, lipschitz=lipschitz)
    assert got.shape == (1, 2) and got.dtype == torch.float64
    assert got[0, 0].item() == pytest.approx(psi, abs=5e-11)
    assert got[0, 1].item() == capped


def plain_pacgen(w: Tensor, h: Tensor, rho: Tensor, gamma: float, eps: float) -> tuple[float, float]:
    """The definition with math.log and an exact sum, element by element."""
    terms, capped = [], 0
    for wi, hi, ri in zip(*(t.double().flatten().tolist() for t in (w, h, rho)), strict=True):
        n = gamma * abs(wi) + eps
        c = max(hi + ri * n, 0.0)
        capped += c * n * n <= 1.0
        if n > 0:
            terms.append(math.log((abs(wi) + n) * max(math.sqrt(c), 1.0 / n)))
    return math.fsum(terms), capped


@given(start=problems(), per_element=st.booleans())
def test_pacgen_is_its_definition(start: Problem, per_element: bool) -> None:
    """A factor is off by 8 roundings of float64, of which a logarithm takes the sum; a row's terms add."""
    lipschitz: float | list[Tensor] = [g.abs() for g in start.grads] if per_element else 2.0
    got = ops.pacgen(start.params, start.grads, gamma=0.5, eps=0.25, lipschitz=lipschitz)
    for r, (p, g) in enumerate(zip(start.params, start.grads, strict=True)):
        rho = lipschitz[r].double() if isinstance(lipschitz, list) else torch.full(p.shape, 2.0, dtype=torch.float64)
        psi, capped = plain_pacgen(p, g, rho, 0.5, 0.25)
        assert got[r, 0].item() == pytest.approx(psi, abs=1e-14 * (p.numel() + 1), rel=1e-14)
        assert got[r, 1].item() == capped


def test_pacgen_equals_reference_on_large_lists() -> None:
    for dtype in DTYPES:
        start = large_problem(dtype)
        got = ops.pacgen(start.params, start.grads, gamma=0.1, eps=0.01, lipschitz=3.0)
        want = reference.pacgen(start.params, start.grads, [], scalar(3.0), scalar(1.0), 0.1, 0.01)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)


def test_pacgen_loses_no_digit() -> None:
    """A sum of 4 million equal terms is 4 million times the term, to the last digits: products of mantissas and whole
    exponents lose none, where a running float64 sum would drift by 1e-10."""
    n = 4_000_003
    w, h = torch.full((n,), 0.3), torch.full((n,), 7.0)
    one = ops.pacgen([w[:1]], [h[:1]], gamma=0.1, eps=0.1, lipschitz=2.0)[0, 0].item()
    all_of_them = ops.pacgen([w], [h], gamma=0.1, eps=0.1, lipschitz=2.0)[0, 0].item()
    assert all_of_them == pytest.approx(n * one, rel=2e-15)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("eps", [0.1, 1e-200])  # the second leaves the range in which products are kept
def test_pacgen_of_a_broken_curvature(bad: float, eps: float) -> None:
    """Not finite in its own row, in the kernels and in the reference: -inf is no flat direction."""
    params, h = [torch.ones(5000) for _ in range(2)], [torch.ones(5000) for _ in range(2)]
    h[1][4321] = bad
    one = scalar(1.0)
    for psi in (
        ops.pacgen(params, h, gamma=0.1, eps=eps),
        reference.pacgen(params, h, [], 0.0 * one, one, 0.1, eps),
    ):
        assert psi[0].isfinite().all()
        assert psi[1, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pacgen_without_neighbourhood(dtype: torch.dtype) -> None:
    """eps = 0 and w = 0: the term is log 1. A NaN shows in its own row."""
    w = torch.tensor([0.0, 2.0, 0.0], dtype=dtype)
    h = torch.tensor([1.0, 4.0, -1.0], dtype=dtype)
    bad = torch.tensor([1.0, torch.nan, 1.0], dtype=dtype)
    got = ops.pacgen([w, w, w[:0]], [h, bad, h[:0]], gamma=0.5, eps=0.0)
    # N = 1, c = 4: log(3 * 2)
    assert got[0, 0].item() == pytest.approx(math.log(6.0), rel=1e-12)
    assert got[0, 1].item() == 2.0
    assert math.isnan(got[1, 0].item())
    assert got[2].tolist() == [0.0, 0.0]


@given(scale=st.sampled_from([2.0**k for k in range(-8, 9)]), seed=st.integers(0, 2**31))
def test_pacgen_is_invariant_under_rescaling(scale: float, seed: int) -> None:
    """w -> a w, H -> H / a^2, rho -> rho / a^3 with eps = 0 (a ReLU layer rescaled): the same Psi to the bit for a
    power of two."""
    w = fill(torch.zeros(1000, dtype=torch.float64), seed)
    h, rho = fill(torch.zeros_like(w), seed + 1) * 30, fill(torch.zeros_like(w), seed + 2).abs()
    one = ops.pacgen([w], [h], gamma=0.1, eps=0.0, lipschitz=[rho])
    other = ops.pacgen([w * scale], [h / scale**2], gamma=0.1, eps=0.0, lipschitz=[rho / scale**3])
    assert torch.equal(one, other)


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


# ---- options ----


NAN = math.nan
TWO = torch.tensor([1.0, 1.0], dtype=torch.float64)
STEPS: dict[str, Callable[..., object]] = {
    "sgd": lambda t, backup, **options: ops.restore_sgd_(t, t, [], backup, 0.1, **options),
    "adam": lambda t, backup, **options: ops.restore_adam_(
        t, t, twins(t), twins(t), [], twins(t), backup, 0.1, **options
    ),
    "lion": lambda t, backup, **options: ops.restore_lion_(t, t, twins(t), backup, 0.1, **options),
    "old name": lambda t, backup, curvatures=(), corrections=TWO, **options: ops.restore_sgd_curvature_(
        t, t, [], curvatures, options.pop("lipschitz", []), backup, 0.1, corrections, **options
    ),
}

#: Options that every step with averages refuses, and the message.
BAD_AVERAGES: list[tuple[dict[str, Any], str]] = [
    ({"decay": -1}, "decay: -1 given"),
    ({"decay": 2}, "decay: 2 given"),
    ({"decay": NAN}, "decay: nan given"),
    ({"lipschitz_decay": NAN}, "lipschitz_decay: nan given"),
    ({"lipschitz_decay": 1.5}, "lipschitz_decay: 1.5 given"),
    ({"min_step": -1.0}, "min_step: -1.0 given"),
    ({"min_step": math.inf}, "min_step: inf given"),
]


@pytest.mark.parametrize(("options", "message"), BAD_AVERAGES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_averages_beside_a_step_are_checked(step: str, options: dict[str, Any], message: str) -> None:
    t, h, backup = [torch.ones(4)], [torch.ones(4)], torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        STEPS[step](t, backup, curvatures=h, corrections=TWO, **options)
    with pytest.raises(ValueError, match=message):
        ops.curvature_(h, t, **({"decay": 0.5} | options))
    assert torch.equal(t[0], torch.ones(4)) and torch.equal(h[0], torch.ones(4))


def test_averages_that_do_not_fit_are_refused() -> None:
    t, backup = [torch.ones(4)], torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(TypeError, match="curvature: not an option"):
        ops.restore_sgd_(t, t, [], backup, 0.1, curvature=t)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="corrections: missing"):
        ops.restore_lion_(t, t, [torch.ones(4)], backup, 0.1, curvatures=[torch.ones(4)])
    with pytest.raises(ValueError, match="lipschitz: given without curvatures"):
        ops.restore_sgd_(t, t, [], backup, 0.1, lipschitz=[torch.ones(4)])
    with pytest.raises(ValueError, match="curvatures: an empty list"):
        ops.restore_sgd_curvature_(t, t, [], [], [], backup, 0.1, TWO)
    assert torch.equal(t[0], torch.ones(4))


def test_options_are_checked() -> None:
    t = [torch.ones(4)]
    backup, key = ops.backup_like(t), ops.random_key(1)
    wrong = [torch.ones(3)]
    calls: dict[str, Callable[[], object]] = {
        "distribution: 'gaussian' given; give one of": lambda: ops.scaled_noise_(
            t, backup, key, distribution="gaussian"
        ),
        "gamma: -1.0 given": lambda: ops.scaled_noise_(t, backup, key, gamma=-1.0),
        "gamma: 'x' given": lambda: ops.scaled_noise_(t, backup, key, gamma="x"),  # type: ignore[arg-type]
        "scale: -1.0 given": lambda: ops.scaled_noise_(t, backup, key, scale=-1.0, curvatures=t),
        "scale: inf given": lambda: ops.scaled_noise_(t, backup, key, scale=math.inf, eps=1.0),
        "curvature_scale: nan given": lambda: ops.scaled_noise_(t, backup, key, curvatures=t, curvature_scale=NAN),
        "curvatures and sizes: both given": lambda: ops.scaled_noise_(t, backup, key, curvatures=t, sizes=t),
        "curvatures: an empty list": lambda: ops.scaled_noise_(t, backup, key, curvatures=[]),
        "sizes: an empty list": lambda: ops.scaled_noise_(t, backup, key, sizes=[]),
        "lipschitz: an empty list": lambda: ops.scaled_noise_(t, backup, key, curvatures=t, lipschitz=[]),
        "lipschitz: nan given": lambda: ops.scaled_noise_(t, backup, key, curvatures=t, lipschitz=NAN),
        "lipschitz: 'global' given": lambda: ops.pacgen(t, t, lipschitz="global"),  # type: ignore[arg-type]
        r"curvatures\[0\] has other sizes": lambda: ops.scaled_noise_(t, backup, key, curvatures=wrong, eps=1.0),
        r"sizes\[0\] has other sizes": lambda: ops.scaled_noise_(t, backup, key, sizes=wrong),
        "distribution: 'truncated_normal' has no size": lambda: ops.probe_(t, key, distribution="truncated_normal"),
        "source: 'cube' given; give one of": lambda: ops.curvature_(t, t, decay=0.5, source="cube"),
        "source_scale: nan given": lambda: ops.curvature_(t, t, decay=0.5, source_scale=NAN),
        "key: missing": lambda: ops.curvature_(t, t, decay=0.5, source="probed"),
        "params and backup: quotients need both": lambda: ops.curvature_(t, t, decay=0.5, params=t),
        "eps: nan given": lambda: ops.pacgen(t, t, eps=NAN),
        "random_key: seed -1": lambda: ops.random_key(-1),
        "random_key: seed 0, draw 4294967296": lambda: ops.random_key(0, 2**32),
        "random_key: seed 1.5 given; give an integer": lambda: ops.random_key(1.5),  # type: ignore[arg-type]
    }
    for message, call in calls.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()
    assert torch.equal(t[0], torch.ones(4))


def test_scalars_of_numpy_are_numbers() -> None:
    t, want = [torch.ones(4)], [torch.ones(4)]
    key, backup = ops.random_key(np.int64(3), np.uint32(4), np.int16(5)), ops.backup_like(t)
    assert torch.equal(key.view(torch.int64), ops.random_key(3, 4, 5).view(torch.int64))
    numpy = {"gamma": np.float32(0.5), "eps": np.int64(1), "scale": np.float64(0.5), "lipschitz": np.float32(2.0)}
    ops.scaled_noise_(t, backup, key, curvatures=[torch.ones(4)], **numpy)
    ops.scaled_noise_(want, backup, key, curvatures=[torch.ones(4)], gamma=0.5, eps=1.0, scale=0.5, lipschitz=2.0)
    ops.restore_sgd_(t, t, [], backup, np.float32(0.5), weight_decay=np.float32(0.5))  # type: ignore[arg-type]
    ops.restore_sgd_(want, want, [], backup, 0.5, weight_decay=0.5)
    assert torch.equal(t[0], want[0])


def test_negative_tensors_are_refused() -> None:
    """The value of a tensor is only known to the kernel, which refuses it before it writes."""
    t = [torch.ones(4)]
    backup, key = ops.backup_like(t), ops.random_key(1)
    with pytest.raises(RuntimeError, match="scale: -1 given"):
        ops.scaled_noise_(t, backup, key, scale=scalar(-1.0), eps=1.0, curvatures=t)
    with pytest.raises(RuntimeError, match="lipschitz_constant: -2 given"):
        ops.pacgen(t, t, lipschitz=scalar(-2.0))
    assert torch.equal(t[0], torch.ones(4))


def test_empty_lists() -> None:
    backup, key = ops.backup_like([]), ops.random_key(1)
    assert ops.scaled_noise_([], backup, key, eps=1.0).tolist() == [0.0, 0.0, 0.0]
    assert ops.curvature_([], [], decay=0.5).item() == 0.0
    assert ops.pacgen([], []).shape == (0, 2)
    assert ops.filter_norm([]) == []
    ops.probe_([], key)
