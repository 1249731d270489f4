"""Stochastic Lanczos quadrature against golden values, exact spectra and closed forms."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from curvature_matrices import Q4, Q4_DATA, formed, q4_loss, ragged, symmetric, tiny_net
from flatmin import curvature, ops
from flatmin.curvature._basis import Basis
from flatmin.curvature._density import quadrature

SPECTRUM = np.r_[10.0, 5.0, np.linspace(-0.5, 1.0, 98)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def density() -> curvature.SpectralDensity:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # made before one_thread is: sums of torch differ from one number of threads to the next
    made = curvature.spectral_density(symmetric(SPECTRUM), probes=40, steps=30)
    torch.set_num_threads(before)
    return made


def test_golden_quadrature() -> None:
    """From v = (1, 1, -1, 1) / 2 four steps are exact."""
    with curvature.linear_operator(Q4(), q4_loss, Q4_DATA) as A:
        basis = Basis(A, 4)
        basis.start(torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
        nodes, weights, products = quadrature(A, basis)
    assert nodes.tolist() == pytest.approx([0.53449151, 0.55315634, 1.09445949, 3.58351766], abs=5e-9)
    assert weights.tolist() == pytest.approx([0.01799309, 0.58217667, 0.16745062, 0.23237962], abs=5e-9)
    assert float(weights @ nodes) == pytest.approx(1.34765625, abs=1e-14)
    assert products == 4


def test_nodes_and_weights_are_a_gauss_rule(density: curvature.SpectralDensity) -> None:
    """Of each probe: exact for polynomials up to degree 59, on random vectors of our own keys."""
    a, draw = symmetric(SPECTRUM), 3
    nodes, weights = density.nodes[draw], density.weights[draw]
    assert len(density.nodes) == 40
    assert density.products == 40 * 30
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-13)
    v = torch.empty(100, dtype=torch.float64)
    ops.probe_([v], ops.random_key(0, draw))
    x = v / 10.0
    for degree in range(1, 30):
        x = a @ x / 10.0
        assert float((weights * (nodes / 10.0) ** degree).sum()) == pytest.approx(float(v @ x) / 10.0, rel=1e-10)


def test_functions_of_the_spectrum(density: curvature.SpectralDensity) -> None:
    """Each within four standard errors of the sum over the eigenvalues; for a shifted identity exact."""
    for f in (lambda x: x, lambda x: x**2, torch.exp, lambda x: torch.log(x + 1.0)):
        exact = float(f(torch.from_numpy(SPECTRUM)).sum())
        found = density.trace_of(f)
        assert found.samples == 40
        assert abs(found.value - exact) < 4.0 * found.stderr
        assert found.stderr < 0.3 * abs(exact)
    identity = curvature.spectral_density(3.0 * torch.eye(50, dtype=torch.float64), probes=2, steps=5)
    assert identity.products == 2  # each Krylov space is exhausted at once
    assert identity.trace_of(torch.log) == pytest.approx((50.0 * math.log(3.0), 0.0, 2), abs=1e-10)


def test_standard_errors_cover() -> None:
    a, inside, exact = symmetric(SPECTRUM), 0, float(SPECTRUM.sum())
    for seed in range(200):
        low, high = curvature.spectral_density(a, probes=12, steps=3, seed=seed).trace_of(lambda x: x).interval()
        inside += low <= exact <= high
    assert 180 <= inside <= 198


@pytest.mark.parametrize(("eta", "value"), [(0.5, 0.9808292530), (0.01, 0.7531438839)])
def test_the_regulariser_of_label_noise(eta: float, value: float) -> None:
    a = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    found = curvature.spectral_density(a, probes=3, steps=2).trace_of(
        lambda x: -torch.log(1.0 - eta * x / 2.0) / (2.0 * eta)
    )
    assert found.value == pytest.approx(value, abs=5e-11)


def test_mass_below_zero(density: curvature.SpectralDensity) -> None:
    share = float((SPECTRUM < 0.0).mean())
    found = density.negative_mass
    assert abs(found.value - share) < 4.0 * found.stderr + 1.0 / 30
    assert density.mass_below(-0.6).value == 0.0
    assert density.mass_below(11.0).value == pytest.approx(1.0)
    # the rounding of eigenvalues that are 0 is not below 0
    rank_one = curvature.spectral_density(symmetric(np.r_[5.0, np.zeros(99)]), probes=5, steps=10)
    assert rank_one.negative_mass.value < 1e-12


@pytest.mark.parametrize("matrix", ["ggn", "fisher"])
def test_what_is_zero_is_not_below_zero_in_float32(matrix: str) -> None:
    """Matrices without a negative eigenvalue and with many that are 0: in float32 nodes lie on both sides of it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    x, y = torch.randn(30, 20), torch.randint(4, (30,))
    x[:, :10] = 0.0
    found = curvature.spectral_density(net, F.cross_entropy, (x, y), probes=2, steps=150, matrix=matrix)
    assert found.range[0] < 0.0
    assert found.negative_mass.value == 0.0


def test_grid(density: curvature.SpectralDensity) -> None:
    """The bumps integrate to 1, and are the eigenvalues' own within the error."""
    grid, value, stderr = density.on_grid(2000, sigma=0.2)
    step = float(grid[1] - grid[0])
    assert float(value.sum()) * step == pytest.approx(1.0, rel=1e-5)
    exact = torch.from_numpy(np.exp(-0.5 * ((grid.numpy()[:, None] - SPECTRUM) / 0.2) ** 2).mean(1))
    exact /= 0.2 * math.sqrt(2.0 * math.pi)
    inside = (value - exact).abs() <= 4.0 * stderr + 1e-3 * exact.max()
    assert float(inside.double().mean()) > 0.98
    one = curvature.spectral_density(symmetric(SPECTRUM), probes=1, steps=10)
    assert one.on_grid(10)[2].isnan().all()
    flat = curvature.spectral_density(torch.eye(5), probes=2, steps=3)
    assert flat.on_grid()[1].isfinite().all()


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_of_a_network(matrix: str) -> None:
    net = tiny_net()
    exact = formed(net, ragged(), matrix)
    found = curvature.spectral_density(net, F.cross_entropy, ragged(), probes=20, steps=20, matrix=matrix)
    trace = found.trace_of(lambda x: x)
    assert abs(trace.value - float(exact.trace())) < 4.0 * trace.stderr
    # the probes are those of the Hutchinson estimate
    same = curvature.trace(net, F.cross_entropy, ragged(), products=20, matrix=matrix)
    assert trace.value == pytest.approx(same.value, rel=1e-9)
    assert trace.stderr == pytest.approx(same.stderr, rel=1e-9)
    largest = float(torch.linalg.eigvalsh(exact)[-1])
    assert found.range[1] == pytest.approx(largest, rel=1e-6)
    assert (found.negative_mass.value < 1e-9) == (matrix != "hessian")
    small = curvature.spectral_density(
        net, F.cross_entropy, ragged(), probes=20, steps=20, matrix=matrix, basis_dtype=torch.bfloat16
    ).trace_of(lambda x: x)
    assert small.value == pytest.approx(trace.value, rel=0.02)


def test_text_and_equal_seeds(density: curvature.SpectralDensity) -> None:
    text = str(density)
    assert "100 eigenvalues, 40 probes, 1200 products" in text
    assert f"{density.trace_of(lambda x: x).value:.6g}" in text
    again = curvature.spectral_density(symmetric(SPECTRUM), probes=2, steps=30)
    assert all(torch.equal(x, y) for x, y in zip(again.nodes, density.nodes, strict=False))


# ---- the figure ----


def test_figure(density: curvature.SpectralDensity, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = density.plot(tmp_path / "density.png", points=500)
    assert (tmp_path / "density.png").stat().st_size > 10_000
    linear, logarithmic = figure.axes
    assert (linear.get_yscale(), logarithmic.get_yscale()) == ("linear", "log")
    for axis in figure.axes:
        assert axis.get_xlabel() == "eigenvalue / (loss / weight$^2$)"
        grid, value = axis.lines[0].get_data()
        expected = density.on_grid(500)
        assert np.array_equal(grid, expected[0].numpy())
        assert np.array_equal(value, expected[1].numpy())
    assert linear.get_ylabel() == "density / (weight$^2$ / loss)"
    assert linear.get_title() == "100 eigenvalues, 40 probes"
    below = density.negative_mass
    share = rf"{100.0 * below.value:.3g} $\pm$ {100.0 * below.stderr:.2g} %"
    assert logarithmic.get_title() == f"below 0: {share} of the eigenvalues"
    assert [t.get_text() for t in linear.get_legend().get_texts()] == ["95 % interval over the probes"]
    single = curvature.spectral_density(symmetric(SPECTRUM), probes=1, steps=10).plot()
    assert single.axes[0].get_title() == "100 eigenvalues, 1 probe"
    assert "pm" not in single.axes[1].get_title()


def test_figure_without_matplotlib(density: curvature.SpectralDensity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        density.plot()


# ---- refusals ----

A = symmetric(SPECTRUM)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "probes": (ValueError, "probes: 0 given", lambda: curvature.spectral_density(A, probes=0)),
    "steps": (ValueError, "steps: 0 given", lambda: curvature.spectral_density(A, steps=0)),
    "basis_dtype": (TypeError, "basis_dtype: 16 given", lambda: curvature.spectral_density(A, basis_dtype=16)),  # type: ignore[arg-type]
    "f": (TypeError, "f: returned a float", lambda: curvature.spectral_density(A, steps=2).trace_of(lambda x: 1.0)),  # type: ignore[arg-type, return-value]
    "sigma": (ValueError, "sigma: 0.0 given", lambda: curvature.spectral_density(A, steps=2).on_grid(sigma=0.0)),
    "points": (ValueError, "points: 1 given", lambda: curvature.spectral_density(A, steps=2).on_grid(1)),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_argument(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
