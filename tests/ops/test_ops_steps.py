"""Restore fused with the base optimizer's step: against ``torch.optim`` and against ``flatmin.reference``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flatmin import ops, reference
from flatmin.optim import Lion
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

#: A bias, tails on both sides of a vector, a buffer and a chunk, and a matrix with strides of its own.
SHAPES = [(3,), (17,), (1023,), (4097,), (33, 65)]
STEPS = 4


def make_params(dtype: torch.dtype) -> list[Tensor]:
    return [filled(shape, dtype, i, "transposed") for i, shape in enumerate(SHAPES)]


def make_grads(dtype: torch.dtype, step: int) -> list[Tensor]:
    return [filled(shape, dtype, 100 * (step + 1) + i, "transposed") for i, shape in enumerate(SHAPES)]


def perturbed(params: list[Tensor]) -> Tensor:
    """Backs the parameters up and leaves garbage in them: a fused step must start from the backup alone."""
    backup = ops.backup_like(params)
    grads = [torch.ones_like(p) for p in params]
    ops.sam_ascend_(params, grads, backup, torch.ones((), dtype=torch.float64), 3.0)
    return backup


def optimizer_step(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


# ---- against torch.optim ----

SGD_OPTIONS = [
    {"momentum": m, "dampening": d, "weight_decay": wd, "nesterov": n, "maximize": x}
    for m, d, wd, n, x in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 5e-4), (False, True), (False, True))
    if not n or (m > 0.0 and d == 0.0)  # as torch.optim.SGD demands of nesterov
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_gives_the_bits_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    lr = 0.1
    params, expected = make_params(dtype), make_params(dtype)
    optimizer = torch.optim.SGD(expected, lr=lr, foreach=False, **options)
    buffers = [torch.full_like(p, torch.nan) for p in params] if options["momentum"] else []
    for step in range(STEPS):
        grads = make_grads(dtype, step)
        optimizer_step(optimizer, expected, grads)
        ops.restore_sgd_(params, grads, buffers, perturbed(params), lr, first_step=step == 0, **options)
        assert all(same_bytes(p, e) for p, e in zip(params, expected, strict=True))
        for buffer, e in zip(buffers, expected, strict=False):
            assert same_bytes(buffer, optimizer.state[e]["momentum_buffer"])


ADAM_OPTIONS = [
    {"decoupled": d, "amsgrad": a, "maximize": x, "weight_decay": wd}
    for d, a, x, wd in itertools.product((False, True), (False, True), (False, True), (0.0, 0.01))
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.3, 0.5), (0.0, 0.9)])
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_adam_agrees_with_torch(
    options: dict[str, Any], beta1: float, beta2: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Relative to the weight, or to the gradient's or the step's own size where terms of the same size cancel."""
    lr = 0.01
    settings = {k: v for k, v in options.items() if k != "decoupled"}
    params, expected = make_params(dtype), make_params(dtype)
    base = torch.optim.AdamW if options["decoupled"] else torch.optim.Adam
    optimizer = base(expected, lr=lr, betas=(beta1, beta2), foreach=False, **settings)
    means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
    largest = [torch.zeros_like(p) for p in params] if options["amsgrad"] else []
    counts = [torch.zeros(()) for _ in params]
    for step in range(STEPS):
        grads = make_grads(dtype, step)
        optimizer_step(optimizer, expected, grads)
        ops.restore_adam_(
            params, grads, means, squares, largest, counts, perturbed(params), lr, beta1=beta1, beta2=beta2, **options
        )
    for i, e in enumerate(expected):
        state = optimizer.state[e]
        scale = max(make_grads(dtype, step)[i].abs().max().item() for step in range(STEPS))
        torch.testing.assert_close(params[i], e, rtol=tolerance, atol=tolerance * lr * STEPS)
        torch.testing.assert_close(means[i], state["exp_avg"], rtol=tolerance, atol=tolerance * scale)
        torch.testing.assert_close(squares[i], state["exp_avg_sq"], rtol=tolerance, atol=tolerance * scale**2)
        if options["amsgrad"]:
            torch.testing.assert_close(largest[i], state["max_exp_avg_sq"], rtol=tolerance, atol=tolerance * scale**2)
        assert counts[i].dtype == torch.float32 and counts[i] == state["step"] == STEPS


def test_adam_far_into_training() -> None:
    """Bias corrections 1 - beta^t at a step count where beta^t is anything between 1 and 0, per parameter."""
    counts = [0.0, 1.0, 2.0, 1000.0, 123456.0]
    params, expected = make_params(torch.float64), make_params(torch.float64)
    optimizer = torch.optim.Adam(expected, lr=0.01, foreach=False)
    grads = make_grads(torch.float64, 0)
    means = [filled(s, torch.float64, 7, "transposed") for s in SHAPES]
    squares = [filled(s, torch.float64, 8, "transposed").abs_() for s in SHAPES]
    steps = [torch.tensor(c) for c in counts]
    for e, m, v, c in zip(expected, means, squares, counts, strict=True):
        optimizer.state[e] = {"step": torch.tensor(c), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer_step(optimizer, expected, grads)
    ops.restore_adam_(params, grads, means, squares, [], steps, perturbed(params), 0.01)
    for p, e, step, count in zip(params, expected, steps, counts, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-12, atol=1e-14)
        assert step.item() == count + 1.0


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_keeps_nan_as_torch_does(amsgrad: bool) -> None:
    """A NaN in a gradient shows up where torch shows it, also through amsgrad's maximum, and nowhere else."""
    p, expected = torch.ones(5000), torch.ones(5000)
    g = torch.ones(5000)
    g[4999] = torch.nan
    optimizer = torch.optim.Adam([expected], lr=0.1, amsgrad=amsgrad, foreach=False)
    mean, square, largest, count = torch.zeros(5000), torch.zeros(5000), torch.zeros(5000), torch.zeros(())
    for _ in range(2):
        optimizer_step(optimizer, [expected], [g])
        most = [largest] if amsgrad else []
        ops.restore_adam_([p], [g], [mean], [square], most, [count], perturbed([p]), 0.1, amsgrad=amsgrad)
    assert p.isnan().nonzero().tolist() == expected.isnan().nonzero().tolist() == [[4999]]
    if amsgrad:
        assert torch.equal(largest.isnan(), optimizer.state[expected]["max_exp_avg_sq"].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_learning_rate_of_zero_restores(dtype: torch.dtype) -> None:
    """lr = 0 leaves restore alone: the weights of before the ascent, bit for bit, for each base step."""
    start = make_params(dtype)
    for fused in ("sgd", "adam"):
        params, grads = twins(start), make_grads(dtype, 0)
        backup, state = perturbed(params), [torch.zeros_like(p) for p in params]
        if fused == "sgd":
            ops.restore_sgd_(params, grads, state, backup, 0.0, momentum=0.9, weight_decay=0.1, first_step=True)
        else:
            counts = [torch.zeros(()) for _ in params]
            ops.restore_adam_(params, grads, state, twins(state), [], counts, backup, 0.0, weight_decay=0.1)
        assert all(same_bytes(p, w) for p, w in zip(params, start, strict=True))


# ---- Lion against the paper ----


@pytest.mark.parametrize("maximize", [False, True])
def test_golden_lion(maximize: bool) -> None:
    """Algorithm 2 of arXiv 2302.06675 by hand, with beta = (0.9, 0.99), lr 0.1 and weight decay 0.5. The fourth element
    has c = 0, which moves by the decay alone."""
    sign = -1.0 if maximize else 1.0
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    m = torch.tensor([0.5, -0.5, 0.0, 0.0], dtype=torch.float64)
    g = sign * torch.tensor([-1.0, 9.0, 1.0, 0.0], dtype=torch.float64)
    # c = 0.9 m + 0.1 g = (0.35, 0.45, 0.1, 0); w' = w - 0.1 (sign(c) + 0.5 w); m' = 0.99 m + 0.01 g
    want_w = torch.tensor([0.85, -2.0, 0.375, 2.85], dtype=torch.float64)
    want_m = torch.tensor([0.485, -0.405, 0.01, 0.0], dtype=torch.float64)
    params, means = [w.clone()], [m.clone()]
    backup = perturbed(params)
    largest = ops.restore_lion_(params, [g], means, backup, 0.1, weight_decay=0.5, maximize=maximize)
    assert largest.shape == (0,)
    torch.testing.assert_close(params, [want_w], rtol=0.0, atol=1e-15)
    torch.testing.assert_close(means, [want_m], rtol=0.0, atol=1e-15)
    p = torch.nn.Parameter(w.clone())
    optimizer = Lion([p], lr=0.1, weight_decay=0.5, maximize=maximize)
    optimizer.state[p]["exp_avg"] = m.clone()
    optimizer_step(optimizer, [p], [g])
    torch.testing.assert_close(p.detach(), want_w, rtol=0.0, atol=1e-15)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], want_m, rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_lion_gives_the_bits_of_the_optimizer(maximize: bool, weight_decay: float, dtype: torch.dtype) -> None:
    got, want = make_params(dtype), make_params(dtype)
    optimizer = Lion(want, lr=0.01, weight_decay=weight_decay, maximize=maximize)
    means = [torch.zeros_like(p) for p in got]
    for step in range(STEPS):
        grads = make_grads(dtype, step)
        grads[0][1] = 0.0
        ops.restore_lion_(got, grads, means, perturbed(got), 0.01, weight_decay=weight_decay, maximize=maximize)
        optimizer_step(optimizer, want, grads)
    assert all(same_bytes(a, b) for a, b in zip(got, want, strict=True))
    assert all(same_bytes(m, optimizer.state[p]["exp_avg"]) for m, p in zip(means, want, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_lion_keeps_nan(bad: float) -> None:
    """A NaN of the gradient is one of the weight, infinity is a sign like any other: in the operator, in the optimizer
    and in the reference. torch's sign of NaN is 0, which would hide it."""
    g = torch.tensor([1.0, bad, -1.0])
    results = []
    for step in (ops.restore_lion_, reference.restore_lion_):
        w = [torch.ones(3)]
        lr, backup = torch.tensor(0.5, dtype=torch.float64), ops.backup_like(w)
        ops.save_(w, backup)
        step(w, [g], [torch.zeros(3)], backup, lr, beta1=0.9, beta2=0.99, weight_decay=0.0, maximize=False)
        results.append(w[0])
    p = torch.nn.Parameter(torch.ones(3))
    optimizer_step(Lion([p], lr=0.5), [p], [g])
    results.append(p.detach())
    moved = torch.nan if bad != bad else 0.5 if bad > 0 else 1.5
    for w in results:
        torch.testing.assert_close(w, torch.tensor([0.5, moved, 1.5]), equal_nan=True)


# ---- against the reference: 16-bit types, state of another type, any strides ----


def direction(w: Tensor, g: Tensor, weight_decay: float) -> Tensor:
    """The size of the terms of g + weight_decay w, which may cancel: what its rounding errors are relative to."""
    return g.double().abs() + weight_decay * w.double().abs()


def check_gaps(got: list[Tensor], start: list[Tensor]) -> None:
    assert all(torch.equal(gaps(a), gaps(b)) for a, b in zip(got, start, strict=True))


def check_sgd(start: Problem, lr: float, options: dict[str, Any]) -> None:
    got, want = start.copy(), start.copy()
    momentum, weight_decay = options["momentum"], options["weight_decay"]
    buffers = start.state(1) if momentum else []
    got_buffers, want_buffers = twins(buffers), twins(buffers)
    backup = start.backup()
    ops.sam_ascend_(got.params, got.grads, backup, torch.ones((), dtype=torch.float64), 1.0)
    before = backup.clone()
    ops.restore_sgd_(got.params, got.grads, got_buffers, backup, lr, **options)
    reference.restore_sgd_(want.params, want.grads, want_buffers, before, torch.tensor(lr).double(), **options)
    assert torch.equal(backup, before)
    check_gaps(got.params, start.params)
    for i, (p, expected) in enumerate(zip(got.params, want.params, strict=True)):
        eps = arithmetic_eps(p.dtype)
        size = direction(start.params[i], start.grads[i], weight_decay)
        if momentum:
            size = size + momentum * buffers[i].double().abs()
            # 3 roundings on one side, 5 on the other, each half an eps
            assert_within(got_buffers[i], want_buffers[i], 4 * eps * size)
            size = (1 + momentum) * size if options["nesterov"] else size
        assert_within(p, expected, eps * (expected.double().abs() + 6 * lr * size))
    for g, untouched in zip(got.grads, start.grads, strict=True):
        assert same_memory(g, untouched)


@given(
    start=problems(),
    momentum=st.sampled_from([0.0, 0.9]),
    dampening=st.sampled_from([0.0, 0.25]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    first_step=st.booleans(),
)
def test_sgd_equals_reference(start: Problem, **options: Any) -> None:
    check_sgd(start, 0.5, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_of_large_lists(dtype: torch.dtype) -> None:
    options = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True}
    check_sgd(large_problem(dtype), 0.5, {**options, "maximize": False, "first_step": False})


def check_adam(start: Problem, lr: float, step: float, options: dict[str, Any]) -> None:
    got, want = start.copy(), start.copy()
    beta1, beta2, weight_decay = options["beta1"], options["beta2"], options["weight_decay"]
    state = [start.state(1), start.state(2, positive=True)]
    state.append(start.state(3, positive=True) if options["amsgrad"] else [])
    got_state, want_state = ([twins(s) for s in state] for _ in range(2))
    means, squares, largest = got_state
    got_steps, want_steps = ([torch.tensor(step) for _ in start.params] for _ in range(2))
    backup = start.backup()
    ops.sam_ascend_(got.params, got.grads, backup, torch.ones((), dtype=torch.float64), 1.0)
    before = backup.clone()
    ops.restore_adam_(got.params, got.grads, means, squares, largest, got_steps, backup, lr, **options)
    rate = torch.tensor(lr, dtype=torch.float64)
    means, squares, largest = want_state
    reference.restore_adam_(want.params, want.grads, means, squares, largest, want_steps, before, rate, **options)
    assert torch.equal(backup, before)
    check_gaps(got.params, start.params)
    assert got_steps == want_steps == [torch.tensor(step + 1.0)] * len(got_steps)
    for i, (p, expected) in enumerate(zip(got.params, want.params, strict=True)):
        eps = arithmetic_eps(p.dtype)
        size = direction(start.params[i], start.grads[i], 0.0 if options["decoupled"] else weight_decay)
        mean = size + state[0][i].double().abs()
        square = beta2 * state[1][i].double() + (1 - beta2) * size**2
        # each side rounds at most 6 times on the way to a moment, half an eps each; the gradient enters v squared
        assert_within(got_state[0][i], want_state[0][i], 6 * eps * mean)
        assert_within(got_state[1][i], want_state[1][i], 8 * eps * square)
        divisor = squares[i].double()
        if options["amsgrad"]:
            assert_within(got_state[2][i], largest[i], 8 * eps * torch.maximum(square, state[2][i].double()))
            divisor = largest[i].double()
        root = divisor.sqrt() / (1 - beta2 ** (step + 1)) ** 0.5 + options["eps"]
        update = lr / (1 - beta1 ** (step + 1)) * mean / root
        spread = (square / divisor.clamp(min=1e-300)).clamp(min=1.0)  # v's error where g cancels, relative
        # beta^t is good to a few roundings of float64; 1 - beta^t magnifies them
        correction = 8 * 2.0**-52 * (1 / (1 - beta1 ** (step + 1)) + 1 / (1 - beta2 ** (step + 1)))
        rounding = eps * (2 * expected.double().abs() + 16 * update * spread)
        assert_within(p, expected, rounding + correction * update)


@given(
    start=problems(),
    step=st.sampled_from([0.0, 1.0, 99.0]),
    betas=st.sampled_from([(0.9, 0.999), (0.4, 0.9), (0.0, 0.5)]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)
def test_adam_equals_reference(start: Problem, step: float, betas: tuple[float, float], **options: Any) -> None:
    check_adam(start, 0.01, step, {**options, "beta1": betas[0], "beta2": betas[1], "eps": 1e-3})


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_large_lists(dtype: torch.dtype) -> None:
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3, "weight_decay": 0.1}
    check_adam(large_problem(dtype), 0.01, 9.0, {**options, "decoupled": True, "amsgrad": True, "maximize": False})


def check_lion(start: Problem, lr: float, options: dict[str, Any]) -> None:
    got, want = start.copy(), start.copy()
    means = start.state(1)
    got_means, want_means = twins(means), twins(means)
    backup = start.backup()
    ops.sam_ascend_(got.params, got.grads, backup, torch.ones((), dtype=torch.float64), 1.0)
    before = backup.clone()
    ops.restore_lion_(got.params, got.grads, got_means, backup, lr, **options)
    rate = torch.tensor(lr, dtype=torch.float64)
    reference.restore_lion_(want.params, want.grads, want_means, before, rate, **options)
    assert torch.equal(backup, before)
    check_gaps(got.params, start.params)
    for i, (p, expected) in enumerate(zip(got.params, want.params, strict=True)):
        eps = arithmetic_eps(p.dtype)
        m, g = means[i].double(), start.grads[i].double() * (-1.0 if options["maximize"] else 1.0)
        size = m.abs() + g.abs()
        # 2 roundings on one side, 3 on the other, each half an eps
        assert_within(got_means[i], want_means[i], 3 * eps * size)
        # where the terms cancel to less than their rounding the sign is a matter of that
        mixed = options["beta1"] * m + (1.0 - options["beta1"]) * g
        unsure = (mixed.abs() <= 3 * eps * size) & (size > 0)
        assert_within(p, expected, 2 * eps * (start.params[i].double().abs() + lr) + 2 * lr * unsure)


@given(
    start=problems(),
    beta1=st.sampled_from([0.9, 0.4, 0.0]),
    beta2=st.sampled_from([0.99, 0.5]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
)
def test_lion_equals_reference(start: Problem, **options: Any) -> None:
    check_lion(start, 0.5, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lion_of_large_lists(dtype: torch.dtype) -> None:
    check_lion(large_problem(dtype), 0.01, {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "maximize": False})
