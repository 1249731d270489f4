"""Averages of a curvature and of difference quotients, beside a step or alone: against ``flatmin.reference``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flatmin import ops, reference
from operator_arguments import scalar
from problems import (
    Problem,
    arithmetic_eps,
    assert_within,
    problems,
    same_bytes,
    same_memory,
    twins,
)

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
