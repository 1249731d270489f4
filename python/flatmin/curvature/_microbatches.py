"""Batches cut into pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ._measurement import check_data

__all__ = ["MicroBatches"]


class MicroBatches:
    """``data`` with every batch ``(inputs, targets)`` cut along the first dimension into pieces of ``size`` samples.

    A piece counts by its targets, so the mean over all of the data is the same.
    """

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size = check_data(data), size
        # where a measurement looks for what shuffles
        self.generator, self.sampler = getattr(data, "generator", None), getattr(data, "sampler", None)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            count = len(batch[1]) if isinstance(batch, list | tuple) and len(batch) == 2 and _sized(batch[1]) else 0
            if count <= self.size:  # also what is no batch: the measurement says so
                yield batch
                continue
            for start in range(0, count, self.size):
                yield tuple(_slice(part, start, start + self.size, count) for part in batch)


def _sized(x: Any) -> bool:
    try:
        return len(x) >= 0
    except TypeError:
        return False


def _slice(x: Any, start: int, stop: int, count: int) -> Any:
    if isinstance(x, Tensor):
        if x.dim() == 0 or len(x) != count:
            raise ValueError(
                f"micro_batch: cannot cut a tensor of shape {tuple(x.shape)} that comes with {count} targets; tensors "
                "of a batch need their samples in the first dimension"
            )
        return x[start:stop]
    if isinstance(x, Mapping):
        return {key: _slice(value, start, stop, count) for key, value in x.items()}
    if type(x) in (list, tuple):
        if len(x) == count and not any(isinstance(item, Tensor) for item in x):  # one item for each sample
            return x[start:stop]
        return type(x)(_slice(item, start, stop, count) for item in x)
    return x
