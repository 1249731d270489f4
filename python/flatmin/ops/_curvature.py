"""Averages of a diagonal curvature, and PACGen of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_finite, check_fraction, check_size, is_number
from ._codes import source_code
from ._dispatch import empty_key, run, scalar

__all__ = ["curvature_", "pacgen"]


def lipschitz_of(value: float | Tensor | Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Per-element tensors (or none) and the constant that multiplies them."""
    if isinstance(value, Tensor):
        return [], scalar(value, device)
    if is_number(value):
        check_size("lipschitz", value)
        return [], scalar(value, device)  # type: ignore[arg-type]
    if isinstance(value, str):
        raise TypeError(f"lipschitz: {value!r} given; give a number or tensors")
    tensors = list(value)  # type: ignore[arg-type]
    if not tensors:
        raise ValueError("lipschitz: an empty list given; give one tensor for each parameter, or a number")
    return tensors, scalar(1.0, device)


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
    code = source_code(source)
    check_fraction("decay", decay)
    check_fraction("lipschitz_decay", lipschitz_decay)
    check_size("min_step", min_step)
    check_finite("source_scale", source_scale)
    if source == "probed" and key is None:
        raise ValueError("key: missing, but source='probed' regenerates a probe from it")
    if bool(params) != (backup is not None):
        raise ValueError("params and backup: quotients need both, an average alone needs neither")
    if not curvatures:
        return torch.zeros((), dtype=torch.float64)
    device = curvatures[0].device
    largest: Tensor = run(
        "curvature_",
        curvatures=curvatures,
        sources=sources,
        lipschitz=list(lipschitz),
        params=list(params),
        backup=torch.empty(0, dtype=torch.uint8, device=device) if backup is None else backup,
        key=empty_key(device) if key is None else key,
        corrections=torch.ones(2, dtype=torch.float64, device=device) if corrections is None else corrections,
        source=code,
        source_scale=source_scale,
        decay=decay,
        lipschitz_decay=lipschitz_decay,
        min_step=min_step,
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
        1``. Products are kept as mantissa and exponent, so no digit is lost however long the sum. NaN or
        infinity in a curvature makes its tensor's Psi NaN.
    """
    check_size("gamma", gamma)
    check_size("eps", eps)
    if not isinstance(curvature_scale, Tensor):
        check_finite("curvature_scale", curvature_scale)
    if not params:
        return torch.zeros(0, 2, dtype=torch.float64)
    device = params[0].device
    per_element, constant = lipschitz_of(lipschitz, device)
    result: Tensor = run(
        "pacgen",
        params=params,
        curvatures=curvatures,
        lipschitz=per_element,
        lipschitz_constant=constant,
        curvature_scale=scalar(curvature_scale, device),
        gamma=gamma,
        eps=eps,
    )
    return result
