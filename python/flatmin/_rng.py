"""States of torch's random number generators."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Generators"]


class Generators:
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
