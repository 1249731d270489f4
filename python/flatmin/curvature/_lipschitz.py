"""How fast the Hessian changes around the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_int, check_one_of
from .._deprecated import renamed_arguments
from .._devices import on_device
from ._arguments import check_neighbourhood, check_seed, check_share
from ._diagonals import Diagonal, check_diagonal, diagonal
from ._measurement import MOVES, LossFn, Measurement, Part, check_tensors, names_of, refuse_not_finite

__all__ = ["check_lipschitz", "check_neighbourhood", "lipschitz"]


@renamed_arguments(law="distribution", diag="curvature", probes="curvature_samples")
def lipschitz(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    gamma: float = 0.1,
    eps: float = 0.1,
    mode: str = "max",
    quantile: float = 0.99,
    curvature: str | Diagonal = "hutchinson",
    at_weights: Sequence[Tensor] | None = None,
    samples: int = 1,
    curvature_samples: int = 100,
    method: str = "autograd",
    distribution: str = "rademacher",
    seed: int = 0,
    progress: bool | None = None,
) -> float | list[Tensor]:
    """Hessian-Lipschitz constant from difference quotients ``|H_ii(w + u) - H_ii(w)| / |u_i|``.

    ``u`` is random within the neighbourhood of PACGen, ``|u_i| <= N_i = gamma |w_i| + eps`` (Wang et al. 2018, arXiv
    1809.07402; how its authors estimated the constant is not published, so this is our own definition). Weights that
    rounding, or N_i = 0, keeps in place have no quotient.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        gamma, eps: >= 0, not both 0.
        mode: "max", the largest quotient; "quantile", that quantile of all of them; "element", each element's own.
        quantile: in (0, 1].
        curvature: how the diagonals H_ii are estimated: "hutchinson", "gnb", "squared_gradient", "exact", or a function
            ``curvature(model, loss_fn, data, params=params)`` that returns tensors. Both ends of a quotient use the
            same random numbers; still, the error of a random diagonal goes into the largest quotient.
        at_weights: the diagonal at w, if it is known; by the same estimator and seed.
        samples: number of perturbed models >= 1; the largest quotient of each element counts.
        curvature_samples: ``samples`` of the diagonals, for "hutchinson" and "gnb".
        method: of the Hessian-vector products, as in :func:`hvp`.
        distribution: of u. "rademacher" goes to ``u_i = +-N_i``. "uniform" goes anywhere between: as H_ii changes with
            all of u, the quotients are then largest where ``u_i`` happens to be small, and among m weights one moves by
            N / m or so.
        seed: of the perturbation and of the diagonals.

    Returns:
        A float, or tensors like the parameters for "element", in units of loss / weight^3.

    Raises:
        ValueError: a diagonal is not finite, or an argument cannot be used; the message names it.
    """
    check_lipschitz(mode, quantile)
    check_diagonal("curvature", curvature)
    check_int("samples", samples, 1)
    check_int("curvature_samples", curvature_samples, 1)
    check_seed(seed)
    check_one_of("distribution", distribution, ("rademacher", "uniform"))
    gamma, eps = check_neighbourhood(gamma, eps)
    with Measurement(model, loss_fn, data, params, "", progress=False) as m:
        names = names_of(model, m.params)

        def estimate() -> list[Tensor]:
            m.rewind()  # for a function that draws from torch's generators
            options: dict[str, Any] = {"samples": curvature_samples, "method": method, "seed": seed}
            return diagonal(curvature, model, loss_fn, m.data, m.params, progress=progress, **options).estimate.value

        here = estimate() if at_weights is None else check_tensors("at_weights", at_weights, m.params)
        refuse_not_finite("curvature", here, names)
        largest, quotients = 0.0, None if mode == "max" else [torch.full_like(h, -1.0) for h in here]
        for draw in range(samples):

            def move(part: Part, backup: Tensor, draw: int = draw) -> None:
                key = part.key(seed, draw, MOVES)
                ops.scaled_noise_(part.of(m.params), backup, key, distribution=distribution, gamma=gamma, eps=eps)

            with m.moved(move):
                there = estimate()
                refuse_not_finite("curvature at the perturbed weights", there, names)
                found = [] if quotients is None else [torch.full_like(h, -1.0) for h in here]
                for part, backup in zip(m.parts, m.backups, strict=True):
                    steps: dict[str, Any] = {"params": part.of(m.params), "backup": backup}
                    per_element = part.of(found) if found else []
                    top = ops.curvature_(
                        part.of(there), part.of(here), decay=0.0, source="plain", lipschitz=per_element, **steps
                    )
                    largest = max(largest, float(top))
            for q, new in zip(quotients or [], found, strict=True):
                torch.maximum(q, new, out=q)
    if quotients is None:
        return largest
    return [q.clamp_(min=0.0) for q in quotients] if mode == "element" else _quantile(quotients, quantile)


def _quantile(quotients: Sequence[Tensor], q: float) -> float:
    """The smallest of the quotients that at least the share ``q`` of them does not exceed; -1 marks none."""
    device = quotients[0].device
    pool = torch.cat([on_device(t, device).flatten() for t in quotients])
    pool = pool[pool >= 0.0]
    return float(pool.kthvalue(math.ceil(q * pool.numel())).values) if pool.numel() else 0.0


def check_lipschitz(mode: str, quantile: float, name: str = "mode") -> None:
    check_one_of(name, mode, ("max", "quantile", "element"))
    check_share("quantile", quantile, "a float in (0, 1]", or_one=True)
