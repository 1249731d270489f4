"""Inner products of lists, combinations of two and three, and the copies: against float64 and ``flatmin.reference``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flatmin import ops, reference
from flatmin.ops import _dispatch
from problems import (
    DTYPES,
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


def lists_of(problem: Problem) -> list[list[Tensor]]:
    """Four lists: weights, gradients of perhaps other types and strides, and two of the state's types."""
    return [problem.params, problem.grads, problem.state(1), problem.state(2)]


def scalars(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- inner products ----


def check_products(lists: list[list[Tensor]]) -> None:
    """Each sum against math.fsum of the exact products. A product of float32 or shorter numbers is exact in float64."""
    before = [twins(tensors) for tensors in lists]
    got = ops.gram(*lists)
    assert got.shape == (len(lists), len(lists)) and got.dtype == torch.float64
    assert torch.equal(got, got.T)
    flat = [torch.cat([t.double().flatten() for t in tensors]) for tensors in lists]
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            want, size = math.fsum((a * b).tolist()), (a * b).abs().sum().item()
            # pairwise sums inside of a lane, a chunk and over chunks: the depth of the tree, not the number of terms
            assert abs(got[i, j].item() - want) <= 64 * 2.0**-53 * size
    assert all(same_memory(t, old) for a, b in zip(lists, before, strict=True) for t, old in zip(a, b, strict=True))


@pytest.mark.parametrize("k", [2, 3, 4])
@given(start=problems())
def test_products_are_those_of_float64(start: Problem, k: int) -> None:
    check_products(lists_of(start)[:k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_large_lists(dtype: torch.dtype) -> None:
    check_products(lists_of(large_problem(dtype)))


def test_products_equal_the_reference() -> None:
    lists = lists_of(large_problem(torch.float32))
    torch.testing.assert_close(torch.ops.flatmin.dot(*lists), reference.dot(*lists), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(torch.ops.flatmin.dot(*lists[:2], [], []), reference.dot(*lists[:2], [], []))


def test_golden_products() -> None:
    a, b = [torch.tensor([1.0, 2.0]), torch.tensor([[-3.0]])], [torch.tensor([4.0, -5.0]), torch.tensor([[6.0]])]
    assert ops.gram(a, b).tolist() == [[14.0, -24.0], [-24.0, 77.0]]
    assert ops.dot(a, b).item() == -24.0
    assert ops.dot(a, b).shape == ()
    c = [torch.tensor([0.5, 0.0]), torch.tensor([[1.0]])]
    assert ops.gram(a, b, c).tolist() == [[14.0, -24.0, -2.5], [-24.0, 77.0, 8.0], [-2.5, 8.0, 1.25]]
    assert ops.gram(a, c, a, b)[3].tolist() == [-24.0, 8.0, -24.0, 77.0]


def test_products_cancel_to_the_last_bit() -> None:
    """Orthogonal lists: every product is exact, so the sum of a term and its negative is 0."""
    a = filled((4096,), torch.float32, 1)
    assert ops.dot([a, a], [a, -a]).item() == 0.0


def test_products_are_norms() -> None:
    """The diagonal is the square of the norm, without that one's protection of float64 from overflow."""
    lists = [filled((n,), torch.float32, n) for n in (3, 5000)]
    assert ops.gram(lists, lists)[0, 0].sqrt().item() == pytest.approx(ops.norm(lists).item(), rel=1e-15)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_products_of_what_is_not_finite_are_not(bad: float) -> None:
    a, b, c = (filled((5000,), torch.float32, seed) for seed in (1, 2, 3))
    a[4321] = bad
    products = ops.gram([a], [b], [c])
    assert not products[0].isfinite().any()
    assert products[1:, 1:].isfinite().all()


def test_lists_are_checked() -> None:
    t = [torch.ones(3)]
    with pytest.raises(ValueError, match="lists: 1 given; give 2 to 4"):
        ops.gram(t)
    with pytest.raises(ValueError, match="lists: 5 given; give 2 to 4"):
        ops.gram(t, t, t, t, t)
    with pytest.raises(RuntimeError, match=r"lists\[2\] has 0 tensors and lists\[0\] has 1"):
        ops.gram(t, t, [])
    with pytest.raises(RuntimeError, match="has 0 tensors"):
        ops.dot(t, [])
    assert ops.gram([], [], []).tolist() == [[0.0] * 3] * 3
    assert ops.dot([], []).item() == 0.0


def test_products_of_complex_lists() -> None:
    """Of two reals each: Re <a, b>."""
    a, b = [torch.tensor([1.0 + 2.0j])], [torch.tensor([3.0 - 1.0j])]
    _dispatch.warned.clear()
    with pytest.warns(UserWarning, match="no kernel"):
        product = ops.dot(a, b)
    assert product.item() == 1.0


# ---- combinations ----

COEFFICIENTS = [(0.5, -2.0), (0.7, -1.1, 3.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.5), (0.0, 0.0)]


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@given(start=problems())
def test_blends_equal_reference(start: Problem, coefficients: tuple[float, ...]) -> None:
    got, want = start.copy(), start.copy()
    third = start.state(1) if len(coefficients) == 3 else []
    k = scalars(*coefficients, *[0.0] * (3 - len(coefficients)))
    ops.blend_(got.params, got.grads, third, coefficients=coefficients)
    reference.blend_(want.params, want.grads, third, k)
    for i, (p, expected) in enumerate(zip(got.params, want.params, strict=True)):
        assert torch.equal(gaps(p), gaps(start.params[i]))
        terms = [start.params[i], start.grads[i], *(third[i : i + 1])]
        size = sum(abs(c) * t.double().abs() for c, t in zip(coefficients, terms, strict=True))
        # a coefficient that rounds to float32, then at most 3 roundings on one side and 5 on the other
        assert_within(p, expected, 5 * arithmetic_eps(p.dtype) * size)
    assert all(same_memory(g, old) for g, old in zip(got.grads, start.grads, strict=True))


def test_golden_blend() -> None:
    g, x, y = ([torch.tensor(v)] for v in ([1.0, 2.0], [10.0, -4.0], [0.5, 8.0]))
    ops.blend_(g, x, y, coefficients=(2.0, 0.5, -1.0))
    assert g[0].tolist() == [6.5, -6.0]
    ops.blend_(g, x, coefficients=scalars(1.0, -0.5, math.nan))  # the third is not looked at
    assert g[0].tolist() == [1.5, -4.0]


def test_a_term_of_coefficient_zero_is_left_out() -> None:
    """In the kernels and in the reference: a list that has no part in the sum passes no NaN on."""
    bad, one = [torch.tensor([torch.nan, torch.inf])], [torch.ones(2)]
    for blend in (torch.ops.flatmin.blend_, reference.blend_):
        for without in range(3):
            g, x, y = (twins(bad if i == without else one) for i in range(3))
            blend(g, x, y, scalars(*(0.0 if i == without else 1.0 for i in range(3))))
            assert g[0].tolist() == [2.0, 2.0]
    moved = [torch.ones(2)]
    ops.axpy_(moved, bad, 0.0)
    assert moved[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scale", [-0.375, 1.0, 0.1])
@given(start=problems(), saves=st.booleans())
def test_axpy_equals_reference(start: Problem, scale: float, saves: bool) -> None:
    got, want = start.copy(), start.copy()
    backup = start.backup() if saves else torch.empty(0, dtype=torch.uint8)
    want_backup = backup.clone()
    ops.axpy_(got.params, got.grads, scale, backup=backup if saves else None)
    reference.axpy_(want.params, want.grads, want_backup, scalars(scale)[0])
    assert torch.equal(backup, want_backup)
    for i, (p, expected) in enumerate(zip(got.params, want.params, strict=True)):
        assert torch.equal(gaps(p), gaps(start.params[i]))
        size = start.params[i].double().abs() + abs(scale) * start.grads[i].double().abs()
        assert_within(p, expected, 2 * arithmetic_eps(p.dtype) * size)


@given(start=problems())
def test_what_is_saved_comes_back(start: Problem) -> None:
    got, backup, want = start.copy(), start.backup(), start.backup()
    ops.save_(got.params, backup)
    reference.save_(start.params, want)
    assert torch.equal(backup, want)
    assert all(same_memory(p, old) for p, old in zip(got.params, start.params, strict=True))
    for p in got.params:
        p.fill_(7.0)
    ops.restore_(got.params, backup)
    assert all(same_bytes(p, old) for p, old in zip(got.params, start.params, strict=True))


def test_coefficients_and_scales_are_checked() -> None:
    t, x = [torch.ones(3)], [torch.ones(3)]
    calls: dict[str, Any] = {
        "coefficients: nan given": lambda: ops.blend_(t, x, coefficients=(1.0, math.nan)),
        "coefficients: .1.0. given": lambda: ops.blend_(t, x, coefficients=(1.0,)),
        "coefficients: .1.0, 2.0. given; give 3 floats": lambda: ops.blend_(t, x, x, coefficients=(1.0, 2.0)),
        "scale: inf given": lambda: ops.axpy_(t, x, math.inf),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert t[0].tolist() == [1.0] * 3
    ops.blend_([], [], coefficients=(1.0, 2.0))
    ops.axpy_([], [], 1.0)
    ops.save_([], ops.backup_like([]))
