"""Restore and base step in one pass, with or without averages of a curvature beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .._checks import check_fraction, check_size
from ._dispatch import run, scalar

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Averages",
    "restore_adam_",
    "restore_adam_curvature_",
    "restore_lion_",
    "restore_sgd_",
    "restore_sgd_curvature_",
]


class Averages(TypedDict, total=False):
    """What every restore-and-step operator can keep beside its step, as keywords.

    They are those of :func:`curvature_` of the squared gradients, over the displacement of the step: the old and the
    new weight and curvature are in registers together, so that neither is kept for the difference quotient.

    Attributes:
        curvatures: ``h`` of the parameters, float32 or of their types, changed in place; none of them by default. The
            parameters must be of more than 16 bits, which are too few for the displacement of a step.
        lipschitz: per-element averages of the quotients, changed in place; may be empty.
        corrections: float64[2], the bias corrections of ``h`` before and after.
        decay: of ``h``, in [0, 1]; 0.999.
        lipschitz_decay: of the quotients, in [0, 1]; 0.1.
        min_step: quotients are taken where a weight moved by more; 0.
    """

    curvatures: Sequence[Tensor]
    lipschitz: Sequence[Tensor]
    corrections: Tensor
    decay: float
    lipschitz_decay: float
    min_step: float


def _step(name: str, lr: float | Tensor, averages: Averages, arguments: dict[str, Any]) -> Tensor:
    """Call a restore-and-step operator with ``arguments`` and what every one of them takes."""
    params = arguments["params"]
    beside = _averages(averages) if averages else _NO_AVERAGES
    if not params:
        return torch.zeros(() if beside["curvatures"] else 0, dtype=torch.float64)
    rate = scalar(lr, params[0].device)
    arguments["lr"] = arguments["corrections"] = rate  # the second is not looked at without curvatures
    arguments.update(beside)
    largest: Tensor = run(name, **arguments)
    return largest


_NO_AVERAGES: dict[str, Any] = {
    "curvatures": (),
    "lipschitz": (),
    "decay": 0.0,
    "lipschitz_decay": 0.0,
    "min_step": 0.0,
}


def _averages(given: Averages) -> dict[str, Any]:
    """What the raw operators take of it."""
    unknown = given.keys() - Averages.__annotations__
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: not an option of this operator")
    check_fraction("decay", given.get("decay", 0.0))
    check_fraction("lipschitz_decay", given.get("lipschitz_decay", 0.0))
    check_size("min_step", given.get("min_step", 0.0))
    curvatures, lipschitz = list(given.get("curvatures", ())), list(given.get("lipschitz", ()))
    if lipschitz and not curvatures:
        raise ValueError("lipschitz: given without curvatures; give both, or none")
    if curvatures and "corrections" not in given:
        raise ValueError("corrections: missing, but averages of curvatures have a bias; give float64[2]")
    beside: dict[str, Any] = _NO_AVERAGES | {"decay": 0.999, "lipschitz_decay": 0.1} | given
    return beside | {"curvatures": curvatures, "lipschitz": lipschitz}


@torch.no_grad()
def restore_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    backup: Tensor,
    lr: float | Tensor,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    **averages: Unpack[Averages],
) -> Tensor:
    """Restore and take one step of :class:`torch.optim.SGD` from there, in one pass over memory.

    ``grads`` are those at ``w + e``. ``momentum_buffers`` is empty if ``momentum`` is 0; with ``first_step`` their
    content is not read but set to the gradient, as torch does. float32 and float64 give the bits of ``restore_``
    followed by ``SGD.step()`` on machines with fused multiply-add.

    Args:
        backup: what an ascent saved; an empty one (``backup[:0]``) steps from the weights as they are.
        lr: a number for all parameters; or float64[n, 2], a rate and a weight decay for each, in place of
            ``weight_decay``.
        averages: curvatures to average beside the step, see :class:`Averages`.

    Returns:
        The largest difference quotient, float64 0-dim; without curvatures an empty tensor.
    """
    return _step(
        "restore_sgd_",
        lr,
        averages,
        {
            "params": params,
            "grads": grads,
            "momentum_buffers": momentum_buffers,
            "backup": backup,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "first_step": first_step,
        },
    )


@torch.no_grad()
def restore_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    backup: Tensor,
    lr: float | Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    **averages: Unpack[Averages],
) -> Tensor:
    """Restore and take one step of :class:`torch.optim.Adam` (AdamW if ``decoupled``), in one pass over memory.

    ``steps`` are float32 0-dim tensors on the CPU as in the optimizer's state, one per parameter, and are incremented
    by the host: a captured CUDA graph would replay one bias correction.
    ``max_exp_avg_sqs`` is empty unless ``amsgrad``. Agrees with torch to 1e-6 (float32) and 1e-12 (float64) relative:
    torch itself gives other bits in its foreach, fused and single-tensor forms.

    Args:
        backup: what an ascent saved; an empty one (``backup[:0]``) steps from the weights as they are.
        lr: a number for all parameters; or float64[n, 2], a rate and a weight decay for each, in place of
            ``weight_decay``.
        averages: curvatures to average beside the step, see :class:`Averages`.

    Returns:
        The largest difference quotient, float64 0-dim; without curvatures an empty tensor.
    """
    return _step(
        "restore_adam_",
        lr,
        averages,
        {
            "params": params,
            "grads": grads,
            "exp_avgs": exp_avgs,
            "exp_avg_sqs": exp_avg_sqs,
            "max_exp_avg_sqs": list(max_exp_avg_sqs),
            "steps": steps,
            "backup": backup,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "amsgrad": amsgrad,
            "maximize": maximize,
        },
    )


@torch.no_grad()
def restore_lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    backup: Tensor,
    lr: float | Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    maximize: bool = False,
    **averages: Unpack[Averages],
) -> Tensor:
    """Restore and take one step of Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), in one pass over memory.

    ``w <- w - lr (sign(beta1 m + (1 - beta1) g) + weight_decay w)``, ``m <- beta2 m + (1 - beta2) g`` with ``m`` in
    ``exp_avgs``, as :class:`flatmin.optim.Lion` has it.

    Args:
        backup: what an ascent saved; an empty one (``backup[:0]``) steps from the weights as they are.
        lr: a number for all parameters; or float64[n, 2], a rate and a weight decay for each, in place of
            ``weight_decay``.
        averages: curvatures to average beside the step, see :class:`Averages`.

    Returns:
        The largest difference quotient, float64 0-dim; without curvatures an empty tensor.
    """
    return _step(
        "restore_lion_",
        lr,
        averages,
        {
            "params": params,
            "grads": grads,
            "exp_avgs": exp_avgs,
            "backup": backup,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "maximize": maximize,
        },
    )


def restore_sgd_curvature_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    lr: float | Tensor,
    corrections: Tensor,
    **options: Any,
) -> Tensor:
    """:func:`restore_sgd_` with ``curvatures``: its older name."""
    beside: dict[str, Any] = {"curvatures": curvatures, "lipschitz": lipschitz, "corrections": corrections}
    return restore_sgd_(params, grads, momentum_buffers, backup, lr, **_not_empty(params, beside), **options)


def restore_adam_curvature_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    lr: float | Tensor,
    corrections: Tensor,
    **options: Any,
) -> Tensor:
    """:func:`restore_adam_` with ``curvatures``: its older name."""
    beside: dict[str, Any] = {"curvatures": curvatures, "lipschitz": lipschitz, "corrections": corrections}
    beside = _not_empty(params, beside)
    return restore_adam_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, backup, lr, **beside, **options)


def _not_empty(params: Sequence[Tensor], beside: dict[str, Any]) -> dict[str, Any]:
    if params and not beside["curvatures"]:
        raise ValueError("curvatures: an empty list given; give one for each parameter, or call the step without")
    return beside
