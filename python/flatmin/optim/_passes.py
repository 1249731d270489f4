"""What must be the same in both passes of a step: BatchNorm's statistics count once, dropout draws the same masks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["BatchNormBuffers", "CleanStatistics", "RandomReplay"]


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


class RandomReplay:
    """Gives the k-th forward of the second pass the random numbers of the k-th forward of the first.

    The generators of the CPU and of the model's devices are recorded before every training forward. In the second
    pass they are set back for the time of the forward, and afterwards go on as if it had drawn nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.second_pass = False
        self._recorded: list[_Generators] = []
        self._next = 0
        self._interrupted: _Generators | None = None
        hook = _Hook(self)
        model.register_forward_pre_hook(hook.before)
        model.register_forward_hook(hook.after, always_call=True)

    def start_second_pass(self) -> None:
        self.second_pass, self._next = True, 0

    def reset(self) -> None:
        """Forget the first pass: at the end of the second, and at a step without one."""
        self.second_pass = False
        self._recorded.clear()

    def before_forward(self) -> None:
        if not (self.model.training and torch.is_grad_enabled()):
            return  # an evaluation between two steps is no pass
        if not self.second_pass:
            self._recorded.append(_Generators(self.model))
        elif self._next < len(self._recorded):
            self._interrupted = _Generators(self.model)
            self._recorded[self._next].set()
            self._next += 1

    def after_forward(self) -> None:
        if self._interrupted is not None:
            self._interrupted.set()
            self._interrupted = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy belongs to the copied model, and hooks into that."""
        return RandomReplay, (self.model,)


class _Generators:
    """The states of the default generators that ``model`` can draw from, at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self.cpu = torch.get_rng_state()
        self.modules = {
            p.device: torch.get_device_module(p.device) for p in model.parameters() if p.device.type != "cpu"
        }
        self.devices = {device: module.get_rng_state(device) for device, module in self.modules.items()}

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            self.modules[device].set_rng_state(state, device)


class _Hook:
    """Forward hooks that keep no optimizer alive, and that do nothing in a copy of the model."""

    def __init__(self, replay: RandomReplay | None) -> None:
        self._replay = weakref.ref(replay) if replay is not None else None

    def _owner(self) -> RandomReplay | None:
        return self._replay() if self._replay is not None else None

    def before(self, module: nn.Module, args: Any) -> None:
        if (replay := self._owner()) is not None:
            replay.before_forward()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if (replay := self._owner()) is not None:
            replay.after_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)
