"""The set of parameters that an ascent moves, with the backup that brings them back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress, repeat
from operator import attrgetter, is_, is_not
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import ops
from ._norms import combine, is_dtensor, local_gradient, shard_groups, total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Bucket", "PerturbedSet", "can_move", "check_radius", "with_gradient"]

# With map() these walk a list of tensors in C: 0.05 us each, a third of a comprehension that tests two of them.
_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")
_dtype = attrgetter("dtype")


def check_radius(rho: Any, name: str = "rho") -> None:
    """``TypeError`` or ``ValueError`` unless ``rho`` can be a radius. A tensor's value is not read: that would sync."""
    if isinstance(rho, Tensor):
        if rho.numel() != 1:
            raise ValueError(f"{name}: a tensor of shape {tuple(rho.shape)} given; a radius is a float or 0-dim tensor")
    elif not isinstance(rho, int | float):
        raise TypeError(f"{name}: {rho!r} given; a radius is a float or a 0-dim tensor")
    elif not 0.0 <= rho < math.inf:
        raise ValueError(f"{name}: {rho} given, but a radius is finite and not negative (0 switches SAM off)")


def can_move(group: dict[str, Any]) -> bool:
    """Whether the group's radius perturbs. A tensor counts: only the device knows its value."""
    rho = group["sam_rho"]
    return isinstance(rho, Tensor) or rho != 0.0


def with_gradient(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of ``params`` that have a gradient, and the gradients."""
    grads = list(map(_grad, params))
    if all(map(is_not, grads, repeat(None))):
        return params, grads
    present = [grad is not None for grad in grads]
    return list(compress(params, present)), list(compress(grads, present))


class Bucket:
    """Parameters of one group on one device: one call of each operator.

    Attributes:
        group: index of the group.
        params: the parameters, each once.
        shards: process groups over which DTensor parameters are sharded; None for plain tensors.
        dtype: the type of all of them, if they are plain tensors of one type, else None.
        backup: the bytes that they had before they moved.
        moved: whether they are at ``w + e``.
    """

    def __init__(self, group: int, params: list[Tensor], shards: tuple[ProcessGroup, ...] | None) -> None:
        self.group = group
        self.params = params
        self.shards = shards
        self.device = params[0].device
        self.backup = ops.backup_like(self.local())
        self.moved = False
        dtypes = set(map(_dtype, params))
        plain = set(map(type, params)) <= {nn.Parameter, Tensor}
        self.dtype = dtypes.pop() if plain and len(dtypes) == 1 else None
        self._dtype = params[0].dtype

    def local(self) -> list[Tensor]:
        """The tensors to do arithmetic on: the parameters, or this rank's shards of them."""
        if self.shards is None:
            return self.params
        with torch.no_grad():  # a view for autograd otherwise
            return [p.to_local() for p in self.params]  # type: ignore[attr-defined]

    def local_grads(self) -> list[Tensor]:
        if self.shards is None:
            return list(map(_grad, self.params))
        with torch.no_grad():
            return [local_gradient(p) for p in self.params]

    def still_fits(self) -> bool:
        """False once the model was converted or moved, as by ``.half()`` or ``.cuda()``. Asked of the first parameter
        alone, since it is asked at every step; the operators refuse a backup that does not fit another."""
        first = self.params[0]
        return first.device == self.device and first.dtype == self._dtype

    def bump_versions(self) -> None:
        """Autograd watches the DTensor, not the local tensor that the operators write to."""
        if self.shards is not None:
            increment_version(self.params)


class Moving(NamedTuple):
    """A bucket with what one ascent needs of it."""

    bucket: Bucket
    params: list[Tensor]
    grads: list[Tensor]
    options: dict[str, Any]  # adaptive and eta, as the operators take them

    @property
    def weights(self) -> list[Tensor]:
        return self.params if self.options["adaptive"] in (True, "asam", "davda54") else []


class PerturbedSet:
    """Where the weights are. One object per wrapper, so that a shallow copy of the wrapper shares it.

    Attributes:
        perturbed: whether an ascent was made and not yet restored.
        norm: gradient norm of the last ascent, float64 0-dim on the device of the first bucket; None before.
    """

    def __init__(self, p: float, eps: float, sync: str | ProcessGroup) -> None:
        self.q = ops.dual_exponent(p)
        self.eps = eps
        self.sync = () if isinstance(sync, str) else (sync,)
        self.perturbed = False
        self.norm: Tensor | None = None
        self.buckets: list[Bucket] = []
        self._known: dict[int, tuple[list[Tensor], list[Bucket]]] = {}

    def ascend(self, groups: Sequence[dict[str, Any]], key: tuple[int, int] | None) -> bool:
        """Move every parameter that has a gradient and a radius to ``w + e``. False if there is none.

        ``key`` is (seed, number of the ascent) for stochastic rounding. Nothing is written before every gradient of
        every bucket has been checked and its norm taken.
        """
        moving = list(self._gather(groups))
        try:
            self.norm = self._norm(moving, groups)
        except RuntimeError:
            _refuse_sparse(moving, groups)
            raise
        share = self._share(moving) if self.q == math.inf else None
        self.buckets = [m.bucket for m in moving]
        self.perturbed = True
        try:
            for position, m in enumerate(moving):
                self._move(m, groups[m.bucket.group]["sam_rho"], share, key, position)
        except BaseException:
            self.restore()
            raise
        return bool(moving)

    def restore(self) -> None:
        """Bring back the bytes of every bucket that is still moved."""
        for bucket in self.buckets:
            if bucket.moved:
                ops.restore_(bucket.local(), bucket.backup)
                bucket.moved = False
                bucket.bump_versions()
        self.perturbed = False

    def _gather(self, groups: Sequence[dict[str, Any]]) -> Iterator[Moving]:
        for index, group in enumerate(groups):
            check_radius(group["sam_rho"], f"param_groups[{index}]['sam_rho']")
            if not can_move(group):
                continue
            options = {"adaptive": group["sam_adaptive"], "eta": group["sam_eta"]}
            ops.scaling_code(options["adaptive"])
            params, grads = with_gradient(group["params"])
            if not all(map(_requires_grad, params)):  # frozen after a backward pass
                trained = list(map(_requires_grad, params))
                params, grads = list(compress(params, trained)), list(compress(grads, trained))
            for bucket in self._buckets(index, params):
                whole = bucket.shards is None and len(bucket.params) == len(params)
                yield Moving(bucket, bucket.local(), grads if whole else bucket.local_grads(), options)

    def _buckets(self, index: int, params: list[Tensor]) -> list[Bucket]:
        """The buckets of a group. Kept with their backups while the same parameters have gradients: fresh memory
        would cost page faults, and a CUDA graph needs fixed addresses."""
        known, buckets = self._known.get(index, ([], []))
        same = len(known) == len(params) and all(map(is_, known, params))
        if not same or not all(bucket.still_fits() for bucket in buckets):
            parts: dict[Any, list[Tensor]] = {}
            for p in dict.fromkeys(params):  # a tied parameter is listed twice, but moves once
                shards = shard_groups(p) if is_dtensor(p) else None
                parts.setdefault((p.device, shards), []).append(p)
            buckets = [Bucket(index, part, shards) for (_, shards), part in parts.items()]
            self._known[index] = list(params), buckets
        return buckets

    def _norm(self, moving: Sequence[Moving], groups: Sequence[dict[str, Any]]) -> Tensor:
        partial = []
        for m in moving:
            norm = ops.norm(m.grads, m.weights, q=self.q, **m.options)
            partial.append(combine([norm], self.q, m.bucket.shards or ()))
        if not partial:  # the other ranks of `sync` still wait for this one
            device = next((p.device for group in groups for p in group["params"]), None)
            partial = [torch.zeros((), dtype=torch.float64, device=device)]
        return combine(partial, self.q, self.sync)

    def _share(self, moving: Sequence[Moving]) -> Tensor:
        """How many gradients share the radius in the 1-norm: those that attain the maximum."""
        assert self.norm is not None
        counts = []
        for m in moving:
            norm = ops.on_device(self.norm, m.bucket.device)
            counts.append(total([ops.ties(m.grads, norm, m.weights, **m.options)], m.bucket.shards or ()))
        return total(counts or [torch.zeros_like(self.norm)], self.sync)

    def _move(
        self, m: Moving, rho: float | Tensor, share: Tensor | None, key: tuple[int, int] | None, position: int
    ) -> None:
        assert self.norm is not None
        bucket, device = m.bucket, m.bucket.device
        if share is not None:
            rho = (ops.on_device(rho, share.device) if isinstance(rho, Tensor) else rho) / share
        # Each bucket counts its elements from 0, so each needs a stream of its own.
        words = None if key is None else torch.tensor([key[0], key[1] << 16 | position], dtype=torch.uint64)
        stream = None if words is None else ops.on_device(words, device)
        norm = ops.on_device(self.norm, device)
        ops.sam_ascend_(m.params, m.grads, bucket.backup, norm, rho, q=self.q, eps=self.eps, key=stream, **m.options)
        bucket.moved = True
        bucket.bump_versions()

    def __getstate__(self) -> dict[str, Any]:
        """Backups at rest are scratch memory: not worth copying."""
        state = self.__dict__ | {"_known": {}}
        return state if self.perturbed else state | {"buckets": []}


def _refuse_sparse(moving: Sequence[Moving], groups: Sequence[dict[str, Any]]) -> None:
    """Name the parameter with a sparse gradient, if that is what the norm failed on."""
    for m in moving:
        for p, grad in zip(m.bucket.params, m.grads, strict=True):
            if grad.layout != torch.strided:
                group = groups[m.bucket.group]
                position = next(j for j, candidate in enumerate(group["params"]) if candidate is p)
                name = f" ({group['param_names'][position]})" if "param_names" in group else ""
                raise RuntimeError(
                    f"param_groups[{m.bucket.group}]['params'][{position}]{name} has a gradient of layout "
                    f"{grad.layout}; SAM needs dense ones: use nn.Embedding(sparse=False), or give the group sam_rho=0"
                )
