"""The operators, typed and documented: what :class:`flatmin.SAM` is made of, and what a loop of your own can call.

Each function takes whole lists (one call per step, not one per tensor) on one device, runs without host
synchronisation and without a temporary of a parameter's size, and is traced by ``torch.compile(fullgraph=True)``.
CPU tensors go to the C kernels, CUDA tensors to the CUDA kernels where they are built in; complex tensors and other
devices run in plain torch (:mod:`flatmin.reference`), slower and with one warning.

Types: parameters float32, float64, bfloat16 or float16, mixed freely; gradients of the parameter's type or float32,
optimizer state of the parameter's type or float32. Arithmetic is float32 (float64 for float64), sums are float64.
Any strides, though what is written must not overlap; a gradient whose strides differ from its parameter's takes a
slower path to the same result. Bad input raises ``RuntimeError`` (``ValueError`` for options) that names the argument,
before anything is written.

A minimal step::

    backup = ops.backup_like(params)
    norm = ops.norm(grads)
    ops.sam_ascend_(params, grads, backup, norm, rho=0.05)
    ...                                   # second forward and backward at w + e
    ops.restore_(params, backup)          # or restore_sgd_, restore_adam_: restore and step in one pass
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _lib, reference

__all__ = ["backup_like", "norm", "restore_", "restore_adam_", "restore_sgd_", "sam_ascend_", "ties"]

_SCALING = {
    False: reference.NONE,
    True: reference.ASAM,
    "asam": reference.ASAM,
    "davda54": reference.DAVDA54,
    "big_vision": reference.BIG_VISION,
}
_warned: set[str] = set()


def scaling_code(adaptive: bool | str) -> int:
    """The integer that the raw operators take for an ``adaptive`` convention; ``ValueError`` for an unknown one."""
    if adaptive not in _SCALING:
        raise ValueError(f"adaptive: {adaptive!r} is none of False, True, 'asam', 'davda54', 'big_vision'")
    return _SCALING[adaptive]


def dual_exponent(p: float) -> float:
    """``q`` with 1/p + 1/q = 1, for a radius measured in the p-norm; ``ValueError`` unless 1 <= p <= inf."""
    if not p >= 1.0:
        raise ValueError(f"p: {p} given, but a norm needs 1 <= p <= inf (2.0 is SAM's default)")
    if p == 1.0:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1.0)


def _run(name: str, tensors: Sequence[Tensor], *args: Any) -> Any:
    """``torch.ops.flatmin.<name>`` or, for tensors without a kernel, the reference of the same signature.

    Complex tensors are found by the kernel's refusal: looking for them first would cost 10 us for 213 tensors.
    """
    device = tensors[0].device.type
    if device in _lib.DEVICES:
        try:
            return _lib.OPERATORS[name](tensors, *args)
        except RuntimeError:
            if not any(map(Tensor.is_complex, tensors)):
                raise
    reason = "complex parameters" if device in _lib.DEVICES else f"{device} tensors"
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"flatmin has no kernel for {reason}; running in plain torch, which is slower", stacklevel=4)
    _check_lists(tensors)
    return getattr(reference, name)(tensors, *args)


def _check_lists(tensors: Sequence[Tensor]) -> None:
    for i, t in enumerate(tensors):
        if t.layout != torch.strided:
            raise RuntimeError(f"tensor {i} of the list has layout {t.layout}; give dense tensors (t.to_dense())")
        if not (t.is_floating_point() or t.is_complex()):
            raise RuntimeError(f"tensor {i} of the list has dtype {t.dtype}; give floating-point tensors")


def on_device(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``t`` on ``device``, without making the host wait: except for a copy to the CPU, which reads it at once."""
    return t.to(device=device, dtype=dtype or t.dtype, non_blocking=device.type != "cpu")


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A float64 0-dim tensor on ``device``: the kernels read it there, so a changed value never recompiles."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if isinstance(value, Tensor):
        return on_device(value, device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def backup_like(params: Sequence[Tensor]) -> Tensor:
    """An uninitialised backup for ``params``: one uint8 tensor on their device.

    Keep it from step to step: fresh memory costs page faults (0.25 us per 4 KiB), and a CUDA graph needs one address.
    """
    device = params[0].device if params else torch.device("cpu")
    return torch.empty(reference.backup_nbytes(params), dtype=torch.uint8, device=device)


@torch.no_grad()
def norm(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    *,
    q: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.01,
) -> Tensor:
    """Global norm ``||T(w) g||_q`` over a list, deterministic and free of overflow.

    Args:
        tensors: gradients ``g``, any shapes.
        weights: parameters ``w`` of the same shapes; needed by ``adaptive`` True/"asam" and "davda54" only.
        q: exponent in [1, inf]; for a radius in the p-norm use the dual, ``1/p + 1/q = 1``.
        adaptive: ``T = 1`` (False), ``|w| + eta`` where ``w`` has more than one dimension (True, "asam"; Kwon et al.
            2021, arXiv 2102.11600), ``|w|`` ("davda54"); "big_vision" takes the norm without ``T``.
        eta: ASAM's offset.

    Returns:
        float64 0-dim tensor on the device of ``tensors``: the same bits for every instruction set and thread count.
        Not finite if any element is not. 0 for an empty list.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    result: Tensor = _run("norm", tensors, list(weights), q, scaling_code(adaptive), eta)
    return result


@torch.no_grad()
def ties(
    tensors: Sequence[Tensor],
    norm: Tensor,
    weights: Sequence[Tensor] = (),
    *,
    adaptive: bool | str = False,
    eta: float = 0.01,
) -> Tensor:
    """How many elements of ``|T(w) g|`` equal ``norm``, the maximum (``q = inf``): float64 0-dim.

    A radius in the 1-norm goes to the largest gradient; k exact ties get ``rho / k`` each (the limit of Eq. 2 of
    Foret et al. 2020, arXiv 2010.01412, as p -> 1).
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    result: Tensor = _run("ties", tensors, list(weights), norm, scaling_code(adaptive), eta)
    return result


@torch.no_grad()
def sam_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    norm: Tensor,
    rho: float | Tensor,
    *,
    q: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.01,
    eps: float = 1e-12,
    key: Tensor | None = None,
) -> None:
    """Save the parameters and move them to the adversarial point ``w + e``.

    ``e = rho T sign(g) (|T g| / (norm + eps))^(q-1)``, which for ``q = 2`` is ``rho T^2 g / (norm + eps)``: Eq. 2 of
    Foret et al. 2020 (arXiv 2010.01412). With "big_vision" the inner ``T`` is 1.

    Args:
        params: changed in place. Their old bytes go to ``backup``.
        grads: same shapes, same length.
        backup: from :func:`backup_like`.
        norm: float64 0-dim, from :func:`norm` over every tensor of the perturbed set.
        rho: radius >= 0, float or 0-dim tensor. For ``q = inf`` give ``rho / ties(...)``. The value of a tensor on a
            GPU is unknown to the host, so a negative one is not refused there.
        q: the dual exponent, as given to :func:`norm`.
        adaptive, eta: as given to :func:`norm`.
        eps: added to the norm.
        key: uint64[2] ``(seed, step)``: round 16-bit parameters stochastically with Philox4x32-10, so that steps far
            below half a unit in the last place survive on average. None rounds to nearest.

    If ``rho`` is 0, or ``norm`` or the scale is not finite, the weights keep their bits; they are backed up all the
    same.
    """
    if isinstance(rho, float | int) and not 0.0 <= rho < math.inf:
        raise ValueError(f"rho: {rho} given, but a radius is finite and not negative")
    if not params:
        return
    device = params[0].device
    if key is None:
        key = torch.empty(0, dtype=torch.uint64, device=device)
    rho = _scalar(rho, device)
    _run("sam_ascend_", params, grads, backup, norm, rho, key, q, scaling_code(adaptive), eta, eps)
    increment_version([*params, backup])


@torch.no_grad()
def restore_(params: Sequence[Tensor], backup: Tensor) -> None:
    """Copy the bytes that :func:`sam_ascend_` saved back into ``params``, the same list in the same order."""
    if not params:
        return
    _run("restore_", params, backup)
    increment_version(list(params))


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
) -> None:
    """Restore and take one step of :class:`torch.optim.SGD` from there, in one pass over memory.

    ``grads`` are those at ``w + e``. ``momentum_buffers`` is empty if ``momentum`` is 0; with ``first_step`` their
    content is not read but set to the gradient, as torch does. float32 and float64 give the bits of ``restore_``
    followed by ``SGD.step()`` on machines with fused multiply-add.
    """
    if not params:
        return
    lr = _scalar(lr, params[0].device)
    _run(
        "restore_sgd_",
        params,
        grads,
        list(momentum_buffers),
        backup,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first_step,
    )
    increment_version([*params, *momentum_buffers])


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
) -> None:
    """Restore and take one step of :class:`torch.optim.Adam` (AdamW if ``decoupled``), in one pass over memory.

    ``steps`` are float32 0-dim tensors on the CPU as in the optimizer's state, one per parameter, and are incremented
    by the host: a captured CUDA graph would replay one bias correction.
    ``max_exp_avg_sqs`` is empty unless ``amsgrad``. Agrees with torch to 1e-6 (float32) and 1e-12 (float64) relative:
    torch itself gives other bits in its foreach, fused and single-tensor forms.
    """
    if not params:
        return
    lr = _scalar(lr, params[0].device)
    _run(
        "restore_adam_",
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        list(max_exp_avg_sqs),
        steps,
        backup,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        decoupled,
        amsgrad,
        maximize,
    )
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *steps])
