"""Many tensors, and one with more elements than 32 bits count."""

from __future__ import annotations

import math

import pytest
import torch

from flatmin import ops


def test_a_hundred_thousand_tensors() -> None:
    count = 100_000
    params = list(torch.arange(3.0 * count).view(count, 3).clone().unbind())
    grads = list(torch.ones(count, 3).unbind())
    whole = params[0]._base.clone()  # type: ignore[union-attr]
    backup = ops.backup_like(params)
    norm = ops.norm(grads)
    assert norm.item() == pytest.approx(math.sqrt(3.0 * count), rel=1e-15)
    ops.sam_ascend_(params, grads, backup, norm, norm.item())
    assert torch.equal(params[0]._base, whole + 1.0)  # type: ignore[arg-type]
    ops.restore_(params, backup)
    assert torch.equal(params[0]._base, whole)  # type: ignore[arg-type]


@pytest.mark.requires("make soak and 11 GiB of free memory")
def test_more_than_2_to_the_31_elements() -> None:
    """Ends and middle are looked at, since a comparison would take as much memory again."""
    count = 2**31 + 4096 + 3
    p = torch.zeros(count, dtype=torch.bfloat16)
    places = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, count - 1]
    p[places] = torch.arange(1.0, 8.0, dtype=torch.bfloat16)
    grad = torch.ones((), dtype=torch.bfloat16).expand(count)
    backup = ops.backup_like([p])
    norm = ops.norm([grad])
    assert norm.item() == pytest.approx(math.sqrt(count), rel=1e-15)
    ops.sam_ascend_([p], [grad], backup, norm, 2.0 * norm.item())
    assert p[places].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert p[count - 4096 : count - 1].eq(2.0).all() and p[2**31 - 100 : 2**31 - 1].eq(2.0).all()
    ops.restore_([p], backup)
    assert p[places].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert ops.norm([p]).item() == pytest.approx(math.sqrt(140.0), rel=1e-15)
