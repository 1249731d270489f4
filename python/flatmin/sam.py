"""Sharpness-aware minimization around any torch optimizer."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _fused
from ._options import build_base, check_int, check_keys, check_model, check_options
from ._passes import BatchNormBuffers, RandomReplay
from ._perturbed import PerturbedSet, can_move, check_radius
from ._wrapper import Closure, GradScaler, Wrapper

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SAM"]


class SAM(Wrapper):
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
        check_options(rho, adaptive, eta, eps, p, rounding, sync, interval, start)
        check_model(model, same_rng)
        if base is not None and base_optimizer is not None:
            raise TypeError("base and base_optimizer: both given, but they are two names of one argument")
        optimizer = build_base(optimizer_or_params, base or base_optimizer, base_kwargs)
        self._group_defaults = {
            "sam_rho": rho,
            "sam_adaptive": True if adaptive == "asam" else adaptive,
            "sam_eta": eta,
            "sam_step": 0,
        }
        if rounding == "stochastic":
            self._group_defaults |= {"sam_seed": torch.initial_seed(), "sam_ascents": 0}
        check_keys(optimizer, self._group_defaults)
        optimizer.defaults.update(self._group_defaults)
        super().__init__(optimizer)
        self._fill_groups()
        self._set = PerturbedSet(p, eps, sync)
        self._interval, self._start = interval, start
        self._batch_norm = BatchNormBuffers(model) if model is not None else None
        self._replay = RandomReplay(model) if model is not None and same_rng else None
        self._watch = _Watch()

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
        # autocast caches the 16-bit copies of the weights until its outermost block ends
        torch.clear_autocast_cache()
        if self._replay is not None:
            self._replay.start_second_pass()

    def restore(self) -> None:
        """Move the weights back to ``w``. Nothing happens if they are there."""
        if self._set.perturbed:
            self._set.restore()
            self._end_second_pass()

    def _end_second_pass(self) -> None:
        torch.clear_autocast_cache()
        if self._batch_norm is not None:
            self._batch_norm.restore()
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
                self._run_perturbed(closure)
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
                _accumulate(added, self._take_grads())
            _accumulate(held, added)
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
        self._run_perturbed(functools.partial(run, weight))
        self.restore()
        return loss

    def _run_perturbed(self, second_pass: Closure) -> None:
        """Ascend and run ``second_pass``. The weights stay perturbed, unless it raises."""
        self.ascend()
        try:
            self._clear_grads()
            second_pass()
        except BaseException:
            self.restore()
            raise

    def _base_step(self) -> None:
        counts = _changes_weights(self._groups())
        if counts:
            self._watch.see_step(self)
        if not self._unscale():
            self.restore()
            return
        if not self._fused_step():
            self.restore()
            self.base.step()
        if self._replay is not None:
            self._replay.reset()
        if counts:
            step = self._groups()[0]["sam_step"] + 1
            for group in self._groups():
                group["sam_step"] = step

    def _fused_step(self) -> bool:
        if not self._set.perturbed:
            return False
        try:
            done = _fused.restore_and_step(self.base, self._set.buckets)
        except BaseException:
            self.restore()
            raise
        if done:
            self.restore()
        return done

    # -- groups and gradients --------------------------------------------------------------------------------------

    def _groups(self) -> list[dict[str, Any]]:
        groups = self.base.param_groups
        if not all("sam_rho" in group for group in groups):
            self._fill_groups()  # an older checkpoint was loaded through the base itself
        return groups

    def _fill_groups(self) -> None:
        for group in self.base.param_groups:
            for key, value in self._group_defaults.items():
                group.setdefault(key, value)

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
        self._fill_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base's ``add_param_group()``; the group may have its own ``sam_rho``."""
        if isinstance(param_group, dict):
            check_radius(param_group.get("sam_rho", 0.0), "sam_rho")
            param_group.setdefault("sam_step", self._groups()[0]["sam_step"])
        super().add_param_group(param_group)
        self._fill_groups()

    def _clear_grads(self) -> None:
        for group in self.base.param_groups:
            for p in group["params"]:
                p.grad = None

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


class _Watch:
    """Warns once of a loop without a second pass: plain training, and nothing else would show it."""

    def __init__(self) -> None:
        self.ascended = False
        self.plain_steps = 0
        self.warned = False

    def see_step(self, opt: SAM) -> None:
        if self.ascended:
            self.ascended, self.plain_steps = False, 0
        elif not self.warned and opt.active and _any_grad(opt.param_groups):
            self.plain_steps += 1
            if self.plain_steps == 2:  # one is legal: torch.distributed.checkpoint, Lightning's sanity run
                self.warned = True
                warnings.warn(
                    "SAM.step() ran twice without a perturbation: this trains as the bare optimizer does. Compute the "
                    "gradient again within `with opt.perturb():` before opt.step(), or call opt.step(closure)",
                    stacklevel=5,
                )


def _any_grad(groups: list[dict[str, Any]]) -> bool:
    return any(p.grad is not None for group in groups for p in group["params"])


def _changes_weights(groups: list[dict[str, Any]]) -> bool:
    """False if every learning rate is 0: torch.distributed.checkpoint takes such a step to create the state, and it
    must not count, or saving would shift ``interval``."""
    rates = [group.get("lr", 1.0) for group in groups]
    return any(isinstance(lr, Tensor) or lr != 0.0 for lr in rates)


@torch.no_grad()
def _accumulate(total: dict[Tensor, Tensor], grads: dict[Tensor, Tensor]) -> None:
    for p, grad in grads.items():
        total[p] = total[p].add_(grad) if p in total else grad
