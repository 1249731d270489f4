"""Norm, ties, ascend and restore: against the paper's numbers, closed forms and ``flatmin.reference``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flatmin import ops, reference
from flatmin.ops import _library
from problems import (
    ADAPTIVE,
    DTYPES,
    P_NORMS,
    Problem,
    arithmetic_eps,
    assert_within,
    gaps,
    large_problem,
    problems,
    same_bytes,
    same_memory,
    twins,
)

Adaptive = bool | str

#: A norm's relative error. A sum of squares passes 32 additions in a lane, 7 folds and log2(chunks) more, each within
#: 2^-53: below 50 roundings for any list in these tests. For q other than 1, 2, inf a power is good to 1e-12, and there
#: are two of them.
EXACT_POWER, ANY_POWER = 64 * 2.0**-53, 2e-12


def norm_error(q: float) -> float:
    return EXACT_POWER if q in (1.0, 2.0, math.inf) else ANY_POWER


def test_cpu_tensors_run_the_c_kernels() -> None:
    """Without this the comparisons with the reference below would compare the reference with itself."""
    assert "cpu" in _library.DEVICES
    assert torch.ops.flatmin.isa() in (1, 3, 4)


# ---- golden vectors (w, g and the printed perturbations: derived by hand from the formulas of each paper) ----

W, G = (1.0, -0.5, 0.25, 0.0), (0.3, -0.4, 0.0, 1.2)
GOLDEN: list[tuple[float, Adaptive, float, tuple[float, ...], int]] = [
    # p, adaptive, rho, e, printed digits after the point
    (2.0, False, 0.05, (0.01153846, -0.01538462, 0.0, 0.04615385), 8),
    (1.5, False, 0.05, (0.00301989, -0.00536869, 0.0, 0.04831819), 8),
    (3.0, False, 0.05, (0.02280492, -0.02633286, 0.0, 0.04560985), 8),
    (math.inf, False, 0.05, (0.05, -0.05, 0.0, 0.05), 8),
    (1.0, False, 0.05, (0.0, 0.0, 0.0, 0.05), 8),
    (2.0, "davda54", 0.05, (0.04160251, -0.0138675, 0.0, 0.0), 8),
    (2.0, "big_vision", 0.05, (0.01153846, -0.00769231, 0.0, 0.0), 8),
    (2.0, "asam", 0.5, (0.418678991, -0.142336903, 0.0, 0.000164171745), 9),
]


def ascend(
    params: list[Tensor],
    grads: list[Tensor],
    backup: Tensor,
    rho: float,
    *,
    p: float,
    adaptive: Adaptive,
    eta: float = 0.01,
    eps: float = 1e-12,
) -> None:
    """The whole ascent as a training loop does it: norm, for p = 1 the ties, perturbation."""
    q = ops.dual_exponent(p)
    norm = ops.norm(grads, params, q=q, adaptive=adaptive, eta=eta)
    radius: float | Tensor = rho
    if math.isinf(q):
        radius = rho / ops.ties(grads, norm, params, adaptive=adaptive, eta=eta)
    ops.sam_ascend_(params, grads, backup, norm, radius, q=q, adaptive=adaptive, eta=eta, eps=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "adaptive", "rho", "expected", "digits"), GOLDEN)
def test_golden_perturbations(
    p: float, adaptive: Adaptive, rho: float, expected: tuple[float, ...], digits: int, dtype: torch.dtype
) -> None:
    w, g = torch.tensor([W], dtype=dtype), torch.tensor([G], dtype=dtype)  # two dimensions: ASAM scales it
    params = [w.clone()]
    ascend(params, [g], ops.backup_like(params), rho, p=p, adaptive=adaptive)
    e = (params[0] - w).double()
    # half a unit of the last printed digit, and the rounding of w + e where |w + e| < 2
    bound = 0.5 * 10.0**-digits + torch.finfo(dtype).eps
    assert (e - torch.tensor([expected], dtype=torch.float64)).abs().max().item() <= bound


def test_asam_leaves_vectors_unscaled() -> None:
    """Biases and norm layers (one dimension) have T = 1 but count in the norm."""
    weight, bias = torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)
    g = [torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    params = [weight.clone(), bias.clone()]
    ascend(params, g, ops.backup_like(params), 0.5, p=2.0, adaptive="asam", eta=0.0)
    # T g = (3 * 1, 4): norm 5, e = 0.5 * (9, 4) / 5
    assert params[0].item() == pytest.approx(3.9, abs=1e-11)
    assert params[1].item() == pytest.approx(5.4, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", P_NORMS)
@given(problem=problems())
def test_radius_and_gain(problem: Problem, p: float, dtype: torch.dtype) -> None:
    """||e||_p = rho and <e, g> = rho ||g||_q. At w = 0 the new weight is e itself, so nothing is lost to w + e."""
    rho, grads = 0.25, [g.to(dtype) for g in problem.grads]
    params = [torch.zeros_like(g) for g in grads]
    ascend(params, grads, ops.backup_like(params), rho, p=p, adaptive=False, eps=0.0)
    e, g = ([x for t in tensors for x in t.double().flatten().tolist()] for tensors in (params, grads))
    gain = plain_norm(g, ops.dual_exponent(p))
    # e is rounded to its type once (q = 2: twice), relative to each element
    tolerance = norm_error(ops.dual_exponent(p)) + 2 * torch.finfo(dtype).eps
    assert plain_norm(e, p) == pytest.approx(rho if gain else 0.0, rel=2 * tolerance)
    assert math.fsum(x * y for x, y in zip(e, g, strict=True)) == pytest.approx(rho * gain, rel=2 * tolerance)


# ---- the norm against Python's own arithmetic ----


def plain_norm(values: list[float], q: float) -> float:
    """||values||_q from exact sums of Python floats, scaled by a power of two so that q = 2 rounds only squares."""
    largest = max(map(abs, values), default=0.0)
    if largest == 0.0 or math.isinf(q):
        return largest
    exponent = math.frexp(largest)[1]
    unit = [abs(math.ldexp(v, -exponent)) for v in values]  # in [0, 1)
    if q == 2.0:
        return math.ldexp(math.sqrt(math.fsum(u * u for u in unit)), exponent)
    ratio = [abs(v) / largest for v in values]
    return largest * math.pow(math.fsum(math.pow(r, q) for r in ratio), 1.0 / q)


#: 50 values of 1e306 have a 1-norm within float64.
_DOUBLES = st.lists(st.floats(-1e306, 1e306), min_size=1, max_size=50)
_FLOATS = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=50)


def assert_norm(values: list[float], q: float, dtype: torch.dtype) -> None:
    got = ops.norm([torch.tensor(values, dtype=dtype)], q=q)
    assert got.dtype == torch.float64 and got.shape == ()
    smallest = 5e-324  # of float64: a norm down there is a whole multiple of it
    assert got.item() == pytest.approx(plain_norm(values, q), rel=norm_error(q), abs=2 * smallest)


@pytest.mark.parametrize("p", P_NORMS)
@given(values=_DOUBLES)
def test_norm_of_any_doubles(values: list[float], p: float) -> None:
    assert_norm(values, ops.dual_exponent(p), torch.float64)


@pytest.mark.parametrize("p", P_NORMS)
@given(values=_FLOATS)
def test_norm_of_any_floats(values: list[float], p: float) -> None:
    assert_norm(values, ops.dual_exponent(p), torch.float32)


@pytest.mark.parametrize("p", P_NORMS)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float64, 1e200),  # the square overflows
        (torch.float64, 1e-200),  # the square underflows
        (torch.float64, 5e-324),  # the smallest denormal
        (torch.float32, 3e38),
        (torch.float32, 1e-45),
        (torch.bfloat16, 3e38),
        (torch.float16, 65504.0),
        (torch.float16, 6e-8),
    ],
)
def test_norm_of_many_extreme_values(value: float, dtype: torch.dtype, p: float) -> None:
    """n equal values have norm n^(1/q) times the value, whatever its size: 9000 span three chunks of 4096."""
    n, q = 9000, ops.dual_exponent(p)
    t = torch.full((n,), value, dtype=dtype)
    expected = t[0].item() * (1.0 if math.isinf(q) else n ** (1.0 / q))
    assert ops.norm([t], q=q).item() == pytest.approx(expected, rel=norm_error(q), abs=1e-323)


def test_norm_of_mixed_magnitudes() -> None:
    """Denormals, ordinary and huge values in one list: each of the ranges that the sum of squares scales apart."""
    values = [5e-324, 1e-310, 1e-160, 1e-30, 3.0, 4.0, 1e30]
    for count in range(1, len(values) + 1):
        assert_norm(values[:count], 2.0, torch.float64)
    assert_norm([*values, 1e160, 1e300], 2.0, torch.float64)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 51.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 4095, 4096, 4999])
def test_norm_is_not_finite_if_an_element_is_not(at: int, bad: float, q: float) -> None:
    t = torch.ones(5000)
    t[at] = bad
    result = ops.norm([torch.ones(7), t, torch.ones(3)], q=q).item()
    assert math.isnan(result) if math.isnan(bad) else result == math.inf


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("p", P_NORMS)
@given(problem=problems())
def test_norm_equals_reference(problem: Problem, p: float, adaptive: Adaptive) -> None:
    q, scaling = ops.dual_exponent(p), ops.scaling_code(adaptive)
    got = ops.norm(problem.grads, problem.params, q=q, adaptive=adaptive)
    want = reference.norm(problem.grads, problem.params, q, scaling, 0.01)
    assert got.item() == pytest.approx(want.item(), rel=2 * norm_error(q), abs=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", P_NORMS)
def test_norm_of_large_lists(p: float, dtype: torch.dtype) -> None:
    problem, q = large_problem(dtype), ops.dual_exponent(p)
    values = [x for g in problem.grads for x in g.double().flatten().tolist()]
    assert ops.norm(problem.grads, q=q).item() == pytest.approx(plain_norm(values, q), rel=norm_error(q))


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@given(problem=problems())
def test_ties_equal_reference(problem: Problem, adaptive: Adaptive) -> None:
    """The maximum rounds nothing, so both sides must see the same one; the count is exact."""
    scaling = ops.scaling_code(adaptive)
    largest = ops.norm(problem.grads, problem.params, q=math.inf, adaptive=adaptive)
    assert largest == reference.norm(problem.grads, problem.params, math.inf, scaling, 0.01)
    got = ops.ties(problem.grads, largest, problem.params, adaptive=adaptive)
    assert got.dtype == torch.float64 and got.shape == ()
    assert got == reference.ties(problem.grads, problem.params, largest, scaling, 0.01)
    assert got > 0 or all(g.numel() == 0 for g in problem.grads)


def test_ties_count_over_tensors_and_signs() -> None:
    tensors = [torch.tensor([1.0, -2.0]), torch.zeros(5000), torch.tensor([2.0, 2.0], dtype=torch.float64)]
    assert ops.ties(tensors, ops.norm(tensors, q=math.inf)).item() == 3.0


# ---- ascend and restore ----


def assert_ascended(got: Problem, want: Problem, start: Problem, q: float) -> None:
    """Equal up to rounding: 4 roundings in each of the two perturbations (eta, T, T again, radius) and one in each sum,
    each half an eps of what it rounds; and the error of the power."""
    power = 0.0 if q in (1.0, 2.0, math.inf) else ANY_POWER
    for p, reference_p, w in zip(got.params, want.params, start.params, strict=True):
        eps = arithmetic_eps(p.dtype)
        result, e = reference_p.double().abs(), (reference_p.double() - w.double()).abs()
        assert_within(p, reference_p, eps * 2.0 * result + (eps * 4.0 + power) * e)


def run_ascend(problem: Problem, rho: float, p: float, adaptive: Adaptive, backup: Tensor, *, oracle: bool) -> None:
    """One ascent by the kernels or by the reference, both from the kernels' norm."""
    q, scaling = ops.dual_exponent(p), ops.scaling_code(adaptive)
    norm = ops.norm(problem.grads, problem.params, q=q, adaptive=adaptive)
    radius = torch.tensor(rho, dtype=torch.float64)
    if math.isinf(q):
        radius = radius / ops.ties(problem.grads, norm, problem.params, adaptive=adaptive)
    if oracle:
        key = torch.empty(0, dtype=torch.uint64)
        reference.sam_ascend_(problem.params, problem.grads, backup, norm, radius, key, q, scaling, 0.01, 1e-12)
    else:
        ops.sam_ascend_(problem.params, problem.grads, backup, norm, radius, q=q, adaptive=adaptive)


def check_ascend_and_restore(start: Problem, rho: float, p: float, adaptive: Adaptive) -> None:
    got, want = start.copy(), start.copy()
    backup, reference_backup = start.backup(), start.backup()
    run_ascend(got, rho, p, adaptive, backup, oracle=False)
    run_ascend(want, rho, p, adaptive, reference_backup, oracle=True)
    assert torch.equal(backup, reference_backup)
    assert_ascended(got, want, start, ops.dual_exponent(p))
    for moved, w, g, untouched in zip(got.params, start.params, got.grads, start.grads, strict=True):
        assert torch.equal(gaps(moved), gaps(w))
        assert same_memory(g, untouched)
    addresses = [p.data_ptr() for p in got.params]
    ops.restore_(got.params, backup)
    assert [p.data_ptr() for p in got.params] == addresses
    assert all(same_memory(p, w) for p, w in zip(got.params, start.params, strict=True))
    assert torch.equal(backup, reference_backup)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("p", P_NORMS)
@given(start=problems())
def test_ascend_equals_reference(start: Problem, p: float, adaptive: Adaptive) -> None:
    check_ascend_and_restore(start, 2.0, p, adaptive)  # e as large as w: its errors are not lost in those of w + e


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", P_NORMS)
def test_ascend_of_large_lists(p: float, dtype: torch.dtype) -> None:
    check_ascend_and_restore(large_problem(dtype), 5.0, p, False)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("p", P_NORMS[1:])
@given(start=problems())
def test_norm_and_ascent_in_one_call(start: Problem, p: float, adaptive: Adaptive) -> None:
    """Any strides and types against the reference, by the norm that was returned; that one against its own."""
    q, scaling = ops.dual_exponent(p), ops.scaling_code(adaptive)
    got, want = start.copy(), start.copy()
    backup, reference_backup = start.backup(), start.backup()
    norm = ops.sam_norm_ascend_(got.params, got.grads, backup, 2.0, q=q, adaptive=adaptive)
    expected = reference.norm(start.grads, start.params, q, scaling, 0.01)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-12)
    radius, key = torch.tensor(2.0, dtype=torch.float64), torch.empty(0, dtype=torch.uint64)
    reference.sam_ascend_(want.params, want.grads, reference_backup, norm, radius, key, q, scaling, 0.01, 1e-12)
    assert torch.equal(backup, reference_backup)
    assert_ascended(got, want, start, q)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("p", P_NORMS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_has_the_bits_of_two(dtype: torch.dtype, p: float, adaptive: Adaptive) -> None:
    q = ops.dual_exponent(p)
    once, twice = large_problem(dtype), large_problem(dtype)
    backups = once.backup(), twice.backup()
    norm = ops.sam_norm_ascend_(once.params, once.grads, backups[0], 5.0, q=q, adaptive=adaptive)
    expected = ops.norm(twice.grads, twice.params, q=q, adaptive=adaptive)
    ops.sam_ascend_(twice.params, twice.grads, backups[1], expected, 5.0, q=q, adaptive=adaptive)
    assert same_memory(norm, expected)
    assert all(same_memory(p, other) for p, other in zip(once.params, twice.params, strict=True))
    assert torch.equal(*backups)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_radius_in_the_one_norm_goes_to_the_largest(dtype: torch.dtype, adaptive: Adaptive) -> None:
    """p = 1 moves exactly the elements that ``ties`` counts. ASAM's |w| + 0.01 is no number of these types: norm, ties
    and ascent must round T g alike or none is found."""
    w = torch.tensor([[0.3, -0.7, 0.7, 0.1]], dtype=dtype)
    g = torch.tensor([[0.1, 0.9, -0.9, 0.2]], dtype=dtype)
    params = [w.clone()]
    ascend(params, [g], ops.backup_like(params), 0.5, p=1.0, adaptive=adaptive)
    assert (params[0] != w).tolist() == [[False, True, True, False]]
    assert params[0][0, 1] == -params[0][0, 2]


#: Quiet NaNs of both signs with a payload, infinities, zeros, and the smallest denormal of each type.
SPECIAL_BITS = {
    torch.float32: [0x7FC12345, 0x7F812345, 0xFFC54321, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x80000001],
    torch.float64: [
        0x7FF8123456789ABC,
        0x7FF0123456789ABC,
        0xFFF8CBA987654321,
        0x7FF << 52,
        0xFFF << 52,
        1 << 63,
        0,
        1,
    ],
    torch.bfloat16: [0x7FC1, 0x7F81, 0xFFD3, 0x7F80, 0xFF80, 0x8000, 0, 1, 0x8001],
    torch.float16: [0x7E01, 0x7C01, 0xFF13, 0x7C00, 0xFC00, 0x8000, 0, 1, 0x8001],
}


def special_values(dtype: torch.dtype) -> Tensor:
    """The bit patterns as a tensor of 37 repeats: longer than a vector, with a tail."""
    size = 8 * dtype.itemsize
    integers = [b - (1 << size) if b >= 1 << (size - 1) else b for b in SPECIAL_BITS[dtype]]
    integer_type = {16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
    return torch.tensor(integers * 37, dtype=integer_type).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_brings_back_every_bit(dtype: torch.dtype) -> None:
    start = special_values(dtype)
    params, grads = [start.clone()], [torch.ones_like(start)]
    backup = ops.backup_like(params)
    ascend(params, grads, backup, 4.0, p=2.0, adaptive=False)
    assert not same_bytes(params[0], start)
    ops.restore_(params, backup)
    assert same_bytes(params[0], start)


def still(
    params: list[Tensor], grads: list[Tensor], norm: float, rho: float | Tensor, *, q: float, eps: float = 1e-12
) -> None:
    """Asserts that this ascent changes no bit of a weight and backs all of them up."""
    before = twins(params)
    backup = ops.backup_like(params).fill_(0xA5)
    expected = backup.clone()
    reference.sam_ascend_(
        twins(params), grads, expected, torch.tensor(math.nan), torch.ones(()), torch.empty(0), 2.0, 0, 0.0, 0.0
    )
    ops.sam_ascend_(params, grads, backup, torch.tensor(norm, dtype=torch.float64), rho, q=q, eps=eps)
    assert all(same_bytes(p, w) for p, w in zip(params, before, strict=True))
    assert torch.equal(backup, expected)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_moves_without_a_finite_scale(dtype: torch.dtype, q: float) -> None:
    params = [special_values(dtype), torch.ones(5000, dtype=dtype)]
    grads = [torch.ones_like(p) for p in params]
    for norm in (math.nan, math.inf, -math.inf):
        still(params, grads, norm, 0.05, q=q)
    still(params, grads, 1.0, 0.0, q=q)
    still(params, grads, 1.0, torch.tensor(0.0), q=q)
    still(params, grads, 0.0, 0.05, q=q, eps=0.0)  # rho / 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("p", P_NORMS)
def test_a_bad_gradient_moves_nothing(p: float, bad: float) -> None:
    """One NaN or infinity among good gradients: the norm tells, and no weight of any tensor follows it."""
    params = [torch.ones(3, dtype=d) for d in DTYPES]
    grads = [torch.ones(3, dtype=d) for d in DTYPES]
    grads[2][1] = bad
    before = twins(params)
    ascend(params, grads, ops.backup_like(params), 0.05, p=p, adaptive=False)
    assert all(same_bytes(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("p", P_NORMS)
def test_zero_gradients_move_nothing(p: float, adaptive: Adaptive) -> None:
    params = [torch.full((2, 5000), 0.3, dtype=d) for d in DTYPES]
    grads = [torch.zeros_like(p) for p in params]
    before = twins(params)
    ascend(params, grads, ops.backup_like(params), 0.05, p=p, adaptive=adaptive)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_sign_of_zero_is_zero() -> None:
    """p = inf moves by rho sign(g): a weight whose gradient is 0 or -0 stays, whatever the others do."""
    params, grads = [torch.ones(4)], [torch.tensor([0.0, -0.0, 1e-30, -3.0])]
    ascend(params, grads, ops.backup_like(params), 0.5, p=math.inf, adaptive=False)
    assert params[0].tolist() == [1.0, 1.0, 1.5, 0.5]


def test_expanded_gradients_are_read() -> None:
    """A gradient may overlap itself (torch.ones(()).expand(n)): it is only read."""
    g = torch.tensor(0.5).expand(5000)
    params, again = [torch.ones(5000)], [torch.ones(5000)]
    assert ops.norm([g]) == ops.norm([g.clone()])
    ascend(params, [g], ops.backup_like(params), 1.0, p=2.0, adaptive=False)
    ascend(again, [g.clone()], ops.backup_like(again), 1.0, p=2.0, adaptive=False)
    assert torch.equal(params[0], again[0])
    assert params[0][0].item() == pytest.approx(1.0 + 1.0 / math.sqrt(5000))


def test_empty_lists_are_no_work() -> None:
    empty = ops.backup_like([])
    assert empty.numel() == 0
    assert ops.norm([]).item() == 0.0 and ops.ties([], torch.zeros((), dtype=torch.float64)).item() == 0.0
    ops.sam_ascend_([], [], empty, torch.ones((), dtype=torch.float64), 0.05)
    ops.restore_([], empty)
    ops.restore_sgd_([], [], [], empty, 0.1)
    ops.restore_adam_([], [], [], [], [], [], empty, 0.1)
    assert empty.numel() == 0


def test_backup_holds_each_tensor_at_a_cache_line() -> None:
    """The layout that a saved backup, the reference and every kernel share: 64-byte slots, memory order inside."""
    a, b = torch.arange(3.0), torch.arange(6.0, dtype=torch.float64).view(2, 3).t()
    backup = ops.backup_like([a, b])
    assert backup.dtype == torch.uint8 and backup.numel() == 128
    ops.sam_ascend_([a, b], [torch.ones_like(a), torch.ones_like(b)], backup, torch.ones((), dtype=torch.float64), 0.5)
    assert backup[:12].view(torch.float32).tolist() == [0.0, 1.0, 2.0]
    assert backup[64:112].view(torch.float64).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
