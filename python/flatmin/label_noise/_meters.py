"""How much noise wrong labels put on gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int
from .._deprecated import renamed_arguments
from ..curvature._measurement import LossFn, Measurement
from ..curvature._probes import ScalarEstimate, scalar_estimate
from ._label_noise import LabelNoise
from ._regression import RegressionNoise

__all__ = ["GradientNoise", "gradient_noise"]


@dataclass(frozen=True)
class GradientNoise:
    """Meters of label-noise SGD, over the batches of an epoch at fixed weights.

    Attributes:
        trace: ``tr G``, the trace of the covariance that label noise gives the gradient of one sample's loss: the
            mean of ``B (||g_noisy||^2 - ||g_clean||^2)``, with g_clean the gradient of the mean loss over the noise and
            B the size of the batch. With its standard error over batches.
        variance: of the noisy gradient from batch to batch, ``mean ||g||^2 - ||mean g||^2``: label noise and the
            choice of the batch together.
    """

    trace: ScalarEstimate
    variance: float


@renamed_arguments(draws="samples")
def gradient_noise(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    noise: LabelNoise | RegressionNoise,
    *,
    params: Iterable[Tensor] | None = None,
    samples: int = 1,
    progress: bool | None = None,
) -> GradientNoise:
    """The trace of the label noise in the gradients, and their variance (Damian, Ma and Lee 2021, arXiv 2106.06530).

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`; targets are the clean ones. With
            :class:`LabelNoise` the loss takes class probabilities too, as torch's cross-entropy does: g_clean is the
            gradient at the noise's transition probabilities.
        noise: what is put on the targets. Its counters are afterwards what they were.
        samples: passes over the data >= 1, each with fresh noise.
    """
    check_int("samples", samples, 1)
    if not isinstance(noise, LabelNoise | RegressionNoise) or getattr(noise, "kind", None) in ("smooth", "gaussian"):
        raise TypeError(f"noise: {noise!r} given; give a LabelNoise that draws labels, or a RegressionNoise")
    rows = noise.transition_matrix if isinstance(noise, LabelNoise) else None
    state = noise.state_dict()
    traces: list[float] = []
    squares, passes = 0.0, 0
    with Measurement(model, loss_fn, data, params, "label noise", samples, progress) as m:
        mean = m.zeros()
        try:
            for _ in range(samples):
                for inputs, targets, size in m.batches():
                    mean_target = targets if rows is None else _mean_target(rows, targets, m)
                    outputs = m.model(inputs)  # one for both: the same dropout masks
                    noisy = _gradient(m.loss_of(outputs, noise(targets)), m)
                    clean = _gradient(m.loss_of(outputs, mean_target), m)
                    length = _square(noisy)
                    traces.append(size * (length - _square(clean)))
                    squares, passes = squares + length, passes + 1
                    for t, g in zip(mean, noisy, strict=True):
                        if g is not None:
                            t.add_(g)
        finally:
            noise.load_state_dict(state)
        variance = squares / passes - sum(float((t / passes).double().square().sum()) for t in mean)
    return GradientNoise(scalar_estimate(traces), variance)


def _mean_target(rows: Tensor, targets: Tensor, m: Measurement) -> Tensor:
    """Class probabilities, the classes as dimension 1."""
    if bool(((targets < 0) | (targets >= len(rows))).any()):
        raise ValueError("data: a target is no class (ignored?); give batches whose targets are all classes")
    return rows.to(targets.device, torch.promote_types(m.params[0].dtype, torch.float32))[targets].movedim(-1, 1)


def _gradient(loss: Tensor, m: Measurement) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, m.params, retain_graph=True, allow_unused=True))


def _square(tensors: Iterable[Tensor | None]) -> float:
    return sum(float(g.double().square().sum()) for g in tensors if g is not None)
