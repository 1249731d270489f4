"""A model's buffers count one pass of a step, the clean one: statistics of BatchNorm, vectors of spectral norm, ranges
of quantization's observers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

__all__ = ["CleanBuffers", "ModelBuffers"]


class _Saved(NamedTuple):
    """A buffer, where it belongs, what it held, and how often it had been written to."""

    module: nn.Module
    name: str
    buffer: Tensor
    content: Tensor
    version: int


class ModelBuffers:
    """All buffers of ``model`` as the clean pass left them: put back where a later pass wrote to them.

    Copied and put back rather than frozen: right for every kind of module, also one that the user wrote, and without
    a recompilation under ``torch.compile``.

    Args:
        model: the module.
        exempt: patterns of names, as in ``model.named_buffers()``, of buffers that every pass may write to.
    """

    def __init__(self, model: nn.Module, exempt: Sequence[str] = ()) -> None:
        self.model = model
        self.exempt = tuple(exempt)
        self._saved: list[_Saved] = []

    def _buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for prefix, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                full = f"{prefix}.{name}" if prefix else name
                if buffer is not None and not any(fnmatchcase(full, pattern) for pattern in self.exempt):
                    yield module, name, buffer

    @torch.no_grad()
    def save(self) -> None:
        self._saved = [
            _Saved(module, name, buffer, buffer.clone(), _version(buffer)) for module, name, buffer in self._buffers()
        ]

    @torch.no_grad()
    def restore(self) -> list[Tensor]:
        """Put all back, since BatchNorm writes without a trace; return those that are known to have been written to."""
        written = []
        for module, name, buffer, content, version in self._saved:
            replaced = module._buffers.get(name) is not buffer
            if replaced:
                module._buffers[name] = buffer
            if replaced or _version(buffer) != version:
                written.append(buffer)
            # graphs that hold an untouched buffer stay valid: it has the same content as before
            with contextlib.nullcontext() if buffer.is_inference() else _unsafe_preserve_version_counter(buffer):
                buffer.resize_(content.shape).copy_(content)
        self._saved = []
        return written


def _version(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version


class CleanBuffers(ModelBuffers):
    """For a step whose only pass is at perturbed weights and does not count: warns once if nothing else does either,
    which would ruin every evaluation of a model with BatchNorm."""

    def __init__(self, model: nn.Module, exempt: Sequence[str] = ()) -> None:
        super().__init__(model, exempt)
        self._left: list[tuple[Tensor, int]] = []
        self._step: int | None = None
        self._uncounted = 0

    def restore(self) -> list[Tensor]:
        written = super().restore()
        self._left = [(buffer, _version(buffer)) for buffer in written]
        return written

    def see_step(self, step: int) -> None:
        """At the start of a pass of step number ``step``."""
        if step == self._step:
            return
        self._step = step
        untouched = bool(self._left) and all(_version(buffer) == version for buffer, version in self._left)
        self._uncounted += untouched
        if untouched and self._uncounted == 2:
            warnings.warn(
                "model: its buffers (BatchNorm's statistics) have not changed for two steps, since passes under noise "
                "do not count. Run a forward before each, `with torch.no_grad(): model(x)`, or "
                "torch.optim.swa_utils.update_bn before every evaluation",
                stacklevel=5,
            )
