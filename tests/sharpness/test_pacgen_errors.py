"""The errors that flatmin.pacgen reports, and which rho and which scale its bound has."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import ops
from flatmin.sharpness import pacgen
from flatmin.sharpness._pac_bayes import NoiseBound, optimal_sigma
from models import batches, small_net

pytestmark = pytest.mark.usefixtures("one_thread")


class Quadratic(nn.Module):
    """``w' A w / 2``, w in two tensors of four and of two elements, one value for all samples."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = a
        self.first = nn.Parameter(torch.full((2, 2), 0.5, dtype=torch.float64))
        self.second = nn.Parameter(torch.full((2,), -0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.first.flatten(), self.second])
        return (0.5 * w @ self.a @ w).expand(len(x))


def mean_output(output: Tensor, _: Tensor) -> Tensor:
    return output.mean()


ANY = (torch.zeros(3), torch.zeros(3))


def matrix(diagonal: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + 30.0 * (b + b.T - torch.diag(2 * b.diagonal()))


def measured(a: Tensor, samples: int, seed: int) -> Any:
    options: dict[str, Any] = {"lipschitz": 1.0, "noise_samples": 0, "curvature_samples": samples, "seed": seed}
    return pacgen(Quadratic(a), mean_output, ANY, **options)


@pytest.mark.parametrize("diagonal", [[2000.0] * 6, [600.0, 800.0, 1000.0, 2000.0, 4000.0, 9000.0]])
def test_the_error_of_psi(diagonal: list[float]) -> None:
    """Curvatures large enough that nothing is capped and that Psi is linear in their errors. To first order its
    variance over K probes is ``sum_{i<j} H_ij^2 (g_i + g_j)^2 / K``, g = 1 / (2 c): what is reported is that if all g
    are equal, and not below it on average."""
    a, samples, seeds = matrix(diagonal), 20, 40
    runs = [measured(a, samples, seed) for seed in range(seeds)]
    assert all(run.capped == 0.0 for run in runs)
    g = 0.5 / (a.diagonal() + 0.15)  # rho N = 0.1 0.5 + 0.1
    off = (a - torch.diag(a.diagonal())) ** 2
    variance = float((off * (g[:, None] + g) ** 2).sum()) / 2 / samples
    psis = torch.tensor([run.psi for run in runs], dtype=torch.float64)
    assert float(psis.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / seeds))  # of a variance from 40 values
    reported = sum(run.psi_stderr**2 for run in runs) / seeds
    if len(set(diagonal)) == 1:
        assert reported == pytest.approx(variance, rel=0.1)
    else:
        assert variance < reported < 2 * variance


def test_the_error_of_the_mean_curvature_of_a_layer() -> None:
    """Over probes the mean of a block S of n elements has variance ``(sum_{i<j in S} 4 H_ij^2 + sum_{i in S, k not}
    H_ik^2) / n^2``; a single element has ``sum_{k != i} H_ik^2``."""
    a, samples, seeds = matrix([2000.0] * 6), 10, 50
    runs = [measured(a, samples, seed) for seed in range(seeds)]
    off = (a - torch.diag(a.diagonal())) ** 2
    for layer, block in ((0, slice(0, 4)), (1, slice(4, 6))):
        n = block.stop - block.start
        inside = float(off[block, block].sum())
        outside = float(off[block].sum()) - inside
        variance = (2 * inside + outside) / n**2 / samples
        single = float(off[block].sum()) / n / samples
        found = [run.layers[layer] for run in runs]
        means = torch.tensor([x.curvature for x in found], dtype=torch.float64)
        assert float(means.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / seeds))
        for name, expected in (("curvature_mean_stderr", variance), ("curvature_stderr", single)):
            squares = torch.tensor([getattr(x, name) ** 2 for x in found], dtype=torch.float64)
            error = 4 * float(squares.std()) / math.sqrt(seeds)
            assert abs(float(squares.mean()) - expected) < error < 0.5 * expected
    whole = [run.curvature_mean_stderr**2 for run in runs]
    assert sum(whole) / seeds == pytest.approx(2 * float(off.sum()) / 36 / samples, rel=0.3)
    assert runs[0].curvature_mean == pytest.approx(float(sum(h.sum() for h in runs[0].curvature)) / 6, rel=1e-12)


def test_errors_of_squares_may_all_go_one_way() -> None:
    """Gauss-Newton-Bartlett squares one gradient: nothing says how its elements' errors go together."""
    net, data = small_net(torch.float64), batches(1, torch.float64)
    options: dict[str, Any] = {"curvature": "gnb", "curvature_samples": 5, "lipschitz": 1.0, "noise_samples": 0}
    found = pacgen(net, lambda output, y: 1e4 * F.cross_entropy(output, y), data, gamma=1.0, eps=0.8, **options)
    assert 0.0 < found.capped < 1.0
    expected = 0.0
    for p, h, se in zip(net.parameters(), found.curvature, found.curvature_stderr or [], strict=True):
        n = p.detach().abs() + 0.8
        c = h + n
        expected += float(torch.where(c * n * n > 1.0, se / (2 * c), 0.0).sum())
    assert found.psi_stderr == pytest.approx(expected, rel=1e-12)


def test_errors_that_are_not_known_are_not_shown() -> None:
    net, data = small_net(), batches(1)
    exact = pacgen(net, F.cross_entropy, data, curvature="exact", lipschitz=1.0, noise_samples=0)
    assert exact.psi_stderr is exact.curvature_mean_stderr is exact.layers[0].curvature_mean_stderr is None
    assert "s.e.:" not in str(exact)
    one = pacgen(net, F.cross_entropy, data, curvature_samples=1, lipschitz=1.0, noise_samples=0).as_dict()
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert one["psi_stderr"] is one["layers"][0]["curvature_mean_stderr"] is None


def test_the_table_names_both_errors() -> None:
    found = pacgen(small_net(), F.cross_entropy, batches(1), curvature_samples=3, noise_samples=0)
    lines = str(found).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("parameter"))
    names = [name.strip() for name in lines[at].split("  ") if name.strip()]
    assert names[-4:] == ["s.e. of Psi", "mean H_ii", "s.e. of mean", "s.e. of H_ii"]
    for row, layer in zip(lines[at + 2 :], found.layers, strict=False):
        numbers = [float(cell) for cell in row.split()[-4:]]
        expected = [layer.psi_stderr, layer.curvature, layer.curvature_mean_stderr, layer.curvature_stderr]
        assert numbers == pytest.approx(expected, rel=0.05)  # two digits
    assert "of Psi" in str(found)


# ---- text and code say one thing ----


def bound_of(rho: float | list[Tensor], w: list[Tensor], h: list[Tensor]) -> NoiseBound:
    return NoiseBound(w, h, rho, gamma=0.1, eps=0.1, loss=0.25, samples=50, delta=0.05)


def seven() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(7, generator=generator, dtype=torch.float64)
    return [w[:4], w[4:]], [t.abs() * 50 for t in (w[:4], w[4:])]


def test_equal_constants_for_each_weight_are_one_constant() -> None:
    """``b_i = H_ii + rho sqrt(m) N_i / 3`` for one rho and for one of each weight: m is 7 in both."""
    w, h = seven()
    one, each = bound_of(30.0, w, h), bound_of([torch.full_like(t, 30.0) for t in w], w, h)
    assert one.minimise(one.uniform) == each.minimise(each.uniform)
    assert one.minimise(one.truncated_normal) == each.minimise(each.truncated_normal)
    n = [0.1 * t.abs() + 0.1 for t in w]
    without = bound_of([torch.full_like(t, 30.0 / math.sqrt(7)) for t in w], w, h)
    assert without.minimise(without.uniform).value < each.minimise(each.uniform).value - 1e-3
    eta = 40.0
    b = [x + 30.0 * math.sqrt(7) * y / 3 for x, y in zip(h, n, strict=True)]
    sigma = [torch.minimum((eta * x / 3) ** -0.5, y) for x, y in zip(b, n, strict=True)]
    rise = sum(float((s**2 * x).sum()) / 6 for s, x in zip(sigma, b, strict=True))
    assert each.uniform(eta).rise == pytest.approx(rise, rel=1e-12)


def test_sqrt_m_is_the_same_factor_for_one_and_for_each() -> None:
    net = Quadratic(matrix([2000.0] * 6))
    options: dict[str, Any] = {"curvature": "exact", "noise_samples": 0}
    each = [torch.full_like(p, 30.0) for p in net.parameters()]
    found = [
        pacgen(net, mean_output, ANY, lipschitz=rho, sqrt_m=root, **options)
        for rho, root in ((30.0, True), (each, True), (30.0 * math.sqrt(6), False))
    ]
    assert found[0].psi == pytest.approx(found[1].psi, rel=1e-14)
    assert found[0].psi == pytest.approx(found[2].psi, rel=1e-14)
    assert found[0].uniform == found[1].uniform  # the bound has the factor in any case
    plain = pacgen(net, mean_output, ANY, lipschitz=30.0, **options)
    assert plain.uniform == found[0].uniform
    assert plain.psi < found[0].psi


@pytest.mark.parametrize(("law", "scale"), [("uniform", math.sqrt(3.0)), ("truncated_normal", 1.0)])
def test_the_scale_of_the_best_noise(law: str, scale: float) -> None:
    """``scale = sqrt(3 / eta)`` for uniform noise and ``1 / sqrt(eta)`` for truncated normal noise, both with ``rho
    sqrt(m) / 3``, make the operator's noise that of the bound: its rise ``sum E[u_i^2] b_i / 2`` comes out."""
    eta, rho, count = 3000.0, 4.0, 20_000
    w = [torch.full((count,), 1.0, dtype=torch.float64)]
    h = [torch.full((count,), 9.0, dtype=torch.float64)]
    root = math.sqrt(count)
    bound = NoiseBound(w, h, rho / root, gamma=0.1, eps=0.1, loss=0.0, samples=50, delta=0.05)
    moved = [w[0].clone()]
    ops.scaled_noise_(
        moved, ops.backup_like(moved), ops.random_key(1), distribution=law, scale=scale / math.sqrt(eta),
        gamma=0.1, eps=0.1, curvatures=h, lipschitz=rho / root * root / 3,
    )  # fmt: skip
    squares = (moved[0] - w[0]) ** 2
    expected = getattr(bound, law)(eta).rise / (0.5 * count * (9.0 + rho * 0.2 / 3))
    assert abs(float(squares.mean()) - expected) < 4 * float(squares.std()) / math.sqrt(count)
    if law == "uniform":
        sigma = optimal_sigma(w, h, rho / root, eta)[0]
        assert (squares.sqrt() <= sigma * (1 + 1e-12)).all()
