"""Accuracy beside the loss, from one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..curvature._measurement import LossFn, Measurement

__all__ = ["Scored"]


class Scored:
    """``loss_fn``, which also counts how often the largest output is that of the target's class.

    Outputs are scores of classes along dimension 1, targets their integer numbers, in the shapes of
    :func:`torch.nn.functional.cross_entropy`. With any others the accuracy is None.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = self.__wrapped__ = loss_fn
        self.known = True
        self._right: list[Tensor] = []
        self._total = 0

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if self.known and _are_classes(outputs, targets):
            with torch.no_grad():
                self._right.append((outputs.argmax(1) == targets).sum())
            self._total += targets.numel()
        else:
            self.known = False
        return self.loss_fn(outputs, targets)

    def take(self, m: Measurement) -> float | None:
        """The accuracy since the last call, in [0, 1], over the ranks of the measurement."""
        right, total, unknown = m.summed(sum(map(int, self._right)), self._total, not self.known)
        self.forget()
        return None if unknown or not total else right / total

    def forget(self) -> None:
        """Start anew."""
        self._right, self._total = [], 0


def _are_classes(outputs: Any, targets: Any) -> bool:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.dim() < 2:
        return False
    whole = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    return whole and targets.shape == outputs.shape[:1] + outputs.shape[2:]
