"""Losses and gradients at the present weights, over all data or over groups of a few samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._rng import Generators
from ..curvature._containers import cut
from ..curvature._measurement import Measurement

__all__ = ["DIRECTIONS", "STARTS", "Pieces", "check_p", "groups", "loss_and_gradient", "loss_of", "replayed", "shift"]

#: What random numbers are for, after those of :mod:`flatmin.curvature`: points to start from, axes of landscapes.
STARTS, DIRECTIONS = 16, 17

#: Inputs, targets and number of samples of each part of a group.
Pieces = list[tuple[Any, Any, int]]


def groups(m: Measurement, size: int) -> Iterator[Pieces]:
    """One pass over the data in disjoint groups of ``size`` samples in their order; the last one has what is left.

    A group that spans batches keeps them apart: its loss is their weighted mean, so memory is that of one batch.
    """
    pieces: Pieces = []
    have = 0
    for inputs, targets, count in m.batches():
        start = 0
        while start < count:
            stop = min(count, start + size - have)
            parts = [inputs, targets]
            if stop - start < count:
                parts = [cut(part, start, stop, count, "data") for part in parts]
            pieces.append((*parts, stop - start))
            have += stop - start
            start = stop
            if have == size:
                yield pieces
                pieces, have = [], 0
    if pieces:
        yield pieces


def replayed(m: Measurement, pieces: Pieces) -> Callable[[], Iterator[tuple[Any, Any, int]]]:
    """Passes over a group that draw the same random numbers each time, as dropout does."""
    random = Generators(m.model)

    def again() -> Iterator[tuple[Any, Any, int]]:
        random.set()
        torch.clear_autocast_cache()  # it holds 16-bit copies of weights that have moved since
        return iter(pieces)

    return again


@torch.no_grad()
def loss_of(m: Measurement, samples: Iterator[tuple[Any, Any, int]]) -> float:
    """Mean loss over ``samples``."""
    total, count = 0.0, 0
    losses: list[tuple[Tensor, int]] = []
    for inputs, targets, size in samples:
        losses.append((m.loss(inputs, targets), size))
        count += size
    for loss, size in losses:  # read at the end only: no batch waits for the host
        total += size * float(loss)
    total, seen = m.summed(total, count)
    return total / seen


def loss_and_gradient(m: Measurement, samples: Iterator[tuple[Any, Any, int]]) -> tuple[float, list[Tensor]]:
    """Mean loss over ``samples`` and its gradient: tensors like the parameters, at least float32."""
    gradient = m.zeros()
    losses: list[tuple[Tensor, int]] = []
    count = 0
    for inputs, targets, size in samples:
        loss = m.loss(inputs, targets)
        if loss.requires_grad:
            for t, g in zip(gradient, torch.autograd.grad(loss, m.params, allow_unused=True), strict=True):
                if g is not None:
                    t.add_(g, alpha=size)
        losses.append((loss.detach(), size))
        count += size
        del loss
    total, seen = m.summed(sum(size * float(loss) for loss, size in losses), count)
    for t in gradient:
        if m.process_group is not None:
            torch.distributed.all_reduce(t, group=m.process_group)
        t.div_(seen)
    return total / seen, gradient


@torch.no_grad()
def shift(params: list[Tensor], offsets: list[Tensor], scale: float = 1.0) -> None:
    """``w += scale offset``; 16-bit weights are rounded once, from the sum."""
    for p, offset in zip(params, offsets, strict=True):
        p.add_(offset.to(p.device), alpha=scale)


def check_p(p: float) -> None:
    """``ValueError`` unless the ball of the ``p``-norm is one that a point can be projected on here."""
    if p not in (2, float("inf")):
        raise ValueError(f"p: {p!r} given; give 2 or float('inf'), the norm that the radius is measured in")
