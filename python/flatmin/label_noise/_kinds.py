"""The kinds of label noise by name, as distributions of the new label for each old one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int

__all__ = [
    "CIFAR10_ASYMMETRIC",
    "SYMMETRIC",
    "Table",
    "check_probability",
    "integers",
    "label_table",
    "mapping_rows",
    "matrix_rows",
]

#: The asymmetric noise of CIFAR-10 (Patrini et al. 2017, arXiv 1609.03683): truck to automobile, bird to airplane, deer
#: to horse, cat to dog and dog to cat.
CIFAR10_ASYMMETRIC = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}

#: Kinds that do the same to every class, and the share of the labels drawn anew that change, for C classes.
SYMMETRIC: dict[str, Callable[[int], float]] = {
    "exclude_true": lambda c: 1.0,
    "uniform": lambda c: (c - 1) / c,
    "pair": lambda c: 1.0 if c > 1 else 0.0,
}


def check_probability(name: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{name}: {p!r} given; give a float from 0 to 1")
    if not 0.0 <= float(p) <= 1.0:
        raise ValueError(f"{name}: {p} given; give a probability, from 0 to 1")


def integers(name: str, values: Any) -> Tensor:
    """A tensor, list or array of integers as int64 on the CPU; an empty list too, of which torch makes floats."""
    try:
        found = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: {type(values).__name__} given, which is no tensor of integers ({error}); give integers, in a "
            "tensor, list or array"
        ) from error
    if found.numel() > 0 and (found.is_floating_point() or found.is_complex()):
        raise TypeError(f"{name}: {found.dtype} given; give integers")
    return found.to(torch.int64)


@dataclass(frozen=True)
class Table:
    """Row c says what becomes of label c: ``targets[c, k]`` with probability ``chances[c, k]``; int64 and float64
    [C, K]. Entries of chance 0 fill short rows."""

    targets: Tensor
    chances: Tensor

    def flips(self) -> Tensor:
        """The probability that a label changes, for each class: float64 [C]."""
        own = torch.arange(len(self.targets)).unsqueeze(1)
        return torch.where(self.targets == own, 0.0, self.chances).sum(1)

    def given_flip(self) -> Table:
        """What becomes of a label that does change; a class that never does stays."""
        own = torch.arange(len(self.targets)).unsqueeze(1)
        flips = self.flips().unsqueeze(1)
        away = torch.where(self.targets == own, 0.0, self.chances) / flips.clamp(min=torch.finfo(torch.float64).tiny)
        stay = (flips == 0) & (self.targets == own)
        return Table(self.targets, torch.where(stay, self.chances, away))

    def matrix(self) -> Tensor:
        """float64 [C, C], rows of the true label."""
        classes = len(self.targets)
        return torch.zeros(classes, classes, dtype=torch.float64).scatter_add_(1, self.targets, self.chances)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """``(bounds, targets)`` for :func:`flatmin.ops.corrupt_labels`: cumulative chances in units of 2^-32."""
        bounds = (self.chances.cumsum(1) * 2.0**32).round().to(torch.int64)
        last = self.chances.shape[1] - 1 - (self.chances > 0).flip(1).to(torch.uint8).argmax(1)
        ended = torch.arange(self.chances.shape[1]) >= last.unsqueeze(1)  # no rounding may leave words to what follows
        return torch.where(ended, 2**32, bounds.clamp(max=2**32)).contiguous(), self.targets.contiguous()


def mapping_rows(mapping: Mapping[Any, Any], num_classes: int, p: float) -> Table:
    """Label c becomes ``mapping[c]`` with probability p; a class that is no key keeps its labels."""
    for source, target in mapping.items():
        for label in (source, target):
            check_int("kind: a label of the mapping", label, 0)
            if label >= num_classes:
                raise ValueError(f"kind: the mapping has label {label}, but there are {num_classes} classes, from 0 on")
    own = torch.arange(num_classes)
    to = torch.tensor([mapping.get(c, c) for c in range(num_classes)])
    return Table(torch.stack([to, own], 1), torch.tensor([p, 1.0 - p], dtype=torch.float64).repeat(num_classes, 1))


def matrix_rows(matrix: Tensor | Sequence[Any], num_classes: int) -> Table:
    """Label c becomes j with probability ``matrix[c, j]``."""
    try:
        m = torch.as_tensor(matrix, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"kind: {matrix!r} given, which is no matrix ({error}); give [{num_classes}, {num_classes}] probabilities"
        ) from error
    if tuple(m.shape) != (num_classes, num_classes):
        raise ValueError(f"kind: a matrix of shape {tuple(m.shape)} given; give [{num_classes}, {num_classes}]")
    if not bool(((m >= 0.0) & (m <= 1.0)).all()):
        row = int((~((m >= 0.0) & (m <= 1.0))).any(1).to(torch.uint8).argmax())
        raise ValueError(f"kind: row {row} of the matrix holds {m[row].tolist()}; give probabilities, from 0 to 1")
    sums = m.sum(1)
    row = int((sums - 1.0).abs().argmax())
    if abs(float(sums[row]) - 1.0) > 1e-6:
        raise ValueError(f"kind: row {row} of the matrix sums to {float(sums[row])}; each row sums to 1")
    m = m / sums.unsqueeze(1)
    width = max(int((m > 0).sum(1).max()), 1)
    targets = (m == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return Table(targets, m.gather(1, targets))


def label_table(matrix: Tensor | Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The table of a C x C row-stochastic matrix for :func:`flatmin.ops.corrupt_labels`: ``(bounds, targets)``.

    Args:
        matrix: row c holds the probabilities of what label c becomes.

    Raises:
        ValueError: an entry is no probability, or a row does not sum to 1 (to 1e-6).
    """
    return matrix_rows(matrix, len(matrix)).bounds()
