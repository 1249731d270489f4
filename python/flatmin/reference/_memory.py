"""Types, memory order and the backup: what the other files of the reference stand on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "arithmetic_type", "as_real", "backup_nbytes", "backup_views", "memory_order", "wide_type"]

#: Every tensor starts at a multiple of this many bytes in a backup: one cache line, any vector store.
ALIGNMENT = 64


def backup_nbytes(params: Sequence[Tensor]) -> int:
    """Bytes of the backup that holds ``params``: each rounded up to :data:`ALIGNMENT`."""
    return sum(-(-p.numel() * p.element_size() // ALIGNMENT) * ALIGNMENT for p in params)


def as_real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def memory_order(t: Tensor) -> Tensor:
    """``t`` with its dimensions permuted to descending strides: flattening it walks memory forward."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))


def backup_views(params: Sequence[Tensor], backup: Tensor) -> Iterator[Tensor]:
    """One view of ``backup`` per parameter, shaped like the parameter in memory order."""
    needed = backup_nbytes(params)
    if backup.numel() < needed:
        raise RuntimeError(f"backup: {backup.numel()} bytes given, {needed} needed; use backup_like(params)")
    start = 0
    for p in params:
        stop = start + p.numel() * p.element_size()
        yield backup[start:stop].view(p.dtype).view(memory_order(p).shape)
        start += -(-(stop - start) // ALIGNMENT) * ALIGNMENT


def wide_type(t: Tensor) -> torch.dtype:
    return torch.float32 if t.device.type == "mps" else torch.float64


def arithmetic_type(t: Tensor) -> torch.dtype:
    """The type in which a parameter of this type is updated."""
    return torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32
