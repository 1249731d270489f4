"""Parameters under noise: what is known of their curvature, kept together by the age of that knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import ops, reference
from ..._devices import on_device
from ..._distributed import is_dtensor
from .._buckets import Bucket, RestoreAndStep
from ._bias_correction import BiasCorrection
from ._settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["NoiseBucket", "ParameterState", "Part", "Subset", "local"]


def local(t: Any) -> Tensor:
    """A tensor, or this rank's shard of a DTensor."""
    if not is_dtensor(t):
        return t  # type: ignore[no-any-return]
    with torch.no_grad():
        return t.to_local()  # type: ignore[no-any-return]


class ParameterState:
    """What is known of one parameter.

    Attributes:
        curvature: bias-laden average ``h`` of the Hessian's diagonal, of the parameter's type or float32.
        lipschitz: its difference quotients, with ``lipschitz="element"``.
        anchor: the parameter at the last estimate, where quotients span more than a step.
        correction: bias correction of the average, shared with the parameters that were updated as often.
    """

    __slots__ = ("anchor", "correction", "curvature", "lipschitz")

    def __init__(self, p: Tensor, per_element: bool, correction: BiasCorrection) -> None:
        self.curvature = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        self.lipschitz = torch.zeros_like(self.curvature) if per_element else None
        self.anchor: Tensor | None = None
        self.correction = correction

    def fit(self, p: Tensor, beta: float) -> ParameterState:
        """Follow a parameter that was converted or moved, as by ``.half()`` or ``.cuda()``."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        self.curvature = self.curvature.to(p.device, dtype)
        self.lipschitz = None if self.lipschitz is None else self.lipschitz.to(p.device, dtype)
        self.anchor = None if self.anchor is None else self.anchor.to(p.device, p.dtype)
        if self.correction.count.device != p.device:
            self.correction = BiasCorrection(p.device, beta, self.correction.updates)
        return self


class Part(NamedTuple):
    """The parameters of one group in a bucket: they draw by themselves, so that noise does not depend on which groups
    share a bucket.

    Attributes:
        group: index of the group.
        first: place of the first parameter in its group.
        start, stop: their places in the bucket.
    """

    group: int
    first: int
    start: int
    stop: int


class NoiseBucket(Bucket):
    """A bucket with the states of its parameters, which were all updated equally often.

    Attributes:
        states: of the parameters; empty before their first update.
        saved: whether ``backup`` holds the weights from which the coming step goes.
        largest: quotient that the last fused step found.
    """

    def __init__(
        self,
        groups: tuple[int, ...],
        params: list[Tensor],
        shards: tuple[ProcessGroup, ...] | None,
        states: list[ParameterState],
        settings: Settings,
    ) -> None:
        super().__init__(groups, params, shards)
        self.settings = settings
        self.saved = False
        self.largest: Tensor | None = None
        if states:  # one correction for all of them, which parameters that were left out do not share
            own = states[0].correction.copy()
            for state in states:
                state.correction = own
        self.follow(states)
        self._key: tuple[int, int, tuple[int, ...], Tensor] | None = None
        self._parts: list[Part] = []
        self._sizes: tuple[list[Tensor], list[Tensor]] | None = None

    def follow(self, states: list[ParameterState]) -> None:
        """Take the states of the parameters, which share one bias correction."""
        self.states = states
        self.correction = states[0].correction if states else BiasCorrection(self.device, self.settings.beta1)
        self.curvatures = [local(state.curvature) for state in states]
        self.lipschitz = [local(state.lipschitz) for state in states if state.lipschitz is not None]

    @property
    def ready(self) -> bool:
        """Whether its noise has a size: there is none before the first curvature."""
        return not self.settings.curved or self.correction.updates > 0

    def parts(self, groups: Sequence[dict[str, Any]]) -> list[Part]:
        """By group, in order."""
        if not self._parts:
            places = {id(p): (g, i) for g in self.groups for i, p in reversed(list(enumerate(groups[g]["params"])))}
            own = [places[id(p)] for p in self.params]
            starts = [i for i, (g, _) in enumerate(own) if i == 0 or g != own[i - 1][0]]
            self._parts = [
                Part(*own[start], start, stop) for start, stop in zip(starts, [*starts[1:], len(own)], strict=True)
            ]
        return self._parts

    def elements(self) -> int:
        return sum(map(Tensor.numel, self.local()))

    def key(self, seed: int, draw: int, streams: tuple[int, ...]) -> Tensor:
        """Key of a draw for ``scaled_noise_``; with several parts one for each parameter, which is counted from the
        first of its part. It is advanced on the device, so that a captured CUDA graph draws anew."""
        if self._key is None or self._key[:3] != (seed, draw - 1, streams):
            keys = [ops.random_key(seed, draw, stream).view(torch.int64) for stream in streams]
            rows = [
                torch.cat([key, key.new_tensor([i])])
                for key, part in zip(keys, self._parts, strict=True)
                for i in range(part.stop - part.start)
            ]
            key = on_device(torch.stack(rows) if len(keys) > 1 else keys[0], self.device).view(torch.uint64)
        else:
            key = self._key[3]
            key.view(torch.int32)[..., 2].add_(1)
        self._key = seed, draw, streams, key
        return key

    def forget_key(self) -> None:
        self._key = None

    def draws(self) -> int | None:
        """How many draws the device has made; None if it made none. The host waits for it."""
        return None if self._key is None else int(self._key[3].view(torch.int32).flatten()[2]) % 2**32 + 1

    def last_draw(self, position: int) -> tuple[int, int, int, int] | None:
        """Seed, draw and stream of the last draw, and the place in its list of the parameter at ``position``; None if
        there was no draw, or it was taken back. The host waits for it."""
        drawn = self.draws()
        if self._key is None or drawn is None:
            return None
        seed, _, streams, _ = self._key
        part, stream = next((p, s) for p, s in zip(self._parts, streams, strict=True) if p.start <= position < p.stop)
        return seed, drawn - 1, stream, position - part.start

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

    def restore_and_step(
        self, operator: RestoreAndStep, *lists: list[Tensor], lr: float | Tensor, **options: Any
    ) -> None:
        """Whatever the base is: where the steps feed the curvature, it is averaged in the same pass."""
        if not self.settings.fed_by_steps:
            super().restore_and_step(operator, *lists, lr=lr, **options)
            return
        update = self.correction.next()
        self.largest = operator(
            self.params,
            *lists,
            self.backup_to_step_from(),
            lr,
            **options,
            curvatures=self.curvatures,
            lipschitz=self.lipschitz,
            corrections=update.corrections,
            **self.averaging(),
        )
        self.correction.advance(update)


class Subset:
    """Those parameters of a bucket for which there is something to average."""

    def __init__(self, bucket: NoiseBucket, present: Sequence[bool], per_element: bool) -> None:
        self.bucket = bucket
        self.present = present
        self.whole = all(present)
        self.params = bucket.params if self.whole else list(compress(bucket.params, present))
        self.known = bool(bucket.states)
        if not self.known:
            self.correction = bucket.correction if self.whole else bucket.correction.copy()
            self.states = [ParameterState(p, per_element, self.correction) for p in self.params]
        elif self.whole:
            self.correction, self.states = bucket.correction, bucket.states
        else:
            self.correction, self.states = bucket.correction.copy(), list(compress(bucket.states, present))

    def local(self) -> list[Tensor]:
        return self.bucket.local() if self.whole else [local(p) for p in self.params]

    def curvatures(self) -> list[Tensor]:
        return self.bucket.curvatures if self.whole and self.known else [local(t.curvature) for t in self.states]

    def lipschitz(self) -> list[Tensor]:
        if self.whole and self.known:
            return self.bucket.lipschitz
        return [local(t.lipschitz) for t in self.states if t.lipschitz is not None]

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
        if not self.known or any(state.anchor is None for state in self.states):
            return None
        params = self.local()
        backup = ops.backup_like(params)
        for view, p, state in zip(reference.backup_views(params, backup), params, self.states, strict=True):
            view.copy_(local(state.anchor).permute(sorted(range(p.dim()), key=p.stride, reverse=True)))
        return backup

    @torch.no_grad()
    def keep_weights(self) -> None:
        for p, state in zip(self.params, self.states, strict=True):
            if state.anchor is None:
                state.anchor = p.detach().clone()
            else:
                state.anchor.copy_(p)
