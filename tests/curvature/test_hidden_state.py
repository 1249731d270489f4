"""State that a forward pass leaves in other places than the model's buffers: all passes see the same of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import curvature
from flatmin.sharpness import line, m_sharpness
from models import same_bits
from several_passes import inputs, net

pytestmark = pytest.mark.usefixtures("one_thread")


class Caching(nn.Module):
    """Fills a buffer that was None, and registers another, in its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.ones(2, dtype=torch.float64)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2, dtype=torch.float64))
        return self.net(x) * self.cache


class Centred(nn.Module):
    """A criterion with a running mean, as in self-distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs - self.centre, targets)
        self.centre.lerp_(outputs.detach().mean(0), 0.5)
        return loss


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.generator = net(), torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype))


def data() -> list[tuple[Tensor, Tensor]]:
    y = torch.arange(10) % 2
    return list(zip(inputs(10).split(5), y.split(5), strict=True))


MEASURES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "eigenvalues": lambda model, loss_fn: curvature.eigenvalues(model, loss_fn, data(), k=2),
    "m-sharpness": lambda model, loss_fn: m_sharpness(model, loss_fn, data(), 0.1, 4),
    "line": lambda model, loss_fn: line(model, loss_fn, data(), points=3),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_buffers_that_a_pass_makes_are_gone_afterwards(measure: Callable[[nn.Module, Any], Any]) -> None:
    model = Caching()
    before = list(model.state_dict())
    measure(model, F.cross_entropy)
    assert list(model.state_dict()) == before
    assert model.cache is None


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_the_criterions_buffers_come_back(measure: Callable[[nn.Module, Any], Any]) -> None:
    criterion = Centred()
    measure(net(), criterion)
    assert torch.equal(criterion.centre, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_generators_of_modules_come_back(measure: Callable[[nn.Module, Any], Any]) -> None:
    model = Noisy()
    before = model.generator.get_state()
    measure(model, F.cross_entropy)
    assert same_bits([model.generator.get_state()], [before])


def test_every_pass_measures_the_same_function() -> None:
    """An eigenvector's product is its eigenvalue times it only where both passes have the same noise and the same
    centre."""
    for model, loss_fn in ((Noisy(), F.cross_entropy), (net(), Centred())):
        with curvature.linear_operator(model, loss_fn, data()) as A:
            v = A.probe(0, 0)
            assert torch.equal(A @ v, A @ v)
            found = curvature.eigenvalues(A, k=1, tol=1e-6, vectors=True)
            x = A.flatten(found.vectors[0])
            assert float((A @ x - found.lambda_1 * x).norm()) < 1e-5
