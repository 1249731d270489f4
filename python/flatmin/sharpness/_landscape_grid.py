"""The values of a landscape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Grid"]


@dataclass(eq=False)
class Grid:
    """What :class:`Landscape` holds; its attributes are described there."""

    axes: tuple[tuple[float, ...], ...] = field(repr=False)
    labels: tuple[str, ...]
    values: list[tuple[float, float | None] | None] = field(repr=False)
    marks: dict[str, tuple[float, ...]]
    batch_norm: str
    identity: str = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Points along each axis."""
        return tuple(map(len, self.axes))

    @property
    def loss(self) -> Tensor:
        """float64 of shape :attr:`shape`; NaN where it is not evaluated."""
        return torch.tensor([math.nan if v is None else v[0] for v in self.values], dtype=torch.float64).view(
            self.shape
        )

    @property
    def accuracy(self) -> Tensor | None:
        """float64 of shape :attr:`shape`, in [0, 1]; None where it is not known."""
        known = [v[1] for v in self.values if v is not None]
        if not known or None in known:
            return None
        filled = [math.nan if v is None else v[1] for v in self.values]
        return torch.tensor(filled, dtype=torch.float64).view(self.shape)
