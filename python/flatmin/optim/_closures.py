"""What a closure did to the gradients: some compute none, some add to those that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["GradientRecord"]


class GradientRecord:
    """The gradients before a closure is called, by identity and by how often they were written to."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._params = [p for group in groups for p in group["params"]]
        self._before = [(p.grad, _version(p.grad)) for p in self._params]

    def untouched(self) -> bool:
        """Whether the closure computed no gradient: it left what was there."""
        return all(p.grad is grad and _version(grad) == n for p, (grad, n) in self._pairs())

    def added(self) -> bool:
        """Whether it added its gradient to one that was there. Clearing in place and adding would be two writes."""
        kept = [(grad, n) for p, (grad, n) in self._pairs() if grad is not None and p.grad is grad]
        written = [_version(grad) - n for grad, n in kept if _version(grad) != n]
        return bool(written) and all(count == 1 for count in written)

    def _pairs(self) -> Any:
        return zip(self._params, self._before, strict=True)


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version
