"""How much the loss rises under random noise on the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import ops
from .._checks import check_int
from ..curvature._lipschitz import check_neighbourhood
from ..curvature._measurement import NOISE, LossFn, Measurement, Part, check_tensors
from ..curvature._probes import ScalarEstimate, scalar_estimate

__all__ = ["expected_sharpness", "rises"]


def expected_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Iterable[Tensor] | None = None,
    scale: float,
    law: str = "normal",
    gamma: float = 0.0,
    eps: float = 1.0,
    curvatures: Sequence[Tensor] | None = None,
    lipschitz: float | Sequence[Tensor] = 0.0,
    samples: int = 20,
    seed: int = 0,
    progress: bool | None = None,
) -> ScalarEstimate:
    """Expected rise of the loss under random noise on the weights, ``E_u L(w + u) - L(w)``.

    ``scale=0.01`` alone is isotropic normal noise of that size (Neyshabur et al. 2017, arXiv 1706.08947).

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        scale, law, gamma, eps, curvatures, lipschitz: the noise, as in :func:`flatmin.ops.scaled_noise_`.
        samples: number of draws >= 1; each is one forward pass over the data.
        seed: of the noise.

    Returns:
        ``(value, stderr, samples)``, in units of the loss.
    """
    check_int("samples", samples, 1)
    check_neighbourhood(gamma, eps)
    with Measurement(model, loss_fn, data, params, "expected sharpness", samples + 1, progress) as m:
        noise: dict[str, Any] = {"law": law, "scale": scale, "gamma": gamma, "eps": eps, "lipschitz": lipschitz}
        if curvatures is not None:
            noise["curvatures"] = check_tensors("curvatures", curvatures, m.params)
        if not isinstance(lipschitz, float | int):
            noise["lipschitz"] = check_tensors("lipschitz", lipschitz, m.params)
        return rises(m, float(m.mean_loss()), samples, seed, noise)


def rises(m: Measurement, clean: float, samples: int, seed: int, noise: dict[str, Any]) -> ScalarEstimate:
    """The loss under ``samples`` draws of the noise, less the ``clean`` one."""
    found = []
    for draw in range(samples):

        def move(part: Part, backup: Tensor, draw: int = draw) -> None:
            here: dict[str, Any] = {name: part.of(x) if isinstance(x, list) else x for name, x in noise.items()}
            ops.scaled_noise_(part.of(m.params), backup, part.key(seed, draw, NOISE), **here)

        with m.moved(move):
            found.append(float(m.mean_loss()) - clean)
    return scalar_estimate(found)
