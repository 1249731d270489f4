"""The operators, typed and documented: what :class:`flatmin.SAM` is made of, and what a loop of your own can call.

Each function takes whole lists (one call per step, not one per tensor) on one device, runs without host
synchronisation and without a temporary of a parameter's size, and is traced by ``torch.compile(fullgraph=True)``.
CPU tensors go to the C kernels, CUDA tensors to the CUDA kernels where they are built in; complex tensors and other
devices run in plain torch (:mod:`flatmin.reference`), slower and with one warning.

Types: parameters float32, float64, bfloat16 or float16, mixed freely; gradients of the parameter's type or float32,
optimizer state of the parameter's type or float32. Arithmetic is float32 (float64 for float64), sums are float64.
Any strides, though what is written must not overlap; a gradient whose strides differ from its parameter's takes a
slower path to the same result. Bad input raises ``RuntimeError`` (``ValueError`` for options) that names the argument,
before anything is written. Version counters of what an operator writes go up before it runs, while it is in the cache:
after the streams of 5 M parameters it would cost 0.2 ms to find 213 of them again.

A minimal step::

    backup = ops.backup_like(params)
    norm = ops.sam_norm_ascend_(params, grads, backup, rho=0.05)
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

from .. import reference
from .._checks import check_finite_radius
from .._devices import on_device
from . import _library
from ._labels import corrupt_labels, draw_samples

__all__ = [
    "backup_like",
    "corrupt_labels",
    "curvature_",
    "draw_samples",
    "filter_norm",
    "norm",
    "pacgen",
    "probe_",
    "random_key",
    "restore_",
    "restore_adam_",
    "restore_adam_curvature_",
    "restore_sgd_",
    "restore_sgd_curvature_",
    "sam_ascend_",
    "sam_norm_ascend_",
    "scaled_noise_",
    "ties",
]

_SCALING = {
    False: reference.NONE,
    True: reference.ASAM,
    "asam": reference.ASAM,
    "davda54": reference.DAVDA54,
    "big_vision": reference.BIG_VISION,
}
_LAWS = {
    "uniform": reference.UNIFORM,
    "normal": reference.NORMAL,
    "truncated_normal": reference.TRUNCATED,
    "rademacher": reference.RADEMACHER,
}
_SOURCES = {"square": reference.SQUARE, "plain": reference.PLAIN, "probed": reference.PROBED}
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
    if device in _library.DEVICES:
        try:
            return _library.OPERATORS[name](tensors, *args)
        except RuntimeError:
            if not any(map(Tensor.is_complex, tensors)):
                raise
    reason = "complex parameters" if device in _library.DEVICES else f"{device} tensors"
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


def _count_versions(*lists: Sequence[Tensor]) -> None:
    for tensors in lists:
        increment_version(tensors)


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
    check_finite_radius(rho)
    if not params:
        return
    ascent = _ascent(params[0].device, rho, key, q, adaptive, eta, eps)
    _count_versions(params, [backup])
    _run("sam_ascend_", params, grads, backup, norm, *ascent)


@torch.no_grad()
def sam_norm_ascend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Tensor,
    rho: float | Tensor,
    *,
    q: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.01,
    eps: float = 1e-12,
    key: Tensor | None = None,
) -> Tensor:
    """:func:`norm` of ``grads`` and :func:`sam_ascend_` by it, where the list is the whole perturbed set.

    One crossing from Python instead of two: 0.4 ms of a step of EfficientNet-B0. Arguments are those of
    :func:`sam_ascend_`, with ``q`` finite. Where the gradients have the strides and types of their parameters, the
    bits are those of the two calls.

    Returns:
        The norm: float64 0-dim tensor on the device of ``params``.
    """
    check_finite_radius(rho)
    if not params:
        return torch.zeros((), dtype=torch.float64)
    ascent = _ascent(params[0].device, rho, key, q, adaptive, eta, eps)
    _count_versions(params, [backup])
    result: Tensor = _run("sam_norm_ascend_", params, grads, backup, *ascent)
    return result


def _ascent(
    device: torch.device,
    rho: float | Tensor,
    key: Tensor | None,
    q: float,
    adaptive: bool | str,
    eta: float,
    eps: float,
) -> tuple[Any, ...]:
    """What the raw operators of an ascent take behind the tensors."""
    key = torch.empty(0, dtype=torch.uint64, device=device) if key is None else key
    return _scalar(rho, device), key, q, scaling_code(adaptive), eta, eps


@torch.no_grad()
def restore_(params: Sequence[Tensor], backup: Tensor) -> None:
    """Copy the bytes that :func:`sam_ascend_` saved back into ``params``, the same list in the same order."""
    if not params:
        return
    _count_versions(params)
    _run("restore_", params, backup)


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
    _count_versions(params, momentum_buffers)
    _run(
        "restore_sgd_",
        params,
        grads,
        momentum_buffers,
        backup,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first_step,
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
    _count_versions(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    _run(
        "restore_adam_",
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
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


# ---- noise by curvature: PACGen and Perturbed OPT ----


def _code(name: str, value: str, codes: dict[str, int]) -> int:
    if value not in codes:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, codes))}")
    return codes[value]


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: {value} given; give a finite float >= 0")


def random_key(seed: int, draw: int = 0, stream: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The key of a draw: uint64[2], the seed, and the draw in the lower with the stream in the upper 32 bits.

    Every random number of flatmin is a function of the key, the position of the tensor in its list and the position of
    the element in memory order (Philox4x32-10, Salmon et al. 2011): not of threads, instruction set or device. Draws
    and streams (one for each list, or for each rank, below 2^16) are independent. A key on a GPU can be advanced there
    (``key.view(torch.int32)[2].add_(1)``), so that a captured CUDA graph draws anew at each replay.
    """
    if not (0 <= seed < 2**64 and 0 <= draw < 2**32 and 0 <= stream < 2**16):
        raise ValueError(
            f"random_key: seed {seed}, draw {draw}, stream {stream} given; they take 64, 32 and 16 bits and are not "
            "negative"
        )
    return on_device(torch.tensor([seed, stream << 32 | draw], dtype=torch.uint64), torch.device(device or "cpu"))


def _lipschitz(value: float | Tensor | Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Per-element tensors (or none) and the constant that multiplies them."""
    if isinstance(value, Tensor | float | int):
        return [], _scalar(value, device)
    return list(value), _scalar(1.0, device)


@torch.no_grad()
def scaled_noise_(
    params: Sequence[Tensor],
    backup: Tensor,
    key: Tensor,
    *,
    law: str = "uniform",
    scale: float | Tensor = 1.0,
    gamma: float = 0.0,
    eps: float = 0.0,
    curvatures: Sequence[Tensor] | None = None,
    sizes: Sequence[Tensor] | None = None,
    lipschitz: float | Tensor | Sequence[Tensor] = 0.0,
    curvature_scale: float | Tensor = 1.0,
) -> Tensor:
    """Save the parameters and add independent noise ``sigma_i xi_i`` of a size of its own to each element.

    The size is, with ``N_i = gamma |w_i| + eps``, one of

    * ``sigma_i = min(scale / sqrt(c_i), N_i)``, ``c_i = max(curvature_scale h_i + rho_i N_i, 0)``, where
      ``curvatures`` holds ``h`` and ``lipschitz`` is rho: more noise along flat directions (Wang et al. 2018, arXiv
      1809.07402);
    * ``scale sizes_i``, where ``sizes`` is given: per filter (LPF-SGD, RWP) or per tensor by expanded views of
      :func:`filter_norm`;
    * ``scale N_i`` otherwise: isotropic (``eps=1``) or multiplicative (``gamma=1``) noise.

    Args:
        params: changed in place. Their old bytes go to ``backup``; :func:`restore_` brings them back.
        backup: from :func:`backup_like`.
        key: from :func:`random_key`. The noise is drawn in registers and never stored.
        law: of ``xi``: "uniform" on (-1, 1); "normal"; "truncated_normal", the normal law of ``sigma_i xi_i`` cut at
            ``N_i`` (at ``sigma_i`` where the size is not from curvatures); "rademacher", +1 or -1.
        scale: float or 0-dim tensor; >= 0 with ``curvatures``; 0 moves nothing. The negative of a scale gives the other
            side of ``w``, as central differences need it.
        gamma, eps: >= 0; the neighbourhood ``N_i``.
        curvatures: like ``params``, of their types or float32.
        sizes: like ``params``, of their types or float32; any strides, overlapping ones too.
        lipschitz: Hessian-Lipschitz constant rho >= 0: float, 0-dim tensor, or a list like ``params``.
        curvature_scale: multiplies ``curvatures``: the bias correction of an average.

    Returns:
        float64[3]: the sum of ``sigma_i``, how many are capped at ``N_i``, and how many are not finite because a
        curvature is not. The weights of the last keep their bits: no NaN ever reaches a weight this way.
    """
    if curvatures is not None and sizes is not None:
        raise ValueError("curvatures and sizes: both given, but the size of the noise comes from one of them")
    law_code = _code("law", law, _LAWS)
    _not_negative(gamma=gamma, eps=eps)
    if isinstance(scale, float | int) and (curvatures is not None or not math.isfinite(scale)):
        _not_negative(scale=scale)
    if not params:
        return torch.zeros(3, dtype=torch.float64)
    device = params[0].device
    sizing = reference.CURVATURE if curvatures is not None else reference.NEIGHBOURHOOD
    sizing = reference.GIVEN if sizes is not None else sizing
    per_element, constant = _lipschitz(lipschitz, device)
    _count_versions(params, [backup])
    tally: Tensor = _run(
        "scaled_noise_",
        params,
        list(curvatures or sizes or ()),
        per_element,
        backup,
        key,
        _scalar(scale, device),
        constant,
        _scalar(curvature_scale, device),
        sizing,
        law_code,
        gamma,
        eps,
    )
    return tally


@torch.no_grad()
def probe_(tensors: Sequence[Tensor], key: Tensor, *, law: str = "rademacher") -> None:
    """Fill with independent draws of mean 0 and size 1: "rademacher", "normal" or "uniform", as in
    :func:`scaled_noise_`. The same key gives :func:`curvature_` and :func:`scaled_noise_` the same draws, so a probe
    need not be kept."""
    if law == "truncated_normal":
        raise ValueError("law: 'truncated_normal' has no size without a cut; give 'rademacher', 'normal' or 'uniform'")
    law_code = _code("law", law, _LAWS)
    if tensors:
        _count_versions(tensors)
        _run("probe_", tensors, key, law_code)


@torch.no_grad()
def curvature_(
    curvatures: Sequence[Tensor],
    sources: Sequence[Tensor],
    *,
    decay: float,
    source: str = "square",
    source_scale: float = 1.0,
    key: Tensor | None = None,
    params: Sequence[Tensor] = (),
    backup: Tensor | None = None,
    corrections: Tensor | None = None,
    lipschitz: Sequence[Tensor] = (),
    lipschitz_decay: float = 0.0,
    min_step: float = 0.0,
) -> Tensor:
    """Average a diagonal curvature: ``h <- decay h + (1 - decay) source_scale x'``.

    Args:
        curvatures: ``h``, changed in place.
        sources: ``x``, of any floating type.
        decay: in [0, 1]; 1 - 1/k in the k-th call makes the mean.
        source: ``x'`` is ``x^2`` ("square": gradients, squared), ``x`` ("plain"), or ``v x`` ("probed": Hutchinson's
            estimate from ``x = H v`` with the Rademacher probe ``v`` of ``key``).
        key: of the probe.
        params, backup: with both, the difference quotients ``q_i = |k' h'_i - k h_i| / |w'_i - w_i|`` of the Hessian's
            diagonal are taken between ``w`` in ``backup`` and ``w'`` in ``params`` (arXiv 1809.07402, algorithms of
            its section 5), where the weight moved by more than ``min_step``.
        corrections: float64[2], the bias corrections ``(k, k')`` of ``h`` before and after; ``k = 0`` says that ``h``
            held nothing before, and there is no quotient yet. Default (1, 1).
        lipschitz: per-element averages of the quotients, changed in place: ``lipschitz_decay rho_i + (1 -
            lipschitz_decay) q_i`` where there is a quotient.

    Returns:
        The largest quotient, float64 0-dim; 0 without any, NaN if an average is not finite any more.
    """
    source_code = _code("source", source, _SOURCES)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: {decay} given; give a float from 0 to 1")
    if source == "probed" and key is None:
        raise ValueError("key: missing, but source='probed' regenerates a probe from it")
    if bool(params) != (backup is not None):
        raise ValueError("params and backup: quotients need both, an average alone needs neither")
    if not curvatures:
        return torch.zeros((), dtype=torch.float64)
    device = curvatures[0].device
    _count_versions(curvatures, lipschitz)
    largest: Tensor = _run(
        "curvature_",
        curvatures,
        sources,
        list(lipschitz),
        list(params),
        torch.empty(0, dtype=torch.uint8, device=device) if backup is None else backup,
        torch.empty(0, dtype=torch.uint64, device=device) if key is None else key,
        torch.ones(2, dtype=torch.float64, device=device) if corrections is None else corrections,
        source_code,
        source_scale,
        decay,
        lipschitz_decay,
        min_step,
    )
    return largest


@torch.no_grad()
def restore_sgd_curvature_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: Sequence[Tensor],
    backup: Tensor,
    lr: float | Tensor,
    corrections: Tensor,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    decay: float = 0.999,
    lipschitz_decay: float = 0.1,
    min_step: float = 0.0,
) -> Tensor:
    """:func:`restore_sgd_` and :func:`curvature_` of the squared gradients in one pass: the old and the new weight and
    curvature are in registers together, so neither is kept for the difference quotient. Returns the largest quotient.
    """
    if not params:
        return torch.zeros((), dtype=torch.float64)
    _count_versions(params, momentum_buffers, curvatures, lipschitz)
    largest: Tensor = _run(
        "restore_sgd_curvature_",
        params,
        grads,
        list(momentum_buffers),
        curvatures,
        list(lipschitz),
        backup,
        _scalar(lr, params[0].device),
        corrections,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        first_step,
        decay,
        lipschitz_decay,
        min_step,
    )
    return largest


@torch.no_grad()
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
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    decay: float = 0.999,
    lipschitz_decay: float = 0.1,
    min_step: float = 0.0,
) -> Tensor:
    """:func:`restore_adam_` and :func:`curvature_` of the squared gradients in one pass; see
    :func:`restore_sgd_curvature_`."""
    if not params:
        return torch.zeros((), dtype=torch.float64)
    _count_versions(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, curvatures, lipschitz)
    largest: Tensor = _run(
        "restore_adam_curvature_",
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        list(max_exp_avg_sqs),
        steps,
        curvatures,
        list(lipschitz),
        backup,
        _scalar(lr, params[0].device),
        corrections,
        beta1,
        beta2,
        eps,
        weight_decay,
        decoupled,
        amsgrad,
        maximize,
        decay,
        lipschitz_decay,
        min_step,
    )
    return largest


@torch.no_grad()
def pacgen(
    params: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    *,
    gamma: float = 0.1,
    eps: float = 0.1,
    lipschitz: float | Tensor | Sequence[Tensor] = 0.0,
    curvature_scale: float | Tensor = 1.0,
) -> Tensor:
    """The PACGen metric ``Psi = sum_i log((|w_i| + N_i) max(sqrt(c_i), 1 / N_i))`` of each tensor, one pass.

    ``N_i = gamma |w_i| + eps``, ``c_i = max(curvature_scale h_i + rho_i N_i, 0)`` (Wang et al. 2018, arXiv 1809.07402;
    the constants as reconstructed from its bound). Psi is a sum over all scalars: compare it within one architecture.

    Returns:
        float64 of shape (len(params), 2): Psi of each tensor, and how many of its elements are capped, ``c_i N_i^2 <=
        1``. Products are kept as mantissa and exponent, so no digit is lost however long the sum. NaN in a curvature
        makes its tensor's Psi NaN.
    """
    _not_negative(gamma=gamma, eps=eps)
    if not params:
        return torch.zeros(0, 2, dtype=torch.float64)
    device = params[0].device
    per_element, constant = _lipschitz(lipschitz, device)
    result: Tensor = _run(
        "pacgen", params, curvatures, per_element, constant, _scalar(curvature_scale, device), gamma, eps
    )
    return result


@torch.no_grad()
def filter_norm(tensors: Sequence[Tensor], *, whole: bool = False) -> list[Tensor]:
    """The 2-norm of each filter: for each tensor a float64 tensor that broadcasts against it.

    A filter is an index of the first dimension (Bisla et al. 2022, arXiv 2201.08025); tensors of fewer than two
    dimensions, and all with ``whole``, have one norm (Wu et al. 2020, arXiv 2004.05884).
    """
    if not tensors:
        return []
    flat: Tensor = _run("filter_norm", tensors, whole)
    counts = [1 if whole or t.dim() < 2 else t.shape[0] for t in tensors]
    shapes = [(count,) + (1,) * (t.dim() - 1) if t.dim() else () for t, count in zip(tensors, counts, strict=True)]
    return [part.view(shape) for part, shape in zip(torch.split(flat, counts), shapes, strict=True)]
