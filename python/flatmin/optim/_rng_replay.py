"""The same random numbers in both passes of a step, so that dropout draws the same masks."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn

from .._rng import Generators

__all__ = ["RandomReplay"]


class RandomReplay:
    """Gives the k-th forward of the second pass the random numbers of the k-th forward of the first.

    The generators of the CPU and of the model's devices are recorded before every training forward. In the second
    pass they are set back for the time of the forward, and afterwards go on as if it had drawn nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.second_pass = False
        self._recorded: list[Generators] = []
        self._warned = False
        self._called = self._missed = False  # by or in the second pass
        self._next = 0
        self._interrupted: Generators | None = None
        hook = _Hook(self)
        model.register_forward_pre_hook(hook.before)
        model.register_forward_hook(hook.after, always_call=True)

    def start_second_pass(self) -> None:
        self.second_pass, self._next = True, 0
        self._called = self._missed = False
        if not self._recorded:
            self._warn("first", "its random numbers are not known and ")

    def reset(self) -> None:
        """Forget the first pass: at the end of the second, and at a step without one."""
        self._missed = self._missed or (self.second_pass and bool(self._recorded) and not self._called)
        self.second_pass = False
        self._recorded.clear()

    def see_step(self) -> None:
        """At a step: not where the second pass failed."""
        self.reset()
        if self._missed:
            self._warn("second", "")
        self._missed = False

    def _warn(self, which: str, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"same_rng: the {which} pass did not call the module given as model=, so {why}dropout draws other "
                "masks in the second pass. Give the module that the loop calls, and call it, not its forward()",
                stacklevel=6,
            )

    def before_forward(self) -> None:
        self._called = self._called or self.second_pass
        if not (self.model.training and torch.is_grad_enabled()):
            return  # an evaluation between two steps is no pass
        if not self.second_pass:
            self._recorded.append(Generators(self.model))
        elif self._next < len(self._recorded):
            self._interrupted = Generators(self.model)
            self._recorded[self._next].set()
            self._next += 1

    def after_forward(self) -> None:
        if self._interrupted is not None:
            self._interrupted.set()
            self._interrupted = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy belongs to the copied model, and hooks into that."""
        return RandomReplay, (self.model,)


class _Hook:
    """Forward hooks that keep no optimizer alive, and that do nothing in a copy of the model."""

    def __init__(self, replay: RandomReplay | None) -> None:
        self._replay = weakref.ref(replay) if replay is not None else None

    def _owner(self) -> RandomReplay | None:
        return self._replay() if self._replay is not None else None

    def before(self, module: nn.Module, args: Any) -> None:
        if (replay := self._owner()) is not None:
            replay.before_forward()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if (replay := self._owner()) is not None:
            replay.after_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)
