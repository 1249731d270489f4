"""flatmin.sharpness.keskar: the golden value, the true maximum in the box, and the random subspace."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flatmin.curvature._measurement import Measurement
from flatmin.sharpness import keskar
from flatmin.sharpness._keskar import _Subspace
from models import batches, same_bits, small_net, weights
from sharpness_problems import Quadratic, mean_output, nothing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.requires("scipy"),
]


def test_golden_value() -> None:
    """A diagonal quadratic has its maximum in the corner away from 0."""
    found = keskar(Quadratic([1.0, 3.0], [0.2, -0.1]), mean_output, nothing(), 0.1)
    assert found.value == pytest.approx(7.9565217391, abs=1e-10)
    assert found.loss == pytest.approx(0.035, abs=1e-15)
    assert found.worst == pytest.approx(0.11735, abs=1e-15)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_gradients_of_any_size_reach_the_corner(size: float) -> None:
    """L-BFGS-B alone would stop at w where the gradient is below its tolerance."""
    a, w, eps = [1.0 * size, 3.0 * size, 0.5 * size], [0.2, -0.1, 0.01], 1e-3
    corner = sum(0.5 * a * (abs(x) + eps * (abs(x) + 1.0)) ** 2 for a, x in zip(a, w, strict=True))
    found = keskar(Quadratic(a, w), mean_output, nothing(), eps)
    assert (found.worst - found.loss) / (corner - found.loss) == pytest.approx(1.0, rel=1e-9)


def test_at_a_minimum_random_starts_find_the_rise() -> None:
    flat = Quadratic([1.0, 3.0], [0.0, 0.0])
    assert keskar(flat, mean_output, nothing(), 0.1).value == 0.0
    found = keskar(flat, mean_output, nothing(), 0.1, restarts=2)
    assert found.value == pytest.approx(100.0 * 0.5 * (1.0 + 3.0) * 0.01, rel=1e-12)


def test_the_box_contains_no_higher_point() -> None:
    """Against the corners of the box, each tried: a convex function has its maximum in one of them."""
    torch.manual_seed(0)
    b = torch.randn(6, 6, dtype=torch.float64)
    net = Quadratic([1.0] * 6, torch.randn(6, dtype=torch.float64).tolist())

    def convex(_: Tensor, __: Tensor) -> Tensor:
        return 0.5 * (b @ net.w).square().sum()

    w, half = net.w.detach(), 0.3 * (net.w.detach().abs() + 1.0)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    best = max(float(0.5 * (b @ (w + half * c)).square().sum()) for c in corners)
    found = keskar(net, convex, nothing(), 0.3, restarts=5, iterations=20)
    assert found.worst == pytest.approx(best, rel=1e-9)


def test_the_subspace_is_that_of_its_matrix() -> None:
    """A, its pseudoinverse and the chain rule as dense matrices."""
    net = small_net(torch.float64)
    with Measurement(net, F.cross_entropy, batches(2, torch.float64), None, "", progress=False) as m:
        space = _Subspace(m, 0.1, 5, 0)
        A = torch.stack([torch.cat([t.flatten() for t in column]) for column in space.columns], dim=1)
        w = torch.cat([p.detach().flatten() for p in m.params])
        half = 0.1 * ((torch.linalg.pinv(A) @ w).abs() + 1.0)
        assert torch.allclose(space.half, half, rtol=1e-10)
        z = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
        d = torch.cat([t.flatten() for t in space.offsets(z)])
        assert torch.allclose(d, A @ (half * z), rtol=1e-12)
        assert torch.allclose(space.gradient([p.detach() for p in m.params]), half * (A.T @ w), rtol=1e-10)
        assert abs(float(A.mean())) < 0.1
        assert abs(float(A.std()) - 1.0) < 0.1


def test_the_subspace_rises_less_than_the_space() -> None:
    """A one-dimensional quadratic has only its two ends; more columns than weights do not fail."""
    net = small_net(torch.float64)
    line = keskar(net, F.cross_entropy, batches(2, torch.float64), 1e-3, dim=1)
    plane = keskar(net, F.cross_entropy, batches(2, torch.float64), 1e-3, dim=20)
    whole = keskar(net, F.cross_entropy, batches(2, torch.float64), 1e-3)
    assert 0.0 < line.value < plane.value
    assert whole.value > 0.0
    assert keskar(Quadratic([1.0, 3.0], [0.2, -0.1]), mean_output, nothing(), 0.1, dim=4).value > 0.0


def test_weights_as_they_were() -> None:
    net = small_net()
    before = weights(net)
    found = keskar(net, F.cross_entropy, batches(2), 1e-2, iterations=2)
    assert found.value > 0.0
    assert same_bits(weights(net), before)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"eps": 0.0}, "eps"), ({"dim": 0}, "dim"), ({"iterations": 0}, "it"), ({"restarts": 0}, "r")],
)
def test_bad_arguments_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        keskar(small_net(), F.cross_entropy, batches(1), **options)  # type: ignore[arg-type]


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        keskar(small_net(), F.cross_entropy, batches(1))
