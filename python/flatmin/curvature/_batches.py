"""The data of a measurement: how a batch reaches model and loss, how much it counts, and passes that repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_int
from .._rng import OwnGenerators
from ._arguments import describe
from ._containers import fingerprint, first_dimensions, same_prints, to_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Batches", "Source", "iterable"]

#: ``forward(model, batch)`` gives what the loss takes: outputs and targets.
Forward = Callable[[nn.Module, Any], tuple[Any, Any]]

_COMPARED = 4  # batches of each pass that are held against those of the first
_REPEAT = (
    "All passes must see the same data, or they measure different functions. Leave random augmentation out, or let it "
    "draw from the global generators of torch, Python or numpy, or from one that the dataset keeps as an attribute "
    "(these are set back before each pass), with persistent_workers=False; do not write into the batches; or give a "
    "list of batches, list(loader)"
)


class Batches:
    """Data whose batches are no pairs ``(inputs, targets)``, or count otherwise than by their tensors' first dimension.

    It stands for ``data`` in every function that measures::

        data = curvature.Batches(loader, forward=lambda model, batch: (model(**batch).logits, batch["labels"]))
        curvature.hutchinson_trace(model, torch.nn.functional.cross_entropy, data)

    A model that computes its own loss has it in its outputs: ``forward=lambda model, batch: (model(**batch), None)``
    and ``loss_fn=lambda outputs, _: outputs.loss``.

    Args:
        data: batches that can be iterated repeatedly, as a DataLoader or a list; or one batch: a mapping or a pair.
        forward: ``forward(model, batch)`` calls the model with a batch, which is on its device by then, and returns
            ``(outputs, targets)`` for ``loss_fn(outputs, targets)``. None: ``inputs, targets = batch``, and
            ``(model(inputs), targets)``.
        size: ``size(batch)``, how often a batch counts in means over the data: its number of samples, or of tokens
            where the loss is a mean over tokens. None: the first dimension of its tensors, which must agree.
    """

    def __init__(self, data: Any, *, forward: Forward | None = None, size: Callable[[Any], int] | None = None) -> None:
        for name, hook in (("forward", forward), ("size", size)):
            if hook is not None and not callable(hook):
                raise TypeError(f"{name}: {hook!r} given; give a function, or None")
        self.data, self.forward, self.size = data, forward, size

    def __iter__(self) -> Iterator[Any]:
        return iter(iterable(self.data, self.forward))


class Source:
    """What a measurement reads its batches from, and all the measurements that are part of it.

    The first batches of each pass are held against those of the first pass: they are read anyway, so nothing is drawn
    from a loader or from a stream for the sake of the check.

    Args:
        data: as users give it.

    Attributes:
        given: the same.
        length: number of batches in a pass, None where nobody knows.
        process_group: whose ranks each read a share, None if this is all there is.
    """

    def __init__(self, data: Any) -> None:
        self.given = data
        self.process_group: ProcessGroup | None = None
        self.batches = data if isinstance(data, Batches) else Batches(data)
        self._data = iterable(self.batches.data, self.batches.forward)
        self.length = _length(self._data)
        self._first: list[list[Any]] = []
        self._count: int | None = None

    @classmethod
    def of(cls, data: Any) -> Source:
        return data if isinstance(data, Source) else cls(data)

    def generators(self, others: Sequence[Any] = ()) -> OwnGenerators:
        """The generators that a loader, its samplers, its dataset or ``others`` keep, in their present states."""
        names = ("sampler", "batch_sampler", "dataset")
        return OwnGenerators([self._data, *(getattr(self._data, name, None) for name in names), *others])

    def read(self, device: torch.device) -> Iterator[tuple[Any, Any, int]]:
        """One pass: the arguments of :meth:`outputs` after the model, and the size, 0 for an empty batch."""
        seen = 0
        for i, batch in enumerate(self._data):
            if i < _COMPARED:
                self._compare(i, batch)
            if self.batches.forward is None and (not isinstance(batch, list | tuple) or len(batch) != 2):
                raise ValueError(
                    f"data: a batch is a {describe(batch)}; batches are pairs (inputs, targets), or say how the model "
                    "takes them: curvature.Batches(data, forward=...)"
                )
            size = self._size(batch)
            seen += size
            moved = to_device(batch, device)
            inputs, targets = moved if self.batches.forward is None else (moved, None)
            del batch, moved
            yield inputs, targets, size
        if not seen:
            raise ValueError("data: holds no samples; give batches that can be iterated repeatedly, as a DataLoader")
        if self._count is not None and seen != self._count:
            raise ValueError(f"data: {seen} samples in a pass, {self._count} in the first one. {_REPEAT}")
        self._count = seen

    def outputs(self, model: nn.Module, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """What the loss takes, of a batch from :meth:`read`."""
        forward = self.batches.forward
        if forward is None:
            return model(inputs), targets
        result = forward(model, inputs)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"forward: returned a {describe(result)}; return a pair (outputs, targets), which loss_fn takes"
            )
        return result

    def _compare(self, i: int, batch: Any) -> None:
        found = fingerprint(batch)
        if i == len(self._first) and self._count is None:
            self._first.append(found)
        elif i < len(self._first) and not same_prints(found, self._first[i]):
            raise ValueError(f"data: batch {i} differs from that of an earlier pass. {_REPEAT}")

    def _size(self, batch: Any) -> int:
        if self.batches.size is not None:
            size = self.batches.size(batch)
            check_int("size: what it returned", size, 0)
            return int(size)
        if self.batches.forward is None and not _has_length(batch[1]):
            raise ValueError("data: the targets of a batch have no length; give one target per sample, or None for all")
        sizes = first_dimensions(batch)
        if len(sizes) == 1:
            return next(iter(sizes))
        say = "or say it: curvature.Batches(data, size=lambda batch: ...)"
        if not sizes:
            raise ValueError(f"data: a batch holds no tensor with a dimension, so its size is not known; {say}")
        raise ValueError(
            f"data: the tensors of a batch do not agree about its size: shapes {' and '.join(sizes.values())}. Give "
            f"tensors whose first dimension counts the samples, {say}"
        )


def _has_length(targets: Any) -> bool:
    """Whether they can be one for each sample: a number is none."""
    if isinstance(targets, Tensor):
        return targets.dim() > 0
    return not isinstance(targets, int | float | complex)


def _is_one_batch(data: Any, forward: Forward | None) -> bool:
    if isinstance(data, Mapping):
        return True
    if forward is not None or not isinstance(data, list | tuple) or len(data) != 2:
        return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
    # two batches are two pairs; a pair of tensors, or of a container and tensors, is one
    if isinstance(data[0], Mapping) and isinstance(data[1], Mapping):
        return isinstance(data, tuple)
    return isinstance(data[0], Tensor | Mapping) or isinstance(data[1], Tensor | Mapping)


def iterable(data: Any, forward: Forward | None = None) -> Any:
    """``data`` as something that gives batches, one batch as a list of it; ``TypeError`` for anything else."""
    if _is_one_batch(data, forward):
        return [data]
    if isinstance(data, Tensor) or not hasattr(data, "__iter__"):
        raise TypeError(f"data: a {describe(data)} given; give batches (inputs, targets), or one such pair")
    if isinstance(data, Iterator):
        raise TypeError("data: an iterator given, which is used up after one pass; give a list or a DataLoader")
    return data


def _length(data: Any) -> int | None:
    """A DataLoader has ``__len__`` also where its dataset has none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
