"""BatchNorm's running statistics, computed anew at other weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..curvature._measurement import Measurement

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """Evaluates a model with running statistics of its data at the present weights.

    The mean over the batches of their means and variances, each batch weighted by its size, as
    :func:`torch.optim.swa_utils.update_bn` does with equal weights. It takes a pass over the data.
    """

    def __init__(self, m: Measurement) -> None:
        self.m = m
        for name, layer in m.model.named_modules():
            if isinstance(layer, torch.jit.ScriptModule) and getattr(layer, "running_mean", None) is not None:
                raise ValueError(
                    f"batch_norm: 'recompute' given, but {name or 'the model'!r} is scripted, which hides its "
                    "settings; give 'keep', or the model before torch.jit.script"
                )
        self.layers = [
            layer
            for layer in m.model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
        ]

    @torch.no_grad()
    def mean_loss(self, between: Callable[[], object]) -> float:
        """Mean loss over the data in BatchNorm's evaluation mode; ``between`` is called before the pass that counts.
        Mode, momentum and buffers come back."""
        modes = [(layer.training, layer.momentum) for layer in self.layers]
        try:
            statistics = self._statistics()
            between()
            total, started = 0.0, False
            for inputs, targets, size in self.m.batches():
                if not started:  # a pass starts by bringing the buffers back
                    self._fill(statistics)
                    started = True
                total += size * float(self.m.loss(inputs, targets))
            total, seen = self.m.summed(total, self.m.own_count)
            return total / seen
        finally:
            for layer, (training, momentum) in zip(self.layers, modes, strict=True):
                layer.training, layer.momentum = training, momentum

    def _statistics(self) -> list[list[torch.Tensor]]:
        seen = 0
        for inputs, targets, size in self.m.batches():
            seen += size
            for layer in self.layers:
                layer.training, layer.momentum = True, size / seen
            self.m.loss(inputs, targets)
        found = [[b.clone() for b in layer.buffers(recurse=False)] for layer in self.layers]
        if self.m.process_group is not None:
            share = seen / self.m.summed(seen)[0]
            for b in (b for buffers in found for b in buffers if b.is_floating_point()):
                torch.distributed.all_reduce(b.mul_(share), group=self.m.process_group)
        return found

    def _fill(self, statistics: list[list[torch.Tensor]]) -> None:
        for layer, values in zip(self.layers, statistics, strict=True):
            layer.training = False
            for buffer, value in zip(layer.buffers(recurse=False), values, strict=True):
                buffer.copy_(value)
