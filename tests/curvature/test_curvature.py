"""The estimates of flatmin.curvature against exact Hessians in float64 and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jvp

from flatmin import curvature
from functions_of_weights import ANY, Function, mean_output, quadratic
from models import Batch, batches, small_net

EPS = 2.0**-52  # of float64

# torch.func's forward mode scripts its decompositions with an interface that torch has deprecated
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning"
    ),
]


def ragged(count: int = 2) -> list[Batch]:
    """Batches of 8, the last one of 3."""
    *full, (x, y) = batches(count, torch.float64)
    return [*full, (x[:3], y[:3])]


def joined(data: Sequence[Batch]) -> Batch:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def loss_function(net: nn.Module, batch: Batch, loss_fn: Any = F.cross_entropy) -> Callable[[Tensor], Tensor]:
    """The loss of a flat vector of the parameters."""
    names, params = zip(*net.named_parameters(), strict=True)

    def f(w: Tensor) -> Tensor:
        parts = torch.split(w, [p.numel() for p in params])
        values = {name: part.view(p.shape) for name, p, part in zip(names, params, parts, strict=True)}
        return loss_fn(functional_call(net, values, (batch[0],)), batch[1])

    return f


@pytest.fixture(scope="module")
def oracle() -> tuple[nn.Module, list[Batch], Tensor]:
    """A network in float64, ragged data, and its exact Hessian over all of them."""
    net, data = small_net(torch.float64), ragged()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    exact = hessian(loss_function(net, joined(data)))(flat(list(net.parameters()))).detach()
    torch.set_num_threads(threads)
    return net, data, exact


def vector(like: Sequence[Tensor], seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in like]


# ---- against the exact Hessian ----


def test_exact_diagonal(oracle: tuple[nn.Module, list[Batch], Tensor]) -> None:
    net, data, h = oracle
    found = curvature.exact_diag(net, F.cross_entropy, data)
    # both are float64 sums of at most a few thousand rounded products: far below 1e4 eps of the largest
    assert (flat(found) - h.diagonal()).abs().max() < 1e4 * EPS * h.abs().max()
    assert [d.shape for d in found] == [p.shape for p in net.parameters()]


def test_product_with_a_vector(oracle: tuple[nn.Module, list[Batch], Tensor]) -> None:
    net, data, h = oracle
    v = vector(list(net.parameters()))
    found = curvature.hvp(net, F.cross_entropy, data, v)
    assert (flat(found) - h @ flat(v)).abs().max() < 1e4 * EPS * (h.abs() @ flat(v).abs()).max()


def test_difference_is_the_product(oracle: tuple[nn.Module, list[Batch], Tensor]) -> None:
    """Within what a central difference errs by: h^2 / 6 times the third derivative of the gradient's path, and the
    rounding of two gradients over 2 h."""
    net, data, h = oracle
    w, v = flat(list(net.parameters())), vector(list(net.parameters()))
    f = loss_function(net, joined(data))
    gradient = torch.func.grad(f)

    def along(t: Tensor) -> Tensor:
        return gradient(w + t * flat(v))

    def derivative(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: jvp(g, (t,), (torch.ones((), dtype=torch.float64),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    third = derivative(derivative(derivative(along)))(zero).abs().max()
    step = EPS ** (1 / 3) * (1 + w.norm()) / flat(v).norm()
    truncation = 1.1 * step**2 / 6 * third  # the third derivative changes by far less than 10 % over 1e-4
    rounding = 100 * EPS * along(zero).abs().max() / step  # sums of a few hundred products
    found = flat(curvature.hvp(net, F.cross_entropy, data, v, method="finite_difference"))
    assert (found - h @ flat(v)).abs().max() < truncation + rounding
    assert truncation + rounding < 1e-6 * (h @ flat(v)).abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_difference_of_a_quartic_has_the_known_error(dtype: torch.dtype) -> None:
    """w^4: the gradient 4 w^3 makes a central difference of 12 w^2 v + 4 h^2 v^3, exactly, h far from small."""
    net = Function(lambda w: (w**4).sum(), [0.5, -1.0, 2.0], dtype=dtype)
    w, v, h = net.w[0].detach().double(), torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64), 0.25
    found = curvature.hvp(net, mean_output, ANY, [v.to(dtype)], method="finite_difference", step=h)[0].double()
    expected = 12 * w**2 * v + 4 * h**2 * v**3
    # each gradient is a few roundings of at most 4 (|w| + h |v|)^3
    bound = 20 * torch.finfo(dtype).eps * 4 * (w.abs() + h * v.abs()) ** 3 / h
    assert ((found - expected).abs() <= bound).all()


def test_difference_along_zero_is_zero() -> None:
    net, _ = quadratic()
    found = curvature.hvp(net, mean_output, ANY, [torch.zeros(2, 2), torch.zeros(2)], method="finite_difference")
    assert all(not t.any() for t in found)


def test_gauss_newton_is_the_exact_matrix_of_a_linear_classifier() -> None:
    """For logits W x the Gauss-Newton diagonal is x_j^2 p_c (1 - p_c), averaged over the samples; the batch of two and
    the batch of three count 2 and 3 times."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    p = net(x).softmax(1)
    expected = torch.einsum("nc,nj->cj", p * (1 - p), x**2).detach() / 5
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    value, stderr, samples = curvature.gnb_diag(net, F.cross_entropy, data, samples=300)
    assert samples == 300
    assert ((value[0] - expected).abs() < 4 * stderr[0]).all()
    assert (stderr[0] < 0.2 * expected).all()


# ---- Hutchinson ----


@pytest.mark.parametrize(
    ("law", "method"), [("rademacher", "autograd"), ("normal", "autograd"), ("rademacher", "finite_difference")]
)
def test_hutchinson_is_unbiased_and_knows_its_error(law: str, method: str) -> None:
    """200 seeds on a quadratic: the mean lies within 4 of its standard errors, which are known in closed form. The
    squared standard errors that are reported, summed over the elements, average to the variance, within 4 of their own
    standard errors."""
    net, a = quadratic()
    samples, seeds = 2, 200
    runs = [
        curvature.hutchinson_diag(net, mean_output, ANY, samples=samples, distribution=law, method=method, seed=seed)
        for seed in range(seeds)
    ]
    values = torch.stack([flat(run.value) for run in runs])
    variance = ((a**2).sum(1) - a.diagonal() ** 2 + (2 * a.diagonal() ** 2 if law == "normal" else 0.0)) / samples
    assert ((values.mean(0) - a.diagonal()).abs() < 4 * (variance / seeds).sqrt()).all()
    squares = torch.stack([(flat(run.stderr) ** 2).sum() for run in runs])
    error = float(squares.std()) / math.sqrt(seeds)
    assert abs(float(squares.mean() - variance.sum())) < 4 * error < 0.6 * float(variance.sum())


@pytest.mark.parametrize("law", ["rademacher", "normal"])
def test_standard_error_is_that_of_the_samples(law: str) -> None:
    """The k-th sample is k times the mean of k, less k - 1 times the mean of k - 1."""
    net, _ = quadratic()
    runs = [curvature.hutchinson_diag(net, mean_output, ANY, samples=k, distribution=law) for k in range(1, 6)]
    sums = torch.stack([torch.zeros(6, dtype=torch.float64), *(run.samples * flat(run.value) for run in runs)])
    spread = sums.diff(dim=0).std(0)
    assert spread.all()
    assert torch.allclose(flat(runs[-1].stderr), spread / math.sqrt(5), rtol=1e-12)


def test_trace_is_unbiased_and_knows_its_error() -> None:
    """One Rademacher sample of the trace has variance 2 sum_{i != j} A_ij^2."""
    net, a = quadratic()
    samples, seeds = 2, 200
    runs = [curvature.hutchinson_trace(net, mean_output, ANY, samples=samples, seed=seed) for seed in range(seeds)]
    variance = 2 * float((a**2).sum() - (a.diagonal() ** 2).sum())
    mean = sum(run.value for run in runs) / seeds
    assert abs(mean - float(a.trace())) < 4 * math.sqrt(variance / samples / seeds)
    squares = torch.tensor([run.stderr**2 for run in runs], dtype=torch.float64)
    error = float(squares.std()) / math.sqrt(seeds)
    assert abs(float(squares.mean()) - variance / samples) < 4 * error < 0.7 * variance / samples


@pytest.mark.parametrize("law", ["rademacher", "normal"])
@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
def test_trace_is_the_sum_of_the_diagonal(law: str, method: str) -> None:
    net, a = quadratic()
    options: dict[str, Any] = {"samples": 5, "distribution": law, "method": method, "seed": 7}
    trace = curvature.hutchinson_trace(net, mean_output, ANY, **options)
    diag = curvature.hutchinson_diag(net, mean_output, ANY, **options)
    assert trace.value == pytest.approx(float(flat(diag.value).sum()), abs=100 * EPS * float(a.abs().sum()))
    assert trace.samples == diag.samples == 5


@pytest.mark.parametrize("law", ["rademacher", "normal"])
def test_differences_use_the_same_probes(law: str) -> None:
    """On a quadratic a central difference is exact, so both methods agree probe by probe: to the rounding of the
    gradient, of size ||A w||, over the step."""
    net, a = quadratic()
    pair = [
        curvature.hutchinson_diag(net, mean_output, ANY, samples=3, distribution=law, method=method)
        for method in ("autograd", "finite_difference")
    ]
    w = flat(list(net.w))
    step = EPS ** (1 / 3) * (1 + w.norm()) / math.sqrt(6)
    tolerance = 100 * EPS * float(a.abs().sum() * w.abs().max() / step)
    assert (flat(pair[0].value) - flat(pair[1].value)).abs().max() < tolerance < 1e-6
    assert (flat(pair[0].stderr) - flat(pair[1].stderr)).abs().max() < tolerance


def test_a_diagonal_hessian_has_no_sampling_error() -> None:
    """v_i H_ii v_i is H_ii for any signs: the error that is left is rounding, not the cancellation of two means of
    squares, which would leave sqrt(eps) of the value."""
    scale = torch.tensor([0.1, 10.0, -1000.0])
    net = Function(lambda w: 0.5 * (scale * w**2).sum(), [1.0, 2.0, 3.0], dtype=torch.float32)
    value, stderr, _ = curvature.hutchinson_diag(net, mean_output, ANY, samples=7)
    assert torch.allclose(value[0], scale, rtol=1e-6, atol=0)
    assert (stderr[0] <= 4 * torch.finfo(torch.float32).eps * scale.abs()).all()


def test_one_sample_has_no_standard_error() -> None:
    net, _ = quadratic()
    assert flat(curvature.hutchinson_diag(net, mean_output, ANY, samples=1).stderr).isnan().all()
    assert math.isnan(curvature.hutchinson_trace(net, mean_output, ANY, samples=1).stderr)


def test_estimates_are_functions_of_the_seed_alone() -> None:
    net, _ = quadratic()
    found = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        found.append(flat(curvature.hutchinson_diag(net, mean_output, ANY, samples=2, seed=seed).value))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- weights of batches, subsets, unused parameters ----


def _hutchinson(net: nn.Module, data: Any) -> Tensor:
    return flat(curvature.hutchinson_diag(net, F.cross_entropy, data, samples=2).value)


def _trace(net: nn.Module, data: Any) -> Tensor:
    return torch.tensor([curvature.hutchinson_trace(net, F.cross_entropy, data, samples=2).value])


def _sharpness(net: nn.Module, data: Any) -> Tensor:
    rise = curvature.expected_sharpness(net, F.cross_entropy, data, scale=0.1, samples=2)
    return torch.tensor([rise.value, rise.stderr], dtype=torch.float64)


def _difference(net: nn.Module, data: Any) -> Tensor:
    v = vector(list(net.parameters()))
    return flat(curvature.hvp(net, F.cross_entropy, data, v, method="finite_difference", step=1e-4))


@pytest.mark.parametrize("measure", [_hutchinson, _trace, _sharpness, _difference])
def test_a_ragged_batch_has_its_weight(measure: Callable[[nn.Module, Any], Tensor]) -> None:
    """The same samples in one batch give the same, up to rounding (over the step of 1e-4 for the differences)."""
    net, data = small_net(torch.float64), ragged(3)
    whole, parts = measure(net, joined(data)), measure(net, data)
    assert torch.allclose(whole, parts, rtol=1e-8, atol=1e-9)
    unweighted = torch.stack([measure(net, [batch]) for batch in data]).mean(0)
    assert not torch.allclose(whole, unweighted, rtol=1e-3, atol=1e-4)


def test_squared_gradients_of_batches() -> None:
    net, data = small_net(torch.float64), ragged()
    squares = []
    for x, y in data:
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        squares.append(flat(grads) ** 2)
    expected = (8 * squares[0] + 3 * squares[1]) / 11
    assert torch.allclose(flat(curvature.squared_gradient_diag(net, F.cross_entropy, data)), expected, rtol=1e-12)


def test_a_subset_of_the_parameters(oracle: tuple[nn.Module, list[Batch], Tensor]) -> None:
    net, data, h = oracle
    last = list(net[5].parameters())
    count = sum(p.numel() for p in last)
    found = curvature.exact_diag(net, F.cross_entropy, data, params=net[5].parameters())
    assert (flat(found) - h.diagonal()[-count:]).abs().max() < 1e4 * EPS * h.abs().max()
    v = vector(last)
    block = h[-count:, -count:]
    product = curvature.hvp(net, F.cross_entropy, data, v, params=last)
    assert (flat(product) - block @ flat(v)).abs().max() < 1e4 * EPS * (block.abs() @ flat(v).abs()).max()


MEASURES: dict[str, Callable[..., Any]] = {
    "hvp": lambda net, loss, data: curvature.hvp(net, loss, data, [torch.ones_like(p) for p in net.parameters()]),
    "hvp, difference": lambda net, loss, data: curvature.hvp(
        net, loss, data, [torch.ones_like(p) for p in net.parameters()], method="finite_difference"
    ),
    "hutchinson": lambda net, loss, data: curvature.hutchinson_diag(net, loss, data, samples=2).value,
    "hutchinson, difference": lambda net, loss, data: (
        curvature.hutchinson_diag(net, loss, data, samples=2, method="finite_difference").value
    ),
    "squared gradient": curvature.squared_gradient_diag,
    "gnb": lambda net, loss, data: curvature.gnb_diag(net, loss, data, samples=2).value,
    "exact": curvature.exact_diag,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_unused_parameters_are_flat(measure: Callable[..., Any]) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))
            self.used = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    found = measure(Partly(), F.cross_entropy, (torch.randn(4, 2), torch.tensor([0, 1, 1, 0])))
    assert torch.equal(found[0], torch.zeros(3))
    assert found[1].any()


@pytest.mark.parametrize("measure", [m for name, m in MEASURES.items() if name not in ("gnb", "squared gradient")])
def test_a_linear_loss_is_flat(measure: Callable[..., Any]) -> None:
    net = Function(lambda w: w.sum(), [1.0, 2.0])
    assert flat(measure(net, mean_output, ANY)).abs().max() < 1e-9  # the difference rounds: eps / step


@pytest.mark.parametrize("measure", [m for name, m in MEASURES.items() if name != "gnb"])
def test_a_loss_without_parameters_is_flat(measure: Callable[..., Any]) -> None:
    net = Function(lambda w: torch.ones(()), [1.0, 2.0])
    assert not flat(measure(net, mean_output, ANY)).any()


# ---- Gauss-Newton-Bartlett ----


def test_gauss_newton_takes_labels_with_the_probabilities_of_the_softmax() -> None:
    """Two classes, one sample: the estimate is (1 - p)^2 x^2 with probability p, else p^2 x^2."""
    net = Function(lambda w: torch.stack([w, -w]), 0.4)
    p = 1 / (1 + math.exp(-0.8))
    found = [curvature.gnb_diag(net, mean_output, (torch.zeros(1), torch.zeros(1).long()), seed=s) for s in range(200)]
    values = torch.stack([f.value[0] for f in found])
    first, second = 4 * (1 - p) ** 2, 4 * p**2  # the logits differ by 2 w
    is_first = (values - first).abs() < 1e-12
    assert (is_first | ((values - second).abs() < 1e-12)).all()
    assert abs(float(is_first.double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / 200)


def test_gauss_newton_takes_log_probabilities_positions_and_ignored_labels() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 4, dtype=torch.float64)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = flat(curvature.gnb_diag(net, F.cross_entropy, (x, y), samples=3).value)
    log_net = nn.Sequential(net, nn.LogSoftmax(dim=-1))
    found = curvature.gnb_diag(log_net, F.nll_loss, (x, y), samples=3)
    assert torch.allclose(flat(found.value), expected, rtol=1e-9)
    last = curvature.gnb_diag(net, F.cross_entropy, (x.view(2, 3, 3), y.view(2, 3)), samples=3)
    assert torch.allclose(flat(last.value), expected, rtol=1e-9)
    soft = curvature.gnb_diag(net, F.cross_entropy, (x, F.one_hot(y, 4).double()), samples=3)
    assert torch.allclose(flat(soft.value), expected, rtol=1e-9)
    p = net(x[:4]).softmax(1).detach()
    known = torch.einsum("nc,nj->cj", p * (1 - p), x[:4] ** 2) / 4
    ignored = y.where(torch.arange(6) < 4, -100)
    found = curvature.gnb_diag(net, F.cross_entropy, (x, ignored), samples=200)
    assert ((found.value[0] - known).abs() < 4 * found.stderr[0]).all()


def test_gauss_newton_with_every_label_ignored_is_zero() -> None:
    net = nn.Linear(3, 4)
    assert not flat(
        curvature.gnb_diag(net, F.cross_entropy, (torch.randn(2, 3), torch.tensor([-100, -100]))).value
    ).any()


# ---- types ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_are_float32_at_least(dtype: torch.dtype) -> None:
    net, a = quadratic(dtype)
    found = curvature.hutchinson_diag(net, mean_output, ANY, samples=2)
    assert {t.dtype for t in [*found.value, *found.stderr]} == {torch.float32}
    # signs times a sum of six products of the type, rounded to it
    exact = curvature.exact_diag(net, mean_output, ANY)
    assert (flat(exact) - a.diagonal().float()).abs().max() <= 8 * torch.finfo(dtype).eps * float(a.abs().max())


@pytest.mark.cuda
def test_on_a_gpu_with_batches_from_the_host() -> None:
    net, data = small_net(torch.float64), ragged()
    here = curvature.hutchinson_diag(net, F.cross_entropy, data, samples=3)
    there = curvature.hutchinson_diag(net.cuda(), F.cross_entropy, data, samples=3)
    assert all(t.is_cuda for t in there.value)
    assert torch.allclose(flat(here.value), flat(there.value).cpu(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(flat(here.stderr), flat(there.stderr).cpu(), rtol=1e-9, atol=1e-12)
