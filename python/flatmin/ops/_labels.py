"""The operators on labels: what :class:`flatmin.LabelNoise` is made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import reference
from .._checks import check_one_of
from .._deprecated import renamed_arguments
from . import _library

__all__ = ["corrupt_labels", "draw_samples"]

#: How a label moves to (y + offset + r) mod classes, r uniform on [0, span): offset and span.
_KINDS: dict[str, Callable[[int], tuple[int, int]]] = {
    "exclude_true": lambda classes: (1, classes - 1),
    "uniform": lambda classes: (0, classes),
    "pair": lambda classes: (1, 1),
}
_LAWS = {"uniform": reference.UNIFORM, "normal": reference.NORMAL, "rademacher": reference.RADEMACHER}
_warned: set[str] = set()


def _run(name: str, device: torch.device, *args: Any) -> Any:
    if device.type in _library.DEVICES:
        return _library.OPERATORS[name](*args)
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(f"flatmin has no kernel for {device.type} tensors; running in plain torch, slower", stacklevel=3)
    return getattr(reference, name)(*args)


def _whole(index: Tensor | int) -> Tensor:
    if isinstance(index, Integral):
        return torch.tensor(int(index))
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        given = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: {given} given; give the numbers of the samples as an int64 tensor")
    return index


def check_index(index: Tensor | int, of: Tensor, name: str) -> Tensor:
    """The numbers of the samples that the tensor ``of`` (called ``name``) holds; raises where they cannot be."""
    index = _whole(index)
    if tuple(index.shape) != tuple(of.shape[: index.dim()]):
        raise ValueError(
            f"index: shape {tuple(index.shape)} given, but {name} have {tuple(of.shape)}; give one number for each, or "
            "for each entry of the leading dimensions"
        )
    return index


def _index(index: Tensor | None, device: torch.device) -> Tensor:
    if index is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    return index.to(device=device, dtype=torch.int64).contiguous()


def corrupt_labels(
    labels: Tensor,
    key: Tensor,
    num_classes: int,
    p: float = 1.0,
    *,
    kind: str = "exclude_true",
    table: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
    ignore_index: int = -100,
    out: Tensor | None = None,
) -> Tensor:
    """New labels in which some have moved to another class; ``labels`` are not written.

    What becomes of a label is a function of the key and of the number of its sample alone: not of the batch it is in,
    nor of threads, instruction set or device. Each probability is met to 2^-30.

    Args:
        labels: int64, any shape, in [0, num_classes) or ``ignore_index``, which stays as it is.
        key: from :func:`random_key`, on the device of the labels.
        num_classes: C, below 2^31.
        p: the probability that a label is drawn anew, in [0, 1]; a table has its own.
        kind: "exclude_true" draws one of the C - 1 other classes, "uniform" one of all C, "pair" takes (y + 1) mod C.
        table: in place of both, ``(bounds, targets)``, int64 [C, k] each: of a word uniform on [0, 2^32), label y
            becomes the target of the first entry of row y whose bound is above it. The bounds of a row ascend to 2^32.
            :func:`flatmin.label_noise.label_table` makes one of a transition matrix.
        index: int64 numbers of the samples, in [0, 2^50): one for each label, or for each of the leading dimensions of
            ``labels`` (one for each mask of a batch). None: the positions in ``labels``.
        out: int64, contiguous, of the labels' shape: where to write, if not to new memory. For 10 million labels new
            memory costs more than the noise. After an error nothing in it counts.

    Raises:
        RuntimeError: a label or an index is out of range: on the CPU; kernels of other devices leave such a label as it
            is, since nothing here waits for the device.
    """
    if table is None:
        check_one_of("kind", kind, tuple(_KINDS))
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p: {p} given; give a probability, from 0 to 1")
        if num_classes == 1 and kind == "exclude_true":
            raise ValueError("num_classes: 1 given, but kind='exclude_true' needs another class to move to")
    if index is not None:
        index = check_index(index, labels, "labels")
    offset, span = (0, 1) if table is not None else _KINDS[kind](num_classes)
    none = torch.empty(0, dtype=torch.int64, device=labels.device)
    bounds, targets = (none, none) if table is None else table
    if out is None:
        out = torch.empty(labels.shape, dtype=torch.int64, device=labels.device)
    else:
        increment_version([out])
    _run(
        "corrupt_labels",
        labels.device,
        labels.contiguous() if labels.layout == torch.strided else labels,
        _index(index, labels.device),
        bounds,
        targets,
        key,
        out,
        num_classes,
        round(p * 2**32),
        span,
        offset,
        ignore_index,
    )
    return out


@renamed_arguments(law="distribution")
def draw_samples(
    count: int, inner: int, key: Tensor, *, distribution: str = "normal", index: Tensor | None = None
) -> Tensor:
    """Random numbers of mean 0 for ``count`` samples of ``inner`` elements each: float32 [count, inner].

    Args:
        key: from :func:`random_key`; its device is that of the result.
        distribution: "normal" or "rademacher" (-1 or 1), of variance 1, or "uniform" on (-1, 1).
        index: int64 [count], the numbers of the samples, with index * inner in [0, 2^50); None: 0, 1, 2, ...
    """
    check_one_of("distribution", distribution, tuple(_LAWS))
    if index is not None:
        index = _whole(index)
        if tuple(index.shape) != (count,):
            raise ValueError(f"index: shape {tuple(index.shape)} given for {count} samples; give one number for each")
    drawn: Tensor = _run("draw_samples", key.device, _index(index, key.device), key, count, inner, _LAWS[distribution])
    return drawn
