"""Parameters under noise: what is known of their curvature, kept together by the age of that knowledge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from ._clock import Clock
from ._norms import is_dtensor
from ._perturbed import AdamState, Bucket

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["NoiseBucket", "Portion", "Settings", "Track", "local"]


class Settings(NamedTuple):
    """What a :class:`flatmin.noise.PerturbedOPT` was constructed with."""

    law: str
    sizing: str
    hessian: str | Callable[[list[Tensor]], Sequence[Tensor | None]]
    lipschitz: str | float
    beta1: float
    beta2: float
    min_step: float
    schedule: str | Callable[[int], float] | None
    sync: str | ProcessGroup

    @property
    def curved(self) -> bool:
        return self.sizing == "curvature"

    @property
    def fed_by_steps(self) -> bool:
        """Whether the curvature is averaged from the gradients of the steps."""
        return self.curved and self.hessian == "grad2"

    @property
    def learns_rho(self) -> bool:
        return isinstance(self.lipschitz, str)

    def decay(self, epoch: int) -> float:
        """Factor of the neighbourhood in an epoch."""
        if self.schedule is None:
            return 1.0
        if isinstance(self.schedule, str):
            return 1.0 / math.log(math.e - 1.0 + epoch)
        factor = float(self.schedule(epoch))
        if not 0.0 <= factor < math.inf:
            raise ValueError(f"schedule: gave {factor} for epoch {epoch}; it must give a finite float >= 0")
        return factor


def local(t: Any) -> Tensor:
    """A tensor, or this rank's shard of a DTensor."""
    if not is_dtensor(t):
        return t  # type: ignore[no-any-return]
    with torch.no_grad():
        return t.to_local()  # type: ignore[no-any-return]


class Track:
    """What is known of one parameter.

    Attributes:
        curvature: bias-laden average ``h`` of the Hessian's diagonal, of the parameter's type or float32.
        lipschitz: its difference quotients, with ``lipschitz="element"``.
        anchor: the parameter at the last estimate, where quotients span more than a step.
        clock: of the average, shared with the parameters that were updated as often.
    """

    __slots__ = ("anchor", "clock", "curvature", "lipschitz")

    def __init__(self, p: Tensor, per_element: bool, clock: Clock) -> None:
        self.curvature = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        self.lipschitz = torch.zeros_like(self.curvature) if per_element else None
        self.anchor: Tensor | None = None
        self.clock = clock

    def fit(self, p: Tensor, beta: float) -> Track:
        """Follow a parameter that was converted or moved, as by ``.half()`` or ``.cuda()``."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        self.curvature = self.curvature.to(p.device, dtype)
        self.lipschitz = None if self.lipschitz is None else self.lipschitz.to(p.device, dtype)
        self.anchor = None if self.anchor is None else self.anchor.to(p.device, p.dtype)
        if self.clock.count.device != p.device:
            self.clock = Clock(p.device, beta, self.clock.updates)
        return self


class NoiseBucket(Bucket):
    """A bucket with the tracks of its parameters, which were all updated equally often.

    Attributes:
        tracks: of the parameters; empty before their first update.
        saved: whether ``backup`` holds the weights from which the coming step goes.
        largest: quotient that the last fused step found.
    """

    def __init__(
        self,
        group: int,
        params: list[Tensor],
        shards: tuple[ProcessGroup, ...] | None,
        tracks: list[Track],
        settings: Settings,
    ) -> None:
        super().__init__(group, params, shards)
        self.settings = settings
        self.saved = False
        self.largest: Tensor | None = None
        self.elements = sum(p.numel() for p in self.local())
        self.follow(tracks)
        self._key: tuple[tuple[int, int, int], Tensor] | None = None
        self._sizes: tuple[list[Tensor], list[Tensor]] | None = None

    def follow(self, tracks: list[Track]) -> None:
        """Take the tracks of the parameters, and make them share one clock."""
        self.tracks = tracks
        self.clock = tracks[0].clock if tracks else Clock(self.device, self.settings.beta1)
        if any(track.clock is not self.clock for track in tracks):
            self.clock = self.clock.copy()  # as old as the others, but some of its parameters may be elsewhere
            for track in tracks:
                track.clock = self.clock
        self.curvatures = [local(track.curvature) for track in tracks]
        self.lipschitz = [local(track.lipschitz) for track in tracks if track.lipschitz is not None]

    @property
    def ready(self) -> bool:
        """Whether its noise has a size: there is none before the first curvature."""
        return not self.settings.curved or self.clock.updates > 0

    def key(self, seed: int, draw: int, stream: int) -> Tensor:
        """Key of the draw. It is advanced on the device, so that a captured CUDA graph draws anew."""
        if self._key is None or self._key[0] != (seed, draw - 1, stream):
            key = ops.random_key(seed, draw, stream, self.device)
        else:
            key = self._key[1]
            key.view(torch.int32)[2].add_(1)
        self._key = (seed, draw, stream), key
        return key

    def draws(self) -> int | None:
        """How many draws the device has made; None if it made none. The host waits for it."""
        return None if self._key is None else int(self._key[1].view(torch.int32)[2]) % 2**32 + 1

    def sizes(self) -> list[Tensor]:
        """Norm of each filter, or ``||w|| / sqrt(n)`` of each tensor, as views like the parameters."""
        whole = self.settings.sizing == "tensor"
        norms = ops.filter_norm(self.params, whole=whole)
        if whole:
            torch._foreach_mul_(norms, [max(p.numel(), 1) ** -0.5 for p in self.params])
        if self._sizes is None:
            types = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in self.params]
            cells = [torch.empty_like(n, dtype=dtype) for n, dtype in zip(norms, types, strict=True)]
            self._sizes = cells, [cell.expand_as(p) for cell, p in zip(cells, self.params, strict=True)]
        torch._foreach_copy_(self._sizes[0], norms)
        return self._sizes[1]

    def __getstate__(self) -> dict[str, Any]:
        """A key is made anew from the counters: torch cannot pickle tensors of uint64."""
        return self.__dict__ | {"_key": None, "_sizes": None}

    # -- restore and step in one pass ----------------------------------------------------------------------------------

    def averaging(self) -> dict[str, Any]:
        s = self.settings
        return {"decay": s.beta1, "lipschitz_decay": s.beta2, "min_step": s.min_step}

    def restore_sgd(self, grads: list[Tensor], buffers: list[Tensor], lr: float, **options: Any) -> None:
        if not self.settings.fed_by_steps:
            super().restore_sgd(grads, buffers, lr, **options)
            return
        tick = self.clock.next()
        self.largest = ops.restore_sgd_curvature_(
            self.params,
            grads,
            buffers,
            self.curvatures,
            self.lipschitz,
            self.backup,
            lr,
            tick.corrections,
            **options,
            **self.averaging(),
        )
        self.clock.advance(tick)

    def restore_adam(self, grads: list[Tensor], state: AdamState, lr: float, **options: Any) -> None:
        if not self.settings.fed_by_steps:
            super().restore_adam(grads, state, lr, **options)
            return
        tick = self.clock.next()
        exp_avgs, exp_avg_sqs, maxima, steps = state
        self.largest = ops.restore_adam_curvature_(
            self.params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            maxima,
            steps,
            self.curvatures,
            self.lipschitz,
            self.backup,
            lr,
            tick.corrections,
            **options,
            **self.averaging(),
        )
        self.clock.advance(tick)


class Portion:
    """Those parameters of a bucket for which there is something to average."""

    def __init__(self, bucket: NoiseBucket, present: Sequence[bool], per_element: bool) -> None:
        self.bucket = bucket
        self.present = present
        self.whole = all(present)
        self.params = bucket.params if self.whole else list(compress(bucket.params, present))
        self.known = bool(bucket.tracks)
        if not self.known:
            self.clock = bucket.clock if self.whole else bucket.clock.copy()
            self.tracks = [Track(p, per_element, self.clock) for p in self.params]
        elif self.whole:
            self.clock, self.tracks = bucket.clock, bucket.tracks
        else:
            self.clock, self.tracks = bucket.clock.copy(), list(compress(bucket.tracks, present))

    def local(self) -> list[Tensor]:
        return self.bucket.local() if self.whole else [local(p) for p in self.params]

    def curvatures(self) -> list[Tensor]:
        return self.bucket.curvatures if self.whole and self.known else [local(t.curvature) for t in self.tracks]

    def lipschitz(self) -> list[Tensor]:
        if self.whole and self.known:
            return self.bucket.lipschitz
        return [local(t.lipschitz) for t in self.tracks if t.lipschitz is not None]

    def weights_before(self) -> Tensor | None:
        """Backup of the weights from which the step went, if the bucket has them."""
        if not (self.bucket.saved and self.known):
            return None
        if self.whole:
            return self.bucket.backup
        sizes = [reference.backup_nbytes([p]) for p in self.bucket.local()]
        return torch.cat(list(compress(self.bucket.backup.split(sizes), self.present)))  # type: ignore[no-untyped-call]

    def weights_at_estimate(self) -> Tensor | None:
        """Backup of the weights at the last estimate, if every one was kept."""
        if not self.known or any(track.anchor is None for track in self.tracks):
            return None
        params = self.local()
        backup = ops.backup_like(params)
        for slot, p, track in zip(reference._slots(params, backup), params, self.tracks, strict=True):
            slot.copy_(local(track.anchor).permute(sorted(range(p.dim()), key=p.stride, reverse=True)))
        return backup

    @torch.no_grad()
    def keep_weights(self) -> None:
        for p, track in zip(self.params, self.tracks, strict=True):
            if track.anchor is None:
                track.anchor = p.detach().clone()
            else:
                track.anchor.copy_(p)
