"""flatmin.pacgen: the metric, the bound and its optimum, and the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flatmin import curvature, ops
from flatmin.sharpness import PACGen, pacgen
from flatmin.sharpness._pac_bayes import NoiseBound, optimal_sigma
from models import batches, small_net

pytestmark = pytest.mark.usefixtures("one_thread")


class Weights(nn.Module):
    """A "model" that is a function of its weights, one value for all samples."""

    def __init__(self, f: Callable[[Tensor], Tensor], *values: float) -> None:
        super().__init__()
        self.f = f
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.w).expand(len(x))


def mean_output(output: Tensor, _: Tensor) -> Tensor:
    return output.mean()


def samples(n: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n), torch.zeros(n)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- golden vectors: the metric and sigma* of the bound, worked out by hand from their definitions ----

GOLDEN_W = (1.0, -0.5, 0.25, 0.0)
CURVED, FLAT = (200.0, 400.0, 50.0, -0.3), (2.0, 0.1, 0.0, -0.3)


@pytest.mark.parametrize(
    ("h", "rho", "psi", "capped"), [(CURVED, 5.0, 6.4984722791, 0.5), (FLAT, 0.5, math.log(78.0), 1.0)]
)
def test_golden_metric(h: tuple[float, ...], rho: float, psi: float, capped: float) -> None:
    net = Weights(torch.sum, *GOLDEN_W)
    for lipschitz in (rho, [torch.full((4,), rho)]):
        found = pacgen(net, mean_output, samples(3), curvature=[f64(*h)], lipschitz=lipschitz, noise_samples=0)
        assert found.psi == pytest.approx(psi, abs=1e-10)  # the digits that are given
        assert found.capped == capped
        assert [(layer.name, layer.size, layer.psi) for layer in found.layers] == [("w", 4, found.psi)]
        assert (found.samples, found.size, found.sharpness) == (3, 4, None)


def test_golden_metric_with_the_factor_of_the_bound() -> None:
    """rho sqrt(4) N_i with rho = 2.5 is rho N_i with rho = 5."""
    net = Weights(torch.sum, *GOLDEN_W)
    found = pacgen(net, mean_output, samples(3), curvature=[f64(*CURVED)], lipschitz=2.5, sqrt_m=True, noise_samples=0)
    assert found.psi == pytest.approx(6.4984722791, abs=1e-10)


@pytest.mark.parametrize(
    ("eta", "sigma"),
    [(1.0, (0.12227087, 0.08654846, 0.125, 0.1)), (10.0, (0.03866544, 0.02736903, 0.07713892, 0.1))],
)
def test_golden_sizes_of_the_noise(eta: float, sigma: tuple[float, ...]) -> None:
    w, h = [f64(*GOLDEN_W)], [f64(*CURVED)]
    for rho in (5.0, [torch.full((4,), 5.0)]):
        assert torch.allclose(optimal_sigma(w, h, rho, eta)[0], f64(*sigma), rtol=0, atol=5e-9)  # their digits
    # what expected sharpness draws: the operator's tally starts with the sum of the sizes
    tally = ops.scaled_noise_(
        w, ops.backup_like(w), ops.random_key(0), scale=math.sqrt(3 / eta), gamma=0.1, eps=0.1, curvatures=h,
        lipschitz=5.0 * math.sqrt(4) / 3,
    )  # fmt: skip
    assert float(tally[0]) == pytest.approx(sum(sigma), abs=2e-8)


# ---- the optimum of the bound, on random cases ----

finite = st.floats(-3.0, 3.0)
CASE = st.lists(st.tuples(finite, st.floats(-10.0, 1e4)), min_size=1, max_size=6)
RHO = st.floats(0.0, 1e3)
ETA = st.floats(1e-2, 1e6)


def objective(w: Tensor, h: Tensor, rho: float, eta: float, sigma: Tensor) -> Tensor:
    """The terms of the bound that depend on the sizes of uniform noise, one per weight, in the form of the derivation:
    sigma^2 (H / 6 + rho sqrt(m) N / 18) + log(tau / sigma) / eta, the first factor not negative."""
    n = 0.1 * w.abs() + 0.1
    a = (h / 6 + rho * math.sqrt(len(w)) * n / 18).clamp(min=0.0)
    return sigma**2 * a + ((w.abs() + n) / sigma).log() / eta


def tensors(case: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    w, h = f64(*(a for a, _ in case)), f64(*(b for _, b in case))
    return w, h


@given(CASE, RHO, ETA, st.floats(0.0, 1.0))
def test_the_closed_form_beats_other_sizes(
    case: list[tuple[float, float]], rho: float, eta: float, share: float
) -> None:
    w, h = tensors(case)
    n = 0.1 * w.abs() + 0.1
    best = optimal_sigma([w], [h], rho, eta)[0]
    assert (best <= n).all()
    value = objective(w, h, rho, eta, best)
    slack = 1e-12 * (1 + value.abs())  # some tens of roundings
    for other in (0.99 * best, 1.01 * best, share * n + (1 - share) * best, share * best + 1e-9):
        assert (objective(w, h, rho, eta, torch.minimum(other, n)) >= value - slack).all()


def noise_bound(w: Tensor, h: Tensor, rho: float, n: int = 100, delta: float = 0.05, loss: float = 0.0) -> NoiseBound:
    return NoiseBound([w], [h], rho, gamma=0.1, eps=0.1, loss=loss, samples=n, delta=delta)


def total(w: Tensor, h: Tensor, rho: float, eta: float, sigma: Tensor, n: int, delta: float) -> float:
    """The bound for uniform noise less the training loss."""
    return float(objective(w, h, rho, eta, sigma).sum()) - math.log(delta) / eta + eta / (2 * n)


@given(CASE, RHO, st.integers(1, 10**6), st.floats(1e-6, 0.9))
def test_the_bound_is_the_minimum_over_eta(case: list[tuple[float, float]], rho: float, n: int, delta: float) -> None:
    """Its value is that of its formula at its own eta, and none on a fine grid, each with its best sizes, is lower."""
    w, h = tensors(case)
    law = noise_bound(w, h, rho, n, delta, loss=0.25)
    found = law.minimise(law.uniform)
    here = total(w, h, rho, found.eta, optimal_sigma([w], [h], rho, found.eta)[0], n, delta)
    assert found.value == pytest.approx(0.25 + here, rel=1e-12)
    assert found.value == pytest.approx(
        found.loss + found.rise + found.divergence / found.eta + found.eta / (2 * found.samples), rel=1e-12
    )
    for k in range(-60, 61):
        eta = found.eta * 10 ** (k / 20)
        other = total(w, h, rho, eta, optimal_sigma([w], [h], rho, eta)[0], n, delta)
        assert other >= here - 1e-12 * (1 + here)


def test_the_bound_of_many_weights() -> None:
    """Bins stand for more than 65,536 weights while eta is searched; the result is exact all the same. They err by
    less than 1e-3 in log eta, two steps that contract (here by 20 each) leave 3e-6, and the bound is flat there."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(70_000, generator=generator, dtype=torch.float64)
    h = 1000 * torch.rand(70_000, generator=generator, dtype=torch.float64) ** 8
    law = noise_bound(w, h, 0.1, 1000)
    found = law.minimise(law.uniform)
    assert found.value == pytest.approx(
        total(w, h, 0.1, found.eta, optimal_sigma([w], [h], 0.1, found.eta)[0], 1000, 0.05), rel=1e-12
    )
    normal = law.minimise(law.truncated_normal)
    assert normal.value == law.truncated_normal(normal.eta).value
    for k in (-100, -10, -1, 1, 10, 100):
        assert law.uniform(found.eta * 1.001**k).value >= found.value * (1 - 1e-9)
        assert law.truncated_normal(normal.eta * 1.001**k).value >= normal.value * (1 - 1e-9)
    assert normal.value < found.value


def test_the_lowest_of_several_minima() -> None:
    """40 weights of 0 whose noise is cut at the same eta: log(tau / sigma) starts from 0, so the bound falls again
    beyond a first minimum. Checked on a grid, which also shows the two minima."""
    w, n = torch.zeros(40, dtype=torch.float64), 1000
    # capped up to eta = 1 / (N^2 H / 3) = sqrt(2 n log(1 / delta)) and a little more, the first minimum
    h = torch.full((40,), 3 / (0.01 * 90.0), dtype=torch.float64)
    law = noise_bound(w, h, 0.0, n)
    grid = [law.uniform(70 * 1.001**k).value for k in range(3000)]
    minima = [k for k in range(1, 2999) if grid[k] < min(grid[k - 1], grid[k + 1])]
    assert len(minima) == 2
    assert law.minimise(law.uniform).value <= min(grid)


@given(CASE, RHO, st.integers(1, 10**6))
def test_truncated_normal_noise_has_the_lower_bound(case: list[tuple[float, float]], rho: float, n: int) -> None:
    """It is the best of all laws in the box: at each eta, so also at the best."""
    w, h = tensors(case)
    law = noise_bound(w, h, rho, n)
    for eta in (1e-2, 1.0, 1e2, 1e4):
        slack = 1e-12 * (1 + law.uniform(eta).value)
        assert law.truncated_normal(eta).value <= law.uniform(eta).value + slack
    best = law.minimise(law.truncated_normal)
    assert best.value <= law.minimise(law.uniform).value * (1 + 1e-12)
    for k in range(-30, 31):
        assert law.truncated_normal(best.eta * 10 ** (k / 10)).value >= best.value * (1 - 1e-12)


# ---- moments of the truncated normal law, by integration ----


def integrated(sigma: float, cut: float, tau: float) -> tuple[float, float]:
    """Second moment, and divergence from the uniform law on (-tau, tau), of a normal law cut at ``cut``: by Simpson's
    rule on 20,001 points, whose error (cut / sigma / 1e4)^4 / 180 is below 1e-13 here."""
    x = torch.linspace(-cut, cut, 20001, dtype=torch.float64)
    weights = torch.full_like(x, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    weights *= 2 * cut / 20000 / 3
    log_density = -0.5 * (x / sigma) ** 2
    density = log_density.exp()
    mass = (weights * density).sum()
    density, log_density = density / mass, log_density - mass.log()
    second = (weights * density * x**2).sum()
    divergence = (weights * density * (log_density + math.log(2 * tau))).sum()
    return float(second), float(divergence)


@pytest.mark.parametrize("a", [1e-3, 0.1, 0.7, 1.0, 2.0, 5.0, 12.0])
def test_moments_of_truncated_normal_noise(a: float) -> None:
    """One weight, w = 2 and N = 0.3, with the curvature that makes sigma = N / a at eta = 50."""
    w, n, eta = 2.0, 0.3, 50.0
    sigma = n / a
    h = 1 / (eta * sigma**2)
    found = noise_bound(f64(w), f64(h), 0.0).truncated_normal(eta)
    second, divergence = integrated(sigma, n, w + n)
    assert found.rise == pytest.approx(second * h / 2, rel=1e-9, abs=1e-15)
    assert found.divergence + math.log(0.05) == pytest.approx(divergence, rel=1e-9)
    value = second * h / 2 + divergence / eta
    for factor in (0.9, 1.1):  # and sigma is the best
        second, divergence = integrated(sigma * factor, n, w + n)
        assert second * h / 2 + divergence / eta > value - 1e-14


def test_without_curvature_both_laws_are_uniform_on_the_box() -> None:
    law = noise_bound(f64(2.0, 0.0), f64(0.0, -1.0), 0.0)
    a, b = law.uniform(10.0), law.truncated_normal(10.0)
    assert a == b
    assert a.rise == 0.0
    assert a.divergence == pytest.approx(math.log(2.3 / 0.3) + math.log(1 / 0.05), rel=1e-15)


def test_the_operator_draws_the_law_of_the_bound() -> None:
    """ops.scaled_noise_ with "truncated_normal" has the second moment s sigma^2 of the bound, where sigma <= N."""
    eta, count, h = 100.0, 100_000, 9.0
    w = [torch.full((count,), 1.0, dtype=torch.float64)]
    sigma, n = 1 / math.sqrt(eta * h), 0.2
    ops.scaled_noise_(
        w, ops.backup_like(w), ops.random_key(1), distribution="truncated_normal", scale=1 / math.sqrt(eta),
        gamma=0.1, eps=0.1, curvatures=[torch.full((count,), h)],
    )  # fmt: skip
    squares = (w[0] - 1.0) ** 2
    one = noise_bound(f64(1.0), f64(h), 0.0).truncated_normal(eta)
    assert n / sigma == pytest.approx(6.0)
    error = float(squares.std()) / math.sqrt(count)
    assert abs(float(squares.mean()) - one.rise / (h / 2)) < 4 * error


# ---- the whole, on models ----


@pytest.mark.parametrize("rho", [0.0, 20.0])
def test_expected_sharpness_of_a_quadratic(rho: float) -> None:
    """Around the minimum of sum h_i w_i^2 / 2 uniform noise raises the loss by sum h_i sigma_i^2 / 6 on average."""
    h = f64(*(10.0 ** (k / 4) for k in range(12)))
    net = Weights(lambda w: 0.5 * (h * w**2).sum(), *([0.0] * 12))
    found = pacgen(net, mean_output, samples(50), curvature="exact", lipschitz=rho, noise_samples=300)
    sigma = optimal_sigma([net.w], [h], rho, found.eta)[0]
    rise = float((h * sigma**2).sum()) / 6
    allowed = float((rho * math.sqrt(12) * 0.1 * sigma**2).sum()) / 18
    assert found.uniform.rise == pytest.approx(rise + allowed, rel=1e-12)
    assert found.sharpness is not None
    assert found.sharpness.samples == 300
    assert abs(found.sharpness.value - rise) < 4 * found.sharpness.stderr < 0.2 * rise
    assert found.bound_uniform == found.uniform.value
    assert found.bound_truncated_normal == found.truncated_normal.value
    assert found.eta == found.uniform.eta


def relu_net(factor: float) -> nn.Sequential:
    """The same function for every factor: one layer is scaled up, the next one down."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        net[0].weight *= factor
        net[0].bias *= factor
        net[2].weight /= factor
    return net


def test_rescaling_a_relu_layer_changes_nothing_without_eps() -> None:
    """With eps = 0 and a constant for each element, w -> a w takes H to H / a^2 and rho to rho / a^3 (Dinh et al. 2017,
    arXiv 1703.04933, made this test of sharpness measures); with eps > 0 the metric moves."""
    torch.manual_seed(1)
    data = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return 100 * F.mse_loss(output, targets)  # curved enough that not all of the noise is capped

    def measure(factor: float, eps: float) -> PACGen:
        options: dict[str, Any] = {"curvature": "exact", "lipschitz": "element", "noise_samples": 2, "eps": eps}
        return pacgen(relu_net(factor), loss_fn, data, **options)

    first, second = measure(1.0, 0.0), measure(5.0, 0.0)
    # rounding alone: float64 sums of a few thousand terms, and difference quotients over steps of 0.1 |w|
    assert second.psi == pytest.approx(first.psi, rel=1e-9)
    assert second.bound_uniform == pytest.approx(first.bound_uniform, rel=1e-9)
    assert second.bound_truncated_normal == pytest.approx(first.bound_truncated_normal, rel=1e-9)
    assert first.sharpness is not None
    assert second.sharpness is not None
    assert second.sharpness.value == pytest.approx(first.sharpness.value, rel=1e-9)
    assert 0.0 < first.capped < 1.0  # both branches of the metric count
    assert abs(measure(5.0, 0.1).psi - measure(1.0, 0.1).psi) > 0.1


def test_curvature_from_every_source() -> None:
    net, data = small_net(torch.float64), batches(2, torch.float64)
    exact = curvature.exact_diag(net, F.cross_entropy, data)
    options: dict[str, Any] = {"lipschitz": 1.0, "noise_samples": 0, "curvature_samples": 2}
    by_name = pacgen(net, F.cross_entropy, data, curvature="exact", **options)
    given_list = pacgen(net, F.cross_entropy, data, curvature=exact, **options)
    by_call = pacgen(net, F.cross_entropy, data, curvature=curvature.exact_diag, **options)
    assert by_name.psi == given_list.psi == by_call.psi
    sources = [found.curvature_source for found in (by_name, given_list, by_call)]
    assert sources == ["exact", "given", "exact_diag"]
    assert by_name.curvature_stderr is None
    assert by_name.layers[0].curvature_stderr is None
    probed = pacgen(net, F.cross_entropy, data, **options)
    estimate = curvature.hutchinson_diag(net, F.cross_entropy, data, samples=2)
    assert all(map(torch.equal, probed.curvature, estimate.value))
    assert probed.curvature_stderr is not None
    assert all(map(torch.equal, probed.curvature_stderr, estimate.stderr))
    difference = pacgen(net, F.cross_entropy, data, method="finite_difference", **options)
    assert difference.uniform.rise == pytest.approx(probed.uniform.rise, rel=1e-6)
    assert difference.uniform.rise != probed.uniform.rise
    for name in ("gnb", "squared_gradient"):
        found = pacgen(net, F.cross_entropy, data, curvature=name, **options)
        assert all((h >= 0).all() for h in found.curvature)


def test_lipschitz_constants_are_those_of_the_estimator() -> None:
    net, data = small_net(torch.float64), batches(1, torch.float64)
    options: dict[str, Any] = {"curvature": "hutchinson", "curvature_samples": 2, "noise_samples": 0}
    own: dict[str, Any] = {"curvature_samples": 2}
    largest = pacgen(net, F.cross_entropy, data, **options)
    assert largest.lipschitz == curvature.lipschitz(net, F.cross_entropy, data, **own)
    clipped = pacgen(net, F.cross_entropy, data, lipschitz="quantile", quantile=0.5, **options)
    assert clipped.lipschitz == curvature.lipschitz(net, F.cross_entropy, data, mode="quantile", quantile=0.5, **own)
    each = pacgen(net, F.cross_entropy, data, lipschitz="element", **options)
    assert isinstance(each.lipschitz, list)
    assert isinstance(largest.lipschitz, float)
    assert max(float(t.max()) for t in each.lipschitz) == largest.lipschitz
    assert each.psi <= largest.psi
    # tensors as curvature: the quotients are between two Hutchinson estimates all the same
    exact = curvature.exact_diag(net, F.cross_entropy, data)
    given_list = pacgen(net, F.cross_entropy, data, curvature_samples=2, noise_samples=0, curvature=exact)
    assert given_list.lipschitz == largest.lipschitz


def test_layers_add_up_and_carry_their_names() -> None:
    net, data = small_net(), batches(2)
    found = pacgen(net, F.cross_entropy, data, curvature_samples=2, noise_samples=1)
    names = dict(net.named_parameters())
    assert [layer.name for layer in found.layers] == list(names)
    assert [layer.size for layer in found.layers] == [p.numel() for p in names.values()]
    assert sum(layer.psi for layer in found.layers) == pytest.approx(found.psi, rel=1e-12)
    shares = sum(layer.capped * layer.size for layer in found.layers) / found.size
    assert shares == pytest.approx(found.capped, rel=1e-12)
    assert found.samples == 16
    losses = [F.cross_entropy(net(x), y).item() for x, y in data]
    assert found.training_loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    last = pacgen(net, F.cross_entropy, data, curvature_samples=2, noise_samples=1, params=net[5].parameters())
    assert [layer.name for layer in last.layers] == ["5.weight", "5.bias"]


# ---- refusals ----


def test_a_curvature_that_is_not_finite_names_the_parameter() -> None:
    net, data = small_net(), batches(1)
    bad = [torch.ones_like(p) for p in net.parameters()]
    bad[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"curvature: not finite in 1 of 144 elements of '2\.weight'"):
        pacgen(net, F.cross_entropy, data, curvature=bad)
    bad[2][0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"lipschitz: not finite in 1 of 144 elements of '2\.weight'"):
        pacgen(net, F.cross_entropy, data, curvature_samples=1, lipschitz=bad)
    with torch.no_grad():
        net[5].bias[0] = float("nan")
    for kind in ("hutchinson", "gnb", "squared_gradient", "exact"):
        with pytest.raises(ValueError, match=r"curvature: not finite in .* of '0\.weight'"):
            pacgen(net, F.cross_entropy, data, curvature_samples=1, curvature=kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, "gamma: -0.1 given"),
        ({"eps": math.nan}, "eps: nan given"),
        ({"gamma": 0.0, "eps": 0.0}, "gamma and eps: both 0"),
        ({"delta": 1.0}, "delta: 1.0 given"),
        ({"curvature_samples": 0}, "curvature_samples: 0 given"),
        ({"noise_samples": -1}, "noise_samples: -1 given"),
        ({"curvature": "fisher"}, "curvature: 'fisher' given; give one of"),
        ({"curvature": [torch.ones(2)]}, "curvature: 1 tensors given for 6"),
        ({"curvature": lambda *_, **__: [torch.ones(2)] * 6}, "curvature: what it returned: item 0 is"),
        ({"lipschitz": "mean"}, "lipschitz: 'mean' given; give one of"),
        ({"lipschitz": -1.0}, "lipschitz: -1.0 given"),
        ({"quantile": 2.0, "lipschitz": "quantile"}, "quantile: 2.0 given"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pacgen(small_net(), F.cross_entropy, batches(1), **({"curvature_samples": 1} | options))
