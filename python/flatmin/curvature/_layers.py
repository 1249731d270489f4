"""Traces and largest eigenvalues of the layers: of the blocks on the diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_int, check_one_of
from ._arguments import check_seed
from ._lanczos import Eigenvalues, eigenvalues
from ._linear_operator import CurvatureOperator, operator_of
from ._measurement import LossFn
from ._probes import ScalarEstimate, scalar_estimate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["layer_eigenvalues", "layer_traces"]


def layer_traces(
    model: nn.Module | CurvatureOperator,
    loss_fn: LossFn | None = None,
    data: Any = None,
    *,
    samples: int = 100,
    by: str = "layer",
    params: Iterable[Tensor] | None = None,
    matrix: str | None = None,
    method: str | None = None,
    step: float | None = None,
    micro_batch: int | None = None,
    process_group: ProcessGroup | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, ScalarEstimate]:
    """The trace of every layer's block of the Hessian, or of another matrix, all from the same products.

    The mean of ``<v_l, (A v)_l>`` over Rademacher vectors v, l one layer: the other layers' parts of v have mean 0 in
    it, and add to its variance. The layers' traces sum to Hutchinson's estimate of the whole.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`; or a :func:`linear_operator`.
        samples: number of vectors >= 1, one product each.
        by: "layer", the parameters of one module together, under its name; "parameter", each by itself.
        matrix, method, step, micro_batch, process_group: as in :func:`linear_operator`.
        seed: of the vectors.

    Returns:
        Names to ``(value, stderr, samples)``, in the order of the parameters.
    """
    check_int("samples", samples, 1)
    check_seed(seed)
    check_one_of("by", by, ("layer", "parameter"))
    options: dict[str, Any] = {"params": params, "matrix": matrix, "method": method, "step": step}
    options |= {"micro_batch": micro_batch, "process_group": process_group, "progress": progress}
    with operator_of(model, loss_fn, data, "layers' traces", samples, **options) as A:
        if not isinstance(A, CurvatureOperator):
            raise TypeError("model: a tensor has no layers; give a model or a linear_operator")
        groups = _groups(A.names, by)
        found: dict[str, list[float]] = {name: [] for name in groups}
        for draw in range(samples):
            v = A.probe(seed, draw)
            products = A.unflatten(v.mul_(A @ v))
            wide = torch.float32 if v.device.type == "mps" else torch.float64
            sums = [t.sum(dtype=wide).to("cpu", torch.float64) for t in products]
            for name, positions in groups.items():
                found[name].append(float(torch.stack([sums[i] for i in positions]).sum()))
    return {name: scalar_estimate(values) for name, values in found.items()}


def layer_eigenvalues(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    k: int = 1,
    by: str = "layer",
    params: Iterable[Tensor] | None = None,
    **options: Any,
) -> dict[str, Eigenvalues]:
    """Extreme eigenvalues of every layer's block of the Hessian, or of another matrix: a run of Lanczos for each.

    Args:
        model, loss_fn, data, params: see :mod:`flatmin.curvature`.
        k: how many of each layer, or as many as it has parameters. With which="both" of each end; the ends do not
            overlap, and a layer of one parameter has its one value.
        by: as in :func:`layer_traces`.
        options: all others of :func:`eigenvalues`.

    Returns:
        Names to :class:`Eigenvalues`, in the order of the parameters.
    """
    check_int("k", k, 1)
    check_one_of("by", by, ("layer", "parameter"))
    whole = CurvatureOperator(model, loss_fn, data, params=params)
    results = {}
    for name, positions in _groups(whole.names, by).items():
        block = [whole.params[i] for i in positions]
        size, own = sum(p.numel() for p in block), dict(options)
        if own.get("which") == "both" and size == 1:
            own["which"] = "largest"
        count = min(k, size // 2 if own.get("which") == "both" else size)
        results[name] = eigenvalues(model, loss_fn, data, k=count, params=block, **own)
    return results


def _groups(names: list[str], by: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        layer = name.rpartition(".")[0] if by == "layer" else name
        groups.setdefault(layer or name, []).append(i)
    return groups
