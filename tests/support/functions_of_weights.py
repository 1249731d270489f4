"""Models whose loss is a function of the weights that one can write down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Function(nn.Module):
    """A "model" whose output is a function of its parameters alone, one value per sample: the loss is its mean."""

    def __init__(self, f: Callable[..., Tensor], *values: Any, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.f = f
        self.w = nn.ParameterList([torch.as_tensor(v, dtype=dtype) for v in values])

    def forward(self, x: Tensor) -> Tensor:
        value = self.f(*self.w)
        return value.expand(len(x), *value.shape)


def mean_output(output: Tensor, _: Tensor) -> Tensor:
    return output.mean()


ANY = (torch.zeros(3), torch.zeros(3))  # data of a Function


def quadratic(dtype: torch.dtype = torch.float64) -> tuple[Function, Tensor]:
    """``w' A w / 2`` in six variables, four of them a matrix, and A."""
    generator = torch.Generator().manual_seed(3)
    b = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a = (b + b.T).to(dtype)

    def f(matrix: Tensor, vector: Tensor) -> Tensor:
        w = torch.cat([matrix.flatten(), vector])
        return 0.5 * w @ (a @ w)

    return Function(f, torch.randn(2, 2, generator=generator), torch.randn(2, generator=generator), dtype=dtype), a
