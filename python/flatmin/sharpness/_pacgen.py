"""PACGen: how well a minimum will generalise, from the scale of its weights and the curvature around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import ops
from .._checks import check_int
from ..curvature._diagonals import Diagonal, check_diagonal, diagonal
from ..curvature._lipschitz import check_lipschitz, check_neighbourhood
from ..curvature._lipschitz import lipschitz as estimate_lipschitz
from ..curvature._measurement import LossFn, Measurement, check_tensors, names_of, refuse_not_finite
from ..curvature._probes import Estimate, ScalarEstimate
from . import _pacgen_report as _report
from ._expected import rises
from ._pac_bayes import Bound, NoiseBound

__all__ = ["Layer", "PACGen", "pacgen"]


@dataclass(frozen=True)
class Layer:
    """The part of one parameter tensor in :class:`PACGen`.

    Attributes:
        name: as in ``model.named_parameters()``.
        size: number of elements.
        psi: its terms of the metric, in nats.
        capped: share of its elements whose noise is capped at the neighbourhood N_i.
        curvature: mean of H_ii.
        curvature_stderr: root mean square of the standard errors of H_ii; None if they are not known.
    """

    name: str
    size: int
    psi: float
    capped: float
    curvature: float
    curvature_stderr: float | None


@dataclass(frozen=True, eq=False)
class PACGen:
    """What :func:`flatmin.pacgen` found. ``print`` shows a table, :meth:`plot` a figure.

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

    def __str__(self) -> str:
        return _report.table(self)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the tensors, for ``json.dumps``. What is not finite or not known is None."""
        return _report.as_dict(self)

    def plot(self, path: Any = None) -> Any:
        """A figure of the layers' parts in the metric and of what the bound is made of.

        Args:
            path: file to write, in the format of its suffix (png, pdf, svg); None writes none.

        Returns:
            The :class:`matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return _report.plot(self, path)


def pacgen(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    gamma: float = 0.1,
    eps: float = 0.1,
    curvature: str | Sequence[Tensor] | Diagonal = "hutchinson",
    lipschitz: str | float | Sequence[Tensor] = "max",
    quantile: float = 0.99,
    sqrt_m: bool = False,
    samples: int = 100,
    method: str = "autograd",
    noise_samples: int = 10,
    delta: float = 0.05,
    seed: int = 0,
    progress: bool | None = None,
) -> PACGen:
    """The PACGen metric and bound of a trained model (Wang et al. 2018, arXiv 1809.07402).

    The metric is ``Psi = sum_i log((|w_i| + N_i) max(sqrt(c_i), 1 / N_i))`` with the neighbourhood ``N_i = gamma |w_i|
    + eps`` and ``c_i = max(H_ii + rho N_i, 0)``: the number of nats that it takes to tell the weights from their prior,
    if each is told as exactly as its curvature asks for. The lower, the flatter, and the smaller the gap between test
    and training loss is expected to be. Psi is reconstructed from the bound that it comes from, and the constants of
    the bound are derived: see :mod:`flatmin._bound`. The bound holds for losses in [0, 1], with prior and eta chosen
    beforehand; take it as a number to compare by.

    The model is measured in the mode in which it is (call ``model.eval()`` first) and left as it was: see
    :mod:`flatmin.curvature`.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. ``data`` are the training data.
        gamma, eps: >= 0, not both 0: the neighbourhood.
        curvature: H_ii: "hutchinson", "gnb" (classifiers, >= 0), "squared_gradient" (what the paper averages; depends
            on the batch size), "exact" (small models), tensors like the parameters, or a function ``curvature(model,
            loss_fn, data, params=params)`` that returns them.
        lipschitz: rho: "max", "quantile" or "element", estimated as in :func:`flatmin.curvature.lipschitz` by the same
            estimator as ``curvature`` ("hutchinson" where that is tensors), or a float, or tensors like the parameters.
            One for each element ("element", tensors) makes the bound a measure in the form of a bound.
        quantile: for ``lipschitz="quantile"``.
        sqrt_m: use ``rho sqrt(m) N_i`` in c_i, m the number of parameters, as one reading of the paper has it.
        samples: probes of "hutchinson", or draws of labels of "gnb".
        method: of the Hessian-vector products, as in :func:`flatmin.curvature.hvp`.
        noise_samples: draws for the expected sharpness, >= 0; each is a forward pass over the data.
        delta: the bound holds with probability 1 - delta.
        seed: of all that is random.

    Raises:
        ValueError: a curvature is not finite (the message names the parameter), or an argument cannot be used.
    """
    check_neighbourhood(gamma, eps)
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta: {delta} given; give a probability in (0, 1), 0.05 for a bound that holds with 0.95")
    check_int("samples", samples, 1)
    check_int("noise_samples", noise_samples, 0)
    if isinstance(lipschitz, str):
        check_lipschitz(lipschitz, quantile, "lipschitz")
    given = not isinstance(curvature, str) and not callable(curvature)
    if not given:
        check_diagonal("curvature", curvature)
    with Measurement(model, loss_fn, data, params, "", progress=False) as m:
        names = names_of(model, m.params)
        estimate = _curvature(m, curvature, samples, method, seed, progress)
        refuse_not_finite("curvature", estimate.value, names)
        rho: float | list[Tensor]
        if isinstance(lipschitz, str):
            diag: Any = "hutchinson" if given else curvature
            rho = estimate_lipschitz(
                model,
                loss_fn,
                data,
                params=m.params,
                gamma=gamma,
                eps=eps,
                mode=lipschitz,
                quantile=quantile,
                diag=diag,
                at_weights=None if given else estimate.value,
                probes=samples,
                method=method,
                seed=seed,
                progress=progress,
            )
        elif isinstance(lipschitz, float | int):
            rho = float(lipschitz)
            if not 0.0 <= rho < math.inf:
                raise ValueError(f"lipschitz: {rho} given; give a finite float >= 0, tensors, or a way to estimate it")
        else:
            rho = check_tensors("lipschitz", lipschitz, m.params)
            refuse_not_finite("lipschitz", rho, names)
        size = sum(p.numel() for p in m.params)
        rows = _metric(m, estimate.value, _scaled(rho, math.sqrt(size) if sqrt_m else 1.0), gamma, eps)
    with Measurement(model, loss_fn, data, m.params, "expected sharpness", noise_samples + 1, progress) as m:
        loss = float(m.mean_loss())
        bound = NoiseBound(m.params, estimate.value, rho, gamma=gamma, eps=eps, loss=loss, samples=m.count, delta=delta)
        uniform, truncated = bound.minimise(bound.uniform), bound.minimise(bound.truncated_normal)
        sharpness = None
        if noise_samples:
            noise = {"law": "uniform", "scale": math.sqrt(3.0 / uniform.eta), "gamma": gamma, "eps": eps}
            noise |= {"curvatures": estimate.value, "lipschitz": _scaled(rho, math.sqrt(size) / 3.0)}
            sharpness = rises(m, loss, noise_samples, seed, noise)
        return PACGen(
            psi=math.fsum(psi for psi, _ in rows),
            layers=_layers(m.params, names, rows, estimate),
            size=size,
            samples=m.count,
            capped=math.fsum(capped for _, capped in rows) / size,
            curvature=estimate.value,
            curvature_stderr=estimate.stderr or None,
            curvature_source=_source(curvature, estimate),
            lipschitz=rho,
            lipschitz_source=lipschitz if isinstance(lipschitz, str) else "given",
            training_loss=loss,
            uniform=uniform,
            truncated_normal=truncated,
            sharpness=sharpness,
            gamma=gamma,
            eps=eps,
            sqrt_m=sqrt_m,
            delta=delta,
        )


def _curvature(m: Measurement, curvature: Any, samples: int, method: str, seed: int, progress: bool | None) -> Estimate:
    if not isinstance(curvature, str) and not callable(curvature):
        return Estimate(check_tensors("curvature", curvature, m.params), [], 0)
    options: dict[str, Any] = {"samples": samples, "method": method, "seed": seed, "progress": progress}
    return diagonal(curvature, m.model, m.loss_fn, m.data, m.params, **options)


def _source(curvature: Any, estimate: Estimate) -> str:
    if isinstance(curvature, str):
        return f"{curvature}, {estimate.samples} samples" if estimate.samples else curvature
    return getattr(curvature, "__name__", type(curvature).__name__) if callable(curvature) else "given"


def _scaled(rho: float | list[Tensor], factor: float) -> float | list[Tensor]:
    return rho * factor if isinstance(rho, float) else [t * factor for t in rho]


def _metric(
    m: Measurement, curvatures: list[Tensor], rho: float | list[Tensor], gamma: float, eps: float
) -> list[tuple[float, float]]:
    """Psi of each tensor, and how many of its elements are capped."""
    rows = [(0.0, 0.0)] * len(m.params)
    for part in m.parts:
        here = rho if isinstance(rho, float) else part.of(rho)
        found = ops.pacgen(part.of(m.params), part.of(curvatures), gamma=gamma, eps=eps, lipschitz=here)
        for position, (psi, capped) in zip(part.positions, found.tolist(), strict=True):
            rows[position] = psi, capped
    return rows


def _layers(
    params: Sequence[Tensor], names: Sequence[str], rows: Sequence[tuple[float, float]], estimate: Estimate
) -> tuple[Layer, ...]:
    layers = []
    for i, (p, name, (psi, capped)) in enumerate(zip(params, names, rows, strict=True)):
        if not p.numel():
            continue
        stderr = float(estimate.stderr[i].square().mean().sqrt()) if estimate.stderr else None
        mean = float(estimate.value[i].mean())
        layers.append(Layer(name, p.numel(), psi, capped / p.numel(), mean, stderr))
    return tuple(layers)
