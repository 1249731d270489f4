"""Lipschitz constants of the Hessian, the expected sharpness of a quadratic, the spatial average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import curvature
from functions_of_weights import ANY, Function, mean_output, quadratic

pytestmark = pytest.mark.usefixtures("one_thread")


def vector(like: Sequence[Tensor], seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in like]


# ---- Lipschitz constants ----

CUBIC = torch.tensor([6.0, -12.0, 3.0, 0.5], dtype=torch.float64)


def cubic() -> Function:
    """sum a_i w_i^3 / 6: H_ii = a_i w_i, so every quotient is |a_i|."""
    return Function(lambda w: (CUBIC * w**3 / 6).sum(), [1.0, -2.0, 0.5, 0.0])


@pytest.mark.parametrize("diag", ["exact", "hutchinson"])
@pytest.mark.parametrize("law", ["rademacher", "uniform"])
def test_lipschitz_constant_of_a_cubic(diag: str, law: str) -> None:
    """Hutchinson is exact here: the Hessian is diagonal."""
    options: dict[str, Any] = {"curvature": diag, "distribution": law, "samples": 2, "curvature_samples": 2}
    each = curvature.lipschitz(cubic(), mean_output, ANY, mode="element", **options)
    assert isinstance(each, list)
    # a uniform step may be small: |u_i| >= 2^-23 N_i, N_i >= 0.1, loses 23 bits of 52
    assert torch.allclose(each[0], CUBIC.abs(), rtol=1e-9 if law == "rademacher" else 1e-6)
    assert curvature.lipschitz(cubic(), mean_output, ANY, **options) == pytest.approx(12.0, rel=1e-6)
    for quantile, expected in ((0.25, 0.5), (0.5, 3.0), (0.51, 6.0), (1.0, 12.0)):
        found = curvature.lipschitz(cubic(), mean_output, ANY, mode="quantile", quantile=quantile, **options)
        assert found == pytest.approx(expected, rel=1e-6)


def test_lipschitz_steps_go_to_the_edge_of_the_neighbourhood() -> None:
    """w1^2 w2 / 2 has H_11 = w2, H_22 = 0: the quotients are N_2 / N_1 and 0."""
    net = Function(lambda w: w[0] ** 2 * w[1] / 2, [3.0, -2.0])
    each = curvature.lipschitz(net, mean_output, ANY, gamma=0.2, eps=0.1, mode="element", curvature="exact")
    assert isinstance(each, list)
    assert torch.allclose(each[0], torch.tensor([0.5 / 0.7, 0.0], dtype=torch.float64), rtol=1e-9)


def test_weights_that_stay_have_no_quotient() -> None:
    each = curvature.lipschitz(cubic(), mean_output, ANY, eps=0.0, mode="element", curvature="exact")
    assert isinstance(each, list)
    assert torch.allclose(each[0], torch.tensor([6.0, 12.0, 3.0, 0.0], dtype=torch.float64), rtol=1e-9)
    # the lowest quarter of the three that moved, not of the four
    found = curvature.lipschitz(cubic(), mean_output, ANY, eps=0.0, mode="quantile", quantile=0.25, curvature="exact")
    assert found == pytest.approx(3.0, rel=1e-9)


def test_lipschitz_takes_a_function_and_a_known_diagonal() -> None:
    calls = []

    def diag(net: nn.Module, loss_fn: Any, data: Any, params: Any) -> list[Tensor]:
        calls.append(torch.rand(()))
        return curvature.exact_diag(net, loss_fn, data, params=params)

    net = cubic()
    known = curvature.exact_diag(net, mean_output, ANY)
    assert curvature.lipschitz(net, mean_output, ANY, curvature=diag) == pytest.approx(12.0)
    assert calls[0] == calls[1]  # common random numbers
    own = [torch.zeros(4, dtype=torch.float64)]
    assert curvature.lipschitz(net, mean_output, ANY, curvature=lambda *_, **__: own, at_weights=known) > 0
    assert not own[0].any()  # what a function returns stays its own
    assert curvature.lipschitz(net, mean_output, ANY, curvature=diag, at_weights=known) == pytest.approx(12.0)
    assert len(calls) == 3


# ---- expected sharpness, spatial average ----


def test_expected_sharpness_of_a_quadratic() -> None:
    """At the minimum of w' A w / 2, isotropic noise of size s raises the loss by s^2 tr A / 2 on average."""
    net, a = quadratic()
    with torch.no_grad():
        for w in net.w:
            w.zero_()
    rise = curvature.expected_sharpness(net, mean_output, ANY, distribution="normal", scale=0.3, samples=400)
    assert abs(rise.value - 0.045 * float(a.trace())) < 4 * rise.stderr
    # var(u' A u / 2) = s^4 ||A||_F^2 / 2; the spread of 400 draws is that within 4 / sqrt(400) for a kurtosis below 5
    spread = 0.09 * float(a.norm()) / math.sqrt(2 * 400)
    assert abs(rise.stderr / spread - 1) < 0.2


def test_spatial_average() -> None:
    """AdaHessian (arXiv 2006.00719): the mean of |d| over the kernel of a convolution, |d| for the rest."""
    conv = torch.tensor([[[[1.0, -3.0], [2.0, 0.0]], [[4.0, 4.0], [-4.0, 4.0]]]])
    found = curvature.spatial_average([conv, torch.tensor([-1.0, 2.0]), torch.full((2, 3, 2), -1.0)])
    assert torch.equal(found[0], torch.tensor([1.5, 4.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2))
    assert torch.equal(found[1], torch.tensor([1.0, 2.0]))
    assert torch.equal(found[2], torch.ones(2, 3, 2))
