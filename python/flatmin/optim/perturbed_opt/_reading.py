"""What PerturbedOPT knows and does, to be read: curvature and noise of each weight, and the key of the last draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ..._checks import check_int
from ..._devices import on_device
from .._buckets import name_of
from .._perturbing import Perturbing
from ._noise_bucket import local
from ._noise_set import NoiseSet, NoiseStats, can_move

__all__ = ["Draw", "LayerStats", "ReadableNoise", "WeightNoise"]


class WeightNoise(NamedTuple):
    """What sizes the noise of one parameter, at its present value. Tensors are new, like the parameter, of at least
    float32, and on its device.

    Attributes:
        curvature: the smoothed diagonal ``hhat = h / (1 - beta1^t)``, in units of loss / weight^2; None before its
            first update, and where the noise needs none.
        lipschitz: rho, 0-dim or one for each element, loss / weight^3; None where the noise needs none.
        neighbourhood: ``N``, the largest size of the noise, in units of the weight.
        sigma: size of the noise of the next ascent, in units of the weight: 0 before the first curvature, in a group
            without noise and where ``hhat`` is not finite.
        updates: how often the curvature was averaged.
    """

    curvature: Tensor | None
    lipschitz: Tensor | None
    neighbourhood: Tensor
    sigma: Tensor
    updates: int


class LayerStats(NamedTuple):
    """One parameter tensor in numbers, as of :class:`WeightNoise`.

    Attributes:
        name: of the parameter.
        elements: how many it has.
        updates: how often its curvature was averaged.
        mean_curvature, max_curvature: of ``hhat``; NaN where there is none.
        mean_sigma: mean size of the noise.
        capped_fraction: share of its weights whose noise has the size of the neighbourhood.
        relative_sigma: ``||sigma|| / ||w||``; NaN where all weights are 0.
    """

    name: str
    elements: int
    updates: int
    mean_curvature: float
    max_curvature: float
    mean_sigma: float
    capped_fraction: float
    relative_sigma: float


class Draw(NamedTuple):
    """Where the random numbers of a parameter come from (docs/random.md): ``ops.random_key(seed, draw, stream)`` is the
    key, and ``position`` the place of the tensor in its list. Of a DTensor they are those of this rank's shard."""

    seed: int
    draw: int
    stream: int
    position: int


class ReadableNoise(Perturbing):
    """The half of PerturbedOPT that is read: curvature, sizes and draws of its noise."""

    _set: NoiseSet

    def curvature_of(self, p: Tensor) -> WeightNoise:
        """Smoothed curvature, rho, neighbourhood and size of the noise of each element of a parameter, as they are now.

        Raises:
            RuntimeError: the weights are perturbed: a size is a function of the weight.
            ValueError: ``p`` is no parameter of the optimizer.
        """
        self._refuse_unless_at_rest("curvature_of()")
        return _weight_noise(self._set, _group_of(self._groups(), p), p)

    def layer_stats(self, model: nn.Module | None = None) -> list[LayerStats]:
        """The same in numbers, one row for each parameter tensor. The host waits for the device.

        Args:
            model: to name the parameters, where they were not given with their names.
        """
        self._refuse_unless_at_rest("layer_stats()")
        return _layer_stats(self._set, self._groups(), model)

    def draw_of(self, p: Tensor) -> Draw | None:
        """Seed, draw and stream of the last ascent, and the position of ``p`` in its list, with which its noise can be
        drawn again (docs/random.md); None if ``p`` has not moved. The host waits for the device."""
        _group_of(self._groups(), p)
        return _draw_of(self._set, p)

    @property
    def noise_stats(self) -> NoiseStats | None:
        """Mean size, share of capped weights and number of invalid sizes at the last ascent; None before.

        With "curvature", a capped share near 1 says that the curvature no longer sizes the noise: it is
        ``gamma |w| + eps`` almost everywhere."""
        return self._set.stats()

    @property
    def epoch(self) -> int:
        """Epoch ``T`` of the schedule, counted from 1: set it, or call :meth:`next_epoch` after each."""
        return self._set.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        check_int("epoch", value, 1)
        self._set.epoch = value

    def next_epoch(self) -> None:
        """Advance :attr:`epoch` by one."""
        self._set.epoch += 1


def _group_of(groups: Sequence[dict[str, Any]], p: Any) -> dict[str, Any]:
    """The group that has ``p``; ``ValueError`` if there is none."""
    for group in groups:
        if any(candidate is p for candidate in group["params"]):
            return group
    given = f"a tensor of shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
    raise ValueError(f"p: {given} given, which is no parameter of this optimizer; give the nn.Parameter itself")


@torch.no_grad()
def _weight_noise(noise: NoiseSet, group: Mapping[str, Any], p: Tensor) -> WeightNoise:
    """Of a parameter at rest. The formulas of :func:`flatmin.ops.scaled_noise_`, in plain torch."""
    settings, factor = noise.settings, noise.settings.decay(noise.epoch)
    w = p.detach().to(torch.promote_types(p.dtype, torch.float32))
    none, moves = torch.zeros_like(w), can_move(dict(group))
    if not settings.curved:
        sigma = group["popt_scale"] * factor * _size(settings.sizing, w, p)
        return WeightNoise(None, None, sigma, sigma if moves else none, 0)
    n = group["popt_gamma"] * factor * w.abs() + group["popt_eps"] * factor
    state = noise.states.get(p)
    rho = _lipschitz(noise, p, w)
    if state is None or not state.correction.updates:
        return WeightNoise(None, rho, n, none, 0)
    h = state.curvature * on_device(state.correction.scale, w.device).to(w.dtype)
    c = h + rho * n
    sigma = torch.minimum(group["popt_scale"] * c.clamp(min=0.0).rsqrt(), n).where(c.isfinite(), 0.0)
    return WeightNoise(h, rho, n, sigma if moves else none, int(state.correction.count))


def _lipschitz(noise: NoiseSet, p: Tensor, w: Tensor) -> Tensor:
    given = noise.settings.lipschitz
    if given == "element":
        own = noise.states[p].lipschitz if p in noise.states else None
        return torch.zeros_like(w) if own is None else own.clone()
    value = noise.rho if isinstance(given, str) else given
    if isinstance(value, Tensor):
        return on_device(value, w.device).to(w.dtype, copy=True)
    return torch.full((), value or 0.0, dtype=w.dtype, device=w.device)


def _size(sizing: str, w: Tensor, p: Tensor) -> Tensor:
    """Of the noise that needs no curvature, in units of its scale."""
    if sizing == "isotropic":
        return torch.ones_like(w)
    if sizing == "magnitude":
        return w.abs()
    whole = sizing == "tensor"
    (norm,) = ops.filter_norm([p.detach()], whole=whole)
    return (norm * max(p.numel(), 1) ** -0.5 if whole else norm).to(w.dtype).expand_as(w).clone()


def _layer_stats(noise: NoiseSet, groups: Sequence[dict[str, Any]], model: nn.Module | None) -> list[LayerStats]:
    """Each parameter once, in the order of the groups."""
    known: dict[Tensor, str] = {} if model is None else {p: name for name, p in model.named_parameters()}
    rows = []
    params: Iterable[Tensor] = dict.fromkeys(chain.from_iterable(group["params"] for group in groups))
    for p in params:
        group = _group_of(groups, p)
        found = _weight_noise(noise, group, p)
        sigma, n = local(found.sigma).double(), local(found.neighbourhood)
        h = None if found.curvature is None else local(found.curvature).double()
        size, empty = float(local(p).detach().double().norm()), sigma.numel() == 0
        rows.append(
            LayerStats(
                known.get(p) or _given_name(group, p) or name_of(p, groups),
                sigma.numel(),
                found.updates,
                float("nan") if h is None or empty else float(h.mean()),
                float("nan") if h is None or empty else float(h.max()),
                0.0 if empty else float(sigma.mean()),
                0.0 if empty else float(((local(found.sigma) == n) & (n > 0.0)).double().mean()),
                float(sigma.norm()) / size if size else float("nan"),
            )
        )
    return rows


def _given_name(group: Mapping[str, Any], p: Tensor) -> str | None:
    """As torch keeps it where parameters were given with their names."""
    names = group.get("param_names")
    return None if names is None else next(n for n, q in zip(names, group["params"], strict=True) if q is p)


def _draw_of(noise: NoiseSet, p: Tensor) -> Draw | None:
    """What the last ascent drew for ``p``. The device counts the draws, so the host waits for it."""
    for bucket in noise.buckets:
        position = next((i for i, candidate in enumerate(bucket.params) if candidate is p), None)
        drawn = None if position is None else bucket.last_draw(position)
        if drawn is not None:
            return Draw(*drawn)
    return None
