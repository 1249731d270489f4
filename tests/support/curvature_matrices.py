"""Small models and matrices whose curvature is known, for the tests of flatmin.curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from models import Batch, batches


def tiny_net(norm: bool = False) -> nn.Sequential:
    """36 inputs, 3 outputs, 183 parameters (189 with BatchNorm), float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(36, 3), nn.Tanh(), nn.Linear(3, 3)]
    if norm:
        layers.insert(2, nn.BatchNorm1d(3))
    return nn.Sequential(*layers).double()


def ragged() -> list[Batch]:
    """Batches of 8 and 3."""
    (x, y), (u, v) = batches(2, torch.float64)
    return [(x, y), (u[:3], v[:3])]


def regression() -> list[Batch]:
    return [(x, torch.randn(len(y), 3, dtype=torch.float64)) for x, y in ragged()]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


class Normalise(nn.Module):
    """BatchNorm in training mode, written out: torch.func has a wrong second derivative of torch's own (2.13: its
    Hessian is not symmetric, and not what differences of gradients give)."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(0)
        return self.weight * centred / ((centred**2).mean(0) + self.eps).sqrt() + self.bias


def outputs_of(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The outputs as a function of a flat vector of the parameters."""
    if net.training:
        net = nn.Sequential(*[Normalise(m) if isinstance(m, nn.BatchNorm1d) else m for m in net])
    names, params = zip(*net.named_parameters(), strict=True)

    def f(w: Tensor) -> Tensor:
        parts = torch.split(w, [p.numel() for p in params])
        values = {name: part.view(p.shape) for name, p, part in zip(names, params, parts, strict=True)}
        return functional_call(net, values, (x,))

    return f


def formed(net: nn.Module, data: list[Batch], matrix: str, loss_fn: Any = F.cross_entropy) -> Tensor:
    """The matrix itself, by torch.func: the definition, batch by batch, sample by sample."""
    w = flat(net.parameters())
    total, count = torch.zeros(len(w), len(w), dtype=torch.float64), 0
    for x, y in data:
        f = outputs_of(net, x)
        if matrix == "hessian":
            part = hessian(lambda v, f=f, y=y: loss_fn(f(v), y))(w)
        elif matrix == "ggn":
            j = jacrev(f)(w).reshape(-1, len(w))
            z = f(w)
            inner = hessian(lambda o, y=y, z=z: loss_fn(o.view_as(z), y))(z.flatten())
            part = j.T @ inner @ j
        else:
            each = jacrev(
                lambda v, f=f, y=y: torch.stack([loss_fn(o[None], t[None]) for o, t in zip(f(v), y, strict=True)])
            )(w)
            part = each.T @ each / len(y)
        total += len(y) * part.detach()
        count += len(y)
    return total / count


def symmetric(values: Sequence[float] | np.ndarray[Any, Any], seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors, float64."""
    spectrum = torch.as_tensor(np.asarray(values, dtype=float))
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    a = q @ torch.diag(spectrum) @ q.T
    return 0.5 * (a + a.T)


class Q4(nn.Module):
    """The problem of four variables of all golden values: squares and fourth powers, two parameters of shape (1, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([[1.0, -0.5]], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([[0.25, 0.125]], dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = torch.cat([self.u, self.v], 1).flatten()
        return x @ w, (w**4).sum() / 4.0


Q4_DATA = (
    torch.tensor([[1, 0, 0.5, -1], [0.5, 1, 0, 0.25], [-1, 0.5, 1, 0], [0, -0.25, 0.5, 1]], dtype=torch.float64),
    torch.tensor([0.5, -1.0, 0.25, 1.0], dtype=torch.float64),
)


def q4_loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return 0.5 * ((output[0] - y) ** 2).mean() + output[1]
