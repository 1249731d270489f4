"""A check of labels on a GPU that does not make the host wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DeferredCheck", "out_of_range"]


def out_of_range(at: int, label: int, classes: int, ignored: int) -> str:
    return (
        f"labels: element {at} is {label}, but there are {classes} classes, from 0 on, and {ignored} is ignored; mend "
        "the label, or give ignore_index"
    )


class _Pending(NamedTuple):
    found: Tensor  # whether, where and what, on its way to the host
    ready: torch.Event | None


class DeferredCheck:
    """Looks for labels out of range on their device and reads the answer when it has long arrived.

    Args:
        classes: labels are in [0, classes).
        ignored: the one other label that is none.
    """

    def __init__(self, classes: int, ignored: int) -> None:
        self.classes, self.ignored = classes, ignored
        self._pending: list[_Pending] = []

    def watch(self, labels: Tensor) -> None:
        """Look at these labels; raise for earlier ones. Does nothing while a CUDA graph is captured."""
        if labels.numel() == 0 or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self.poll()
        flat = labels.flatten()
        wrong = ((flat < 0) | (flat >= self.classes)) & (flat != self.ignored)
        at = wrong.to(torch.uint8).argmax()
        found = torch.stack([wrong.any().to(torch.int64), at, flat[at]])
        host = torch.empty(3, dtype=torch.int64, pin_memory=labels.is_cuda)
        host.copy_(found, non_blocking=True)
        ready = None
        if labels.device.type != "cpu":
            ready = torch.Event(labels.device.type)
            ready.record()
        self._pending.append(_Pending(host, ready))

    def poll(self, wait: bool = False) -> None:
        """Raise for labels that were watched: for those whose answer has arrived, or (``wait``) for all."""
        while self._pending:
            found, ready = self._pending[0]
            if ready is not None and not ready.query():
                if not wait:
                    return
                ready.synchronize()
            self._pending.pop(0)
            wrong, at, label = found.tolist()
            if wrong:
                self._pending.clear()
                raise RuntimeError(out_of_range(at, label, self.classes, self.ignored) + " (an earlier call)")
