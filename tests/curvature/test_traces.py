"""Traces within a budget of products: values, errors that cover, layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from curvature_matrices import formed, ragged, symmetric, tiny_net
from flatmin import curvature, ops
from flatmin.curvature._probes import ScalarEstimate, student_quantile
from models import batches, small_net

SPECTRA: dict[str, Any] = {
    "outliers": np.r_[20.0, 15.0, 10.0, 8.0, 5.0, np.linspace(-1.0, 1.0, 95)],
    "geometric": 0.9 ** np.arange(100),
    "flat": np.linspace(-1.0, 3.0, 100),
}
ESTIMATORS = ["hutchinson", "hutch++", "xtrace"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_intervals_cover_and_estimates_are_unbiased(spectrum: str, estimator: str) -> None:
    """Over 200 seeds 90 to 99 % of the 95 % intervals hold the trace; the mean is within four standard errors."""
    a, exact = symmetric(SPECTRA[spectrum]), float(SPECTRA[spectrum].sum())
    found = [curvature.trace(a, products=48, estimator=estimator, seed=seed) for seed in range(200)]
    intervals = [estimate.interval() for estimate in found]
    assert 180 <= sum(low <= exact <= high for low, high in intervals) <= 198
    errors = np.array([estimate.value for estimate in found]) - exact
    assert abs(errors.mean()) < 4.0 * errors.std() / 200**0.5
    assert np.mean([e.stderr**2 for e in found]) ** 0.5 == pytest.approx(errors.std(), rel=0.25)


def test_what_a_few_eigenvalues_carry_is_found_by_the_two_others() -> None:
    a = symmetric(SPECTRA["outliers"])
    found = {e: curvature.trace(a, products=60, estimator=e) for e in ESTIMATORS}
    assert found["hutch++"].stderr < 0.3 * found["hutchinson"].stderr
    assert found["xtrace"].stderr < 0.3 * found["hutchinson"].stderr
    assert [found[e].samples for e in ESTIMATORS] == [60, 20, 30]


@pytest.mark.parametrize("estimator", ["hutch++", "xtrace"])
@pytest.mark.parametrize("values", [np.r_[5.0, 3.0, -1.0, np.zeros(97)], np.zeros(30), [2.0, 1.0, -4.0]])
def test_a_rank_within_the_budget_is_exact(values: Any, estimator: str) -> None:
    for seed in range(20):
        found = curvature.trace(symmetric(values), products=30, estimator=estimator, seed=seed)
        assert found.value == pytest.approx(float(np.sum(values)), abs=1e-13)
        assert abs(found.value - np.sum(values)) <= found.stderr < 1e-12


def test_xtrace_is_the_mean_of_the_estimates_that_leave_one_out() -> None:
    """By the definition: an orthonormal basis of A times all vectors but one, which then samples the rest."""
    a = symmetric(SPECTRA["geometric"])
    w = torch.stack([_probe(100, i) for i in range(6)], dim=1)
    estimates = []
    for i in range(6):
        q, _ = torch.linalg.qr(a @ torch.cat([w[:, :i], w[:, i + 1 :]], dim=1))
        rest = w[:, i] - q @ (q.T @ w[:, i])
        estimates.append(float((q.T @ a @ q).trace() + rest @ a @ rest))
    found = curvature.trace(a, products=12, estimator="xtrace")
    assert found.value == pytest.approx(float(np.mean(estimates)), rel=1e-12)
    # the spread of the six alone, which share their vectors, is too small
    assert found.stderr > float(np.std(estimates, ddof=1)) / 6**0.5


def _probe(n: int, draw: int) -> Tensor:
    v = torch.empty(n, dtype=torch.float64)
    ops.probe_([v], ops.random_key(0, draw))
    return v


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_of_a_network(matrix: str) -> None:
    net = tiny_net()
    exact = float(formed(net, ragged(), matrix).trace())
    for estimator in ESTIMATORS:
        found = curvature.trace(net, F.cross_entropy, ragged(), products=60, estimator=estimator, matrix=matrix)
        assert abs(found.value - exact) < 4.0 * found.stderr + 1e-12
        assert found.stderr < {"hutchinson": 0.4, "hutch++": 0.2, "xtrace": 0.2}[estimator] * exact


def test_hutchinson_is_hutchinson() -> None:
    net, data = small_net(torch.float64), batches(2, torch.float64)
    found = curvature.trace(net, F.cross_entropy, data, products=5)
    known = curvature.hutchinson_trace(net, F.cross_entropy, data, samples=5)
    assert found == pytest.approx(known, rel=1e-12)


def test_traces_of_layers_sum_to_the_whole() -> None:
    net = tiny_net()
    exact = formed(net, ragged(), "hessian").diagonal()
    found = curvature.layer_traces(net, F.cross_entropy, ragged(), samples=200)
    assert list(found) == ["1", "3"]
    for layer, block in (("1", exact[:111]), ("3", exact[111:])):
        assert abs(found[layer].value - float(block.sum())) < 4.0 * found[layer].stderr
        assert found[layer].samples == 200
    whole = curvature.trace(net, F.cross_entropy, ragged(), products=200)
    assert sum(e.value for e in found.values()) == pytest.approx(whole.value, rel=1e-12)
    by_parameter = curvature.layer_traces(net, F.cross_entropy, ragged(), samples=3, by="parameter", matrix="ggn")
    assert list(by_parameter) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    alone = curvature.layer_traces(net[1], lambda z, y: F.cross_entropy(z, y), [(x.flatten(1), y) for x, y in ragged()])
    assert list(alone) == ["weight", "bias"]


def test_students_quantiles() -> None:
    for n in (1, 2, 3, 5, 9, 30, 1000):
        for p in (0.5, 0.1, 0.05, 0.01):
            assert student_quantile(p, n) == pytest.approx(scipy.stats.t.ppf(1.0 - p / 2.0, n), rel=1e-4)
    low, high = ScalarEstimate(1.0, 2.0, 10).interval(0.9)
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.9, 9, 1.0, 2.0), rel=1e-5)
    assert np.isnan(ScalarEstimate(1.0, float("nan"), 1).interval()).all()


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "estimator": (ValueError, "estimator: 'exact' given", lambda: curvature.trace(torch.eye(9), estimator="exact")),
    "products": (ValueError, "products: 0 given", lambda: curvature.trace(torch.eye(9), products=0)),
    "too few": (ValueError, "products: 5 given; give an integer >= 6",
                lambda: curvature.trace(torch.eye(9), products=5, estimator="xtrace")),
    "level": (ValueError, "level: 95 given", lambda: ScalarEstimate(1.0, 1.0, 3).interval(95)),
    "samples": (ValueError, "samples: 0 given", lambda: curvature.layer_traces(small_net(), samples=0)),
    "by": (ValueError, "by: 'module' given", lambda: curvature.layer_traces(small_net(), by="module")),
    "no layers": (TypeError, "model: a tensor has no layers", lambda: curvature.layer_traces(torch.eye(3))),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_argument(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
