"""One norm over everything that is perturbed: over buckets, over the shards of a DTensor, over a process group."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._devices import on_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["agreed", "combine", "gathered", "is_dtensor", "is_first", "local_gradient", "rank", "shard_groups", "total"]


def is_dtensor(t: Tensor) -> bool:
    """Asked through ``sys.modules``: importing torch.distributed.tensor takes most of a second, and nobody can hold a
    DTensor who has not done it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def shard_groups(p: Any) -> tuple[ProcessGroup, ...]:
    """The process groups over which a DTensor is cut into shards. Replicas hold the same values: not counted twice."""
    return tuple(p.device_mesh.get_group(dim) for dim, place in enumerate(p.placements) if place.is_shard())


def local_gradient(p: Any) -> Tensor:
    """The shard of a DTensor parameter's gradient that belongs to its local tensor."""
    grad = p.grad
    if grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    local: Tensor = grad.to_local()
    return local


def rank() -> int:
    """Of this process in the default group; 0 where there is none."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if known else 0


def is_first(group: ProcessGroup | None) -> bool:
    """Whether this process is the first of ``group``, or alone."""
    return group is None or torch.distributed.get_rank(group) == 0


def agreed(x: Any, group: ProcessGroup | None) -> Any:
    """``x`` of the first rank, on all of them: what depends on a clock or a file. It can be pickled."""
    if group is None:
        return x
    box = [x]
    source = torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast_object_list(box, source, group=group)
    return box[0]


def gathered(x: Any, group: ProcessGroup | None) -> list[Any]:
    """``x`` of every rank, in their order. It can be pickled."""
    if group is None:
        return [x]
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, x, group=group)
    return found


def combine(partial: Sequence[Tensor], q: float, groups: Sequence[ProcessGroup] = ()) -> Tensor:
    """The q-norm of partial q-norms, and of those of the other ranks in ``groups``: 0-dim, without host sync.

    Scaled by the maximum, so that no power over- or underflows. Not finite on every rank if it is not on one: NaN
    counts as infinite, because the maximum of a collective may lose a NaN.
    """
    if len(partial) == 1 and not groups:
        return partial[0]
    device = partial[0].device
    norms = torch.stack([on_device(n, device) for n in partial])
    norms = torch.where(norms.isnan(), math.inf, norms)
    largest = norms.amax()
    for group in groups:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    if q == math.inf:
        return largest
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    power = ((norms / unit) ** q).sum()
    for group in groups:
        torch.distributed.all_reduce(power, torch.distributed.ReduceOp.SUM, group)
    return torch.where(largest.isfinite(), unit * power ** (1.0 / q), largest)


def total(counts: Sequence[Tensor], groups: Sequence[ProcessGroup] = ()) -> Tensor:
    """The sum of tensors of one shape, and of those of the other ranks in ``groups``."""
    device = counts[0].device
    result = torch.stack([on_device(n, device) for n in counts]).sum(0)
    for group in groups:
        torch.distributed.all_reduce(result, torch.distributed.ReduceOp.SUM, group)
    return result
