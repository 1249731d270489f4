"""Small problems for the tests of sharpness: one with golden values, quadratics, and a net that ReLU lets rescale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import q4

Pair = tuple[Tensor, Tensor]


class Q4(nn.Module):
    """The problem of :mod:`q4` as a model: outputs are ``x . w`` and the part of the loss that has no x."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = q4.weights()

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.u, self.v], dim=1)[0]
        return torch.stack([x @ w, w.pow(4).sum().div(4.0).expand(len(x))], dim=1)


def q4_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return ((outputs[:, 0] - y) ** 2 / 2 + outputs[:, 1]).mean()


def q4_data() -> Pair:
    return q4.X, q4.Y


class Quadratic(nn.Module):
    """``sum(a_i w_i^2) / 2``, the same for all samples."""

    def __init__(self, a: list[float], w: list[float]) -> None:
        super().__init__()
        self.a = torch.tensor(a, dtype=torch.float64)
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * (self.a * self.w**2).sum()).expand(len(x))


def mean_output(output: Tensor, _: Tensor) -> Tensor:
    return output.mean()


def nothing(n: int = 2) -> Pair:
    return torch.zeros(n), torch.zeros(n)


def relu_net(factor: float = 1.0) -> nn.Sequential:
    """Two layers; the function is the same for every ``factor`` > 0, which the first is multiplied and the second
    divided by."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        net[0].weight.mul_(factor)
        net[0].bias.mul_(factor)
        net[2].weight.div_(factor)
    return net


def relu_data(n: int = 24) -> Pair:
    g = torch.Generator().manual_seed(4)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)
