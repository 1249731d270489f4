"""Sharpness-aware minimization around any torch optimizer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._checks import check_int, check_radius
from .._arguments import build_base, check_model, check_sam_groups, check_sam_options
from .._batchnorm import BatchNormBuffers
from .._perturbing import Perturbing, accumulate
from .._rng_replay import RandomReplay
from .._wrapper import Closure, GradScaler
from ._ascent import AscentSet, can_move

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SAM"]


class SAM(Perturbing):
    """Wraps an optimizer so that it steps with the gradient at the worst point within a radius of the weights.

    Five lines turn a training loop into SAM::

        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        ...
        loss_fn(model(x), y).backward()           # the loop's own pass, at w
        with opt.perturb():                       # w + e, and gradients cleared
            loss_fn(model(x), y).backward()
        opt.step()                                # at w again: the base optimizer's step

    ``e`` maximises the linearised loss over ``||e||_p <= rho`` (Foret et al. 2020, arXiv 2010.01412, Eq. 2), or over
    ``||e / T(w)||_p <= rho`` with ``adaptive`` (Kwon et al. 2021, arXiv 2102.11600). ``opt.step(closure)`` runs both
    passes itself, and then restores and steps in one pass over memory where the base is exactly
    :class:`torch.optim.SGD`, :class:`~torch.optim.Adam` or :class:`~torch.optim.AdamW`. Loops that were written for
    ``first_step`` and ``second_step`` run unchanged.

    Promises:

    * The weights come back bit for bit, at the same address, whatever happened in between: an exception, a skipped
      AMP step, parameters without gradient, NaN. If the gradient norm is not finite, nothing moves.
    * ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are the base's own: a checkpoint of a SAM run
      loads into the bare optimizer and the reverse, and a resumed run is the same to the last bit.
    * No host synchronisation, and one copy of the perturbed parameters as memory.

    Mixed precision: ``e`` does not depend on the scale of the loss, so ascend on the scaled gradients, and unscale and
    clip once, after the second pass. ``scaler.step(opt)`` is as usual; ``scaler.step(opt, closure)`` is not, since
    torch never unscales a closure's gradients, whatever the optimizer: use :meth:`backward` with ``scaler=``.

    Weight decay stays the base's: it acts at ``w`` and is not part of the gradient that ``e`` follows.

    Args:
        optimizer_or_params: the optimizer to wrap, or parameters as an optimizer takes them; then give ``base``.
        base: class of the optimizer to build around parameters. ``base_optimizer`` is another name for it.
        rho: radius, >= 0, usually 0.01 to 0.5 (ASAM: 0.5 to 2). A float, or a 0-dim tensor that may change without
            synchronisation or recompilation. 0 is the bare optimizer to the last bit. It is stored in each group as
            ``sam_rho`` (Adadelta owns the key ``rho``), where schedulers can drive it and a group can have its own; a
            group whose ``sam_rho`` is 0 is neither moved nor part of the norm.
        adaptive: True or "asam" scales ``e`` by ``T = |w| + eta`` for parameters of more than one dimension,
            "davda54" by ``|w|`` for all, "big_vision" by ``|w|`` with the norm of the plain gradient. Per group:
            ``sam_adaptive``.
        eta: offset of ASAM's scaling, >= 0. Per group: ``sam_eta``.
        eps: added to the norm, >= 0.
        p: norm of the radius, 1 to inf. It spans every perturbed parameter, whatever its group or device.
        model: module whose BatchNorm statistics should count the first pass only.
        same_rng: give the second forward of ``model`` the random numbers of the first, so that dropout drops the
            same units.
        rounding: "nearest", or "stochastic" for bfloat16 and float16 parameters, most of which do not move under
            rounding to nearest. The random numbers are a function of :func:`torch.initial_seed` at construction and
            of the number of ascents; both are in the checkpoint, and torch's generators are not touched.
        sync: "local", the norm over what this process sees: the global one under DDP, whose gradients are averaged
            already, and under FSDP2, whose DTensors are reduced over their shard dimensions. Or a process group over
            which plain parameters are sharded, to reduce the norm over it.
        interval: perturb at every ``interval``-th step only, >= 1.
        start: index of the first step that perturbs, >= 0. Steps are counted in the groups as ``sam_step``.
        base_kwargs: arguments of ``base``.

    Attributes:
        base: the wrapped optimizer.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
    """

    _set: AscentSet
    _advice = "Compute the gradient again within `with opt.perturb():` before opt.step(), or call opt.step(closure)"

    def __init__(
        self,
        optimizer_or_params: Any,
        base: Callable[..., torch.optim.Optimizer] | None = None,
        *,
        rho: float | Tensor = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        eps: float = 1e-12,
        p: float = 2.0,
        model: nn.Module | None = None,
        same_rng: bool = False,
        rounding: str = "nearest",
        sync: str | ProcessGroup = "local",
        interval: int = 1,
        start: int = 0,
        base_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        **base_kwargs: Any,
    ) -> None:
        check_sam_options(rho, adaptive, eta, eps, p, rounding, sync, interval, start)
        check_model(model, same_rng)
        if base is not None and base_optimizer is not None:
            raise TypeError("base and base_optimizer: both given, but they are two names of one argument")
        optimizer = build_base("SAM", optimizer_or_params, base or base_optimizer, base_kwargs)
        check_sam_groups(optimizer)
        group_defaults = {
            "sam_rho": rho,
            "sam_adaptive": True if adaptive == "asam" else adaptive,
            "sam_eta": eta,
            "sam_step": 0,
        }
        if rounding == "stochastic":
            group_defaults |= {"sam_seed": torch.initial_seed(), "sam_ascents": 0}
        batch_norm = BatchNormBuffers(model) if model is not None else None
        super().__init__(optimizer, group_defaults, AscentSet(p, eps, sync), batch_norm)
        self._interval, self._start = interval, start
        self._replay = RandomReplay(model) if model is not None and same_rng else None

    # -- the two passes --------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether an ascent would move anything at this step: some radius is not 0, and ``start`` and ``interval``
        allow it. While False, a loop can skip its second pass: ``if opt.active: with opt.perturb(): ...``"""
        groups = self._groups()
        steps = groups[0]["sam_step"] - self._start
        return steps >= 0 and steps % self._interval == 0 and any(map(can_move, groups))

    @property
    def last_norm(self) -> Tensor | None:
        """Norm of the gradient at the last ascent: a 0-dim tensor, read without synchronisation; None before."""
        return self._set.norm

    @contextlib.contextmanager
    def perturb(self) -> Iterator[None]:
        """Context for the second pass: weights at ``w + e`` and no gradients on entry, ``w`` on exit, always.

        Where SAM is not :attr:`active`, the weights stay at ``w``; gradients are cleared all the same, so that an
        unchanged loop computes the gradient once more rather than twice its value.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient is sparse.
        """
        self.ascend()
        try:
            self._clear_grads()
            yield
        finally:
            self.restore()

    def ascend(self) -> None:
        """Move the weights from ``w`` to ``w + e`` by the gradients that they hold. :meth:`perturb` is safer."""
        self._refuse_unless_at_rest("ascend()")
        if not self.active:
            return
        if self._batch_norm is not None:
            self._batch_norm.save()
        self._watch.ascended = self._set.ascend(self._groups(), self._next_key())
        self._start_pass()
        if self._replay is not None:
            self._replay.start_second_pass()

    def _end_pass(self) -> None:
        super()._end_pass()
        if self._replay is not None:
            self._replay.reset()

    def step(self, closure: Closure | None = None) -> Any:
        """Restore the weights if they are perturbed and take the base's step.

        Args:
            closure: clears the gradients, computes them and returns the loss. It is called once at ``w`` and, where
                SAM is :attr:`active`, once more at ``w + e``. If the second call raises, the weights are restored.

        Returns:
            What ``closure`` returned at ``w``: the clean loss. None without closure.
        """
        if closure is None:
            self._base_step()
            return None
        self._refuse_unless_at_rest("step(closure)")
        with torch.enable_grad():
            loss = closure()
            if self.active:
                self._run_perturbed(closure, clear_grads=True)
        self._base_step()
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
        """
        self._refuse_unless_at_rest("backward()")
        check_int("m", 1 if m is None else m, 1)
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
            loss = run(1.0)  # the length of this gradient does not matter
        self._run_perturbed(functools.partial(run, weight), clear_grads=True)
        self.restore()
        return loss

    def _take_step(self, counts: bool) -> None:
        if not self._fused_step(self._set.buckets):
            self.restore()
            self.base.step()
        if self._replay is not None:
            self._replay.reset()

    def _count_step(self) -> None:
        step = self._groups()[0]["sam_step"] + 1
        for group in self._groups():
            group["sam_step"] = step

    # -- groups ----------------------------------------------------------------------------------------------------

    def _next_key(self) -> tuple[int, int] | None:
        groups = self._groups()
        if "sam_seed" not in self._group_defaults:
            return None
        key = groups[0]["sam_seed"], groups[0]["sam_ascents"]
        for group in groups:
            group["sam_ascents"] = key[1] + 1
        return key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base's ``load_state_dict()``. Keys that the checkpoint of a bare optimizer lacks keep their defaults."""
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base's ``add_param_group()``; the group may have its own ``sam_rho``."""
        if isinstance(param_group, dict):
            check_radius(param_group.get("sam_rho", 0.0), "sam_rho")
            param_group.setdefault("sam_step", self._groups()[0]["sam_step"])
        super().add_param_group(param_group)
