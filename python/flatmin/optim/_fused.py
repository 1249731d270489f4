"""Restore and base step, or that step alone, in one pass over memory, where the base is exactly torch's SGD, Adam or
AdamW, or Lion.

Anything that this would not reproduce to the letter, such as a hook on the base, a tensor learning rate or a
parameter that lost its gradient in the second pass, is left to ``restore_`` followed by ``base.step()``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import ops
from ..ops import _library
from ._buckets import Bucket, alike, params_of, with_gradient
from ._wrapper import has_step_hooks
from .lion import Lion

__all__ = ["has_bits_of_base", "keys_of", "might_fit", "restore_and_step"]

_Plan = Callable[[], None]
_dtype, _grad, _is_cpu, _layout = map(attrgetter, ("dtype", "grad", "is_cpu", "layout"))

#: Group flags that ask torch for one particular implementation.
_IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")


def restore_and_step(base: Optimizer, buckets: Sequence[Bucket], ours: Container[str]) -> bool:
    """Restore ``buckets`` and take one step of ``base`` from there. False, with nothing done, if it does not fit.
    ``ours``: keys of the groups that are not the base's."""
    if not might_fit(base):
        return False
    plan_of, groups = _PLANS[type(base)], base.param_groups
    keys = [key for key in base.defaults if key not in ours]
    of_groups: dict[tuple[int, ...], list[Bucket]] = {}
    for bucket in buckets:
        of_groups.setdefault(bucket.groups, []).append(bucket)
    stepped = set().union(*of_groups)
    if any(index >= len(groups) for index in stepped):
        return False  # a group went since the ascent
    left_out = set(range(len(groups))) - stepped
    if any(with_gradient(groups[index]["params"])[0] for index in left_out):
        return False
    plans: list[tuple[Bucket, _Plan]] = []
    for indices, own in of_groups.items():
        if len(indices) > 1 and len(alike([groups[index] for index in indices], keys)) > 1:
            return False  # an option changed since the ascent
        pairs = _gradients(groups, indices, own)
        if pairs is None:
            return False
        for bucket, grads in pairs:
            rates = _rates(groups, bucket)
            plan = None if rates is None else plan_of(base, groups[indices[0]], rates, bucket, grads)
            if plan is None:
                return False
            plans.append((bucket, plan))
    for bucket, plan in plans:
        plan()
        bucket.moved = False
    if "step" in base.__dict__:
        base._opt_called = True  # type: ignore[attr-defined]  # what the scheduler's wrapper of step does
    return True


def keys_of(base: Optimizer, own: Sequence[str]) -> tuple[str, ...]:
    """Options in which groups must agree to share buckets: ours, and those of the base if it has a pass."""
    return tuple(base.defaults) if type(base) in _PLANS else tuple(own)


def might_fit(base: Optimizer) -> bool:
    """Whether there is a pass for the base, whatever its groups say."""
    return type(base) in _PLANS and _step_is_plain(base)


def has_bits_of_base(base: Optimizer) -> bool:
    """Whether the pass gives torch's own bits. Adam's differ in torch from one of its implementations to the next."""
    return type(base) in (SGD, Lion)


def _step_is_plain(base: Optimizer) -> bool:
    """Whether ``base.step()`` would run torch's own code alone. A scheduler's wrapper only sets ``_opt_called``."""
    patched = base.__dict__.get("step")
    return (patched is None or hasattr(patched, "_wrapped_by_lr_sched")) and not has_step_hooks(base)


def _gradients(
    groups: Sequence[dict[str, Any]], indices: Sequence[int], buckets: list[Bucket]
) -> list[tuple[Bucket, list[Tensor]]] | None:
    """The gradients of each of the ``buckets``; None unless their groups, which have equal options, have no others, and
    nothing asks for torch's own step."""
    params, grads = with_gradient(params_of(groups, indices))
    group = groups[indices[0]]
    if any(group.get(flag) for flag in _IMPLEMENTATIONS) or not all(map(_fits, buckets)):
        return None
    if not set(map(_layout, grads)) <= {torch.strided}:
        return None
    if len(buckets) == 1:
        known = buckets[0].params
        same = len(params) == len(known) and all(map(is_, params, known))
        return [(buckets[0], grads)] if same else None
    if len({bucket.device for bucket in buckets}) > 1:
        return None
    parts = [list(map(_grad, bucket.params)) for bucket in buckets]
    complete = sum(map(len, parts)) == len(params) and all(all(map(is_not, part, repeat(None))) for part in parts)
    return list(zip(buckets, parts, strict=True)) if complete else None


def _rates(groups: Sequence[dict[str, Any]], bucket: Bucket) -> dict[str, Any] | None:
    """``lr`` and ``weight_decay`` of a bucket as the operators take them; None if one is no number."""
    pairs = [(groups[index]["lr"], groups[index]["weight_decay"]) for index in bucket.groups]
    if not all(_are_numbers(*pair) for pair in pairs):
        return None
    own = bucket.numbers(groups, pairs)
    return {"lr": own} if isinstance(own, Tensor) else {"lr": own[0], "weight_decay": own[1]}


def _fits(bucket: Bucket) -> bool:
    return bucket.device.type in _library.DEVICES and bucket.dtype in (torch.float32, torch.float64)


def _are_of_types(bucket: Bucket, states: list[Tensor]) -> bool:
    """Whether the operators take a list of the base's state: it has another type once the model was converted."""
    return set(map(_dtype, states)) <= {bucket.dtype, torch.float32}


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _states(base: Optimizer, params: list[Tensor]) -> list[dict[str, Any] | None]:
    """The state of each parameter, if it has one. A dict walks its values faster than it finds them, since a tensor's
    hash is a call of Python."""
    if len(base.state) == len(params) and all(map(is_, base.state, params)):
        return list(base.state.values())
    return list(map(base.state.get, params))


def _plan_sgd(
    base: Optimizer, group: dict[str, Any], rates: dict[str, Any], bucket: Bucket, grads: list[Tensor]
) -> _Plan | None:
    momentum, dampening = group["momentum"], group["dampening"]
    if not _are_numbers(momentum, dampening):
        return None
    options = rates | {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": bool(group["nesterov"]),
        "maximize": bool(group["maximize"]),
    }
    if momentum == 0:
        return partial(bucket.restore_and_step, ops.restore_sgd_, grads, [], **options)
    old: list[Any] = [state.get("momentum_buffer") if state else None for state in _states(base, bucket.params)]
    if all(map(is_not, old, repeat(None))):
        if not _are_of_types(bucket, old):
            return None
        return partial(bucket.restore_and_step, ops.restore_sgd_, grads, old, **options)
    if all(map(is_, old, repeat(None))):
        return partial(_first_sgd_step, base, bucket, grads, options)
    return None


def _first_sgd_step(base: Optimizer, bucket: Bucket, grads: list[Tensor], options: dict[str, Any]) -> None:
    buffers = [torch.empty_like(g, memory_format=torch.preserve_format) for g in grads]
    bucket.restore_and_step(ops.restore_sgd_, grads, buffers, first_step=True, **options)
    for p, buffer in zip(bucket.params, buffers, strict=True):
        base.state[p]["momentum_buffer"] = buffer


def _plan_adam(
    base: Optimizer, group: dict[str, Any], rates: dict[str, Any], bucket: Bucket, grads: list[Tensor]
) -> _Plan | None:
    eps, betas = group["eps"], group["betas"]
    if not _are_numbers(eps, *betas):
        return None
    amsgrad = bool(group["amsgrad"])
    known = _states(base, bucket.params)
    states = [state or _new_adam_state(p, amsgrad) for p, state in zip(bucket.params, known, strict=True)]
    if amsgrad and not all("max_exp_avg_sq" in state for state in states):
        return None
    if not _are_of_types(bucket, [state["exp_avg"] for state in states]):
        return None
    steps = [state["step"] for state in states]
    if set(map(_dtype, steps)) != {torch.float32} or not all(map(_is_cpu, steps)):
        return None  # float64 under set_default_dtype(float64)
    options = rates | {
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "decoupled": bool(group["decoupled_weight_decay"]),
        "amsgrad": amsgrad,
        "maximize": bool(group["maximize"]),
    }
    return partial(_adam_step, base, bucket, grads, states, steps, options)


def _new_adam_state(p: Tensor, amsgrad: bool) -> dict[str, Tensor]:
    """The state that torch gives a parameter at its first step, in torch's order."""
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}
    counter = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return {"step": torch.tensor(0.0, dtype=counter)} | zeros


def _adam_step(
    base: Optimizer,
    bucket: Bucket,
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    steps: list[Tensor],
    options: dict[str, Any],
) -> None:
    bucket.restore_and_step(
        ops.restore_adam_,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states] if options["amsgrad"] else [],
        steps,
        **options,
    )
    for p, state in zip(bucket.params, states, strict=True):
        base.state[p] = state


def _plan_lion(
    base: Optimizer, group: dict[str, Any], rates: dict[str, Any], bucket: Bucket, grads: list[Tensor]
) -> _Plan | None:
    betas = group["betas"]
    if not _are_numbers(*betas):
        return None
    known = _states(base, bucket.params)
    states = [state or {"exp_avg": torch.zeros_like(p)} for p, state in zip(bucket.params, known, strict=True)]
    if not _are_of_types(bucket, [state["exp_avg"] for state in states]):
        return None
    options = rates | {
        "beta1": betas[0],
        "beta2": betas[1],
        "maximize": bool(group["maximize"]),
    }
    return partial(_lion_step, base, bucket, grads, states, options)


def _lion_step(
    base: Optimizer,
    bucket: Bucket,
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    options: dict[str, Any],
) -> None:
    bucket.restore_and_step(ops.restore_lion_, grads, [state["exp_avg"] for state in states], **options)
    for p, state in zip(bucket.params, states, strict=True):
        base.state[p] = state


_PLANS: dict[type, Callable[[Any, dict[str, Any], dict[str, Any], Bucket, list[Tensor]], _Plan | None]] = {
    SGD: _plan_sgd,
    Adam: _plan_adam,
    AdamW: _plan_adam,
    Lion: _plan_lion,
}
