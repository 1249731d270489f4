"""Checks of what a wrapper is constructed from: every message names the argument and says what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._wrapper import Wrapper

__all__ = [
    "build_base",
    "check_keys",
    "check_model",
    "check_patterns",
    "share_arguments",
]


def check_model(model: Any, same_rng: bool) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} given; give the torch.nn.Module that is trained")
    if same_rng and model is None:
        raise ValueError("same_rng: True needs model=, the module whose forward draws the random numbers")


def build_base(
    wrapper: str, source: Any, base: Callable[..., torch.optim.Optimizer] | None, kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer to wrap, from the arguments of the constructor of ``wrapper``."""
    if isinstance(source, torch.optim.Optimizer):
        if base is not None or kwargs:
            extra = ["base"] * (base is not None) + list(kwargs)
            raise TypeError(
                f"{', '.join(extra)}: given with an optimizer instance; they belong to {wrapper}(params, base)"
            )
        optimizer = source
    elif base is None:
        raise TypeError(
            f"base: missing, and {type(source).__name__} is no optimizer; write {wrapper}(torch.optim.SGD(params, "
            f"lr=0.1)) or {wrapper}(params, torch.optim.SGD, lr=0.1)"
        )
    elif not callable(base) or isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base: {base!r} given; give an optimizer class, or {wrapper}(optimizer) alone")
    else:
        optimizer = base(source, **kwargs)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"base: made {type(optimizer).__name__}, which is no torch.optim.Optimizer")
    if isinstance(optimizer, Wrapper):
        raise TypeError(f"base: {type(optimizer).__name__} is a wrapper itself; wrap the optimizer within it, .base")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base: {type(optimizer).__name__} evaluates its closure as often as it likes, so there is no pair of "
            "passes to perturb; use an optimizer whose step() needs no closure"
        )
    return optimizer


def share_arguments(
    init: Callable[..., None],
    prefix: str,
    own: dict[str, Any],
    base: Callable[..., torch.optim.Optimizer] | None,
    base_kwargs: dict[str, Any],
) -> None:
    """Settle who gets an argument whose name both a wrapper and ``base`` have, by changing both dicts.

    It is the base's, as the class that the caller named last; the wrapper's has a spelling of its own, ``prefix`` and
    the name. The radius is the exception: it is what a wrapper is called with first, so it has to be spelled out.

    Args:
        init: of the wrapper.
        prefix: of the wrapper's own spelling, as "sam_".
        own: the wrapper's arguments by name.
        base: what builds the base, None if there is an instance.
        base_kwargs: other arguments.
    """
    defaults = init.__kwdefaults__ or {}
    # An argument that was given is another object than the default, be it equal; but for None, bools and small
    # integers, which say nothing that the default does not.
    given = {name for name, value in own.items() if value is not defaults[name]}
    spelled_out = {name for name in own if prefix + name in base_kwargs}
    for name in spelled_out:
        value = base_kwargs.pop(prefix + name)
        if name in given and (base is None or name not in _names_of(base)):
            raise TypeError(f"{name}: given twice, as {name} and as {prefix}{name}")
        if name in given:
            base_kwargs[name] = own[name]
        own[name] = value
    for name in sorted(given - spelled_out):
        if base is None or name not in _names_of(base):
            continue
        if name == "rho":
            kind = getattr(base, "__name__", repr(base))
            raise TypeError(
                f"rho: both the wrapper and {kind} have one; give {prefix}rho= for the radius, and with it rho= for "
                f"that of {kind}"
            )
        base_kwargs[name], own[name] = own[name], defaults[name]


def _names_of(base: Callable[..., torch.optim.Optimizer]) -> set[str]:
    try:
        return set(inspect.signature(base).parameters)
    except (TypeError, ValueError):  # a callable without a signature
        return set()


def check_patterns(name: str, patterns: Any) -> None:
    """``TypeError`` unless ``patterns`` is a sequence of strings."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name}: {patterns!r} given; give a list of names or patterns, as ['encoder.*.counter']")


def check_keys(optimizer: torch.optim.Optimizer, keys: dict[str, Any]) -> None:
    """Our keys must be ours. Groups may have them: given by the user, or loaded from a checkpoint of such a run."""
    for key in keys:
        if key in optimizer.defaults:
            raise ValueError(
                f"{key}: already a default of {type(optimizer).__name__}. Was it wrapped before? Wrap an optimizer "
                f"once, and change the value through group['{key}']"
            )
