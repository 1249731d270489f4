"""What each recipe trains when it is run by itself: a small network on made-up data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def net(seed: int = 0) -> nn.Sequential:
    """Two linear layers, from 8 inputs to 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return layers


def batches(count: int, size: int = 16, seed: int = 0) -> list[Batch]:
    """``count`` batches of inputs [size, 8] around one mean per class, and labels [size]."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 8, generator=generator)
    labels = (torch.randint(3, (size,), generator=generator) for _ in range(count))
    return [(means[y] + torch.randn(size, 8, generator=generator), y) for y in labels]


def show(train: Callable[[nn.Module, list[Batch]], Any]) -> None:
    """Train by a recipe and print what became of the loss."""
    model, data = net(), batches(50)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(x), y)) for x, y in data) / len(data)

    before = loss()
    train(model, data)
    print(f"loss {before:.3f} before, {loss():.3f} after {len(data)} steps")
