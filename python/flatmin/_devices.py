"""Where values live."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["on_device"]


def on_device(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``t`` on ``device``, without making the host wait: except for a copy to the CPU, which reads it at once."""
    return t.to(device=device, dtype=dtype or t.dtype, non_blocking=device.type != "cpu")
