"""A radius, or a rate with a weight decay, of each parameter: the bits of a call for each parameter alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flatmin import ops, reference
from models import same_bits
from problems import DTYPES, Problem, filled

SHAPES = [(3,), (0,), (5, 4), (), (2, 4100)]
RATES = torch.tensor([(0.5, 0.0), (0.1, 0.3), (0.25, 0.1), (0.0, 0.2), (1.0, 0.0)], dtype=torch.float64)
RADII = torch.tensor([0.5, 0.1, 0.0, 2.0, 0.25], dtype=torch.float64)


def problem_of(dtype: torch.dtype) -> Problem:
    """One parameter is not contiguous, and others are empty or of one element."""
    params, grads = ([filled(shape, dtype, seed + i) for i, shape in enumerate(SHAPES)] for seed in (1, 20))
    params[2] = params[2].T.contiguous().T
    return Problem(params, grads, [dtype] * len(SHAPES), 3)


def sgd(lists: list[list[Tensor]], backup: Tensor, **rates: Any) -> None:
    ops.restore_sgd_(lists[0], lists[1], lists[2], backup, momentum=0.9, nesterov=True, **rates)


def adam(lists: list[list[Tensor]], backup: Tensor, **rates: Any) -> None:
    steps = [torch.tensor(4.0) for _ in lists[0]]
    ops.restore_adam_(*lists, [], steps, backup, **rates)


def adamw(lists: list[list[Tensor]], backup: Tensor, **rates: Any) -> None:
    steps = [torch.tensor(4.0) for _ in lists[0]]
    ops.restore_adam_(*lists, [], steps, backup, decoupled=True, **rates)


def lion(lists: list[list[Tensor]], backup: Tensor, **rates: Any) -> None:
    ops.restore_lion_(lists[0], lists[1], lists[2], backup, **rates)


def lists_of(problem: Problem) -> list[list[Tensor]]:
    return [problem.params, problem.grads, problem.state(1), problem.state(2, positive=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [sgd, adam, adamw, lion])
def test_a_step_with_rates_of_their_own(step: Callable[..., None], dtype: torch.dtype) -> None:
    one, many = lists_of(problem_of(dtype)), lists_of(problem_of(dtype))
    backup = ops.backup_like(one[0])
    ops.save_(one[0], backup)
    step(one, backup, lr=RATES)
    for i, (lr, decay) in enumerate(RATES.tolist()):
        alone = [tensors[i : i + 1] for tensors in many]
        own = ops.backup_like(alone[0])
        ops.save_(alone[0], own)
        step(alone, own, lr=lr, weight_decay=decay)
    for got, want in zip(one, many, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("q", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_ascent_with_radii_of_their_own(dtype: torch.dtype, q: float) -> None:
    one, many = problem_of(dtype), problem_of(dtype)
    backup, norm = one.backup(), ops.norm(one.grads, q=q)
    ops.sam_ascend_(one.params, one.grads, backup, norm, RADII, q=q)
    for i, rho in enumerate(RADII.tolist()):
        p, g = many.params[i : i + 1], many.grads[i : i + 1]
        ops.sam_ascend_(p, g, ops.backup_like(p), norm, rho, q=q)
    assert same_bits(one.params, many.params)
    ops.restore_(one.params, backup)
    assert same_bits(one.params, problem_of(dtype).params)


def test_norm_and_ascent_with_radii_of_their_own() -> None:
    one, two = problem_of(torch.float32), problem_of(torch.float32)
    ops.sam_norm_ascend_(one.params, one.grads, one.backup(), RADII)
    ops.sam_ascend_(two.params, two.grads, two.backup(), ops.norm(two.grads), RADII)
    assert same_bits(one.params, two.params)


def test_the_rates_are_those_of_the_formula() -> None:
    """SGD without momentum in plain torch: w - lr (g + decay w)."""
    problem = problem_of(torch.float64)
    pairs = zip(problem.params, problem.grads, RATES.tolist(), strict=True)
    want = [p - lr * (g + decay * p) for p, g, (lr, decay) in pairs]
    ops.restore_sgd_(problem.params, problem.grads, [], problem.backup()[:0], RATES)
    for p, expected in zip(problem.params, want, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    "wrong", [RATES[:4], RATES[:, 0], RATES.flatten()[:2], RATES.float()], ids=lambda t: str(t.shape)
)
def test_wrong_numbers_of_rates_are_named(wrong: Tensor) -> None:
    problem, before = problem_of(torch.float32), problem_of(torch.float32)
    backup = problem.backup()
    ops.save_(problem.params, backup)
    if wrong.dtype == torch.float32:  # the public function converts
        with pytest.raises(RuntimeError, match="lr must be a contiguous float64 tensor"):
            torch.ops.flatmin.restore_lion_(
                problem.params,
                problem.grads,
                problem.state(1),
                backup,
                wrong,
                0.9,
                0.99,
                0.0,
                False,
                [],
                [],
                wrong,
                0.0,
                0.0,
                0.0,
            )
    else:
        with pytest.raises(RuntimeError, match="lr must be a float64 tensor of one element"):
            ops.restore_lion_(problem.params, problem.grads, problem.state(1), backup, wrong)
    assert same_bits(problem.params, before.params)


def test_one_negative_radius_among_them_writes_nothing() -> None:
    problem, before = problem_of(torch.float32), problem_of(torch.float32)
    backup = torch.full_like(problem.backup(), 7)
    radii = RADII.clone()
    radii[4] = -1.0
    with pytest.raises(RuntimeError, match="rho: -1 given"):
        ops.sam_norm_ascend_(problem.params, problem.grads, backup, radii)
    assert same_bits(problem.params, before.params)
    assert bool((backup == 7).all())


@pytest.mark.parametrize("step", ["restore_sgd_", "restore_adam_", "restore_lion_"])
def test_the_reference_takes_them_too(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"restore_sgd_": sgd, "restore_adam_": adamw, "restore_lion_": lion}[step]
    got, want = lists_of(problem_of(torch.float64)), lists_of(problem_of(torch.float64))
    backup = problem_of(torch.float64).backup()[:0]
    run(got, backup, lr=RATES)
    monkeypatch.setitem(ops._library.OPERATORS, step, getattr(reference, step))
    run(want, backup, lr=RATES)
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("law", ["uniform", "normal", "truncated_normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_with_keys_and_sizes_of_their_own(dtype: torch.dtype, law: str) -> None:
    """Each parameter draws as the first of a list of its own, and again as the third of another."""
    sizes = torch.tensor([(0.5, 0.25, 0.1), (0.1, 0.0, 0.3), (0.0, 1.0, 1.0), (2.0, 0.5, 0.0), (1.0, 0.1, 0.1)])
    streams = [(7, 3, 1), (7, 3, 2), (8, 3, 1), (2**63 + 5, 9, 40), (7, 4, 1)]
    for place in (0, 2):
        one, many = problem_of(dtype), problem_of(dtype)
        words = [ops.random_key(*stream).view(torch.int64) for stream in streams]
        keys = torch.stack([torch.cat([key, torch.tensor([place])]) for key in words]).view(torch.uint64)
        curvatures, backup = one.state(1, positive=True), one.backup()
        tally = ops.scaled_noise_(
            one.params, backup, keys, distribution=law, scale=sizes, curvatures=curvatures, lipschitz=0.5
        )
        total = torch.zeros(3, dtype=torch.float64)
        for i, (scale, gamma, eps) in enumerate(sizes.tolist()):
            # Before it come copies of no element, which take the first places of the list.
            p = [torch.empty(0, dtype=dtype)] * place + [many.params[i]]
            h = [torch.empty(0, dtype=curvatures[i].dtype)] * place + [curvatures[i]]
            key = ops.random_key(*streams[i])
            options = {"distribution": law, "scale": scale, "gamma": gamma, "eps": eps, "lipschitz": 0.5}
            total += ops.scaled_noise_(p, ops.backup_like(p), key, curvatures=h, **options)
        assert same_bits(one.params, many.params)
        torch.testing.assert_close(tally, total, rtol=1e-6, atol=1e-9)
        ops.restore_(one.params, backup)
        assert same_bits(one.params, problem_of(dtype).params)


def test_the_reference_draws_with_them_too() -> None:
    sizes = torch.tensor([(0.5, 0.25, 0.1)] * 4 + [(1.0, 0.1, 0.1)], dtype=torch.float64)
    rows = [torch.cat([ops.random_key(5, i).view(torch.int64), torch.tensor([i % 2])]) for i in range(len(SHAPES))]
    keys = torch.stack(rows).view(torch.uint64)
    one, two = problem_of(torch.float64), problem_of(torch.float64)
    zero, unit = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    lists: list[list[Tensor]] = [[], [], []]
    for run, operator in ((one, torch.ops.flatmin.scaled_noise_), (two, reference.scaled_noise_)):
        operator(run.params, *lists, run.backup(), keys, sizes, zero, unit, 1, 0.0, 0.0)
    for a, b in zip(one.params, two.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "key", [torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(3, 5).T], ids=["4x3", "5x2", "strided"]
)
def test_wrong_keys_are_named(key: Tensor) -> None:
    problem, before = problem_of(torch.float32), problem_of(torch.float32)
    with pytest.raises(RuntimeError, match=r"key must be a contiguous uint64 tensor \(seed, step\), or \[5, 3\]"):
        ops.scaled_noise_(problem.params, problem.backup(), key.to(torch.uint64), scale=0.5, eps=1.0)
    assert same_bits(problem.params, before.params)


def test_one_negative_neighbourhood_among_them_writes_nothing() -> None:
    problem, before = problem_of(torch.float32), problem_of(torch.float32)
    sizes = torch.ones(5, 3, dtype=torch.float64)
    sizes[3, 2] = -1.0
    with pytest.raises(RuntimeError, match=r"scale: \(gamma, eps\) = \(1, -1\) given"):
        ops.scaled_noise_(problem.params, problem.backup(), ops.random_key(1, 1), scale=sizes)
    assert same_bits(problem.params, before.params)
