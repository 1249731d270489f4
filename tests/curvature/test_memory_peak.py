"""What the methods on an operator keep in memory: the basis, and one product with 10 % to spare. Nothing afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocations import Allocated, allocated
from flatmin import curvature
from flatmin.curvature import _basis

VECTORS = 10  # of the basis
FLOAT, BFLOAT16 = 4, 2
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def small_pieces(restore_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of a basis that is converted is as small a part of this net as of a large one."""
    torch.set_num_threads(1)
    monkeypatch.setattr(_basis, "_COLUMNS_CPU", 1 << 12)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))


N = sum(p.numel() for p in net().parameters())


def batches(samples: int = 48, count: int = 2) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(samples, 64, generator=generator), torch.randint(10, (samples,), generator=generator))
        for _ in range(count)
    ]


def one_product(data: Batches, **options: Any) -> Allocated:
    """With a vector that is made for it."""
    model = net()

    def run() -> None:
        with curvature.linear_operator(model, F.cross_entropy, data, progress=False, **options) as A:
            A @ A.probe(0, 0)

    return allocated(run)


def test_every_allocation_is_seen() -> None:
    """Of three tensors two are alive at a time, and one stays."""
    kept: list[Tensor] = []

    def run() -> None:
        a = torch.ones(1000)
        b = a.to(torch.float64)
        del a
        kept.append(b.to(torch.float32))

    assert allocated(run) == (12 * 1000, 4 * 1000)


def _eigenvalues(**options: Any) -> Callable[[nn.Module, Batches], Any]:
    options = {"k": 2, "basis_size": VECTORS, "tol": 1e-2, "max_products": 14} | options
    return lambda model, data: curvature.eigenvalues(model, F.cross_entropy, data, **options)


def _density(**options: Any) -> Callable[[nn.Module, Batches], Any]:
    options = {"probes": 2, "steps": VECTORS} | options
    return lambda model, data: curvature.spectral_density(model, F.cross_entropy, data, **options)


def _trace(products: int, estimator: str, **options: Any) -> Callable[[nn.Module, Batches], Any]:
    return lambda model, data: curvature.trace(
        model, F.cross_entropy, data, products=products, estimator=estimator, **options
    )


def _hvp(model: nn.Module, data: Batches) -> Any:
    return curvature.hvp(model, F.cross_entropy, data, [torch.ones_like(p) for p in model.parameters()])


#: The call, and bytes for each parameter that it may keep beside a product: the vectors that its page says.
CALLS: dict[str, tuple[Callable[[nn.Module, Batches], Any], int]] = {
    "hvp": (_hvp, 0),
    "eigenvalues": (_eigenvalues(), FLOAT * VECTORS),
    "eigenvalues, bfloat16": (_eigenvalues(basis_dtype=torch.bfloat16, check=False), BFLOAT16 * VECTORS),
    "eigenvalues, checked": (_eigenvalues(check=True), FLOAT * VECTORS),
    "eigenvalues, bfloat16, checked": (_eigenvalues(basis_dtype=torch.bfloat16), BFLOAT16 * VECTORS),
    "eigenvalues and vectors": (_eigenvalues(vectors=True, check=True), FLOAT * (VECTORS + 2)),
    "density": (_density(), FLOAT * VECTORS),
    "density, bfloat16": (_density(basis_dtype=torch.bfloat16), BFLOAT16 * VECTORS),
    "Hutchinson": (_trace(6, "hutchinson"), 0),
    "Hutch++": (_trace(12, "hutch++"), FLOAT * 4),
    "XTrace": (_trace(12, "xtrace"), FLOAT * 6),
    "XTrace, bfloat16": (_trace(12, "xtrace", basis_dtype=torch.bfloat16), BFLOAT16 * 6),
}


@pytest.mark.filterwarnings("ignore:eigenvalues:RuntimeWarning")
@pytest.mark.parametrize(("call", "basis"), CALLS.values(), ids=CALLS)
def test_the_peak_is_one_product_and_the_basis(call: Callable[[nn.Module, Batches], Any], basis: int) -> None:
    model, data = net(), batches()
    product = one_product(data).peak
    found = allocated(lambda: call(model, data))
    assert basis * N <= found.peak <= 1.1 * product + basis * N
    assert found.left == 0


@pytest.mark.filterwarnings("ignore:eigenvalues:RuntimeWarning")
@pytest.mark.parametrize("matrix", ["ggn", "fisher"])
def test_of_other_matrices_too(matrix: str) -> None:
    model, data = net(), batches()
    product = one_product(data, matrix=matrix).peak
    found = allocated(lambda: _eigenvalues(matrix=matrix)(model, data))
    assert found.peak <= 1.1 * product + FLOAT * VECTORS * N
    assert found.left == 0


@pytest.mark.filterwarnings("ignore:eigenvalues:RuntimeWarning")
def test_earlier_vectors_to_start_from_are_not_copied() -> None:
    model, data = net(), batches()
    product = one_product(data).peak
    earlier = _eigenvalues(k=8, vectors=True)(model, data)
    found = allocated(lambda: _eigenvalues(start=earlier)(model, data))
    assert found.peak <= 1.1 * product + FLOAT * VECTORS * N


def test_micro_batches_bound_it() -> None:
    """A batch of 512 samples takes what one of 32 takes; without them, much more."""
    model, large = net(), batches(512, 1)
    small = allocated(lambda: _density(steps=3)(model, batches(32)))
    whole = allocated(lambda: _density(steps=3)(model, large))
    cut = allocated(lambda: _density(steps=3, micro_batch=32)(model, large))
    assert cut.peak <= 1.02 * small.peak < 0.5 * whole.peak
    assert cut.left == 0
