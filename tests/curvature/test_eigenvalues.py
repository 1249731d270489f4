"""Eigenvalues by Lanczos against chosen spectra and exact Hessians: values, error bounds, multiplicities, restarts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from curvature_matrices import Q4, Q4_DATA, formed, q4_loss, ragged, symmetric, tiny_net
from flatmin import curvature
from models import batches, small_net

pytestmark = pytest.mark.usefixtures("one_thread")

BULK = np.linspace(-1.0, 1.0, 195)
SPECTRA: dict[str, Any] = {
    "outliers": np.r_[10.0, 5.0, 4.0, 3.0, 2.0, BULK],
    "a cluster": np.r_[5.0, 4.0 + 1e-6 * np.arange(3), 2.0, BULK],
    "negative": np.r_[-9.0, -8.0, -7.0, -6.5, -6.0, BULK - 2.0],
    "rank 7": np.r_[7.0, 6.0, 5.0, 4.0, 3.0, 2.0, -1.0, np.zeros(193)],
    "rank 2": np.r_[2.0, 1.0, np.zeros(198)],
    "three values": np.r_[3.0 * np.ones(10), np.ones(100), -2.0 * np.ones(90)],
    "one value": 2.0 * np.ones(50),
    "zero": np.zeros(50),
    "tiny": 1e-12 * np.r_[10.0, 5.0, 4.0, 3.0, 2.0, BULK],
    "smaller than the basis": np.r_[3.0, 2.0, 1.5, 0.5, 0.0, -1.0],
}


def exact_of(values: Any, which: str, k: int) -> list[float]:
    ordered = np.sort(values)[::-1]
    if which == "largest":
        return list(ordered[:k])
    if which == "smallest":
        return list(ordered[-k:])
    if which == "both":
        return list(ordered) if 2 * k > len(ordered) else [*ordered[:k], *ordered[-k:]]
    return sorted(sorted(values, key=abs)[-k:], reverse=True)


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_chosen_spectra(spectrum: str, which: str) -> None:
    values = SPECTRA[spectrum]
    k = 3 if len(values) < 10 else 5
    found = curvature.eigenvalues(symmetric(values), k=k, which=which, tol=1e-8)
    scale = np.abs(values).max()
    assert found.values == pytest.approx(exact_of(values, which, k), abs=1e-7 * scale, rel=0)
    assert all(found.converged)
    assert list(found.values) == sorted(found.values, reverse=True)


def test_a_breakdown_after_three_steps_goes_on_to_the_multiplicities() -> None:
    """Each of the three values is found once in each Krylov space: the second copy needs a second space."""
    a = symmetric(SPECTRA["three values"])
    assert curvature.eigenvalues(a, k=1).products == 3
    found = curvature.eigenvalues(a, k=4)
    assert found.values == pytest.approx([3.0] * 4, abs=1e-12)
    assert found.products <= 15
    float32 = curvature.eigenvalues(a.float(), k=4)
    assert float32.values == pytest.approx([3.0] * 4, abs=1e-5)


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_the_residual_is_what_it_says_and_bounds_the_error(tol: float) -> None:
    values = SPECTRA["outliers"]
    a = symmetric(values)
    found = curvature.eigenvalues(a, k=5, vectors=True, tol=tol)
    assert found.vectors is not None
    for value, residual, x in zip(found.values, found.residuals, found.vectors, strict=True):
        assert float(x.norm()) == pytest.approx(1.0, rel=1e-12)
        assert float((a @ x - value * x).norm()) == pytest.approx(residual, rel=1e-5, abs=1e-12)
        assert residual <= tol * abs(value)
        assert np.abs(values - value).min() <= residual + 1e-12
    checked = curvature.eigenvalues(a, k=5, tol=tol, check=True)
    assert checked.residuals == pytest.approx(found.residuals, rel=1e-5, abs=1e-12)
    assert checked.products == found.products + 5


@pytest.mark.parametrize("which", ["largest", "both", "magnitude"])
def test_restarts_find_the_same(which: str) -> None:
    """With a basis that holds little more than what is wanted, on a spectrum that takes 40 products without restart."""
    values = np.r_[2.0, 1.5, 1.4, -1.9, BULK]
    full = curvature.eigenvalues(symmetric(values), k=3, which=which, tol=1e-8, basis_size=150)
    found = curvature.eigenvalues(symmetric(values), k=3, which=which, tol=1e-8, basis_size=12, max_products=1000)
    assert found.values == pytest.approx(full.values, abs=1e-9)
    assert 12 < found.products < 4 * full.products, "more products than the basis holds: there were restarts"


def test_no_more_products_than_arpack() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    a = symmetric(np.r_[10.0, 5.0, 4.0, 3.0, 2.0, np.linspace(-1.0, 1.9, 995)]).numpy()
    count = 0

    def product(x: Any) -> Any:
        nonlocal count
        count += 1
        return a @ x

    operator = linalg.LinearOperator(a.shape, matvec=product, dtype=a.dtype)
    linalg.eigsh(operator, k=5, which="LA", tol=1e-3)
    assert curvature.eigenvalues(torch.from_numpy(a), k=5, tol=1e-3).products <= count


def test_what_has_not_converged_says_so() -> None:
    with pytest.warns(
        RuntimeWarning, match=r"eigenvalues: [1-5] of 5 have not converged to tol=1e-10 after 12 products"
    ):
        found = curvature.eigenvalues(symmetric(SPECTRA["outliers"]), k=5, tol=1e-10, max_products=12)
    assert found.products == 12
    assert not all(found.converged)
    assert "not converged" in str(found)
    assert f"{found.values[0]: .6e}" in str(found)
    # the bound holds all the same
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(SPECTRA["outliers"] - value).min() <= residual + 1e-12


def test_the_seed_alone_decides() -> None:
    a = symmetric(SPECTRA["outliers"])
    torch.manual_seed(1)
    first = curvature.eigenvalues(a)
    torch.manual_seed(2)
    assert curvature.eigenvalues(a) == first
    assert curvature.eigenvalues(a, seed=1) != first


# ---- warm starts ----


def test_a_warm_start_saves_products_and_sees_what_is_new() -> None:
    """Tracking: the matrix moves a little; then a new largest eigenvalue comes up, orthogonal to all that was known."""
    a = symmetric(np.r_[10.0, 5.0, 4.0, 3.0, 2.0, np.linspace(-1.0, 1.9, 995)])
    cold = curvature.eigenvalues(a, vectors=True)
    change = symmetric(np.linspace(-0.01, 0.01, 1000), seed=1)
    again = curvature.eigenvalues(a + change, start=cold)
    fresh = curvature.eigenvalues(a + change)
    assert again.values == pytest.approx(fresh.values, abs=2e-3)
    assert again.products < 0.6 * fresh.products
    exact = curvature.eigenvalues(a + change, tol=1e-6, vectors=True)  # so exact that nothing else is left in them
    assert exact.vectors is not None
    known = torch.stack(exact.vectors)
    new = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    new -= known.T @ (known @ new)
    new /= new.norm()
    found = curvature.eigenvalues(a + change + 12.0 * torch.outer(new, new), start=exact)
    assert found.values[0] == pytest.approx(12.0, abs=0.5)
    assert found.values[1:] == pytest.approx(exact.values[:4], abs=2e-3)


def test_forms_of_a_start() -> None:
    net, data = small_net(torch.float64), batches(2, torch.float64)
    known = curvature.eigenvalues(net, F.cross_entropy, data, k=3, vectors=True)
    assert known.vectors is not None
    assert [t.shape for t in known.vectors[0]] == [p.shape for p in net.parameters()]
    flat = torch.stack([torch.cat([t.flatten() for t in v]) for v in known.vectors])
    results = [
        curvature.eigenvalues(net, F.cross_entropy, data, k=3, start=start)
        for start in (known, known.vectors, flat, list(flat))
    ]
    assert len({r.values for r in results}) == 1
    one = [curvature.eigenvalues(net, F.cross_entropy, data, k=3, start=s) for s in (known.vectors[0], flat[0])]
    assert one[0] == one[1] != results[0]


# ---- the basis elsewhere and smaller ----


def test_a_basis_in_bfloat16() -> None:
    values = np.r_[10.0, 5.0, 4.0, 3.0, 2.0, np.linspace(-1.0, 1.0, 1995)]
    a = symmetric(values).float()
    found = curvature.eigenvalues(a, k=5, basis_dtype=torch.bfloat16, basis_size=20, vectors=True)
    # the squared rounding of 8 bits, over the distance to the next value
    assert found.values == pytest.approx(values[:5], rel=2e-3)
    assert found.vectors is not None
    for value, residual, x in zip(found.values, found.residuals, found.vectors, strict=True):
        assert x.dtype == torch.float32
        x = x / x.norm()
        assert float((a @ x - value * x).norm()) == pytest.approx(residual, rel=1e-3)


def test_a_basis_in_float32_of_a_model_in_float64() -> None:
    net, data = tiny_net(), ragged()
    exact = curvature.eigenvalues(net, F.cross_entropy, data, k=3, tol=1e-5)
    found = curvature.eigenvalues(
        net, F.cross_entropy, data, k=3, tol=1e-5, basis_dtype=torch.float32, basis_device="cpu"
    )
    assert found.values == pytest.approx(exact.values, rel=1e-6)


@pytest.mark.cuda(devices=1)
def test_a_basis_on_the_host_of_a_model_on_a_gpu() -> None:
    net, data = small_net().cuda(), batches(2)
    on_gpu = curvature.eigenvalues(net, F.cross_entropy, data, k=3, vectors=True)
    on_host = curvature.eigenvalues(net, F.cross_entropy, data, k=3, vectors=True, basis_device="cpu")
    host = curvature.eigenvalues(net.cpu(), F.cross_entropy, data, k=3)
    assert on_gpu.values == pytest.approx(host.values, rel=1e-4)
    assert on_host.values == pytest.approx(host.values, rel=1e-4)
    assert on_gpu.vectors is not None
    assert on_host.vectors is not None
    assert on_gpu.vectors[0][0].is_cuda
    assert not on_host.vectors[0][0].is_cuda


# ---- of models ----


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
def test_of_a_network(matrix: str) -> None:
    net = tiny_net()
    exact = torch.linalg.eigvalsh(formed(net, ragged(), matrix)).flip(0).tolist()
    found = curvature.eigenvalues(net, F.cross_entropy, ragged(), k=5, tol=1e-6, matrix=matrix, which="largest")
    assert found.values == pytest.approx(exact[:5], rel=1e-9)
    assert found.lambda_1 == found.values[0]
    assert found.lambda_1_over_lambda_5 == pytest.approx(exact[0] / exact[4], rel=1e-9)
    differences = curvature.eigenvalues(
        net, F.cross_entropy, ragged(), k=2, tol=1e-4, matrix=matrix, method="finite_difference"
    )
    assert differences.values == pytest.approx(exact[:2], rel=1e-6)
    float32 = curvature.eigenvalues(
        net.float(), F.cross_entropy, [(x.float(), y) for x, y in ragged()], k=5, matrix=matrix
    )
    assert float32.values == pytest.approx(exact[:5], rel=1e-5)


def test_golden_eigenvalues() -> None:
    found = curvature.eigenvalues(Q4(), q4_loss, Q4_DATA, k=4)
    assert found.values == pytest.approx([3.58351766, 1.09445949, 0.55315634, 0.53449151], abs=5e-9)
    assert found.products == 4


def test_layers_are_the_blocks_on_the_diagonal() -> None:
    net = tiny_net()
    exact = formed(net, ragged(), "hessian")
    found = curvature.layer_eigenvalues(net, F.cross_entropy, ragged(), k=2, tol=1e-8)
    assert list(found) == ["1", "3"]
    for block, layer in ((slice(0, 111), found["1"]), (slice(111, 123), found["3"])):
        assert layer.values == pytest.approx(torch.linalg.eigvalsh(exact[block, block]).flip(0)[:2].tolist(), rel=1e-9)
    by_parameter = curvature.layer_eigenvalues(net, F.cross_entropy, ragged(), k=4, by="parameter", which="both")
    assert list(by_parameter) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert len(by_parameter["3.bias"].values) == 2  # of a matrix of three
    assert len(by_parameter["3.weight"].values) == 8


# ---- refusals ----


def _call(**options: Any) -> Callable[[], Any]:
    return lambda: curvature.eigenvalues(symmetric(BULK), **options)


NET = small_net()
OPERATOR = curvature.linear_operator(NET, F.cross_entropy, batches(1))

REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "k": (ValueError, "k: 0 given", _call(k=0)),
    "too many": (ValueError, "k: 200 eigenvalues asked for of a matrix of 195", _call(k=100, which="both")),
    "which": (ValueError, "which: 'top' given; give one of 'largest'", _call(which="top")),
    "tol": (ValueError, "tol: -1.0 given", _call(tol=-1.0)),
    "basis_size": (ValueError, "basis_size: 6 given; 5 eigenvalues need at least 7", _call(basis_size=6)),
    "no basis_size": (ValueError, "basis_size: '9' given", _call(basis_size="9")),
    "seed": (ValueError, "seed: -1 given", _call(seed=-1)),
    "seed of a density": (ValueError, "seed: 0.5 given",
                          lambda: curvature.spectral_density(symmetric(BULK), seed=0.5)),  # type: ignore[arg-type]
    "seed of a trace": (ValueError, "seed: -1 given", lambda: curvature.trace(symmetric(BULK), seed=-1)),
    "basis_dtype": (TypeError, "basis_dtype: torch.int32 given", _call(basis_dtype=torch.int32)),
    "max_products": (ValueError, "max_products: 4 given", _call(max_products=4)),
    "no vectors": (ValueError, "start: holds no vectors",
                   lambda: _call(start=curvature.eigenvalues(symmetric(BULK), k=1, tol=0.5))()),
    "start": (ValueError, r"start: a tensor of shape \(3,\) given", _call(start=torch.ones(3))),
    "zero start": (ValueError, "start: a vector has norm 0", _call(start=torch.zeros(195))),
    "no start": (TypeError, "start: give an earlier result", _call(start=3)),
    "model": (TypeError, "model: list given; give the torch.nn.Module", lambda: curvature.eigenvalues([1.0])),
    "not square": (ValueError, r"model: a tensor of shape \(2, 3\)", lambda: curvature.eigenvalues(torch.ones(2, 3))),
    "not finite": (ValueError, "model: a product with the matrix is not finite",
                   lambda: curvature.eigenvalues(torch.full((5, 5), float("nan")), k=1)),
    "loss_fn": (TypeError, "loss_fn: not given", lambda: curvature.eigenvalues(NET)),
    "data": (TypeError, "data: not given", lambda: curvature.eigenvalues(NET, F.cross_entropy)),
    "beside an operator": (TypeError, "matrix: given beside an operator",
                           lambda: curvature.eigenvalues(OPERATOR, matrix="ggn")),
    "beside a matrix": (TypeError, "data: given beside an operator", _call(data=batches(1))),
    "ratio": (ValueError, "lambda_1_over_lambda_5: needs the five largest",
              lambda: curvature.eigenvalues(symmetric(BULK), k=1, tol=0.5).lambda_1_over_lambda_5),
    "k of layers": (ValueError, "k: 0 given",
                    lambda: curvature.layer_eigenvalues(NET, F.cross_entropy, batches(1), k=0)),
    "by": (ValueError, "by: 'block' given",
           lambda: curvature.layer_eigenvalues(NET, F.cross_entropy, batches(1), by="block")),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_argument(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
