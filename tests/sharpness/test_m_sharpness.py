"""flatmin.sharpness.m_sharpness: golden values, the true maximum where it is known, invariance, groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin.curvature._measurement import Measurement
from flatmin.sharpness import m_sharpness
from flatmin.sharpness._ball import Ball
from models import batches, raw, same_bits, small_net, weights
from sharpness_problems import Q4, Quadratic, mean_output, nothing, q4_data, q4_loss, relu_data, relu_net

ADAPTIVE = [False, True, "asam", "davda54"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("m", "value"), [(1, 0.2007405471), (2, 0.1896725662), (4, 0.1796096913)])
def test_golden_values(m: int, value: float) -> None:
    found = m_sharpness(Q4(), q4_loss, q4_data(), 0.1, m)
    assert found.value == pytest.approx(value, abs=1e-10)
    assert found.sizes == (m,) * (4 // m)
    assert found.value == pytest.approx(sum(found.per_group) / len(found.per_group), abs=1e-15)


def test_groups_do_not_depend_on_batches() -> None:
    x, y = q4_data()
    whole = m_sharpness(Q4(), q4_loss, (x, y), 0.1, 3, steps=3)
    assert whole.sizes == (3, 1)
    for sizes in ((1, 3), (2, 2), (1, 1, 1, 1), (3, 1)):
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        found = m_sharpness(Q4(), q4_loss, parts, 0.1, 3, steps=3)
        assert found.per_group == pytest.approx(whole.per_group, abs=1e-14)
        assert found.value == pytest.approx(0.75 * whole.per_group[0] + 0.25 * whole.per_group[1], abs=1e-14)


def test_all_data_are_one_group() -> None:
    x, y = q4_data()
    parts = list(zip(x.split((1, 3)), y.split((1, 3)), strict=True))
    found = m_sharpness(Q4(), q4_loss, parts, 0.1)
    assert found.value == pytest.approx(0.1796096913, abs=1e-10)
    assert found.sizes == (4,)
    assert math.isnan(found.stderr)
    several = m_sharpness(Q4(), q4_loss, parts, 0.1, steps=4, restarts=2)
    assert several.value == pytest.approx(m_sharpness(Q4(), q4_loss, (x, y), 0.1, 4, steps=4, restarts=2).value)


def test_first_groups_only() -> None:
    found = m_sharpness(Q4(), q4_loss, q4_data(), 0.1, 1, max_groups=2)
    assert found.per_group == m_sharpness(Q4(), q4_loss, q4_data(), 0.1, 1).per_group[:2]


def test_standard_error_is_that_of_a_mean() -> None:
    found = m_sharpness(Q4(), q4_loss, q4_data(), 0.1, 1)
    expected = torch.tensor(found.per_group, dtype=torch.float64).std() / 2.0
    assert found.stderr == pytest.approx(float(expected), abs=1e-14)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_step_of_several_is_that_of_the_operator(p: float, adaptive: bool | str) -> None:
    """SAM's point by the operator, and by the plain-torch steps that later ones start from."""
    alone = m_sharpness(Q4(), q4_loss, q4_data(), 0.05, 2, p=p, adaptive=adaptive)
    more = m_sharpness(Q4(), q4_loss, q4_data(), 0.05, 2, p=p, adaptive=adaptive, steps=8)
    x, y = q4_data()
    for i, rise in enumerate(alone.per_group):
        expected = _sam_rise(x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2], 0.05, p, adaptive)
        assert rise == pytest.approx(expected, abs=1e-12)
        assert more.per_group[i] >= rise - 1e-12


def _sam_rise(x: Tensor, y: Tensor, rho: float, p: float, adaptive: bool | str) -> float:
    """SAM's step written out."""
    net = Q4()
    clean = q4_loss(net(x), y)
    grads = torch.autograd.grad(clean, list(net.parameters()))
    sizes = [torch.ones_like(w) for w in net.parameters()]
    if adaptive:
        sizes = [w.detach().abs() + (0.01 if adaptive == "asam" else 0.0) for w in net.parameters()]
    slope = torch.cat([(g * s).flatten() for g, s in zip(grads, sizes, strict=True)])
    unit = slope.sign() if p == math.inf else slope / slope.norm()
    with torch.no_grad():
        for w, s, u in zip(net.parameters(), sizes, unit.split(2), strict=True):
            w.add_(rho * s * u.view_as(w))
    return max(0.0, float((q4_loss(net(x), y) - clean).detach()))


def test_several_steps_find_the_maximum_of_a_quadratic() -> None:
    """In the 2-ball around 0 that is along the largest eigenvalue, in the cube it is a corner. Two steps from a slope
    that points elsewhere do not get there."""
    a, rho = [1.0, 4.0, 2.0], 0.5
    flat = Quadratic(a, [1e-3, 1e-6, 1e-6])
    one = m_sharpness(flat, mean_output, nothing(), rho)
    many = m_sharpness(flat, mean_output, nothing(), rho, steps=60)
    assert many.value == pytest.approx(0.5 * 4.0 * rho**2, rel=1e-3)
    assert one.value < 0.3 * many.value
    corner = m_sharpness(flat, mean_output, nothing(), rho, p=math.inf, steps=4)
    assert corner.value == pytest.approx(0.5 * sum(a) * rho**2, rel=2e-3)


def test_at_a_minimum_random_starts_find_the_rise() -> None:
    flat = Quadratic([1.0, 4.0], [0.0, 0.0])
    assert m_sharpness(flat, mean_output, nothing(), 0.5, steps=3).value == 0.0
    found = m_sharpness(flat, mean_output, nothing(), 0.5, steps=30, restarts=3)
    assert found.value == pytest.approx(0.5, rel=1e-3)
    again = m_sharpness(flat, mean_output, nothing(), 0.5, steps=30, restarts=3)
    assert again.value == found.value
    assert m_sharpness(flat, mean_output, nothing(), 0.5, steps=1, restarts=3, seed=1).value != pytest.approx(
        m_sharpness(flat, mean_output, nothing(), 0.5, steps=1, restarts=3).value
    )


def test_never_negative() -> None:
    """At a maximum no point is higher than w."""
    assert m_sharpness(Quadratic([-1.0, -4.0], [0.1, 0.0]), mean_output, nothing(), 5.0, steps=2, restarts=3).value == 0


@pytest.mark.parametrize("options", [{}, {"steps": 3, "restarts": 2}, {"p": math.inf, "steps": 2}])
def test_adaptive_form_does_not_see_a_rescaled_relu_net(options: dict[str, Any]) -> None:
    x, y = relu_data()
    values = {}
    for adaptive in (True, False):
        values[adaptive] = [
            m_sharpness(relu_net(alpha), F.cross_entropy, (x, y), 0.05, 8, adaptive=adaptive, **options).value
            for alpha in (1.0, 10.0)
        ]
    assert values[True][0] == pytest.approx(values[True][1], rel=1e-9)
    assert values[False][0] != pytest.approx(values[False][1], rel=0.2)


def test_random_points_fill_the_ball() -> None:
    """Each point is in the ball, and their radii are those of a uniform law: the median of r^2 in the disc is 1/2."""
    with Measurement(Quadratic([1.0, 1.0], [1.0, 2.0]), mean_output, nothing(), None, "", progress=False) as m:
        for p in (2.0, math.inf):
            ball = Ball(m, 0.5, p, False, 0.0)
            points = torch.stack([ball.random(0, draw)[0] for draw in range(400)])
            assert float(torch.linalg.vector_norm(points, p, dim=1).max()) <= 0.5
            assert points.mean(0).abs().max() < 0.05
            inside = (torch.linalg.vector_norm(points, p, dim=1) < 0.5 / math.sqrt(2.0)).double().mean()
            assert abs(float(inside) - 0.5) < 0.09


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_types_and_weights_as_they_were(dtype: torch.dtype) -> None:
    net = small_net(dtype)
    before = weights(net)
    exact = m_sharpness(small_net(torch.float64), F.cross_entropy, batches(2, torch.float64), 0.2, 4, steps=2)
    found = m_sharpness(net, F.cross_entropy, batches(2, dtype), 0.2, 4, steps=2)
    assert found.value == pytest.approx(exact.value, rel=1e-4 if dtype == torch.float32 else 0.15)
    assert same_bits(weights(net), before)


def test_dropout_draws_the_same_at_every_point() -> None:
    """At rho = 0 the loss is compared with itself."""
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
    assert m_sharpness(net, F.cross_entropy, batches(2), 0.0, 3).per_group == (0.0,) * 6


def test_mappings_are_split() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Q4()

        def forward(self, batch: dict[str, Any]) -> Tensor:
            out: Tensor = self.net(batch["x"][0])
            return out

    x, y = q4_data()
    found = m_sharpness(Named(), q4_loss, [({"x": [x]}, y)], 0.1, 2)
    assert found.value == pytest.approx(0.1896725662, abs=1e-10)


def test_not_finite_is_not_zero() -> None:
    found = m_sharpness(Q4(), q4_loss, (q4_data()[0], torch.tensor([0.5, math.nan, 0.25, 1.0])), 0.1, 2)
    assert math.isnan(found.value)
    assert math.isnan(found.per_group[0])
    assert found.per_group[1] > 0.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rho": -1.0}, "rho"),
        ({"m": 0}, "m:"),
        ({"p": 3.0}, "p:"),
        ({"adaptive": "big_vision"}, "adaptive"),
        ({"eta": -0.1}, "eta"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"max_groups": 0}, "max_groups"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        m_sharpness(Q4(), q4_loss, q4_data(), **({"rho": 0.1, "m": 2} | options))


def test_exception_leaves_the_weights() -> None:
    net = Q4()
    before = [raw(p).clone() for p in net.parameters()]
    calls = []

    def fails(outputs: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return q4_loss(outputs, y)

    with pytest.raises(KeyboardInterrupt):
        m_sharpness(net, fails, q4_data(), 0.1, 2)
    assert all(torch.equal(raw(p), b) for p, b in zip(net.parameters(), before, strict=True))


class Bump(nn.Module):
    """A loss that rises to 1 at w = 0.5 and is below that at the weights, w = 0, and at w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sin(math.pi * self.w) - 0.1 * self.w).expand(len(x))


def test_the_step_halves_where_the_first_did_not_rise() -> None:
    """SAM's point at w + rho lies beyond the hill: the second step goes half as far, and does not try it again."""
    assert m_sharpness(Bump(), mean_output, nothing(), 1.0).value == 0.0
    for steps in (2, 3):
        found = m_sharpness(Bump(), mean_output, nothing(), 1.0, steps=steps)
        assert found.value == pytest.approx(0.95, abs=1e-12)
