"""R(theta) of label-noise SGD, the effective lambda and the meters: closed forms, golden values (methods.md C1, C2)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import LabelNoise, RegressionNoise, label_noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic(nn.Module):
    """The loss ``w' diag(h) w / 2``: its Hessian is diag(h) everywhere."""

    def __init__(self, h: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, len(h) + 1.0, dtype=torch.float64))
        self.h = torch.tensor(h, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.h * self.w.square()).sum() * x


def value_of(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()


ONE = (torch.ones(1, dtype=torch.float64), torch.zeros(1))


@pytest.mark.parametrize(("lr", "expected"), [(0.5, 0.9808292530), (0.01, 0.7531438839), (1e-7, 0.75)])
@pytest.mark.parametrize("method", ["exact", "slq"])
def test_closed_form(lr: float, expected: float, method: str) -> None:
    """Hessian diag(1, 2). Two steps of Lanczos are exact for it."""
    found = label_noise.regulariser(Quadratic([1.0, 2.0]), value_of, ONE, lr, method=method)
    assert found.value == pytest.approx(expected, rel=1e-6 if lr < 1e-6 else 1e-9)
    assert found.value == pytest.approx(sum(-math.log(1 - lr * h / 2) for h in (1.0, 2.0)) / (2 * lr), rel=1e-8)
    assert (found.lambda_1, found.trace) == pytest.approx((2.0, 3.0)) and found.method == method
    assert found.stderr == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("method", ["exact", "slq"])
def test_infinite_where_gradient_descent_is_unstable(method: str) -> None:
    model = Quadratic([1.0, -3.0, 8.0])
    with pytest.warns(RuntimeWarning, match=r"lr lambda_1 = 0.25 \* 8 = 2 is 2 or more.*above lr = 0.25"):
        assert label_noise.regulariser(model, value_of, ONE, 0.25, method=method).value == math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(label_noise.regulariser(model, value_of, ONE, 0.2499, method=method).value)


def network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    data = [(torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))) for _ in range(3)]
    return model, data


def test_quadrature_against_all_eigenvalues() -> None:
    """Within 3 standard errors of the exact value, but for 2 of 20 seeds: of t-values with 9 degrees of freedom 3 of
    200 are outside."""
    model, batches = network()
    loss, data = nn.functional.cross_entropy, batches[:1]
    exact = label_noise.regulariser(model, loss, data, 0.7)
    assert exact.method == "exact" and exact.stderr == 0.0
    assert 1.1 * exact.trace / 4 < exact.value  # the trace alone would not do
    z = []
    for seed in range(20):
        found = label_noise.regulariser(model, loss, data, 0.7, method="slq", steps=15, seed=seed)
        assert found.stderr < 0.5 * exact.value
        assert found.lambda_1 == pytest.approx(exact.lambda_1, rel=1e-3)
        z.append((found.value - exact.value) / found.stderr)
    assert abs(z[0]) < 3.0 and sum(abs(x) < 3.0 for x in z) >= 18, z
    assert (sum(x * x for x in z) / 20) ** 0.5 > 0.3  # errors that are not far too large either
    assert "R = " in repr(found) and "+-" in repr(found)


def test_exact_value_is_that_of_the_hessian() -> None:
    """Against torch.func's Hessian and a determinant instead of eigenvalues."""
    model, data = network()
    params = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in params.values()])

    def loss_of(w: Tensor) -> Tensor:
        parts, at = {}, 0
        for name, p in params.items():
            parts[name] = w[at : at + p.numel()].view(p.shape)
            at += p.numel()
        losses = [nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y) for x, y in data]
        return torch.stack(losses).mean()

    hessian = torch.func.hessian(loss_of)(flat)
    for lr in (0.1, 1.5):
        sign, logarithm = torch.linalg.slogdet(torch.eye(len(flat), dtype=torch.float64) - lr * hessian / 2)
        assert sign == 1
        found = label_noise.regulariser(model, nn.functional.cross_entropy, data, lr)
        assert found.value == pytest.approx(-float(logarithm) / (2 * lr), rel=1e-9)


def test_method_by_size() -> None:
    model, data = network()
    loss = nn.functional.cross_entropy
    assert label_noise.regulariser(model, loss, data, 0.1, exact_limit=122, probes=2).method == "slq"  # of 123
    bias = [model[2].bias]  # type: ignore[index]
    assert label_noise.regulariser(model, loss, data, 0.1, exact_limit=3, params=bias).method == "exact"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr: 0 given"),
        ({"lr": -1.0}, "lr: -1.0"),
        ({"lr": math.nan}, "lr: nan"),
        ({"method": "hutchinson"}, "method: 'hutchinson'"),
        ({"probes": 0, "method": "slq"}, "probes: 0"),
        ({"exact_limit": -1}, "exact_limit: -1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_noise.regulariser(Quadratic([1.0]), value_of, ONE, **{"lr": 0.1, **change})


# ---- lambda ----


def test_effective_lambda() -> None:
    assert label_noise.effective_lambda(0.1, 2.0, 8) == pytest.approx(0.05)
    for arguments, message in (((0.0, 1.0, 1), "lr: 0"), ((0.1, -1.0, 1), "sigma"), ((0.1, 1.0, 0), "batch_size")):
        with pytest.raises(ValueError, match=message):
            label_noise.effective_lambda(*arguments)


def test_stationary_variance_on_a_quadratic() -> None:
    """SGD with label noise on ``(sqrt(h) w - y)^2 / 2``, h = 2: variance ``lambda / (2 - lr h)`` (methods.md C2)."""
    h, lr, sigma, batch = 2.0, 0.5, 1.0, 4
    noise = RegressionNoise(sigma, generator=seeded())
    w, steps, burn = torch.zeros(500, dtype=torch.float64), 300, 50
    total = 0.0
    for step in range(steps):
        y = noise(torch.zeros(500, batch, dtype=torch.float64))
        w -= lr * math.sqrt(h) * (math.sqrt(h) * w.unsqueeze(1) - y).mean(1)
        total += float(w.square().mean()) if step >= burn else 0.0
    expected = label_noise.effective_lambda(lr, sigma, batch) / (2.0 - lr * h)
    assert expected == pytest.approx(0.125)
    assert total / (steps - burn) == pytest.approx(expected, rel=0.02)


# ---- meters ----


def test_trace_of_the_noise() -> None:
    """Logits (2, .5, -1) as the weights, y = 0, p = .3: ``tr G = 1 - sum of the row's squares = .465``."""
    model = nn.Linear(1, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0], [0.5], [-1.0]]))
    data = [(torch.ones(8, 1, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)) for _ in range(50)]
    noise = LabelNoise(3, 0.3, "exclude_true", generator=seeded())
    before = noise.state_dict()
    found = label_noise.gradient_noise(model, nn.functional.cross_entropy, data, noise, samples=20)
    assert found.trace.samples == 1000 and 0.0 < found.trace.stderr < 0.05
    assert abs(found.trace.value - 0.465) < 4 * found.trace.stderr
    # each batch is the same one: its gradients differ by the noise alone
    assert found.variance == pytest.approx(0.465 / 8, rel=0.15)
    assert noise.state_dict() == before and model.weight.grad is None


def test_meters_without_noise() -> None:
    model, data = network()
    found = label_noise.gradient_noise(model, nn.functional.cross_entropy, data, LabelNoise(3, 0.0, "uniform"))
    assert found.trace.value == pytest.approx(0.0, abs=1e-12)
    loss = [nn.functional.cross_entropy(model(x), y) for x, y in data]
    grads = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(v, model.parameters())]) for v in loss])
    assert found.variance == pytest.approx(float(grads.square().sum(1).mean() - grads.mean(0).square().sum()))


def test_trace_of_regression_noise() -> None:
    """The loss ``(w x - y)^2 / 2``, mean over the batch: a sample's noise is ``sigma^2 x^2``."""
    model = nn.Linear(1, 1, bias=False)
    x = torch.full((16, 1), 3.0)
    noise = RegressionNoise(0.5, generator=seeded())
    found = label_noise.gradient_noise(
        model, lambda a, b: 0.5 * (a - b).square().mean(), [(x, x)] * 100, noise, samples=5
    )
    assert abs(found.trace.value - 0.25 * 9.0) < 4 * found.trace.stderr
    with pytest.raises(TypeError, match="noise: LabelNoise"):
        label_noise.gradient_noise(model, nn.functional.mse_loss, [(x, x)], LabelNoise(3, 0.1, "smooth"))  # type: ignore[arg-type]
