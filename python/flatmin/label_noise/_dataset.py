"""Data sets whose labels are wrong, once and for all."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from ._collate import with_entry
from ._kinds import integers

__all__ = ["NoisyDataset"]


class NoisyDataset(Dataset[Any]):
    """A data set with noisy labels: item i has always the same one, in any order and in any worker.

    Made by :meth:`flatmin.LabelNoise.wrap`. Items are tuples ``(input, label, ...)``; all but the label is the data
    set's. Its items are read when they are asked for, so its random augmentations go on.

    Attributes:
        dataset: what was wrapped.
        targets: the noisy labels, int64 [n]; :attr:`labels` is another name for them.
        clean: the true labels, int64 [n].
        flipped: where they differ, bool [n].

    Raises:
        RuntimeError: the label of an item is not that of ``clean``: the wrapped data set changes labels itself, as a
            ``target_transform`` does. Give its labels as items have them to :meth:`flatmin.LabelNoise.wrap`.
    """

    def __init__(self, dataset: Any, corrupt: Callable[[Tensor], Tensor], labels: Any, progress: bool | None) -> None:
        try:
            n = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"dataset: {type(dataset).__name__} has no length, so no items by number whose labels could stay the "
                "same; give a map-style data set, or put fresh noise on batches (LabelNoise.collate)"
            ) from error
        clean = _labels_of(dataset) if labels is None else labels
        if clean is None:
            clean = list(_read(dataset, n, progress))
        self.clean = integers("labels", clean)
        if self.clean.shape != (n,):
            raise ValueError(f"labels: shape {tuple(self.clean.shape)} given for {n} items; give one label for each")
        self.dataset, self.targets = dataset, corrupt(self.clean)
        self.flipped = self.targets != self.clean

    @property
    def labels(self) -> Tensor:
        return self.targets

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, i: int) -> Any:
        item = self.dataset[i]
        label = _label_in(item, i)
        number = _number(label, i)
        if number != int(self.clean[i]):
            raise RuntimeError(
                f"item {i} has label {number}, but its data set's labels say {int(self.clean[i])} (has it a "
                "target_transform?); give wrap() the labels as the items have them"
            )
        noisy = self.targets[i].to(label.device) if isinstance(label, Tensor) else int(self.targets[i])
        return with_entry(item, 1, noisy)

    def __repr__(self) -> str:
        n = int(self.flipped.sum())
        return f"NoisyDataset({len(self)} items, {n} labels flipped ({n / max(len(self), 1):.2%}))"


def _label_in(item: Any, i: int) -> Any:
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise TypeError(f"dataset: item {i} is a {type(item).__name__}; items are tuples (input, label, ...)")
    return item[1]


def _number(label: Any, i: int) -> int:
    try:
        return operator.index(label)  # floats, one-hot rows and names have none
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(f"dataset: item {i} has label {label!r}; labels are integers, one for each item") from error


def _labels_of(dataset: Any) -> Any:
    """The labels of all items where the data set keeps them; None if it does not."""
    if isinstance(dataset, Subset):
        labels = _labels_of(dataset.dataset)
        return None if labels is None else torch.as_tensor(labels)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    for name in ("targets", "labels", "_labels"):  # CIFAR and ImageFolder, SVHN, and torchvision's newer ones
        if (found := getattr(dataset, name, None)) is not None:
            return found
    return None


def _read(dataset: Any, n: int, progress: bool | None) -> Iterator[int]:
    numbers: Any = range(n)
    if progress is not False and importlib.util.find_spec("tqdm") is not None:
        quiet: dict[str, Any] = {"disable": None, "delay": 2.0} if progress is None else {}
        numbers = importlib.import_module("tqdm").tqdm(numbers, desc="reading labels", unit="item", **quiet)
    for i in numbers:
        yield _number(_label_in(dataset[i], i), i)
