"""What SAM and its relatives have in common: one gradient says where to go, a second one is taken there.

A method is what it makes of the two, in two hooks: :meth:`TwoPass.combine` here, and ``direction`` of
:class:`flatmin.SAM`, which says what an ascent follows. Everything else (contexts, closures, accumulation, BatchNorm,
random numbers, mixed precision, checkpoints) is the same for all of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int
from . import _fused
from ._buckets import PerturbedSet
from ._model_buffers import ModelBuffers
from ._perturbing import Perturbing, accumulate
from ._rng_replay import RandomReplay
from ._wrapper import Closure, GradScaler

__all__ = ["TwoPass"]


class TwoPass(Perturbing):
    """A wrapper that takes a gradient at ``w``, moves the weights by it and takes a second one there.

    Subclasses say how to :meth:`_move` and, if the step is not to take the second gradient as it is, set
    :attr:`needs_first_gradient` and say how to :meth:`combine`.

    Args:
        optimizer: the base.
        group_defaults: our keys of the groups. Of ``sam_step``, the counter of steps, every subclass has one.
        perturbed: the set that moves.
        model, exempt_buffers, same_rng, interval, start: as of :class:`flatmin.SAM`.
    """

    #: Whether :meth:`combine` wants the gradient at ``w``: it costs the memory of one more gradient.
    needs_first_gradient = False

    _advice = "Compute the gradient again within `with opt.perturb():` before opt.step(), or call opt.step(closure)"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        group_defaults: dict[str, Any],
        perturbed: PerturbedSet[Any],
        *,
        model: nn.Module | None,
        exempt_buffers: Sequence[str],
        same_rng: bool,
        interval: int,
        start: int,
    ) -> None:
        buffers = ModelBuffers(model, exempt_buffers) if model is not None else None
        super().__init__(optimizer, group_defaults | {"sam_step": 0}, perturbed, buffers)
        self._interval, self._start = interval, start
        self._replay = RandomReplay(model) if model is not None and same_rng else None
        self._first: dict[Tensor, Tensor] | None = None
        self._in_second_pass = False

    # -- what a method is ------------------------------------------------------------------------------------------

    def combine(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Make of both gradients the one that the base steps with: ``second`` is changed in place.

        Called once for each ascent, with the gradients of every parameter that has both, on the scale that both
        passes had (before :class:`torch.amp.GradScaler` unscales). Only where :attr:`needs_first_gradient`.

        Args:
            first: gradients at ``w``.
            second: gradients at ``w + e``: what ``.grad`` holds.
        """
        raise NotImplementedError

    def _can_move(self, group: dict[str, Any]) -> bool:
        """Whether an ascent moves the parameters of a group."""
        raise NotImplementedError

    def _move(self) -> bool:
        """Move the weights by the gradients that they hold. False if there is nothing to move."""
        raise NotImplementedError

    # -- the two passes --------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether an ascent would move anything at this step: some radius is not 0, and ``start`` and ``interval``
        allow it. While False, a loop can skip its second pass: ``if opt.active: with opt.perturb(): ...``"""
        groups = self._groups()
        steps = groups[0]["sam_step"] - self._start
        return steps >= 0 and steps % self._interval == 0 and any(map(self._can_move, groups))

    @contextlib.contextmanager
    def perturb(self) -> Iterator[None]:
        """Context for the second pass: weights at ``w + e`` and no gradients on entry, ``w`` on exit, always.

        Where the optimizer is not :attr:`active`, the weights stay at ``w``; gradients are cleared all the same, so
        that an unchanged loop computes the gradient once more rather than twice its value.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient is sparse.
        """
        self._refuse_unless_at_rest("ascend()")
        try:
            self._ascend()
            self._clear_for_second_pass()
            yield
            self._finish_gradient()
            self.restore()
        except BaseException:  # it may come at any line, of restore() too
            self._abandon()
            raise

    def ascend(self) -> None:
        """Move the weights from ``w`` to ``w + e`` by the gradients that they hold. :meth:`perturb` is safer."""
        self._ascend()
        if self._first is not None:  # the loop clears the gradients, in whichever way
            self._first = {p: grad.clone() for p, grad in self._first.items()}

    def _ascend(self) -> None:
        """Start the second pass: at ``w + e``, or at ``w`` where the optimizer is not active."""
        self._refuse_unless_at_rest("ascend()")
        if self._buffers is not None:
            self._buffers.save()
        self._in_second_pass = True
        try:
            if self.active:
                self._watch.ascended = self._watch.moved = self._move()
                if self.needs_first_gradient:
                    self._first = self._gradients()
            self._start_pass()
            if self._replay is not None:
                self._replay.start_second_pass()
        except BaseException:
            self._abandon()
            raise

    def _clear_for_second_pass(self) -> None:
        if self._first is not None and not self._sets_to_none():
            self._first = {p: grad.clone() for p, grad in self._first.items()}  # their memory takes the next gradient
        self._clear_grads()

    def _finish_gradient(self) -> None:
        """Combine the gradients, once, while both have the scale that the passes gave them."""
        first, self._first = self._first, None
        if not first:
            return
        if "found_inf" in self._amp and self._amp.get("grad_scale") is None:
            raise RuntimeError(
                f"{type(self).__name__}: scaler.unscale_() ran while the weights were perturbed, so the two gradients "
                "have two scales. Leave `with opt.perturb()`, or call restore(), before scaler.unscale_(opt)"
            )
        params = [p for p in first if p.grad is not None]
        if params:
            with torch.no_grad():
                self.combine([first[p] for p in params], [p.grad for p in params if p.grad is not None])

    def restore(self) -> None:
        """Move the weights back to ``w``, and the model's buffers to what the first pass left. Nothing happens if they
        are there."""
        try:
            self._finish_gradient()
        finally:
            super().restore()
            if self._in_second_pass:  # at w, since the optimizer was not active
                self._end_pass()

    def _abandon(self) -> None:
        self._first = None
        super()._abandon()

    def _run_perturbed(self, closure: Closure) -> Any:
        """Ascend and run ``closure`` without gradients. The weights stay perturbed, unless it raises."""
        self._refuse_unless_at_rest("ascend()")
        try:
            self._ascend()
            self._clear_for_second_pass()
            result = closure()
            self._finish_gradient()
        except BaseException:
            self._abandon()
            raise
        return result

    def _end_pass(self) -> None:
        self._in_second_pass = False
        super()._end_pass()
        if self._replay is not None:
            self._replay.reset()

    def step(self, closure: Closure | None = None) -> Any:
        """Restore the weights if they are perturbed and take the base's step.

        Args:
            closure: clears the gradients, computes them and returns the loss. It is called once at ``w`` and, where
                the optimizer is :attr:`active`, once more at ``w + e``. If the second call raises, the weights are
                restored. One that computes no gradient, as trainers pass along when the loop has computed it, is called
                once, and may clip: the step is that without closure.

        Returns:
            What ``closure`` returned at ``w``: the clean loss. None without closure.
        """
        if closure is None:
            self._base_step()
            return None
        self._refuse_unless_at_rest("step(closure)")
        try:
            with torch.enable_grad():
                loss, record = self._run_closure(closure, passed=self._watch.passed)
                if self.active and not record.untouched():
                    self._run_perturbed(closure)
            self._base_step()
        except BaseException:
            self._abandon()
            raise
        return loss

    def first_step(self, zero_grad: bool = False) -> None:
        """:meth:`ascend`, for loops written with ``first_step`` and ``second_step``."""
        self.ascend()
        if zero_grad:
            self._clear_grads()

    def second_step(self, zero_grad: bool = False) -> None:
        """:meth:`step`, for loops written with ``first_step`` and ``second_step``."""
        self.step()
        if zero_grad:
            self._clear_grads()

    # -- accumulation ----------------------------------------------------------------------------------------------

    def backward(
        self,
        closure: Callable[..., Tensor],
        *,
        m: int | None = None,
        scaler: GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Tensor:
        """Add a SAM gradient to what ``.grad`` holds: for gradient accumulation and m-sharpness.

        For one perturbation per step instead, accumulate as usual and repeat all micro-batches in :meth:`perturb`.

        Args:
            closure: returns the loss, without ``backward()``. Called twice.
            m: number of micro-batches. ``closure(i)`` is then the loss of the i-th, each gets its own perturbation,
                and the mean of their SAM gradients is added.
            scaler: :class:`torch.amp.GradScaler` to scale the loss with.
            no_sync: ``ddp.no_sync``. One perturbation per rank: the first forward and backward are not reduced.

        Returns:
            Mean clean loss, detached.

        Raises:
            RuntimeError: the weights are perturbed already. After any exception, ``.grad`` and the weights are as
                they were.
            ValueError: ``no_sync`` with a method that combines both gradients: the first would be another on each rank.
        """
        self._refuse_unless_at_rest("backward()")
        check_int("m", 1 if m is None else m, 1)
        if no_sync is not None and self.needs_first_gradient:
            raise ValueError(
                f"no_sync: {type(self).__name__} steps with both gradients, and without synchronisation the first is "
                "another on each rank; leave no_sync out"
            )
        calls = [closure] if m is None else [functools.partial(closure, i) for i in range(m)]
        held, added = self._take_grads(), dict[Tensor, Tensor]()
        losses = []
        try:
            for call in calls:
                losses.append(self._sam_gradient(call, 1.0 / len(calls), scaler, no_sync))
                accumulate(added, self._take_grads())
            accumulate(held, added)
        finally:
            self._put_grads(held)
        return torch.stack(losses).mean()

    @torch.enable_grad()
    def _sam_gradient(
        self,
        closure: Callable[[], Tensor],
        weight: float,
        scaler: GradScaler | None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None,
    ) -> Tensor:
        """``.grad`` becomes ``weight`` times the SAM gradient of the closure's loss, which is returned."""

        def run(factor: float) -> Tensor:
            loss = closure()
            scaled = loss if scaler is None else scaler.scale(loss)
            (scaled * factor).backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        if not self.active:
            return run(weight)
        with no_sync() if no_sync is not None else contextlib.nullcontext():
            loss = run(weight if self.needs_first_gradient else 1.0)  # its length alone does not matter to an ascent
        self._run_perturbed(functools.partial(run, weight))
        self.restore()
        return loss

    # -- steps -----------------------------------------------------------------------------------------------------

    def _take_step(self, counts: bool) -> None:
        if not self._fused_step(self._stepping()):
            self.restore()
            self.base.step()
        if self._replay is not None:
            self._replay.see_step()

    def _stepping(self) -> list[Any]:
        """The buckets for one pass; none where the base's own step has to run. A step without ascent is the bare
        optimizer's to the bit."""
        if self._set.perturbed:
            return self._set.buckets
        if _fused.might_fit(self.base) and (self._watch.moved or _fused.has_bits_of_base(self.base)):
            return self._set.at_rest(self._groups(), self._keys(), self._kinds())
        return []

    def _keys(self) -> tuple[str, ...]:
        """Options in which groups must agree to be one list to the operators."""
        return _fused.keys_of(self.base, tuple(self._group_defaults))

    def _kinds(self) -> list[Any]:
        """Of each group, what else they must agree in."""
        return list(map(self._can_move, self._groups()))

    def _count_step(self) -> None:
        step = self._groups()[0]["sam_step"] + 1
        for group in self._groups():
            group["sam_step"] = step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base's ``add_param_group()``; the group may have our keys, such as ``sam_rho``."""
        if isinstance(param_group, dict):
            param_group.setdefault("sam_step", self._groups()[0]["sam_step"])
        super().add_param_group(param_group)
