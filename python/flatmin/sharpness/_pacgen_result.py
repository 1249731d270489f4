"""The numbers that make a PACGen result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..curvature._probes import ScalarEstimate
from ._pac_bayes import Bound

__all__ = ["Layer", "PACGenResult"]


@dataclass(frozen=True)
class Layer:
    """The part of one parameter tensor in :class:`PACGen`.

    Attributes:
        name: as in ``model.named_parameters()``.
        size: number of elements.
        psi: its terms of the metric, in nats.
        capped: share of its elements whose noise is capped at the neighbourhood N_i.
        curvature: mean of H_ii.
        curvature_stderr: root mean square of the standard errors of the single H_ii; None if they are not known.
        curvature_mean_stderr: standard error of ``curvature``, from its values over the samples; None if not known.
        psi_stderr: standard error of ``psi``, see :attr:`PACGenResult.psi_stderr`.
    """

    name: str
    size: int
    psi: float
    capped: float
    curvature: float
    curvature_stderr: float | None
    curvature_mean_stderr: float | None = None
    psi_stderr: float | None = None


@dataclass(frozen=True, eq=False)
class PACGenResult:
    """What :func:`flatmin.pacgen` found: the numbers of a :class:`flatmin.PACGen`.

    Attributes:
        psi: the metric, in nats: a sum over all parameters, so compare it within one architecture.
        layers: its parts, one for each parameter tensor.
        size: number of parameters, m.
        samples: number of samples in the data, n.
        capped: share of the parameters whose noise is capped at N_i.
        curvature: H_ii, tensors like the parameters.
        curvature_stderr: standard errors of ``curvature``; None if they are not known.
        curvature_source: how H_ii was found.
        lipschitz: the Hessian-Lipschitz constant rho, or one for each element.
        lipschitz_source: how it was found.
        training_loss: mean loss over the data at the weights.
        uniform: the bound for uniform noise at its best size and eta.
        truncated_normal: the same for truncated normal noise.
        sharpness: sampled ``E_u L(w + u) - L(w)`` under the noise of ``uniform``; None if there were no draws.
        gamma, eps, sqrt_m, delta: as given.
        psi_stderr: standard error of ``psi`` from that of the curvature, to first order, rho taken as it is; None if
            it is not known. It is an upper bound: how the errors of two elements go together is not known. For
            "hutchinson" they add at most a factor sqrt(2), ``sqrt(2 sum_i (se_i / (2 c_i))^2)`` over the weights that
            are not capped; else they may all be one, ``sum_i se_i / (2 c_i)``.
        curvature_mean: mean of H_ii over all parameters.
        curvature_mean_stderr: its standard error; None if it is not known.
    """

    psi: float
    layers: tuple[Layer, ...] = field(repr=False)
    size: int
    samples: int
    capped: float
    curvature: list[Tensor] = field(repr=False)
    curvature_stderr: list[Tensor] | None = field(repr=False)
    curvature_source: str
    lipschitz: float | list[Tensor] = field(repr=False)
    lipschitz_source: str
    training_loss: float
    uniform: Bound
    truncated_normal: Bound
    sharpness: ScalarEstimate | None
    gamma: float
    eps: float
    sqrt_m: bool
    delta: float
    psi_stderr: float | None = None
    curvature_mean: float = math.nan
    curvature_mean_stderr: float | None = None

    @property
    def bound_uniform(self) -> float:
        """The bound for uniform noise."""
        return self.uniform.value

    @property
    def bound_truncated_normal(self) -> float:
        """The bound for truncated normal noise."""
        return self.truncated_normal.value

    @property
    def eta(self) -> float:
        """The temperature at which the bound for uniform noise is smallest."""
        return self.uniform.eta
