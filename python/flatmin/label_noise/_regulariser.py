"""What label-noise SGD minimises besides the loss (Damian, Ma and Lee 2021, arXiv 2106.06530)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import curvature
from .._checks import check_int, check_one_of, check_size
from ..curvature._measurement import LossFn

__all__ = ["Regulariser", "effective_lambda", "regulariser"]


@dataclass(frozen=True)
class Regulariser:
    """R(theta) and what it was made of.

    Attributes:
        value: R, in units of the loss over lambda; infinite where ``lr lambda_1 >= 2``.
        stderr: its standard error over the probes; 0 where it is exact or infinite.
        lambda_1: the largest eigenvalue of the Hessian.
        trace: of the Hessian; ``trace / 4`` is R in the limit of small rates.
        lr: the rate.
        method: "exact" or "slq".
    """

    value: float
    stderr: float
    lambda_1: float
    trace: float
    lr: float
    method: str

    def __repr__(self) -> str:
        error = f" +- {self.stderr:.2g}" if self.stderr else ""
        return (
            f"Regulariser ({self.method}): R = {self.value:.6g}{error} at lr {self.lr:g}; trace / 4 = "
            f"{self.trace / 4.0:.6g}, lr lambda_1 = {self.lr:g} * {self.lambda_1:.6g} = {self.lr * self.lambda_1:.4g}"
        )


def effective_lambda(lr: float, sigma: float, batch_size: int) -> float:
    """``lambda = lr sigma^2 / B``: label-noise SGD follows the loss plus lambda R(theta).

    Args:
        lr: the rate > 0.
        sigma: standard deviation of the noise on regression targets; 1 for binary logistic regression, where noise and
            Hessian agree at the optimum of the smoothed loss.
        batch_size: B >= 1.
    """
    _check_rate(lr)
    check_size("sigma", sigma)
    check_int("batch_size", batch_size, 1)
    return lr * sigma**2 / batch_size


def _check_rate(lr: Any) -> None:
    check_size("lr", lr)
    if lr == 0.0:
        raise ValueError("lr: 0 given; give a learning rate > 0 (R tends to a quarter of the Hessian's trace)")


def _penalty(eigenvalues: Tensor, lr: float) -> Tensor:
    return -torch.log1p(-0.5 * lr * eigenvalues) / (2.0 * lr)


def regulariser(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    lr: float,
    *,
    params: Iterable[Tensor] | None = None,
    method: str = "auto",
    exact_limit: int = 500,
    probes: int = 10,
    steps: int = 50,
    seed: int = 0,
    progress: bool | None = None,
) -> Regulariser:
    """``R(theta) = -1 / (2 lr) trace log(I - lr H / 2)`` with H the Hessian of the mean loss.

    SGD with fresh label noise follows the gradient of the loss plus lambda R, with lambda of :func:`effective_lambda`
    (Damian, Ma and Lee 2021, arXiv 2106.06530). R tends to ``trace H / 4`` for small rates, weighs large eigenvalues
    more than the trace does, and is infinite from ``lr lambda_1 = 2`` on, where gradient descent is unstable.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        lr: the learning rate > 0 of plain SGD.
        method: "exact", all eigenvalues of the Hessian, which takes one product for each parameter; "slq", stochastic
            Lanczos quadrature; "auto", "exact" up to ``exact_limit`` parameters.
        probes, steps, seed: of the quadrature, as in :func:`flatmin.curvature.spectral_density`.

    Returns:
        :class:`Regulariser`. Where it is infinite a ``RuntimeWarning`` names the eigenvalue.

    Raises:
        RuntimeError: an operator of the model cannot be differentiated twice.
        TypeError, ValueError: an argument cannot be used; the message names it.
    """
    _check_rate(lr)
    check_one_of("method", method, ("auto", "exact", "slq"))
    check_int("exact_limit", exact_limit, 0)
    with curvature.linear_operator(model, loss_fn, data, params=params, progress=progress) as A:
        n = A.shape[0]
        exact = method == "exact" or (method == "auto" and n <= exact_limit)
        if exact:
            columns = [A @ column for column in torch.eye(n, dtype=A.work_dtype, device=A.device)]
            hessian = torch.stack(columns).to("cpu", torch.float64)
            values = torch.linalg.eigvalsh(0.5 * (hessian + hessian.T))
            lambda_1, trace = float(values[-1]), float(values.sum())
        else:
            density = curvature.spectral_density(A, probes=probes, steps=steps, seed=seed)
            # a node is never above the largest eigenvalue, which Lanczos bounds from both sides
            lambda_1 = max(curvature.eigenvalues(A, k=1, seed=seed).lambda_1, density.range[1])
            trace = density.trace_of(lambda x: x).value
    name = "exact" if exact else "slq"
    if lr * lambda_1 >= 2.0:
        warnings.warn(
            f"regulariser: lr lambda_1 = {lr:g} * {lambda_1:.6g} = {lr * lambda_1:.4g} is 2 or more, so R is infinite: "
            f"gradient descent is unstable here above lr = {2.0 / lambda_1:.4g}",
            RuntimeWarning,
            stacklevel=2,
        )
        return Regulariser(math.inf, 0.0, lambda_1, trace, lr, name)
    if exact:
        return Regulariser(float(_penalty(values, lr).sum()), 0.0, lambda_1, trace, lr, name)
    estimate = density.trace_of(partial(_penalty, lr=lr))
    return Regulariser(estimate.value, estimate.stderr, lambda_1, trace, lr, name)
