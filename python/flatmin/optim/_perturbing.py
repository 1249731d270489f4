"""What SAM and PerturbedOPT have in common: weights that move for a gradient and come back for the step."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _fused
from ._arguments import check_keys
from ._buckets import Bucket, PerturbedSet
from ._closures import GradientRecord
from ._model_buffers import ModelBuffers
from ._wrapper import Closure, Wrapper

__all__ = ["Perturbing", "accumulate", "makes_the_state"]


class Perturbing(Wrapper):
    """A wrapper that perturbs. Subclasses say how to :meth:`ascend`, what their groups hold and what a step does.

    Args:
        optimizer: the base.
        group_defaults: our keys of the groups, with the values of groups that lack them.
        perturbed: the set that moves.
        buffers: those of the model, which must not see the perturbed weights.
    """

    #: What a loop that never perturbs should do, for the warning.
    _advice: str

    #: Our keys of a group that a user may set, each with ``check(name, value)``.
    group_checks: ClassVar[Mapping[str, Callable[[str, Any], None]]]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        group_defaults: dict[str, Any],
        perturbed: PerturbedSet[Any],
        buffers: ModelBuffers | None,
    ) -> None:
        self._group_defaults: dict[str, Any] = {}
        super().__init__(optimizer)
        self._define_keys(group_defaults)
        self._set = perturbed
        self._buffers = buffers
        self._watch = Watch()
        self._set_to_none: bool | None = None
        self._cleared = False
        self._zeroed: tuple[Tensor, int] | None = None
        self._unscaled_before = False

    @property
    def active(self) -> bool:
        raise NotImplementedError

    def ascend(self) -> None:
        raise NotImplementedError

    def _take_step(self, counts: bool) -> None:
        """Restore the weights and take the base's step. ``counts`` is False if no weight can change."""
        raise NotImplementedError

    def _count_step(self) -> None:
        raise NotImplementedError

    # -- passes ----------------------------------------------------------------------------------------------------

    def _start_pass(self) -> None:
        self._unscaled_before, self._unscaled = self._unscaled, False
        self._watch.passed = True
        # autocast caches the 16-bit copies of the weights until its outermost block ends
        torch.clear_autocast_cache()

    def _end_pass(self) -> None:
        torch.clear_autocast_cache()
        if self._buffers is not None:
            self._buffers.restore()

    def restore(self) -> None:
        """Move the weights back to ``w``. Nothing happens if they are there."""
        if self._set.perturbed:
            self._set.restore()
            self._end_pass()

    def _run_perturbed(self, closure: Closure) -> Any:
        """Ascend and run ``closure``. The weights stay perturbed, unless it raises."""
        self.ascend()
        try:
            return closure()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Give up the pass after an exception: the weights come back."""
        self.restore()

    # -- steps -----------------------------------------------------------------------------------------------------

    def _finish_gradient(self) -> None:
        """What a method does to the gradients between the last pass and the step."""

    def _base_step(self) -> None:
        counts = _changes_weights(self._groups())
        if counts:
            self._watch.see_step(self)
        try:
            self._finish_gradient()
            self._refuse_two_scales()
            if self._unscale():
                self._take_step(counts)
            else:  # torch.amp.GradScaler skips this step
                self.restore()
                counts = False
        except BaseException:
            self._abandon()
            raise
        finally:
            self._unscaled = self._unscaled_before = self._watch.passed = self._watch.moved = False
        if counts:
            self._count_step()

    def _refuse_two_scales(self) -> None:
        """torch.amp.GradScaler takes gradients that it unscaled before a perturbation for unscaled ones, although those
        of the pass that came after it still have the scale."""
        if self._unscaled_before and not self._unscaled and self._called_by_scaler():
            raise RuntimeError(
                f"{type(self).__name__}: scaler.unscale_() ran before the perturbed pass and not after it, so the "
                "gradients of that pass would be stepped with as if they were unscaled. Unscale (and clip) once, after "
                "`with opt.perturb()`; SAM's ascent does not depend on the scale. If that pass did not scale its loss, "
                "call opt.step() instead of scaler.step(opt)"
            )

    def _fused_step(self, buckets: Sequence[Bucket]) -> bool:
        """Restore, if the weights are away, and step in one pass, if that fits. ``buckets`` are those that the base
        will step."""
        done = _fused.restore_and_step(self.base, buckets, self._group_defaults)
        if done:
            self.restore()
        return done

    # -- groups and gradients --------------------------------------------------------------------------------------

    def _groups(self) -> list[dict[str, Any]]:
        groups = self.base.param_groups
        key = next(iter(self._group_defaults))
        if not all(key in group for group in groups):
            self._fill_groups()  # an older checkpoint was loaded through the base itself
        return groups

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses ``opt.rho = 0.2``, which nobody would read."""
        keys = [key for key in vars(self).get("_group_defaults", ()) if key.partition("_")[2] == name]
        if keys and not hasattr(type(self), name):
            raise AttributeError(
                f"{type(self).__name__}.{name}: {value!r} given, but each parameter group has its own; set "
                f"group[{keys[0]!r}] of the groups in opt.param_groups"
            )
        super().__setattr__(name, value)

    def _define_keys(self, group_defaults: dict[str, Any]) -> None:
        """Give every group our keys: those of the class and, called by a subclass, its own."""
        self._check_groups(self.base.param_groups)
        check_keys(self.base, group_defaults)
        self.base.defaults.update(group_defaults)
        self._group_defaults |= group_defaults
        self._fill_groups()

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        for index, group in enumerate(groups):
            for key, check in self.group_checks.items():
                if key in group:
                    check(f"param_groups[{index}]['{key}']", group[key])

    def _fill_groups(self) -> None:
        for group in self.base.param_groups:
            for key, value in self._group_defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._fill_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            for key, check in self.group_checks.items():
                if key in param_group:
                    check(key, param_group[key])
        super().add_param_group(param_group)
        self._fill_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._set_to_none, self._cleared = set_to_none, True
        first = None if set_to_none else next(iter(self._gradients().values()), None)
        self._zeroed = None if first is None else (first, first._version)

    def _run_closure(self, closure: Closure, *, passed: bool, adds_up: bool = False) -> tuple[Any, GradientRecord]:
        """What ``closure`` returns at the weights as they are, and what it did to the gradients.

        Args:
            closure: of the caller.
            passed: the loop has perturbed since the last step, so that the closure may be one that only clips.
            adds_up: it is called once, so that it may add to the gradients.

        Raises:
            RuntimeError: it added to gradients that were there, which further calls of it would not compute again.
        """
        clean = self._zeroed is not None and self._zeroed[0]._version == self._zeroed[1]
        record, self._cleared = GradientRecord(self.base.param_groups, watched=passed), False
        try:
            result = closure()
        finally:
            record.close()
        if not (adds_up or self._cleared or clean) and record.added():
            raise RuntimeError(
                f"{type(self).__name__}.step(closure): the closure added its gradient to one that was there. The "
                "perturbed pass calls it again, and would lose what earlier micro-batches computed. Clear the "
                "gradients in the closure; to accumulate micro-batches, call opt.backward(closure) for each (it takes "
                "a closure without backward() and m=), or repeat all of them within `with opt.perturb():`"
            )
        return result, record

    def _sets_to_none(self) -> bool:
        """Whether the loop lets go of its gradients, as it last said. One that never said so and holds views, of a
        flat buffer of its own, wants them filled."""
        if self._set_to_none is None:
            return not any(grad._is_view() for grad in self._gradients().values())
        return self._set_to_none

    def _clear_grads(self) -> None:
        """As the loop does it: some bases clear more than ``.grad``, some loops hold on to the tensors."""
        set_to_none = self._sets_to_none()
        if type(self.base).zero_grad is torch.optim.Optimizer.zero_grad and set_to_none:
            for group in self.base.param_groups:  # what it does, without its range for the profiler
                for p in group["params"]:
                    p.grad = None
        else:
            self.base.zero_grad(set_to_none)

    def _gradients(self) -> dict[Tensor, Tensor]:
        return {p: p.grad for group in self.base.param_groups for p in group["params"] if p.grad is not None}

    @torch.no_grad()
    def _take_grads(self) -> dict[Tensor, Tensor]:
        """Take the gradients off the parameters. Views are copied: DDP's ``gradient_as_bucket_view`` reuses their
        memory in the next backward."""
        taken = {}
        for group in self.base.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    taken[p] = p.grad.clone() if p.grad._is_view() else p.grad
                    p.grad = None
        return taken

    def _put_grads(self, grads: dict[Tensor, Tensor]) -> None:
        for group in self.base.param_groups:
            for p in group["params"]:
                p.grad = grads.get(p)

    # -- what Wrapper asks -----------------------------------------------------------------------------------------

    def _must_step(self) -> bool:
        return self._set.perturbed

    def _refuse_unless_at_rest(self, action: str) -> None:
        if self._set.perturbed:
            raise RuntimeError(
                f"{action}: the weights are perturbed. Leave `with opt.perturb()`, or call restore() or step(), first"
            )


class Watch:
    """What a loop has done since the last step, and a warning, once, of one that never perturbs: plain training, and
    nothing else would show it.

    An object of its own, because Lightning's optimizers have a copy of the wrapper's attributes: a loop perturbs
    through one of the two and steps through the other.

    Attributes:
        passed: whether the loop has perturbed since the last step. Trainers then pass closures that only clip.
        moved: whether a weight has moved.
    """

    def __init__(self) -> None:
        self.passed = self.moved = False
        self.ascended = False
        self.plain_steps = 0
        self.warned = False

    def see_step(self, opt: Perturbing) -> None:
        if self.ascended:
            self.ascended, self.plain_steps = False, 0
        elif not self.warned and opt.active and _any_grad(opt.param_groups):
            self.plain_steps += 1
            if self.plain_steps == 2:  # one is legal: torch.distributed.checkpoint, Lightning's sanity run
                self.warned = True
                warnings.warn(
                    f"{type(opt).__name__}.step() ran twice without a perturbation: this trains as the bare optimizer "
                    f"does. {opt._advice}",
                    stacklevel=5,
                )


@torch.no_grad()
def accumulate(total: dict[Tensor, Tensor], grads: dict[Tensor, Tensor]) -> None:
    """Add ``grads`` to ``total``, whose tensors are changed in place."""
    for p, grad in grads.items():
        total[p] = total[p].add_(grad) if p in total else grad


def makes_the_state() -> bool:
    """Whether torch.distributed.checkpoint takes this step, with gradients of 0, to make the base create its state."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None


def _any_grad(groups: list[dict[str, Any]]) -> bool:
    return any(p.grad is not None for group in groups for p in group["params"])


def _changes_weights(groups: list[dict[str, Any]]) -> bool:
    """False if every learning rate is 0: torch.distributed.checkpoint takes such a step to create the state, and it
    must not count, or saving would shift ``interval``."""
    rates = [group.get("lr", 1.0) for group in groups]
    return any(isinstance(lr, Tensor) or lr != 0.0 for lr in rates)
