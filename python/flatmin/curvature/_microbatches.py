"""Batches cut into pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ._batches import Batches, iterable
from ._containers import first_dimensions

__all__ = ["micro_batches"]


def micro_batches(data: Any, size: int) -> Batches:
    """``data`` with every batch cut along the first dimension of its tensors into pieces of ``size`` samples.

    A piece counts by itself, so the mean over all of the data is the same.
    """
    given = data if isinstance(data, Batches) else Batches(data)
    return Batches(_Pieces(iterable(given.data, given.forward), size), forward=given.forward, size=given.size)


class _Pieces:
    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size = data, size
        # where a measurement looks for what shuffles and draws
        names = ("generator", "sampler", "batch_sampler", "dataset")
        vars(self).update({name: getattr(data, name, None) for name in names})

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            sizes = first_dimensions(batch)
            if len(sizes) > 1:
                one, other, *_ = sizes.values()
                raise ValueError(
                    f"micro_batch: cannot cut a tensor of shape {one} that comes with one of shape {other}; tensors of "
                    "a batch need their samples in the first dimension"
                )
            count = next(iter(sizes), 0)
            if count <= self.size:  # also where there is no tensor: the measurement says so
                yield batch
                continue
            for start in range(0, count, self.size):
                yield _slice(batch, start, start + self.size, count)


def _slice(x: Any, start: int, stop: int, count: int) -> Any:
    if isinstance(x, Tensor):
        if x.dim() == 0 or len(x) != count:
            raise ValueError(
                f"micro_batch: cannot cut a tensor of shape {tuple(x.shape)} in a batch of {count} samples; tensors "
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
