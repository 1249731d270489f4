"""BatchNorm's statistics count one pass of a step, the clean one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["BatchNormBuffers", "CleanStatistics"]


class BatchNormBuffers:
    """Running statistics of ``model`` as the clean pass left them.

    Copied and put back rather than frozen through ``momentum``: right for ``momentum=None``, for SyncBatchNorm and
    for modules that the user froze, and without a recompilation under ``torch.compile``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._saved: list[tuple[Tensor, Tensor]] = []

    def _buffers(self) -> Iterator[Tensor]:
        for module in self.model.modules():
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                yield from (b for b in module.buffers(recurse=False) if b is not None)

    @torch.no_grad()
    def save(self) -> None:
        self._saved = [(buffer, buffer.clone()) for buffer in self._buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, saved in self._saved:
            buffer.copy_(saved)
        self._saved = []


class CleanStatistics(BatchNormBuffers):
    """For a step whose only pass is at perturbed weights and does not count: warns once if nothing else does either,
    which would ruin every evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._left: list[tuple[Tensor, int]] = []
        self._step: int | None = None
        self._uncounted = 0

    def restore(self) -> None:
        buffers = [buffer for buffer, _ in self._saved]
        super().restore()
        self._left = [(buffer, buffer._version) for buffer in buffers]

    def see_step(self, step: int) -> None:
        """At the start of a pass of step number ``step``."""
        if step == self._step:
            return
        self._step = step
        untouched = bool(self._left) and all(buffer._version == version for buffer, version in self._left)
        self._uncounted += untouched
        if untouched and self._uncounted == 2:
            warnings.warn(
                "model: BatchNorm's statistics have not changed for two steps, since passes under noise do not count. "
                "Run a forward before each, `with torch.no_grad(): model(x)`, or torch.optim.swa_utils.update_bn "
                "before every evaluation",
                stacklevel=5,
            )
