"""Whether anything was not finite, asked without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NonFiniteFlag"]


class NonFiniteFlag:
    """Whether a number was not 0, asked of a GPU without making the host wait.

    There the number is copied to the host behind the kernels, and looked at once it has arrived: a step or two late.
    """

    def __init__(self) -> None:
        self._raised = False
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []

    def record(self, number: Tensor) -> None:
        if number.device.type != "cuda":
            self._raised = self._raised or bool(number)
        elif not torch.cuda.is_current_stream_capturing():
            copy = torch.empty_like(number, device="cpu", pin_memory=True)
            copy.copy_(number, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(number.device))
            self._pending.append((event, copy))

    def poll(self, wait: bool = False) -> bool:
        """Whether one was not 0 since the last call, among those that have arrived; ``wait`` for all of them."""
        if self._pending and torch.cuda.is_current_stream_capturing():
            return False  # a capture forbids the question
        while self._pending and (wait or self._pending[0][0].query()):  # type: ignore[no-untyped-call]
            event, copy = self._pending.pop(0)
            event.synchronize()
            self._raised = self._raised or bool(copy)
        raised, self._raised = self._raised, False
        return raised

    def __getstate__(self) -> dict[str, object]:
        """Events belong to their process."""
        return {"_raised": self._raised, "_pending": []}
