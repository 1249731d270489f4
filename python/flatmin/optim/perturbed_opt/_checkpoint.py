"""Checkpoints of an optimizer that has state of its own beside that of its base."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._distributed import is_dtensor
from ._bias_correction import BiasCorrection
from ._noise_bucket import ParameterState
from ._noise_set import NoiseSet

__all__ = ["Checkpoint", "check_noise", "pack_noise", "split", "unpack_noise"]

#: Counters of the set that a checkpoint holds under their own names.
_COUNTERS = ("seed", "draws", "estimates", "estimated", "steps", "epoch")

_PREFIX, _SHARED = "popt_", "popt_noise"


class Checkpoint(dict[str, Any]):
    """``{"base": ..., "noise": ...}``, plain when saved, copied or compared.

    Where it is asked for "state" or "param_groups", as torch.distributed.checkpoint asks every optimizer, it answers
    with those of the base, to which the noise's have been added under names that begin with "popt_":
    ``get_optimizer_state_dict(model, opt)`` then knows whose state is whose, and can shard it anew.
    """

    #: The set and the parameters that it was made from; none in a copy, which trainers make as ``type(d)({...})``.
    _origin: tuple[NoiseSet, Sequence[Tensor]] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._flat: dict[str, Any] = {}

    @classmethod
    def of(cls, base: dict[str, Any], noise: NoiseSet, params: Sequence[Tensor]) -> Checkpoint:
        checkpoint = cls(base=base, noise=pack_noise(noise, params))
        checkpoint._origin = noise, params
        return checkpoint

    def __missing__(self, key: str) -> Any:
        if key not in ("state", "param_groups") or self._origin is None:
            raise KeyError(key)
        if not self._flat:  # the same objects at every call: they are rewritten in place
            self._flat = _flat(self["base"], *self._origin)
        return self._flat[key]

    def __reduce__(self) -> tuple[Any, ...]:
        """A type that ``torch.load(weights_only=True)`` knows."""
        return OrderedDict, (), None, None, iter(self.items())


def _flat(base: dict[str, Any], noise: NoiseSet, params: Sequence[Tensor]) -> dict[str, Any]:
    """Every trained parameter has an entry, if need be of no updates: torch.distributed.checkpoint loads a whole state
    into what the optimizer has already."""
    packed = pack_noise(noise, params)
    state = {index: dict(entry) for index, entry in base["state"].items()}
    for p, index in _positions(params).items() if noise.settings.curved else ():
        entry = packed["state"].get(index)
        if entry is None:
            if not p.requires_grad:
                continue
            entry = _entry(noise.new_state(p), 0)
        state.setdefault(index, {}).update({_PREFIX + name: value for name, value in entry.items()})
    shared = {name: value for name, value in packed.items() if name != "state"}
    shared["rho"] = torch.zeros(()) if noise.rho is None else noise.rho
    return {"state": state, "param_groups": [group | {_SHARED: shared} for group in base["param_groups"]]}


def split(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The base's and the noise's part of a checkpoint in either form; no noise in one of a bare optimizer."""
    if "base" in state_dict and "noise" in state_dict:
        return state_dict["base"], state_dict["noise"]
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(
            f"state_dict: it has {sorted(map(str, state_dict))}; neither a checkpoint of PerturbedOPT ('base', "
            "'noise') nor one of an optimizer ('state', 'param_groups')"
        )
    groups = [dict(group) for group in state_dict["param_groups"]]
    shared = [group.pop(_SHARED) for group in groups if _SHARED in group]
    names = [name for group in groups for name in group["params"]]
    position = {name: i for i, name in reversed(list(enumerate(names)))}
    state, own = {}, {}
    for name, entry in state_dict["state"].items():
        kept = {key: value for key, value in entry.items() if not str(key).startswith(_PREFIX)}
        if len(kept) < len(entry):
            own[position[name]] = {key[len(_PREFIX) :]: v for key, v in entry.items() if str(key).startswith(_PREFIX)}
        if kept or not entry:
            state[name] = kept
    base = {**state_dict, "state": state, "param_groups": groups}
    return base, {**shared[0], "state": own} if shared else None


def _positions(params: Sequence[Tensor]) -> dict[Tensor, int]:
    """Where each is, a tied one where it is first."""
    positions: dict[Tensor, int] = {}
    for index, p in enumerate(params):
        positions.setdefault(p, index)
    return positions


def pack_noise(noise: NoiseSet, params: Sequence[Tensor]) -> dict[str, Any]:
    """Numbered as in the base's packed state. Counts are read from the device: of a captured graph, it alone knows."""
    updates: dict[int, int] = {}
    state: dict[int, dict[str, Any]] = {}
    for p, index in _positions(params).items():
        own = noise.states.get(p)
        if own is None:
            continue
        correction = own.correction
        if id(correction) not in updates:
            updates[id(correction)] = int(correction.count)
        state[index] = _entry(own, updates[id(correction)])
    drawn = [draws for bucket in noise.known_buckets() if (draws := bucket.draws()) is not None]
    counters = {name: getattr(noise, name) for name in _COUNTERS} | {"draws": max([noise.draws, *drawn])}
    return {"state": state, "rho": noise.rho, **counters}


def _entry(own: ParameterState, updates: int) -> dict[str, Any]:
    tensors = {name: getattr(own, name) for name in ("curvature", "lipschitz", "anchor")}
    return {"updates": updates} | {name: t for name, t in tensors.items() if t is not None}


def check_noise(saved: dict[str, Any], params: Sequence[Tensor]) -> None:
    """``ValueError`` unless the noise belongs to such parameters."""
    for index, entry in saved["state"].items():
        if not 0 <= index < len(params) or entry["curvature"].shape != params[index].shape:
            shape = tuple(params[index].shape) if 0 <= index < len(params) else "there is none"
            raise ValueError(
                f"state_dict: the curvature of parameter {index} has shape {tuple(entry['curvature'].shape)}, the "
                f"parameter {shape}; it is the checkpoint of another model"
            )


@torch.no_grad()
def unpack_noise(noise: NoiseSet, params: Sequence[Tensor], saved: dict[str, Any] | None) -> None:
    """Replace the state of ``noise``; without ``saved`` by that of a run that begins, but for seed and epoch."""
    noise.forget()
    noise.buckets = []
    noise.states.clear()
    if saved is None:
        noise.draws = noise.estimates = noise.steps = 0
        noise.estimated, noise.rho = -1, None
        return
    for name in _COUNTERS:
        setattr(noise, name, saved[name])
    rho = saved.get("rho")
    noise.rho = None if rho is None else rho.clone()
    corrections: dict[Any, BiasCorrection] = {}
    for index, entry in saved["state"].items():
        p, updates = params[index], int(entry["updates"])
        if updates == 0:
            continue
        correction = corrections.get((p.device, updates)) or BiasCorrection(p.device, noise.settings.beta1, updates)
        corrections[p.device, updates] = correction
        own = noise.new_state(p, correction)
        _copy(own.curvature, entry["curvature"])
        if own.lipschitz is not None and "lipschitz" in entry:
            _copy(own.lipschitz, entry["lipschitz"])
        if "anchor" in entry:
            own.anchor = p.detach().clone()
            _copy(own.anchor, entry["anchor"])
        noise.states[p] = own


def _copy(target: Tensor, saved: Tensor) -> None:
    """Also from a whole tensor into the shards of a DTensor."""
    if is_dtensor(target) and not is_dtensor(saved):
        like: Any = target
        saved = torch.distributed.tensor.distribute_tensor(
            saved.to(target.device, target.dtype), like.device_mesh, like.placements
        )
    target.copy_(saved)
