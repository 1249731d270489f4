"""What the noise operators, averages and PACGen refuse, and what counts as a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flatmin import ops
from operator_arguments import scalar
from problems import (
    twins,
)

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
