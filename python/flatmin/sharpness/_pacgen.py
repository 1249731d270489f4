"""PACGen: how well a minimum will generalise, from the scale of its weights and the curvature around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_int, check_size, is_number
from .._deprecated import renamed_arguments
from ..curvature._arguments import check_neighbourhood, check_seed, check_share
from ..curvature._diagonals import Diagonal, FoundDiagonal, check_diagonal, diagonal
from ..curvature._lipschitz import check_lipschitz
from ..curvature._lipschitz import lipschitz as estimate_lipschitz
from ..curvature._measurement import LossFn, Measurement, check_tensors, names_of, refuse_not_finite, shared_by
from ..curvature._probes import Estimate, scalar_estimate
from . import _pacgen_report as _report
from ._expected import rises
from ._pac_bayes import NoiseBound
from ._pacgen_result import Layer, PACGenResult

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Layer", "PACGen", "pacgen"]


class PACGen(PACGenResult):
    """What :func:`flatmin.pacgen` found. ``print`` shows a table, :meth:`plot` a figure, :class:`PACGenResult` has its
    numbers."""

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


@renamed_arguments(samples="curvature_samples")
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
    curvature_samples: int = 100,
    method: str = "autograd",
    noise_samples: int = 10,
    delta: float = 0.05,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> PACGen:
    """The PACGen metric and bound of a trained model (Wang et al. 2018, arXiv 1809.07402).

    The metric is ``Psi = sum_i log((|w_i| + N_i) max(sqrt(c_i), 1 / N_i))`` with the neighbourhood ``N_i = gamma |w_i|
    + eps`` and ``c_i = max(H_ii + rho N_i, 0)``: the number of nats that it takes to tell the weights from their prior,
    if each is told as exactly as its curvature asks for. The lower, the flatter, and the smaller the gap between test
    and training loss is expected to be. Psi is reconstructed from the bound that it comes from, and the constants of
    the bound are derived: see :mod:`flatmin.sharpness._pac_bayes`. The bound holds for losses in [0, 1], with prior and
    eta chosen beforehand; take it as a number to compare by.

    The model is measured in the mode in which it is (call ``model.eval()`` first) and left as it was: see
    :mod:`flatmin.curvature`.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. ``data`` are the training data.
        gamma, eps: >= 0, not both 0: the neighbourhood; eps has the unit of a weight.
        curvature: H_ii: "hutchinson", "gnb" (classifiers, >= 0), "squared_gradient" (what the paper averages; depends
            on the batch size), "exact" (small models), tensors like the parameters, or a function ``curvature(model,
            loss_fn, data, params=params)`` that returns them.
        lipschitz: rho: "max", "quantile" or "element", estimated as in :func:`flatmin.curvature.lipschitz` by the same
            estimator as ``curvature`` ("hutchinson" where that is tensors), or a float, or tensors like the parameters.
            One for each element ("element", tensors) makes the bound a measure in the form of a bound.
        quantile: for ``lipschitz="quantile"``.
        sqrt_m: use ``rho sqrt(m) N_i`` in c_i, m the number of parameters, as one reading of the paper has it; with one
            rho and with one for each element alike. The bound has the factor in any case.
        curvature_samples: probes of "hutchinson", or draws of labels of "gnb".
        method: of the Hessian-vector products, as in :func:`flatmin.curvature.hvp`.
        noise_samples: draws for the expected sharpness, >= 0; each is a forward pass over the data.
        delta: the bound holds with probability 1 - delta.
        seed: of all that is random.
        process_group: as in :func:`flatmin.curvature.linear_operator`: each rank brings its share of the data. Not for
            the curvature "gnb", whose labels are drawn by batch, nor for a function.

    Raises:
        ValueError: a curvature is not finite (the message names the parameter), or an argument cannot be used.
    """
    gamma, eps = check_neighbourhood(gamma, eps)
    check_share("delta", delta, "a probability in (0, 1), 0.05 for a bound that holds with 0.95")
    check_int("curvature_samples", curvature_samples, 1)
    check_seed(seed)
    check_int("noise_samples", noise_samples, 0)
    if isinstance(lipschitz, str):
        check_lipschitz(lipschitz, quantile, "lipschitz")
    given = not isinstance(curvature, str) and not callable(curvature)
    if not given:
        check_diagonal("curvature", curvature)
    model, process_group = shared_by(model, process_group)
    if process_group is not None and (curvature == "gnb" or callable(curvature)):
        raise ValueError(
            f"curvature: {_name(curvature)} is that of one rank's data; with a process_group give 'hutchinson', "
            "'squared_gradient', 'exact', or tensors that are the same on all ranks"
        )
    with Measurement(model, loss_fn, data, params, "", progress=False, process_group=process_group) as m:
        names = names_of(model, m.params)
        found = _curvature(m, curvature, curvature_samples, method, seed, progress)
        estimate = found.estimate
        refuse_not_finite("curvature", estimate.value, names)
        rho: float | list[Tensor]
        if isinstance(lipschitz, str):
            rho = estimate_lipschitz(
                model,
                loss_fn,
                m.data,
                params=m.params,
                gamma=gamma,
                eps=eps,
                mode=lipschitz,
                quantile=quantile,
                curvature="hutchinson" if given else curvature,  # type: ignore[arg-type]
                at_weights=None if given else estimate.value,
                curvature_samples=curvature_samples,
                method=method,
                seed=seed,
                progress=progress,
            )
        elif is_number(lipschitz):
            check_size("lipschitz", lipschitz)
            rho = float(lipschitz)  # type: ignore[arg-type]
        else:
            rho = check_tensors("lipschitz", lipschitz, m.params)
            refuse_not_finite("lipschitz", rho, names)
        size = sum(p.numel() for p in m.params)
        metric_rho = _scaled(rho, math.sqrt(size) if sqrt_m else 1.0)
        rows = _metric(m, estimate.value, metric_rho, gamma, eps)
        errors = _psi_errors(m.params, estimate, metric_rho, gamma, eps, coupled=curvature != "hutchinson")
    with Measurement(model, loss_fn, m.data, m.params, "expected sharpness", noise_samples + 1, progress) as m:
        loss = float(m.mean_loss())
        bound = NoiseBound(
            m.params, estimate.value, rho, gamma=gamma, eps=eps, loss=loss, samples=m.count, delta=float(delta)
        )
        uniform, truncated = bound.minimise(bound.uniform), bound.minimise(bound.truncated_normal)
        sharpness = None
        if noise_samples:
            noise = {"distribution": "uniform", "scale": math.sqrt(3.0 / uniform.eta), "gamma": gamma, "eps": eps}
            noise |= {"curvatures": estimate.value, "lipschitz": _scaled(rho, math.sqrt(size) / 3.0)}
            sharpness = rises(m, loss, noise_samples, seed, noise)
        return PACGen(
            psi=math.fsum(psi for psi, _ in rows),
            layers=_layers(m.params, names, rows, errors, found),
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
            psi_stderr=_joined(errors, coupled=curvature != "hutchinson"),
            curvature_mean=math.fsum(float(h.sum(dtype=_wide(h))) for h in estimate.value) / size,
            curvature_mean_stderr=_mean_error(found.means, m.params, range(len(m.params))),
        )


def _curvature(
    m: Measurement, curvature: Any, samples: int, method: str, seed: int, progress: bool | None
) -> FoundDiagonal:
    if not isinstance(curvature, str) and not callable(curvature):
        return FoundDiagonal(Estimate(check_tensors("curvature", curvature, m.params), [], 0), None)
    options: dict[str, Any] = {"samples": samples, "method": method, "seed": seed, "progress": progress}
    return diagonal(curvature, m.model, m.loss_fn, m.data, m.params, keep_means=True, **options)


def _source(curvature: Any, estimate: Estimate) -> str:
    if isinstance(curvature, str):
        return f"{curvature}, {estimate.samples} samples" if estimate.samples else curvature
    return _name(curvature) if callable(curvature) else "given"


def _name(curvature: Any) -> str:
    return repr(curvature) if isinstance(curvature, str) else getattr(curvature, "__name__", type(curvature).__name__)


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


@torch.no_grad()
def _psi_errors(
    params: Sequence[Tensor],
    estimate: Estimate,
    lipschitz: float | list[Tensor],
    gamma: float,
    eps: float,
    coupled: bool,
) -> list[float] | None:
    """Standard error of each tensor's Psi: to first order ``dPsi = dH_ii / (2 c_i)`` where the noise is not capped.

    Of Hutchinson's samples ``x_i = v_i sum_k H_ik v_k`` two share ``H_ij v_i v_j`` and nothing else, so ``Var(sum_i g_i
    x_i)`` has ``(g_i + g_j)^2 H_ij^2`` of each pair, at most twice what independent errors would have. Where that is
    not known (``coupled``), all errors may go one way."""
    if not estimate.stderr:
        return None
    errors = []
    for i, (p, h, se) in enumerate(zip(params, estimate.value, estimate.stderr, strict=True)):
        n = gamma * p.abs().to(h.dtype) + eps
        c = (h + (lipschitz if isinstance(lipschitz, float) else lipschitz[i]) * n).clamp(min=0.0)
        terms = torch.where(c * n * n > 1.0, 0.5 / c, 0.0) * se  # NaN of one sample stays
        total = terms.sum(dtype=_wide(h)) if coupled else (2.0 * terms.square().sum(dtype=_wide(h))).sqrt()
        errors.append(float(total))
    return errors


def _joined(errors: Sequence[float] | None, coupled: bool) -> float | None:
    if errors is None:
        return None
    return math.fsum(errors) if coupled else math.hypot(*errors)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float32 if t.device.type == "mps" else torch.float64  # MPS has no float64


def _mean_error(means: list[list[float]] | None, params: Sequence[Tensor], tensors: Iterable[int]) -> float | None:
    """Standard error of the mean of H_ii over some of the tensors."""
    if means is None:
        return None
    sizes = {i: params[i].numel() for i in tensors if params[i].numel()}
    total = sum(sizes.values())
    return scalar_estimate(
        [math.fsum(sample[i] * size for i, size in sizes.items()) / total for sample in means]
    ).stderr


def _layers(
    params: Sequence[Tensor],
    names: Sequence[str],
    rows: Sequence[tuple[float, float]],
    errors: Sequence[float] | None,
    found: FoundDiagonal,
) -> tuple[Layer, ...]:
    layers = []
    estimate = found.estimate
    for i, (p, name, (psi, capped)) in enumerate(zip(params, names, rows, strict=True)):
        if not p.numel():
            continue
        stderr = float(estimate.stderr[i].square().mean().sqrt()) if estimate.stderr else None
        mean = float(estimate.value[i].mean())
        mean_stderr = _mean_error(found.means, params, [i])
        psi_stderr = None if errors is None else errors[i]
        layers.append(Layer(name, p.numel(), psi, capped / p.numel(), mean, stderr, mean_stderr, psi_stderr))
    return tuple(layers)
