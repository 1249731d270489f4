"""How much the loss rises under random noise on the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_int, check_one_of, check_size, is_number
from .._deprecated import renamed_arguments
from ..curvature._arguments import check_neighbourhood, check_seed
from ..curvature._measurement import NOISE, LossFn, Measurement, Part, check_tensors, shared_by
from ..curvature._probes import ScalarEstimate, scalar_estimate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["expected_sharpness", "rises"]


@renamed_arguments(law="distribution")
def expected_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    scale: float,
    distribution: str = "normal",
    gamma: float = 0.0,
    eps: float = 1.0,
    curvatures: Sequence[Tensor] | None = None,
    sizes: str | Sequence[Tensor] | None = None,
    lipschitz: float | Sequence[Tensor] = 0.0,
    samples: int = 20,
    antithetic: bool = False,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> ScalarEstimate:
    """Expected rise of the loss under random noise on the weights, ``E_u L(w + u) - L(w)``.

    ``scale=0.01`` alone is isotropic normal noise of that size (Neyshabur et al. 2017, arXiv 1706.08947).
    ``sizes="filter"`` scales it by the norm of each filter, ``curvatures`` by the flatness of each direction. With
    ``gamma=1, eps=0`` it is in proportion to each weight: the average-case form of adaptive sharpness, which does not
    change when a ReLU layer is multiplied by a factor and the next one divided by it.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        scale, distribution, gamma, eps, curvatures, lipschitz: the noise, as in :func:`flatmin.ops.scaled_noise_`. With
            ``curvatures`` (loss / weight^2) ``scale`` has the unit sqrt(loss) and ``lipschitz`` loss / weight^3; else
            ``scale`` is a factor of ``gamma |w| + eps``.
        sizes: noise ``scale sizes_i xi_i``: "filter" takes the 2-norm of the weight's filter (an index of the first
            dimension; Bisla et al. 2022, arXiv 2201.08025), "tensor" that of its tensor; or give tensors like the
            parameters.
        samples: number of independent values >= 1; each is one forward pass over the data, or two if ``antithetic``.
        antithetic: each value is the mean of a pair, the rises at ``w + u`` and at ``w - u``: what is odd in u, as the
            slope of the loss, cancels (Hammersley and Morton 1956). Needs one more copy of the parameters.
        seed: of the noise.
        process_group: as in :func:`flatmin.curvature.linear_operator`: each rank brings its share of the data.

    Returns:
        ``(value, stderr, samples)``, in units of the loss; the standard error is that over the independent values.
    """
    check_int("samples", samples, 1)
    check_seed(seed)
    if curvatures is not None:
        check_size("scale", scale)
    elif not is_number(scale) or not math.isfinite(scale):
        raise (ValueError if is_number(scale) else TypeError)(f"scale: {scale!r} given; give a finite float")
    check_one_of("distribution", distribution, ("normal", "uniform", "truncated_normal", "rademacher"))
    gamma, eps = check_neighbourhood(gamma, eps)
    passes = 1 + samples * (1 + bool(antithetic))
    model, process_group = shared_by(model, process_group)
    with Measurement(model, loss_fn, data, params, "expected sharpness", passes, progress, process_group) as m:
        noise: dict[str, Any] = {"distribution": distribution, "scale": float(scale), "gamma": gamma, "eps": eps}
        if curvatures is not None:
            noise["curvatures"] = check_tensors("curvatures", curvatures, m.params)
        if sizes is not None:
            noise["sizes"] = _sizes(m, sizes)
        if is_number(lipschitz):
            check_size("lipschitz", lipschitz)
            noise["lipschitz"] = float(lipschitz)  # type: ignore[arg-type]
        else:
            noise["lipschitz"] = check_tensors("lipschitz", lipschitz, m.params)
        return rises(m, float(m.mean_loss()), samples, seed, noise, bool(antithetic))


def _sizes(m: Measurement, sizes: str | Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(sizes, str):
        return check_tensors("sizes", sizes, m.params)
    check_one_of("sizes", sizes, ("filter", "tensor"), "tensors")
    found = list(m.params)
    for part in m.parts:
        norms = ops.filter_norm(part.of(m.params), whole=sizes == "tensor")
        for i, norm in zip(part.positions, norms, strict=True):
            wide = torch.promote_types(m.params[i].dtype, torch.float32)
            found[i] = norm.to(wide).expand(m.params[i].shape)
    return found


def rises(
    m: Measurement, clean: float, samples: int, seed: int, noise: dict[str, Any], antithetic: bool = False
) -> ScalarEstimate:
    """The loss under ``samples`` draws of the noise, or pairs of draws, less the ``clean`` one."""
    found = []
    for draw in range(samples):

        def move(part: Part, backup: Tensor, draw: int = draw) -> None:
            here: dict[str, Any] = {name: part.of(x) if isinstance(x, list) else x for name, x in noise.items()}
            ops.scaled_noise_(part.of(m.params), backup, part.key(seed, draw, NOISE), **here)

        with m.moved(move):
            rise = float(m.mean_loss()) - clean
            there = [p.detach().clone() for p in m.params] if antithetic else []
        found.append(0.5 * (rise + _mirrored(m, there) - clean) if antithetic else rise)
    return scalar_estimate(found)


@torch.no_grad()
def _mirrored(m: Measurement, there: list[Tensor]) -> float:
    """The loss at ``2 w - there``: an operator's noise has one sign where a curvature sizes it."""
    steps = [t.to(torch.promote_types(t.dtype, torch.float32)).sub_(p) for t, p in zip(there, m.params, strict=True)]

    def move(part: Part, backup: Tensor) -> None:  # a step of SGD along u
        ops.restore_sgd_(part.of(m.params), part.of(steps), (), backup, 1.0)

    with m.moved(move):
        return float(m.mean_loss())
