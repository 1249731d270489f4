"""How often a curvature was averaged and the bias that leaves; whether anything was not finite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import on_device

__all__ = ["Alarm", "Clock", "Tick"]


class Tick(NamedTuple):
    """The next update of a :class:`Clock`: ``beta^(t-1)`` and ``beta^t``, and the bias corrections before and after,
    as :func:`flatmin.ops.curvature_` takes them."""

    powers: Tensor
    corrections: Tensor


class Clock:
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

    def copy(self) -> Clock:
        """A clock that goes on by itself."""
        other = Clock.__new__(Clock)
        other.updates, other._factors = self.updates, self._factors
        other.count, other._power, other.scale = self.count.clone(), self._power.clone(), self.scale.clone()
        return other

    def next(self) -> Tick:
        """What an update needs. It counts once :meth:`advance` is called, after the operator has taken its input."""
        powers = self._power * self._factors
        return Tick(powers, torch.rsub(powers, 1.0).reciprocal_().nan_to_num_(posinf=0.0))  # nothing before the first

    def advance(self, tick: Tick) -> None:
        self._power.copy_(tick.powers[1])
        self.scale.copy_(tick.corrections[1])
        self.count.add_(1)
        self.updates += 1


class Alarm:
    """Whether a number was not 0, asked of a GPU without making the host wait.

    There the number is copied to the host behind the kernels, and looked at once it has arrived: a step or two late.
    """

    def __init__(self) -> None:
        self._rung = False
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []

    def hear(self, number: Tensor) -> None:
        if number.device.type != "cuda":
            self._rung = self._rung or bool(number)
        elif not torch.cuda.is_current_stream_capturing():
            copy = torch.empty_like(number, device="cpu", pin_memory=True)
            copy.copy_(number, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(number.device))
            self._pending.append((event, copy))

    def rung(self, wait: bool = False) -> bool:
        """Whether one was not 0 since the last call, among those that have arrived; ``wait`` for all of them."""
        if self._pending and torch.cuda.is_current_stream_capturing():
            return False  # a capture forbids the question
        while self._pending and (wait or self._pending[0][0].query()):  # type: ignore[no-untyped-call]
            event, copy = self._pending.pop(0)
            event.synchronize()
            self._rung = self._rung or bool(copy)
        rung, self._rung = self._rung, False
        return rung

    def __getstate__(self) -> dict[str, object]:
        """Events belong to their process."""
        return {"_rung": self._rung, "_pending": []}
