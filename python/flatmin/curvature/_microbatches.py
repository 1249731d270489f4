"""Batches cut into pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._batches import Batches, iterable
from ._containers import cut, first_dimensions

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
                yield cut(batch, start, start + self.size, count, "micro_batch")
