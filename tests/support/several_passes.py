"""Measurements that go over the data more than once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from flatmin import curvature


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors(model: nn.Module) -> list[Tensor]:
    return [0.1 * torch.ones_like(p) for p in model.parameters()]


SEVERAL_PASSES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "difference": lambda m, data: curvature.hvp(m, F.cross_entropy, data, vectors(m), method="finite_difference"),
    "sharpness": lambda m, data: curvature.expected_sharpness(m, F.cross_entropy, data, scale=0.1, samples=2),
    "probes": lambda m, data: curvature.hutchinson_trace(m, F.cross_entropy, data, samples=2),
    "diagonals of lipschitz": lambda m, data: curvature.lipschitz(
        m, F.cross_entropy, data, curvature="squared_gradient"
    ),
    "pacgen": lambda m, data: flatmin.pacgen(
        m, F.cross_entropy, data, curvature="squared_gradient", lipschitz=1.0, noise_samples=0
    ),
}
