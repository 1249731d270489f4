"""How often a curvature was averaged, and the bias that leaves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._devices import on_device

__all__ = ["BiasCorrection", "NextUpdate"]


class NextUpdate(NamedTuple):
    """``beta^(t-1)`` and ``beta^t`` of the coming update, and the bias corrections before and after it, as
    :func:`flatmin.ops.curvature_` takes them."""

    powers: Tensor
    corrections: Tensor


class BiasCorrection:
    """Number ``t`` of updates of an average that started at 0, and its bias correction ``1 / (1 - beta^t)``.

    The power is kept by multiplication on the device: a captured CUDA graph goes on with it, and CPU and GPU agree to
    the last bit, which their ``pow`` do not.

    Attributes:
        updates: ``t``; of a replayed graph, :attr:`count` alone knows it.
        scale: the correction, float64 0-dim. Infinite before the first update.
    """

    def __init__(self, device: torch.device, beta: float, updates: int = 0) -> None:
        power = 1.0
        for _ in range(updates):
            power *= beta
            if power == 0.0:
                break
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.updates = updates
        self.count = torch.full((), float(updates), dtype=wide, device=device)
        self._power = torch.full((), power, dtype=wide, device=device)
        self.scale = (1.0 - self._power).reciprocal()
        self._factors = on_device(torch.tensor([1.0, beta], dtype=wide), device)

    def copy(self) -> BiasCorrection:
        """A copy that goes on by itself."""
        other = BiasCorrection.__new__(BiasCorrection)
        other.updates, other._factors = self.updates, self._factors
        other.count, other._power, other.scale = self.count.clone(), self._power.clone(), self.scale.clone()
        return other

    def next(self) -> NextUpdate:
        """What an update needs. It counts once :meth:`advance` is called, after the operator has taken its input."""
        powers = self._power * self._factors
        return NextUpdate(
            powers, torch.rsub(powers, 1.0).reciprocal_().nan_to_num_(posinf=0.0)
        )  # nothing before the first

    def advance(self, update: NextUpdate) -> None:
        self._power.copy_(update.powers[1])
        self.scale.copy_(update.corrections[1])
        self.count.add_(1)
        self.updates += 1
