"""SAM's ascent: a norm over every gradient, then every bucket to its worst point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ..._checks import check_radius
from ..._devices import on_device
from ..._distributed import combine, total
from .._buckets import Bucket, Mark, PerturbedSet, alike, name_of, params_of, trained, with_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AscentSet", "kinds_of"]


#: ``direction(params, grads)`` of the parameters of one group on one device (or of several, where it is SAM's own).
Direction = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


def kinds_of(radii: Sequence[float | Tensor]) -> list[Tensor | bool]:
    """What keeps groups apart: whether they move or, where only a device knows, the radius."""
    return [rho if isinstance(rho, Tensor) else rho != 0.0 for rho in radii]


class Moving(NamedTuple):
    """A bucket with what one ascent needs of it."""

    bucket: Bucket
    params: list[Tensor]
    grads: list[Tensor]
    options: dict[str, Any]  # adaptive and eta, as the operators take them

    @property
    def weights(self) -> list[Tensor]:
        return self.params if self.options["adaptive"] in (True, "asam", "davda54") else []


class AscentSet(PerturbedSet[Bucket]):
    """The parameters that SAM moves: those that have a gradient and a radius.

    Attributes:
        norm: gradient norm of the last ascent, float64 0-dim on the device of the first bucket; None before.
        merges: whether groups with equal options share buckets.
    """

    def __init__(self, p: float, eps: float, sync: str | ProcessGroup, merges: bool = False) -> None:
        super().__init__()
        self.merges = merges
        self.q = ops.dual_exponent(p)
        self.eps = eps
        self.sync = () if isinstance(sync, str) else (sync,)
        self.norm: Tensor | None = None

    def new_bucket(
        self, groups: tuple[int, ...], params: list[Tensor], shards: tuple[ProcessGroup, ...] | None
    ) -> Bucket:
        return Bucket(groups, params, shards)

    def partition(
        self, groups: Sequence[dict[str, Any]], keys: Sequence[str], *values: Sequence[Any]
    ) -> list[tuple[int, ...]]:
        """``values``: of each group, beside its options."""
        return alike(groups, keys, *values) if self.merges else super().partition(groups, keys)

    def ascend(
        self,
        groups: Sequence[dict[str, Any]],
        keys: Sequence[str],
        radii: Sequence[float | Tensor],
        direction: Direction,
        key: tuple[int, int] | None,
    ) -> bool:
        """Move every parameter that has a gradient and a radius to ``w + e``. False if there is none.

        Nothing is written before every gradient of every bucket has been checked and its norm taken.

        Args:
            groups: the base's.
            keys: of a group's options: groups that differ in none of them move in one call.
            radii: one of each group.
            direction: what the ascent follows.
            key: (seed, number of the ascent), for stochastic rounding.
        """
        moving = list(self._gather(groups, keys, radii, direction))
        self.buckets, self.perturbed = [m.bucket for m in moving], True
        try:
            in_one_call = self._is_whole(moving)
            if not in_one_call:
                self.norm = self._norm(moving, groups)
            share = self._share(moving) if self.q == math.inf else None
            for position, m in enumerate(moving):
                self._move(m, _radius_of(m.bucket, groups, radii), share, key, position, in_one_call)
        except BaseException as error:
            self.restore()
            if isinstance(error, RuntimeError):
                _refuse_sparse(moving, groups)
            raise
        return bool(moving)

    def _is_whole(self, moving: Sequence[Moving]) -> bool:
        """Whether one list in this process is all that the norm spans, so that norm and ascent are one call."""
        return len(moving) == 1 and moving[0].bucket.shards is None and not self.sync and self.q != math.inf

    def _gather(
        self,
        groups: Sequence[dict[str, Any]],
        keys: Sequence[str],
        radii: Sequence[float | Tensor],
        direction: Direction,
    ) -> Iterator[Moving]:
        for index, rho in enumerate(radii):
            check_radius(f"param_groups[{index}]['sam_rho']", rho)
        kinds = kinds_of(radii)
        for indices in self.partition(groups, keys, kinds):
            group = groups[indices[0]]
            if kinds[indices[0]] is False:
                continue
            options = {"adaptive": group["sam_adaptive"], "eta": group["sam_eta"]}
            ops.scaling_code(options["adaptive"])
            params, grads = trained(*with_gradient(params_of(groups, indices)))  # frozen after a backward pass
            for bucket in self.buckets_of(indices, params):
                whole = bucket.shards is None and len(bucket.params) == len(params)
                own = grads if whole else bucket.local_grads()
                yield Moving(bucket, bucket.local(), list(direction(bucket.local(), own)), options)

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
            norm = on_device(self.norm, m.bucket.device)
            counts.append(total([ops.ties(m.grads, norm, m.weights, **m.options)], m.bucket.shards or ()))
        return total(counts or [torch.zeros_like(self.norm)], self.sync)

    def _move(
        self,
        m: Moving,
        rho: float | Tensor,
        share: Tensor | None,
        key: tuple[int, int] | None,
        position: int,
        with_norm: bool,
    ) -> None:
        bucket, device = m.bucket, m.bucket.device
        if share is not None:
            rho = (on_device(rho, share.device) if isinstance(rho, Tensor) else rho) / share
        # Each bucket counts its elements from 0, so each needs a stream of its own.
        words = None if key is None else torch.tensor([key[0], key[1] << 16 | position], dtype=torch.uint64)
        stream = None if words is None else on_device(words, device)
        options = {"q": self.q, "eps": self.eps, "key": stream, **m.options}
        mark = Mark(bucket.backup, m.params)
        try:
            if with_norm:
                self.norm = ops.sam_norm_ascend_(m.params, m.grads, bucket.backup, rho, **options)
            else:
                assert self.norm is not None
                ops.sam_ascend_(m.params, m.grads, bucket.backup, on_device(self.norm, device), rho, **options)
            bucket.moved = True
        except BaseException:
            bucket.moved = mark.overwritten()
            raise
        bucket.bump_versions()


def _radius_of(bucket: Bucket, groups: Sequence[dict[str, Any]], radii: Sequence[float | Tensor]) -> float | Tensor:
    """As the operators take it: one of all, or one of each parameter. Tensors are of one group, or the same."""
    own: list[Any] = [radii[index] for index in bucket.groups]
    if isinstance(own[0], Tensor):
        return own[0]
    numbers = bucket.numbers(groups, [(rho,) for rho in own])
    return numbers if isinstance(numbers, Tensor) else numbers[0]


def _refuse_sparse(moving: Sequence[Moving], groups: Sequence[dict[str, Any]]) -> None:
    """Name the parameter with a sparse gradient, if that is what the norm failed on."""
    for m in moving:
        for p, grad in zip(m.bucket.params, m.grads, strict=True):
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{name_of(p, groups)} has a gradient of layout {grad.layout}; SAM needs dense ones: use "
                    "nn.Embedding(sparse=False), or give the group sam_rho=0"
                )
