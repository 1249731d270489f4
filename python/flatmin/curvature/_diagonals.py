"""Estimates of the Hessian's diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_int, check_one_of
from .._deprecated import renamed_arguments
from ._arguments import check_seed
from ._batches import Source
from ._derivatives import MEASURING
from ._labels import LabelSampler
from ._measurement import LossFn, Measurement, check_tensors, gradient, second
from ._probes import Estimate, Moments, Probed, Probes, check_sampling

__all__ = [
    "Diagonal",
    "check_diagonal",
    "diagonal",
    "diagonal_block",
    "exact_diag",
    "gnb_diag",
    "hutchinson_diag",
    "spatial_average",
    "squared_gradient_diag",
]

#: ``curvature(model, loss_fn, data, params=params)`` returns tensors like the parameters, or an :class:`Estimate`.
Diagonal = Callable[..., Any]


@renamed_arguments(law="distribution")
def hutchinson_diag(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    samples: int = 100,
    method: str = "autograd",
    distribution: str = "rademacher",
    step: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """Diagonal of the Hessian as the mean of ``v o (H v)`` over random ``v`` (Bekas et al. 2007).

    Unbiased. The variance of one sample is ``sum_{j != i} H_ij^2`` with Rademacher probes and ``2 H_ii^2`` more with
    normal ones. The number of samples is the one asked for: stopping once the estimate seems to settle would bias it.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        samples: number of probes >= 1; each is one :func:`hvp` over all of the data.
        method, step: as in :func:`hvp`. Finite differences hold no probe in memory during a pass.
        distribution: of the probes, "rademacher" or "normal".
        seed: of the probes.

    Returns:
        ``(value, stderr, samples)``.
    """
    options: dict[str, Any] = {"params": params, "samples": samples, "seed": seed, "progress": progress}
    options |= {"method": method, "distribution": distribution, "step": step}
    return _hutchinson(model, loss_fn, data, **options).estimate()


def _hutchinson(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None,
    samples: int,
    seed: int,
    progress: bool | None,
    method: str,
    distribution: str = "rademacher",
    step: float | None = None,
    keep_means: bool = False,
) -> Moments:
    difference = check_sampling(samples, distribution, method, step, seed)
    with Measurement(model, loss_fn, data, params, "Hutchinson", samples * (1 + difference), progress) as m:
        probes, moments = Probes(m, distribution, difference, step, seed), Moments(m, keep_means)
        for draw in range(samples):
            moments.add(probes[draw])
        return moments


# ---- other diagonals ----


def squared_gradient_diag(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    progress: bool | None = None,
) -> list[Tensor]:
    """Mean over the batches of the squared gradient of the batch: what Adam averages, and the paper of PACGen.

    With batches of one sample it is the diagonal of the empirical Fisher matrix. With batches of B it is ``g^2 +
    Var(g_1) / B`` on average, g the gradient over all data and g_1 that of one sample: it depends on the batch size,
    and it vanishes where every sample is fitted, whatever the curvature. One pass.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
    """
    with Measurement(model, loss_fn, data, params, "squared gradients", 1, progress) as m:
        return m.mean_square(lambda inputs, targets: (m.batch_gradient(inputs, targets), 1.0))


def gnb_diag(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    class_dim: int | None = None,
    samples: int = 1,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """Diagonal of the Gauss-Newton matrix of the cross-entropy, after Gauss, Newton and Bartlett.

    The mean over the batches of ``B g^2``, with g the gradient of the batch's mean cross-entropy for labels drawn from
    the model's own softmax, and B the number of labels in the batch (Liu et al. 2023, arXiv 2305.14342, Algorithm 2).
    Unbiased and never negative; the Hessian's terms with second derivatives of the logits are left out.

    Args:
        model: returns logits, or log-probabilities, of shape (N, C) or, with a target per position, (N, C, ...) or
            (N, ..., C).
        loss_fn: not evaluated: the Gauss-Newton matrix of the cross-entropy does not depend on the labels, smoothed or
            not. An ``ignore_index`` of it counts, and torch's own criteria have their classes in dimension 1.
        data: targets are class indices (-100, or ``ignore_index``, is ignored) or probabilities like the logits.
        params, progress: see :mod:`flatmin.curvature`.
        class_dim: dimension of the logits that holds the classes, not the first one. None: dimension 1 or the last one,
            whichever fits the targets; where both do, that of torch's criteria if ``loss_fn`` is one.
        samples: how often labels are drawn for all of the data, >= 1; one pass each.
        seed: of the labels.

    Returns:
        ``(value, stderr, samples)``; the standard error is that over the draws of labels.

    Raises:
        ValueError: the classes may be in either of two dimensions (give ``class_dim``), or an argument cannot be used.
        TypeError: the model returns no logits.
    """
    options: dict[str, Any] = {"params": params, "samples": samples, "seed": seed, "progress": progress}
    return _gnb(model, loss_fn, data, class_dim=class_dim, **options).estimate()


def _gnb(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None,
    samples: int,
    seed: int,
    progress: bool | None,
    class_dim: int | None = None,
    keep_means: bool = False,
) -> Moments:
    check_int("samples", samples, 1)
    check_seed(seed)
    if class_dim is not None and (not isinstance(class_dim, int) or isinstance(class_dim, bool)):
        raise TypeError(f"class_dim: {class_dim!r} given; give the dimension of the logits that holds the classes")
    with Measurement(model, loss_fn, data, params, "Gauss-Newton-Bartlett", samples, progress) as m:
        labels, moments = LabelSampler(seed, loss_fn, class_dim), Moments(m, keep_means)

        def term(inputs: Any, targets: Any) -> tuple[list[Tensor | None], float]:
            loss, count = labels.cross_entropy(*m.outputs(inputs, targets))
            return gradient(loss, m.params), float(count)

        for _ in range(samples):
            moments.add(Probed.plain(m.mean_square(term), m))
        return moments


def exact_diag(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    limit: int = 20_000,
    progress: bool | None = None,
) -> list[Tensor]:
    """Diagonal of the Hessian, element by element: a double backward pass per parameter and batch.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        limit: ``ValueError`` for more parameters than this.
    """
    check_int("limit", limit, 0)
    with Measurement(model, loss_fn, data, params, "exact diagonal", 1, progress) as m:
        total = sum(p.numel() for p in m.params)
        if total > limit:
            raise ValueError(
                f"limit: {total} parameters are more than {limit}, and each costs a double backward pass; use "
                "hutchinson_diag, fewer params, or a higher limit"
            )

        def term(inputs: Any, targets: Any) -> list[Tensor | None]:
            grads = gradient(m.loss(inputs, targets), m.params, create_graph=True)
            return [diagonal_block(g, p) for g, p in zip(grads, m.params, strict=True)]

        return m.mean(term)


def diagonal_block(g: Tensor | None, p: Tensor, advice: str = MEASURING) -> Tensor | None:
    """Derivative of each element of a gradient by its own parameter; ``advice`` where there is no second derivative."""
    if g is None or not g.requires_grad:
        return None
    diagonal = torch.zeros(p.numel(), dtype=g.dtype, device=g.device)
    for i in range(p.numel()):
        basis = torch.zeros(p.numel(), dtype=g.dtype, device=g.device)
        basis[i] = 1.0
        row = second([g], [p], [basis.view(p.shape)], retain_graph=True, advice=advice)[0]
        if row is not None:
            diagonal[i] = row.reshape(-1)[i]
    return diagonal.view(p.shape)


@torch.no_grad()
def spatial_average(diag: Sequence[Tensor]) -> list[Tensor]:
    """``|d|``, averaged over the kernel of convolutions: the dimensions 2 and 3 of tensors with four.

    AdaHessian's smoothing of a diagonal (Yao et al. 2020, arXiv 2006.00719). Shapes are kept.
    """
    return [d.abs().mean((2, 3), keepdim=True).expand_as(d).clone() if d.dim() == 4 else d.abs() for d in diag]


# ---- diagonals by name ----

_EXACT: dict[str, Diagonal] = {"squared_gradient": squared_gradient_diag, "exact": exact_diag}
_NAMES = ("hutchinson", "gnb", *_EXACT)


class FoundDiagonal(NamedTuple):
    """A diagonal by name.

    Attributes:
        estimate: without standard error (``stderr`` empty) where nothing is random or known.
        means: for each sample its mean over each tensor, None where they are not known.
    """

    estimate: Estimate
    means: list[list[float]] | None


def check_diagonal(name: str, kind: Any) -> None:
    """``ValueError`` unless ``kind`` names a diagonal of this module or can be called."""
    if not callable(kind):
        check_one_of(name, kind, _NAMES, "a function")


def diagonal(
    kind: str | Diagonal,
    model: nn.Module,
    loss_fn: LossFn,
    data: Source,
    params: Sequence[Tensor],
    *,
    samples: int,
    method: str,
    seed: int,
    progress: bool | None,
    keep_means: bool = False,
) -> FoundDiagonal:
    """The diagonal by name, or a copy of what a function ``kind(model, loss_fn, data, params=params)`` returns, which
    gets the data as the user gave them."""
    if callable(kind):
        result = kind(model, loss_fn, data.given, params=params)
        found = result if isinstance(result, Estimate) else Estimate(result, [], 0)
        value = check_tensors("curvature: what it returned", found.value, params)
        return FoundDiagonal(found._replace(value=[t.clone() for t in value]), None)
    if kind in _EXACT:
        return FoundDiagonal(
            Estimate(_EXACT[kind](model, loss_fn, data, params=params, progress=progress), [], 0), None
        )
    options: dict[str, Any] = {"params": params, "samples": samples, "seed": seed, "progress": progress}
    options["keep_means"] = keep_means
    if kind == "gnb":
        moments = _gnb(model, loss_fn, data, **options)
    else:
        moments = _hutchinson(model, loss_fn, data, method=method, **options)
    return FoundDiagonal(moments.estimate(), moments.tensor_means() if keep_means else None)
