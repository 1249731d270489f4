"""What an optimizer that wraps another must do so that torch and its trainers take it for an ordinary one.

Schedulers, Accelerate, Lightning and torch.distributed.checkpoint test ``isinstance(opt, torch.optim.Optimizer)``,
read and replace ``param_groups`` and ``state``, patch ``step`` and pickle. The wrapper therefore holds no second copy
of anything: whatever the base optimizer owns is reached through it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import optimizer as _torch_optimizer

__all__ = ["Closure", "GradScaler", "Wrapper", "has_step_hooks"]

#: As :meth:`torch.optim.Optimizer.step` takes it.
Closure = Callable[[], Any]


class GradScaler(Protocol):
    """The one method that is needed of :class:`torch.amp.GradScaler`."""

    def scale(self, outputs: Tensor) -> Tensor: ...


def _from_base(name: str) -> property:
    def get(self: Wrapper) -> Any:
        return getattr(self.base, name)

    def set_(self: Wrapper, value: Any) -> None:
        setattr(self.base, name, value)

    return property(get, set_, doc=f"``{name}`` of the base optimizer: its own object.")


def _set_by_scaler(name: str) -> property:
    """``grad_scale`` or ``found_inf``: GradScaler sets and deletes them on the optimizer that it was given.

    They are kept where they are read: on a base that scales by itself (``fused=True``), else here, because a base
    that does not asserts their absence.
    """

    def get(self: Wrapper) -> Tensor:
        try:
            value: Tensor = self._scaler_values()[name]
        except KeyError:
            raise AttributeError(name) from None
        return value

    def set_(self: Wrapper, value: Tensor) -> None:
        self._scaler_values()[name] = value

    def delete(self: Wrapper) -> None:
        del self._scaler_values()[name]

    return property(get, set_, delete)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anything else runs with ``optimizer.step()``: hooks of its own, or of all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _torch_optimizer._global_optimizer_pre_hooks
        or _torch_optimizer._global_optimizer_post_hooks
    )


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    return has_step_hooks(optimizer) or bool(getattr(torch.autograd.profiler, "_is_profiler_enabled", True))


def _param_groups() -> property:
    """The base's own groups. Asking for them is all that GradScaler.unscale_ does to an optimizer, so it is noted here:
    nothing else tells in which order a loop unscales and perturbs."""

    def get(self: Wrapper) -> Any:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "_unscale_grads_" and caller.f_back and caller.f_back.f_code.co_name == "unscale_":
            self._unscaled = True
        return self.base.param_groups

    def set_(self: Wrapper, value: Any) -> None:
        self.base.param_groups = value

    return property(get, set_, doc="``param_groups`` of the base optimizer: its own object.")


class Wrapper(torch.optim.Optimizer):
    """An optimizer whose groups, state, defaults and checkpoints are those of ``base``.

    Methods and attributes that the base has beyond torch's, such as ``train()`` and ``eval()`` of schedule-free
    optimizers, are reached through it.
    """

    param_groups = _param_groups()
    state = _from_base("state")
    defaults = _from_base("defaults")
    grad_scale = _set_by_scaler("grad_scale")
    found_inf = _set_by_scaler("found_inf")

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self._amp: dict[str, Any] = {}
        self._unscaled = False  # whether GradScaler.unscale_ ran since the last step or perturbation
        # The half of Optimizer's construction that is wanted: hook dictionaries and the patched step. __init__ would
        # register the parameters a second time.
        torch.optim.Optimizer.__setstate__(self, {})

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch makes of ``step``: with hooks and a range for the profiler. The range alone takes 0.2 ms once a
        backward has driven its code from the cache, so that without hooks or profiler ``step`` runs as it is."""
        watched = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
            return (watched if _is_watched(self) else func)(self, *args, **kwargs)

        return step

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer, under the name that other implementations use."""
        return self.base

    def _must_step(self) -> bool:
        """Whether GradScaler may not skip ``step`` on overflow, because the weights are not where they belong."""
        raise NotImplementedError

    def _refuse_unless_at_rest(self, action: str) -> None:
        """Raise ``RuntimeError`` if ``action`` would see weights that are not the trained ones."""
        raise NotImplementedError

    # -- mixed precision -------------------------------------------------------------------------------------------

    def _base_scales(self) -> bool:
        return bool(getattr(self.base, "_step_supports_amp_scaling", False))

    def _scaler_values(self) -> dict[str, Any]:
        return vars(self.base) if self._base_scales() else self._amp

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True makes ``GradScaler.step`` always call ``step``; False lets it unscale and skip for us."""
        return self._must_step() or self._base_scales()

    def _called_by_scaler(self) -> bool:
        """Whether ``scaler.step(opt)`` is what runs: it gives no other sign where it has nothing to unscale."""
        if self._amp:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_maybe_opt_step":
            frame = frame.f_back
        return frame is not None

    def _unscale(self) -> bool:
        """Do what GradScaler left to ``step``: divide the gradients by the scale. False if the step must be skipped.

        One host synchronisation, the same as ``GradScaler`` has for an optimizer that does not scale by itself.
        """
        if not self._amp:
            return True
        if float(self._amp["found_inf"]) != 0.0:
            return False
        scale = self._amp.get("grad_scale")
        if scale is not None:
            inverse = scale.double().reciprocal().float()
            grads = [p.grad for group in self.base.param_groups for p in group["params"] if p.grad is not None]
            with torch.no_grad():
                for grad in grads:
                    grad.mul_(inverse.to(grad.device))
        return True

    # -- checkpoints, groups ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's ``state_dict()``; ``RuntimeError`` while the weights are perturbed."""
        self._refuse_unless_at_rest("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result = self._pack()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = _or_else(post_hook(self, result), result)
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base's ``load_state_dict()``; a checkpoint of the bare optimizer will do."""
        self._refuse_unless_at_rest("load_state_dict()")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _or_else(pre_hook(self, state_dict), state_dict)
        self._unpack(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _pack(self) -> dict[str, Any]:
        result: dict[str, Any] = self.base.state_dict()
        return result

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base's ``add_param_group()``."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's ``zero_grad()``."""
        self.base.zero_grad(set_to_none)

    # -- copies ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks, as in torch, and a ``step`` that a scheduler patched in: neither can be pickled."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.startswith("_optimizer_")
        }

    def __getattr__(self, name: str) -> Any:
        """What only the base has. Private names are not: a copy in the making would look for ``base`` in vain."""
        if name.startswith("_") or name == "base":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(self.base, name)
        except AttributeError:
            kinds = f"neither {type(self).__name__!r} nor its base {type(self.base).__name__!r}"
            raise AttributeError(f"{kinds} has an attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute that only the base has is set there, where it is read."""
        own = name.startswith("_") or name in vars(self) or name == "base" or hasattr(type(self), name)
        base = None if own else vars(self).get("base")
        if base is not None and (name in vars(base) or isinstance(getattr(type(base), name, None), property)):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def _or_else(replaced: dict[str, Any] | None, original: dict[str, Any]) -> dict[str, Any]:
    return original if replaced is None else replaced
