"""States of random number generators: torch's, Python's and numpy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Generators", "OwnGenerators"]


class Generators:
    """The states of the global generators that ``model``, or code around it, can draw from, at one moment: torch's of
    the CPU and of the model's devices, Python's, and numpy's if it is imported."""

    def __init__(self, model: nn.Module) -> None:
        self.cpu = torch.get_rng_state()
        self.modules = {
            p.device: torch.get_device_module(p.device) for p in model.parameters() if p.device.type != "cpu"
        }
        self.devices = {device: module.get_rng_state(device) for device, module in self.modules.items()}
        self.python = random.getstate()
        numpy = _numpy_random()
        self.numpy = None if numpy is None else numpy.get_state()

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            self.modules[device].set_rng_state(state, device)
        random.setstate(self.python)
        numpy = _numpy_random()
        if numpy is not None and self.numpy is not None:
            numpy.set_state(self.numpy)


class OwnGenerators:
    """The states of generators of its own that an object holds as attributes, at one moment.

    Args:
        owners: where to look, as a loader, its sampler and its dataset. Of torch, of Python (:class:`random.Random`)
            and of numpy (``Generator``, ``RandomState``).
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        found = {id(x): x for owner in owners for x in getattr(owner, "__dict__", {}).values()}
        self._setters = [setter for x in found.values() if (setter := _setter(x)) is not None]

    def set(self) -> None:
        for setter in self._setters:
            setter()


def _numpy_random() -> Any:
    return sys.modules.get("numpy.random")


def _setter(x: Any) -> Callable[[], object] | None:
    """What brings a generator back to its present state; None for anything else."""
    numpy = _numpy_random()
    if isinstance(x, torch.Generator):
        state = x.get_state()
        return lambda: x.set_state(state)
    if isinstance(x, random.Random):
        python = x.getstate()
        return lambda: x.setstate(python)
    if numpy is not None and isinstance(x, numpy.RandomState):
        legacy = x.get_state()
        return lambda: x.set_state(legacy)
    if numpy is not None and isinstance(x, numpy.Generator):
        bits = x.bit_generator.state
        return lambda: setattr(x.bit_generator, "state", bits)
    return None
