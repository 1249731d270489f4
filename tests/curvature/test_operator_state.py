"""What the methods on an operator leave behind: nothing. And two processes that share the data."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_curvature_state import _Tqdm, assert_as_before, snapshot, stateful_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curvature_matrices import tiny_net
from flatmin import curvature
from flatmin.curvature._basis import Basis
from flatmin.curvature._measurement import Measurement
from models import Batch, batches, small_net
from two_processes import run_on_two

pytestmark = pytest.mark.usefixtures("one_thread")


def _operator(**options: Any) -> Callable[[nn.Module, Any, Any], Any]:
    def measure(net: nn.Module, loss: Any, data: Any) -> Any:
        with curvature.linear_operator(net, loss, data, **options) as A:
            v = A.probe(0, 0)
            return A @ (A @ v)

    return measure


MEASURES: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    f"{matrix}, {method}": _operator(matrix=matrix, method=method)
    for matrix in ("hessian", "ggn", "fisher")
    for method in ("autograd", "finite_difference")
} | {
    "micro-batches": _operator(micro_batch=3),
    "outside of a with block": lambda net, loss, data: curvature.linear_operator(net, loss, data) @ torch.ones(210),
    "eigenvalues": lambda net, loss, data: curvature.eigenvalues(net, loss, data, k=1, tol=0.5),
    "density": lambda net, loss, data: curvature.spectral_density(net, loss, data, probes=1, steps=2),
    "trace": lambda net, loss, data: curvature.trace(net, loss, data, products=6, estimator="xtrace"),
    "layers": lambda net, loss, data: curvature.layer_traces(net, loss, data, samples=2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_everything_is_left_as_it_was(measure: Callable[..., Any], training: bool) -> None:
    net = stateful_net().train(training)
    before = snapshot(net)
    measure(net, F.cross_entropy, batches(2))
    assert_as_before(net, before)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_also_after_an_exception(measure: Callable[..., Any], call: int, kind: type[BaseException]) -> None:
    """Wherever it comes: in the first batch, in the second, while the weights are moved."""
    net, calls = stateful_net(), 0
    before = snapshot(net)

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            output: Tensor = self.net(x)
            if calls == call:
                raise kind("here")
            return output

    with pytest.raises(kind, match="here"):
        measure(Interrupted(), F.cross_entropy, batches(1))
        measure(Interrupted(), F.cross_entropy, batches(1))  # for those that make fewer passes
        measure(Interrupted(), F.cross_entropy, batches(1))
        measure(Interrupted(), F.cross_entropy, batches(1))
    assert_as_before(net, before)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_nothing_outlives_the_call(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a garbage collector: no measurement, none of its tensors, and between batches no graph."""

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()
            kept.add(self)

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(len(kept))
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda held: held.tensor):
                output: Tensor = super().forward(x)
            return output

    kept: weakref.WeakSet[Any] = weakref.WeakSet()
    measurements: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []
    plain = Measurement.__init__

    def init(self: Measurement, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        measurements.add(self)

    monkeypatch.setattr(Measurement, "__init__", init)
    net = Watched(*stateful_net())
    gc.collect()
    gc.disable()
    try:
        measure(net, F.cross_entropy, batches(2))
        assert not kept
        assert not measurements
    finally:
        gc.enable()
    assert len(alive) > 1
    assert not any(alive)


def test_a_basis_does_not_outlive_its_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    bases: weakref.WeakSet[Any] = weakref.WeakSet()
    plain = Basis.__init__

    def init(self: Basis, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        bases.add(self)

    monkeypatch.setattr(Basis, "__init__", init)
    gc.disable()
    try:
        found = curvature.eigenvalues(small_net(), F.cross_entropy, batches(1), k=2, vectors=True)
        assert not bases
    finally:
        gc.enable()
    assert found.vectors is not None
    # two vectors, and not the 40 of the basis
    assert found.vectors[0][0].untyped_storage().nbytes() == 2 * 239 * 4


def test_gradients_switched_off_by_the_caller() -> None:
    net, data = stateful_net().eval(), batches(2)
    expected = curvature.eigenvalues(net, F.cross_entropy, data, k=2)
    with torch.no_grad():
        assert curvature.eigenvalues(net, F.cross_entropy, data, k=2) == expected
    with torch.inference_mode():
        assert curvature.eigenvalues(net, F.cross_entropy, data, k=2) == expected


def test_one_block_serves_many_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is saved once, and every method finds what it finds by itself."""
    net, data = stateful_net().train(), batches(2)
    alone = (
        curvature.eigenvalues(net, F.cross_entropy, data, k=2),
        curvature.trace(net, F.cross_entropy, data, products=6),
        curvature.spectral_density(net, F.cross_entropy, data, probes=1, steps=3).nodes[0].tolist(),
        curvature.layer_traces(net, F.cross_entropy, data, samples=2),
    )
    entered: list[Measurement] = []
    plain = Measurement.__enter__

    def enter(self: Measurement) -> Measurement:
        entered.append(self)
        return plain(self)

    monkeypatch.setattr(Measurement, "__enter__", enter)
    with curvature.linear_operator(net, F.cross_entropy, data) as A:
        together = (
            curvature.eigenvalues(A, k=2),
            curvature.trace(A, products=6),
            curvature.spectral_density(A, probes=1, steps=3).nodes[0].tolist(),
            curvature.layer_traces(A, samples=2),
        )
    assert together == alone
    assert len(entered) == 1


def test_the_bar_says_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Bar(_Tqdm):
        def set_postfix_str(self, text: str) -> None:
            notes.append(text)

    stub = types.ModuleType("tqdm")
    stub.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", stub)
    monkeypatch.setattr(_Tqdm, "made", [])
    found = curvature.eigenvalues(small_net(), F.cross_entropy, batches(3), k=2, progress=True)
    (bar,) = _Tqdm.made
    assert bar.options["desc"] == "Lanczos"
    assert bar.count == 3 * found.products
    assert not bar.open
    assert len(notes) == found.products
    assert notes[-1].startswith("2 of 2 converged, largest residual ")
    curvature.spectral_density(small_net(), F.cross_entropy, batches(3), probes=2, steps=2, progress=True)
    assert _Tqdm.made[1].count == _Tqdm.made[1].options["total"] == 3 * 4
    assert notes[-1] == "probe 2 of 2"


# ---- two processes ----


def _share(rank: int) -> list[Batch]:
    """Of 19 samples the first rank has 13, the second 6."""
    (x, y), (u, v), (a, b) = batches(3, torch.float64)
    return [(x, y), (u[:5], v[:5])] if rank == 0 else [(u[5:], v[5:]), (a[:3], b[:3])]


def _two(rank: int, matrix: str, method: str) -> None:
    net, everything = small_net(torch.float64), _share(0) + _share(1)
    options: dict[str, Any] = {"matrix": matrix, "method": method}
    both: dict[str, Any] = options | {"process_group": dist.group.WORLD}
    whole = curvature.linear_operator(net, F.cross_entropy, everything, **options)
    v = whole.probe(0, 0)
    expected = whole @ v
    product = curvature.linear_operator(net, F.cross_entropy, _share(rank), **both) @ v
    tolerance = 1e-13 if method == "autograd" else 1e-9
    assert float((product - expected).norm()) < tolerance * float(expected.norm())
    assert not (curvature.linear_operator(net, F.cross_entropy, _share(rank), **both) @ torch.zeros_like(v)).any()
    # a DistributedDataParallel brings its group
    ddp = DistributedDataParallel(net)
    product = curvature.linear_operator(ddp, F.cross_entropy, _share(rank), **options) @ v
    assert float((product - expected).norm()) < tolerance * float(expected.norm())
    if method != "autograd":
        return
    alone = curvature.eigenvalues(net, F.cross_entropy, everything, k=3, tol=1e-6, matrix=matrix)
    found = curvature.eigenvalues(net, F.cross_entropy, _share(rank), k=3, tol=1e-6, **both)
    assert found.products == alone.products
    assert max(abs(a - b) for a, b in zip(found.values, alone.values, strict=True)) < 1e-10
    density = curvature.spectral_density(net, F.cross_entropy, _share(rank), probes=2, steps=5, **both)
    expected_density = curvature.spectral_density(net, F.cross_entropy, everything, probes=2, steps=5, matrix=matrix)
    assert torch.allclose(density.nodes[1], expected_density.nodes[1], rtol=1e-9)
    trace = curvature.trace(net, F.cross_entropy, _share(rank), products=8, estimator="xtrace", **both)
    expected_trace = curvature.trace(net, F.cross_entropy, everything, products=8, estimator="xtrace", matrix=matrix)
    assert abs(trace.value - expected_trace.value) < 1e-9
    # every rank has found the same to the bit
    mine = torch.tensor([*found.values, *found.residuals, trace.value, *density.nodes[0].tolist()], dtype=torch.float64)
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


@pytest.mark.parametrize(
    ("matrix", "method"), [("hessian", "autograd"), ("ggn", "autograd"), ("fisher", "finite_difference")]
)
def test_two_processes_are_one(matrix: str, method: str) -> None:
    run_on_two(_two, matrix, method)


def test_agreement_takes_the_first_ranks_numbers() -> None:
    run_on_two(_agree)


def _agree(rank: int) -> None:
    A = curvature.linear_operator(tiny_net(), F.cross_entropy, batches(1), process_group=dist.group.WORLD)
    numbers = torch.tensor([1.0 + rank, 2.0], dtype=torch.float64)
    assert A.agree(numbers).tolist() == [1.0, 2.0]
