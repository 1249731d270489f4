"""The operators of the Hessian, the generalised Gauss-Newton and the empirical Fisher matrix beside the matrices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvature_matrices import flat, formed, ragged, regression, tiny_net
from flatmin import curvature
from flatmin.curvature import _linear_operator
from models import batches, small_net

EPS = 2.0**-52

# torch.func's forward mode scripts its decompositions with an interface that torch has deprecated
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning"
    ),
]


def dense(A: curvature.CurvatureOperator) -> Tensor:
    return A @ torch.eye(A.shape[0], dtype=torch.float64)


MATRICES = ["hessian", "ggn", "fisher"]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("mode", ["plain", "BatchNorm, training", "BatchNorm, eval"])
def test_products_are_those_of_the_formed_matrix(matrix: str, mode: str) -> None:
    net = tiny_net("BatchNorm" in mode).train("training" in mode)
    expected = formed(net, ragged(), matrix)
    with curvature.linear_operator(net, F.cross_entropy, ragged(), matrix=matrix) as A:
        found = dense(A)
        assert A.products == A.shape[0]
    # sums of at most a few thousand rounded float64 products
    assert (found - expected).abs().max() < 1e4 * EPS * expected.abs().max()
    assert torch.linalg.eigvalsh(expected)[-1] > 0.1  # it is not 0 = 0
    assert (found - found.T).abs().max() < 1e4 * EPS * expected.abs().max()


@pytest.mark.parametrize("matrix", MATRICES)
def test_regression_and_a_loss_that_vmap_does_not_know(matrix: str) -> None:
    def branching(output: Tensor, y: Tensor) -> Tensor:
        assert float(output.detach().sum()) < 1e9  # reads a value: vmap refuses
        return F.mse_loss(output, y)

    torch.manual_seed(1)
    net, data = tiny_net(), regression()
    expected = formed(net, data, matrix, F.mse_loss)
    for loss_fn in (F.mse_loss, nn.MSELoss(), branching):
        found = dense(curvature.linear_operator(net, loss_fn, data, matrix=matrix))
        assert (found - expected).abs().max() < 1e4 * EPS * expected.abs().max()


def test_gauss_newton_of_softmax_and_of_squares_are_the_closed_forms() -> None:
    """For one linear layer: X' (diag(p) - p p') X and 2 X'X / outputs, in mean over the samples."""
    torch.manual_seed(2)
    net, x, y = nn.Linear(4, 3, bias=False).double(), torch.randn(11, 4).double(), torch.randint(3, (11,))
    p = torch.softmax(net(x), 1).detach()
    softmax = torch.stack(
        [torch.kron(torch.diag(q) - q[:, None] * q, a[:, None] * a) for q, a in zip(p, x, strict=True)]
    ).mean(0)
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = dense(curvature.linear_operator(net, F.cross_entropy, data, matrix="ggn"))
    assert torch.allclose(found, softmax, rtol=1e-13, atol=1e-16)
    squares = torch.kron(torch.eye(3).double(), 2.0 * x.T @ x / (3 * 11))
    targets = torch.randn(11, 3).double()
    data = [(x[:8], targets[:8]), (x[8:], targets[8:])]
    found = dense(curvature.linear_operator(net, F.mse_loss, data, matrix="ggn"))
    assert torch.allclose(found, squares, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("matrix", MATRICES)
def test_differences_are_the_products(matrix: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(tiny_net(norm=True), nn.Dropout(0.3)).train()
    v = torch.randn(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    exact = curvature.linear_operator(net, F.cross_entropy, ragged(), matrix=matrix) @ v
    options: dict[str, Any] = {"matrix": matrix, "method": "finite_difference"}
    found = curvature.linear_operator(net, F.cross_entropy, ragged(), **options) @ v
    # truncation is step^2 < 1e-8 times a third derivative of order 10
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, exact)
    A = curvature.linear_operator(net, F.cross_entropy, ragged(), **options)
    assert not (A @ torch.zeros_like(v)).any()


@pytest.mark.parametrize("matrix", MATRICES)
def test_micro_batches_change_nothing(matrix: str) -> None:
    net = tiny_net(norm=True).eval()
    whole = curvature.linear_operator(net, F.cross_entropy, ragged(), matrix=matrix)
    v = whole.probe(0, 0)
    sizes: list[int] = []
    hook = net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    found = curvature.linear_operator(net, F.cross_entropy, ragged(), matrix=matrix, micro_batch=3) @ v
    hook.remove()
    assert sizes == [3, 3, 2, 3]
    assert torch.allclose(found, whole @ v, rtol=1e-12, atol=1e-13)


def test_micro_batches_of_nested_inputs_and_a_shuffling_loader() -> None:
    class Inputs(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Any) -> Tensor:
            return self.net(inputs["image"][0])

    net, data = tiny_net(), ragged()
    v = curvature.linear_operator(net, F.cross_entropy, data).probe(0, 0)
    expected = curvature.linear_operator(net, F.cross_entropy, data) @ v
    nested = [({"image": [x], "names": ["a"] * len(x)}, y) for x, y in data]
    found = curvature.linear_operator(Inputs(net), F.cross_entropy, nested, micro_batch=2) @ v
    assert torch.allclose(found, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="micro_batch: cannot cut a tensor of shape"):
        curvature.linear_operator(net, F.cross_entropy, [(torch.ones(5, 36), torch.ones(4))], micro_batch=2) @ v
    generator = torch.Generator().manual_seed(1)
    pairs = [(a, b) for x, y in data for a, b in zip(x, y, strict=True)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True, generator=generator)
    before = generator.get_state()
    with curvature.linear_operator(net, F.cross_entropy, loader, micro_batch=3) as A:
        assert torch.allclose(A @ v, expected, rtol=1e-12)
        assert torch.equal(A @ v, A @ v)  # every pass in the same order
    assert torch.equal(generator.get_state(), before)


def test_lists_vectors_and_arrays_are_answered_in_kind() -> None:
    net = small_net()
    A = curvature.linear_operator(net, F.cross_entropy, batches(2))
    n = sum(p.numel() for p in net.parameters())
    assert A.shape == (n, n)
    assert [p.shape for p in A.params] == [p.shape for p in net.parameters()]
    assert A.names == [name for name, _ in net.named_parameters()]
    v = A.probe(0, 0)
    assert set(v.tolist()) == {-1.0, 1.0}
    product = A @ v
    as_list = A.matvec(A.unflatten(v))
    assert torch.equal(A.flatten(as_list), product)
    assert torch.equal(A @ torch.stack([v, v], 1), torch.stack([product, product], 1))
    assert torch.equal(A @ torch.ones(n, dtype=torch.float64), A @ torch.ones(n))
    array = A @ v.numpy()
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert (array == product.numpy()).all()
    assert (A @ np.stack([v.numpy()] * 2, 1)).shape == (n, 2)
    expected = curvature.hvp(net, F.cross_entropy, batches(2), A.unflatten(v))
    assert torch.equal(A.flatten(expected), product)


def test_the_operator_is_one_of_scipys() -> None:
    net = tiny_net()
    with curvature.linear_operator(net, F.cross_entropy, ragged()) as A:
        assert isinstance(A, sla.LinearOperator)
        assert sla.aslinearoperator(A) is A
        values = sla.eigsh(A, k=3, which="LA", return_eigenvectors=False)
        exact = torch.linalg.eigvalsh(formed(net, ragged(), "hessian"))
        assert np.sort(values) == pytest.approx(exact[-3:].numpy(), rel=1e-10)
        shifted = A + 2.0 * sla.aslinearoperator(np.eye(A.shape[0]))
        b = np.ones(A.shape[0])
        x, info = sla.cg(shifted, b, rtol=1e-10)
        assert info == 0
        assert np.abs(shifted @ x - b).max() < 1e-8
        assert (A.T @ b == A @ b).all()
        assert (A.H @ b == A.rmatvec(b)).all()


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    _linear_operator._operator_class.cache_clear()
    try:
        A = curvature.linear_operator(tiny_net(), F.cross_entropy, ragged())
        assert (A @ np.ones(A.shape[0])).shape == (A.shape[0],)
        with pytest.raises(AttributeError, match=r"rmatvec: SciPy's LinearOperator has it; pip install scipy"):
            A.rmatvec(np.ones(A.shape[0]))
        with pytest.raises(AttributeError, match="no attribute 'colour'"):
            A.colour  # noqa: B018
    finally:
        _linear_operator._operator_class.cache_clear()


# ---- parameters of all kinds ----


class Strange(nn.Module):
    """A tied, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(36, 36, bias=False, dtype=torch.float64)
        self.second = nn.Linear(36, 36, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.last = nn.Linear(36, 3, bias=False, dtype=torch.float64)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))
        return output


@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_tied_frozen_and_unused_parameters(matrix: str, method: str) -> None:
    net = Strange()
    A = curvature.linear_operator(net, F.cross_entropy, ragged(), matrix=matrix, method=method)
    assert A.names == ["unused", "first.weight", "last.weight"]
    v = A.probe(0, 0)
    product = A.matvec(A.unflatten(v))
    assert not product[0].any()

    names, params = A.names, A.params

    def f(w: Tensor, x: Tensor) -> Tensor:
        parts = torch.split(w, [p.numel() for p in params])
        values = {name: part.view(p.shape) for name, p, part in zip(names, params, parts, strict=True)}
        return functional_call(net, values, (x,))  # functional_call ties what is tied

    w, total = flat(params), torch.zeros_like(v)
    for x, y in ragged():
        j, z = jacrev(f)(w, x).detach(), f(w, x).detach()
        tangent = j @ v
        if matrix == "hessian":
            grad = torch.func.grad(lambda u, x=x, y=y: F.cross_entropy(f(u, x), y))
            part = torch.func.vjp(grad, w)[1](v)[0].detach()
        elif matrix == "ggn":
            p = torch.softmax(z, 1)
            inner = (p * tangent - p * (p * tangent).sum(1, keepdim=True)) / len(y)
            part = torch.einsum("bc,bcn->n", inner, j)
        else:
            slope = torch.softmax(z, 1) - F.one_hot(y, 3)
            g = torch.einsum("bc,bcn->bn", slope, j)
            part = g.T @ (g @ v) / len(y)
        total += len(y) * part
    expected = total / 11
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if method == "autograd" else {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(A.flatten(product), expected, **tolerance)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_subset_of_the_parameters_is_a_block(matrix: str) -> None:
    net = tiny_net()
    block = dense(curvature.linear_operator(net, F.cross_entropy, ragged(), matrix=matrix, params=net[3].parameters()))
    whole = formed(net, ragged(), matrix)
    assert torch.allclose(block, whole[-12:, -12:], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("matrix", MATRICES)
def test_bfloat16_parameters(matrix: str) -> None:
    """Vectors are float32; a product is that of the same weights in float64 to within a few roundings to 8 bits."""
    net = small_net().bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches(2)]
    A = curvature.linear_operator(net, F.cross_entropy, data, matrix=matrix)
    v = A.probe(0, 0)
    found = A @ v
    assert found.dtype == torch.float32
    exact = (
        curvature.linear_operator(net.double(), F.cross_entropy, [(x.double(), y) for x, y in data], matrix=matrix)
        @ v.double()
    )
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("matrix", MATRICES)
def test_what_is_flat_has_product_zero(matrix: str) -> None:
    """A loss without parameters, and one that is linear in the outputs, which are linear in the parameters."""
    x, y = torch.randn(4, 3), torch.zeros(4)
    nowhere = nn.Linear(3, 1)
    A = curvature.linear_operator(nowhere, lambda o, t: (o.detach() - t).mean(), [(x, y)], matrix=matrix)
    assert not (A @ torch.ones(4)).any()
    A = curvature.linear_operator(nowhere, lambda o, t: (o[:, 0] - t).mean(), [(x, y)], matrix=matrix)
    assert (A @ torch.ones(4)).any() == (matrix == "fisher")


# ---- no second derivative ----


class Once(torch.autograd.Function):
    """``x^2 / 2`` that cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_a_loss_without_second_derivative_names_the_way_out(matrix: str) -> None:
    net, data = tiny_net(), regression()

    def once(output: Tensor, y: Tensor) -> Tensor:
        return Once.apply(output - y).mean()

    options: dict[str, Any] = {"matrix": matrix}
    v = curvature.linear_operator(net, once, data).probe(0, 0)
    with pytest.raises(RuntimeError, match="method='finite_difference'"):
        curvature.linear_operator(net, once, data, **options) @ v
    found = curvature.linear_operator(net, once, data, method="finite_difference", **options) @ v
    exact = curvature.linear_operator(net, lambda o, y: 0.5 * F.mse_loss(o, y), data, **options) @ v
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6)


# ---- refusals ----


def _call(**options: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {"model": small_net(), "loss_fn": F.cross_entropy, "data": batches(1)} | options
    return lambda: curvature.linear_operator(**arguments) @ torch.ones(239)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Any:
        return self.net(x), 0


def summed(output: Any, y: Tensor) -> Tensor:
    return output.sum()


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "matrix": (ValueError, "matrix: 'kfac' given; give one of 'hessian'", _call(matrix="kfac")),
    "method": (ValueError, "method: 'exact' given; give one of", _call(method="exact")),
    "step": (ValueError, "step: 0.0 given", _call(step=0.0)),
    "micro_batch": (ValueError, "micro_batch: 0 given", _call(micro_batch=0)),
    "model": (TypeError, "model: function given", _call(model=lambda x: x)),
    "data": (TypeError, "data: an iterator", _call(data=iter(batches(1)))),
    "data in micro-batches": (TypeError, "data: an iterator", _call(data=iter(batches(1)), micro_batch=2)),
    "no pairs": (ValueError, "data: a batch is a float32 tensor", _call(data=[torch.ones(3)] * 3, micro_batch=2)),
    "params": (TypeError, "params: one tensor given", _call(params=torch.ones(2))),
    "tuple": (TypeError, "model: returned a tuple; matrix='ggn'", _call(model=Pair(), matrix="ggn")),
    "no samples": (ValueError, r"model: returned a tensor of shape \(2, 12\) for 8 targets; matrix='fisher'",
                   _call(model=nn.Sequential(small_net(), nn.Flatten(0), nn.Unflatten(0, (2, 12))), loss_fn=summed,
                         matrix="fisher")),
    "length": (ValueError, r"v: a tensor of shape \(3,\) given; give 239",
               lambda: curvature.linear_operator(small_net(), F.cross_entropy, batches(1)) @ torch.ones(3)),
    "list": (ValueError, "v: 1 tensors given for 6",
             lambda: curvature.linear_operator(small_net(), F.cross_entropy, batches(1)).matvec([torch.ones(3)])),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_argument(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_product_that_is_not_finite_names_the_parameter() -> None:
    net = small_net()
    with torch.no_grad():
        net[2].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"product with the Hessian: not finite in \d+ of 36 elements of '0.weight'"):
        curvature.eigenvalues(net, F.cross_entropy, batches(1), k=1)


def test_a_block_is_entered_once() -> None:
    A = curvature.linear_operator(small_net(), F.cross_entropy, batches(1))
    with A, pytest.raises(RuntimeError, match="entered already"), A:
        pass
    with A:
        pass
