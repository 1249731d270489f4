"""Inner products and combinations of whole gradients: over devices, shards and processes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import ops
from ..._devices import on_device
from ..._distributed import is_dtensor, shard_groups, total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["blend_", "gram"]


def gram(*gradients: Sequence[Tensor], sync: Sequence[ProcessGroup] = ()) -> Tensor:
    """The inner products of two to four gradients, each a list of tensors: float64 of shape (k, k), on the device of
    the first tensor, without host sync. ``sync``: process groups over which plain tensors are sharded."""
    partial = []
    for (_, shards), lists in _by_device(gradients).items():
        partial.append(total([ops.gram(*lists)], shards))
    return total(partial, sync)


def blend_(second: Sequence[Tensor], coefficients: Tensor, first: Sequence[Tensor]) -> None:
    """``second <- a second + b first`` with (a, b, 0) = ``coefficients``, float64."""
    for (device, _), (own, other) in _by_device([second, first]).items():
        ops.blend_(own, other, coefficients=on_device(coefficients, device))


def _by_device(lists: Sequence[Sequence[Tensor]]) -> dict[Any, list[list[Tensor]]]:
    """The lists' local tensors by device and by the process groups over which they are sharded."""
    parts: dict[tuple[torch.device, Hashable], list[list[Tensor]]] = {}
    for tensors in zip(*lists, strict=True):
        t: Any = tensors[0]
        shards = shard_groups(t) if is_dtensor(t) else ()
        part = parts.setdefault((t.device, shards), [[] for _ in lists])
        for own, x in zip(part, tensors, strict=True):
            own.append(_local(x, t))
    return parts


def _local(x: Any, like: Any) -> Tensor:
    if not is_dtensor(x):
        return x  # type: ignore[no-any-return]
    if x.placements != like.placements:
        x = x.redistribute(like.device_mesh, like.placements)
    return x.to_local()  # type: ignore[no-any-return]
