"""Matrices of few directions and nothing else, or nearly: a basis is exhausted at once, in 32 bits and in 16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flatmin import curvature

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [None, torch.bfloat16, torch.float16]


def matrix(spectrum: list[float], n: int = 300, tail: float = 0.0) -> Tensor:
    """``spectrum``, and the rest evenly from 0 to ``tail``."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    rest = torch.linspace(0.0, tail, n - len(spectrum), dtype=torch.float64)
    return ((q * torch.cat([torch.tensor(spectrum, dtype=torch.float64), rest])) @ q.T).float()


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("tail", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("k", [3, 5])
def test_the_first_eigenvalues_found_are_not_taken_for_the_extreme_ones(which: str, tail: float, k: int) -> None:
    """Five products find five eigenvalues of [-3, 0, .., 0, 5, 20, 50]: the smallest five are others."""
    a = matrix([50.0, 20.0, 5.0, -3.0], tail=tail)
    exact = torch.linalg.eigvalsh(a.double()).tolist()
    ends = {"largest": exact[-k:], "smallest": exact[:k], "both": exact[:k] + exact[-k:]}
    expected = ends.get(which) or sorted(exact, key=abs)[-k:]
    for seed in range(3):
        found = curvature.eigenvalues(a, k=k, which=which, seed=seed)
        assert found.values == pytest.approx(sorted(expected, reverse=True), abs=2e-3)
        assert all(found.converged)
        assert found.products <= 60


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("products", [30, 150])
@pytest.mark.parametrize("estimator", ["hutch++", "xtrace"])
def test_traces_where_the_range_is_exhausted(estimator: str, products: int, dtype: torch.dtype | None) -> None:
    """Vectors in 16 bits lose their orthogonality where little is left of one: the trace was 1e8 instead of 72."""
    for tail in (0.0, 1e-4, 0.01):
        a = matrix([50.0, 20.0, 5.0, -3.0], tail=tail)
        for seed in range(3):
            found = curvature.trace(a, products=products, estimator=estimator, basis_dtype=dtype, seed=seed)
            assert abs(found.value - float(a.double().trace())) < 4.5 * found.stderr
            assert found.stderr < (0.01 if tail < 0.01 else 0.1)


@pytest.mark.parametrize("estimator", ["hutch++", "xtrace"])
def test_intervals_cover_with_vectors_in_16_bits(estimator: str) -> None:
    a = matrix([10.0 * 0.7**i for i in range(120)], n=120)
    exact, inside = float(a.double().trace()), 0
    for seed in range(100):
        low, high = curvature.trace(
            a, products=50, estimator=estimator, basis_dtype=torch.bfloat16, seed=seed
        ).interval()
        inside += low <= exact <= high
    assert inside >= 85


@pytest.mark.parametrize("dtype", KINDS)
def test_the_density_of_two_values_stays_between_them(dtype: torch.dtype | None) -> None:
    """Its range was -12000 to 12000."""
    a = matrix([3.0] * 150 + [1.0] * 150)
    found = curvature.spectral_density(a, probes=2, steps=40, basis_dtype=dtype)
    assert found.range == pytest.approx((1.0, 3.0), abs=0.02)
    assert found.trace_of(torch.square).value == pytest.approx(1500.0, abs=100.0)
