"""The operator of PACGen: golden values, its definition in float64, ``flatmin.reference``, broken curvature."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flatmin import ops, reference
from operator_arguments import scalar
from problems import (
    DTYPES,
    Problem,
    fill,
    large_problem,
    problems,
)

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
