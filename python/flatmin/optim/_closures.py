"""What a closure did to the gradients: some compute none, some clip those that are there, some add to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["GradientRecord"]


class GradientRecord:
    """The gradients before a closure is called, by identity and by how often they were written to.

    Args:
        groups: of the optimizer.
        watched: also see whether a backward pass reaches a parameter, until :meth:`close`. Without it a write may be
            anything; with it one without a backward pass is a clipping.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], watched: bool) -> None:
        self._params = [p for group in groups for p in group["params"]]
        self._before = [(p.grad, _version(p.grad)) for p in self._params]
        self._may_compute = not watched
        leaves = [p for p in self._params if watched and p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._see) for p in leaves]

    def _see(self, _: Tensor) -> None:
        self._may_compute = True

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def untouched(self) -> bool:
        """Whether the closure computed no gradient: it left, or scaled, what was there."""
        kept = all(p.grad is grad for p, (grad, _) in self._pairs())
        return kept and (not self._may_compute or all(_version(grad) == n for _, (grad, n) in self._pairs()))

    def added(self) -> bool:
        """Whether it added its gradient to one that was there. Clearing in place and adding would be two writes."""
        kept = [
            (grad, n) for p, (grad, n) in self._pairs() if self._may_compute and grad is not None and p.grad is grad
        ]
        written = [_version(grad) - n for grad, n in kept if _version(grad) != n]
        return bool(written) and all(count == 1 for count in written)

    def _pairs(self) -> Any:
        return zip(self._params, self._before, strict=True)


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version
