"""Sharpness-aware minimization around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..._checks import check_radius, check_size, plain
from .._arguments import build_base, share_arguments
from .._two_pass import TwoPass
from ._ascent import AscentSet, kinds_of
from ._options import check_options, check_scaling, refuse_plain_rho

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SAM"]


class SAM(TwoPass):
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
            group whose ``sam_rho`` is 0 is neither moved nor part of the norm. Groups with equal options are one list
            to the operators: same bits and same speed as one group.
        adaptive: True or "asam" scales ``e`` by ``T = |w| + eta`` for parameters of more than one dimension,
            "davda54" by ``|w|`` for all, "big_vision" by ``|w|`` with the norm of the plain gradient. Per group:
            ``sam_adaptive``.
        eta: offset of ASAM's scaling, >= 0. Per group: ``sam_eta``.
        eps: added to the norm, >= 0.
        p: norm of the radius, 1 to inf. It spans every perturbed parameter, whatever its group or device.
        model: module whose buffers should count the first pass only: BatchNorm's statistics, spectral norm's vectors,
            the ranges of quantization's observers. What the second pass writes to a buffer is undone.
        exempt_buffers: names or patterns (``"*.calls"``), as in ``model.named_buffers()``, of buffers that both passes
            may write to.
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
        base_kwargs: arguments of ``base``. A name that both have is the base's: ``SAM(params, AdamW, eps=1e-4)`` gives
            it to AdamW, and ``sam_eps=`` is SAM's. ``rho`` with Adadelta, which has one too, must be ``sam_rho=``.

    Attributes:
        base: the wrapped optimizer.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
    """

    _set: AscentSet
    group_checks: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {
        "sam_rho": check_radius,
        "sam_adaptive": check_scaling,
        "sam_eta": check_size,
    }

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
        exempt_buffers: Sequence[str] = (),
        same_rng: bool = False,
        rounding: str = "nearest",
        sync: str | ProcessGroup = "local",
        interval: int = 1,
        start: int = 0,
        base_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        **base_kwargs: Any,
    ) -> None:
        if base is not None and base_optimizer is not None:
            raise TypeError("base and base_optimizer: both given, but they are two names of one argument")
        base = base or base_optimizer
        passes: dict[str, Any] = {"model": model, "exempt_buffers": exempt_buffers, "same_rng": same_rng}
        passes |= {"interval": interval, "start": start}
        own: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "eta": eta, "eps": eps, "p": p, "rounding": rounding}
        own |= {"sync": sync} | passes
        share_arguments(SAM.__init__, "sam_", own, base, base_kwargs)
        check_options(**own)
        own = {name: plain(value) for name, value in own.items()}
        optimizer = build_base(type(self).__name__, optimizer_or_params, base, base_kwargs)
        refuse_plain_rho(optimizer)
        scaling = True if own["adaptive"] == "asam" else own["adaptive"]
        group_defaults = {"sam_rho": own["rho"], "sam_adaptive": scaling, "sam_eta": own["eta"]}
        if own["rounding"] == "stochastic":
            group_defaults |= {"sam_seed": torch.initial_seed(), "sam_ascents": 0}
        # A direction is of one group; and a group's random numbers do not depend on the others' options.
        merges = type(self).direction is SAM.direction and own["rounding"] == "nearest"
        ascent = AscentSet(own["p"], own["eps"], own["sync"], merges)
        super().__init__(optimizer, group_defaults, ascent, **{name: own[name] for name in passes})

    @property
    def last_norm(self) -> Tensor | None:
        """Norm of the gradient at the last ascent: a 0-dim tensor, read without synchronisation; None before."""
        return self._set.norm

    # -- what a relative of SAM may say otherwise -----------------------------------------------------------------

    def direction(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the ascent follows, for parameters of one group on one device: here their gradients.

        Args:
            params: those that are about to move; of DTensors the local shards.
            grads: their gradients, not to be changed.

        Returns:
            Tensors like ``grads``. The radius is measured on them.
        """
        return grads

    def radius(self, group: dict[str, Any]) -> float | Tensor:
        """The radius of a group at this step."""
        rho: float | Tensor = group["sam_rho"]
        return rho

    # -- what TwoPass asks ----------------------------------------------------------------------------------------

    def _can_move(self, group: dict[str, Any]) -> bool:
        """A tensor counts: only the device knows its value."""
        rho = self.radius(group)
        return isinstance(rho, Tensor) or rho != 0.0

    def _move(self) -> bool:
        refuse_plain_rho(self.base)
        groups = self._groups()
        radii = list(map(self.radius, groups))
        return self._set.ascend(groups, self._keys(), radii, self.direction, self._next_key())

    def _keys(self) -> tuple[str, ...]:
        return tuple(key for key in super()._keys() if key != "sam_rho")

    def _kinds(self) -> list[Any]:
        return kinds_of(list(map(self.radius, self._groups())))

    def _next_key(self) -> tuple[int, int] | None:
        """Seed and number of the ascent, for stochastic rounding."""
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
