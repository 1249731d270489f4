"""Noise with a size for each weight, and the running averages of the curvature that sizes it.

POPT-1, the project's own definition after arXiv 1809.07402: sizes, averages and quotients are
:func:`flatmin.ops.scaled_noise_` and :func:`flatmin.ops.curvature_`; here is what they are called with.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import repeat
from operator import attrgetter, is_not
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ..._devices import on_device
from ..._distributed import combine, local_gradient, rank
from .._buckets import Mark, PerturbedSet, alike, name_of, params_of, trained, with_gradient
from ._bias_correction import BiasCorrection
from ._noise_bucket import NoiseBucket, ParameterState, Subset, local
from ._nonfinite import NonFiniteFlag
from ._settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["STREAMS", "NoiseSet", "NoiseStats", "can_move"]

_dtype, _grad, _layout = attrgetter("dtype"), attrgetter("grad"), attrgetter("layout")

#: Streams of a key (16 bits) are halved between the noise and the probes of the estimators.
STREAMS = 2**15

#: Gradients of these types feed a curvature as they are.
_WIDE = {torch.float32, torch.float64}

#: (gamma, eps) of the noise whose size is scale * (gamma |w| + eps).
_NEIGHBOURHOODS = {"isotropic": (0.0, 1.0), "magnitude": (1.0, 0.0)}


class NoiseStats(NamedTuple):
    """What the last perturbation was like: float64 0-dim tensors on the device of the first parameters, read without
    synchronisation. Of this rank's shards, where parameters are sharded.

    Attributes:
        mean_sigma: mean size of the noise.
        capped_fraction: share of the weights whose noise has the size of its neighbourhood, ``N_i``.
        invalid: number of weights that have no finite size of noise, and that were therefore not perturbed.
    """

    mean_sigma: Tensor
    capped_fraction: Tensor
    invalid: Tensor


def can_move(group: dict[str, Any]) -> bool:
    """Whether the noise of a group has a size."""
    neighbourhood = [group[key] for key in ("popt_gamma", "popt_eps") if key in group]
    return bool(group["popt_scale"] != 0.0 and (not neighbourhood or any(neighbourhood)))


class NoiseSet(PerturbedSet[NoiseBucket]):
    """The parameters that noise moves, the averages that size it, and the counters that it is drawn with.

    Attributes:
        keys: of a group's options: groups that differ in none of them share buckets.
        states: of every parameter that was updated.
        rho: global Hessian-Lipschitz constant, 0-dim in the wide type; None before the first quotient.
        seed, draws: of the noise.
        estimates: how many estimates were averaged, which number their probes.
        estimated: step at which the last one was, -1 before.
        steps: steps that changed weights.
        epoch: counted from 1.
        nonfinite: raised where a curvature, a quotient or a size is not finite.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.keys: tuple[str, ...] = ()
        self.states: dict[Tensor, ParameterState] = {}
        self.rho: Tensor | None = None
        self.seed = seed
        self.draws = self.estimates = self.steps = 0
        self.estimated = -1
        self.epoch = 1
        self.nonfinite = NonFiniteFlag()
        self._tallies: list[tuple[Tensor, int]] = []

    def forget(self) -> None:
        """Buckets are made anew: the states were replaced or split_up."""
        self._known.clear()

    def new_bucket(
        self, groups: tuple[int, ...], params: list[Tensor], shards: tuple[ProcessGroup, ...] | None
    ) -> NoiseBucket:
        for p in params:
            if p.is_complex():
                raise TypeError(f"a parameter of shape {tuple(p.shape)} is complex; PerturbedOPT needs real ones")
        if shards is not None and self.settings.sizing in ("filter", "tensor"):
            raise RuntimeError(
                f"sizing: {self.settings.sizing!r} needs norms of whole tensors, but there are sharded ones; use "
                "'curvature', 'isotropic' or 'magnitude'"
            )
        known = params[0] in self.states
        states = [self.states[p].fit(p, self.settings.beta1) for p in params] if known else []
        return NoiseBucket(groups, params, shards, states, self.settings)

    def new_state(self, p: Tensor, correction: BiasCorrection | None = None) -> ParameterState:
        return ParameterState(
            p, self.settings.lipschitz == "element", correction or BiasCorrection(p.device, self.settings.beta1)
        )

    def kind(self, p: Tensor) -> Hashable:
        """One bias correction for each bucket: as Adam does, each parameter counts its own updates."""
        state = self.states.get(p)
        return 0 if state is None else state.correction.updates

    def partition(
        self, groups: Sequence[dict[str, Any]], keys: Sequence[str], *values: Sequence[Any]
    ) -> list[tuple[int, ...]]:
        """Groups with equal options share buckets, but for estimators: their probes are numbered by the bucket, and
        a function of the user's gets the parameters in order."""
        merges = self.settings.fed_by_steps or not self.settings.curved
        return alike(groups, keys, list(map(can_move, groups)), *values) if merges else super().partition(groups, keys)

    def gather(self, groups: Sequence[dict[str, Any]]) -> list[NoiseBucket]:
        """The buckets of every parameter that is trained under noise, with or without a gradient."""
        found: list[NoiseBucket] = []
        for indices in self.partition(groups, self.keys):
            if can_move(groups[indices[0]]):
                found += self.buckets_of(indices, trained(params_of(groups, indices))[0])
        return found

    # -- noise ---------------------------------------------------------------------------------------------------------

    def ascend(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Move every parameter whose noise has a size. False if there is none."""
        buckets = self.gather(groups)
        factor, draw = self.settings.decay(self.epoch), self.draws
        self.draws += 1
        self.buckets = [bucket for bucket in buckets if bucket.ready]
        self.perturbed = True
        self._tallies = []
        # Each group draws by itself, numbered as if it had buckets of its own.
        order = sorted(part for bucket in buckets for part in bucket.parts(groups))
        numbers = {part: number for number, part in enumerate(order)}
        try:
            for bucket in self.buckets:
                streams = tuple(self._stream(bucket, numbers[part], len(order)) for part in bucket.parts(groups))
                self._move(bucket, bucket.key(self.seed, draw, streams), self._options_of(bucket, groups, factor))
        except BaseException:
            self.restore()
            self._tallies = []
            for bucket in self.buckets:
                bucket.saved = False
            raise
        return bool(self.buckets)

    def take_back_draw(self) -> None:
        """As if the last draw had not been: the next one gives its noise."""
        if self.buckets:
            self.draws -= 1
            for bucket in self.buckets:
                bucket.forget_key()

    def _move(self, bucket: NoiseBucket, key: Tensor, options: dict[str, Any]) -> None:
        params = bucket.local()
        mark = Mark(bucket.backup, params)
        try:
            tally = ops.scaled_noise_(params, bucket.backup, key, **options)
            bucket.moved = bucket.saved = True
        except BaseException:
            bucket.moved = mark.overwritten()
            raise
        bucket.bump_versions()
        self.nonfinite.record(tally[2])
        self._tallies.append((tally, bucket.elements()))

    def _options_of(self, bucket: NoiseBucket, groups: Sequence[dict[str, Any]], factor: float) -> dict[str, Any]:
        options: dict[str, Any] = {"distribution": self.settings.distribution}
        if self.settings.curved:
            options |= {"curvatures": bucket.curvatures, "curvature_scale": bucket.correction.scale}
            options["lipschitz"] = self._lipschitz_of(bucket)
        elif self.settings.sizing not in _NEIGHBOURHOODS:
            options["sizes"] = bucket.sizes()
        own = bucket.numbers(groups, [self._size_of(groups[index], factor) for index in bucket.groups])
        if isinstance(own, Tensor):
            return options | {"scale": own}
        return options | dict(zip(("scale", "gamma", "eps"), own, strict=True))

    def _size_of(self, group: dict[str, Any], factor: float) -> tuple[float, float, float]:
        """Scale, gamma and eps of a group."""
        if self.settings.curved:
            return group["popt_scale"], group["popt_gamma"] * factor, group["popt_eps"] * factor
        return group["popt_scale"] * factor, *_NEIGHBOURHOODS.get(self.settings.sizing, (0.0, 0.0))

    def _lipschitz_of(self, bucket: NoiseBucket) -> float | Tensor | list[Tensor]:
        if not isinstance(self.settings.lipschitz, str):
            return self.settings.lipschitz
        if self.settings.lipschitz == "element":
            return bucket.lipschitz
        return 0.0 if self.rho is None else on_device(self.rho, bucket.device)

    def _stream(self, bucket: NoiseBucket, position: int, count: int) -> int:
        """Each bucket counts its elements from 0, and so does each shard and, if asked for, each rank."""
        place = 0
        if self.settings.sync == "per_rank":
            place = rank()
        elif bucket.shards is not None:
            p: Any = bucket.params[0]
            for dim, placement in enumerate(p.placements):
                if placement.is_shard():
                    place = place * p.device_mesh.size(dim) + p.device_mesh.get_local_rank(dim)
        stream = place * count + position
        if stream >= STREAMS:
            raise RuntimeError(f"{count} buckets on {place} ranks and more: there are {STREAMS} streams of noise")
        return stream

    def stats(self) -> NoiseStats | None:
        if not self._tallies:
            return None
        device = self._tallies[0][0].device
        sigma, capped, invalid = sum(on_device(tally, device) for tally, _ in self._tallies)  # type: ignore[misc]
        elements = max(sum(count for _, count in self._tallies), 1)
        return NoiseStats(sigma / elements, capped / elements, invalid)

    # -- curvature -----------------------------------------------------------------------------------------------------

    def stepping(self) -> list[NoiseBucket]:
        """Those perturbed buckets that the base will step; the others are only restored."""
        return [b for b in self.buckets if any(map(is_not, map(_grad, b.params), repeat(None)))]

    def refuse_sparse(self, groups: Sequence[dict[str, Any]]) -> None:
        """Before the base steps: a curvature needs dense gradients."""
        for bucket in self.gather(groups) if self.settings.fed_by_steps else ():
            params, grads = with_gradient(bucket.params)
            if set(map(_layout, grads)) <= {torch.strided}:
                continue
            p, layout = next((p, g.layout) for p, g in zip(params, grads, strict=True) if g.layout != torch.strided)
            raise RuntimeError(
                f"{name_of(p, groups)} has a gradient of layout {layout}; PerturbedOPT needs dense ones: use "
                "nn.Embedding(sparse=False), or give the group popt_scale=0"
            )

    def learn_from_fused(self, buckets: Sequence[NoiseBucket]) -> None:
        if self.settings.fed_by_steps:
            self._learn_rho([(b.largest, b.shards or ()) for b in buckets if b.largest is not None])
            self._regroup(split_up=False)
        self._end_step()

    def learn_from_gradients(self, groups: Sequence[dict[str, Any]]) -> None:
        """After the base's step: average the squared gradients, and what they changed over the step."""
        largest: list[tuple[Tensor, Sequence[ProcessGroup]]] = []
        split_up = False
        for bucket in self.gather(groups) if self.settings.fed_by_steps else ():
            grads = list(map(_grad, bucket.params))
            present = list(map(is_not, grads, repeat(None)))
            if not any(present):
                continue
            subset = Subset(bucket, present, self.settings.lipschitz == "element")
            sources = [g for g in grads if g is not None]
            if bucket.shards is not None:
                sources = [local_gradient(p) for p in subset.params]
            quotient = self._update(subset, sources, subset.weights_before())
            largest.append((quotient, bucket.shards or ()))
            split_up |= not subset.whole
        self._learn_rho(largest)
        self._regroup(split_up)
        self._end_step()

    def learn_from_estimates(
        self, subsets: Sequence[Subset], sources: Sequence[list[Tensor]], keys: Sequence[Tensor | None], **how: Any
    ) -> None:
        """Average estimates of the curvature at the present weights: ``how`` is that of ``curvature_``."""
        largest: list[tuple[Tensor, Sequence[ProcessGroup]]] = []
        for subset, source, key in zip(subsets, sources, keys, strict=True):
            backup = subset.weights_at_estimate() if self.settings.learns_rho else None
            largest.append((self._update(subset, source, backup, key=key, **how), subset.bucket.shards or ()))
            if self.settings.learns_rho:
                subset.keep_weights()
        self._learn_rho(largest)
        self._regroup(split_up=not all(subset.whole for subset in subsets))
        self.estimates += 1
        self.estimated = self.steps

    def _update(self, subset: Subset, sources: list[Tensor], backup: Tensor | None, **how: Any) -> Tensor:
        if not set(map(_dtype, sources)) <= _WIDE:
            sources = [s if s.dtype in _WIDE else s.float() for s in sources]
        update = subset.correction.next()
        largest = ops.curvature_(
            subset.curvatures(),
            sources,
            params=subset.local() if backup is not None else (),
            backup=backup,
            corrections=update.corrections,
            lipschitz=subset.lipschitz(),
            **subset.bucket.averaging(),
            **how,
        )
        subset.correction.advance(update)
        for p, state in zip(subset.params, subset.states, strict=True):
            state.correction = subset.correction
            self.states[p] = state
        if subset.whole and not subset.known:
            subset.bucket.follow(subset.states)
        return largest

    def _learn_rho(self, largest: Sequence[tuple[Tensor, Sequence[ProcessGroup]]]) -> None:
        """Take the largest quotient into the global constant. 0 says that there was none; one that is not finite
        is recorded, and changes nothing."""
        if not largest:
            return
        q = combine([combine([each], math.inf, shards) for each, shards in largest], math.inf)
        self.nonfinite.record(~q.isfinite())
        if self.settings.lipschitz != "max":
            return
        old = torch.zeros_like(q) if self.rho is None else on_device(self.rho, q.device)
        beta = self.settings.beta2
        new = torch.where((q > 0.0) & (q < math.inf), beta * old + (1.0 - beta) * q, old)
        if self.rho is None or self.rho.device != q.device:
            self.rho = new
        else:
            self.rho.copy_(new)  # a CUDA graph needs one address

    def _regroup(self, split_up: bool) -> None:
        """Parameters that were not updated with the others of their bucket leave it, and join those that are now
        as old: the buckets are a function of what a checkpoint holds."""
        if not split_up:
            seen: set[Any] = set()
            for bucket in self.known_buckets():
                kind = (bucket.groups, bucket.device, bucket.shards, bucket.correction.updates)
                split_up |= kind in seen
                seen.add(kind)
        if split_up:
            self.forget()

    def _end_step(self) -> None:
        for bucket in self.known_buckets():
            bucket.saved = False

    # -- what went wrong -----------------------------------------------------------------------------------------------

    def diagnosis(self, groups: Sequence[dict[str, Any]]) -> str:
        """What is not finite, as a message. The host waits for the answer."""
        what = "a difference quotient of the curvature"
        for p, state in self.states.items():
            if not bool(local(state.curvature).isfinite().all()):
                what = f"the curvature of {name_of(p, groups)}"
                break
            if state.lipschitz is not None and not bool(local(state.lipschitz).isfinite().all()):
                what = f"the Hessian-Lipschitz constant of {name_of(p, groups)}"
                break
            if not bool(local(p).isfinite().all()):
                what = name_of(p, groups)
                break
        return (
            f"PerturbedOPT: {what} is not finite: NaN or infinity came with a gradient, an estimate or a checkpoint, "
            "or a square overflowed. Noise has moved no weight by it, and the weights are not perturbed now. Load the "
            "last checkpoint; then clip the gradients, lower the learning rate, or let torch.amp.GradScaler skip such "
            "steps"
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tallies": []}
